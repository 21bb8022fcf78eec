"""The sums that reports are made of add up to the journal: before, while and after they are brought up to
date.
"""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from tests.support.sql_client import INSERT_RECORD, Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOW = datetime.now(UTC)
START = (NOW - timedelta(days=4)).replace(minute=0, second=0, microsecond=0)
PENDING = """
insert into public.usage_records (
    request_id, user_id, key_id, mode, environment, endpoint, model, hold_nanos, markup, created_at,
    expires_at)
values (gen_random_uuid(), $1, $2, 'sandbox', 'live', 'chat/completions', 'a/one', 0, 1, $3,
now() + interval '1 hour')
"""


async def write_records(client: Client, count: int, *, seed: str) -> list[dict[str, Any]]:
    """Settled records of two users over the last four days, with what credits they took."""
    dice = random.Random(seed)
    users = [await client.register(), await client.register()]
    written = []
    for _ in range(count):
        user = dice.choice(users)
        record = {
            "request_id": UUID(int=dice.getrandbits(128)),
            "user_id": user.id,
            "key_id": user.key_id,
            "model": dice.choice(["a/one", "a/two", "b/three"]),
            "provider": dice.choice(["X", "Y", None]),
            "prompt": dice.randrange(1000),
            "completion": dice.randrange(1000),
            "cost": dice.randrange(10**6),
            "status": dice.choice(["completed", "completed", "failed", "cancelled"]),
            "source": "usage",
            "error_code": dice.choice([None, "upstream_error"]),
            "latency": dice.randrange(400_000),
            "created_at": START + timedelta(seconds=dice.randrange(int((NOW - START).total_seconds()))),
        }
        await client.owner.execute(INSERT_RECORD, *record.values())
        written.append(record)
    await forget_sums(client)
    return written


async def forget_sums(client: Client) -> None:
    """As if nothing had been summed up: the gateway never writes a record into a time that is closed, these
    tests do.
    """
    await client.owner.execute("update public.usage_sums_state set summed_until = '-infinity'")
    await client.owner.execute("delete from public.usage_slots")
    await client.owner.execute("delete from public.usage_totals")
    await client.owner.execute("delete from public.usage_days")


async def report(
    client: Client, *, user_id: int | None, zone: str, bucket: str, group: str
) -> list[dict[str, Any]]:
    end = NOW + timedelta(days=1)
    return list(await client.call("report_usage", user_id, START, end, zone, bucket, group, 10_000))


async def sum_up(client: Client) -> int:
    steps = 1
    while await client.call("sum_up_usage"):
        steps += 1
    return steps


async def test_reports_count_every_settled_record_whether_summed_up_or_not(client: Client) -> None:
    everything = await write_records(client, 300, seed="all")
    user_id = everything[0]["user_id"]
    written = [record for record in everything if record["user_id"] == user_id]
    before = await report(client, user_id=user_id, zone="Asia/Kolkata", bucket="day", group="model")
    await sum_up(client)
    after = await report(client, user_id=user_id, zone="Asia/Kolkata", bucket="day", group="model")
    assert before == after
    expected: Counter[tuple[str, str]] = Counter()
    for record in written:
        day = record["created_at"].astimezone(ZoneInfo("Asia/Kolkata")).strftime("%Y-%m-%dT00:00:00")
        expected[day, record["model"]] += record["cost"]
    assert {(row["bucket"], row["group"]): row["cost_nanos"] for row in after} == dict(expected)
    assert await client.rows("select * from public.audit_usage()") == []


@pytest.mark.parametrize(
    "group", ["none", "model", "key", "user", "provider", "environment", "endpoint", "status", "error_code"]
)
@pytest.mark.parametrize(
    ("zone", "bucket"),
    [("UTC", "day"), ("UTC", "month"), ("America/St_Johns", "hour"), ("Europe/Berlin", "none")],
)
async def test_every_grouping_has_the_same_total(client: Client, group: str, zone: str, bucket: str) -> None:
    await write_records(client, 40, seed=group + zone + bucket)
    rows = await report(client, user_id=None, zone=zone, bucket=bucket, group=group)
    (journal,) = await client.rows(
        "select count(*) as n, sum(cost_nanos)::bigint as cost from public.usage_records "
        "where created_at >= $1",
        START,
    )
    assert (sum(row["requests"] for row in rows), sum(row["cost_nanos"] for row in rows)) == (
        journal["n"],
        journal["cost"],
    )


async def test_a_pending_request_keeps_its_time_open(client: Client) -> None:
    await sum_up(client)
    user = await client.register()
    moment = NOW - timedelta(hours=1)
    await client.owner.execute(PENDING, user.id, user.key_id, moment)
    await forget_sums(client)
    await sum_up(client)
    (state,) = await client.rows("select summed_until from public.usage_sums_state")
    assert state["summed_until"] <= moment
    assert await client.rows("select * from public.audit_usage()") == []


async def test_a_record_amended_after_it_was_summed_up_takes_the_sums_along(client: Client) -> None:
    user = await client.register(credits_nanos=10**9)
    moment = NOW - timedelta(days=3)
    request_id = UUID(int=77)
    await client.owner.execute(
        INSERT_RECORD,
        request_id,
        user.id,
        user.key_id,
        "a/one",
        "X",
        1,
        1,
        0,
        "expired",
        "none",
        "lost",
        5,
        moment,
    )
    await forget_sums(client)
    await sum_up(client)
    known = {"prompt_tokens": 3, "completion_tokens": 4, "billable_nanos": "500"}
    item = {"request_id": str(request_id), "status": "completed", "source": "generation", **known}
    (answer,) = await client.call("settle_requests", [item])
    assert (answer["outcome"], answer["cost_nanos"]) == ("settled", 500)
    assert await client.rows("select * from public.audit_usage()") == []
    rows = await report(client, user_id=user.id, zone="UTC", bucket="none", group="status")
    assert [(row["group"], row["cost_nanos"], row["prompt_tokens"]) for row in rows] == [
        ("completed", 500, 3)
    ]


async def test_quantiles_lie_within_their_bucket(client: Client) -> None:
    counts = [0] * 24
    counts[5], counts[12] = 90, 10
    query = "select public.latency_quantile($1::numeric[], $2::numeric)"
    assert 200 <= await client.owner.fetchval(query, counts, "0.5") <= 300
    assert 2000 <= await client.owner.fetchval(query, counts, "0.99") <= 3000
    assert await client.owner.fetchval(query, [0] * 24, "0.5") is None
