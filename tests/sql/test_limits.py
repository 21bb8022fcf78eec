"""No window of a limit's length ever exceeds the limit, and Retry-After is true: after it, the request is
admitted.
"""

from __future__ import annotations

import asyncio
import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.database import UNLIMITED
from tests.support.sql_client import RINGS, Account, Client, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The window that each ring stands for, in milliseconds.
WINDOWS = {"burst_ring": 1_000, "minute_ring": 60_000, "hour_ring": 3_600_000, "day_ring": 86_400_000}

# One statement plays a whole history: events are [ms, requests' limit, tokens' limit, tokens, correction of
# an earlier event or null].
PLAY = """
create or replace function pg_temp.play(p_size int, p_width bigint, p_requests bigint, p_tokens bigint,
p_events jsonb) returns jsonb
language plpgsql as $$
declare
    v_ring bigint[] := public.empty_ring(p_size);
    v_event jsonb;
    v_state public.limit_state;
    v_out jsonb := '[]';
    v_at bigint;
begin
    for v_event in select e from jsonb_array_elements(p_events) as e loop
        v_at := (v_event ->> 'at')::bigint;
        if v_event ? 'delta' then
            v_ring := public.correct_ring(v_ring, p_size, (v_event ->> 'admitted')::bigint / p_width,
            v_at / p_width,
                                          (v_event ->> 'delta')::bigint);
            v_out := v_out || jsonb_build_object('sum', v_ring[2 * p_size + 2]);
            continue;
        end if;
        v_ring := public.advance_ring(v_ring, p_size, v_at / p_width);
        v_state := public.check_window(null, 'w', v_ring, p_size, p_width, p_requests, p_tokens,
        (v_event ->> 'tokens')::bigint);
        if v_state.refused_window is null then
            v_ring := public.count_in_ring(v_ring, p_size, null, 1, (v_event ->> 'tokens')::bigint);
        end if;
        v_out := v_out || jsonb_build_object(
            'ok', v_state.refused_window is null, 'frees_at', v_state.frees_at_ms, 'never',
            coalesce(v_state.never, false),
            'sound', v_ring[2 * p_size + 1] = (select sum(v_ring[i]) from generate_series(1, p_size) i)
                 and v_ring[2 * p_size + 2] = (select sum(v_ring[i])
                 from generate_series(p_size + 1, 2 * p_size) i));
    end loop;
    return v_out;
end $$
"""


async def play(
    client: Client, ring: str, limits: tuple[int | None, int | None], events: list[dict[str, int]]
) -> list[dict[str, Any]]:
    size, width = RINGS[ring]
    await client.value(PLAY)
    answer = await client.value(
        "select pg_temp.play($1, $2, $3, $4, $5)", size, width, *limits, json.dumps(events)
    )
    return list(json.loads(answer))


def history(chance: random.Random, window: int, count: int) -> list[dict[str, int]]:
    """Arrivals of every rhythm: bursts, waits around a bucket's and the window's length, long idle."""
    at, events = 1_800_000_000_000 + chance.randrange(window), []
    for _ in range(count):
        at += chance.choice(
            [
                0,
                0,
                1,
                window // 100,
                window // 10,
                window // 10 + 1,
                window // 3,
                window - 1,
                window,
                5 * window,
            ]
        )
        events.append({"at": at, "tokens": chance.randrange(0, 50)})
    return events


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("seed", range(4))
async def test_no_window_of_any_history_exceeds_a_limit(client_18: Client, ring: str, seed: int) -> None:
    window, chance = WINDOWS[ring], random.Random(f"{ring} {seed}")
    requests, tokens = chance.randrange(1, 8), chance.randrange(40, 160)
    events = history(chance, window, 250)
    answers = await play(client_18, ring, (requests, tokens), events)
    admitted = [(e["at"], e["tokens"]) for e, a in zip(events, answers, strict=True) if a["ok"]]
    assert 10 < len(admitted) < len(events)
    assert all(answer["sound"] for answer in answers)
    for end, _ in admitted:
        inside = [t for at, t in admitted if end - window < at <= end]
        assert len(inside) <= requests
        assert sum(inside) <= tokens


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("limits", [(3, None), (None, 60), (4, 70)], ids=str)
async def test_a_refused_request_is_admitted_after_its_retry_after_and_not_a_bucket_before(
    client_18: Client, ring: str, limits: tuple[int | None, int | None]
) -> None:
    window, chance = WINDOWS[ring], random.Random(f"{ring} {limits}")
    size, width = RINGS[ring]
    events = history(chance, window, 60)
    answers = await play(client_18, ring, limits, events)
    refused = [n for n, answer in enumerate(answers) if not answer["ok"]]
    assert len(refused) > 5
    for n in chance.sample(refused, 6):
        frees_at = answers[n]["frees_at"]
        assert events[n]["at"] < frees_at <= events[n]["at"] + size * width
        retry = [*events[:n], {**events[n], "at": frees_at}]
        assert (await play(client_18, ring, limits, retry))[-1]["ok"]
        early = [*events[:n], {**events[n], "at": frees_at - 1}]
        assert not (await play(client_18, ring, limits, early))[-1]["ok"]


