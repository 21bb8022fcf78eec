"""Strangers can do nothing in the database, even where its default privileges give everything away; the
gateway can do what it must.
"""

from __future__ import annotations

import re

import asyncpg
import pytest

from supabase_config import MIGRATIONS
from tests.support.sql_client import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRANGERS = """
with strangers as (select 0::oid as id union select oid from pg_roles
where rolname in ('anon', 'authenticated')),
objects as (
    select c.oid::regclass::text as name,
           coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char",
           c.relowner)) as acl
    from pg_class c where c.relnamespace = 'public'::regnamespace
    and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
    union all
    select c.oid::regclass::text || '.' || a.attname, a.attacl from pg_attribute a
    join pg_class c on c.oid = a.attrelid
    where c.relnamespace = 'public'::regnamespace and a.attacl is not null
    union all
    select p.oid::regprocedure::text, coalesce(p.proacl, acldefault('f', p.proowner)) from pg_proc p
    where p.pronamespace = 'public'::regnamespace
    union all
    -- A table's row type comes and goes with the table, and is of no use without it.
    select t.oid::regtype::text, coalesce(t.typacl, acldefault('T', t.typowner)) from pg_type t left
    join pg_class c on c.oid = t.typrelid
    where t.typnamespace = 'public'::regnamespace and t.typelem = 0 and (c.oid is null or c.relkind = 'c')
)
select o.name, g.privilege_type from objects o, aclexplode(o.acl) g join strangers s on s.id = g.grantee
"""


async def test_strangers_have_no_privilege_on_anything(client: Client) -> None:
    assert await client.rows(STRANGERS) == []


async def test_the_audit_of_strangers_would_see_a_forgotten_revoke(fresh: Client) -> None:
    await fresh.owner.execute(
        "create table public.forgotten (id bigint generated always as identity); create view public.seen "
        "as select 1 as one;"
        "create function public.open_to_all() returns int language sql as 'select 1'; create type "
        "public.shape as (a int)"
    )
    strangers = {row["name"] for row in await fresh.rows(STRANGERS)}
    assert strangers == {"forgotten", "forgotten_id_seq", "seen", "open_to_all()", "shape"}


@pytest.mark.parametrize("role", ["anon", "authenticated"])
async def test_strangers_are_refused_when_they_try(client: Client, role: str) -> None:
    async with client.database.connection(role) as stranger:
        for statement in (
            "select * from public.users",
            "insert into public.users (username, email) values ('x', 'x@example.com')",
            "select * from public.api_keys_new",
            "select public.admit_requests('[]')",
            "select public.grant_credits('{}')",
            "select public.enter_mode('live')",
            "select nextval('public.users_id_seq')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await stranger.fetchval(statement)


async def test_every_table_has_row_level_security_and_no_policy(client: Client) -> None:
    query = (
        "select relname from pg_class where relnamespace = 'public'::regnamespace "
        "and relkind in ('r', 'p') and not relrowsecurity"
    )
    assert await client.rows(query) == []
    assert await client.rows("select policyname from pg_policies where schemaname = 'public'") == []


# Called by other functions of ours only, whose empty search_path they inherit (docs/decisions/0005).
INNER = {
    "admission_users", "admit_checked", "admit_one", "advance_ring", "advance_usage", "affordable_output",
    "budget_level", "budget_start", "cached_json", "check_all_limits", "check_idempotency", "check_limits",
    "check_plan", "check_plan_counter", "check_window", "claim_idempotency", "correct_ring", "count_in_ring",
    "counted_tokens", "current_plan", "domain_allowed", "end_user_budget", "end_user_left",
    "expire_play_rest", "find_cached", "find_key", "finish_idempotency", "hold_for_end_user", "hold_json",
    "is_sound_record", "is_sound_user", "keep_in_cache", "limits_json", "models_allowed", "move_legacy_key",
    "note_budget_level", "raise_one", "record_admission", "recount_user", "refusal", "refuse_for_limits",
    "refuse_for_money", "refuse_identity", "refuse_until", "release_counters", "release_end_user",
    "repeat_admission", "retry_after_seconds", "ring_frees_at", "scope_allows", "settle_one",
    "settlement_answer", "settlement_users", "verified_limits",
}  # fmt: skip


async def test_every_function_runs_as_its_caller(client: Client) -> None:
    query = (
        "select oid::regprocedure::text as name from pg_proc "
        "where pronamespace = 'public'::regnamespace and prosecdef"
    )
    assert await client.rows(query) == []


async def test_every_function_but_the_inner_ones_sets_an_empty_search_path(client: Client) -> None:
    query = """
    select distinct proname as name from pg_proc
    where pronamespace = 'public'::regnamespace and not coalesce(proconfig, '{}') @> array['search_path=""']
    """
    assert {row["name"] for row in await client.rows(query)} == INNER


async def test_no_inner_function_is_called_from_outside() -> None:
    root = MIGRATIONS.parent.parent
    texts = "".join(path.read_text() for path in root.glob("db*.py"))
    called = set(re.findall(r'call\(\s*client,\s*"(\w+)"', texts))
    assert called
    assert not called & INNER


async def test_the_gateway_may_call_every_function_and_read_every_table(client: Client) -> None:
    query = """
    select oid::regprocedure::text as name from pg_proc
    where pronamespace = 'public'::regnamespace and not has_function_privilege('service_role', oid, 'execute')
    union all
    select relname from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'
        and not has_table_privilege('service_role', oid, 'select, insert')
    """
    assert await client.rows(query) == []


@pytest.mark.parametrize(
    ("table", "refused"),
    [
        ("credit_transactions", ["update", "delete", "truncate"]),
        ("usage_records", ["delete", "truncate"]),
        ("audit_logs", ["delete", "truncate"]),
    ],
)
async def test_the_gateway_may_not_change_the_books(client: Client, table: str, refused: list[str]) -> None:
    for privilege in refused:
        assert not await client.value(
            "select has_table_privilege('service_role', $1, $2)", f"public.{table}", privilege
        )
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await client.ask(f"delete from public.{table}")


async def test_the_gateway_has_no_privileges_that_it_was_not_granted(client: Client) -> None:
    """Old default privileges give the service role truncate, references and triggers as well."""
    query = """
    select c.relname, g.privilege_type from pg_class c, aclexplode(c.relacl) g
    where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and g.grantee = 'service_role'::regrole
        and g.privilege_type not in ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    """
    assert await client.rows(query) == []
