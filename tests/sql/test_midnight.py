"""At midnight UTC counters begin anew, and plans begin and end, to the microsecond and whatever the session's
time zone.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from tests.support.sql_client import Account, Client, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

TICK = timedelta(microseconds=1)
MIDNIGHT = datetime(2031, 3, 15, tzinfo=UTC)
FIRST = datetime(2031, 4, 1, tzinfo=UTC)
DECIDE = """
select public.admit_checked(jsonb_populate_record(null::public.admission_item, $1), k, u, $2)
from public.api_keys_new k join public.users u on u.id = k.user_id where k.id = $3
"""


async def plan(client: Client, **limits: int) -> int:
    slug = f"plan-{uuid.uuid4().hex[:12]}"
    number = await client.value("insert into public.plans (slug, name) values ($1, $1) returning id", slug)
    for name, limit in limits.items():
        await client.value(f"update public.plans set {name} = $2 where id = $1", number, limit)
    return int(number)


async def assign(client: Client, account: Account, plan_id: int, at: datetime, months: int = 1) -> None:
    order = {"user_id": account.id, "plan_id": plan_id, "duration_months": months, "actor": "admin"}
    assert (await client.call("assign_plan_at", order, at))["outcome"] == "assigned"


async def decide(client: Client, account: Account, at: datetime) -> dict[str, Any]:
    """Admission's answer to one more request at this moment, and what it counts."""
    item = request(account)
    return dict(await client.ask(DECIDE, item, at, account.key_id))


async def admits(client: Client, account: Account, at: datetime) -> bool:
    return bool((await decide(client, account, at))["outcome"] == "admitted")


async def plan_at(client: Client, account: Account, at: datetime) -> str:
    query = "select (public.current_plan(u, $2)).id from public.users u where u.id = $1"
    plan_id = await client.value(query, account.id, at)
    built_in = await client.value(
        "select slug from public.plans where id = $1 and slug in ('free', 'pay-as-you-go')", plan_id
    )
    return str(built_in or plan_id)


async def funded(client: Client) -> Account:
    return await client.register(credits_nanos=10**9)


@pytest.mark.parametrize("unit", ["request", "token"])
@pytest.mark.parametrize(("window", "midnight"), [("daily", MIDNIGHT), ("daily", FIRST), ("monthly", FIRST)])
async def test_a_spent_counter_is_full_again_at_midnight_and_not_a_microsecond_before(
    client: Client, unit: str, window: str, midnight: datetime
) -> None:
    account = await funded(client)
    await assign(
        client,
        account,
        await plan(client, **{f"{window}_{unit}_limit": 2 if unit == "request" else 20}),
        midnight - timedelta(days=5),
    )
    evening = midnight - timedelta(hours=1)
    assert [await admits(client, account, evening) for _ in range(3)] == [True, True, False]
    refused = await decide(client, account, midnight - TICK)
    assert (refused["outcome"], refused["window"]) == (
        "plan_limit",
        "plan day" if window == "daily" else "plan month",
    )
    assert [await admits(client, account, midnight) for _ in range(3)] == [True, True, False]


async def test_a_month_s_counter_starts_again_on_no_other_day(client: Client) -> None:
    account = await funded(client)
    await assign(
        client, account, await plan(client, monthly_request_limit=1), MIDNIGHT - timedelta(days=1), months=2
    )
    assert await admits(client, account, MIDNIGHT - TICK)
    for at in (MIDNIGHT, MIDNIGHT + timedelta(days=10), FIRST - TICK):
        assert not await admits(client, account, at)
    assert await admits(client, account, FIRST)


async def test_the_retry_after_of_a_plan_ends_at_midnight(client: Client) -> None:
    account = await funded(client)
    await assign(client, account, await plan(client, daily_request_limit=1), MIDNIGHT - timedelta(days=2))
    assert await admits(client, account, MIDNIGHT - timedelta(hours=1))
    refused = await decide(client, account, MIDNIGHT - timedelta(minutes=10))
    assert refused["retry_after"] == 600
    assert await admits(
        client, account, MIDNIGHT - timedelta(minutes=10) + timedelta(seconds=refused["retry_after"])
    )


