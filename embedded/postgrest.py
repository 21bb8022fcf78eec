"""PostgREST's wire protocol as an httpx transport, in process, over a pool of database connections.

Every connection acts as one role (`service_role`) from its start. A failed connection surfaces as the httpx
error that a network would cause, and a feature that is not implemented gets a 501.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import orjson

from .asyncpg_types import PooledConnection
from .catalog import Catalog, Function, Relation
from .connections import Connections, Target
from .postgrest_errors import PostgrestError, bad_request, error_from_postgres, not_implemented
from .queries import PLAIN_QUERY, Query, check_schema, read_parameters, read_query, split_arguments
from .responses import Result, call_response, change_response, page_response, require_few_changes
from .statements import (
    Statement,
    call_statement,
    delete_statement,
    insert_statement,
    read_statement,
    update_statement,
)

PREFIX = "/rest/v1/"
# What the client sends with a plain call. Any other Accept header may change the result's form.
PLAIN_ACCEPTS = {"*/*", "application/json"}
# A name was not found, by PostgREST or by PostgreSQL: the catalog may be older than the last migration.
STALE_CODES = {"PGRST202", "PGRST204", "PGRST205", "42883", "42703", "42P01"}
# The connection broke under a statement, so that nobody knows whether it took effect.
BROKEN_CONNECTION = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)


class PostgrestTransport(httpx.AsyncBaseTransport):
    """An httpx transport that is PostgREST, for `httpx.AsyncClient(transport=...)`.

    `target` is a dsn, the keyword arguments of `asyncpg.connect`, or a function that returns them, which is
    called for every new connection. PostgreSQL 15 or later will do if the login may act as `role`.
    Connections start with the options `role` and `statement_timeout`. A pooler that refuses or ignores them
    (pgbouncer, Supavisor in transaction mode) leads to a 503 PGRST000 that says so: use the direct connection
    string.

    `ensure_running` is awaited when no connection can be made, before the one further attempt.
    `statement_timeout_ms` and `max_rows` are a hosted project's limits.
    """

    def __init__(
        self,
        target: Target,
        *,
        ensure_running: Callable[[], Awaitable[None]] | None = None,
        max_rows: int = 1000,
        statement_timeout_ms: int = 8000,
        pool_size: int = 10,
        role: str = "service_role",
    ) -> None:
        self._connections = Connections(
            target,
            ensure_running=ensure_running,
            statement_timeout_ms=statement_timeout_ms,
            size=pool_size,
            role=role,
        )
        self._max_rows = max_rows
        self._plain_calls: dict[tuple[str, tuple[str, ...]], tuple[Function, str]] = {}

    def forget_schema(self) -> None:
        """Makes the next request read the schema again, as `notify pgrst, 'reload schema'` does elsewhere."""
        self._connections.catalog = None
        self._plain_calls.clear()

    async def aclose(self) -> None:
        """Closes the pool, after the requests under way."""
        await self._connections.aclose()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answers one request.

        Raises httpx.ConnectError or ConnectTimeout when nothing was sent, and httpx.ReadError or ReadTimeout
        when nobody knows whether the statement took effect.
        """
        body = await request.aread()
        try:
            path, _, query = request.url.raw_path.decode("ascii").partition("?")
            if not path.startswith(PREFIX):
                raise not_implemented(f"The path {path}")
            check_schema(request.headers)
            async with self._connections.acquire(request) as connection:
                return await self._answer(_Exchange(connection, request, query, body))
        except PostgrestError as error:
            return error.response(request)

    async def _answer(self, exchange: _Exchange) -> httpx.Response:
        """The response, after a second look at the schema where a name was unknown to an older catalog."""
        was_known = self._connections.catalog is not None
        try:
            return await self._answer_once(exchange)
        except PostgrestError as error:
            # A name can be missing from the catalog only, because a migration has added it since.
            if not was_known or error.body["code"] not in STALE_CODES:
                raise
        self.forget_schema()
        return await self._answer_once(exchange)

    async def _answer_once(self, exchange: _Exchange) -> httpx.Response:
        catalog = await self._connections.read_catalog(exchange.connection)
        target = exchange.request.url.path.removeprefix(PREFIX)
        if target.startswith("rpc/"):
            return await self._answer_call(exchange, catalog, target.removeprefix("rpc/"))
        return await self._answer_table(exchange, _require_relation(catalog, target))

    async def _answer_table(self, exchange: _Exchange, relation: Relation) -> httpx.Response:
        request = exchange.request
        query = read_query(request, read_parameters(exchange.query))
        if request.method in ("GET", "HEAD"):
            result = await exchange.execute(read_statement(relation, query, self._max_rows))
            return page_response(request, query, result)
        statement = _change_statement(exchange, relation, query)
        if not query.is_single and query.preferences.max_affected is None:
            return change_response(request, query, await exchange.execute(statement))
        # An error that depends on the number of changed rows must take the change back.
        async with exchange.connection.transaction():
            result = await exchange.execute(statement)
            require_few_changes(query, result)
            return change_response(request, query, result)

    async def _answer_call(self, exchange: _Exchange, catalog: Catalog, name: str) -> httpx.Response:
        if exchange.request.method == "POST":
            return await self._answer_post_call(exchange, catalog, name)
        if exchange.request.method in ("GET", "HEAD"):
            return await self._answer_get_call(exchange, catalog, name)
        raise PostgrestError(405, "PGRST101", f"Cannot use the {exchange.request.method} method on RPC")

    async def _answer_post_call(self, exchange: _Exchange, catalog: Catalog, name: str) -> httpx.Response:
        arguments = _read_arguments(exchange)
        names = tuple(arguments) if isinstance(arguments, dict) else None
        if names and exchange.is_plain:
            return await self._answer_plain_call(exchange, catalog, name, names)
        function = _require_function(catalog, name, names)
        query = read_query(exchange.request, read_parameters(exchange.query))
        # Without named arguments the body is either the one unnamed argument or an empty object.
        body = exchange.body.decode() if names or function.takes_whole_body else None
        statement = call_statement(function, names or (), query, self._max_rows, body)
        return call_response(exchange.request, function, query, await exchange.execute(statement))

    async def _answer_get_call(self, exchange: _Exchange, catalog: Catalog, name: str) -> httpx.Response:
        arguments, others = split_arguments(read_parameters(exchange.query))
        function = _require_function(catalog, name, tuple(arguments))
        query = read_query(exchange.request, others)
        body = orjson.dumps(arguments).decode() if arguments else None
        statement = call_statement(function, tuple(arguments), query, self._max_rows, body)
        # A GET must not change anything: PostgreSQL refuses a write in a read-only transaction.
        async with exchange.connection.transaction(readonly=True):
            result = await exchange.execute(statement)
        return call_response(exchange.request, function, query, result)

    async def _answer_plain_call(
        self, exchange: _Exchange, catalog: Catalog, name: str, names: tuple[str, ...]
    ) -> httpx.Response:
        """The hot path: the statement's text is remembered, and body and result pass as text."""
        body = exchange.body.decode()
        remembered = self._plain_calls.get((name, names))
        if remembered is None:
            function = _require_function(catalog, name, names)
            sql = call_statement(function, names, PLAIN_QUERY, self._max_rows, body).sql
            remembered = self._plain_calls[name, names] = (function, sql)
        function, sql = remembered
        result = await exchange.execute(Statement(sql, (body,)))
        return call_response(exchange.request, function, PLAIN_QUERY, result)


