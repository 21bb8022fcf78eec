"""`supabase/schema.sql` is what the migrations make, object by object."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from supabase_config import MIGRATIONS
from tests.support.sql_client import Client, Database, copy_database, drop_database, open_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = MIGRATIONS.parent / "schema.sql"
NEWEST = max(int(path.name[:14]) for path in MIGRATIONS.glob("*.sql"))
ACL = "(select array_agg(g.grantee::regrole || ' ' || g.privilege_type order by 1) from aclexplode({0}) g)"
OBJECTS = {
    "tables": f"""
        select c.relname as name, c.relkind, c.relrowsecurity, c.reloptions, obj_description(c.oid, 'pg_class') as comment,
               {ACL.format("c.relacl")} as privileges
        from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'S', 'c')""",
    "columns": """
        select c.relname || '.' || a.attname as name, a.attnum, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull, a.attidentity,
               pg_get_expr(d.adbin, d.adrelid) as preset, col_description(c.oid, a.attnum) as comment
        from pg_attribute a join pg_class c on c.oid = a.attrelid left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
        where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'c') and a.attnum > 0 and not a.attisdropped""",
    "constraints": """
        select c.conrelid::regclass || '.' || c.conname as name, pg_get_constraintdef(c.oid) as definition,
               obj_description(c.oid, 'pg_constraint') as comment
        from pg_constraint c where c.connamespace = 'public'::regnamespace""",
    "indexes": """
        select i.indexrelid::regclass::text as name, pg_get_indexdef(i.indexrelid) as definition,
               obj_description(i.indexrelid, 'pg_class') as comment
        from pg_index i join pg_class c on c.oid = i.indrelid where c.relnamespace = 'public'::regnamespace""",
    "triggers": """
        select t.tgrelid::regclass || '.' || t.tgname as name, pg_get_triggerdef(t.oid) as definition, t.tgenabled
        from pg_trigger t join pg_class c on c.oid = t.tgrelid where c.relnamespace = 'public'::regnamespace and not t.tgisinternal""",
    "functions": f"""
        select p.oid::regprocedure::text as name, pg_get_functiondef(p.oid) as definition, obj_description(p.oid, 'pg_proc') as comment,
               {ACL.format("p.proacl")} as privileges
        from pg_proc p where p.pronamespace = 'public'::regnamespace""",
    "types": f"""
        select t.typname as name, t.typtype, {ACL.format("t.typacl")} as privileges from pg_type t
        where t.typnamespace = 'public'::regnamespace""",
    "policies": "select tablename || '.' || policyname as name, * from pg_policies where schemaname = 'public'",
    "plans": "select slug as name, to_jsonb(p) - 'created_at' - 'updated_at' as definition from public.plans p",
    "limits": "select subject || subject_id as name, to_jsonb(l) - 'updated_at' as definition from public.rate_limit_configs l",
    "state": "select 'state' as name, mode, swept_until from public.gateway_state",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def built(shared_database_18: Database) -> AsyncIterator[Client]:
    """A database that was made from schema.sql."""
    database = await copy_database(shared_database_18.server, "from_schema", "template1")
    async with open_client(database) as found:
        await found.owner.execute(await asyncio.to_thread(SCHEMA.read_text))
        yield found
    await drop_database(database)


async def described(client: Client, kind: str) -> dict[str, Any]:
    return {row["name"]: row for row in await client.rows(OBJECTS[kind])}


@pytest.mark.parametrize("kind", OBJECTS)
async def test_schema_sql_says_what_the_migrations_make(client_18: Client, built: Client, kind: str) -> None:
    migrated, written = await described(client_18, kind), await described(built, kind)
    assert sorted(migrated) == sorted(written), f"{kind}: change {SCHEMA.name} together with the migrations"
    assert {name for name in migrated if migrated[name] != written[name]} == set()


async def test_schema_sql_shows_each_function_once() -> None:
    found = Counter(
        re.findall(r"^create function public\.(\w+\(.*?\))", SCHEMA.read_text(), flags=re.M | re.S)
    )
    assert found and [name for name, times in found.items() if times > 1] == []


async def test_the_schemas_version_is_that_of_the_newest_migration(client_18: Client) -> None:
    assert await client_18.call("schema_version") == NEWEST