@pytest.mark.parametrize("ring", RINGS)
async def test_requests_count_even_while_the_clock_is_set_back(client_18: Client, ring: str) -> None:
    window = WINDOWS[ring]
    start = 1_800_000_000_000
    events = [
        {"at": at, "tokens": 1}
        for at in (start, start - 3 * window, start - 2 * window, start - 2 * window, start - 1, start)
    ]
    answers = await play(client_18, ring, (3, None), events)
    assert [answer["ok"] for answer in answers] == [True, True, True, False, False, False]


@pytest.mark.parametrize("ring", ["minute_ring", "hour_ring", "day_ring"])
@pytest.mark.parametrize("seed", range(3))
async def test_corrections_keep_the_sum_of_tokens_true(client_18: Client, ring: str, seed: int) -> None:
    """Against a model: what was estimated within the ring, with corrections where they belong."""
    size, width = RINGS[ring]
    window, chance = WINDOWS[ring], random.Random(f"{ring} {seed} corrections")
    model: list[tuple[int, int]] = []  # bucket, tokens
    events: list[dict[str, int]] = []
    expected: list[int] = []
    open_ones: list[dict[str, int]] = []
    for event in history(chance, window // 4, 150):
        if open_ones and chance.random() < 0.5:
            admitted = open_ones.pop(chance.randrange(len(open_ones)))
            delta = chance.randrange(-admitted["tokens"], 100)
            events.append({"at": event["at"], "admitted": admitted["at"], "delta": delta})
            bucket = admitted["at"] // width if delta < 0 else event["at"] // width
            model.append((bucket, delta))
            newest = event["at"] // width
            expected.append(sum(tokens for at, tokens in model if newest - size < at <= newest))
        else:
            events.append(event)
            open_ones.append(event)
            model.append((event["at"] // width, event["tokens"]))
    answers = await play(client_18, ring, (None, None), events)
    assert [answer["sum"] for answer in answers if "sum" in answer] == expected
    assert min(expected) >= 0


async def test_the_longest_of_several_refusals_is_told(client_18: Client) -> None:
    account = await client_18.register(
        credits_nanos=10**6, limits={"requests_per_minute": 1, "requests_per_hour": 1, "burst": 1}
    )
    await client_18.admit_one(account)
    refusal = await client_18.admit_one(account)
    assert (refusal["outcome"], refusal["window"], refusal["unit"], refusal["limit"]) == (
        "rate_limit",
        "hour",
        "requests",
        1,
    )
    assert 3_300 <= refusal["retry_after"] <= 3_900


async def test_a_request_that_can_never_pass_is_told_so_whatever_else_refuses_it(client: Client) -> None:
    account = await client.register(
        credits_nanos=10**6, limits={"requests_per_hour": 1, "tokens_per_minute": 5}
    )
    refusal = await client.admit_one(account, prompt_estimate=6)
    assert (refusal["never"], refusal["unit"], refusal["need"]) == (True, "tokens", 6)
    await client.admit_one(account, prompt_estimate=1)
    refusal = await client.admit_one(account, prompt_estimate=6)
    assert (refusal["never"], refusal["unit"]) == (True, "tokens")


@pytest.mark.parametrize("name", [*UNLIMITED, "burst", "concurrency"])
async def test_a_limit_of_zero_refuses_all(client: Client, name: str) -> None:
    account = await client.register(credits_nanos=10**6, limits={name: 0})
    refusal = await client.admit_one(account)
    assert (refusal["outcome"], refusal["never"]) == (
        "concurrency" if name == "concurrency" else "rate_limit",
        True,
    )


async def test_a_limit_of_null_refuses_nothing_and_shows_no_header(client: Client) -> None:
    account = await client.register(credits_nanos=10**9)
    for _ in range(3):
        answers = await client.admit(*(request(account, prompt_estimate=10**6) for _ in range(20)))
        assert {answer["outcome"] for answer in answers} == {"admitted"}
    assert (answers[0]["limits"]["request_left"], answers[0]["limits"]["token_left"]) == (None, None)


@pytest.mark.parametrize(
    "name", ["burst", "requests_per_minute", "requests_per_hour", "requests_per_day", "concurrency"]
)
async def test_a_limit_of_n_admits_exactly_n_of_many_at_once(client: Client, name: str) -> None:
    account = await client.register(credits_nanos=10**9, limits={name: 5})
    batches = await asyncio.gather(*(client.admit(*(request(account) for _ in range(4))) for _ in range(6)))
    outcomes = [answer["outcome"] for batch in batches for answer in batch]
    assert outcomes.count("admitted") == 5 or name == "burst"  # a second may end between the batches
    assert outcomes.count("admitted") >= 5
    await client.assert_sound()


async def test_tokens_of_the_answer_count_once_they_are_known(client: Client) -> None:
    account = await client.register(credits_nanos=10**9, limits={"tokens_per_minute": 100})
    first = await client.admit_one(account, prompt_estimate=40)
    assert first["limits"]["token_left"] == 60
    await client.settle_one(first["request_id"], prompt_tokens=30, completion_tokens=60)
    refusal = await client.admit_one(account, prompt_estimate=11)
    assert (refusal["unit"], refusal["limits"]["token_left"]) == ("tokens", 10)
    assert (await client.admit_one(account, prompt_estimate=10))["outcome"] == "admitted"


async def test_tokens_that_were_estimated_too_high_are_given_back(client: Client) -> None:
    account = await client.register(credits_nanos=10**9, limits={"tokens_per_day": 100})
    first = await client.admit_one(account, prompt_estimate=100)
    await client.settle_one(first["request_id"], prompt_tokens=5, completion_tokens=5)
    assert (await client.admit_one(account, prompt_estimate=90))["outcome"] == "admitted"


async def test_a_keys_limits_hold_beside_its_users(client: Client) -> None:
    account = await client.register(credits_nanos=10**9)
    order = {
        "key_id": account.key_id,
        "subject": "key",
        "limits": {"requests_per_minute": 2},
        "actor": "admin",
    }
    assert (await client.call("set_rate_limits", order))["outcome"] == "set"
    outcomes = [(await client.admit_one(account))["outcome"] for _ in range(3)]
    assert outcomes == ["admitted", "admitted", "rate_limit"]


async def test_limits_of_a_key_are_never_set_on_another_users(client: Client) -> None:
    mine, other = await client.register(), await client.register()
    order = {"user_id": mine.id, "subject": "key", "limits": {"requests_per_minute": 0}, "actor": "admin"}
    assert (await client.call("set_rate_limits", order))["outcome"] == "not_found"
    assert (await client.call("set_rate_limits", {**order, "key_id": other.key_id}))["outcome"] == "not_found"
    assert (
        await client.rows(
            "select * from public.rate_limit_configs where subject = 'key' and subject_id = $1", other.key_id
        )
        == []
    )


async def test_a_user_without_limits_of_their_own_has_the_defaults(client: Client) -> None:
    account = await client.register(credits_nanos=10**9)
    await client.value(
        "delete from public.rate_limit_configs where subject = 'user' and subject_id = $1", account.id
    )
    answer = await client.admit_one(account)
    assert (answer["limits"]["request_limit"], answer["limits"]["request_left"]) == (60, 59)
    assert (answer["limits"]["token_limit"], answer["limits"]["token_left"]) == (10_000, 9_990)


# Slots.


async def test_a_slot_is_free_again_after_settlement(client: Client) -> None:
    account = await client.register(credits_nanos=10**9, limits={"concurrency": 1})
    running = await client.admit_one(account)
    refusal = await client.admit_one(account)
    assert (refusal["outcome"], refusal["limit"], refusal["retry_after"]) == ("concurrency", 1, 1)
    await client.settle_one(running["request_id"])
    assert (await client.admit_one(account))["outcome"] == "admitted"


async def test_test_keys_have_four_slots(client: Client) -> None:
    account = await client.register(environment="test")
    answers = await client.admit(*(request(account) for _ in range(6)))
    assert [answer["outcome"] for answer in answers] == ["admitted"] * 4 + ["concurrency"] * 2
    await client.settle_one(answers[0]["request_id"])
    assert (await client.admit_one(account))["outcome"] == "admitted"
    await client.assert_sound()


# Plans.


async def on_plan(client: Client, account: Account, **limits: Any) -> int:
    names = ", ".join(limits)
    marks = ", ".join(f"${n}" for n in range(2, len(limits) + 2))
    plan = await client.value(
        f"insert into public.plans (slug, name, {names}) values ($1, 'Plan', {marks}) returning id",
        f"plan-{account.id}",
        *limits.values(),
    )
    order = {"user_id": account.id, "plan_id": plan, "duration_months": 1, "actor": "admin"}
    assert (await client.call("assign_plan", order))["outcome"] == "assigned"
    return int(plan)


@pytest.mark.parametrize(
    ("name", "limit", "window"),
    [
        ("daily_request_limit", 2, "plan day"),
        ("monthly_request_limit", 2, "plan month"),
        ("daily_token_limit", 25, "plan day"),
        ("monthly_token_limit", 25, "plan month"),
    ],
)
async def test_a_plans_limit_refuses_until_its_utc_day_or_month_ends(
    client: Client, name: str, limit: int, window: str
) -> None:
    account = await client.register(credits_nanos=10**9)
    await on_plan(client, account, **{name: limit})
    outcomes = [await client.admit_one(account) for _ in range(3)]
    assert [answer["outcome"] for answer in outcomes] == ["admitted", "admitted", "plan_limit"]
    refusal, now = outcomes[-1], datetime.now(UTC)
    start = now.replace(hour=0, minute=0, second=0, microsecond=0)
    end = (
        start + timedelta(days=1)
        if window == "plan day"
        else (start.replace(day=1) + timedelta(days=32)).replace(day=1)
    )
    assert refusal["window"] == window
    assert abs(refusal["retry_after"] - (end - now).total_seconds()) < 30


async def advanced(
    client: Client, usage: dict[str, Any], now: str, window: str | None = None
) -> dict[str, Any]:
    """Counters as of `now`."""
    query = (
        "select to_jsonb(public.advance_usage(jsonb_populate_record(null::public.rate_limit_usage, "
        "jsonb_build_object('burst_ring', public.empty_ring(11), 'minute_ring', public.empty_ring(7), "
        "'hour_ring', public.empty_ring(13), "
        "'day_ring', public.empty_ring(25)) || $1::jsonb), $2::text::timestamptz, $3))"
    )
    return dict(await client.ask(query, usage, now, window))


@pytest.mark.parametrize(
    ("now", "day", "month"),
    [
        ("2026-01-31T23:59:59.999999Z", 7, 70),
        ("2026-02-01T00:00:00Z", 0, 0),
        ("2026-02-01T00:30:00+01:00", 7, 70),  # still January in UTC
        ("2026-01-30T12:00:00Z", 7, 70),  # the clock was set back
    ],
)
async def test_plan_counters_start_again_with_the_utc_day_and_month(
    client: Client, now: str, day: int, month: int
) -> None:
    usage = {
        "plan_day": "2026-01-31",
        "plan_month": "2026-01-01",
        "plan_day_requests": 7,
        "plan_day_tokens": 7,
        "plan_month_requests": 70,
        "plan_month_tokens": 70,
    }
    counters = await advanced(client, usage, now)
    assert [
        counters[f"plan_{name}"] for name in ("day_requests", "day_tokens", "month_requests", "month_tokens")
    ] == [day, day, month, month]


async def test_staging_keys_have_the_plans_limits_times_its_factor(client: Client) -> None:
    account = await client.register(credits_nanos=10**9, environment="staging")
    plan = await on_plan(client, account, daily_request_limit=4)
    await client.value(
        "update public.plans set environment_factors = '{\"staging\": 0.5}' where id = $1", plan
    )
    assert [(await client.admit_one(account))["outcome"] for _ in range(3)] == [
        "admitted",
        "admitted",
        "plan_limit",
    ]


async def test_a_plan_allows_only_its_models_and_its_concurrency(client: Client) -> None:
    account = await client.register(credits_nanos=10**9)
    await on_plan(client, account, allowed_models=["openai/*"], concurrency=1)
    assert (await client.admit_one(account, models=["anthropic/claude"]))["outcome"] == "MODEL_NOT_ALLOWED"
    assert [(await client.admit_one(account))["outcome"] for _ in range(2)] == ["admitted", "concurrency"]


async def test_without_a_plan_and_without_bought_credits_the_free_plan_applies(client: Client) -> None:
    account = await client.register(credits_nanos=10**9)
    await client.change_user(account, is_funded=False)
    assert (await client.admit_one(account))["limits"]["request_limit"] == 100
    await client.grant(account, 1)
    assert (await client.admit_one(account))["limits"]["request_limit"] is None


# Budgets.


@pytest.mark.parametrize("window", ["day", "week", "month", "lifetime"])
async def test_a_budget_bounds_what_a_key_holds_and_spends(client: Client, window: str) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_key(account, budget_nanos=2_500, budget_window=window)
    first = await client.admit_one(account, min_output=100)
    second = await client.admit_one(account, min_output=100)
    third = await client.admit_one(account, min_output=100)
    assert [answer["outcome"] for answer in (first, second, third)] == ["admitted", "admitted", "budget"]
    assert (third["available_nanos"], third["needed_nanos"], third["affordable_output"]) == (300, 1_100, 20)
    await client.settle_one(first["request_id"], billable_nanos="100")
    assert (await client.admit_one(account, min_output=100))["outcome"] == "admitted"
    await client.assert_sound()


async def test_a_budget_is_not_exceeded_by_many_at_once(client: Client) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_key(account, budget_nanos=5_600, budget_window="day")
    batches = await asyncio.gather(
        *(client.admit(*(request(account, min_output=100) for _ in range(3))) for _ in range(5))
    )
    assert [answer["outcome"] for batch in batches for answer in batch].count("admitted") == 5
    await client.assert_sound()


@pytest.mark.parametrize(
    ("window", "since", "before", "after"),
    [
        ("day", "2026-03-01T00:00:00Z", "2026-03-01T23:59:59Z", "2026-03-02T00:00:00Z"),
        ("week", "2026-02-23T00:00:00Z", "2026-03-01T23:59:59Z", "2026-03-02T00:00:00Z"),
        ("month", "2026-02-01T00:00:00Z", "2026-02-28T23:59:59Z", "2026-03-01T00:00:00Z"),
        ("lifetime", "-infinity", "2026-03-01T00:00:00Z", "2099-01-01T00:00:00Z"),
    ],
)
async def test_a_budget_starts_again_with_its_window(
    client: Client, window: str, since: str, before: str, after: str
) -> None:
    usage = {"budget_since": since, "budget_spent_nanos": 5, "budget_held_nanos": 3}
    assert (await advanced(client, usage, before, window))["budget_spent_nanos"] == 5
    counters = await advanced(client, usage, after, window)
    assert (counters["budget_spent_nanos"], counters["budget_held_nanos"]) == (
        5 if window == "lifetime" else 0,
        3,
    )


async def test_a_hold_that_is_settled_after_its_budgets_window_counts_in_the_new_one(client: Client) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_key(account, budget_nanos=5_000, budget_window="day")
    running = await client.admit_one(account)
    await client.value(
        "update public.rate_limit_usage set budget_since = budget_since - interval '1 day', "
        "budget_spent_nanos = 4000 "
        "where subject = 'key' and subject_id = $1",
        account.key_id,
    )
    await client.settle_one(running["request_id"], billable_nanos="700")
    counters = await client.counters(account, "key")
    assert (counters["budget_spent_nanos"], counters["budget_held_nanos"]) == (700, 0)
    assert counters["budget_since"] == datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


async def test_max_requests_bounds_a_keys_life(client: Client) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_key(account, max_requests=2)
    answers = await client.admit(*(request(account) for _ in range(3)))
    assert [answer["outcome"] for answer in answers] == ["admitted", "admitted", "REQUEST_LIMIT_EXCEEDED"]
    assert answers[2]["limit"] == 2
    assert "note" not in answers[2]
