"""Applies migrations as the Supabase CLI does, and records them in the same table.

The files `supabase/migrations/<14 digits>_name.sql` are applied in order, each in one transaction and never
twice. A lock makes concurrent callers wait.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from .asyncpg_types import Connection
from .errors import EmbeddedDatabaseError
from .roles import ensure_roles

FILE_NAME = re.compile(r"(\d{14})_(.+)\.sql")
# The key of the advisory lock. Any number will do, as long as every version of this code uses the same one.
LOCK = 7_232_145_598
# The Supabase CLI makes the same table, in older versions without the last two columns.
HISTORY = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (version text not null primary key);
alter table supabase_migrations.schema_migrations add column if not exists statements text[];
alter table supabase_migrations.schema_migrations add column if not exists name text;
"""
# A semicolon inside a comment, a string, a quoted name or a dollar-quoted body does not end a statement.
TOKEN = re.compile(
    r"--[^\n]*|/\*|\b[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\""
    r"|(?<![\w$])\$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$|;|[\w$]+|\s+|.",
    re.DOTALL,
)
COMMENT_EDGE = re.compile(r"/\*|\*/")
# A COMMIT would end the transaction that makes a file all or nothing.
TRANSACTION_CONTROL = re.compile(r"(?:begin|commit|rollback|start\s+transaction|end)\b", re.IGNORECASE)
# The semicolons of such a body are outside any quotes: splitting would cut it into pieces.
SQL_BODY = re.compile(r"\bbegin\s+atomic\b", re.IGNORECASE)


@dataclass(frozen=True)
class Statement:
    """One statement of a file, and the line on which it begins."""

    sql: str
    line: int


async def migrate(target: str | Mapping[str, Any], migrations: Path) -> list[str]:
    """Creates missing roles, applies the missing files, and returns the names of those files.

    `target` is a dsn or the arguments of `asyncpg.connect`, for the owner of the database. Raises
    EmbeddedDatabaseError with file and line when a statement fails. That file then left no trace, and the
    files before it stay applied.
    """
    async with _connected(target) as connection:
        # The session's lock goes with the connection, so a killed process leaves no lock behind.
        await connection.execute("select pg_catalog.pg_advisory_lock($1)", LOCK)
        await ensure_roles(connection)
        await connection.execute(HISTORY)
        # Read under the lock: whoever held it before us may have applied files in the meantime.
        applied = await _applied_versions(connection)
        missing = [path for path in migration_files(migrations) if _version(path) not in applied]
        for path in missing:
            await _apply(connection, path, await asyncio.to_thread(path.read_text, encoding="utf-8"))
        return [path.name for path in missing]


def migration_files(migrations: Path) -> list[Path]:
    """The migrations of a folder, in the order in which they are applied.

    Raises EmbeddedDatabaseError where there is no folder, and for two files of one version.
    """
    if not migrations.is_dir():
        raise EmbeddedDatabaseError(
            f"There is no folder {migrations}: name the one that holds the migrations."
        )
    paths = sorted(path for path in migrations.iterdir() if FILE_NAME.fullmatch(path.name))
    for path, following in itertools.pairwise(paths):
        if _version(path) == _version(following):
            names = f"{path.name} and {following.name}"
            raise EmbeddedDatabaseError(f"{names} have the same version: rename one of them.")
    return paths


def split_statements(script: str) -> Iterator[Statement]:
    """The statements of a script without their semicolons. Pieces that hold only comments are left out."""
    start, has_content = 0, False
    for text, at, end in _tokens(script):
        if text == ";":
            if has_content:
                yield _statement(script, start, at)
            start, has_content = end, False
        elif not has_content and not text.isspace() and not text.startswith(("--", "/*")):
            # A statement begins at its first word, so that errors name the line a reader expects.
            start, has_content = at, True
    if has_content:
        yield _statement(script, start, len(script.rstrip()))


def _tokens(script: str) -> Iterator[tuple[str, int, int]]:
    """Each token with its start and end; of a comment block the token is only its opening."""
    at = 0
    while at < len(script):
        token = TOKEN.match(script, at)
        assert token is not None, "the last alternative matches every character"
        end = _comment_end(script, at) if token[0] == "/*" else token.end()
        yield token[0], at, end
        at = end


def _statement(script: str, start: int, end: int) -> Statement:
    return Statement(script[start:end], script.count("\n", 0, start) + 1)


def _comment_end(script: str, at: int) -> int:
    """Where the comment that begins here ends. Comments nest in PostgreSQL, unlike in the SQL standard."""
    depth = 0
    for edge in COMMENT_EDGE.finditer(script, at):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(script)


async def _applied_versions(connection: Connection) -> set[str]:
    rows = await connection.fetch("select version from supabase_migrations.schema_migrations")
    return {row["version"] for row in rows}


async def _apply(connection: Connection, path: Path, script: str) -> None:
    statements = list(split_statements(script))
    for statement in statements:
        _require_plain(path, statement)
    # The history row belongs to the same transaction: a file is either applied and recorded, or neither.
    async with connection.transaction():
        for statement in statements:
            await _execute(connection, path, statement)
        await connection.execute(
            "insert into supabase_migrations.schema_migrations (version, name, statements) "
            "values ($1, $2, $3)",
            _version(path),
            path.stem.partition("_")[2],
            [statement.sql for statement in statements],
        )


async def _execute(connection: Connection, path: Path, statement: Statement) -> None:
    try:
        await connection.execute(statement.sql)
    except asyncpg.PostgresError as exc:
        line = statement.line + _lines_before(statement.sql, exc)
        raise EmbeddedDatabaseError(
            f"{path.name}, line {line}: {exc.message or exc} ({exc.sqlstate})."
        ) from exc


def _require_plain(path: Path, statement: Statement) -> None:
    """Raises EmbeddedDatabaseError for a statement that cannot run inside the file's transaction."""
    where = f"{path.name}, line {statement.line}"
    if TRANSACTION_CONTROL.match(statement.sql):
        raise EmbeddedDatabaseError(
            f"{where}: a migration runs in one transaction, so it must not contain its own."
        )
    if SQL_BODY.search(statement.sql):
        raise EmbeddedDatabaseError(f"{where}: write the body in $$ instead of BEGIN ATOMIC.")


def _lines_before(sql: str, error: asyncpg.PostgresError) -> int:
    """How many lines into the statement PostgreSQL found the error; 0 where it does not say."""
    position = getattr(error, "position", None)
    return sql.count("\n", 0, int(position) - 1) if position else 0


def _version(path: Path) -> str:
    return path.name.partition("_")[0]


@asynccontextmanager
async def _connected(target: str | Mapping[str, Any]) -> AsyncIterator[Connection]:
    arguments = {"dsn": target} if isinstance(target, str) else dict(target)
    try:
        # A pooler in transaction mode loses prepared statements, so none are kept.
        connection: Connection = await asyncpg.connect(**arguments, statement_cache_size=0)
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise EmbeddedDatabaseError(
            f"The database to migrate cannot be reached ({exc}): check DATABASE_URL."
        ) from exc
    try:
        yield connection
    finally:
        await connection.close()
