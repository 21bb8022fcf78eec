"""`/messages` speaks Anthropic's protocol and says what it costs."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from sandbox.models.text_models import BY_ID
from tests.support.sandbox_client import Client

HAIKU = "anthropic/claude-haiku-4.5"
TOOL = {
    "name": "get_weather",
    "description": "Weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


async def ask(client: Client, scenario: str = "ordinary", **body: Any) -> httpx2.Response:
    return await client.http.send(
        client.request(scenario, "/messages", **{"model": HAIKU, "max_tokens": 4000, **body})
    )


def events(text: str) -> list[dict[str, Any]]:
    blocks = [block.split("\n") for block in text.replace("\r\n", "\n").split("\n\n")]
    pairs = [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: ")))
        for lines in blocks
        if len(lines) == 2
    ]
    assert all(name == event["type"] for name, event in pairs)
    return [event for _, event in pairs]


def assembled(text: str) -> dict[str, Any]:
    """The message that a client's accumulator makes of the events, as Anthropic's SDK does it."""
    message: dict[str, Any] = {}
    for event in events(text):
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            message["content"].append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            for name, value in delta.items():
                if name != "type":
                    name = "json" if name == "partial_json" else name
                    block[name] = block.get(name, "") + value
        elif event["type"] == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event.get("usage", {}))
    for block in message["content"]:
        arguments = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(arguments)
    return message


async def test_a_message_has_anthropics_shape(client: Client) -> None:
    response = await ask(client)
    body = response.json()
    assert (body["type"], body["role"], body["model"], body["stop_reason"]) == (
        "message",
        "assistant",
        HAIKU,
        "end_turn",
    )
    assert "Say hi" in body["content"][0]["text"]
    assert response.headers["x-generation-id"].startswith("gen-") and body["id"].startswith("msg_")


async def test_a_stream_has_every_event_in_order(client: Client) -> None:
    stream = events((await ask(client, stream=True)).text)
    assert list(dict.fromkeys(event["type"] for event in stream)) == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert stream[0]["message"]["content"] == [] and stream[0]["message"]["usage"]["output_tokens"] == 1
    assert "cost" not in stream[0]["message"]["usage"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tools": [TOOL]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"stop_sequences": ["read"]},
    ],
    ids=["text", "tool", "thinking", "stop"],
)
async def test_a_stream_adds_up_to_the_whole_message(client: Client, body: dict[str, Any]) -> None:
    whole, stream = (await ask(client, **body)).json(), await ask(client, stream=True, **body)
    message = assembled(stream.text)
    assert {**message, "id": ""} == {**whole, "id": ""}


async def test_usage_leaves_cached_tokens_out_of_the_input_and_costs_exactly(client: Client) -> None:
    plain = json.loads((await ask(client)).text, parse_float=Decimal)["usage"]
    cached = json.loads((await ask(client, "cache-read")).text, parse_float=Decimal)["usage"]
    prices = BY_ID[HAIKU].endpoints[0].prices
    assert plain["cost"] == plain["input_tokens"] * prices.prompt + plain["output_tokens"] * prices.completion
    assert cached["input_tokens"] + cached["cache_read_input_tokens"] == plain["input_tokens"]
    read = prices.input_cache_read or Decimal(0)
    assert cached["cost"] == plain["cost"] - cached["cache_read_input_tokens"] * (prices.prompt - read)


async def test_marked_text_is_written_to_the_cache(client: Client) -> None:
    marked = [{"type": "text", "text": "a long story " * 20, "cache_control": {"type": "ephemeral"}}]
    usage = (await ask(client, system=marked)).json()["usage"]
    assert usage["cache_creation_input_tokens"] == 61 == usage["cache_creation"]["ephemeral_5m_input_tokens"]


async def test_the_cost_may_be_missing_and_generation_knows_it(client: Client) -> None:
    response = await ask(client, "cost-missing", stream=True)
    assert not {"cost", "is_byok", "cost_details"} & assembled(response.text)["usage"].keys()
    truth = (await ask(client)).json()["usage"]["cost"]
    assert (await client.look_up(response.headers["x-generation-id"])).json()["data"]["total_cost"] == truth


async def test_a_tool_is_used_and_its_result_answered(client: Client) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}]
    used = (await ask(client, messages=messages, tools=[TOOL])).json()
    (block,) = used["content"]
    assert (used["stop_reason"], block["type"], block["name"], set(block["input"])) == (
        "tool_use",
        "tool_use",
        "get_weather",
        {"city"},
    )
    result = {
        "type": "tool_result",
        "tool_use_id": block["id"],
        "content": [{"type": "text", "text": "sunny"}],
    }
    more = [
        {"role": "assistant", "content": [block]},
        {"role": "user", "content": [result, {"type": "text", "text": "(be brief)"}]},
    ]
    answer = (await ask(client, messages=[*messages, *more], tools=[TOOL])).json()
    assert answer["stop_reason"] == "end_turn" and "sunny" in answer["content"][0]["text"]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("any", "tool_use"), ("none", "end_turn"), ("tool", "tool_use"), ("auto", "tool_use")],
)
async def test_tool_choice_is_honoured(client: Client, choice: str, reason: str) -> None:
    body = (await ask(client, tools=[TOOL], tool_choice={"type": choice, "name": "get_weather"})).json()
    assert body["stop_reason"] == reason


async def test_thinking_comes_first_and_is_signed(client: Client) -> None:
    body = (await ask(client, thinking={"type": "adaptive"})).json()
    thinking, text = body["content"]
    assert thinking["thinking"] and thinking["signature"] and text["type"] == "text"
    assert body["usage"]["output_tokens_details"] == {"thinking_tokens": 24}


async def test_a_stop_sequence_is_named(client: Client) -> None:
    body = (await ask(client, stop_sequences=["nowhere", " read"])).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", " read")
    assert body["content"][0]["text"] == "The sandbox"


async def test_max_tokens_end_a_message(client: Client) -> None:
    body = (await ask(client, max_tokens=3)).json()
    assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("max_tokens", 3)


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [
        ("stream-error", "rate_limit_error"),
        ("stream-error-string", "api_error"),
        ("stream-error-empty", "api_error"),
    ],
)
async def test_an_error_in_mid_stream_is_an_event_and_the_last(
    client: Client, scenario: str, kind: str
) -> None:
    stream = events((await ask(client, f"{scenario};count=3", stream=True)).text)
    assert [event["type"] for event in stream].count("content_block_delta") == 3
    assert (stream[-1]["type"], stream[-1]["error"]["type"]) == ("error", kind)


async def test_an_error_may_come_first_or_when_the_provider_dies(client: Client) -> None:
    first = events((await ask(client, "error-first", stream=True)).text)
    died = events((await ask(client, "provider-died", stream=True)).text)
    assert [event["type"] for event in first] == ["error"]
    assert died[-1]["error"]["error_type"] == "provider_unavailable"
    assert (await ask(client, "provider-died")).json()["error"]["type"] == "api_error"
    assert (await ask(client, "error-in-200")).json()["type"] == "error"


@pytest.mark.parametrize(
    ("scenario", "status", "kind"),
    [
        ("error-400", 400, "invalid_request_error"),
        ("error-401", 401, "authentication_error"),
        ("error-402", 402, "billing_error"),
        ("error-403", 403, "permission_error"),
        ("error-404", 404, "not_found_error"),
        ("error-408", 408, "timeout_error"),
        ("error-429", 429, "rate_limit_error"),
        ("error-500", 500, "api_error"),
        ("error-529", 529, "overloaded_error"),
        ("max-price-refused", 404, "not_found_error"),
    ],
)
async def test_refusals_have_anthropics_shape(client: Client, scenario: str, status: int, kind: str) -> None:
    response = await ask(client, scenario, stream=True)
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["request_id"] == response.headers["x-generation-id"]


async def test_a_max_price_refusal_names_its_constraint(client: Client) -> None:
    body = (await ask(client, provider={"max_price": {"prompt": 0.01}})).json()
    assert body["error"]["availability"]["excluded_by"] == ["max_price"]


async def test_the_system_may_speak_in_the_middle(client: Client) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "system", "content": "Be brief."}]
    assert (await ask(client, messages=messages)).status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 4000}}, "`max_tokens`"),
    ],
)
async def test_a_wrong_request_is_a_400_that_names_the_field(
    client: Client, body: dict[str, Any], named: str
) -> None:
    response = await ask(client, **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(named)


async def test_a_key_may_come_as_anthropic_sends_it(client: Client) -> None:
    body = {"model": HAIKU, "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
    assert (
        await client.http.post("/messages", json=body, headers={"x-api-key": "sk-or-v1-test"})
    ).status_code == 200
    refused = await client.http.post("/messages", json=body)
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"


async def test_a_fallback_answers_under_its_own_name(client: Client) -> None:
    body = (await ask(client, model=f"{HAIKU}:error-503", fallbacks=[{"model": "openai/gpt-4o-mini"}])).json()
    assert body["model"] == "openai/gpt-4o-mini"
