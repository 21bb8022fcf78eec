"""Migrations are applied once, in order, completely or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from embedded import EmbeddedDatabaseError
from embedded.migrate import migrate, split_statements
from embedded.postgres import EmbeddedPostgres
from embedded.roles import ensure_roles

FIRST = """-- a comment; with a semicolon
create table moved (id int, "odd;name" text default 'it''s; fine');
/* nested /* comment; */ */
create function moved_count() returns bigint language plpgsql as $body$
begin
    return (select count(*) from moved);
end;
$body$;
"""


@pytest.fixture
async def target(server: EmbeddedPostgres) -> AsyncIterator[dict[str, Any]]:
    """An empty database of its own."""
    owner = await asyncpg.connect(**server.connect_kwargs("postgres"))
    await owner.execute("create database moving")
    yield {**server.connect_kwargs("postgres"), "database": "moving"}
    await owner.execute("drop database moving with (force)")
    await owner.close()


async def ask(target: dict[str, Any], query: str) -> list[Any]:
    """The rows of one query, as tuples."""
    connection = await asyncpg.connect(**target)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def test_files_are_applied_once_and_in_order(target: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "20260102000000_second.sql").write_text("insert into moved values (1);")
    (tmp_path / "20260101000000_first.sql").write_text(FIRST)
    (tmp_path / "README.md").write_text("not a migration")
    assert await migrate(target, tmp_path) == ["20260101000000_first.sql", "20260102000000_second.sql"]
    assert await migrate(target, tmp_path) == []
    (tmp_path / "20260103000000_third.sql").write_text("insert into moved values (2)")
    assert await migrate(target, tmp_path) == ["20260103000000_third.sql"]
    assert await ask(target, "select moved_count()") == [(2,)]
    history = (
        "select version, name, cardinality(statements) from supabase_migrations.schema_migrations order by 1"
    )
    assert await ask(target, history) == [
        ("20260101000000", "first", 2),
        ("20260102000000", "second", 1),
        ("20260103000000", "third", 1),
    ]


async def test_concurrent_callers_apply_each_file_once(target: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "20260101000000_first.sql").write_text(FIRST)
    applied = await asyncio.gather(*(migrate(target, tmp_path) for _ in range(4)))
    assert sorted(applied) == [[], [], [], ["20260101000000_first.sql"]]


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("create table a ();\n\ncreate tabel b ();", 3),
        ("create table a ();\n-- twice\ncreate table a ();", 3),
        ("select 1;\nselect\n  nothing\nfrom pg_class;", 3),
        ("select 1;\ncommit;", 2),
    ],
)
async def test_a_failing_file_leaves_no_trace_and_is_named_with_its_line(
    target: dict[str, Any], tmp_path: Path, script: str, line: int
) -> None:
    (tmp_path / "20260101000000_first.sql").write_text("create table kept ();")
    (tmp_path / "20260102000000_broken.sql").write_text(script)
    with pytest.raises(EmbeddedDatabaseError, match=rf"^20260102000000_broken\.sql, line {line}: [^\n]+\.$"):
        await migrate(target, tmp_path)
    tables = "select relname from pg_class where relnamespace = 'public'::regnamespace"
    assert await ask(target, tables) == [("kept",)]


async def test_two_files_of_one_version_are_refused(target: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"20260101000000_{name}.sql").write_text("select 1")
    with pytest.raises(EmbeddedDatabaseError, match="have the same version"):
        await migrate(target, tmp_path)


async def test_a_missing_folder_and_a_missing_database_are_refused(
    target: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(EmbeddedDatabaseError, match="There is no folder"):
        await migrate(target, tmp_path / "nowhere")
    with pytest.raises(EmbeddedDatabaseError, match="cannot be reached"):
        await migrate({**target, "database": "nowhere"}, tmp_path)


async def test_a_login_that_may_not_create_roles_is_told_what_to_run(target: dict[str, Any]) -> None:
    connection = await asyncpg.connect(**target)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(
        "create role poor login; alter role service_role rename to something_else; set role poor"
    )
    with pytest.raises(EmbeddedDatabaseError, match="create role service_role nologin noinherit bypassrls"):
        await ensure_roles(connection)
    await transaction.rollback()
    assert await ensure_roles(connection) == []
    await connection.close()


def test_statements_end_at_semicolons_that_nothing_hides() -> None:
    script = "select $$a;b$$; select e'\\';' -- ;\n, '--'; ;\n/* ; */ select \"a;b\", $x$ $$;$$ $x$, a$b$c;"
    assert [(s.sql, s.line) for s in split_statements(script)] == [
        ("select $$a;b$$", 1),
        ("select e'\\';' -- ;\n, '--'", 1),
        ('select "a;b", $x$ $$;$$ $x$, a$b$c', 3),
    ]
