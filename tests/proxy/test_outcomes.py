"""A request that does not end well leaves one record, no hold, and the right charge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

import app as application
from config import Configuration
from sandbox.state import Call
from tests.support.database import Database
from tests.support.gateway import (
    Gateway,
    User,
    live,
    settings_for,
    staged_gateway,
    staged_start,
    staged_upstream,
)
from tests.support.servers import eventually, served
from tests.support.upstream import Upstream

Start = Callable[..., Awaitable[Gateway]]


pytestmark = pytest.mark.asyncio(loop_scope="module")


upstream, live_gateway, start_gateway = staged_upstream, staged_gateway, staged_start


def body(**changes: Any) -> dict[str, Any]:
    return {
        "model": "openai/gpt-4o-mini",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 400,
        **changes,
    }


Lines = AsyncIterator[str]


@asynccontextmanager
async def streaming(user: User, **changes: Any) -> AsyncIterator[Lines]:
    """The lines of a stream whose client leaves at the end of the block."""
    async with user.gateway.http.stream(
        "POST", "/v1/chat/completions", headers=user.headers, json=body(stream=True, **changes)
    ) as response:
        assert response.status_code == 200
        yield response.aiter_lines()


async def read_events(lines: Lines, count: int) -> None:
    """Reads that many data events, and leaves the rest where it is."""
    while count:
        count -= (await anext(lines)).startswith("data: {")


def completion(upstream: Upstream) -> Call:
    (call,) = [call for call in upstream.sandbox.state.calls if call.path == "/chat/completions"]
    return call


async def asked(upstream: Upstream) -> Call:
    """The one completion, once it has arrived upstream."""

    async def count() -> int:
        return upstream.inferences

    await eventually(count, lambda value: value == 1)
    return completion(upstream)


async def settled(user: User, upstream: Upstream) -> dict[str, Any]:
    """The one record, charged what the upstream billed for its one call; nothing held."""
    record = await user.settled_record()
    assert upstream.inferences == 1
    assert Decimal(str(record["cost"])) == upstream.sandbox.state.billed
    assert (await user.balance())["held"] == 0
    await user.gateway.database.assert_books_balance()
    return record


async def let_the_server_notice(user: User) -> None:
    """Two more round trips over the same event loop: what has happened to a connection is known by then."""
    for _ in range(2):
        await user.gateway.http.get("/health/live")


# The client leaves.


async def test_a_client_that_leaves_in_mid_stream_stops_the_bill_where_the_provider_does(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "abort;ms=20;tokens=300"
    async with streaming(user) as lines:
        await read_events(lines, 4)
    record = await settled(user, upstream)
    assert completion(upstream).cancelled
    assert (record["status"], record["settlement_source"]) == ("cancelled", "generation")
    assert 0 < record["completion_tokens"] < 100
    assert record["cost"] > 0


async def test_a_client_that_leaves_a_silent_stream_is_noticed_at_once(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "stall;count=3"
    async with streaming(user) as lines:
        await read_events(lines, 3)
    record = await settled(user, upstream)
    assert completion(upstream).cancelled and record["status"] == "cancelled"


async def test_a_provider_that_bills_the_whole_answer_anyway_is_heard_to_its_end(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "slow;ms=10;tokens=30"
    async with streaming(user, model="google/gemini-2.5-flash") as lines:
        await read_events(lines, 3)
    record = await settled(user, upstream)
    assert not completion(upstream).cancelled
    assert (record["status"], record["settlement_source"], record["completion_tokens"]) == (
        "cancelled",
        "usage",
        30,
    )


async def test_a_client_that_leaves_before_the_first_token_is_charged_what_was_written(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "slow-first-token;seconds=0.3,slow;ms=20;tokens=100"
    async with streaming(user):
        await asked(upstream)
    record = await settled(user, upstream)
    assert completion(upstream).cancelled and record["status"] == "cancelled"
    assert record["completion_tokens"] < 50


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_a_client_that_leaves_before_the_answer_begins_is_charged_in_full(
    live_gateway: Gateway, upstream: Upstream, streamed: bool
) -> None:
    """No provider is known yet whose bill an abort would stop; a plain answer is always billed whole."""
    user = await live_gateway.register(credits=1)
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(user.chat(stream=streamed, model="google/gemini-2.5-flash"))
    await asked(upstream)
    waiting.cancel()
    record = await settled(user, upstream)
    assert (record["status"], record["settlement_source"]) == ("cancelled", "usage")
    assert record["cost"] > 0


async def test_a_client_that_leaves_during_admission_has_nothing_sent_and_nothing_charged(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    database = live_gateway.database
    user = await live_gateway.register(credits=1)
    assert (await user.chat()).status_code == 200
    upstream.sandbox.state.reset()
    async with database.owner() as owner:
        await owner.execute("begin")
        await owner.fetch("select id from public.users where id = $1 for update", user.id)
        waiting = asyncio.create_task(user.chat())

        async def lock_waiters() -> Any:
            return await database.value(
                "select count(*) from pg_stat_activity where datname = current_database() "
                "and wait_event_type = 'Lock'"
            )

        await eventually(lock_waiters, lambda value: value == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await let_the_server_notice(user)
        await owner.execute("commit")
    records = await eventually(
        user.records, lambda value: len(value) == 2 and value[0]["status"] != "pending"
    )
    assert (records[0]["status"], records[0]["cost"]) == ("cancelled", 0)
    assert upstream.inferences == 0
    assert (await user.balance())["held"] == 0
    await database.assert_books_balance()


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_no_trace(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    host, port = live_gateway.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
        f"{user.key}\r\ncontent-length: 1000\r\n\r\n"
    )
    writer.write(head.encode() + b'{"model":')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await let_the_server_notice(user)
    assert await user.records() == [] and upstream.inferences == 0


# Time runs out.


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_a_deadline_ends_an_upstream_that_says_nothing(
    start_gateway: Start, upstream: Upstream, streamed: bool
) -> None:
    """Neither usage nor an id is known: the charge is zero, and the record is listed as such."""
    gateway = await start_gateway(request_deadline_seconds=0.5, **live(upstream.url))
    user = await gateway.register(credits=1)
    upstream.scenario = "hang"
    response = await user.chat(stream=streamed)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "upstream_timeout"
    record = await user.settled_record()
    assert (record["status"], record["settlement_source"], record["cost"]) == ("failed", "none", 0)
    assert upstream.inferences == 1
    assert (await user.balance())["held"] == 0
    await gateway.database.assert_books_balance()


@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "google/gemini-2.5-flash"])
async def test_a_deadline_in_mid_stream_is_said_in_the_stream_and_charged_exactly(
    start_gateway: Start, upstream: Upstream, model: str
) -> None:
    gateway = await start_gateway(request_deadline_seconds=0.5, **live(upstream.url))
    user = await gateway.register(credits=1)
    upstream.scenario = "stall;count=4"
    response = await user.chat(stream=True, model=model)
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    usage, error, done = lines[-3:]
    assert done == "data: [DONE]"
    assert orjson.loads(error[6:])["error"]["code"] == "upstream_timeout"
    record = await settled(user, upstream)
    assert record["status"] == "failed" and record["settlement_source"] == "generation"
    assert Decimal(str(orjson.loads(usage[6:])["gateway_usage"]["cost"])) == Decimal(str(record["cost"])) > 0


async def test_a_deadline_also_ends_a_request_whose_client_has_left(
    start_gateway: Start, upstream: Upstream
) -> None:
    gateway = await start_gateway(request_deadline_seconds=0.5, **live(upstream.url))
    user = await gateway.register(credits=1)
    upstream.scenario = "stall;count=3"
    async with streaming(user, model="google/gemini-2.5-flash") as lines:
        await read_events(lines, 3)
    record = await settled(user, upstream)
    assert record["status"] == "cancelled"


# The server stops.


async def test_a_shutdown_in_mid_stream_settles_what_was_written(
    database: Database, upstream: Upstream, tmp_path: Path
) -> None:
    settings = settings_for(database, gateway_data_dir=tmp_path, **live(upstream.url))
    async with AsyncExitStack() as stack, httpx.AsyncClient(timeout=30) as http:
        app = application.create_app(Configuration(settings, ()))
        async with served(app, grace=1) as url:
            http.base_url = httpx.URL(url)
            user = await Gateway(url, app, database, http, stack).register(credits=1)
            upstream.scenario = "slow;ms=50;tokens=390"
            request = http.build_request(
                "POST", "/v1/chat/completions", headers=user.headers, json=body(stream=True)
            )
            response = await http.send(request, stream=True)
            await read_events(lines := response.aiter_lines(), 2)
        await response.aclose()
        assert lines
    (record,) = await database.rows("select status, cost_nanos, hold_nanos from public.usage_records")
    assert record["status"] == "cancelled"
    assert Decimal(record["cost_nanos"]) == upstream.sandbox.state.billed.scaleb(9) > 0
    assert upstream.inferences == 1 and completion(upstream).cancelled
    assert await database.value("select sum(held_nanos) from public.users") == 0
    await database.assert_books_balance()


def running_requests() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("request ")]


async def test_a_cancelled_request_is_settled_all_the_same(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "slow;ms=20;tokens=300"
    async with streaming(user) as lines:
        await read_events(lines, 3)
        running_requests()[0].cancel()
        with pytest.raises(httpx.HTTPError):
            await read_events(lines, 300)
    record = await settled(user, upstream)
    assert record["status"] == "failed" and record["cost"] > 0


async def test_a_request_cancelled_while_it_is_being_settled_is_settled_all_the_same(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "usage-missing,generation-late;times=3"
    waiting = asyncio.create_task(user.chat())

    async def lookups() -> int:
        return upstream.sandbox.state.counts["/generation"]

    await eventually(lookups, lambda value: value == 1)
    running_requests()[0].cancel()
    await asyncio.wait([waiting])
    record = await settled(user, upstream)
    assert record["settlement_source"] == "generation" and record["cost"] > 0


async def test_a_stream_of_two_seconds_can_be_finished_by_any_instance(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "slow;ms=100;tokens=390"
    async with streaming(user) as lines:
        await read_events(lines, 2)
        records = await eventually(user.records, lambda value: value[0]["generation_id"] is not None)
        assert records[0]["status"] == "pending"
        assert records[0]["generation_id"] == completion(upstream).generation_id
    assert (await settled(user, upstream))["status"] == "cancelled"


async def test_many_that_leave_at_any_time_are_charged_together_what_the_upstream_billed(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    await live_gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"concurrency": None, "burst": None}}
    )
    upstream.scenario = "slow;ms=5;tokens=40"
    models = ("openai/gpt-4o-mini", "google/gemini-2.5-flash", "meta-llama/llama-3.3-70b-instruct")

    async def leave(number: int) -> None:
        async with streaming(user, model=models[number % 3]) as lines:
            await read_events(lines, number % 13)

    await asyncio.gather(*(leave(number) for number in range(40)))

    async def running() -> int:
        pending = [record for record in await user.records() if record["status"] == "pending"]
        return len(pending) + len(upstream.sandbox.state.in_flight)

    await eventually(running, lambda value: value == 0)
    records = await user.records()
    assert len(records) == upstream.inferences == 40
    assert {record["status"] for record in records} == {"cancelled"}
    assert sum(Decimal(str(record["cost"])) for record in records) == upstream.sandbox.state.billed > 0
    balance = await user.balance()
    assert balance["held"] == 0 and Decimal(str(balance["credits"])) == 1 - upstream.sandbox.state.billed
    await live_gateway.database.assert_books_balance()
