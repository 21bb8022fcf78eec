"""LiteLLM's SDK works unchanged, both through its OpenAI provider and through its OpenRouter provider under
`/api/v1`.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch its prices from another host

import litellm
import pytest
from account import (
    ABORTABLE,
    COST,
    EMBEDDER,
    FORECAST,
    IMAGE,
    MODEL,
    PROMPT,
    QUESTION,
    READ,
    SAID,
    TOOL,
    UNKNOWN_MODEL,
    URL,
    WRONG_KEY,
    Account,
    assert_booked,
    assert_cut_short,
    model_that_makes,
    new_account,
)
from litellm.exceptions import APIError, AuthenticationError, NotFoundError, RateLimitError

ENTRANCES = {"openai": f"{URL}/v1", "openrouter": f"{URL}/api/v1"}
either_entrance = pytest.mark.parametrize("entrance", ENTRANCES)


def say(key: str, entrance: str = "openai", *, model: str = MODEL, **body: Any) -> Any:
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_retries": 0, **body}
    return litellm.completion(model=f"{entrance}/{model}", api_base=ENTRANCES[entrance], api_key=key, **asked)


@either_entrance
def test_a_completion_is_billed_as_told(account: Account, entrance: str) -> None:
    answer = say(account.key, entrance)
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.cost == COST
    assert_booked(
        account.settled_record(),
        prompt=answer.usage.prompt_tokens,
        completion=answer.usage.completion_tokens,
        cost=COST,
    )


@either_entrance
def test_a_stream_ends_with_its_usage(account: Account, entrance: str) -> None:
    events = list(say(account.key, entrance, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == SAID
    told = [event.usage for event in events if getattr(event, "usage", None)][-1]
    assert_booked(
        account.settled_record(), prompt=told.prompt_tokens, completion=told.completion_tokens, cost=COST
    )


@either_entrance
def test_a_tool_is_called_and_its_result_is_answered(account: Account, entrance: str) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    first = say(account.key, entrance, messages=messages, tools=[TOOL])
    (call,) = first.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": QUESTION})
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    second = say(account.key, entrance, messages=[*messages, first.choices[0].message, result], tools=[TOOL])
    assert second.choices[0].message.content.startswith("The sandbox read “18 degrees”.")
    record = account.settled_record(2)
    assert_booked(
        record,
        prompt=second.usage.prompt_tokens,
        completion=second.usage.completion_tokens,
        cost=second.usage.cost,
    )


@either_entrance
def test_structured_output_conforms_to_its_schema(account: Account, entrance: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "forecast", "strict": True, "schema": FORECAST}}
    answer = say(
        account.key, entrance, messages=[{"role": "user", "content": QUESTION}], response_format=form
    )
    assert json.loads(answer.choices[0].message.content) == {"city": QUESTION, "degrees": 1, "sky": "clear"}
    assert account.settled_record()["status"] == "completed"


@either_entrance
def test_an_image_is_read(account: Account, entrance: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": IMAGE}}]
    answer = say(account.key, entrance, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content.startswith("The sandbox read “What is this? [image_url]”.")
    assert_booked(
        account.settled_record(), prompt=answer.usage.prompt_tokens, completion=answer.usage.completion_tokens
    )


@either_entrance
def test_a_wrong_key_is_an_authentication_error(entrance: str) -> None:
    with pytest.raises(AuthenticationError):
        say(WRONG_KEY, entrance)


@either_entrance
def test_an_unknown_model_is_a_not_found_error(account: Account, entrance: str) -> None:
    with pytest.raises(NotFoundError):
        say(account.key, entrance, model=UNKNOWN_MODEL)
    assert account.records() == []


@either_entrance
def test_without_credits_it_is_a_402(entrance: str) -> None:
    with pytest.raises(APIError) as refusal:
        say(new_account(credits=0).key, entrance)
    assert refusal.value.status_code == 402


@either_entrance
def test_over_the_rate_limit_it_is_a_rate_limit_error(account: Account, entrance: str) -> None:
    account.limit(burst=1)
    say(account.key, entrance)
    with pytest.raises(RateLimitError) as refusal:
        say(account.key, entrance)
    if entrance == "openai":  # the OpenRouter provider forgets the headers of a refusal
        assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 2


def test_one_retry_is_enough_because_retry_after_is_honoured(account: Account) -> None:
    account.limit(burst=1)
    assert [say(account.key, max_retries=1).choices[0].message.content for _ in range(2)] == [SAID, SAID]
    account.settled_record(2)


@either_entrance
def test_a_client_that_leaves_in_mid_stream_has_one_settled_record(account: Account, entrance: str) -> None:
    stream = say(account.key, entrance, model=ABORTABLE, stream=True)
    assert len([event for event, _ in zip(stream, range(3), strict=False)]) == 3
    stream.completion_stream.close()
    assert_cut_short(account.settled_record())


@pytest.mark.endpoint("POST /v1/embeddings")
def test_texts_become_vectors(account: Account) -> None:
    answer: Any = litellm.embedding(
        model=f"openai/{EMBEDDER}",
        input=["one", "two"],
        dimensions=8,
        api_base=ENTRANCES["openai"],
        api_key=account.key,
    )
    assert [len(entry["embedding"]) for entry in answer.data] == [8, 8]
    record = account.settled_record()
    assert (record["endpoint"], record["prompt_tokens"]) == ("embeddings", answer.usage.prompt_tokens)


@pytest.mark.endpoint("POST /v1/completions")
def test_a_text_completion_is_billed_as_told(account: Account) -> None:
    answer: Any = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        prompt=PROMPT,
        api_base=ENTRANCES["openai"],
        api_key=account.key,
    )
    assert answer.choices[0].text.startswith(READ)
    assert_booked(
        account.settled_record(), prompt=answer.usage.prompt_tokens, completion=answer.usage.completion_tokens
    )


@pytest.mark.endpoint("POST /v1/messages")
def test_its_anthropic_provider_reads_messages(account: Account) -> None:
    answer: Any = litellm.completion(
        model="anthropic/anthropic/claude-haiku-4.5",
        messages=[{"role": "user", "content": PROMPT}],
        api_base=URL,
        api_key=account.key,
        max_tokens=200,
    )
    assert answer.choices[0].message.content.startswith(READ)
    assert_booked(
        account.settled_record(), prompt=answer.usage.prompt_tokens, completion=answer.usage.completion_tokens
    )


@pytest.mark.endpoint("POST /v1/images/generations")
def test_an_image_is_made(account: Account) -> None:
    answer: Any = litellm.image_generation(
        model=f"openai/{model_that_makes('image')}",
        prompt="A red dot.",
        api_base=ENTRANCES["openai"],
        api_key=account.key,
    )
    assert answer.data[0].b64_json
    assert account.settled_record()["cost"] > 0
