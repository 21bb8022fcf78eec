"""A way to a test's database that can be cut, and that counts the round trips made over it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest_asyncio

from tests.support.database import Database


@dataclass
class DatabaseLink:
    """A way to the test's database that can be cut, and that counts the round trips made over it."""

    database: Database
    folder: Path
    round_trips: int = 0
    is_up: bool = True
    losing_replies: bool = False
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"postgresql://authenticator@/{self.database.name}?host={self.folder}"

    def cut(self) -> None:
        """From now on nothing gets through, nor are there new connections."""
        self.is_up = False
        for writer in self._writers:
            writer.transport.abort()

    def lose_replies(self) -> None:
        """What is sent arrives, and then the connection breaks instead of answering."""
        self.losing_replies = True

    def mend(self) -> None:
        self.is_up, self.losing_replies = True, False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_up:
            writer.transport.abort()
            return
        target = self.database.connect_kwargs("postgres")
        server_reader, server_writer = await asyncio.open_unix_connection(
            f"{target['host']}/.s.PGSQL.{target.get('port', 5432)}"
        )
        self._writers |= {writer, server_writer}
        try:
            await asyncio.gather(self._forward(reader, server_writer), self._back(server_reader, writer))
        finally:
            for each in (writer, server_writer):
                each.transport.abort()
                self._writers.discard(each)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            # A client ends what it asks for at once with Sync, the last message it sends before it waits.
            self.round_trips += data.endswith(b"S\x00\x00\x00\x04")
            writer.write(data)
        writer.transport.abort()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.losing_replies:
                break
            writer.write(data)
        writer.transport.abort()


@asynccontextmanager
async def database_link(database: Database) -> AsyncIterator[DatabaseLink]:
    with tempfile.TemporaryDirectory(prefix="gw") as folder:  # a socket's path is short
        link = DatabaseLink(database, Path(folder))
        server = await asyncio.start_unix_server(link.carry, f"{folder}/.s.PGSQL.5432")
        yield link
        server.close()
        link.cut()


@pytest_asyncio.fixture(loop_scope="module")
async def staged_link(database: Database) -> AsyncIterator[DatabaseLink]:
    """A way to the database that can be cut; `start_gateway(database_url=link.url)` uses it."""
    async with database_link(database) as link:
        yield link
