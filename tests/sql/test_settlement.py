"""Settlement charges once, never more than there is, and finishes what admission began, whatever happened in
between.
"""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from tests.support.sql_client import Client, locked_user, new_id, request, settlement

pytestmark = pytest.mark.asyncio(loop_scope="module")
FULL = 1_100


async def admitted(client: Client, **changes: Any) -> tuple[Any, str]:
    """A user with 5,000 nanos, and a request of theirs that holds 1,100."""
    account = await client.register(credits_nanos=5_000)
    answer = await client.admit_one(account, **changes)
    assert answer["outcome"] == "admitted", answer
    return account, answer["request_id"]


async def test_settlement_charges_the_cost_and_releases_the_hold(client: Client) -> None:
    account, request_id = await admitted(client)
    answer = await client.settle_one(
        request_id, model_used="m", provider="p", generation_id="gen-1", latency_ms=7
    )
    assert answer == {
        "outcome": "settled",
        "status": "completed",
        "cost_nanos": 500,
        "overrun_nanos": 0,
        "balance_nanos": 4_500,
        "user_id": account.id,
        "request_id": request_id,
    }
    record = await client.record(request_id)
    assert (record["settlement_source"], record["prompt_tokens"], record["completion_tokens"]) == (
        "usage",
        10,
        20,
    )
    assert (record["model_used"], record["provider"], record["generation_id"], record["latency_ms"]) == (
        "m",
        "p",
        "gen-1",
        7,
    )
    user, counters, key = (
        await client.user(account),
        await client.counters(account),
        await client.counters(account, "key"),
    )
    assert (user["credits_nanos"], user["held_nanos"]) == (4_500, 0)
    assert (counters["slots"], key["slots"], key["budget_held_nanos"], key["budget_spent_nanos"]) == (
        0,
        0,
        0,
        500,
    )
    await client.assert_sound()


async def test_the_charge_is_rounded_up_once_after_the_markup_of_the_record(client: Client) -> None:
    account, request_id = await admitted(client, markup="1.1")
    answer = await client.settle_one(request_id, billable_nanos="10.01")
    record = await client.record(request_id)
    assert (answer["cost_nanos"], record["upstream_cost_nanos"]) == (12, 11)  # 10.01 x 1.1 = 11.011
    assert (await client.user(account))["credits_nanos"] == 4_988


async def test_settling_again_repeats_the_first_answer_and_changes_nothing(client: Client) -> None:
    account, request_id = await admitted(client)
    await client.settle_one(request_id)
    answer = await client.settle_one(request_id, billable_nanos="4000", status="failed", source="generation")
    assert (answer["outcome"], answer["status"], answer["cost_nanos"], answer["balance_nanos"]) == (
        "repeated",
        "completed",
        500,
        4_500,
    )
    assert (await client.counters(account))["slots"] == 0
    await client.assert_sound()


async def test_many_settlements_of_one_request_at_once_charge_it_once(client: Client) -> None:
    _, request_id = await admitted(client)
    answers = await asyncio.gather(
        *(client.settle_one(request_id, billable_nanos=str(100 + n)) for n in range(6))
    )
    assert sorted(answer["outcome"] for answer in answers) == ["repeated"] * 5 + ["settled"]
    assert len({answer["cost_nanos"] for answer in answers}) == 1
    await client.assert_sound()


async def test_the_same_request_twice_in_a_batch_is_charged_once(client: Client) -> None:
    _, request_id = await admitted(client)
    answers = await client.settle(settlement(request_id), settlement(request_id))
    assert [answer["outcome"] for answer in answers] == ["settled", "repeated"]
    await client.assert_sound()


async def test_an_unknown_request_is_said_to_be_unknown(client: Client) -> None:
    assert (await client.settle_one(new_id()))["outcome"] == "unknown"


@pytest.mark.parametrize(
    ("billable", "cost", "overrun"),
    [(1_101, 1_101, 0), (5_000, 5_000, 0), (5_001, 5_000, 1), (10**9, 5_000, 10**9 - 5_000)],
)
async def test_an_overrun_takes_what_is_not_held_and_records_the_rest(
    client: Client, billable: int, cost: int, overrun: int
) -> None:
    _, request_id = await admitted(client)
    answer = await client.settle_one(request_id, billable_nanos=str(billable))
    assert (answer["cost_nanos"], answer["overrun_nanos"], answer["balance_nanos"]) == (
        cost,
        overrun,
        5_000 - cost,
    )
    await client.assert_sound()


