"""Applies migrations as the Supabase CLI does. As the Supabase CLI does it, in the same table.

`supabase/migrations/<14 digits>_name.sql`, in order, one transaction per file, never twice; a lock makes
concurrent callers wait.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from .errors import EmbeddedDatabaseError
from .roles import ensure_roles

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

FILE_NAME = re.compile(r"(\d{14})_(.+)\.sql")
# Any number will do, as long as every version of this code uses the same.
LOCK = 7_232_145_598
HISTORY = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (version text not null primary key);
alter table supabase_migrations.schema_migrations add column if not exists statements text[];
alter table supabase_migrations.schema_migrations add column if not exists name text;
"""
# What a semicolon may hide in: comments, strings, quoted names, dollar quotes.
TOKEN = re.compile(
    r"--[^\n]*|/\*|\b[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\""
    r"|(?<![\w$])\$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$|;|[\w$]+|\s+|.",
    re.DOTALL,
)
COMMENT_EDGE = re.compile(r"/\*|\*/")
TRANSACTION_CONTROL = re.compile(r"(?:begin|commit|rollback|start\s+transaction|end)\b", re.IGNORECASE)
SQL_BODY = re.compile(r"\bbegin\s+atomic\b", re.IGNORECASE)


@dataclass(frozen=True)
class Statement:
    """One statement of a file, and the line it begins on."""

    sql: str
    line: int


async def migrate(target: str | Mapping[str, Any], migrations: Path) -> list[str]:
    """Creates Supabase's roles where they are missing, applies the missing files, and returns the names of
    those.

    `target` is a dsn or the arguments of `asyncpg.connect`, of the database's owner. Raises
    EmbeddedDatabaseError, naming file and line, when a statement fails; that file then left no trace, and the
    files before it stay applied.
    """
    async with _connected(target) as connection:
        await connection.execute("select pg_catalog.pg_advisory_lock($1)", LOCK)
        await ensure_roles(connection)
        await connection.execute(HISTORY)
        done = {
            row[0]
            for row in await connection.fetch("select version from supabase_migrations.schema_migrations")
        }
        applied = []
        for path in migration_files(migrations):
            if _version(path) not in done:
                await _apply(connection, path, await asyncio.to_thread(path.read_text, encoding="utf-8"))
                applied.append(path.name)
        return applied


def migration_files(migrations: Path) -> list[Path]:
    """The migrations of a folder in the order they are applied. Raises EmbeddedDatabaseError for two of one
    version.
    """
    if not migrations.is_dir():
        raise EmbeddedDatabaseError(
            f"There is no folder {migrations}: name the one that holds the migrations."
        )
    paths = sorted(path for path in migrations.iterdir() if FILE_NAME.fullmatch(path.name))
    for path, following in itertools.pairwise(paths):
        if _version(path) == _version(following):
            raise EmbeddedDatabaseError(
                f"{path.name} and {following.name} have the same version: rename one of them."
            )
    return paths


def split_statements(script: str) -> Iterator[Statement]:
    """The statements of a script, without their semicolons, and without what only consists of comments."""
    start, at, has_content = 0, 0, False
    while at < len(script):
        token = TOKEN.match(script, at)
        assert token is not None, "the last alternative matches every character"
        end = _comment_end(script, at) if token[0] == "/*" else token.end()
        if token[0] == ";":
            if has_content:
                yield Statement(script[start:at], script.count("\n", 0, start) + 1)
            start, has_content = end, False
        elif not has_content and not token[0].isspace() and not token[0].startswith(("--", "/*")):
            start, has_content = at, True
        at = end
    if has_content:
        yield Statement(script[start:].rstrip(), script.count("\n", 0, start) + 1)


def _comment_end(script: str, at: int) -> int:
    """Where the comment that begins here ends; they nest in PostgreSQL."""
    depth = 0
    for edge in COMMENT_EDGE.finditer(script, at):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(script)


async def _apply(connection: Connection, path: Path, script: str) -> None:
    statements = list(split_statements(script))
    for statement in statements:
        _check(path, statement)
    async with connection.transaction():
        for statement in statements:
            try:
                await connection.execute(statement.sql)
            except asyncpg.PostgresError as exc:
                line = statement.line + _lines_before(statement.sql, exc)
                raise EmbeddedDatabaseError(
                    f"{path.name}, line {line}: {exc.message or exc} ({exc.sqlstate})."
                ) from exc
        await connection.execute(
            "insert into supabase_migrations.schema_migrations (version, name, statements) values ($1, $2, $3)",
            _version(path),
            path.stem.partition("_")[2],
            [statement.sql for statement in statements],
        )


def _check(path: Path, statement: Statement) -> None:
    if TRANSACTION_CONTROL.match(statement.sql):
        raise EmbeddedDatabaseError(
            f"{path.name}, line {statement.line}: a migration runs in one transaction, so it must not contain its own."
        )
    if SQL_BODY.search(statement.sql):
        raise EmbeddedDatabaseError(
            f"{path.name}, line {statement.line}: write the body in $$ instead of BEGIN ATOMIC."
        )


def _lines_before(sql: str, error: asyncpg.PostgresError) -> int:
    """How many lines into the statement PostgreSQL saw the error, 0 where it does not say."""
    position = getattr(error, "position", None)
    return sql.count("\n", 0, int(position) - 1) if position else 0


def _version(path: Path) -> str:
    return path.name.partition("_")[0]


@asynccontextmanager
async def _connected(target: str | Mapping[str, Any]) -> AsyncIterator[Connection]:
    arguments = {"dsn": target} if isinstance(target, str) else dict(target)
    try:
        # Without prepared statements it also works through a pooler.
        connection: Connection = await asyncpg.connect(**arguments, statement_cache_size=0)
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise EmbeddedDatabaseError(
            f"The database to migrate cannot be reached ({exc}): check DATABASE_URL."
        ) from exc
    try:
        yield connection
    finally:
        await connection.close()
