"""Anthropic's SDK for Python works unchanged. It sends its key as `x-api-key`, and reads errors in
Anthropic's own form.
"""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from account import (
    CLAUDE,
    LONG,
    PNG,
    PROMPT,
    QUESTION,
    SAID,
    UNKNOWN_MODEL,
    URL,
    WEATHER,
    WRONG_KEY,
    Account,
    assert_booked,
    assert_cut_short,
    new_account,
)
from anthropic.types import TextBlock, ToolParam, ToolUseBlock

pytestmark = pytest.mark.endpoint("POST /v1/messages")

TOOL: ToolParam = {"name": "get_weather", "description": "The weather of a city.", "input_schema": WEATHER}


def sdk(key: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=URL, api_key=key, **{"max_retries": 0, **options})


def say(client: anthropic.Anthropic, **body: Any) -> Any:
    return client.messages.create(
        **{"model": CLAUDE, "max_tokens": 400, "messages": [{"role": "user", "content": PROMPT}], **body}
    )


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if isinstance(block, TextBlock))


def assert_billed(record: dict[str, Any], usage: Any) -> None:
    """Anthropic's input tokens leave out what was read from or written to the cache."""
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert_booked(record, prompt=usage.input_tokens + cached, completion=usage.output_tokens)


def test_a_message_is_billed_as_told(account: Account) -> None:
    answer = say(sdk(account.key))
    assert (text_of(answer), answer.stop_reason, answer.role, answer.type) == (
        SAID,
        "end_turn",
        "assistant",
        "message",
    )
    record = account.settled_record()
    assert_billed(record, answer.usage)
    assert record["endpoint"] == "messages"


def test_a_stream_ends_with_its_usage(account: Account) -> None:
    with sdk(account.key).messages.stream(
        model=CLAUDE, max_tokens=400, messages=[{"role": "user", "content": PROMPT}]
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == SAID
    assert final.stop_reason == "end_turn"
    record = account.settled_record()
    assert_billed(record, final.usage)
    assert record["streamed"] is True


def test_the_raw_events_come_in_anthropics_order(account: Account) -> None:
    kinds = [event.type for event in say(sdk(account.key), stream=True)]
    assert (kinds[0], kinds[-2], kinds[-1]) == ("message_start", "message_delta", "message_stop")
    assert (
        kinds.index("content_block_start")
        < kinds.index("content_block_delta")
        < kinds.index("content_block_stop")
    )
    assert account.settled_record()["status"] == "completed"


def test_a_tool_is_used_and_its_result_is_answered(account: Account) -> None:
    client, asked = sdk(account.key), {"role": "user", "content": QUESTION}
    first = say(client, messages=[asked], tools=[TOOL])
    (use,) = [block for block in first.content if isinstance(block, ToolUseBlock)]
    assert (use.name, use.input, first.stop_reason) == ("get_weather", {"city": QUESTION}, "tool_use")
    result = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "18 degrees"}],
    }
    second = say(
        client, messages=[asked, {"role": "assistant", "content": first.content}, result], tools=[TOOL]
    )
    assert "18 degrees" in text_of(second)
    assert_billed(account.settled_record(2), second.usage)


def test_a_streamed_tool_use_arrives_whole(account: Account) -> None:
    with sdk(account.key).messages.stream(
        model=CLAUDE, max_tokens=400, messages=[{"role": "user", "content": QUESTION}], tools=[TOOL]
    ) as stream:
        final = stream.get_final_message()
    (use,) = [block for block in final.content if isinstance(block, ToolUseBlock)]
    assert use.input == {"city": QUESTION}
    assert_billed(account.settled_record(), final.usage)


def test_an_image_is_read(account: Account) -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
    ]
    answer = say(sdk(account.key), messages=[{"role": "user", "content": parts}])
    assert text_of(answer).startswith("The sandbox read “What is this?")
    assert_billed(account.settled_record(), answer.usage)


def test_a_system_prompt_and_blocks_of_text_are_taken(account: Account) -> None:
    blocks = [{"type": "text", "text": PROMPT}]
    answer = say(sdk(account.key), system="Be brief.", messages=[{"role": "user", "content": blocks}])
    assert text_of(answer) == SAID
    assert_billed(account.settled_record(), answer.usage)


def test_a_wrong_key_is_an_authentication_error() -> None:
    with pytest.raises(anthropic.AuthenticationError) as refusal:
        say(sdk(WRONG_KEY))
    body: Any = refusal.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
    assert len(body["error"]["message"]) > 10


def test_an_unknown_model_is_a_not_found_error(account: Account) -> None:
    with pytest.raises(anthropic.NotFoundError) as refusal:
        say(sdk(account.key), model=UNKNOWN_MODEL)
    body: Any = refusal.value.body
    assert body["error"]["type"] == "not_found_error"
    assert account.records() == []


def test_a_bad_body_is_a_bad_request(account: Account) -> None:
    with pytest.raises(anthropic.BadRequestError) as refusal:
        say(sdk(account.key), messages="hello")
    body: Any = refusal.value.body
    assert body["error"]["type"] == "invalid_request_error"
    assert account.records() == []


def test_without_credits_it_is_a_402_that_is_not_repeated() -> None:
    account = new_account(credits=0)
    with pytest.raises(anthropic.APIStatusError) as refusal:
        say(sdk(account.key, max_retries=2))
    assert refusal.value.status_code == 402
    assert refusal.value.response.request.headers["x-stainless-retry-count"] == "0"
    body: Any = refusal.value.body
    assert body["error"]["type"] == "billing_error"


def test_over_the_rate_limit_it_is_a_rate_limit_error_that_says_when(account: Account) -> None:
    account.limit(burst=1)
    say(sdk(account.key))
    with pytest.raises(anthropic.RateLimitError) as refusal:
        say(sdk(account.key))
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 2


def test_one_retry_is_enough_because_retry_after_is_honoured(account: Account) -> None:
    account.limit(burst=1)
    client = sdk(account.key, max_retries=1)
    assert [text_of(say(client)) for _ in range(2)] == [SAID, SAID]
    account.settled_record(2)


def test_a_client_that_leaves_in_mid_stream_has_one_settled_record(account: Account) -> None:
    stream = say(
        sdk(account.key), model=f"{CLAUDE}:slow;ms=20;tokens={LONG}", stream=True, max_tokens=2 * LONG
    )
    deltas = (event for event in stream if event.type == "content_block_delta")
    assert len([event for event, _ in zip(deltas, range(3), strict=False)]) == 3
    stream.close()
    assert_cut_short(account.settled_record())
