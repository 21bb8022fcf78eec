"""When prices rise between the hold and the answer, the model list is read again, the hold is raised, and the
request is sent once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from typing import Any

import httpx
import orjson
import pytest

from common.errors import UpstreamUnavailable
from gateway.pricing.catalog import Catalog, read_models
from gateway.pricing.upper_bound import BoundPolicy, bound_request
from sandbox.wire import dumps
from tests.support.gateway import Gateway, User, live
from tests.support.servers import eventually
from tests.support.upstream import GENERATION, MODELS, TEXT, Reply, Scripted, running_script

Start = Callable[..., Awaitable[Gateway]]
REFUSAL = {
    "error": {
        "message": "No endpoints",
        "http_status": 404,
        "availability": {"code": "constraint_filtered", "excluded_by": ["max_price"]},
    }
}
REFUSED = Reply([orjson.dumps(REFUSAL)], status=404, headers={"x-generation-id": "gen-0-refused"})
SAID = {
    "id": GENERATION,
    "model": TEXT,
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "cost": 0.0000123},
}
ANSWERED = Reply([orjson.dumps(SAID)])


@pytest.fixture
async def upstream() -> AsyncIterator[Scripted]:
    async with running_script() as scripted:
        yield scripted


@pytest.fixture
async def gateway(start_gateway: Start, upstream: Scripted) -> Gateway:
    return await start_gateway(**live(upstream.url))


async def warm(gateway: Gateway, upstream: Scripted, credits: str = "1") -> User:
    """A user, after a first request that made the gateway read the prices."""
    upstream.say(ANSWERED)
    assert (await (await gateway.register(credits=1)).chat(model=TEXT, max_tokens=50)).status_code == 200
    return await gateway.register(credits=credits)


async def ended(user: User, response: httpx.Response, status: int) -> dict[str, Any]:
    """The only record; nothing is held any more and the books are in order."""
    assert response.status_code == status, response.text
    record = await user.settled_record()
    assert record["request_id"] == response.headers["x-request-id"]
    assert (await user.balance())["held"] == 0
    await user.gateway.database.assert_books_balance()
    return record


async def arrived(upstream: Scripted, count: int) -> None:
    """Waits until the upstream has been asked so often."""

    async def sent() -> int:
        return len(upstream.sent)

    await eventually(sent, lambda value: value == count)


def prices(upstream: Scripted) -> list[Decimal]:
    """The price of the prompt that each request was allowed to cost, in dollars per million tokens."""
    return [Decimal(sent.fields["provider"]["max_price"]["prompt"]) for sent in upstream.sent]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_raised_price_raises_the_hold_and_the_client_gets_the_answer(
    gateway: Gateway, upstream: Scripted, streamed: bool
) -> None:
    user = await warm(gateway, upstream)
    event = b"data: " + orjson.dumps(SAID) + b"\n\ndata: [DONE]\n\n"
    upstream.say(REFUSED, Reply([event], content_type="text/event-stream") if streamed else ANSWERED)
    upstream.factor = Decimal(3)
    response = await user.chat(model=TEXT, max_tokens=50, stream=streamed)
    record = await ended(user, response, 200)
    assert (record["status"], record["generation_id"], Decimal(str(record["cost"]))) == (
        "completed",
        GENERATION,
        Decimal("0.0000123"),
    )
    assert '"cost":0.0000123' in response.text and response.headers["x-generation-id"] == GENERATION
    assert prices(upstream) == [1, 3] and upstream.lists == 1


async def test_the_raised_hold_is_what_the_dearer_bound_takes(gateway: Gateway, upstream: Scripted) -> None:
    user = await warm(gateway, upstream)
    held = []
    for replies in ([], [REFUSED]):
        rest = asyncio.Event()
        upstream.say(*replies, Reply([rest, *ANSWERED.pieces]))
        chat = asyncio.create_task(user.chat(model=TEXT, max_tokens=50))
        await arrived(upstream, len(replies) + 1)
        held.append(Decimal(str((await user.balance())["held"])))
        rest.set()
        assert (await chat).status_code == 200 and (await user.balance())["held"] == 0
        upstream.factor = Decimal(3)
    assert held[1] == 3 * held[0] > 0


async def test_a_dearer_hold_that_credits_do_not_cover_is_a_402(gateway: Gateway, upstream: Scripted) -> None:
    user = await warm(gateway, upstream, credits="0.001")
    upstream.say(REFUSED, ANSWERED)
    upstream.factor = Decimal(100)
    response = await user.chat(model=TEXT, max_tokens=50)
    record = await ended(user, response, 402)
    assert response.json()["error"]["code"] == "insufficient_credits"
    assert (record["status"], record["cost"], record["error_code"]) == ("failed", 0, "insufficient_credits")
    assert len(upstream.sent) == 1


async def test_prices_that_have_not_changed_are_not_asked_for_twice(
    gateway: Gateway, upstream: Scripted
) -> None:
    user = await warm(gateway, upstream)
    upstream.say(REFUSED)
    response = await user.chat(model=TEXT, max_tokens=50)
    record = await ended(user, response, 503)
    assert (response.json()["error"]["code"], record["error_code"], record["cost"]) == (
        "price_changed",
        "price_changed",
        0,
    )
    assert len(upstream.sent) == 1 and response.headers["retry-after"] == "5"


async def test_a_second_refusal_ends_it(gateway: Gateway, upstream: Scripted) -> None:
    user = await warm(gateway, upstream)
    upstream.say(REFUSED)
    upstream.factor = Decimal(3)
    response = await user.chat(model=TEXT, max_tokens=50)
    record = await ended(user, response, 503)
    assert (record["error_code"], record["cost"]) == ("price_changed", 0) and len(upstream.sent) == 2


async def test_a_client_s_own_price_limit_is_kept_and_no_list_is_read(
    gateway: Gateway, upstream: Scripted
) -> None:
    user = await warm(gateway, upstream)
    upstream.say(REFUSED)
    upstream.factor = Decimal(3)
    for limit in (0.0001, "0.5", 1):
        response = await user.chat(model=TEXT, max_tokens=50, provider={"max_price": {"prompt": limit}})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "upstream_refused"), (
            response.text
        )
    assert len(upstream.sent) == 3 and upstream.lists == 0
    assert {record["status"] for record in await user.records()} == {"failed"} and (await user.balance())[
        "credits"
    ] == 1


async def test_a_client_s_limit_above_the_price_prevents_nothing(
    gateway: Gateway, upstream: Scripted
) -> None:
    user = await warm(gateway, upstream)
    upstream.say(REFUSED, ANSWERED)
    upstream.factor = Decimal(3)
    response = await user.chat(model=TEXT, max_tokens=50, provider={"max_price": {"prompt": 2}})
    await ended(user, response, 200)
    assert prices(upstream) == [1, 2]


async def test_a_crowd_that_meets_a_new_price_reads_the_list_once(
    gateway: Gateway, upstream: Scripted
) -> None:
    user = await warm(gateway, upstream)
    upstream.say(REFUSED)
    answers = await asyncio.gather(*(user.chat(model=TEXT, max_tokens=50) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {503} and upstream.lists == 1


async def test_a_client_who_has_left_is_sent_nothing_more_for(gateway: Gateway, upstream: Scripted) -> None:
    user = await warm(gateway, upstream)
    rest = asyncio.Event()
    upstream.say(Reply([rest, *REFUSED.pieces], status=404), ANSWERED)
    upstream.factor = Decimal(3)
    chat = asyncio.create_task(user.chat(model=TEXT, max_tokens=50))
    await arrived(upstream, 1)
    chat.cancel()
    await asyncio.wait({chat})
    for _ in range(2):  # round trips over the same event loop: by then the server has noticed
        await gateway.http.get("/health/live")
    rest.set()
    record = await user.settled_record()
    assert (record["status"], record["cost"]) == ("cancelled", 0) and len(upstream.sent) == 1


@pytest.mark.parametrize(
    ("own", "is_own"),
    [
        (None, False),
        ({}, False),
        ({"prompt": None}, False),
        ({"prompt": 2}, False),
        ({"prompt": "1.0"}, True),
        ({"prompt": 0.1}, True),
        ({"prompt": 2, "completion": "1e-3"}, True),
        ({"audio": 1}, True),
    ],
)
def test_a_limit_is_the_client_s_own_where_it_is_what_was_sent(own: Any, is_own: bool) -> None:
    fields: dict[str, Any] = {
        "model": TEXT,
        "messages": [{"role": "user", "content": "Hi"}],
        "provider": {"max_price": own},
    }
    bound = bound_request(
        "chat/completions",
        fields,
        100,
        read_models(dumps({"data": [*MODELS]})),
        BoundPolicy(100, free_models=False),
    )
    assert bound.client_caps_price is is_own


# The list itself.


async def test_the_list_is_read_on_demand_no_more_often_than_allowed() -> None:
    now, fetched = 1000.0, 0

    async def fetch() -> bytes:
        nonlocal fetched
        fetched += 1
        if fetched == 3:
            raise UpstreamUnavailable()
        return dumps({"data": [{"id": "a/b", "pricing": {"prompt": "1", "completion": "1"}}]})

    catalog = Catalog(fetch, ttl_seconds=300, clock=lambda: now)
    await catalog.models()
    assert fetched == 1
    await asyncio.gather(*(catalog.refresh_within(30) for _ in range(5)))
    assert fetched == 2
    now += 29
    await catalog.refresh_within(30)
    assert fetched == 2
    now += 2
    with pytest.raises(UpstreamUnavailable):
        await catalog.refresh_within(30)
    assert fetched == 3
    await catalog.refresh_within(30)
    assert fetched == 3  # what failed is not tried again at once either
