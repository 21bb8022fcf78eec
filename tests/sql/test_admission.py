"""A request is admitted only if its upper bound could be held, whatever the order, the number of callers, or
the neighbours in the batch.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from decimal import ROUND_CEILING, Decimal
from typing import Any

import pytest

from tests.support.sql_client import (
    Account,
    Client,
    hash_of,
    locked_user,
    new_id,
    open_client,
    request,
    settlement,
    until_blocked,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
# What one request of `request` holds: 100 + 100 x 10.
FULL = 1_100


def outcomes(answers: list[dict[str, Any]]) -> list[str]:
    return [answer["outcome"] for answer in answers]


async def test_an_admitted_request_holds_its_bound_and_is_on_record(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    answer = await client.admit_one(account)
    assert answer == {
        "outcome": "admitted",
        "request_id": answer["request_id"],
        "user_id": account.id,
        "key_id": account.key_id,
        "environment": "live",
        "granted_output": 100,
        "hold_nanos": FULL,
        "balance_nanos": 5_000,
        "limits": answer["limits"],
    }
    record = await client.record(answer["request_id"])
    assert (record["status"], record["hold_nanos"], record["cost_nanos"], record["output_granted"]) == (
        "pending",
        FULL,
        0,
        100,
    )
    assert (record["expires_at"] - record["created_at"]).total_seconds() == 600
    assert (await client.user(account))["held_nanos"] == FULL
    await client.assert_sound()


async def test_no_items_have_no_answers(client: Client) -> None:
    assert await client.admit() == []
    assert await client.settle() == []
    assert await client.call("note_generations", []) == []


async def test_zero_credits_admit_nothing_that_costs(client: Client) -> None:
    account = await client.register()
    answer = await client.admit_one(account)
    assert (
        answer["outcome"],
        answer["needed_nanos"],
        answer["available_nanos"],
        answer["affordable_output"],
    ) == ("credits", 110, 0, 0)
    assert await client.value("select count(*) from public.usage_records where user_id = $1", account.id) == 0


async def test_zero_credits_admit_what_is_free(client: Client) -> None:
    account = await client.register()
    answer = await client.admit_one(account, fixed_nanos="0", output_nanos="0")
    assert (answer["outcome"], answer["granted_output"], answer["hold_nanos"]) == ("admitted", 100, 0)


async def test_output_is_granted_as_far_as_credits_reach(client: Client) -> None:
    account = await client.register(credits_nanos=609)
    answer = await client.admit_one(account)
    assert (answer["outcome"], answer["granted_output"], answer["hold_nanos"]) == ("admitted", 50, 600)


async def test_an_explicit_output_that_credits_do_not_cover_is_refused_with_what_they_cover(
    client: Client,
) -> None:
    account = await client.register(credits_nanos=609)
    answer = await client.admit_one(account, min_output=100)
    assert (answer["outcome"], answer["needed_nanos"], answer["affordable_output"]) == ("credits", FULL, 50)


@pytest.mark.parametrize("markup", ["1", "1.1", "1.125", "1.337", "0.9", "3.333333"])
async def test_the_grant_is_the_largest_that_credits_cover(client_18: Client, markup: str) -> None:
    """Holding never exceeds what is available, and one more token would."""
    chance = random.Random(f"grant {markup}")
    for _ in range(300):
        fixed = Decimal(chance.randrange(0, 10**6)) / 10 ** chance.randrange(0, 4)
        output = Decimal(chance.randrange(1, 10**6)) / 10 ** chance.randrange(0, 7)
        largest = chance.randrange(1, 10**5)
        available = chance.randrange(0, int((fixed + output * largest) * 2) + 2)

        def hold(tokens: int, fixed: Decimal = fixed, output: Decimal = output) -> int:
            return int(((fixed + output * tokens) * Decimal(markup)).to_integral_value(ROUND_CEILING))

        item = {
            "fixed_nanos": format(fixed, "f"),
            "output_nanos": format(output, "f"),
            "max_output": largest,
            "markup": markup,
        }
        granted = await client_18.ask(
            "select public.affordable_output(jsonb_populate_record(null::public.admission_item, "
            "$1::jsonb), $2)",
            item,
            available,
        )
        case = (item, available, granted)
        if granted < 0:
            assert hold(0) > available, case
        else:
            assert hold(granted) <= available, case
            assert granted == largest or hold(granted + 1) > available, case


@pytest.mark.parametrize("short", [0, 1])
async def test_the_last_nano_decides(client: Client, short: int) -> None:
    needed = 1_210 - short  # ceil(1100 x 1.1)
    account = await client.register(credits_nanos=needed)
    answer = await client.admit_one(account, markup="1.1", min_output=100)
    assert answer["outcome"] == ("credits" if short else "admitted")
    await client.assert_sound()


async def test_credits_for_k_requests_admit_exactly_k_of_many_at_once(client: Client) -> None:
    account = await client.register(credits_nanos=7 * FULL + FULL - 1)
    async with open_client(client.database, 8) as crowd:
        singles = [crowd.admit(request(account, min_output=100)) for _ in range(12)]
        batches = [crowd.admit(*(request(account, min_output=100) for _ in range(4))) for _ in range(4)]
        answers = [answer for batch in await asyncio.gather(*singles, *batches) for answer in batch]
    assert sorted(set(outcomes(answers))) == ["admitted", "credits"]
    assert outcomes(answers).count("admitted") == 7
    await client.assert_sound()


async def test_concurrent_grants_of_part_of_the_output_never_exceed_the_credits(client: Client) -> None:
    account = await client.register(credits_nanos=3_333)
    async with open_client(client.database, 8) as crowd:
        answers = await asyncio.gather(*(crowd.admit_one(account, markup="1.1") for _ in range(24)))
    held = sum(answer["hold_nanos"] for answer in answers if answer["outcome"] == "admitted")
    assert held + 110 > 3_333 - 11 and held <= 3_333
    await client.assert_sound()


@pytest.mark.parametrize("seed", range(6))
async def test_no_order_of_events_unbalances_the_books(client_18: Client, seed: int) -> None:
    """Random admissions, settlements, grants and expiries of a few users; the identities hold after every
    single one.
    """
    chance, client = random.Random(seed), client_18
    accounts = [
        await client.register(credits_nanos=chance.randrange(0, 20_000), environment=environment)
        for environment in ("live", "live", "staging", "test")
    ]
    await client.change_key(accounts[1], budget_nanos=9_000, budget_window="day")
    seen: list[str] = []
    for _ in range(70):
        account, what = chance.choice(accounts), chance.random()
        if what < 0.4:
            items = [
                request(
                    chance.choice(accounts),
                    fixed_nanos=str(chance.randrange(0, 2_000)),
                    output_nanos=chance.choice(["0", "0.37", "3", "17.125"]),
                    max_output=chance.randrange(1, 900),
                    markup=chance.choice(["1", "1.1", "1.055"]),
                    ttl_seconds=chance.choice([0, 600]),
                )
                for _ in range(chance.randrange(1, 5))
            ]
            seen += [
                answer["request_id"]
                for answer in await client.admit(*items)
                if answer["outcome"] == "admitted"
            ]
        elif what < 0.8 and seen:
            for request_id in chance.sample(seen, min(3, len(seen))):
                source = chance.choice(["usage", "generation", "none"])
                await client.settle_one(
                    request_id,
                    source=source,
                    status=chance.choice(["completed", "failed", "cancelled", "expired"]),
                    billable_nanos=str(chance.choice([0, Decimal("0.5"), 700, 4_321, 50_000])),
                    prompt_tokens=chance.choice([None, 0, 3, 5_000]),
                    completion_tokens=chance.choice([None, 0, 900]),
                )
        elif what < 0.9:
            await client.grant(account, chance.randrange(1, 5_000))
        else:
            for hold in await client.call("list_expired_holds", 3):
                await client.settle_one(
                    hold["request_id"], source="none", status="expired", billable_nanos="0"
                )
        await client.assert_sound()
    assert len(seen) > 20


async def test_a_resent_item_gets_its_first_answer(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    item = request(account)
    first = (await client.admit(item))[0]
    again = (await client.admit({**item, "resent": True}))[0]
    assert {**first, "limits": None} == {**again, "limits": None}
    assert (await client.user(account))["held_nanos"] == FULL
    assert (await client.counters(account))["requests_used"] == 1


async def test_a_resent_item_that_never_arrived_is_decided_now(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    assert (await client.admit_one(account, resent=True))["outcome"] == "admitted"


async def test_a_resent_item_does_not_show_another_keys_request(client: Client) -> None:
    owner, thief = await client.register(credits_nanos=5_000), await client.register(credits_nanos=5_000)
    item = request(owner)
    await client.admit(item)
    answer = (await client.admit({**request(thief), "request_id": item["request_id"], "resent": True}))[0]
    assert (answer["outcome"], answer["sqlstate"]) == ("failed", "23505")


async def test_the_same_request_sent_twice_at_once_is_held_once(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    item = {**request(account), "resent": True}
    answers = await asyncio.gather(*(client.admit(item) for _ in range(4)))
    assert [answer["outcome"] for (answer,) in answers] == ["admitted"] * 4
    assert (await client.user(account))["held_nanos"] == FULL
    await client.assert_sound()


@pytest.mark.parametrize(
    "poison",
    [
        {"request_id": "no uuid"},
        {"request_id": None},
        {"prompt_estimate": "many"},
        {"prompt_estimate": -5},
        {"prompt_estimate": 10**30},
        {"fixed_nanos": "NaN"},
        {"fixed_nanos": "-1000000"},
        {"fixed_nanos": None, "min_output": None},
        {"fixed_nanos": "9" * 40, "min_output": None, "max_output": None},
        {"output_nanos": {"a": 1}},
        {"max_output": None, "output_nanos": "1e300", "min_output": 0, "fixed_nanos": "1e300"},
        {"markup": None},
        {"markup": "0"},
        {"models": []},
        {"models": "gpt"},
        {"hashes": "no list"},
        {"hashes": [None]},
        {"hashes": None},
        {"endpoint": None},
        {"ttl_seconds": None},
        {"ttl_seconds": 10**12},
        {"address": "nowhere", "hashes": ["0" * 64]},
        {"holds": "perhaps"},
    ],
    ids=str,
)
async def test_a_poisoned_item_fails_alone(client: Client, poison: dict[str, Any]) -> None:
    account = await client.register(credits_nanos=50_000)
    answers = await client.admit(request(account), request(account, **poison), request(account))
    assert outcomes(answers)[::2] == ["admitted", "admitted"]
    assert answers[1]["outcome"] in ("failed", "credits", "INVALID_KEY")
    assert (await client.user(account))["held_nanos"] == 2 * FULL
    await client.assert_sound()


@pytest.mark.parametrize("poison", [5, None, "text", [], {}])
async def test_what_is_no_item_fails_alone(client: Client, poison: Any) -> None:
    account = await client.register(credits_nanos=50_000)
    item = request(account)
    answers = await client.admit(poison, item)
    assert answers[1]["outcome"] == "admitted"
    assert answers[0]["outcome"] != "admitted"
    (settled,) = (await client.settle(poison, settlement(item["request_id"])))[1:]
    assert settled["outcome"] == "settled"


async def test_a_locked_user_is_busy_while_neighbours_are_served(client: Client) -> None:
    locked, free = await client.register(credits_nanos=5_000), await client.register(credits_nanos=5_000)
    async with locked_user(client, locked):
        answers = await client.call("admit_requests", [request(locked), request(free), request(locked)])
    assert outcomes(answers) == ["busy", "admitted", "busy"]
    assert (await client.admit_one(locked))["outcome"] == "admitted"
    await client.assert_sound()


async def test_many_locked_users_cost_no_more_time_than_one(client: Client) -> None:
    locked = [await client.register(credits_nanos=5_000) for _ in range(12)]
    async with client.owner.transaction():
        await client.owner.execute("select from public.users for no key update")
        loop = asyncio.get_running_loop()
        started = loop.time()
        answers = await client.call("admit_requests", [request(account) for account in locked])
        assert loop.time() - started < 1.5  # 12 x 250 ms would be 3 s
    assert set(outcomes(answers)) == {"busy"}


async def test_a_short_lock_is_waited_for(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    async with locked_user(client, account) as owner:
        asking = asyncio.create_task(client.call("admit_requests", [request(account)]))
        await until_blocked(client)
        await owner.execute("rollback")
        assert outcomes(await asking) == ["admitted"]


async def test_admission_decides_on_what_it_reads_under_the_lock(client: Client) -> None:
    """Credits that another transaction takes while this one waits for it are not spent twice."""
    account = await client.register(credits_nanos=FULL)
    async with locked_user(client, account) as owner:
        asking = asyncio.create_task(client.admit_one(account))
        await until_blocked(client)
        await owner.execute("select public.admit_requests($1)", json.dumps([request(account)]))
        await owner.execute("commit")
        assert (await asking)["outcome"] == "credits"


async def test_batches_that_name_the_same_users_in_opposite_orders_do_not_deadlock(client: Client) -> None:
    accounts = [await client.register(credits_nanos=10**9) for _ in range(6)]

    async def run(order: list[Account]) -> None:
        for _ in range(12):
            admitted = await client.admit(*(request(account) for account in order))
            assert set(outcomes(admitted)) == {"admitted"}
            settled = await client.settle(
                *(settlement(answer["request_id"]) for answer in reversed(admitted))
            )
            assert set(outcomes(settled)) == {"settled"}

    await asyncio.gather(run(accounts), run(accounts[::-1]), run(accounts[3:] + accounts[:3]))
    await client.assert_sound()


async def test_refusals_of_the_same_strangers_in_opposite_orders_do_not_deadlock(client: Client) -> None:
    account = await client.register()
    strangers = [request(account, hashes=[hash_of("stranger")], address=f"198.51.100.{n}") for n in range(16)]

    async def run(items: list[dict[str, Any]]) -> None:
        for _ in range(10):
            assert set(outcomes(await client.admit(*items))) == {"INVALID_KEY"}

    await asyncio.gather(run(strangers), run(strangers[::-1]))
    assert (
        await client.value(
            "select sum(occurrences) from public.audit_logs where actor like 'address:198.51.100.%'"
        )
        == 320
    )


async def test_repeated_refusals_are_one_row_with_a_count(client: Client) -> None:
    account = await client.register()
    await client.change_key(account, is_active=False)
    await client.admit(*(request(account) for _ in range(3)))
    await client.admit(request(account))
    rows = await client.rows(
        "select * from public.audit_logs where action = 'INACTIVE_KEY' and user_id = $1", account.id
    )
    assert sum(row["occurrences"] for row in rows) == 4
    assert len(rows) <= 2  # a minute may have begun in between
    assert {(row["actor"], row["user_id"], row["key_id"]) for row in rows} == {
        (f"key:{account.key_id}", account.id, account.key_id)
    }


async def test_a_refusal_of_an_unknown_caller_is_recorded_too(client: Client) -> None:
    account = await client.register()
    assert (await client.admit_one(account, hashes=[hash_of("stranger")], address=None))[
        "outcome"
    ] == "INVALID_KEY"
    assert (
        await client.value(
            "select occurrences from public.audit_logs where action = 'INVALID_KEY' and actor = 'unknown'"
        )
        == 1
    )


async def test_a_test_key_holds_and_costs_nothing(client: Client) -> None:
    account = await client.register(environment="test")
    answer = await client.admit_one(account, min_output=100)
    assert (answer["outcome"], answer["hold_nanos"], answer["granted_output"]) == ("admitted", 0, 100)
    settled = await client.settle_one(answer["request_id"], billable_nanos="1000000")
    assert (settled["cost_nanos"], settled["overrun_nanos"], settled["balance_nanos"]) == (0, 0, 0)
    await client.assert_sound()


async def test_verification_names_the_caller_and_writes_nothing(client: Client) -> None:
    account = await client.register()
    answer = await client.admit_one(account, holds=False, verb="read", models=None)
    assert (answer["outcome"], answer["user_id"], answer["role"], answer["key_name"]) == (
        "verified",
        account.id,
        "user",
        "primary",
    )
    assert await client.value("select count(*) from public.usage_records where user_id = $1", account.id) == 0
    assert (await client.counters(account))["requests_used"] == 0


async def test_counters_that_are_missing_are_made_so_that_limits_hold(client: Client) -> None:
    account = await client.register(credits_nanos=50_000, limits={"requests_per_day": 1})
    await client.value(
        "delete from public.rate_limit_usage where subject_id in ($1, $2)", account.id, account.key_id
    )
    assert [(await client.admit_one(account))["outcome"] for _ in range(2)] == ["admitted", "rate_limit"]
    await client.assert_sound()


async def test_an_instance_of_the_other_mode_is_told_so(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    assert (await client.admit_one(account, mode="live"))["outcome"] == "wrong_mode"


# A key that appears after the users of a batch were locked: its user is not, so it has to come again.


async def test_an_unlocked_user_is_busy_even_when_nobody_holds_the_lock(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    item = request(account)
    answer = await client.ask(
        "select public.admit_one(jsonb_populate_record(null::public.admission_item, $1::jsonb), '{}')", item
    )
    assert answer["outcome"] == "busy"
    assert (await client.admit(item))[0]["outcome"] == "admitted"
    answer = await client.ask(
        "select public.settle_one(jsonb_populate_record(null::public.settlement_item, $1::jsonb), '{}')",
        settlement(item["request_id"]),
    )
    assert answer["outcome"] == "busy"
    await client.assert_sound()


async def test_long_texts_of_a_client_are_cut_not_refused(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    answer = await client.admit_one(account, client_request_id="x" * 1000, user_agent="y" * 1000)
    assert answer["outcome"] == "admitted"
    assert len((await client.record(answer["request_id"]))["client_request_id"]) == 256


async def test_one_admission_reads_no_table_from_end_to_end(client_18: Client) -> None:
    client = client_18
    account = await client.register(credits_nanos=10**12)
    owner = client.owner
    await owner.execute(
        "insert into public.users (username, email) select 'u' || n, 'u' || n || '@example.com' "
        "from generate_series(1, 3000) n"
    )
    await owner.execute(
        "insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id) "
        "select id, 'k', 'gw_live_', 'abcd', encode(sha256(('x' || id)::bytea), 'hex'), 's' from public.users"
    )
    await owner.execute(
        "insert into public.rate_limit_usage (subject, subject_id) select 'user', id "
        "from public.users on conflict do nothing"
    )
    await owner.execute(
        "insert into public.usage_records (request_id, user_id, key_id, mode, environment, endpoint, "
        "model, hold_nanos, markup, status, "
        "settlement_source, settled_at, created_at, expires_at) "
        "select gen_random_uuid(), $1, $2, 'sandbox', 'live', 'chat', 'm', 0, 1, "
        "'completed', 'usage', now(), now(), now() from generate_series(1, 20000)",
        account.id,
        account.key_id,
    )
    await owner.execute("analyze")
    before = await _sequential_scans(client)
    admitted = await client.admit(*(request(account) for _ in range(8)))
    await client.settle(*(settlement(answer["request_id"]) for answer in admitted))
    assert await _sequential_scans(client) == before


async def _sequential_scans(client: Client) -> dict[str, int]:
    await _flush_statistics(client)
    rows = await client.rows(
        "select relname, seq_scan from pg_stat_user_tables "
        "where relname in ('users', 'usage_records', 'api_keys_new', 'rate_limit_usage')"
    )
    return {row["relname"]: row["seq_scan"] for row in rows}


async def _flush_statistics(client: Client) -> None:
    for connection in client.idle:  # what a session did is counted once it says so
        await connection.execute("select pg_stat_force_next_flush()")


async def test_updates_of_the_hot_tables_are_heap_only(client_18: Client) -> None:
    client = client_18
    accounts = [await client.register(credits_nanos=10**12) for _ in range(8)]
    for _ in range(40):
        admitted = await client.admit(*(request(account) for account in accounts for _ in range(4)))
        await client.settle(*(settlement(answer["request_id"]) for answer in admitted))
    await _flush_statistics(client)
    rows = await client.rows(
        "select relname, n_tup_hot_upd::float / n_tup_upd as hot from pg_stat_user_tables "
        "where relname in ('users', 'usage_records')"
    )
    assert len(rows) == 2
    assert {row["relname"]: row["hot"] for row in rows if row["hot"] < 0.95} == {}


async def test_request_ids_of_the_journal_are_unique(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    item = request(account)
    answers = await client.admit(item, item)
    assert outcomes(answers) == ["admitted", "failed"]
    assert (await client.user(account))["held_nanos"] == FULL
    assert await client.record(item["request_id"])
    assert uuid.UUID(new_id()).version == 7