async def test_an_overrun_never_takes_what_another_request_holds(client: Client) -> None:
    account, request_id = await admitted(client)
    other = await client.admit_one(account)
    answer = await client.settle_one(request_id, billable_nanos="100000")
    assert (answer["cost_nanos"], answer["overrun_nanos"]) == (5_000 - FULL, 100_000 - 5_000 + FULL)
    assert (await client.settle_one(other["request_id"], billable_nanos=str(FULL)))["balance_nanos"] == 0
    await client.assert_sound()


async def test_a_settlement_without_a_known_cost_is_amended_once_and_then_frozen(client: Client) -> None:
    account, request_id = await admitted(client)
    first = await client.settle_one(
        request_id, source="none", status="expired", billable_nanos="0", prompt_tokens=None
    )
    assert (first["outcome"], first["cost_nanos"]) == ("settled", 0)
    assert (await client.settle_one(request_id, source="none", status="failed"))["outcome"] == "repeated"
    amended = await client.settle_one(
        request_id, source="generation", status="cancelled", billable_nanos="700"
    )
    assert (amended["outcome"], amended["status"], amended["cost_nanos"], amended["balance_nanos"]) == (
        "settled",
        "cancelled",
        700,
        4_300,
    )
    assert (await client.settle_one(request_id, source="generation", billable_nanos="9"))[
        "outcome"
    ] == "repeated"
    counters = await client.counters(account)
    assert (counters["slots"], counters["day_ring"][51]) == (0, 30)
    await client.assert_sound()


async def test_an_amendment_replaces_a_charge_instead_of_adding_to_it(client: Client) -> None:
    _, request_id = await admitted(client)
    await client.settle_one(request_id, source="none", billable_nanos="800")
    answer = await client.settle_one(request_id, source="generation", billable_nanos="300")
    assert (answer["cost_nanos"], answer["balance_nanos"]) == (300, 4_700)
    await client.assert_sound()


async def test_an_amendment_takes_no_more_than_is_not_held(client: Client) -> None:
    account, request_id = await admitted(client)
    await client.settle_one(request_id, source="none", billable_nanos="0")
    for _ in range(4):
        await client.admit_one(account)
    answer = await client.settle_one(request_id, source="generation", billable_nanos="1000")
    assert (answer["cost_nanos"], answer["overrun_nanos"]) == (600, 400)
    await client.assert_sound()


@pytest.mark.parametrize(
    "poison",
    [
        {"status": "pending"},
        {"status": "paid"},
        {"status": None},
        {"source": None},
        {"source": "hearsay"},
        {"billable_nanos": None},
        {"billable_nanos": "-1"},
        {"billable_nanos": "NaN"},
        {"billable_nanos": "Infinity"},
        {"billable_nanos": "9" * 30},
        {"billable_nanos": "much"},
        {"prompt_tokens": "x"},
        {"prompt_tokens": 10**30},
        {"request_id": "no uuid"},
        {"request_id": "-" * 36},
        {"request_id": None},
    ],
    ids=str,
)
async def test_a_poisoned_settlement_fails_alone_and_charges_nothing(
    client: Client, poison: dict[str, Any]
) -> None:
    account, request_id = await admitted(client)
    good, also_good = [(await client.admit_one(account))["request_id"] for _ in range(2)]
    answers = await client.settle(settlement(good), settlement(request_id, **poison), settlement(also_good))
    assert [answer["outcome"] for answer in answers][::2] == ["settled", "settled"]
    assert answers[1]["outcome"] in ("failed", "unknown")
    user = await client.user(account)
    assert (user["credits_nanos"], user["held_nanos"]) == (4_000, FULL)
    await client.assert_sound()


