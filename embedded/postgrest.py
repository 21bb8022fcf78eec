"""PostgREST's wire protocol as an httpx transport. Its wire protocol, in process, over a pool.

Everything acts as one role (`service_role`), which connections take on as they start. Connection failures
surface as the httpx errors that a network would cause; what is not implemented answers 501.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import orjson

from .answers import (
    JSON_TYPE,
    Refusal,
    bad_request,
    content_range,
    not_a_single_object,
    not_implemented,
    page_status,
    refusal_of,
)
from .catalog import Function, Relation
from .connections import Connections, Target
from .queries import PLAIN_QUERY, Query, check_schema, read_parameters, read_query, split_arguments
from .statements import (
    Statement,
    call_statement,
    delete_statement,
    insert_statement,
    read_statement,
    update_statement,
)

if TYPE_CHECKING:
    Proxy = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

PREFIX = "/rest/v1/"
# What the client sends with a plain rpc, and what changes its meaning.
PLAIN_ACCEPTS = {"*/*", "application/json"}
STALE_CODES = {"42883", "42703", "42P01"}


class PostgrestTransport(httpx.AsyncBaseTransport):
    """An httpx transport that is PostgREST, for `httpx.AsyncClient(transport=...)`.

    `target` is a dsn, the keyword arguments of `asyncpg.connect`, or a function that returns them (asked at
    every new connection). Any PostgreSQL >= 15 will do whose login may act as `role`. Connections start with
    the options `role` and `statement_timeout`; a pooler that refuses or ignores them (pgbouncer, Supavisor in
    transaction mode) is answered with 503 PGRST000 and a sentence that says so: use the direct connection
    string.

    `ensure_running` is awaited when a connection cannot be made, before the one further attempt.
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
        """Makes the next request read tables and functions anew, as `notify pgrst, 'reload schema'` does
        elsewhere.
        """
        self._connections.catalog = None
        self._plain_calls.clear()

    async def aclose(self) -> None:
        """Closes the pool, after the requests under way."""
        await self._connections.aclose()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answers one request.

        Raises httpx.ConnectError or ConnectTimeout when nothing was sent, httpx.ReadError or ReadTimeout when
        it is unknown whether the statement took effect.
        """
        body = await request.aread()
        try:
            path, _, query = request.url.raw_path.decode("ascii").partition("?")
            if not path.startswith(PREFIX):
                raise not_implemented(f"The path {path}")
            check_schema(request.headers)
            target = request.url.path.removeprefix(PREFIX)
            async with self._connections.acquire(request) as connection:
                return await self._answer_fresh(connection, request, target, query, body)
        except Refusal as refusal:
            return refusal.response(request)

    async def _answer_fresh(
        self, connection: Proxy, request: httpx.Request, target: str, query: str, body: bytes
    ) -> httpx.Response:
        """The answer, after a second look at the schema where a name was not found: a migration may have
        added it.
        """
        known = self._connections.catalog
        try:
            return await self._answer(connection, request, target, query, body)
        except Refusal as refusal:
            if known is None or not _is_about_the_schema(refusal):
                raise
        self.forget_schema()
        return await self._answer(connection, request, target, query, body)

    async def _answer(
        self, connection: Proxy, request: httpx.Request, target: str, query: str, body: bytes
    ) -> httpx.Response:
        if target.startswith("rpc/"):
            return await self._answer_call(connection, request, target.removeprefix("rpc/"), query, body)
        relation = await self._relation(connection, target)
        asked = read_query(request, read_parameters(query))
        if request.method in ("GET", "HEAD"):
            row = await self._execute(connection, request, read_statement(relation, asked, self._max_rows))
            return _page(request, asked, row)
        statement = _change(request, relation, asked, body)
        if not asked.is_single and asked.preferences.max_affected is None:
            return _changed(request, asked, await self._execute(connection, request, statement))
        async with connection.transaction():
            row = await self._execute(connection, request, statement)
            limit = asked.preferences.max_affected
            if limit is not None and row[1] > limit:
                details = f"The query affects {row[1]} rows"
                raise bad_request(
                    "PGRST124", "Query result exceeds max-affected preference constraint", details=details
                )
            return _changed(request, asked, row)

    async def _answer_call(
        self, connection: Proxy, request: httpx.Request, name: str, query: str, body: bytes
    ) -> httpx.Response:
        if request.method == "POST":
            given = _read_arguments(request, body)
            names = tuple(given) if isinstance(given, dict) else None
            if (
                not query
                and names
                and request.headers.get("accept", "*/*") in PLAIN_ACCEPTS
                and "prefer" not in request.headers
            ):
                return await self._answer_plain_call(connection, request, name, names, body)
            function = await self._function(connection, name, names)
            asked = read_query(request, read_parameters(query))
            statement = call_statement(
                function, names or (), asked, self._max_rows, _body_text(function, names, body)
            )
            row = await self._execute(connection, request, statement)
        elif request.method in ("GET", "HEAD"):
            arguments, others = split_arguments(read_parameters(query))
            function = await self._function(connection, name, tuple(arguments))
            asked = read_query(request, others)
            text = orjson.dumps(arguments).decode() if arguments else None
            statement = call_statement(function, tuple(arguments), asked, self._max_rows, text)
            async with connection.transaction(readonly=True):
                row = await self._execute(connection, request, statement)
        else:
            raise Refusal(405, "PGRST101", f"Cannot use the {request.method} method on RPC")
        return _called(request, function, asked, row)

    async def _answer_plain_call(
        self, connection: Proxy, request: httpx.Request, name: str, names: tuple[str, ...], body: bytes
    ) -> httpx.Response:
        """The hot path: the statement's text is remembered, the body goes in and the answer comes out as
        text.
        """
        text = body.decode()
        remembered = self._plain_calls.get((name, names))
        if remembered is None:
            function = await self._function(connection, name, names)
            sql = call_statement(function, names, PLAIN_QUERY, self._max_rows, text).sql
            remembered = self._plain_calls[name, names] = (function, sql)
        row = await self._execute(connection, request, Statement(remembered[1], (text,)))
        return _called(request, remembered[0], PLAIN_QUERY, row)

    async def _execute(
        self, connection: Proxy, request: httpx.Request, statement: Statement
    ) -> asyncpg.Record:
        timeout = request.extensions.get("timeout", {}).get("read")
        try:
            row = await connection.fetchrow(statement.sql, *statement.arguments, timeout=timeout)
        except (
            OSError,
            asyncpg.PostgresConnectionError,
            asyncpg.AdminShutdownError,
            asyncpg.CrashShutdownError,
        ) as exc:
            raise _read_error(exc, request) from exc
        except asyncpg.PostgresError as exc:
            raise refusal_of(exc) from exc
        if row is None:
            raise not_implemented("A statement without an answer")
        return row

    async def _relation(self, connection: Proxy, name: str) -> Relation:
        catalog = await self._connections.read_catalog(connection)
        found = catalog.relations.get(name)
        if found is None or found.is_type:
            raise Refusal(404, "PGRST205", f"Could not find the table 'public.{name}' in the schema cache")
        return found

    async def _function(self, connection: Proxy, name: str, names: tuple[str, ...] | None) -> Function:
        """The overload that takes arguments of these names; None stands for a body that is no object."""
        catalog = await self._connections.read_catalog(connection)
        overloads = catalog.functions.get(name, ())
        found = [function for function in overloads if names is not None and function.accepts(names)]
        found = found or [function for function in overloads if function.takes_whole_body]
        if not found:
            signature = f"public.{name}({', '.join(names or ())})"
            raise Refusal(404, "PGRST202", f"Could not find the function {signature} in the schema cache")
        if len(found) > 1:
            raise Refusal(
                300,
                "PGRST203",
                f"Could not choose the best candidate function between {len(found)} of public.{name}",
            )
        if found[0].is_variadic:
            raise not_implemented("Calling a variadic function")
        return found[0]


def _read_error(error: Exception, request: httpx.Request) -> httpx.TransportError:
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout("The database did not answer in time", request=request)
    return httpx.ReadError(f"The connection to the database was lost: {error}", request=request)


def _is_about_the_schema(refusal: Refusal) -> bool:
    return refusal.body["code"] in {"PGRST202", "PGRST204", "PGRST205", *STALE_CODES}


def _read_arguments(request: httpx.Request, body: bytes) -> Any:
    _check_content_type(request)
    try:
        return orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as exc:
        raise bad_request("PGRST102", "Empty or invalid json") from exc


def _check_content_type(request: httpx.Request) -> None:
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if media != "application/json":
        raise not_implemented(f"The content type {media}")


def _body_text(function: Function, names: tuple[str, ...] | None, body: bytes) -> str | None:
    """The call's one parameter: all named arguments as JSON, the one unnamed argument, or None without any."""
    if function.takes_whole_body:
        return body.decode()
    return body.decode() if names else None


