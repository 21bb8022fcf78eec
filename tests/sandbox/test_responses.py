"""`/responses` speaks OpenAI's protocol to OpenAI's SDK, with OpenRouter's usage and failures."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall

from sandbox.models.text_models import BY_ID
from tests.support.sandbox_client import Client

MINI = "openai/gpt-4o-mini"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


async def ask(client: Client, scenario: str = "ordinary", **body: Any) -> httpx2.Response:
    return await client.http.send(client.request(scenario, "/responses", **{"input": "Say hi", **body}))


def events(text: str) -> list[dict[str, Any]]:
    blocks = [block.split("\n") for block in text.replace("\r\n", "\n").split("\n\n")]
    pairs = [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: ")))
        for lines in blocks
        if len(lines) == 2
    ]
    assert all(name == event["type"] for name, event in pairs)
    return [event for _, event in pairs]


async def test_the_openai_sdk_reads_a_response(sdk: openai.AsyncOpenAI) -> None:
    response = await sdk.responses.create(
        model=MINI, input="Say hi", instructions="Be brief", max_output_tokens=500
    )
    assert "Say hi" in response.output_text
    assert (response.status, response.instructions, response.max_output_tokens) == (
        "completed",
        "Be brief",
        500,
    )
    assert (
        response.usage is not None
        and response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    )


async def test_the_openai_sdk_reads_a_stream_to_the_same_response(sdk: openai.AsyncOpenAI) -> None:
    whole = await sdk.responses.create(model=MINI, input="Say hi")
    async with sdk.responses.stream(model=MINI, input="Say hi") as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert final.usage == whole.usage


async def test_a_stream_has_every_event_in_order_and_numbered(client: Client) -> None:
    response = await ask(client, stream=True)
    stream = events(response.text)
    kinds = list(dict.fromkeys(event["type"] for event in stream))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.headers["x-generation-id"].startswith("gen-")


async def test_usage_has_the_names_of_responses_and_the_exact_cost(client: Client) -> None:
    usage = json.loads((await ask(client)).text, parse_float=Decimal)["usage"]
    prices = BY_ID[MINI].endpoints[0].prices
    sent, made = usage["input_tokens"] * prices.prompt, usage["output_tokens"] * prices.completion
    assert usage["cost"] == sent + made
    assert usage["cost_details"] == {
        "upstream_inference_cost": sent + made,
        "upstream_inference_input_cost": sent,
        "upstream_inference_output_cost": made,
    }
    assert usage["is_byok"] is False and usage["input_tokens_details"] == {
        "cached_tokens": 0,
        "cache_write_tokens": 0,
    }
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


async def test_the_openai_sdk_calls_a_function_and_sends_its_result(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.responses.stream(model=MINI, input="Weather?", tools=[TOOL]) as stream:  # type: ignore[list-item]
        fragments = [
            event.delta async for event in stream if event.type == "response.function_call_arguments.delta"
        ]
        (call,) = (await stream.get_final_response()).output
    assert isinstance(call, ResponseFunctionToolCall) and call.name == "get_weather"
    assert "".join(fragments) == call.arguments and set(json.loads(call.arguments)) == {"city"}
    result: Any = [
        {"role": "user", "content": "Weather?"},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    answer = await sdk.responses.create(model=MINI, input=result, tools=[TOOL])  # type: ignore[list-item]
    assert "sunny" in answer.output_text


@pytest.mark.parametrize(
    ("model", "delta", "place"),
    [
        ("openai/o4-mini", "response.reasoning_summary_text.delta", "summary"),
        ("deepseek/deepseek-r1", "response.reasoning_text.delta", "content"),
    ],
)
async def test_reasoning_is_an_item_of_its_own(client: Client, model: str, delta: str, place: str) -> None:
    stream = events((await ask(client, model=model, stream=True)).text)
    thought, message = stream[-1]["response"]["output"]
    assert (thought["type"], message["type"]) == ("reasoning", "message")
    assert thought[place][0]["text"] == "".join(event["delta"] for event in stream if event["type"] == delta)
    assert stream[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] == 24


async def test_hidden_reasoning_is_billed_all_the_same(client: Client) -> None:
    body = (await ask(client, model="openai/o4-mini", reasoning={"exclude": True})).json()
    assert [item["type"] for item in body["output"]] == ["message"]
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == 24


async def test_too_few_tokens_make_a_response_incomplete(client: Client) -> None:
    whole = (await ask(client, max_output_tokens=3)).json()
    last = events((await ask(client, max_output_tokens=3, stream=True)).text)[-1]
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["type"] == "response.incomplete" and last["response"]["usage"]["output_tokens"] == 3


async def test_structured_output_conforms(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    body = (await ask(client, text=text)).json()
    assert isinstance(json.loads(body["output"][0]["content"][0]["text"])["n"], int)
    assert body["text"] == text


async def test_pictures_and_parts_are_counted_as_in_chat(client: Client) -> None:
    parts = [
        {"type": "input_text", "text": "What?"},
        {"type": "input_image", "image_url": "data:,", "detail": "low"},
    ]
    answer = (await ask(client, input=[{"role": "user", "content": parts}])).json()
    chat = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}},
    ]
    same = (await client.ask(messages=[{"role": "user", "content": chat}])).json()
    assert answer["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]
    assert answer["usage"]["cost"] == same["usage"]["cost"]


@pytest.mark.parametrize(
    ("scenario", "last"),
    [
        ("stream-error", "response.failed"),
        ("stream-error-string", "error"),
        ("stream-error-empty", "response.error"),
    ],
)
async def test_an_error_in_mid_stream_is_an_event_and_the_last(
    client: Client, scenario: str, last: str
) -> None:
    stream = events((await ask(client, f"{scenario};count=3", stream=True)).text)
    assert [event["type"] for event in stream].count("response.output_text.delta") == 3
    assert stream[-1]["type"] == last
    assert "usage" not in stream[-1].get("response", {}) or stream[-1]["response"]["usage"] is None


async def test_a_failed_response_says_why(client: Client) -> None:
    failed = events((await ask(client, "stream-error", stream=True)).text)[-1]["response"]
    assert (failed["status"], failed["error"]["message"], failed["error_type"]) == (
        "failed",
        "Rate limit exceeded",
        "rate_limit_exceeded",
    )
    died = (await ask(client, "provider-died")).json()
    assert died["status"] == "failed" and died["error"]["code"] == "server_error" and died["output"]


async def test_an_error_may_come_first(client: Client) -> None:
    response = await ask(client, "error-first", stream=True)
    assert [event["type"] for event in events(response.text)] == ["response.failed"]
    assert (await client.look_up(response.headers["x-generation-id"])).json()["data"]["total_cost"] == 0


async def test_the_openai_sdk_understands_errors_in_a_stream(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.responses.create(model=f"{MINI}:stream-error-string", input="x", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "error" and (last.code, last.message) == (
        "server_error",
        "Provider disconnected unexpectedly",
    )
    stream = await sdk.responses.create(model=f"{MINI}:stream-error-empty", input="x", stream=True)
    with pytest.raises(openai.APIError, match="Provider disconnected"):
        [event async for event in stream]


async def test_usage_may_be_missing_with_or_without_the_last_event(client: Client) -> None:
    silent = events((await ask(client, "usage-missing", stream=True)).text)[-1]
    cut = (await ask(client, "usage-missing-no-done", stream=True)).text
    assert silent["type"] == "response.completed" and silent["response"]["usage"] is None
    assert "response.completed" not in cut and "[DONE]" not in cut
    assert "cost" not in (await ask(client, "cost-missing")).json()["usage"]


async def test_an_error_in_200_has_no_output(client: Client) -> None:
    body = (await ask(client, "error-in-200", stream=True)).json()
    assert body["error"]["code"] == 429 and "output" not in body


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input.0"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input.0.role"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
async def test_a_wrong_request_is_a_400_that_names_the_field(
    client: Client, body: dict[str, Any], named: str
) -> None:
    response = await ask(client, **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(named)


async def test_an_abort_is_billed_for_what_was_written(client: Client) -> None:
    request = client.request("slow;ms=1;tokens=500", "/responses", input="x", stream=True)
    response = await client.http.send(request, stream=True)
    pieces = response.aiter_raw()
    for _ in range(9):
        await anext(pieces)
    await response.aclose()
    data = (await client.look_up(response.headers["x-generation-id"])).json()["data"]
    assert data["cancelled"] is True and 0 < data["tokens_completion"] < 100
