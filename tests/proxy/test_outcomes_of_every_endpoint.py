"""Every billable endpoint with every ending: one record, nothing held, and the charge is the upstream's bill.

Here is the whole table; test_outcomes, test_faults and test_processes look at single endings in detail.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from gateway.proxy.endpoints import ENDPOINTS
from sandbox.state import Call
from tests.support.database import Database
from tests.support.database_link import DatabaseLink, staged_link
from tests.support.gateway import (
    Gateway,
    User,
    live,
    running_gateway,
    staged_gateway,
    staged_start,
    staged_upstream,
)
from tests.support.kinds import KINDS, Kind
from tests.support.servers import eventually, is_ready
from tests.support.upstream import Upstream
from tests.support.workers import running_workers, workers_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

Start = Callable[..., Awaitable[Gateway]]
STREAMS = [kind for kind in KINDS if kind.streams]
PAIRS = [(kind, streamed) for kind in KINDS for streamed in ((False, True) if kind.streams else (False,))]
SHAPES = [
    pytest.param(kind, streamed, id=f"{kind.path}{'-streamed' if streamed else ''}")
    for kind, streamed in PAIRS
]
STREAMED = [pytest.param(kind, id=kind.path) for kind in STREAMS]
DEADLINE_SECONDS = 0.8


async def test_the_table_has_every_billable_endpoint() -> None:
    assert {kind.path for kind in KINDS} == {
        path for endpoint in ENDPOINTS for path in (endpoint.name, *endpoint.paths)
    }


upstream = staged_upstream
live_gateway = staged_gateway
start_gateway = staged_start
link = staged_link


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def impatient(
    stage: tuple[Gateway, Upstream], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """A second gateway on the same database, whose requests end soon."""
    first, upstream = stage
    settings = {
        "request_deadline_seconds": DEADLINE_SECONDS,
        "gateway_data_dir": tmp_path_factory.mktemp("impatient"),
        **live(upstream.url),
    }
    async with running_gateway(first.database, **settings) as gateway:
        gateway._users = first._users
        yield gateway


def body_of(kind: Kind, *, streamed: bool) -> dict[str, Any]:
    body = kind.body(random.Random(kind.path))
    return {**body, "stream": True} if streamed else body


async def post(user: User, kind: Kind, *, streamed: bool) -> httpx.Response:
    content = kind.content(body_of(kind, streamed=streamed))
    return await user.gateway.http.post(kind.url, headers=user.headers, **content)


def calls(upstream: Upstream, kind: Kind) -> list[Call]:
    return [call for call in upstream.sandbox.state.calls if call.path == kind.upstream_path]


async def asked(upstream: Upstream, kind: Kind) -> None:
    async def count() -> int:
        return len(calls(upstream, kind))

    await eventually(count, lambda value: value == 1)


async def settled(user: User, upstream: Upstream, kind: Kind) -> dict[str, Any]:
    """One call has one record, charged what the upstream billed; nothing is held, and the books balance."""
    record = await user.settled_record()
    (call,) = calls(upstream, kind)
    bill = (call.cost or Decimal(0)).quantize(Decimal("1e-9"), ROUND_CEILING)
    assert Decimal(str(record["cost"])) == bill, record
    assert record["overrun"] == 0
    assert record["endpoint"] == (kind.asks or kind.path)
    assert (await user.balance())["held"] == 0
    await user.gateway.database.assert_books_balance()
    return record


@pytest.mark.parametrize(("kind", "streamed"), SHAPES)
async def test_an_ordinary_end(live_gateway: Gateway, upstream: Upstream, kind: Kind, streamed: bool) -> None:
    user = await live_gateway.register(credits=100)
    response = await post(user, kind, streamed=streamed)
    assert response.status_code == 200, response.text
    record = await settled(user, upstream, kind)
    assert record["status"] == "completed" and record["cost"] > 0
    assert record["streamed"] is streamed


@pytest.mark.parametrize(("kind", "streamed"), SHAPES)
@pytest.mark.parametrize(
    ("scenario", "status"), [("error-429", 429), ("error-500", 502), ("error-503", 503), ("error-402", 503)]
)
async def test_an_error_of_the_upstream_before_the_answer(
    live_gateway: Gateway, upstream: Upstream, kind: Kind, streamed: bool, scenario: str, status: int
) -> None:
    user = await live_gateway.register(credits=100)
    upstream.scenario = scenario
    response = await post(user, kind, streamed=streamed)
    assert response.status_code == status, response.text
    record = await settled(user, upstream, kind)
    assert (record["status"], record["cost"]) == ("failed", 0)


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("scenario", ["stream-error;count=2", "cut;count=3"])
async def test_an_error_of_the_upstream_in_mid_stream(
    live_gateway: Gateway, upstream: Upstream, kind: Kind, scenario: str
) -> None:
    user = await live_gateway.register(credits=100)
    upstream.scenario = scenario
    response = await post(user, kind, streamed=True)
    assert response.status_code == 200 and "error" in response.text
    record = await settled(user, upstream, kind)
    assert record["status"] == "failed"


@pytest.mark.parametrize(("kind", "streamed"), SHAPES)
async def test_a_client_gone_before_the_first_byte(
    live_gateway: Gateway, upstream: Upstream, kind: Kind, streamed: bool
) -> None:
    user = await live_gateway.register(credits=100)
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(post(user, kind, streamed=streamed))
    await asked(upstream, kind)
    waiting.cancel()
    record = await settled(user, upstream, kind)
    assert record["status"] == "cancelled"


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("scenario", ["slow;ms=10;tokens=60", "abort;ms=10;tokens=60;times=1"])
async def test_a_client_gone_in_mid_stream(
    live_gateway: Gateway, upstream: Upstream, kind: Kind, scenario: str
) -> None:
    user = await live_gateway.register(credits=100)
    upstream.scenario = scenario
    content = kind.content(body_of(kind, streamed=True))
    async with user.gateway.http.stream("POST", kind.url, headers=user.headers, **content) as response:
        lines = response.aiter_lines()
        for _ in range(3):
            while not (await anext(lines)).startswith("data: "):
                pass
    record = await settled(user, upstream, kind)
    assert record["status"] == "cancelled"


@pytest.mark.parametrize(("kind", "streamed"), SHAPES)
async def test_an_upstream_that_hangs(
    impatient: Gateway, upstream: Upstream, kind: Kind, streamed: bool
) -> None:
    """Neither usage nor an id is known: whatever the upstream bills is the operator's loss, and the record is
    listed as such.
    """
    user = await impatient.register(credits=100)
    upstream.scenario = "hang"
    response = await post(user, kind, streamed=streamed)
    assert response.status_code == 504, response.text
    record = await user.settled_record()
    assert (record["status"], record["settlement_source"], record["cost"]) == ("failed", "none", 0)
    assert len(calls(upstream, kind)) == 1 and (await user.balance())["held"] == 0
    await user.gateway.database.assert_books_balance()


@pytest.mark.parametrize("kind", STREAMED)
async def test_an_upstream_that_hangs_in_mid_stream(
    impatient: Gateway, upstream: Upstream, kind: Kind
) -> None:
    user = await impatient.register(credits=100)
    upstream.scenario = "stall;count=3"
    response = await post(user, kind, streamed=True)
    assert response.status_code == 200 and "timeout" in response.text
    record = await settled(user, upstream, kind)
    assert record["status"] == "failed"


@pytest.mark.parametrize(("kind", "streamed"), SHAPES)
async def test_a_database_gone_at_settlement(
    start_gateway: Start, link: DatabaseLink, upstream: Upstream, kind: Kind, streamed: bool
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    user = await gateway.register(credits=100)
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(post(user, kind, streamed=streamed))
    await asked(upstream, kind)
    link.cut()
    answer = await waiting
    assert answer.status_code == 200, answer.text
    if kind.tells:
        assert (
            answer.headers.get("x-gateway-settlement") == "pending" or '"settlement":"pending"' in answer.text
        )
    link.mend()
    record = await settled(user, upstream, kind)
    assert record["status"] == "completed" and record["cost"] > 0


async def test_a_process_killed_under_every_kind_of_request(
    database: Database, upstream: Upstream, tmp_path: Path
) -> None:
    """Where the generation's id was stored, the charge is what the upstream says; where none was known yet,
    nothing, and it is listed.
    """
    async with running_workers(database, upstream.url, tmp_path) as (gateway, pid):
        upstream.scenario = "slow-first-token;seconds=12"
        waiting = []
        for kind, streamed in PAIRS:
            user = await gateway.register(credits=100)
            waiting.append(asyncio.create_task(post(user, kind, streamed=streamed)))

        async def arrived() -> int:
            return sum(upstream.sandbox.state.counts[path] for path in {kind.upstream_path for kind in KINDS})

        await eventually(arrived, lambda value: value == len(waiting), seconds=30)
        known = "select count(*) from public.usage_records where generation_id is not null"
        await eventually(lambda: database.value(known), lambda value: value >= len(STREAMS), seconds=10)
        for worker in workers_of(pid):
            os.kill(worker, signal.SIGKILL)
        await asyncio.wait(waiting)

        async def running() -> int:
            return len(upstream.sandbox.state.in_flight)

        await eventually(running, lambda value: value == 0, seconds=60)
        upstream.scenario = ""
        await eventually(lambda: is_ready(gateway.http), lambda ready: ready, seconds=90)
        await database.age_holds()
        await gateway.admin("POST", "/internal/sweep")  # unless the workers' own loop came before
    bills = {call.generation_id: call.cost for call in upstream.sandbox.state.calls if call.generation_id}
    records = await database.rows(
        "select endpoint, status, settlement_source, generation_id, cost_nanos from public.usage_records"
    )
    assert len(records) == len(waiting)
    for record in records:
        is_known = record["generation_id"] is not None
        ending = ("cancelled", "generation") if is_known else ("expired", "none")
        assert (record["status"], record["settlement_source"]) == ending, record
        bill = (bills[record["generation_id"]] if is_known else None) or Decimal(0)
        assert Decimal(record["cost_nanos"]) == bill.scaleb(9).to_integral_value(ROUND_CEILING), record
    assert await database.value("select sum(held_nanos) from public.users") == 0
    await database.assert_books_balance()