def _change(request: httpx.Request, relation: Relation, asked: Query, body: bytes) -> Statement:
    if request.method == "DELETE":
        return delete_statement(relation, asked)
    _check_content_type(request)
    if request.method == "POST":
        return insert_statement(relation, asked, body)
    if request.method == "PATCH":
        return update_statement(relation, asked, body)
    raise not_implemented(f"The method {request.method}")


def _page(request: httpx.Request, asked: Query, row: asyncpg.Record) -> httpx.Response:
    body, rows, total = row
    if asked.is_single and rows != 1:
        raise not_a_single_object(rows)
    last = asked.offset + rows - 1
    headers = {"content-range": content_range(asked.offset, last, total)}
    return _response(request, page_status(asked.offset, last, total), body, headers)


def _called(request: httpx.Request, function: Function, asked: Query, row: asyncpg.Record) -> httpx.Response:
    if function.return_type == "void":
        return httpx.Response(204, request=request)
    return _page(request, asked, row)


def _changed(request: httpx.Request, asked: Query, row: asyncpg.Record) -> httpx.Response:
    body, rows, total = row
    if asked.is_single and rows != 1:
        raise not_a_single_object(rows)
    last = rows - 1 if request.method == "PATCH" else 0
    first = 0 if request.method == "PATCH" else 1
    headers = {"content-range": content_range(first, last, total if asked.preferences.count else None)}
    if asked.preferences.returns == "minimal":
        return httpx.Response(201 if request.method == "POST" else 204, headers=headers, request=request)
    return _response(request, 201 if request.method == "POST" else 200, body, headers)


def _response(request: httpx.Request, status: int, body: str, headers: Mapping[str, str]) -> httpx.Response:
    content = b"" if request.method == "HEAD" else body.encode()
    return httpx.Response(
        status, headers={"content-type": JSON_TYPE, **headers}, content=content, request=request
    )
