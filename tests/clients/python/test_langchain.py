"""LangChain's ChatOpenAI works unchanged. It adds message types, tool binding and parsers of its own to
OpenAI's SDK.
"""

from __future__ import annotations

from typing import Any

import openai
import pytest
from account import (
    ABORTABLE,
    COST,
    EMBEDDER,
    IMAGE,
    MODEL,
    PROMPT,
    QUESTION,
    READ,
    SAID,
    UNKNOWN_MODEL,
    URL,
    WRONG_KEY,
    Account,
    assert_booked,
    assert_cut_short,
    new_account,
)
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr


def chat(key: str, model: str = MODEL, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=model, base_url=f"{URL}/v1", api_key=SecretStr(key), **{"max_retries": 0, **options}
    )


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"18 degrees in {city}"


class Forecast(BaseModel):
    """A forecast."""

    city: str
    degrees: int


def test_a_completion_is_billed_as_told(account: Account) -> None:
    answer = chat(account.key).invoke(PROMPT)
    assert answer.text == SAID
    assert answer.usage_metadata is not None
    told = answer.usage_metadata
    assert_booked(
        account.settled_record(), prompt=told["input_tokens"], completion=told["output_tokens"], cost=COST
    )
    assert answer.response_metadata["token_usage"]["cost"] == COST


def test_a_stream_ends_with_its_usage(account: Account) -> None:
    whole: AIMessageChunk | None = None
    pieces = 0
    for chunk in chat(account.key, stream_usage=True).stream(PROMPT):
        whole = chunk if whole is None else whole + chunk
        pieces += 1
    assert whole is not None and whole.text == SAID
    assert pieces > 10
    assert whole.usage_metadata is not None
    told = whole.usage_metadata
    assert_booked(
        account.settled_record(), prompt=told["input_tokens"], completion=told["output_tokens"], cost=COST
    )


def test_a_bound_tool_is_called_and_its_result_is_answered(account: Account) -> None:
    model, asked = chat(account.key).bind_tools([get_weather]), HumanMessage(QUESTION)
    first = model.invoke([asked])
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": QUESTION})
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    second = model.invoke([asked, first, result])
    assert second.text.startswith(f"The sandbox read “18 degrees in {QUESTION}”.")
    assert second.usage_metadata is not None
    told = second.usage_metadata
    assert_booked(account.settled_record(2), prompt=told["input_tokens"], completion=told["output_tokens"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_becomes_a_model(account: Account, method: Any) -> None:
    found = chat(account.key).with_structured_output(Forecast, method=method).invoke(QUESTION)
    assert found == Forecast(city=QUESTION, degrees=1)
    assert account.settled_record()["status"] == "completed"


def test_an_image_is_read(account: Account) -> None:
    parts: list[str | dict[Any, Any]] = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": IMAGE}},
    ]
    answer = chat(account.key).invoke([HumanMessage(parts)])
    assert answer.text.startswith("The sandbox read “What is this? [image_url]”.")
    assert answer.usage_metadata is not None
    told = answer.usage_metadata
    assert_booked(account.settled_record(), prompt=told["input_tokens"], completion=told["output_tokens"])


def test_several_questions_at_once_are_several_records(account: Account) -> None:
    answers = chat(account.key).batch([PROMPT] * 5)
    assert [answer.text for answer in answers] == [SAID] * 5
    account.settled_record(5)
    assert account.spent() == pytest.approx(5 * COST, abs=1e-12)


def test_a_wrong_key_is_an_authentication_error() -> None:
    with pytest.raises(openai.AuthenticationError):
        chat(WRONG_KEY).invoke(PROMPT)


def test_an_unknown_model_is_a_not_found_error(account: Account) -> None:
    with pytest.raises(openai.NotFoundError):
        chat(account.key, UNKNOWN_MODEL).invoke(PROMPT)
    assert account.records() == []


def test_without_credits_it_is_a_402() -> None:
    with pytest.raises(openai.APIStatusError) as refusal:
        chat(new_account(credits=0).key, max_retries=2).invoke(PROMPT)
    assert (refusal.value.status_code, refusal.value.code) == (402, "insufficient_credits")


def test_over_the_rate_limit_it_is_a_rate_limit_error_that_says_when(account: Account) -> None:
    account.limit(burst=1)
    model = chat(account.key)
    model.invoke(PROMPT)
    with pytest.raises(openai.RateLimitError) as refusal:
        model.invoke(PROMPT)
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 2


def test_one_retry_is_enough_because_retry_after_is_honoured(account: Account) -> None:
    account.limit(burst=1)
    model = chat(account.key, max_retries=1)
    assert [model.invoke(PROMPT).text for _ in range(2)] == [SAID, SAID]
    account.settled_record(2)


def test_a_client_that_leaves_in_mid_stream_has_one_settled_record(account: Account) -> None:
    stream = chat(account.key, ABORTABLE).stream(PROMPT)
    assert len([chunk for chunk, _ in zip(stream, range(3), strict=False)]) == 3
    stream.close()  # type: ignore[attr-defined]  # a generator, declared as an iterator
    assert_cut_short(account.settled_record())


@pytest.mark.endpoint("POST /v1/embeddings")
def test_texts_become_vectors(account: Account) -> None:
    embedder = OpenAIEmbeddings(
        model=EMBEDDER,
        base_url=f"{URL}/v1",
        api_key=SecretStr(account.key),
        check_embedding_ctx_length=False,
        dimensions=8,
    )
    vectors = embedder.embed_documents(["one", "two"])
    assert [len(vector) for vector in vectors] == [8, 8]
    assert sum(value * value for value in vectors[0]) == pytest.approx(1, abs=1e-3)
    assert vectors[0] != vectors[1]
    record = account.settled_record()
    assert record["endpoint"] == "embeddings" and record["cost"] > 0


@pytest.mark.endpoint("POST /v1/responses")
def test_the_responses_api_answers_too(account: Account) -> None:
    answer = chat(account.key, use_responses_api=True).invoke(PROMPT)
    assert answer.text.startswith(READ)
    assert answer.usage_metadata is not None
    told = answer.usage_metadata
    assert_booked(account.settled_record(), prompt=told["input_tokens"], completion=told["output_tokens"])
