"""Several processes agree on credits, keys and limits: two workers of a real server, killed at the worst
moments.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.support.database import Database
from tests.support.gateway import Gateway, User
from tests.support.servers import eventually, is_ready
from tests.support.upstream import Upstream
from tests.support.workers import running_workers, start_stream, workers_of


@pytest.fixture
async def supervisor(
    database: Database, upstream: Upstream, tmp_path: Path
) -> AsyncIterator[tuple[Gateway, int]]:
    async with running_workers(database, upstream.url, tmp_path) as workers:
        yield workers


async def test_two_hundred_at_once_spend_ten_credits_to_the_last_and_not_one_more(
    supervisor: tuple[Gateway, int], upstream: Upstream
) -> None:
    gateway, _ = supervisor
    user = await gateway.register(credits=10)
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"concurrency": None, "burst": None}}
    )
    seen: list[dict[str, Any]] = []

    async def watch() -> None:
        while True:
            seen.append(await user.balance())

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(user.chat(model="sandbox/fixed-price") for _ in range(200)))
    watching.cancel()
    await asyncio.wait([watching])
    assert Counter(answer.status_code for answer in answers) == {200: 20, 402: 180}
    assert seen and all(
        0 <= balance["held"] <= balance["credits"] and balance["available"] >= 0 for balance in seen
    )
    balance = await user.balance()
    assert (balance["credits"], balance["held"]) == (0, 0)
    assert upstream.sandbox.state.billed == Decimal(10) and upstream.inferences == 20
    records = await user.records()
    assert [(record["status"], record["cost"], record["overrun"]) for record in records] == [
        ("completed", 0.5, 0)
    ] * 20
    await gateway.database.assert_books_balance()


async def test_what_a_killed_worker_leaves_is_finished_by_one_sweep(
    supervisor: tuple[Gateway, int], upstream: Upstream
) -> None:
    gateway, pid = supervisor
    known, unknown = await gateway.register(credits=1), await gateway.register(credits=1)
    upstream.scenario = "slow;ms=50;tokens=390"
    first, _ = await start_stream(known)
    noted = await eventually(known.records, lambda value: value[0]["generation_id"] is not None)
    second, _ = await start_stream(unknown)  # killed before its generation id could be stored
    for worker in workers_of(pid):
        os.kill(worker, signal.SIGKILL)
    await asyncio.wait([first, second])
    upstream.scenario = ""

    async def still_running() -> int:
        return len(upstream.sandbox.state.in_flight)

    await eventually(still_running, lambda value: value == 0)
    await eventually(lambda: is_ready(gateway.http), lambda ready: ready, seconds=90)
    for user in (known, unknown):
        (record,) = await user.records()
        assert record["status"] == "pending" and (await user.balance())["held"] > 0
    await gateway.database.age_holds()
    swept = await gateway.admin("GET", "/internal/sweep")
    assert (swept["expired"], swept["resolved"]) == (2, 2)
    bill = next(
        call.cost for call in upstream.sandbox.state.calls if call.generation_id == noted[0]["generation_id"]
    )
    (record,) = await known.records()
    assert (record["status"], record["settlement_source"]) == ("cancelled", "generation")
    assert bill is not None and Decimal(str(record["cost"])) == bill > 0
    (record,) = await unknown.records()
    assert (record["status"], record["settlement_source"], record["cost"]) == ("expired", "none", 0)
    assert upstream.inferences == 2
    for user in (known, unknown):
        assert (await user.balance())["held"] == 0
    await gateway.database.assert_books_balance()
    swept = await gateway.admin("POST", "/internal/sweep")
    assert (swept["expired"], swept["resolved"]) == (0, 0)


async def test_a_revoked_key_is_dead_on_every_worker_with_the_next_request(
    supervisor: tuple[Gateway, int], upstream: Upstream
) -> None:
    gateway, _ = supervisor
    user = await gateway.register(credits=1)
    assert {answer.status_code for answer in await asyncio.gather(*(user.chat() for _ in range(20)))} == {200}
    async with gateway.database.owner() as owner:
        await owner.execute("update public.api_keys_new set is_active = false where user_id = $1", user.id)
    assert {answer.status_code for answer in await asyncio.gather(*(user.chat() for _ in range(20)))} == {401}
    assert upstream.inferences == 20


async def test_two_workers_enforce_one_limit_exactly(
    supervisor: tuple[Gateway, int], upstream: Upstream
) -> None:
    gateway, _ = supervisor
    user = await gateway.register(credits=1)
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"requests_per_minute": 17}}
    )
    answers = await asyncio.gather(*(user.chat() for _ in range(60)))
    assert Counter(answer.status_code for answer in answers) == {200: 17, 429: 43}
    assert upstream.inferences == 17
    assert all(
        0 < int(answer.headers["retry-after"]) <= 70 for answer in answers if answer.status_code == 429
    )


async def test_a_key_that_is_deleted_through_one_worker_is_dead_on_both(
    supervisor: tuple[Gateway, int], upstream: Upstream
) -> None:
    gateway, _ = supervisor
    user = await gateway.register(credits=1)
    made = (
        await gateway.http.post("/user/api-keys", headers=user.headers, json={"key_name": "second"})
    ).json()
    second = User(gateway, user.id, made["api_key"])
    assert {answer.status_code for answer in await asyncio.gather(*(second.chat() for _ in range(10)))} == {
        200
    }
    body = {"confirmation": "DELETE_KEY"}
    gone = await gateway.http.request(
        "DELETE", f"/user/api-keys/{made['key']['id']}", headers=user.headers, json=body
    )
    assert gone.status_code == 200
    assert {answer.status_code for answer in await asyncio.gather(*(second.chat() for _ in range(20)))} == {
        401
    }
    assert upstream.inferences == 10
