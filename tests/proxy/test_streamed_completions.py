"""Streams, as the official SDK reads them: events untouched, usage and charge at the end."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.support.gateway import Gateway, User, staged_gateway, staged_upstream
from tests.support.upstream import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")


upstream, live_gateway = staged_upstream, staged_gateway


MINI = "openai/gpt-4o-mini"
HI: Any = [{"role": "user", "content": "Hi"}]


async def stream(user: User, **changes: Any) -> list[ChatCompletionChunk]:
    body: dict[str, Any] = {"model": MINI, "messages": HI, "stream": True, **changes}
    return [chunk async for chunk in await user.sdk().chat.completions.create(**body)]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def charge_of(chunks: list[ChatCompletionChunk]) -> dict[str, Any]:
    """`gateway_usage`, which one event has, and no other."""
    (charge,) = [
        chunk.model_extra["gateway_usage"]
        for chunk in chunks
        if chunk.model_extra and "gateway_usage" in chunk.model_extra
    ]
    return dict(charge)


async def charged(user: User, upstream: Upstream) -> dict[str, Any]:
    (record,) = await user.records()
    assert record["streamed"] and record["status"] == "completed"
    assert Decimal(str(record["cost"])) == upstream.sandbox.state.billed > 0
    assert upstream.inferences == 1 and (await user.balance())["held"] == 0
    await user.gateway.database.assert_books_balance()
    return record


async def test_a_stream_ends_with_usage_and_what_was_charged(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    chunks = await stream(user, stream_options={"include_usage": True})
    record = await charged(user, upstream)
    last = chunks[-1]
    assert text_of(chunks) and last.usage is not None
    assert charge_of(chunks) == {
        "request_id": record["request_id"],
        "tokens_charged": last.usage.total_tokens,
        "cost": record["cost"],
        "user_balance_after": (await user.balance())["credits"],
    }
    assert record["time_to_first_token_ms"] is not None and record["finish_reason"] == "stop"


async def test_the_sdk_without_async_streams_the_same(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)

    def read() -> list[ChatCompletionChunk]:
        with openai.OpenAI(api_key=user.key, base_url=f"{live_gateway.url}/v1") as client:
            return list(client.chat.completions.create(model=MINI, messages=HI, stream=True))

    chunks = await asyncio.to_thread(read)
    assert charge_of(chunks)["cost"] == (await charged(user, upstream))["cost"]


@pytest.mark.parametrize(
    "scenario",
    [
        "usage-with-finish",
        "usage-empty-choices",
        "usage-null-finish",
        "usage-every-event",
        "usage-twice",
        "usage-missing",
    ],
)
async def test_every_shape_of_usage_ends_in_one_charge_at_the_end(
    live_gateway: Gateway, upstream: Upstream, scenario: str
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = scenario
    chunks = await stream(user)
    assert charge_of(chunks[-1:])["cost"] == (await charged(user, upstream))["cost"]


async def test_tool_calls_arrive_in_fragments(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "tool-call"
    chunks = await stream(user)
    fragments = [
        call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()
    ]
    arguments = "".join(call.function.arguments or "" for call in fragments if call.function)
    assert len(fragments) > 1 and isinstance(json.loads(arguments), dict)
    assert (await charged(user, upstream))["finish_reason"] == "tool_calls"


async def test_reasoning_streams_apart_from_the_answer(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "reasoning"
    chunks = await stream(user)
    thoughts = [chunk.choices[0].delta.model_extra for chunk in chunks if chunk.choices]
    assert [thought for thought in thoughts if thought and thought.get("reasoning")]
    assert [thought for thought in thoughts if thought and thought.get("reasoning_details")]
    assert text_of(chunks)
    await charged(user, upstream)


@pytest.mark.parametrize("scenario", ["keepalive", "comment-as-data", "crlf", "split-chunks", "gzip"])
async def test_oddities_of_the_wire_change_nothing_that_is_read(
    live_gateway: Gateway, upstream: Upstream, scenario: str
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = scenario
    response = await user.chat(stream=True)
    lines = response.text.splitlines()
    words = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(word["choices"][0]["delta"]["content"] or "" for word in words if word["choices"])
    assert lines.count("data: [DONE]") == 1
    assert (": OPENROUTER PROCESSING" in response.text) == (scenario != "no-comments")
    await charged(user, upstream)


async def test_all_but_the_last_event_pass_to_the_byte(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    response = await user.chat(stream=True)
    sent = upstream.sent()
    direct = await live_gateway.http.post(
        f"{upstream.url}/chat/completions", headers={"authorization": "Bearer x"}, json=sent
    )

    def events(text: str) -> list[str]:
        """Events without what differs between two answers: their ids and times."""
        found = []
        for event in text.split("\n\n"):
            if event.startswith("data: {"):
                data = json.loads(event[6:])
                event = event.replace(data["id"], "ID").replace(str(data["created"]), "TIME")
            found.append(event)
        return found

    ours, theirs = events(response.text), events(direct.text)
    assert len(ours) == len(theirs)
    assert ours[:-3] == theirs[:-3]
    assert ours[-3].startswith(theirs[-3][:-1] + ',"gateway_usage":{')
    assert ours[-2:] == theirs[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    "scenario", ["stream-error", "stream-error-string", "stream-error-empty", "error-first"]
)
async def test_an_error_in_mid_stream_reaches_the_sdk_and_the_books(
    live_gateway: Gateway, upstream: Upstream, scenario: str
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = scenario
    with pytest.raises(openai.APIError) as caught:
        await stream(user)
    assert caught.value.message
    record = await user.settled_record()
    assert record["status"] == "failed" and record["error_code"]
    assert Decimal(str(record["cost"])) == upstream.sandbox.state.billed
    assert upstream.inferences == 1
    await live_gateway.database.assert_books_balance()


async def test_a_refusal_before_a_stream_is_an_ordinary_error(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    upstream.scenario = "error-429"
    with pytest.raises(openai.RateLimitError):
        await stream(user)
    assert upstream.inferences == 1 and (await user.settled_record())["cost"] == 0


async def test_the_headers_of_a_stream_name_the_generation_and_no_charge_yet(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    response = await user.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-generation-id"] == (await charged(user, upstream))["generation_id"]
    assert not {"x-gateway-cost", "x-gateway-balance", "content-length"} & set(response.headers)
