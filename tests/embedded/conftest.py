"""A real server of each supported PostgreSQL, and the real Supabase client on the in-process transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from embedded.postgres import EmbeddedPostgres
from embedded.postgrest import PostgrestTransport
from tests.support.installations import INSTALLATIONS, QUICK

FRESH_ROWS = '''
    truncate people, journal, "odd ""names""" restart identity;
    insert into people (name, code, age, feels, tags, data, born) values
        ('Ann', 'AN', 30, 'calm', '{x,y}', '{"city": {"zip": "10"}, "list": [1, 2]}', '2001-02-03T04:05:06Z'),
        ('Bob', 'BO', null, 'angry', '{y}', '{"city": {"zip": "20"}}', null),
        ('Cy, "the" (third)', null, 50, null, '{}', '{}', null);
'''


@pytest.fixture(scope="session", params=INSTALLATIONS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedPostgres]:
    """A running server with the tables and functions of schema.sql."""
    folder = tmp_path_factory.mktemp("embedded")
    started = asyncio.run(EmbeddedPostgres.start(folder, binaries=request.param, settings=QUICK))
    asyncio.run(run_script(started, Path(__file__).with_name("schema.sql").read_text()))
    yield started
    asyncio.run(started.stop())


async def run_script(server: EmbeddedPostgres, script: str) -> None:
    """Runs SQL as the owner of the database."""
    connection = await asyncpg.connect(**server.connect_kwargs("postgres"))
    try:
        await connection.execute(script)
    finally:
        await connection.close()


@pytest.fixture
async def owner(server: EmbeddedPostgres) -> AsyncIterator[Any]:
    """A connection as the owner, on tables that hold what every test starts from."""
    connection = await asyncpg.connect(**server.connect_kwargs("postgres"))
    await connection.execute(FRESH_ROWS)
    yield connection
    await connection.close()


@pytest.fixture
async def transport(server: EmbeddedPostgres, owner: Any) -> AsyncIterator[PostgrestTransport]:
    """The transport under test."""
    made = PostgrestTransport(server.connect_kwargs("authenticator"), ensure_running=server.ensure_running)
    yield made
    await made.aclose()


@pytest.fixture
async def http(transport: PostgrestTransport) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP, for what the Supabase client hides."""
    async with httpx.AsyncClient(transport=transport, base_url="http://x.invalid/rest/v1") as client:
        yield client


@pytest.fixture
async def client(http: httpx.AsyncClient) -> AsyncClient:
    """The official client."""
    options = AsyncClientOptions(
        httpx_client=http, auto_refresh_token=False, persist_session=False, postgrest_client_retry=False
    )
    return await acreate_client("http://x.invalid", "service-role-key", options)
