"""`supabase/schema/` is what the migrations make, object by object, on every PostgreSQL that is supported.

White space and comments inside a function's body are left aside: a migration that has landed is never edited,
while the files of the schema stay readable.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from supabase_config import MIGRATIONS
from tests.support.database import BOOTSTRAP, Database, copy_database, drop_database
from tests.support.sql_client import Client, open_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = MIGRATIONS.parent / "schema"
NEWEST = max(int(path.name[:14]) for path in MIGRATIONS.glob("*.sql"))
WIDTH = 110
FIRST_NARROW_MIGRATION = 20261130100101  # older ones have landed, with longer lines
# Strings, quoted names and operators whole; a comment or white space is no token.
TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|--[^\n]*|\w+|[-+*/<>=~!@#%^&|?:.]+|[^\w\s]")
ACL = (
    "(select array_agg(g.grantee::regrole || ' ' || g.privilege_type || ' ' || g.is_grantable order by 1)"
    " from aclexplode({0}) g)"
)
OURS = "relnamespace = 'public'::regnamespace"
OBJECTS = {
    "schemas": f"""
        select nspname as name, {ACL.format("nspacl")} as privileges from pg_namespace
        where nspname !~ '^pg_' and nspname not in ('information_schema', 'supabase_migrations')""",
    "tables": f"""
        select c.relname as name, c.relkind, c.relowner::regrole as owner, c.relpersistence, c.relrowsecurity,
               c.relforcerowsecurity, c.relreplident, c.reloptions, {ACL.format("c.relacl")} as privileges,
               obj_description(c.oid, 'pg_class') as comment
        from pg_class c where c.{OURS} and c.relkind not in ('i', 'I')""",
    "columns": f"""
        select c.relname || '.' || a.attname as name, a.attnum, format_type(a.atttypid, a.atttypmod) as type,
               a.attnotnull, a.attidentity, a.attgenerated, a.attstorage, a.attcompression,
               a.attcollation::regcollation::text as collation, pg_get_expr(d.adbin, d.adrelid) as preset,
               {ACL.format("a.attacl")} as privileges, col_description(c.oid, a.attnum) as comment
        from pg_attribute a join pg_class c on c.oid = a.attrelid
        left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
        where c.{OURS} and c.relkind not in ('i', 'I', 'S') and a.attnum > 0 and not a.attisdropped""",
    "sequences": f"""
        select s.seqrelid::regclass::text as name, to_jsonb(s) - 'seqrelid' as definition
        from pg_sequence s join pg_class c on c.oid = s.seqrelid where c.{OURS}""",
    "constraints": """
        select c.conrelid::regclass || '.' || c.conname as name, pg_get_constraintdef(c.oid) as definition,
               c.convalidated, obj_description(c.oid, 'pg_constraint') as comment
        from pg_constraint c where c.connamespace = 'public'::regnamespace""",
    "indexes": f"""
        select i.indexrelid::regclass::text as name, pg_get_indexdef(i.indexrelid) as definition,
               i.indisvalid, obj_description(i.indexrelid, 'pg_class') as comment
        from pg_index i join pg_class c on c.oid = i.indrelid where c.{OURS}""",
    "triggers": f"""
        select t.tgrelid::regclass || '.' || t.tgname as name, pg_get_triggerdef(t.oid) as definition,
               t.tgenabled, obj_description(t.oid, 'pg_trigger') as comment
        from pg_trigger t join pg_class c on c.oid = t.tgrelid where c.{OURS} and not t.tgisinternal""",
    # The definition holds the language, volatility, security and settings as well.
    "functions": f"""
        select p.oid::regprocedure::text as name, pg_get_functiondef(p.oid) as definition,
               p.proowner::regrole as owner, {ACL.format("p.proacl")} as privileges,
               obj_description(p.oid, 'pg_proc') as comment
        from pg_proc p where p.pronamespace = 'public'::regnamespace""",
    "types": f"""
        select t.typname as name, t.typtype, t.typowner::regrole as owner,
               {ACL.format("t.typacl")} as privileges, obj_description(t.oid, 'pg_type') as comment
        from pg_type t where t.typnamespace = 'public'::regnamespace""",
    "policies": """
        select tablename || '.' || policyname as name, * from pg_policies where schemaname = 'public'""",
    "views": "select viewname as name, definition from pg_views where schemaname = 'public'",
    "plans": """
        select slug as name, to_jsonb(p) - 'created_at' - 'updated_at' as definition from public.plans p""",
    "default limits": """
        select subject || subject_id as name, to_jsonb(l) - 'updated_at' as definition
        from public.rate_limit_configs l""",
    "state": """
        select 'state' as name, mode, swept_until, summed_until, noted_until
        from public.gateway_state, public.usage_sums_state, public.open_items_state""",
}
_names = (f"from_schema_{n}" for n in itertools.count())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def built(shared_database: Database) -> AsyncIterator[Client]:
    """A database that was made from supabase/schema/, on the server that `client` has a migrated one of."""
    database = await copy_database(shared_database.server, next(_names), "template1")
    async with open_client(database) as client:
        await client.owner.execute(BOOTSTRAP)
        for text in await asyncio.to_thread(read_schema):
            await client.owner.execute(text)
        yield client
    await drop_database(database)


def read_schema() -> list[str]:
    """The files in the order of their numbers, in which they load."""
    return [path.read_text() for path in sorted(SCHEMA.glob("*.sql"))]


def tokens(definition: str) -> list[str]:
    return [token for token in TOKEN.findall(definition) if not token.startswith("--")]


async def describe(client: Client, kind: str) -> dict[str, Any]:
    rows = {row["name"]: row for row in await client.rows(OBJECTS[kind])}
    if kind == "functions":
        for row in rows.values():
            row["definition"] = tokens(row["definition"])
    return rows


@pytest.mark.parametrize("kind", OBJECTS)
async def test_the_schema_folder_is_what_the_migrations_make(
    client: Client, built: Client, kind: str
) -> None:
    migrated, written = await describe(client, kind), await describe(built, kind)
    assert sorted(migrated) == sorted(written), (
        f"{kind}: change supabase/schema/ together with the migrations"
    )
    changed = [name for name in migrated if migrated[name] != written[name]]
    assert {name: written[name] for name in changed} == {name: migrated[name] for name in changed}


async def test_the_schema_folder_fills_the_tables_that_the_migrations_fill(
    client: Client, built: Client
) -> None:
    tables = await client.rows(f"select relname from pg_class where {OURS} and relkind = 'r'")
    for table in (row["relname"] for row in tables):
        query = f"select count(*) from public.{table}"
        assert await client.value(query) == await built.value(query), table


async def test_only_white_space_and_comments_of_a_body_are_left_aside() -> None:
    body = "select a->>'b  c' -- why\n from t where x <= 1"
    assert tokens(body) == tokens("select a ->> 'b  c' from t\n where x<=1  -- because")
    for other in ("'b c'", "'b  C'", "b  c"):
        assert tokens(body) != tokens(body.replace("'b  c'", other))
    assert tokens(body) != tokens(body.replace("<=", "<"))


async def test_the_schema_folder_has_each_object_once() -> None:
    counts = Counter(
        re.findall(
            r"^create (?:unique )?(table|type|function|index|trigger) (?:public\.)?(\w+)",
            "\n".join(read_schema()),
            flags=re.M,
        )
    )
    assert {kind for kind, _ in counts} == {"table", "type", "function", "index", "trigger"}
    assert [name for name, times in counts.items() if times > 1] == []


async def test_the_schema_folder_never_changes_what_it_made() -> None:
    text = "\n".join(read_schema())
    assert (
        re.findall(r"^(?:create or replace|drop|alter type|alter function)\b.*", text, flags=re.M | re.I)
        == []
    )
    assert re.findall(r"\badd column\b|\bdrop column\b", text, flags=re.I) == []


async def test_lines_of_sql_fit_the_width() -> None:
    new = [path for path in MIGRATIONS.glob("*.sql") if int(path.name[:14]) >= FIRST_NARROW_MIGRATION]
    long = [
        f"{path.name}:{number}"
        for path in sorted([*SCHEMA.glob("*.sql"), *new])
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert long == []


async def test_the_schemas_version_is_that_of_the_newest_migration(client_18: Client) -> None:
    assert await client_18.call("schema_version") == NEWEST
