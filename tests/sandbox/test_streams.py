"""Streams have the upstream's events, and every oddity that a scenario asks for."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx2
import openai
import pytest

from tests.support.sandbox_client import Client


def events(text: str) -> list[dict[str, Any]]:
    lines = text.replace("\r\n", "\n").split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(item) for item in data if item.startswith("{")]


def spoken(text: str) -> str:
    return "".join(
        choice["delta"].get("content") or "" for event in events(text) for choice in event.get("choices", [])
    )


async def test_the_openai_sdk_reads_a_stream(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="openai/gpt-4o-mini", messages=[{"role": "user", "content": "Say hi"}], stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "Say hi" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(chunks) - 2


async def test_a_stream_says_and_costs_what_the_whole_answer_does(client: Client) -> None:
    whole, stream = (await client.ask()).json(), await client.ask(stream=True)
    assert spoken(stream.text) == whole["choices"][0]["message"]["content"]
    assert events(stream.text)[-1]["usage"] == whole["usage"]
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.headers["x-generation-id"] == events(stream.text)[0]["id"]


async def test_the_three_usage_shapes_differ_in_their_choices(client: Client) -> None:
    last = {
        name: events((await client.ask(f"usage-{name}", stream=True)).text)[-1]
        for name in ("with-finish", "empty-choices", "null-finish")
    }
    assert last["with-finish"]["choices"][0]["finish_reason"] == "stop"
    assert last["empty-choices"]["choices"] == []
    assert last["null-finish"]["choices"][0]["finish_reason"] is None
    assert all(event["usage"]["cost"] > 0 for event in last.values())


async def test_usage_may_be_in_every_event_twice_or_nowhere(client: Client) -> None:
    every = events((await client.ask("usage-every-event", stream=True)).text)
    twice = events((await client.ask("usage-twice", stream=True)).text)
    missing = (await client.ask("usage-missing-no-done", stream=True)).text
    assert [event["usage"]["completion_tokens"] for event in every][:3] == [1, 2, 3]
    assert twice[-1]["usage"] == twice[-2]["usage"]
    assert "usage" not in missing and "[DONE]" not in missing


async def test_an_ordinary_stream_ends_with_done(client: Client) -> None:
    assert (await client.ask(stream=True)).text.endswith("data: [DONE]\n\n")
    assert "[DONE]" not in (await client.ask("no-done", stream=True)).text


async def test_comments_come_before_and_between_events(client: Client) -> None:
    text = (await client.ask("keepalive", stream=True)).text
    assert text.startswith(": OPENROUTER PROCESSING\n\n" * 3)
    assert text.count(": OPENROUTER PROCESSING") > len(events(text))
    assert (await client.ask("comment-as-data", stream=True)).text.startswith(
        "data: : OPENROUTER PROCESSING\n\n"
    )


async def test_crlf_ends_every_line(client: Client) -> None:
    text = (await client.ask("crlf", stream=True)).text
    assert text.count("\n") == text.count("\r\n") > 10


async def test_characters_and_json_are_split_over_pieces(client: Client) -> None:
    message: dict[str, Any] = {
        "messages": [{"role": "user", "content": "漢" * 40}]
    }  # pieces of 7 bytes cut characters of 3 wherever they begin
    response = await client.open_stream("split-chunks", **message)
    pieces = [piece async for piece in response.aiter_raw()]
    assert max(map(len, pieces)) == 7
    assert any(piece.decode(errors="ignore").encode() != piece for piece in pieces)
    assert spoken(b"".join(pieces).decode()) == spoken((await client.ask(stream=True, **message)).text)


async def test_tool_calls_come_in_fragments(client: Client) -> None:
    stream = events((await client.ask("tool-call", stream=True)).text)
    deltas = [event["choices"][0]["delta"] for event in stream]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"]["name"] == "lookup_weather" and calls[0]["id"]
    assert all(set(call) == {"index", "function"} for call in calls[1:])
    assert json.loads("".join(call["function"]["arguments"] for call in calls)).keys() == {"city"}
    assert stream[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_reasoning_comes_before_the_answer(client: Client) -> None:
    deltas = [
        event["choices"][0]["delta"] for event in events((await client.ask("reasoning", stream=True)).text)
    ]
    kinds = ["reasoning" in delta for delta in deltas]
    assert kinds == sorted(kinds, reverse=True) and kinds[0]
    assert deltas[0]["reasoning_details"][0]["type"] == "reasoning.text"


@pytest.mark.parametrize(
    ("scenario", "code", "choices"),
    [("stream-error", 429, 1), ("stream-error-string", "server_error", 1), ("stream-error-empty", 502, 0)],
)
async def test_an_error_in_mid_stream_ends_it(
    client: Client, scenario: str, code: object, choices: int
) -> None:
    stream = events((await client.ask(f"{scenario};count=3", stream=True)).text)
    assert len(stream) == 4
    assert stream[-1]["error"]["code"] == code
    assert len(stream[-1]["choices"]) == choices


async def test_an_error_may_be_the_first_event_and_costs_nothing(client: Client) -> None:
    response = await client.ask("error-first", stream=True)
    stream = events(response.text)
    assert len(stream) == 1 and "error" in stream[0]
    generation = await client.look_up(response.headers["x-generation-id"])
    assert generation.json()["data"]["total_cost"] == 0


async def test_the_openai_sdk_raises_on_an_error_in_mid_stream(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="openai/gpt-4o-mini:stream-error", messages=[{"role": "user", "content": "x"}], stream=True
    )
    with pytest.raises(openai.APIError, match="Rate limit exceeded"):
        [chunk async for chunk in stream]


@pytest.mark.parametrize("stream", [True, False])
async def test_gzip_comes_even_when_identity_is_asked_for(client: Client, stream: bool) -> None:
    request = client.request("gzip", stream=stream)
    request.headers["accept-encoding"] = "identity"
    response = await client.http.send(request, stream=True)
    raw = b"".join([piece async for piece in response.aiter_raw()])
    assert response.headers["content-encoding"] == "gzip"
    assert b"usage" in gzip.decompress(raw)


async def test_even_a_short_stream_is_cut_before_its_end(client: Client) -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        await client.ask("cut;count=1000", stream=True, max_tokens=1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cut_connection_is_a_protocol_error(client: Client, stream: bool) -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        await client.ask("cut;count=2", stream=stream)


async def test_the_first_token_may_be_late(client: Client) -> None:
    response = await client.open_stream("slow-first-token;seconds=0.05")
    pieces = [piece async for piece in response.aiter_raw()]
    assert pieces[0] == b": OPENROUTER PROCESSING\n\n" and len(pieces) > 5


async def test_a_hidden_thought_is_counted_with_the_next_event(client: Client) -> None:
    body = {
        "model": "anthropic/claude-haiku-4.5",
        "reasoning": {"effort": "low", "exclude": True},
        "stream": True,
    }
    stream = events((await client.ask("usage-every-event", **body)).text)
    assert stream[0]["usage"]["completion_tokens"] == 13
    assert stream[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12