@pytest.mark.parametrize("zone", ["Pacific/Auckland", "America/Los_Angeles", "Asia/Kolkata"])
async def test_midnight_is_that_of_utc_whatever_the_session_s_time_zone(client: Client, zone: str) -> None:
    account = await funded(client)
    await assign(client, account, await plan(client, daily_request_limit=1), MIDNIGHT - timedelta(days=2))
    connection = await client.connect()
    await connection.execute(f"set timezone to '{zone}'")

    async def outcome(at: datetime) -> str:
        return str(
            json.loads(await connection.fetchval(DECIDE, json.dumps(request(account)), at, account.key_id))[
                "outcome"
            ]
        )

    assert await outcome(MIDNIGHT - timedelta(hours=1)) == "admitted"
    assert await outcome(MIDNIGHT - TICK) == "plan_limit"
    assert await outcome(MIDNIGHT) == "admitted"


# Plans that begin and end at midnight. Its start is the first moment of a plan, its end the first without it.


async def test_a_plan_that_starts_at_midnight_applies_from_its_first_moment(client: Client) -> None:
    account = await funded(client)
    number = await plan(client, daily_request_limit=0)
    await assign(client, account, number, MIDNIGHT)
    assert [await plan_at(client, account, at) for at in (MIDNIGHT - TICK, MIDNIGHT)] == [
        "pay-as-you-go",
        str(number),
    ]
    assert [await admits(client, account, at) for at in (MIDNIGHT - TICK, MIDNIGHT)] == [True, False]


async def test_a_plan_that_ends_at_midnight_applies_no_more_in_its_last_moment(client: Client) -> None:
    account = await funded(client)
    number = await plan(client, daily_request_limit=0)
    await assign(client, account, number, MIDNIGHT)  # a month: until 15 April, midnight
    end = datetime(2031, 4, 15, tzinfo=UTC)
    assert [await plan_at(client, account, at) for at in (end - TICK, end)] == [str(number), "pay-as-you-go"]
    assert [await admits(client, account, at) for at in (end - TICK, end)] == [False, True]


async def test_an_account_that_paid_nothing_is_on_the_free_plan_before_and_after(client: Client) -> None:
    account = await client.register()
    await client.change_user(account, is_funded=False)
    number = await plan(client)
    await assign(client, account, number, MIDNIGHT)
    end = datetime(2031, 4, 15, tzinfo=UTC)
    assert [await plan_at(client, account, at) for at in (MIDNIGHT - TICK, MIDNIGHT, end - TICK, end)] == [
        "free", str(number), str(number), "free",
    ]  # fmt: skip


async def test_a_plan_replaced_at_midnight_leaves_no_moment_with_both_or_neither(client: Client) -> None:
    account = await funded(client)
    strict, generous = await plan(client, daily_request_limit=1), await plan(client, daily_request_limit=3)
    await assign(client, account, strict, MIDNIGHT - timedelta(days=3))
    assert [await admits(client, account, MIDNIGHT - TICK) for _ in range(2)] == [True, False]
    assert await plan_at(client, account, MIDNIGHT - TICK) == str(strict)
    await assign(client, account, generous, MIDNIGHT)
    rows = await client.rows(
        "select plan_id, start_date, end_date, is_active from public.user_plans "
        "where user_id = $1 order by id",
        account.id,
    )
    assert [(row["plan_id"], row["start_date"], row["end_date"], row["is_active"]) for row in rows] == [
        (strict, MIDNIGHT - timedelta(days=3), MIDNIGHT, False),
        (generous, MIDNIGHT, datetime(2031, 4, 15, tzinfo=UTC), True),
    ]
    assert await plan_at(client, account, MIDNIGHT) == str(generous)
    assert [await admits(client, account, MIDNIGHT) for _ in range(4)] == [True, True, True, False]


