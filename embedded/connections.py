"""The pool.

A pool whose connections act as one role; where there is no connection, the errors that a network would cause.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import asyncpg
import httpx

from .answers import Refusal
from .catalog import Catalog, load_catalog
from .errors import EmbeddedDatabaseError

if TYPE_CHECKING:
    Proxy = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
    BaseConnection = asyncpg.Connection[asyncpg.Record]
else:
    BaseConnection = asyncpg.Connection

Target = str | Mapping[str, Any] | Callable[[], Mapping[str, Any]]

CONNECT_SECONDS = 10.0
# A server that recovers from a crash says for a moment that it is starting up.
RECOVERY_SECONDS = 5.0
RECOVERY_POLL_SECONDS = 0.02
UNREACHABLE = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
)


class StatelessConnection(BaseConnection):
    """A connection of which nothing needs to be reset: no request leaves any state behind."""

    def get_reset_query(self) -> str:
        """Nothing, which saves the round trip that asyncpg would make after every request."""
        return ""

    def has_ended(self) -> bool:
        """Whether an idle connection was closed by the server, even if the event loop has not seen it yet.

        The server has no reason to write to an idle connection, except that it says goodbye.
        """
        if self.is_closed():
            return True
        watch = select.poll()
        transport: asyncio.Transport = self._transport  # type: ignore[attr-defined]  # missing from the stubs
        watch.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(watch.poll(0))


class Connections:
    """The pool, made at the first request, and the catalog read through it."""

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
        self._settings = {
            "role": role,
            "statement_timeout": str(statement_timeout_ms),
            "search_path": "public",
        }
        self._size = size
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()

    async def read_catalog(self, connection: Proxy) -> Catalog:
        """The catalog, read if need be."""
        if self.catalog is None:
            self.catalog = await load_catalog(connection)
        return self.catalog

    @asynccontextmanager
    async def acquire(self, request: httpx.Request) -> AsyncIterator[Proxy]:
        """A live connection. Raises httpx.ConnectError where there is none, and Refusal where the login
        cannot work.
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
        async with self._opening:
            if self._pool is None:
                connect: Any = self._connect  # the stubs know the hook only without arguments
                self._pool = await asyncpg.create_pool(
                    min_size=0, max_size=self._size, connect=connect, connection_class=StatelessConnection
                )
            return self._pool

    async def _connected(self, pool: Pool, request: httpx.Request) -> Proxy:
        seconds = request.extensions.get("timeout", {}).get("pool")
        try:
            async with asyncio.timeout(seconds):
                try:
                    return await _acquire_live(pool)
                except UNREACHABLE:
                    if self._ensure_running is None:
                        raise
                    await self._ensure_running()
                    return await _acquire_live(pool)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout("No connection to the database in time", request=request) from exc
        except (
            *UNREACHABLE,
            asyncpg.InterfaceError,
            asyncpg.TooManyConnectionsError,
            EmbeddedDatabaseError,
        ) as exc:
            raise httpx.ConnectError(f"The database cannot be reached: {exc}", request=request) from exc
        except asyncpg.PostgresError as exc:
            raise self._misconfigured(exc) from exc

    async def _connect(self, *_: None, **options: Any) -> BaseConnection:
        """A new connection; waits while the server recovers from a crash. Nothing was sent when it fails."""
        target = self._target() if callable(self._target) else self._target
        arguments = {"dsn": target} if isinstance(target, str) else dict(target)
        give_up = asyncio.get_running_loop().time() + RECOVERY_SECONDS
        while True:
            try:
                connection: BaseConnection = await asyncpg.connect(
                    **{"timeout": CONNECT_SECONDS, **arguments, **options, "server_settings": self._settings}
                )
            except asyncpg.CannotConnectNowError:
                if asyncio.get_running_loop().time() > give_up:
                    raise
                await asyncio.sleep(RECOVERY_POLL_SECONDS)
                continue
            await self._check_role(connection)
            return connection

    async def _check_role(self, connection: BaseConnection) -> None:
        acting = await connection.fetchval("select current_user")
        if acting != self._role:
            await connection.close()
            raise Refusal(
                503,
                "PGRST000",
                f"The database gave us the role {acting} instead of {self._role}: a connection pooler ignores startup "
                "options, so use the direct connection string.",
            )

    def _misconfigured(self, error: asyncpg.PostgresError) -> Refusal:
        message = error.message or str(error)
        if "startup parameter" in message:
            advice = "a connection pooler refuses startup options, so use the direct connection string."
        elif self._role in message:
            advice = "let the login act as that role with `make migrate`."
        else:
            advice = "check the user, password and database of the connection string."
        return Refusal(503, "PGRST000", f"The database refuses the connection ({message}): {advice}")


async def _acquire_live(pool: Pool) -> Proxy:
    """A connection on which a statement can be sent: those that the server has closed are thrown away first."""
    while True:
        connection = await pool.acquire()
        if not cast(StatelessConnection, connection).has_ended():
            return connection
        connection.terminate()
