"""Databases for tests: a real PostgreSQL server a session, and a copy of a migrated template a test.

A copy takes some 50 ms, so that a test begins with an empty database.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import pytest

from embedded.migrate import migrate
from embedded.postgres import EmbeddedPostgres
from supabase_config import MIGRATIONS
from tests.support.installations import DEBIAN_15

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


TEMPLATE = "gateway_template"
MEMORY, ROOM = Path("/dev/shm"), 2 * 2**30
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300"}

# Rate limits that limit nothing.
UNLIMITED = dict.fromkeys(
    (
        "requests_per_minute",
        "requests_per_hour",
        "requests_per_day",
        "tokens_per_minute",
        "tokens_per_hour",
        "tokens_per_day",
    )
)

# A new database has none of the privileges that a hosted project of the older kind gives away; the tests need
# them, so that a forgotten revoke shows.
BOOTSTRAP = """
grant usage on schema public to anon, authenticated, service_role;
alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges in schema public grant all on functions to anon, authenticated, service_role;
alter default privileges in schema public grant all on sequences to anon, authenticated, service_role;
"""

_numbers = itertools.count()


@dataclass(frozen=True)
class Database:
    """One database of a server. `owner` connects as its owner, past every grant."""

    server: EmbeddedPostgres
    name: str

    def connect_kwargs(self, role: str) -> dict[str, Any]:
        return {**self.server.connect_kwargs(role), "database": self.name}

    @property
    def url(self) -> str:
        """What DATABASE_URL would be."""
        host = self.connect_kwargs("authenticator")["host"]
        return f"postgresql://authenticator@/{self.name}?host={host}"

    @asynccontextmanager
    async def connection(self, role: str) -> AsyncIterator[Connection]:
        """A session with the rights of this role. All but the owner log in as `authenticator`."""
        is_owner = role == "postgres"
        connection: Connection = await asyncpg.connect(
            **self.connect_kwargs("postgres" if is_owner else "authenticator")
        )
        try:
            if not is_owner:
                await connection.execute(f"set role {role}")
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def owner(self) -> AsyncIterator[Connection]:
        async with self.connection("postgres") as connection:
            yield connection

    async def value(self, query: str, *arguments: Any) -> Any:
        async with self.owner() as connection:
            return await connection.fetchval(query, *arguments)

    async def rows(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        async with self.owner() as connection:
            return [dict(row) for row in await connection.fetch(query, *arguments)]

    async def age_holds(self) -> None:
        """Lets every pending hold expire."""
        async with self.owner() as connection:
            await connection.execute(
                "update public.usage_records set expires_at = now() - interval '1 second' "
                "where status = 'pending'"
            )

    async def assert_books_balance(self) -> None:
        """Promise 2: what was granted less what was charged is what is there, for every account."""
        assert await self.rows("select * from public.audit_ledger()") == []


async def copy_database(server: EmbeddedPostgres, name: str, template: str = TEMPLATE) -> Database:
    async with Database(server, "postgres").connection("postgres") as owner:
        await owner.execute(f"create database {name} template {template} strategy file_copy")
    return Database(server, name)


async def drop_database(database: Database) -> None:
    async with Database(database.server, "postgres").connection("postgres") as owner:
        await owner.execute(f"drop database {database.name} with (force)")


def started_postgres(folder: Path, binaries: Path | None) -> Iterator[EmbeddedPostgres]:
    async def begin() -> EmbeddedPostgres:
        server = await EmbeddedPostgres.start(folder, binaries=binaries, settings=FAST)
        template = await copy_database(server, TEMPLATE, "template1")
        async with template.owner() as connection:
            await connection.execute(BOOTSTRAP)
        await migrate(template.connect_kwargs("postgres"), MIGRATIONS)
        return server

    server = asyncio.run(begin())
    yield server
    asyncio.run(server.stop())


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory, where a test's database is made in a tenth of the time; on the disk where memory
    has no room for it.
    """
    in_memory = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(prefix="gateway-tests-", dir=MEMORY if in_memory else None) as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as another user; its own folder in here is 0700
        yield folder


@asynccontextmanager
async def fresh_database(server: EmbeddedPostgres) -> AsyncIterator[Database]:
    database = await copy_database(server, f"test_{next(_numbers)}")
    try:
        yield database
    finally:
        await drop_database(database)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The embedded PostgreSQL of the wheel, version 18."""
    with quick_folder() as folder:
        yield from started_postgres(folder / "pg18", None)


@pytest.fixture(scope="session")
def postgres_15() -> Iterator[EmbeddedPostgres]:
    """PostgreSQL 15, the oldest that the SQL is written for."""
    if not DEBIAN_15.is_dir():
        pytest.skip("PostgreSQL 15 is not installed (Debian: apt-get install postgresql-15)")
    with quick_folder() as folder:
        yield from started_postgres(folder / "pg15", DEBIAN_15)


@pytest.fixture
async def database(postgres: EmbeddedPostgres) -> AsyncIterator[Database]:
    """An empty, migrated database on PostgreSQL 18."""
    async with fresh_database(postgres) as fresh:
        yield fresh


@pytest.fixture(params=["18", "15"])
async def sql(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """An empty, migrated database, on PostgreSQL 18 and on 15: for tests of the SQL itself."""
    server = request.getfixturevalue("postgres" if request.param == "18" else "postgres_15")
    async with fresh_database(server) as fresh:
        yield fresh