async def test_absurd_token_counts_do_not_break_the_counters_of_later_requests(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    for _ in range(3):
        answer = await client.admit_one(account)
        settled = await client.settle_one(answer["request_id"], prompt_tokens=2**62, completion_tokens=2**62)
        assert settled["outcome"] == "settled"
    answer = await client.admit_one(account)
    assert (await client.settle_one(answer["request_id"], prompt_tokens=-(2**62), completion_tokens=0))[
        "outcome"
    ] == "settled"
    await client.assert_sound()


async def test_a_locked_user_is_busy_while_neighbours_are_settled(client: Client) -> None:
    locked, first = await admitted(client)
    _, second = await admitted(client)
    async with locked_user(client, locked):
        answers = await client.call("settle_requests", [settlement(first), settlement(second)])
    assert [answer["outcome"] for answer in answers] == ["busy", "settled"]
    assert (await client.settle_one(first))["outcome"] == "settled"
    await client.assert_sound()


async def test_admission_and_settlement_of_many_users_in_any_order_do_not_deadlock(client: Client) -> None:
    accounts = [await client.register(credits_nanos=10**9) for _ in range(5)]

    async def run(step: int) -> None:
        order = [accounts[n * step % 5] for n in range(5)]
        for _ in range(10):
            answers = await client.admit(*(request(account) for account in order))
            noted = [{"request_id": a["request_id"], "generation_id": "g"} for a in answers[::-1]]
            settled, notes = await asyncio.gather(
                client.settle(*(settlement(a["request_id"]) for a in answers)),
                client.call("note_generations", noted),
            )
            assert {a["outcome"] for a in settled} == {"settled"}
            assert {a["outcome"] for a in notes} <= {"noted", "settled"}

    await asyncio.gather(run(1), run(2), run(3))
    await client.assert_sound()


async def test_generation_ids_are_noted_while_a_request_runs_and_survive_settlement(client: Client) -> None:
    _, request_id = await admitted(client)
    items = [{"request_id": request_id, "generation_id": "gen-1"}, {"request_id": "x", "generation_id": "y"}]
    items += [
        {"request_id": new_id(), "generation_id": "gen-2"},
        {"request_id": request_id, "generation_id": "z" * 300},
    ]
    answers = await client.call("note_generations", items)
    assert [answer["outcome"] for answer in answers] == ["noted", "failed", "settled", "failed"]
    await client.settle_one(request_id)
    late = await client.call("note_generations", [{"request_id": request_id, "generation_id": "gen-3"}])
    assert late[0]["outcome"] == "settled"
    assert (await client.record(request_id))["generation_id"] == "gen-1"


@pytest.mark.parametrize(
    "change",
    [
        "cost_nanos = 1",
        "status = 'failed'",
        "settlement_source = 'none'",
        "prompt_tokens = 1",
        "settled_at = null, status = 'pending'",
    ],
)
async def test_a_settled_record_is_frozen_even_for_the_owner(client: Client, change: str) -> None:
    _, request_id = await admitted(client)
    await client.settle_one(request_id)
    with pytest.raises(asyncpg.RestrictViolationError, match=r"frozen|never changes"):
        await client.value(
            f"update public.usage_records set {change} where request_id = $1::text::uuid", request_id
        )


@pytest.mark.parametrize(
    "column", ["user_id", "key_id", "markup", "created_at", "mode", "environment", "request_id"]
)
async def test_what_was_admitted_never_changes(client: Client, column: str) -> None:
    _, request_id = await admitted(client)
    with pytest.raises(asyncpg.RestrictViolationError):
        await client.value(
            f"update public.usage_records set {column} = {column} where request_id = $1::text::uuid",
            request_id,
        )


async def test_a_hold_only_grows_and_only_while_its_request_runs(client: Client) -> None:
    account, request_id = await admitted(client)
    raised = "update public.usage_records set hold_nanos = hold_nanos + $2 where request_id = $1::text::uuid"
    with pytest.raises(asyncpg.RestrictViolationError):
        await client.value(raised, request_id, -1)
    await client.settle_one(request_id)
    with pytest.raises(asyncpg.RestrictViolationError):
        await client.value(raised, request_id, 1)
    assert (await client.user(account))["held_nanos"] == 0


# Holds whose request was lost.


async def expired(client: Client, limit: int = 64) -> list[str]:
    return [hold["request_id"] for hold in await client.call("list_expired_holds", limit)]


async def test_expired_holds_are_listed_oldest_first_until_they_are_settled(fresh: Client) -> None:
    account = await fresh.register(credits_nanos=50_000)
    ids = [
        (await fresh.admit_one(account, ttl_seconds=ttl))["request_id"] for ttl in (-60, -7_200, 600, -3_600)
    ]
    assert await expired(fresh) == [ids[1], ids[3], ids[0]]
    assert await expired(fresh, 1) == [ids[1]]
    await fresh.settle_one(ids[1], source="none", status="expired", billable_nanos="0")
    assert await expired(fresh) == [ids[3], ids[0]]


async def test_the_watermark_follows_the_sweep_and_hides_nothing(fresh: Client) -> None:
    account = await fresh.register(credits_nanos=50_000)
    assert await expired(fresh) == []
    mark = await fresh.value("select swept_until from public.gateway_state")
    assert await fresh.value(
        "select $1 between now() - interval '2 minutes' and now() - interval '50 seconds'", mark
    )
    ids = [(await fresh.admit_one(account, ttl_seconds=ttl))["request_id"] for ttl in (2, 0, 3_600, 1)]
    seen: set[str] = set()
    async with asyncio.timeout(20):
        while len(seen) < 3:
            request_ids = await expired(fresh)
            seen |= set(request_ids)
            for request_id in request_ids:
                await fresh.settle_one(request_id, source="none", status="expired", billable_nanos="0")
    assert seen == set(ids) - {ids[2]}


async def test_a_hold_that_is_committed_late_is_not_behind_the_watermark(fresh: Client) -> None:
    """A hold that expires before its own transaction ends appears after a sweep that saw a younger one."""
    late, early = await fresh.register(credits_nanos=50_000), await fresh.register(credits_nanos=50_000)
    item = request(late, ttl_seconds=0)
    async with fresh.database.connection("service_role") as other:
        transaction = other.transaction()
        await transaction.start()
        assert '"admitted"' in await other.fetchval(
            "select public.admit_requests(jsonb_build_array($1::jsonb))", json.dumps(item)
        )
        lost = (await fresh.admit_one(early, ttl_seconds=0))["request_id"]
        assert await expired(fresh) == [lost]
        await transaction.commit()
    assert await expired(fresh) == [item["request_id"], lost]


async def test_a_refusal_for_credits_lists_the_users_expired_holds_once_in_ten_seconds(
    client: Client,
) -> None:
    account = await client.register(credits_nanos=6 * FULL)
    holds = [
        (await client.admit_one(account, ttl_seconds=-n, min_output=100))["request_id"] for n in range(6)
    ]
    refused = await client.admit_one(account, min_output=100)
    assert refused["outcome"] == "credits"
    listed = {hold["request_id"] for hold in refused["expired"]}
    assert len(listed) == 4 and listed < set(holds)
    assert (await client.admit_one(account, min_output=100))["expired"] is None
    await client.settle_one(holds[5], source="none", status="expired", billable_nanos="0")
    assert (await client.admit_one(account, min_output=100))["outcome"] == "admitted"
    await client.assert_sound()


async def test_slots_that_leaked_are_counted_again(client: Client) -> None:
    account = await client.register(credits_nanos=50_000, limits={"concurrency": 2})
    running = await client.admit_one(account)
    await client.value(
        "update public.rate_limit_usage set slots = 7, budget_held_nanos = 7 where subject_id in ($1, $2)",
        account.id,
        account.key_id,
    )
    assert (await client.admit_one(account))["outcome"] == "concurrency"
    assert (await client.counters(account))["slots"] == 1
    assert (await client.admit_one(account))["outcome"] == "admitted"
    await client.settle_one(running["request_id"])
    await client.assert_sound()


async def test_a_recount_finds_a_hold_made_after_the_clock_went_back(client: Client) -> None:
    """An admission earlier than the oldest pending one moves the start of the recount along."""
    account = await client.register(credits_nanos=50_000, limits={"concurrency": 2})
    await client.admit_one(account)
    future = await client.value("select now() + interval '1 hour'")
    await client.value(
        "update public.rate_limit_usage set pending_since = $2 where subject = 'user' and subject_id = $1",
        account.id,
        future,
    )
    earlier = await client.admit_one(account)
    since = (await client.counters(account))["pending_since"]
    assert since <= (await client.record(earlier["request_id"]))["created_at"] < future - timedelta(minutes=1)
