"""Entries of the ledger are never changed, and credits change only with the entry that explains it."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from tests.support.sql_client import Client, new_id

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_grant_adds_credits_ends_the_trial_and_is_recorded(client: Client) -> None:
    account = await client.register()
    answer = await client.grant(account, 700, reason="welcome")
    assert (answer["outcome"], answer["balance_nanos"]) == ("granted", 700)
    user = await client.user(account)
    assert (user["credits_nanos"], user["subscription_status"], user["is_funded"]) == (700, "active", True)
    (entry,) = await client.rows("select * from public.credit_transactions where user_id = $1", account.id)
    assert (entry["kind"], entry["amount_nanos"], entry["balance_after_nanos"], entry["reason"]) == (
        "grant",
        700,
        700,
        "welcome",
    )
    assert (
        await client.value(
            "select count(*) from public.audit_logs where action = 'add_credits' and user_id = $1", account.id
        )
        == 1
    )
    await client.assert_sound()


async def test_the_same_grant_twice_is_one(client: Client) -> None:
    account, key = await client.register(), new_id()
    first = await client.grant(account, 700, idempotency_key=key)
    await client.grant(account, 50)
    again = await client.grant(account, 700, idempotency_key=key)
    assert (again["outcome"], again["transaction_id"], again["balance_nanos"]) == (
        "repeated",
        first["transaction_id"],
        750,
    )
    await client.assert_sound()


async def test_the_same_grant_many_times_at_once_is_one(client: Client) -> None:
    account, key = await client.register(), new_id()
    answers = await asyncio.gather(*(client.grant(account, 700, idempotency_key=key) for _ in range(6)))
    assert sorted(answer["outcome"] for answer in answers) == ["granted"] + ["repeated"] * 5
    assert (await client.user(account))["credits_nanos"] == 700


@pytest.mark.parametrize("changes", [{"amount_nanos": 701}, {"other_user": True}], ids=str)
async def test_an_idempotency_key_of_another_order_is_a_conflict(
    client: Client, changes: dict[str, Any]
) -> None:
    account, other, key = await client.register(), await client.register(), new_id()
    await client.grant(account, 700, idempotency_key=key)
    target = other if "other_user" in changes else account
    answer = await client.grant(target, changes.get("amount_nanos", 700), idempotency_key=key)
    assert answer["outcome"] == "conflict"
    assert (await client.user(target))["credits_nanos"] == (0 if target is other else 700)
    await client.assert_sound()


async def test_one_idempotency_key_for_many_users_at_once_pays_one(client: Client) -> None:
    accounts, key = [await client.register() for _ in range(3)], new_id()
    answers = await asyncio.gather(*(client.grant(account, 700, idempotency_key=key) for account in accounts))
    assert sorted(answer["outcome"] for answer in answers) == ["conflict", "conflict", "granted"]
    assert sum([(await client.user(account))["credits_nanos"] for account in accounts]) == 700
    await client.assert_sound()


async def test_concurrent_grants_all_count(client: Client) -> None:
    account = await client.register()
    await asyncio.gather(*(client.grant(account, n) for n in range(1, 21)))
    assert (await client.user(account))["credits_nanos"] == 210
    await client.assert_sound()


async def test_a_grant_that_would_overflow_is_refused(client: Client) -> None:
    account = await client.register(credits_nanos=8 * 10**18)
    assert (await client.grant(account, 2 * 10**18))["outcome"] == "too_large"
    await client.assert_sound()


async def test_a_grant_to_nobody_is_not_found(client: Client) -> None:
    account = await client.register()
    answer = await client.call("grant_credits", {"user_id": 2**40, "amount_nanos": 1, "actor": "admin"})
    assert answer["outcome"] == "not_found"
    await client.value("update public.users set deleted_at = now() where id = $1", account.id)
    assert (await client.grant(account, 1))["outcome"] == "not_found"


@pytest.mark.parametrize("amount", [0, -1])
async def test_a_grant_of_nothing_or_less_is_misuse(client: Client, amount: int) -> None:
    account = await client.register(credits_nanos=5)
    with pytest.raises(asyncpg.CheckViolationError):
        await client.grant(account, amount)
    assert (await client.user(account))["credits_nanos"] == 5


async def test_credits_never_fall_below_what_is_held_even_for_the_owner(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    await client.admit_one(account)
    for change in ("credits_nanos = 1", "held_nanos = -1", "held_nanos = 5001"):
        with pytest.raises(asyncpg.CheckViolationError, match="users_never_overdrawn"):
            await client.value(f"update public.users set {change} where id = $1", account.id)


@pytest.mark.parametrize("table", ["credit_transactions", "audit_logs", "usage_records"])
@pytest.mark.parametrize(
    "statement", ["update {0} set id = id", "delete from {0}", "truncate {0}", "truncate {0} cascade"]
)
async def test_books_are_append_only_even_for_the_owner(client: Client, table: str, statement: str) -> None:
    account = await client.register(credits_nanos=5_000)
    answer = await client.admit_one(account)
    await client.settle_one(answer["request_id"])
    text = statement.format(f"public.{table}").replace("id = id", "user_id = user_id")
    with pytest.raises((asyncpg.RestrictViolationError, asyncpg.FeatureNotSupportedError)):
        await client.value(text)


async def test_truncating_the_users_does_not_reach_the_books(client: Client) -> None:
    with pytest.raises(asyncpg.RestrictViolationError):
        await client.value("truncate public.users cascade")


@pytest.mark.parametrize(
    "change",
    [
        "occurrences = occurrences - 1",
        "action = 'x', occurrences = occurrences + 1",
        "details = '{\"a\": 1}'",
    ],
)
async def test_of_an_audit_row_only_the_count_may_grow(client: Client, change: str) -> None:
    account = await client.register()
    await client.change_key(account, is_active=False)
    await client.admit_one(account)
    query = f"update public.audit_logs set {change} where action = 'INACTIVE_KEY' and user_id = $1"
    with pytest.raises(asyncpg.RestrictViolationError):
        await client.value(query, account.id)


async def test_the_audit_of_the_ledger_names_an_account_that_does_not_add_up(fresh: Client) -> None:
    account = await fresh.register(credits_nanos=5_000)
    await fresh.value("update public.users set credits_nanos = 6000 where id = $1", account.id)
    (row,) = await fresh.rows("select * from public.audit_ledger()")
    assert (row["user_id"], row["credits_nanos"], row["ledger_nanos"]) == (account.id, 6_000, 5_000)
