"""A connection pool whose connections act as one role.

Where no connection can be made, the caller gets the httpx errors that a network would cause.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx

from .asyncpg_types import Connection, Pool, PooledConnection
from .catalog import Catalog, load_catalog
from .errors import EmbeddedDatabaseError
from .postgrest_errors import PostgrestError

Target = str | Mapping[str, Any] | Callable[[], Mapping[str, Any]]

CONNECT_SECONDS = 10.0
# A server that recovers from a crash refuses connections for a moment: "the database system is starting up".
RECOVERY_SECONDS = 5.0
RECOVERY_POLL_SECONDS = 0.02
# The server is down or going down. A restart can help. (TimeoutError is an OSError.)
UNREACHABLE = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
)
# What the caller sees as a failed connection: nothing was sent, so that repeating the request is safe.
CANNOT_CONNECT = (
    *UNREACHABLE,
    asyncpg.InterfaceError,
    asyncpg.TooManyConnectionsError,
    EmbeddedDatabaseError,
)


class Connections:
    """The pool, made at the first request, and the catalog that was read through it."""

    def __init__(
        self,
        target: Target,
        *,
        ensure_running: Callable[[], Awaitable[None]] | None,
        statement_timeout_ms: int,
        size: int,
        role: str,
    ) -> None:
        self.catalog: Catalog | None = None
        self._target = target
        self._ensure_running = ensure_running
        self._role = role
        # As startup options these cost no round trip, and `reset all` cannot take them back.
        self._settings = {
            "role": role,
            "statement_timeout": str(statement_timeout_ms),
            "search_path": "public",
        }
        self._size = size
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()

    async def read_catalog(self, connection: PooledConnection) -> Catalog:
        """The catalog, read from the database unless it is known already."""
        if self.catalog is None:
            self.catalog = await load_catalog(connection)
        return self.catalog

    @asynccontextmanager
    async def acquire(self, request: httpx.Request) -> AsyncIterator[PooledConnection]:
        """A live connection.

        Raises httpx.ConnectError or ConnectTimeout where there is none, and PostgrestError where the login is
        not set up as it must be.
        """
        pool = self._pool or await self._open()
        connection = await self._connected(pool, request)
        try:
            yield connection
        finally:
            await pool.release(connection)

    async def aclose(self) -> None:
        """Closes all connections, after the requests under way."""
        if self._pool is not None:
            await self._pool.close()

    async def _open(self) -> Pool:
        # Without the lock, requests that arrive together at the start would make a pool each.
        async with self._opening:
            if self._pool is None:
                connect: Any = self._connect  # the stubs know the hook only without arguments
                self._pool = await asyncpg.create_pool(
                    min_size=0, max_size=self._size, connect=connect, reset=_keep_session
                )
            return self._pool

    async def _connected(self, pool: Pool, request: httpx.Request) -> PooledConnection:
        """A live connection, or the error that a network would cause."""
        try:
            async with asyncio.timeout(request.extensions.get("timeout", {}).get("pool")):
                return await self._acquire_or_restart(pool)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout("No connection to the database in time", request=request) from exc
        except CANNOT_CONNECT as exc:
            raise httpx.ConnectError(f"The database cannot be reached: {exc}", request=request) from exc
        except asyncpg.PostgresError as exc:
            raise self._misconfigured(exc) from exc

    async def _acquire_or_restart(self, pool: Pool) -> PooledConnection:
        try:
            return await _acquire_live(pool)
        except UNREACHABLE:
            if self._ensure_running is None:
                raise
            await self._ensure_running()
        # One further attempt only: a server that dies at once again needs a person.
        return await _acquire_live(pool)

    async def _connect(self, *_: None, **options: Any) -> Connection:
        """The pool's hook: a new connection. Waits while the server recovers from a crash."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + RECOVERY_SECONDS
        while True:
            try:
                connection = await self._connect_once(options)
            except asyncpg.CannotConnectNowError:
                if clock() > give_up:
                    raise
                await asyncio.sleep(RECOVERY_POLL_SECONDS)
            else:
                await self._require_role(connection)
                return connection

    async def _connect_once(self, options: Mapping[str, Any]) -> Connection:
        target = self._target() if callable(self._target) else self._target
        arguments = {"dsn": target} if isinstance(target, str) else dict(target)
        connection: Connection = await asyncpg.connect(
            **{"timeout": CONNECT_SECONDS, **arguments, **options, "server_settings": self._settings}
        )
        return connection

    async def _require_role(self, connection: Connection) -> None:
        """Raises PostgrestError for a connection that acts as another role: it would have other rights."""
        current = await connection.fetchval("select current_user")
        if current == self._role:
            return
        await connection.close()
        raise PostgrestError(
            503,
            "PGRST000",
            f"The database gave us the role {current} instead of {self._role}: a connection pooler ignores "
            "startup options, so use the direct connection string.",
        )

    def _misconfigured(self, error: asyncpg.PostgresError) -> PostgrestError:
        message = error.message or str(error)
        if "startup parameter" in message:
            advice = "a connection pooler refuses startup options, so use the direct connection string."
        elif self._role in message:
            advice = "let the login act as that role with `make migrate`."
        else:
            advice = "check the user, password and database of the connection string."
        return PostgrestError(503, "PGRST000", f"The database refuses the connection ({message}): {advice}")


async def _keep_session(_connection: Connection) -> None:
    """Resets nothing between requests: none of them leaves state behind in the session.

    This saves the round trip that asyncpg's own reset would add to every request.
    """


async def _acquire_live(pool: Pool) -> PooledConnection:
    """A connection that can take a statement. Those that the server has closed are thrown away first."""
    while True:
        connection = await pool.acquire()
        if not _has_ended(connection):
            return connection
        # A terminated connection frees its place in the pool, so that the next one can be a new one.
        connection.terminate()


def _has_ended(connection: PooledConnection) -> bool:
    """Whether the server has closed an idle connection, even if the event loop has not noticed yet.

    Otherwise the statement would be sent into the void, and nobody could say whether it took effect.
    """
    if connection.is_closed():
        return True
    # The server writes to an idle connection only to say goodbye, so anything to read means that it is over.
    watch = select.poll()
    transport: asyncio.Transport = connection._transport  # type: ignore[attr-defined]  # missing from the stubs
    watch.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(watch.poll(0))
