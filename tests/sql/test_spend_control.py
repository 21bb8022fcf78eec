"""Budgets of end users, soft limits, users' own upstream keys and raised holds: counted to the nano, under
any order and concurrency.
"""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal
from typing import Any

import pytest

from tests.support.sql_client import (
    Account,
    Client,
    Json,
    hash_of,
    locked_user,
    new_id,
    open_client,
    request,
    settlement,
    until_blocked,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
FULL = 1_100


async def give_budget(
    client: Client, account: Account, end_user: str, nanos: int, window: str = "month"
) -> None:
    await client.ask(
        "insert into public.end_user_budgets (user_id, end_user, budget_nanos, budget_window) "
        "values ($1, $2, $3, $4)"
        " on conflict (user_id, end_user) do update set budget_nanos = excluded.budget_nanos, "
        "budget_window = excluded.budget_window"
        " returning 1",
        account.id,
        end_user,
        nanos,
        window,
    )


async def give_provider_key(client: Client, account: Account) -> None:
    await client.ask(
        "insert into public.provider_keys (user_id, encrypted_key, label) "
        "values ($1, 'sealed key', 'sk-or-...42') returning 1",
        account.id,
    )


async def usage_of(client: Client, account: Account, end_user: str) -> tuple[int, int, int]:
    """Spent, held and level of an end user."""
    query = "select * from public.end_user_usage where user_id = $1 and end_user = $2"
    rows = await client.rows(query, account.id, end_user)
    return (
        (rows[0]["budget_spent_nanos"], rows[0]["budget_held_nanos"], rows[0]["budget_level"])
        if rows
        else (0, 0, 0)
    )


async def events(client: Client, account: Account) -> list[Json]:
    return await client.rows("select * from public.budget_events where user_id = $1 order by id", account.id)


async def spend(client: Client, account: Account, nanos: int, **changes: Any) -> Json:
    """A request that costs exactly this."""
    answer = await client.admit_one(account, fixed_nanos=str(nanos), output_nanos="0", **changes)
    assert answer["outcome"] == "admitted", answer
    return await client.settle_one(answer["request_id"], billable_nanos=str(nanos))


# Budgets of end users.


async def test_an_end_user_spends_their_budget_and_no_more(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", 1_600)
    first = await client.admit_one(account, end_user="ann", min_output=100)
    assert (first["outcome"], first["hold_nanos"], await usage_of(client, account, "ann")) == (
        "admitted",
        FULL,
        (0, FULL, 0),
    )
    refused = await client.admit_one(account, end_user="ann", min_output=100)
    assert (refused["outcome"], refused["needed_nanos"], refused["available_nanos"]) == (
        "end_user_budget",
        FULL,
        500,
    )
    assert refused["affordable_output"] == 40
    await client.settle_one(first["request_id"])
    assert await usage_of(client, account, "ann") == (500, 0, 0)
    assert (await client.admit_one(account, end_user="ann", min_output=100))["outcome"] == "admitted"
    await client.assert_sound()


async def test_output_is_granted_as_far_as_the_end_users_budget_reaches(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", 609)
    answer = await client.admit_one(account, end_user="ann")
    assert (answer["outcome"], answer["granted_output"], answer["hold_nanos"]) == ("admitted", 50, 600)


@pytest.mark.parametrize(
    ("credits", "key_budget", "end_budget", "outcome"),
    [
        (500, 600, 700, "credits"),
        (600, 500, 700, "budget"),
        (600, 700, 500, "end_user_budget"),
        (500, 500, 500, "credits"),
        (900, None, 800, "end_user_budget"),
        (600, 500, 500, "budget"),
    ],
)
async def test_the_smallest_of_credits_and_budgets_decides_and_is_named(
    client: Client, credits: int, key_budget: int | None, end_budget: int, outcome: str
) -> None:
    account = await client.register(credits_nanos=credits)
    if key_budget is not None:
        await client.change_key(account, budget_nanos=key_budget, budget_window="day")
    await give_budget(client, account, "ann", end_budget)
    refused = await client.admit_one(account, end_user="ann", min_output=100)
    smallest = min(credits, end_budget, key_budget or end_budget)
    assert (refused["outcome"], refused["available_nanos"]) == (outcome, smallest)


async def test_an_end_user_without_a_budget_of_their_own_has_that_of_everybody(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "*", FULL)
    await give_budget(client, account, "rich", 10 * FULL)
    for end_user, second in (
        ("ann", "end_user_budget"),
        ("bob", "end_user_budget"),
        ("rich", "admitted"),
        ("*", "end_user_budget"),
    ):
        assert (await client.admit_one(account, end_user=end_user, min_output=100))["outcome"] == "admitted"
        assert (await client.admit_one(account, end_user=end_user, min_output=100))["outcome"] == second
    assert (await client.admit_one(account, min_output=100))["outcome"] == "admitted"
    await client.assert_sound()


async def test_an_end_user_without_any_budget_is_named_on_the_record_and_not_counted(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", FULL)
    answer = await client.admit_one(account, end_user="bob")
    record = await client.record(answer["request_id"])
    assert (record["end_user"], record["has_end_user_budget"]) == ("bob", False)
    await client.settle_one(answer["request_id"])
    assert (
        await client.value("select count(*) from public.end_user_usage where user_id = $1", account.id) == 0
    )


async def test_budgets_of_another_users_customers_do_not_count(client: Client) -> None:
    one, other = await client.register(credits_nanos=50_000), await client.register(credits_nanos=50_000)
    await give_budget(client, one, "ann", 0)
    assert (await client.admit_one(other, end_user="ann"))["outcome"] == "admitted"
    assert (await client.admit_one(one, end_user="ann"))["outcome"] == "end_user_budget"


async def test_a_new_window_starts_with_an_empty_budget(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", FULL, "day")
    await spend(client, account, FULL, end_user="ann")
    assert (await client.admit_one(account, end_user="ann"))["outcome"] == "end_user_budget"
    await client.value(
        "update public.end_user_usage set budget_since = budget_since - interval '1 day' where user_id = $1",
        account.id,
    )
    assert (await client.admit_one(account, end_user="ann", min_output=100))["outcome"] == "admitted"
    await client.assert_sound()


async def test_what_is_settled_in_the_next_window_counts_there_and_gives_its_hold_back(
    client: Client,
) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", 5_000, "day")
    await spend(client, account, 4_000, end_user="ann")
    running = await client.admit_one(account, end_user="ann")
    await client.value(
        "update public.end_user_usage set budget_since = budget_since - interval '1 day' where user_id = $1",
        account.id,
    )
    await client.settle_one(running["request_id"], billable_nanos="300")
    assert await usage_of(client, account, "ann") == (300, 0, 0)


async def test_a_budget_that_ends_while_a_request_runs_leaves_no_hold_behind(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", 5_000)
    running = await client.admit_one(account, end_user="ann")
    await client.value("delete from public.end_user_budgets where user_id = $1", account.id)
    unbudgeted = await client.admit_one(account, end_user="ann")
    for answer in (running, unbudgeted):
        await client.settle_one(answer["request_id"])
    assert await usage_of(client, account, "ann") == (500, 0, 0)
    await client.assert_sound()


async def test_twenty_of_two_hundred_concurrent_requests_fit_into_an_end_users_budget(client: Client) -> None:
    account = await client.register(credits_nanos=1_000_000)
    await give_budget(client, account, "ann", 20 * FULL + FULL - 1)
    async with open_client(client.database, 8) as crowd:
        singles = [crowd.admit(request(account, end_user="ann", min_output=100)) for _ in range(40)]
        batches = [
            crowd.admit(*(request(account, end_user="ann", min_output=100) for _ in range(16)))
            for _ in range(10)
        ]
        answers = [answer for batch in await asyncio.gather(*singles, *batches) for answer in batch]
    outcomes = [answer["outcome"] for answer in answers]
    assert (len(outcomes), outcomes.count("admitted"), outcomes.count("end_user_budget")) == (200, 20, 180)
    assert await usage_of(client, account, "ann") == (0, 20 * FULL, 0)
    await client.assert_sound()


async def test_a_held_budget_that_leaked_is_counted_again(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", 3 * FULL)
    await client.admit_one(account, end_user="ann")
    await client.value(
        "update public.end_user_usage set budget_held_nanos = 3300 where user_id = $1", account.id
    )
    assert (await client.admit_one(account, end_user="ann"))["outcome"] == "end_user_budget"
    assert await usage_of(client, account, "ann") == (0, FULL, 0)
    assert (await client.admit_one(account, end_user="ann"))["outcome"] == "admitted"
    await client.assert_sound()


async def test_a_lost_request_of_an_end_user_is_named_where_their_budget_refuses(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", FULL)
    lost = await client.admit_one(account, end_user="ann", ttl_seconds=-1, min_output=100)
    refused = await client.admit_one(account, end_user="ann", min_output=100)
    assert [hold["request_id"] for hold in refused["expired"]] == [lost["request_id"]]
    await client.settle_one(lost["request_id"], source="none", status="expired", billable_nanos="0")
    assert (await client.admit_one(account, end_user="ann", min_output=100))["outcome"] == "admitted"


async def test_the_flags_follow_what_is_written_even_at_once(client: Client) -> None:
    account = await client.register()
    assert (
        (await client.user(account))["has_end_user_budgets"],
        (await client.user(account))["has_provider_key"],
    ) == (False, False)
    async with open_client(client.database, 8) as crowd:
        async with locked_user(client, account) as other:
            writes = [
                asyncio.create_task(give_budget(crowd, account, "ann", 5)),
                asyncio.create_task(give_budget(crowd, account, "bob", 5)),
                asyncio.create_task(give_provider_key(crowd, account)),
            ]
            await until_blocked(client, 3)
            await other.execute("rollback")
        await asyncio.gather(*writes)
    assert (
        (await client.user(account))["has_end_user_budgets"],
        (await client.user(account))["has_provider_key"],
    ) == (True, True)
    await client.value(
        "delete from public.end_user_budgets where user_id = $1 and end_user = 'ann'", account.id
    )
    assert (await client.user(account))["has_end_user_budgets"] is True
    await client.value("delete from public.end_user_budgets where user_id = $1", account.id)
    await client.value("update public.provider_keys set is_active = false where user_id = $1", account.id)
    assert (
        (await client.user(account))["has_end_user_budgets"],
        (await client.user(account))["has_provider_key"],
    ) == (False, False)


# Soft limits.


async def test_each_level_of_a_key_budget_is_told_once(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await client.change_key(account, budget_nanos=1_000, budget_window="day")
    hooks = [
        await client.value(
            "insert into public.webhooks (user_id, url, encrypted_secret, is_active)"
            " values ($1, 'https://a.example', 's', $2) returning id",
            account.id,
            active,
        )
        for active in (True, True, False)
    ]
    told = []
    for nanos in (499, 1, 100, 199, 1, 150, 50):
        answer = await spend(client, account, nanos)
        told.append([event["level"] for event in await events(client, account)])
    assert told == [[], [50], [50], [50], [50, 80], [50, 80], [50, 80, 100]]
    last = (await events(client, account))[-1]
    assert (last["key_id"], last["end_user"], last["budget_nanos"], last["spent_nanos"]) == (
        account.key_id,
        None,
        1_000,
        1_000,
    )
    assert (last["budget_window"], str(last["request_id"])) == ("day", answer["request_id"])
    assert last["window_start"] == (await client.counters(account, "key"))["budget_since"]
    deliveries = await client.rows(
        "select event_id, webhook_id from public.webhook_deliveries where user_id = $1 order by id",
        account.id,
    )
    assert deliveries == [
        {"event_id": e["id"], "webhook_id": hook} for e in await events(client, account) for hook in hooks[:2]
    ]


async def test_of_several_levels_reached_at_once_the_highest_is_told(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await give_budget(client, account, "ann", 1_000)
    await spend(client, account, 850, end_user="ann")
    await spend(client, account, 100, end_user="ann")
    assert [(e["level"], e["end_user"], e["key_id"]) for e in await events(client, account)] == [
        (80, "ann", None)
    ]
    assert await usage_of(client, account, "ann") == (950, 0, 80)


async def test_the_levels_of_a_new_window_are_told_again(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await client.change_key(account, budget_nanos=1_000, budget_window="day")
    await give_budget(client, account, "ann", 1_000, "day")
    await spend(client, account, 600, end_user="ann")
    for table in (
        "rate_limit_usage set budget_since = budget_since - interval '1 day' where subject = 'key' "
        "and subject_id",
        "end_user_usage set budget_since = budget_since - interval '1 day' where user_id",
    ):
        number = account.key_id if "key" in table else account.id
        await client.value(f"update public.{table} = $1", number)
    await spend(client, account, 600, end_user="ann")
    assert (
        sorted((e["level"], e["end_user"] or "") for e in await events(client, account))
        == [(50, "")] * 2 + [(50, "ann")] * 2
    )


async def test_a_window_that_ends_while_a_request_runs_starts_its_levels_again(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await client.change_key(account, budget_nanos=2_000, budget_window="day")
    await spend(client, account, 900)
    running = await client.admit_one(account)
    await client.value(
        "update public.rate_limit_usage set budget_since = budget_since - interval '1 day' "
        "where subject = 'key' and subject_id = $1",
        account.key_id,
    )
    await client.settle_one(running["request_id"], billable_nanos="1000")
    assert [(e["level"], e["spent_nanos"]) for e in await events(client, account)] == [(50, 1_000)]


async def test_levels_follow_a_budget_that_is_changed(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await client.change_key(account, budget_nanos=1_000, budget_window="day")
    await spend(client, account, 600)
    await client.change_key(account, budget_nanos=2_000)
    await spend(client, account, 300)
    assert [e["level"] for e in await events(client, account)] == [50]
    await spend(client, account, 200)
    assert [(e["level"], e["budget_nanos"]) for e in await events(client, account)] == [
        (50, 1_000),
        (50, 2_000),
    ]
    await client.change_key(account, budget_nanos=1_300)
    await spend(client, account, 1)
    assert [(e["level"], e["budget_nanos"]) for e in await events(client, account)][2:] == [(80, 1_300)]


async def test_what_costs_nothing_reaches_no_level(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await client.change_key(account, budget_nanos=0, budget_window="day")
    await spend(client, account, 0)
    assert await events(client, account) == []


async def test_concurrent_settlements_tell_each_level_once(client: Client) -> None:
    account = await client.register(credits_nanos=500_000)
    await client.change_key(account, budget_nanos=100_000, budget_window="day")
    await give_budget(client, account, "*", 100_000)
    admitted = [(await client.admit_one(account, end_user="ann"))["request_id"] for _ in range(50)]
    async with open_client(client.database, 8) as crowd:
        await asyncio.gather(
            *(crowd.settle_one(request_id, billable_nanos="2000") for request_id in admitted)
        )
    rows = await events(client, account)
    assert [e["level"] for e in rows if e["end_user"] is None] == [50, 80, 100]
    assert [e["level"] for e in rows if e["end_user"] == "ann"] == [50, 80, 100]
    assert [e["spent_nanos"] for e in rows if e["end_user"] is None] == [50_000, 80_000, 100_000]
    await client.assert_sound()


async def test_a_settlement_that_is_repeated_or_fails_tells_nothing(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await client.change_key(account, budget_nanos=1_200, budget_window="day")
    request_id = (await client.admit_one(account))["request_id"]
    assert (await client.settle_one(request_id, billable_nanos="600", status="nonsense"))[
        "outcome"
    ] == "failed"
    assert await events(client, account) == []
    await client.settle_one(request_id, billable_nanos="600")
    await client.settle_one(request_id, billable_nanos="600")
    assert [e["level"] for e in await events(client, account)] == [50]


# Users' own upstream keys.


async def test_under_the_users_own_key_nothing_is_held_or_charged_and_everything_is_on_record(
    client: Client,
) -> None:
    account = await client.register()
    await give_provider_key(client, account)
    await client.change_key(account, budget_nanos=0, budget_window="day")
    await give_budget(client, account, "*", 0)
    answer = await client.admit_one(account, end_user="ann", min_output=100)
    assert (answer["outcome"], answer["byok"], answer["provider_key"]) == ("admitted", True, "sealed key")
    assert (answer["hold_nanos"], answer["granted_output"]) == (0, 100)
    settled = await client.settle_one(answer["request_id"], billable_nanos="700.5")
    assert (settled["cost_nanos"], settled["overrun_nanos"], settled["balance_nanos"]) == (0, 0, 0)
    record = await client.record(answer["request_id"])
    assert (record["byok"], record["upstream_cost_nanos"], record["cost_nanos"], record["end_user"]) == (
        True,
        701,
        0,
        "ann",
    )
    assert (record["prompt_tokens"], record["completion_tokens"]) == (10, 20)
    await client.assert_sound()


async def test_limits_apply_under_the_users_own_key(client: Client) -> None:
    account = await client.register(limits={"requests_per_minute": 1})
    await give_provider_key(client, account)
    assert (await client.admit_one(account))["outcome"] == "admitted"
    assert (await client.admit_one(account))["outcome"] == "rate_limit"


async def test_test_keys_and_inactive_provider_keys_use_the_operators_upstream(client: Client) -> None:
    account = await client.register(environment="test")
    await give_provider_key(client, account)
    answer = await client.admit_one(account)
    assert (answer["outcome"], "byok" in answer, (await client.record(answer["request_id"]))["byok"]) == (
        "admitted",
        False,
        False,
    )
    other = await client.register(credits_nanos=5_000)
    await give_provider_key(client, other)
    await client.value("update public.provider_keys set is_active = false where user_id = $1", other.id)
    assert (await client.admit_one(other))["hold_nanos"] == FULL


async def test_an_instance_that_knows_nothing_of_provider_keys_holds_and_charges(client: Client) -> None:
    """It would send under the operator's key."""
    account = await client.register(credits_nanos=5_000)
    await give_provider_key(client, account)
    answer = await client.admit_one(account, byok=None)
    assert (answer["hold_nanos"], "byok" in answer) == (FULL, False)
    assert (await client.settle_one(answer["request_id"]))["cost_nanos"] == 500


async def test_a_key_that_is_removed_while_its_request_runs_changes_nothing_about_the_charge(
    client: Client,
) -> None:
    account = await client.register(credits_nanos=5_000)
    await give_provider_key(client, account)
    running = await client.admit_one(account, ttl_seconds=-1)
    assert [
        h["provider_key"]
        for h in await client.call("list_expired_holds", 100)
        if h["request_id"] == running["request_id"]
    ] == ["sealed key"]
    await client.value("delete from public.provider_keys where user_id = $1", account.id)
    (hold,) = [
        h for h in await client.call("list_expired_holds", 100) if h["request_id"] == running["request_id"]
    ]
    assert (hold["byok"], hold["provider_key"]) == (True, None)
    assert (await client.settle_one(running["request_id"]))["cost_nanos"] == 0
    assert (await client.user(account))["credits_nanos"] == 5_000


async def test_a_resent_admission_still_names_the_users_key(client: Client) -> None:
    account = await client.register()
    await give_provider_key(client, account)
    item = request(account, resent=True)
    first, again = (await client.admit(item))[0], (await client.admit(item))[0]
    assert (again["outcome"], again["byok"], again["provider_key"], again["hold_nanos"]) == (
        "admitted",
        True,
        "sealed key",
        0,
    )
    assert first["environment"] == again["environment"]


async def test_a_first_run_that_the_user_paid_at_the_upstream_is_not_repeated(client: Client) -> None:
    account = await client.register()
    await give_provider_key(client, account)
    key = {"idempotency": {"place": hash_of("a"), "fingerprint": hash_of("b"), "ttl_seconds": 60}}
    first = await client.admit_one(account, **key)
    await client.settle_one(first["request_id"], status="cancelled")
    assert (await client.admit_one(account, **key))["outcome"] == "idempotency_not_kept"


async def test_hits_and_own_keys_add_up_in_the_journal_and_its_sums(fresh: Client) -> None:
    account, owner = await fresh.register(credits_nanos=50_000), await fresh.register()
    cache = {"place": hash_of("body"), "fingerprint": hash_of("vault"), "ttl_seconds": 300}
    first = await fresh.admit_one(account, cache=cache)
    await fresh.settle_one(first["request_id"], stored_answer="sealed", cache=cache)
    assert (await fresh.admit_one(account, cache=cache))["outcome"] == "cached"
    await give_provider_key(fresh, owner)
    await fresh.settle_one((await fresh.admit_one(owner))["request_id"], billable_nanos="9000")
    async with fresh.database.connection(
        "postgres"
    ) as past:  # as if it had been two hours ago: nothing else may change such a record
        await past.execute("set session_replication_role = replica")
        await past.execute(
            "update public.usage_records set created_at = created_at - interval '2 hours' "
            "where status <> 'pending'"
        )
    await fresh.call("sum_up_usage")
    sums = await fresh.rows(
        "select sum(requests)::int as requests, sum(cost_nanos)::int as cost, "
        "sum(upstream_cost_nanos)::int as upstream"
        " from public.usage_slots"
    )
    assert sums == [{"requests": 3, "cost": 500, "upstream": 500}]
    assert await fresh.rows("select * from public.audit_usage()") == []
    await fresh.assert_sound()


# Raising a hold.


def dearer(request_id: str, **changes: Any) -> Json:
    """An item for raise_holds: 100 output tokens at 20 nanos, on top of 200."""
    return {
        "request_id": request_id,
        "fixed_nanos": "200",
        "output_nanos": "20",
        "min_output": 1,
        "max_output": 100,
        **changes,
    }


async def raised(client: Client, *items: Json) -> list[Json]:
    return await client.call_batch("raise_holds", items)


async def test_a_raised_hold_is_held_everywhere_and_settles_as_one(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    await client.change_key(account, budget_nanos=5_000, budget_window="day")
    await give_budget(client, account, "ann", 5_000)
    request_id = (await client.admit_one(account, end_user="ann", markup="1.1"))["request_id"]
    basis = {"fixed_nanos": "200"}
    (answer,) = await raised(client, dearer(request_id, price_basis=basis))
    assert (answer["outcome"], answer["granted_output"], answer["hold_nanos"], answer["balance_nanos"]) == (
        "raised",
        100,
        2_420,
        5_000,
    )
    assert (await client.user(account))["held_nanos"] == 2_420
    record = await client.record(request_id)
    assert (record["hold_nanos"], record["output_granted"], record["price_basis"]) == (
        2_420,
        100,
        '{"fixed_nanos": "200"}',
    )
    await client.assert_sound()
    assert (await raised(client, dearer(request_id)))[0] == answer
    await client.settle_one(request_id, billable_nanos="2000")
    assert (await client.user(account))["held_nanos"] == 0
    assert await usage_of(client, account, "ann") == (2_200, 0, 0)
    await client.assert_sound()


async def test_the_old_hold_counts_as_available(client: Client) -> None:
    account = await client.register(credits_nanos=FULL + 110)
    request_id = (await client.admit_one(account, min_output=100))["request_id"]
    (answer,) = await raised(client, dearer(request_id))
    assert (answer["outcome"], answer["granted_output"], answer["hold_nanos"]) == ("raised", 50, 1_200)
    await client.assert_sound()


@pytest.mark.parametrize("short", ["credits", "budget", "end_user_budget"])
async def test_a_hold_that_cannot_be_raised_stays_as_it_was(client: Client, short: str) -> None:
    account = await client.register(credits_nanos=1_999 if short == "credits" else 50_000)
    await client.change_key(account, budget_nanos=1_999 if short == "budget" else 50_000, budget_window="day")
    await give_budget(client, account, "ann", 1_999 if short == "end_user_budget" else 50_000)
    request_id = (await client.admit_one(account, end_user="ann"))["request_id"]
    (answer,) = await raised(client, dearer(request_id, min_output=100))
    assert (answer["outcome"], answer["needed_nanos"], answer["available_nanos"]) == (short, 2_200, 1_999)
    assert (answer["affordable_output"], answer["held_nanos"]) == (89, 0)
    assert (await client.record(request_id))["hold_nanos"] == FULL
    await client.assert_sound()


async def test_a_hold_never_falls(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    request_id = (await client.admit_one(account))["request_id"]
    (answer,) = await raised(client, dearer(request_id, fixed_nanos="1", output_nanos="1"))
    assert (answer["outcome"], answer["granted_output"], answer["hold_nanos"]) == ("raised", 100, FULL)


async def test_nothing_is_raised_for_a_request_that_does_not_run(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    request_id = (await client.admit_one(account))["request_id"]
    await client.settle_one(request_id)
    answers = await raised(
        client,
        dearer(request_id),
        dearer(new_id()),
        {"request_id": "no uuid"},
        dearer(request_id, fixed_nanos="NaN"),
    )
    assert [answer["outcome"] for answer in answers] == ["unknown", "unknown", "failed", "unknown"]
    assert await raised(client) == []


@pytest.mark.parametrize(
    "poison",
    [{"fixed_nanos": None}, {"output_nanos": "NaN"}, {"max_output": None}, {"fixed_nanos": "-99999"}],
    ids=str,
)
async def test_a_poisoned_raise_fails_alone(client: Client, poison: Json) -> None:
    account = await client.register(credits_nanos=50_000)
    bad, good = [(await client.admit_one(account))["request_id"] for _ in range(2)]
    answers = await raised(client, dearer(bad, **poison), dearer(good))
    assert answers[1]["outcome"] == "raised"
    assert (await client.record(bad))["hold_nanos"] >= FULL
    await client.assert_sound()


@pytest.mark.parametrize("kind", ["test", "byok"])
async def test_what_holds_nothing_is_raised_to_nothing(client: Client, kind: str) -> None:
    account = await client.register(environment="test" if kind == "test" else "live")
    if kind == "byok":
        await give_provider_key(client, account)
    request_id = (await client.admit_one(account))["request_id"]
    (answer,) = await raised(client, dearer(request_id))
    assert (answer["outcome"], answer["granted_output"], answer["hold_nanos"]) == ("raised", 100, 0)


async def test_a_locked_user_is_asked_again_for_a_raise(client: Client) -> None:
    account, neighbour = (
        await client.register(credits_nanos=5_000),
        await client.register(credits_nanos=5_000),
    )
    ids = [(await client.admit_one(each))["request_id"] for each in (account, neighbour)]
    async with locked_user(client, account):
        answers = await client.call("raise_holds", [dearer(request_id) for request_id in ids])
    assert [answer["outcome"] for answer in answers] == ["busy", "raised"]


async def test_concurrent_raises_and_admissions_never_overdraw(client: Client) -> None:
    account = await client.register(credits_nanos=12 * FULL)
    admitted = [(await client.admit_one(account, min_output=100))["request_id"] for _ in range(10)]
    async with open_client(client.database, 8) as crowd:
        answers = await asyncio.gather(
            *(raised(crowd, dearer(request_id, min_output=100)) for request_id in admitted),
            *(crowd.admit(request(account, min_output=100)) for _ in range(5)),
        )
    outcomes = [answer["outcome"] for batch in answers for answer in batch]
    user = await client.user(account)
    assert (
        user["held_nanos"] == 12 * FULL == FULL * (10 + outcomes.count("raised") + outcomes.count("admitted"))
    )
    await client.assert_sound()


# All of it.


@pytest.mark.parametrize("seed", range(4))
async def test_no_order_of_events_leaves_a_counter_wrong(client_18: Client, seed: int) -> None:
    """Random requests with every feature; what is held is what is pending after each step, and nothing once
    all is settled.
    """
    chance, client = random.Random(f"spend {seed}"), client_18
    accounts = [await client.register(credits_nanos=chance.randrange(5_000, 60_000)) for _ in range(3)]
    await client.change_key(accounts[0], budget_nanos=20_000, budget_window="day")
    await give_provider_key(client, accounts[2])
    seen: list[str] = []
    for _ in range(90):
        account, what = chance.choice(accounts), chance.random()
        if what < 0.45:
            answers = await client.admit(
                *(random_request(chance, chance.choice(accounts)) for _ in range(chance.randrange(1, 4)))
            )
            seen += [answer["request_id"] for answer in answers if answer["outcome"] == "admitted"]
            assert "failed" not in {answer["outcome"] for answer in answers}, answers
        elif what < 0.75 and seen:
            await client.settle(
                *(
                    random_settlement(chance, request_id)
                    for request_id in chance.sample(seen, min(3, len(seen)))
                )
            )
        elif what < 0.85 and seen:
            await raised(
                client,
                dearer(
                    chance.choice(seen),
                    output_nanos=str(chance.randrange(60)),
                    min_output=chance.choice([1, 100]),
                ),
            )
        elif what < 0.92:
            await give_budget(
                client,
                account,
                chance.choice(["ann", "bob", "*"]),
                chance.randrange(20_000),
                chance.choice(["day", "lifetime"]),
            )
        elif what < 0.95:
            await client.value(
                "delete from public.end_user_budgets where user_id = $1 and end_user = $2",
                account.id,
                chance.choice(["ann", "*"]),
            )
        else:
            await client.call("delete_expired_answers")
        await client.assert_sound()
    assert len(seen) > 20
    await client.settle(
        *(settlement(request_id, billable_nanos=str(chance.randrange(3_000))) for request_id in seen)
    )
    await client.assert_sound()
    ids = [account.id for account in accounts]
    assert await client.value("select sum(held_nanos) from public.users where id = any($1)", ids) == 0
    assert not await client.value(
        "select sum(budget_held_nanos) from public.end_user_usage where user_id = any($1)", ids
    )
    keys = [account.key_id for account in accounts]
    held = (
        "select sum(budget_held_nanos + slots) from public.rate_limit_usage where subject = 'key' "
        "and subject_id = any($1)"
    )
    assert await client.value(held, keys) == 0
    assert (
        await client.value(
            "select count(*) from public.stored_answers where user_id = any($1) and state = 'running'", ids
        )
        == 0
    )
    assert (
        await client.value(
            "select count(*) from public.usage_records where user_id = any($1) and byok and cost_nanos > 0",
            ids,
        )
        == 0
    )


def random_request(chance: random.Random, account: Account) -> Json:
    changes: Json = {
        "fixed_nanos": str(chance.randrange(0, 2_000)),
        "output_nanos": chance.choice(["0", "0.37", "3", "17.125"]),
        "max_output": chance.randrange(1, 400),
        "markup": chance.choice(["1", "1.1", "1.055"]),
    }
    if chance.random() < 0.6:
        changes["end_user"] = chance.choice(["ann", "bob", "cec"])
    if chance.random() < 0.5:
        slot = {
            "place": hash_of(f"key {chance.randrange(6)}"),
            "fingerprint": hash_of(chance.choice("ab")),
            "ttl_seconds": 600,
        }
        changes["idempotency"] = slot
    if chance.random() < 0.5:
        changes["cache"] = {
            "place": hash_of(f"body {chance.randrange(6)}"),
            "fingerprint": hash_of("v"),
            "ttl_seconds": 600,
        }
    return request(account, **changes)


def random_settlement(chance: random.Random, request_id: str) -> Json:
    changes: Json = {
        "status": chance.choice(["completed", "failed", "cancelled", "expired"]),
        "source": chance.choice(["usage", "generation", "none"]),
        "billable_nanos": str(chance.choice([0, Decimal("0.5"), 700, 4_321, 50_000])),
    }
    if chance.random() < 0.5:
        changes["stored_answer"] = "sealed"
        changes["cache"] = {
            "place": hash_of(f"body {chance.randrange(6)}"),
            "fingerprint": hash_of("v"),
            "ttl_seconds": 600,
        }
    return settlement(request_id, **changes)
