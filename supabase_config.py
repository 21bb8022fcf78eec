"""Opens the database's client: a hosted Supabase, any PostgreSQL by its URL, or the embedded one.

The only importer of `supabase`. Its errors, and the network's, leave this module as GatewayErrors.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import structlog
from postgrest import APIError, AsyncRPCFilterRequestBuilder
from postgrest import AsyncSelectRequestBuilder as Select
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from common.errors import Conflict, DatabaseUnavailable, GatewayError, Misconfigured
from config import Settings

log = structlog.get_logger("database")

__all__ = ["AsyncClient", "Row", "Select", "call", "execute", "migrate_database", "open_database"]

Row = dict[str, Any]  # as it comes off the wire; db.py gives every row its type
MIGRATIONS = Path(__file__).parent / "supabase" / "migrations"
# The newest migration that the code relies on; `schema_version()` says what the database has.
SCHEMA_VERSION = 20261130100100
TIMEOUT_SECONDS = 10.0
# Connection trouble, lack of resources, shutdown, cancelled statements, lock timeouts; PGRST0xx are
# PostgREST's own connection errors.
UNAVAILABLE = ("08", "53", "57", "58", "55P03", "25006", "XX", "PGRST00")


class _NoCookies(httpx.Cookies):
    """PostgREST sets none, and looking for them is a tenth of what a call costs."""

    def extract_cookies(self, response: httpx.Response) -> None:
        pass


def _http(transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
    http = httpx.AsyncClient(transport=transport, timeout=TIMEOUT_SECONDS)
    http._cookies = _NoCookies()  # the public setter would replace it by a jar that looks
    return http


class DatabaseFault(GatewayError):
    """The gateway's database refused a statement. This is a fault of the gateway; the request id below finds
    it in its log.
    """

    code = "database_fault"


class MissingFunction(DatabaseFault):
    """The database lacks a function that the gateway needs: its schema is older than this code."""


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[AsyncClient]:
    """The client of the database that the settings name. Raises Misconfigured where it cannot be started."""
    if settings.database == "hosted":
        async with _hosted(settings) as client:
            yield client
    elif settings.database == "url":
        async with _by_url(settings) as client:
            yield client
    else:
        async with _embedded(settings) as client:
            yield client


@asynccontextmanager
async def _hosted(settings: Settings) -> AsyncIterator[AsyncClient]:
    # httpx alone costs 1.0-1.6 ms of CPU a call here, over aiohttp 0.4-0.5.
    from httpx_aiohttp import AiohttpTransport

    if settings.supabase_url is None or settings.supabase_key is None:
        raise Misconfigured("SUPABASE_URL and SUPABASE_KEY belong together.")
    async with _http(AiohttpTransport()) as http:
        yield await _client(settings.supabase_url, settings.supabase_key.get_secret_value(), http)


@asynccontextmanager
async def _by_url(settings: Settings) -> AsyncIterator[AsyncClient]:
    from embedded.postgrest import PostgrestTransport

    if settings.database_url is None:
        raise Misconfigured("DATABASE_URL is missing.")
    transport = PostgrestTransport(settings.database_url.get_secret_value())
    async with _http(transport) as http:
        yield await _client("http://database.invalid", "in-process", http)


@asynccontextmanager
async def _embedded(settings: Settings) -> AsyncIterator[AsyncClient]:
    from embedded import EmbeddedDatabaseError
    from embedded.migrate import migrate
    from embedded.postgres import EmbeddedPostgres
    from embedded.postgrest import PostgrestTransport

    try:
        server = await EmbeddedPostgres.start(settings.gateway_data_dir, binaries=settings.postgres_bin)
    except EmbeddedDatabaseError as error:
        raise Misconfigured(str(error)) from error
    try:
        await migrate(server.connect_kwargs("postgres"), MIGRATIONS)
        transport = PostgrestTransport(
            lambda: server.connect_kwargs("authenticator"), ensure_running=server.ensure_running
        )
        async with _http(transport) as http:
            yield await _client("http://embedded.invalid", "in-process", http)
    except EmbeddedDatabaseError as error:
        raise Misconfigured(str(error)) from error
    finally:
        await server.stop()


async def migrate_database(settings: Settings) -> list[str]:
    """Applies the migrations that DATABASE_URL or the embedded database lacks; returns their names."""
    from embedded.migrate import migrate
    from embedded.postgres import EmbeddedPostgres

    if settings.database == "url" and settings.database_url is not None:
        return await migrate(settings.database_url.get_secret_value(), MIGRATIONS)
    if settings.database == "hosted":
        raise Misconfigured(
            "A hosted Supabase is migrated with: supabase db push "
            "(or set DATABASE_URL to its connection string)."
        )
    server = await EmbeddedPostgres.start(settings.gateway_data_dir, binaries=settings.postgres_bin)
    try:
        return await migrate(server.connect_kwargs("postgres"), MIGRATIONS)
    finally:
        await server.stop()


async def _client(url: str, key: str, http: httpx.AsyncClient) -> AsyncClient:
    options = AsyncClientOptions(
        httpx_client=http, auto_refresh_token=False, persist_session=False, postgrest_client_retry=False
    )
    return await acreate_client(url, key, options)


async def call(client: AsyncClient, function: str, params: Mapping[str, object]) -> Any:
    """Calls one SQL function and returns its answer. Raises DatabaseUnavailable, Conflict (a unique
    constraint) or DatabaseFault.
    """
    return await _data_of(client.rpc(function, dict(params)))


async def execute(query: Select) -> list[Row]:
    """Runs a query built with the client and returns its rows; raises as `call` does."""
    return cast(list[Row], await _data_of(query))


async def _data_of(query: Select | AsyncRPCFilterRequestBuilder) -> Any:
    try:
        return (await query.execute()).data
    except APIError as error:
        problem = _translate(error)
        log.warning("database_refused", code=error.code, reason=error.message, answer=problem.code)
        raise problem from error
    except httpx.HTTPError as error:
        log.warning("database_unreachable", reason=str(error) or type(error).__name__)
        raise DatabaseUnavailable() from error


def _translate(error: APIError) -> GatewayError:
    code = str(error.code or "")
    # Anything but a SQLSTATE or a code of PostgREST comes from something in front of the database, such as a
    # proxy.
    if code.startswith(UNAVAILABLE) or not re.fullmatch(r"[0-9A-Z]{5}|PGRST\d{3}", code):
        return DatabaseUnavailable()
    if code == "23505":
        return Conflict()
    if code in ("PGRST202", "42883"):
        return MissingFunction()
    return DatabaseFault(sqlstate=code)
