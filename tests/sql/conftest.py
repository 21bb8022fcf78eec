"""The functions of a migrated database, called with the rights that the gateway has.

Tests share a database per module where they only look at users of their own; `fresh` ones have one to
themselves.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.support.database import Database, copy_database, drop_database
from tests.support.sql_client import Client, open_client

_names = (f"sql_{n}" for n in itertools.count())
VERSIONS = {"18": "postgres", "15": "postgres_15"}


def _lend(request: pytest.FixtureRequest, version: str) -> Iterator[Database]:
    database = asyncio.run(copy_database(request.getfixturevalue(VERSIONS[version]), next(_names)))
    yield database
    asyncio.run(drop_database(database))


@pytest.fixture(scope="module", params=["18", "15"])
def shared_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    yield from _lend(request, request.param)


@pytest.fixture(scope="module")
def shared_database_18(request: pytest.FixtureRequest) -> Iterator[Database]:
    yield from _lend(request, "18")


@pytest.fixture(params=["18", "15"])
def fresh_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    yield from _lend(request, request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(shared_database: Database) -> AsyncIterator[Client]:
    """On PostgreSQL 18 and on 15."""
    async with open_client(shared_database) as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client_18(shared_database_18: Database) -> AsyncIterator[Client]:
    """On PostgreSQL 18 only: for long tests of what no version changes."""
    async with open_client(shared_database_18) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def fresh(fresh_database: Database) -> AsyncIterator[Client]:
    """A database of the test's own, on PostgreSQL 18 and on 15."""
    async with open_client(fresh_database) as opened:
        yield opened