async def test_a_plan_replaced_during_the_day_keeps_what_the_day_has_used(client: Client) -> None:
    account = await funded(client)
    noon = MIDNIGHT + timedelta(hours=12)
    await assign(client, account, await plan(client, daily_request_limit=2), MIDNIGHT)
    assert [await admits(client, account, noon) for _ in range(3)] == [True, True, False]
    await assign(client, account, await plan(client, daily_request_limit=3), noon)
    assert [await admits(client, account, noon) for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("start", "months", "end"),
    [
        (datetime(2031, 1, 31, tzinfo=UTC), 1, datetime(2031, 2, 28, tzinfo=UTC)),
        (datetime(2032, 1, 31, tzinfo=UTC), 1, datetime(2032, 2, 29, tzinfo=UTC)),
        (datetime(2031, 12, 1, tzinfo=UTC), 1, datetime(2032, 1, 1, tzinfo=UTC)),
        (datetime(2031, 3, 1, tzinfo=UTC), 120, datetime(2041, 3, 1, tzinfo=UTC)),
    ],
)
async def test_months_of_a_plan_are_the_calendar_s_in_utc(
    client: Client, start: datetime, months: int, end: datetime
) -> None:
    account = await funded(client)
    order = {
        "user_id": account.id,
        "plan_id": await plan(client),
        "duration_months": months,
        "actor": "admin",
    }
    connection = await client.connect()
    await connection.execute(
        "set timezone to 'Europe/Berlin'"
    )  # 1 March and 1 April stand on two sides of its summer time
    await connection.fetchval("select public.assign_plan_at($1, $2)", json.dumps(order), start)
    assert (
        await client.value(
            "select end_date from public.user_plans where user_id = $1 and is_active", account.id
        )
        == end
    )


# What is shown of the limits is what admission decides by.


async def test_the_limits_of_a_verified_key_start_again_at_midnight_too(client: Client) -> None:
    account = await funded(client)
    await assign(client, account, await plan(client, daily_request_limit=3), MIDNIGHT - timedelta(days=1))
    assert await admits(client, account, MIDNIGHT - TICK)
    query = (
        "select public.verified_limits(k, u, $2) from public.api_keys_new k "
        "join public.users u on u.id = k.user_id where k.id = $1"
    )
    for at, left in ((MIDNIGHT - TICK, 2), (MIDNIGHT, 3)):
        limits = await client.ask(query, account.key_id, at)
        assert (limits["request_limit"], limits["request_left"]) == (3, left)
    before = await client.counters(account)
    await client.ask(query, account.key_id, MIDNIGHT)
    assert await client.counters(account) == before


@pytest.mark.parametrize("subject", ["user", "key"])
async def test_limits_are_shown_where_nothing_was_counted_yet(client: Client, subject: str) -> None:
    account = await funded(client)
    order = {
        "user_id": account.id,
        "key_id": account.key_id,
        "subject": subject,
        "limits": {"requests_per_minute": 9},
        "actor": "admin",
    }
    await client.call("set_rate_limits", order)
    await client.value(
        "delete from public.rate_limit_usage where (subject, subject_id) in (('user', $1), ('key', $2))",
        account.id,
        account.key_id,
    )
    answer = await client.admit_one(account, holds=False, verb="read")
    assert (answer["outcome"], answer["limits"]["request_limit"], answer["limits"]["request_left"]) == (
        "verified",
        9,
        9,
    )


# The rows that apply to everybody without one of their own.


@pytest.mark.parametrize(
    "statement",
    [
        "delete from public.plans where slug = 'free'",
        "delete from public.plans where slug = 'pay-as-you-go'",
        "update public.plans set slug = 'gratis' where slug = 'free'",
        "update public.plans set is_active = false where slug = 'free'",
        "truncate public.plans cascade",
        "delete from public.rate_limit_configs where subject = 'default'",
        "update public.rate_limit_configs set subject_id = 1 where subject = 'default'",
        "truncate public.rate_limit_configs",
    ],
)
async def test_without_the_built_in_rows_nobody_would_be_limited_so_they_stay(
    client: Client, statement: str
) -> None:
    with pytest.raises(asyncpg.RestrictViolationError):
        await client.owner.execute(statement)
    assert (
        await client.value(
            "select count(*) from public.plans where slug in ('free', 'pay-as-you-go') and is_active"
        )
        == 2
    )
    assert (
        await client.value(
            "select count(*) from public.rate_limit_configs where (subject, subject_id) = ('default', 0)"
        )
        == 1
    )