@dataclass(frozen=True)
class _Exchange:
    """One request, its query string (still encoded) and body, and the connection that serves it."""

    connection: PooledConnection
    request: httpx.Request
    query: str
    body: bytes

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the arguments decides the result of a call."""
        headers = self.request.headers
        return not self.query and headers.get("accept", "*/*") in PLAIN_ACCEPTS and "prefer" not in headers

    async def execute(self, statement: Statement) -> Result:
        """Runs a statement. Raises PostgrestError, httpx.ReadError or httpx.ReadTimeout."""
        timeout = self.request.extensions.get("timeout", {}).get("read")
        try:
            record = await self.connection.fetchrow(statement.sql, *statement.arguments, timeout=timeout)
        except BROKEN_CONNECTION as exc:
            raise _read_error(exc, self.request) from exc
        except asyncpg.PostgresError as exc:
            raise error_from_postgres(exc) from exc
        if record is None:
            raise not_implemented("A statement without an answer")
        return Result.from_record(record)


def _read_error(error: Exception, request: httpx.Request) -> httpx.TransportError:
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout("The database did not answer in time", request=request)
    return httpx.ReadError(f"The connection to the database was lost: {error}", request=request)


def _require_relation(catalog: Catalog, name: str) -> Relation:
    relation = catalog.relations.get(name)
    if relation is None or relation.is_type:
        message = f"Could not find the table 'public.{name}' in the schema cache"
        raise PostgrestError(404, "PGRST205", message)
    return relation


def _require_function(catalog: Catalog, name: str, names: tuple[str, ...] | None) -> Function:
    """The one overload that takes arguments of these names; None means that the body is not an object."""
    matches = _matching_overloads(catalog.functions.get(name, ()), names)
    if not matches:
        signature = f"public.{name}({', '.join(names or ())})"
        message = f"Could not find the function {signature} in the schema cache"
        raise PostgrestError(404, "PGRST202", message)
    if len(matches) > 1:
        message = f"Could not choose the best candidate function between {len(matches)} of public.{name}"
        raise PostgrestError(300, "PGRST203", message)
    if matches[0].is_variadic:
        raise not_implemented("Calling a variadic function")
    return matches[0]


def _matching_overloads(overloads: tuple[Function, ...], names: tuple[str, ...] | None) -> list[Function]:
    matches = [function for function in overloads if names is not None and function.accepts(names)]
    # Named arguments come first: a function that takes the whole body would accept anything.
    return matches or [function for function in overloads if function.takes_whole_body]


def _read_arguments(exchange: _Exchange) -> Any:
    _check_content_type(exchange.request)
    try:
        return orjson.loads(exchange.body) if exchange.body else {}
    except orjson.JSONDecodeError as exc:
        raise bad_request("PGRST102", "Empty or invalid json") from exc


def _check_content_type(request: httpx.Request) -> None:
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if media != "application/json":
        raise not_implemented(f"The content type {media}")


def _change_statement(exchange: _Exchange, relation: Relation, query: Query) -> Statement:
    method = exchange.request.method
    if method == "DELETE":
        return delete_statement(relation, query)
    _check_content_type(exchange.request)
    if method == "POST":
        return insert_statement(relation, query, exchange.body)
    if method == "PATCH":
        return update_statement(relation, query, exchange.body)
    raise not_implemented(f"The method {method}")
