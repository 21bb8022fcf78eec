"""OpenAI's SDK for Python works unchanged: chat completions in every way that it offers, its error classes,
and its retries.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from account import (
    ABORTABLE,
    COST,
    FORECAST,
    IMAGE,
    MODEL,
    PROMPT,
    QUESTION,
    SAID,
    TOOL,
    UNKNOWN_MODEL,
    URL,
    WEATHER,
    WRONG_KEY,
    Account,
    assert_booked,
    assert_cut_short,
    new_account,
)
from openai.types.chat import ChatCompletionFunctionToolParam
from pydantic import BaseModel

FUNCTION: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": WEATHER},
}


def sdk(key: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{URL}/v1", api_key=key, **{"max_retries": 0, **options})


def say(client: openai.OpenAI, **body: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], **body}
    )


def test_a_completion_says_what_it_cost_and_the_books_agree(account: Account) -> None:
    answer = say(sdk(account.key))
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].finish_reason == "stop"
    record = account.settled_record()
    assert_booked(
        record,
        prompt=answer.usage.prompt_tokens,
        completion=answer.usage.completion_tokens,
        cost=answer.usage.cost,
    )
    assert answer.usage.cost == COST
    assert answer.gateway_usage["cost"] == record["cost"]
    assert answer.gateway_usage["request_id"] == answer._request_id == record["request_id"]
    assert answer.gateway_usage["user_balance_after"] == pytest.approx(1 - COST, abs=1e-12)


def test_a_stream_ends_with_its_usage(account: Account) -> None:
    events = list(say(sdk(account.key), stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == SAID
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    (told,) = [event for event in events if event.usage]
    record = account.settled_record()
    assert_booked(
        record, prompt=told.usage.prompt_tokens, completion=told.usage.completion_tokens, cost=told.usage.cost
    )
    assert record["streamed"] is True
    assert told.gateway_usage["cost"] == record["cost"] == COST


def test_the_stream_helper_gathers_the_whole_answer(account: Account) -> None:
    with sdk(account.key).chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": PROMPT}]
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == SAID
    assert account.settled_record()["cost"] == COST


async def ask_asynchronously(key: str) -> tuple[str | None, str]:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=key, max_retries=0) as client:
        plain = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": PROMPT}]
        )
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": PROMPT}], stream=True
        )
        streamed = "".join([event.choices[0].delta.content or "" async for event in stream])
    return plain.choices[0].message.content, streamed


def test_the_asynchronous_client_works_too(account: Account) -> None:
    assert asyncio.run(ask_asynchronously(account.key)) == (SAID, SAID)
    assert account.settled_record(2)["cost"] == COST


def test_a_tool_is_called_and_its_result_is_answered(account: Account) -> None:
    client, messages = sdk(account.key), [{"role": "user", "content": QUESTION}]
    first = say(client, messages=messages, tools=[TOOL])
    (call,) = first.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": QUESTION})
    assert first.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    second = say(client, messages=[*messages, first.choices[0].message, result], tools=[TOOL])
    assert second.choices[0].message.content.startswith("The sandbox read “18 degrees”.")
    record = account.settled_record(2)
    assert_booked(
        record,
        prompt=second.usage.prompt_tokens,
        completion=second.usage.completion_tokens,
        cost=second.usage.cost,
    )
    assert account.spent() == pytest.approx(first.usage.cost + second.usage.cost, abs=1e-12)


def test_a_streamed_tool_call_arrives_in_fragments_that_fit(account: Account) -> None:
    with sdk(account.key).chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], tools=[FUNCTION]
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": QUESTION}
    assert account.settled_record()["finish_reason"] == "tool_calls"


def test_structured_output_conforms_to_its_schema(account: Account) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "forecast", "strict": True, "schema": FORECAST}}
    answer = say(sdk(account.key), messages=[{"role": "user", "content": QUESTION}], response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"city": QUESTION, "degrees": 1, "sky": "clear"}
    assert account.settled_record()["cost"] == answer.usage.cost > 0


class Forecast(BaseModel):
    city: str
    degrees: int


def test_structured_output_is_parsed_into_a_model(account: Account) -> None:
    answer = sdk(account.key).chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], response_format=Forecast
    )
    assert answer.choices[0].message.parsed == Forecast(city=QUESTION, degrees=1)


def test_an_image_is_read(account: Account) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": IMAGE}}]
    answer = say(sdk(account.key), messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content.startswith("The sandbox read “What is this? [image_url]”.")
    record = account.settled_record()
    assert_booked(
        record,
        prompt=answer.usage.prompt_tokens,
        completion=answer.usage.completion_tokens,
        cost=answer.usage.cost,
    )
    assert answer.usage.prompt_tokens > 85  # OpenAI's fewest tokens for an image


def test_a_wrong_key_is_an_authentication_error() -> None:
    with pytest.raises(openai.AuthenticationError) as refusal:
        say(sdk(WRONG_KEY))
    assert (refusal.value.status_code, refusal.value.code, refusal.value.type) == (
        401,
        "invalid_api_key",
        "authentication_error",
    )
    assert refusal.value.request_id


def test_an_unknown_model_is_a_not_found_error(account: Account) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        say(sdk(account.key), model=UNKNOWN_MODEL)
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    assert account.records() == []


def test_a_bad_body_is_a_bad_request_that_names_the_field(account: Account) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        say(sdk(account.key), messages="hello")
    assert refusal.value.param == "messages"
    assert account.records() == []


def test_without_credits_it_is_a_402_that_is_not_repeated() -> None:
    account = new_account(credits=0)
    with pytest.raises(openai.APIStatusError) as refusal:
        say(sdk(account.key, max_retries=2))
    assert (refusal.value.status_code, refusal.value.code, refusal.value.type) == (
        402,
        "insufficient_credits",
        "insufficient_quota",
    )
    assert refusal.value.response.request.headers["x-stainless-retry-count"] == "0"
    assert account.records() == []


def test_over_the_rate_limit_it_is_a_rate_limit_error_that_says_when(account: Account) -> None:
    account.limit(burst=1)
    client = sdk(account.key)
    say(client)
    with pytest.raises(openai.RateLimitError) as refusal:
        say(client)
    assert refusal.value.code == "rate_limit_exceeded"
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 2
    account.settled_record(1)


def test_one_retry_is_enough_because_retry_after_is_honoured(account: Account) -> None:
    """The SDK's own patience would be half a second, and the limit lasts longer."""
    account.limit(burst=1)
    client = sdk(account.key, max_retries=1)
    say(client)
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": PROMPT}]
    )
    assert answer.retries_taken == 1
    assert answer.parse().choices[0].message.content == SAID
    account.settled_record(2)


def test_an_error_in_mid_stream_reaches_the_caller(account: Account) -> None:
    with pytest.raises(openai.APIError):
        list(say(sdk(account.key), model=f"{MODEL}:stream-error;count=3", stream=True))
    assert account.settled_record()["status"] == "failed"


def test_a_client_that_leaves_in_mid_stream_has_one_settled_record(account: Account) -> None:
    stream = say(sdk(account.key), model=ABORTABLE, stream=True)
    read = [event for event, _ in zip(stream, range(3), strict=False)]
    stream.close()
    assert len(read) == 3
    assert_cut_short(account.settled_record())


def test_the_models_are_listed_and_read_one_by_one(account: Account) -> None:
    client = sdk(account.key)
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(UNKNOWN_MODEL)
