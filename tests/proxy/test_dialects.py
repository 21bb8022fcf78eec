"""The streams and errors of each API reach its clients in the form that they expect, byte by byte, wherever a
stream is cut into pieces.
"""

from __future__ import annotations

import json
from contextlib import suppress
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import (
    DatabaseUnavailable,
    GatewayError,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from gateway.proxy.dialects.base import AnswerState
from gateway.proxy.dialects.chat import CHAT, Dialect
from gateway.proxy.dialects.messages import MESSAGES, read_message_usage
from gateway.proxy.dialects.openrouter import FOR_OPENROUTER, STATUSES
from gateway.proxy.dialects.responses import RESPONSES
from gateway.proxy.forwarding import read_answer
from gateway.proxy.outcome import Outcome
from gateway.proxy.sse import with_charge
from gateway.proxy.stream import Stream
from gateway.upstream.errors import RequestOrigin, sanitised_error

SANDBOX = RequestOrigin(is_sandbox=True)
CHARGE = b'{"cost":0.5}'


def event(kind: str, **data: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **data}) + b"\n\n"


ALL = [
    CHAT,
    RESPONSES,
    MESSAGES,
    *(dialect for dialect in FOR_OPENROUTER.values() if dialect is not MESSAGES),
]

# A response as it streams.

RESPONSE = {
    "id": "gen-1",
    "object": "response",
    "model": "a/b",
    "status": "in_progress",
    "error": None,
    "usage": None,
}
COST = {
    "input_tokens": 7,
    "output_tokens": 3,
    "total_tokens": 10,
    "cost": 0.25,
    "input_tokens_details": {"cached_tokens": 2},
}
WHOLE = {**RESPONSE, "provider": "OpenAI", "status": "completed", "usage": {**COST, "is_byok": False}}
OPENING = [
    event("response.created", response=RESPONSE),
    event("response.in_progress", response=RESPONSE),
    event("response.output_item.added", item={"type": "message", "status": "in_progress", "content": []}),
]
DELTAS = [
    event("response.output_text.delta", delta='he said "usage" and "response.completed"\n\ndata: [DONE]'),
    event("response.output_text.delta", delta="żółć"),
    event("response.function_call_arguments.delta", delta='{"usage":1,"error":2}'),
]
COMPLETED = event("response.completed", response=WHOLE)

# A message as it streams.

START = event(
    "message_start",
    message={
        "id": "gen-1",
        "type": "message",
        "model": "a/b",
        "provider": "Anthropic",
        "stop_reason": None,
        "usage": {
            "input_tokens": 7,
            "cache_creation_input_tokens": 5,
            "cache_read_input_tokens": 100,
            "output_tokens": 1,
        },
    },
)
PING = event("ping")
TEXT = [
    event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    PING,
    event(
        "content_block_delta",
        index=0,
        delta={"type": "text_delta", "text": 'message_stop "usage" \n\n data: [DONE]'},
    ),
    event("content_block_delta", index=0, delta={"type": "text_delta", "text": "żółć"}),
    event("content_block_stop", index=0),
]
DELTA = event(
    "message_delta",
    delta={"stop_reason": "end_turn", "stop_sequence": None},
    usage={"output_tokens": 9, "cost": 0.25},
)
STOP = event("message_stop")


def run(
    dialect: Dialect, pieces: list[bytes], failure: GatewayError | None = None
) -> tuple[bytes, bytes, Stream]:
    """What passed, the tail, and the stream."""
    stream = Stream(sanitised_error, dialect)
    passed = b"".join([stream.feed(piece) for piece in pieces]) + stream.end()
    return passed, stream.tail(CHARGE, failure, "request-1"), stream


def facts(stream: Stream) -> tuple[Any, ...]:
    return (
        stream.usage, stream.error, stream.body_id, stream.model, stream.provider, stream.finish_reason,
        stream.is_whole, stream.has_failed,
    )  # fmt: skip


def datas(stream: bytes) -> list[dict[str, Any]]:
    return [orjson.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: {")]


STREAMS: dict[str, tuple[Dialect, list[bytes]]] = {
    "a response": (RESPONSES, [*OPENING, *DELTAS, COMPLETED]),
    "a response and [DONE]": (
        RESPONSES,
        [*OPENING, b": OPENROUTER PROCESSING\n\n", *DELTAS, COMPLETED, b"data: [DONE]\n\n"],
    ),
    "a response that failed": (
        RESPONSES,
        [
            *OPENING,
            event(
                "response.failed",
                response={**RESPONSE, "status": "failed", "error": {"code": "server_error", "message": "x"}},
            ),
        ],
    ),
    "a message": (MESSAGES, [START, *TEXT, DELTA, STOP]),
    "a message with a late ping": (MESSAGES, [START, *TEXT, DELTA, PING, STOP]),
    "a message that failed": (
        MESSAGES,
        [START, TEXT[0], event("error", error={"type": "overloaded_error", "message": "Overloaded"})],
    ),
    "a message with a comment": (
        MESSAGES,
        [b": OPENROUTER PROCESSING\n\n", START, *TEXT, DELTA, b": x\n\n", STOP, b"data: [DONE]\n\n"],
    ),
}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_cut_anywhere_gives_the_same_as_one_that_is_not(name: str, end: bytes) -> None:
    dialect, events = STREAMS[name]
    data = b"".join(events).replace(b"\n", end)
    passed, tail, stream = run(dialect, [data])
    for place in range(len(data) + 1):
        other = run(dialect, [data[:place], data[place:]])
        assert (other[0], other[1], facts(other[2])) == (passed, tail, facts(stream)), place


@settings(deadline=None)
@given(st.lists(st.integers(min_value=1, max_value=400), max_size=30), st.sampled_from(sorted(STREAMS)))
def test_a_stream_in_many_pieces_gives_the_same_too(sizes: list[int], name: str) -> None:
    dialect, events = STREAMS[name]
    data, pieces = b"".join(events), []
    rest = data
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    cut, whole = run(dialect, [*pieces, rest]), run(dialect, [data])
    assert (cut[:2], facts(cut[2])) == (whole[:2], facts(whole[2]))


def test_a_response_s_last_event_waits_and_carries_the_charge() -> None:
    passed, tail, stream = run(RESPONSES, [*OPENING, *DELTAS, COMPLETED])
    assert passed == b"".join([*OPENING, *DELTAS])
    assert tail == with_charge(COMPLETED, CHARGE)
    assert tail.startswith(b"event: response.completed\ndata: {") and tail.endswith(
        b',"gateway_usage":{"cost":0.5}}\n\n'
    )
    assert stream.usage is not None
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens, stream.usage.cached_tokens) == (
        7,
        3,
        2,
    )
    assert stream.usage.cost == Decimal("0.25")
    assert (stream.body_id, stream.model, stream.provider, stream.finish_reason) == (
        "gen-1",
        "a/b",
        "OpenAI",
        "completed",
    )
    assert stream.is_whole and not stream.has_failed


def test_done_is_passed_where_it_comes_and_not_invented() -> None:
    for dialect, events in ((RESPONSES, [*OPENING, COMPLETED]), (MESSAGES, [START, DELTA, STOP])):
        assert b"[DONE]" not in run(dialect, events)[1]
        assert run(dialect, [*events, b"data: [DONE]\n\n", COMPLETED])[1].endswith(b"data: [DONE]\n\n")


def test_a_response_without_event_lines_is_read_all_the_same() -> None:
    events = [event_[event_.index(b"\n") + 1 :] for event_ in (*OPENING, *DELTAS, COMPLETED)]
    passed, tail, stream = run(RESPONSES, events)
    assert (
        passed == b"".join(events[:-1])
        and datas(tail)[0]["gateway_usage"] == {"cost": 0.5}
        and stream.is_whole
    )


@pytest.mark.parametrize(
    ("status", "failed"), [("completed", False), ("incomplete", False), ("failed", True)]
)
def test_how_a_response_ended_is_its_status(status: str, failed: bool) -> None:
    _, _, stream = run(
        RESPONSES, [*OPENING, event(f"response.{status}", response={**WHOLE, "status": status})]
    )
    assert (stream.finish_reason, stream.is_whole, stream.has_failed) == (status, True, failed)


@pytest.mark.parametrize(
    "last",
    [
        event(
            "response.failed",
            response={
                **RESPONSE,
                "status": "failed",
                "error": {"code": "server_error", "message": "of user_abcdefgh"},
            },
        ),
        event("response.error", error={"code": 500, "message": "of user_abcdefgh"}),
        event("error", code="server_error", message="of user_abcdefgh", param=None),
        event("response.error", code="server_error", message="of user_abcdefgh"),
        event("error", error={"code": "server_error", "message": "of user_abcdefgh"}),
    ],
)
@pytest.mark.parametrize("before", [[], OPENING], ids=["first", "in the middle"])
def test_an_error_of_a_response_waits_loses_its_secrets_and_carries_the_charge(
    before: list[bytes], last: bytes
) -> None:
    passed, tail, stream = run(RESPONSES, [*before, last])
    assert passed == b"".join(before)
    assert b"user_abcdefgh" not in tail and tail.startswith(last[: last.index(b"\n")])
    assert datas(tail)[0]["gateway_usage"] == {"cost": 0.5}
    assert stream.has_failed and stream.error is not None and "user_abcdefgh" not in str(stream.error)


def test_a_response_that_breaks_off_ends_with_an_error_that_sdks_raise() -> None:
    _, tail, stream = run(RESPONSES, OPENING, UpstreamTimeout())
    (data,) = datas(tail)
    assert tail.startswith(b"event: error\n") and not stream.is_whole
    assert (data["type"], data["code"], data["error"]["code"]) == (
        "error",
        "upstream_timeout",
        "upstream_timeout",
    )
    assert data["gateway_usage"] == {"cost": 0.5} and data["gateway"]["request_id"] == "request-1"


@pytest.mark.parametrize(
    "rest", [[], [b": OPENROUTER PROCESSING\n\n"], [b"event: response.output_text.delta\n", b"data: {"]]
)
def test_an_error_of_ours_is_numbered_after_the_last_event_whatever_came_since(rest: list[bytes]) -> None:
    numbered = [event("response.output_text.delta", sequence_number=number, delta="a") for number in (6, 7)]
    _, tail, _ = run(RESPONSES, [*OPENING, *numbered, *rest], UpstreamTimeout())
    (error,) = datas(tail)
    assert error["sequence_number"] == 8


def test_a_charge_that_no_event_can_carry_has_one_of_its_own() -> None:
    after = event("response.output_text.delta", delta="?")
    passed, tail, _ = run(RESPONSES, [*OPENING, COMPLETED, after])
    assert passed.endswith(COMPLETED + after)
    assert datas(tail) == [{"type": "gateway.usage", "gateway_usage": {"cost": 0.5}}]
    _, tail, _ = run(MESSAGES, [START, TEXT[0]])
    assert datas(tail) == [{"type": "ping", "gateway_usage": {"cost": 0.5}}]


def test_a_message_s_delta_waits_and_the_stop_follows_it() -> None:
    passed, tail, stream = run(MESSAGES, [START, *TEXT, DELTA, STOP])
    assert passed == b"".join([START, *TEXT])
    assert tail == with_charge(DELTA, CHARGE) + STOP
    assert stream.usage is not None
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens, stream.usage.cached_tokens) == (
        112,
        9,
        100,
    )
    assert stream.usage.cost == Decimal("0.25")
    assert (stream.body_id, stream.model, stream.provider, stream.finish_reason) == (
        "gen-1",
        "a/b",
        "Anthropic",
        "end_turn",
    )
    assert stream.is_whole and not stream.has_failed


def test_a_message_without_a_delta_carries_the_charge_in_its_stop() -> None:
    _, tail, stream = run(MESSAGES, [START, STOP])
    assert tail == with_charge(STOP, CHARGE) and stream.is_whole


def test_a_ping_goes_past_what_waits() -> None:
    passed, tail, _ = run(MESSAGES, [START, DELTA, PING, STOP])
    assert passed == START + PING and tail == with_charge(DELTA, CHARGE) + STOP


def test_usage_in_several_deltas_is_merged_and_only_the_last_waits() -> None:
    first = event("message_delta", delta={"stop_reason": None}, usage={"output_tokens": 4})
    passed, tail, stream = run(MESSAGES, [START, first, DELTA, STOP])
    assert passed == START + first and tail == with_charge(DELTA, CHARGE) + STOP
    assert stream.usage is not None and stream.usage.completion_tokens == 9


def test_a_message_without_a_cost_knows_its_tokens_and_no_cost() -> None:
    _, _, stream = run(
        MESSAGES,
        [
            START,
            event("message_delta", delta={"stop_reason": "max_tokens"}, usage={"output_tokens": 9}),
            STOP,
        ],
    )
    assert stream.usage is not None and stream.usage.total_tokens == 121 and stream.usage.cost is None


@pytest.mark.parametrize("value", [None, "7", -1, True, 1.5, [], {}])
def test_odd_numbers_of_tokens_are_unknown_and_never_wrong(value: Any) -> None:
    usage = read_message_usage({"input_tokens": value, "cache_read_input_tokens": 5, "output_tokens": 2})
    assert usage is not None and usage.completion_tokens == 2
    assert usage.prompt_tokens == (5 if value in (None, []) or value == {} else None)


@pytest.mark.parametrize("before", [[], [START, *TEXT]], ids=["first", "in the middle"])
def test_an_error_of_a_message_keeps_anthropic_s_form(before: list[bytes]) -> None:
    error = {
        "type": "overloaded_error",
        "message": "of user_abcdefgh",
        "error_type": "provider_overloaded",
        "metadata": {"raw": "user_abcdefgh"},
    }
    passed, tail, stream = run(MESSAGES, [*before, event("error", error=error)])
    (data,) = datas(tail)
    assert passed == b"".join(before) and tail.startswith(b"event: error\n")
    assert data["error"] == {"type": "overloaded_error", "message": "of ***", "code": 529}
    assert data["gateway_usage"] == {"cost": 0.5} and stream.has_failed and not stream.is_whole


@pytest.mark.parametrize("kind", ["authentication_error", "billing_error"])
def test_the_operator_s_trouble_is_told_to_no_client(kind: str) -> None:
    _, tail, _ = run(
        MESSAGES, [START, event("error", error={"type": kind, "message": "Add credits to your account"})]
    )
    assert datas(tail)[0]["error"] == {
        "type": "api_error",
        "message": "The gateway cannot serve requests at the moment.",
        "code": "upstream_unavailable",
    }
    failed = {
        **RESPONSE,
        "status": "failed",
        "error": {"code": "x", "message": "Add credits", "error_type": "payment_required"},
    }
    _, tail, _ = run(RESPONSES, [*OPENING, event("response.failed", response=failed)])
    assert b"Add credits" not in tail


def test_a_message_that_breaks_off_ends_with_an_error_of_anthropic_s_form() -> None:
    _, tail, stream = run(MESSAGES, [START, *TEXT], UpstreamError())
    (data,) = datas(tail)
    assert tail.startswith(b"event: error\n") and not stream.is_whole
    assert (
        data["type"] == "error" and data["error"]["type"] == "api_error" and data["request_id"] == "request-1"
    )
    assert data["gateway_usage"] == {"cost": 0.5}


# Errors in the streams of OpenRouter's clients.

CHUNK = (
    b'data: {"id":"gen-1","object":"chat.completion.chunk","created":1,"model":"a/b",'
    b'"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
)
FOR_CLIENTS = FOR_OPENROUTER[CHAT]


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        ({"code": "server_error", "message": "x"}, 502, "server_error"),
        ({"code": "rate_limit_exceeded", "message": "x"}, 429, "rate_limit_exceeded"),
        (
            {"code": "odd", "message": "x", "metadata": {"error_type": "provider_overloaded"}},
            503,
            "provider_overloaded",
        ),
        (
            {"code": 429, "message": "x", "metadata": {"error_type": "rate_limit_exceeded"}},
            429,
            "rate_limit_exceeded",
        ),
        ({"message": "x"}, 502, "upstream_error"),
        ({"code": None, "message": "x"}, 502, "upstream_error"),
        ({"code": 401, "message": "Add credits"}, 503, "upstream_unavailable"),
        (
            {"code": "x", "message": "Add credits", "metadata": {"error_type": "payment_required"}},
            503,
            "upstream_unavailable",
        ),
    ],
)
def test_every_code_that_openrouter_s_clients_see_is_a_number(
    error: dict[str, Any], code: int, kind: str
) -> None:
    data = {
        **orjson.loads(CHUNK[6:]),
        "error": error,
        "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}],
    }
    passed, tail, stream = run(FOR_CLIENTS, [CHUNK, b"data: " + orjson.dumps(data) + b"\n\n"])
    (shown,) = [event["error"] for event in datas(passed + tail) if "error" in event]
    assert (shown["code"], shown["metadata"]["error_type"]) == (code, kind)
    assert stream.has_failed and b"credits" not in passed + tail
    (plain,) = [
        event["error"]
        for event in datas(b"".join(run(CHAT, [CHUNK, b"data: " + orjson.dumps(data) + b"\n\n"])[:2]))
        if "error" in event
    ]
    assert plain["code"] == (
        error["code"] if isinstance(error.get("code"), int | str) and code != 503 else plain["code"]
    )


def test_our_own_error_in_a_stream_is_a_chunk_for_openrouter_s_clients() -> None:
    _, tail, _ = run(FOR_CLIENTS, [CHUNK], UpstreamTimeout())
    charged, failed = datas(tail)
    assert charged["gateway_usage"] == {"cost": 0.5} and tail.endswith(b"data: [DONE]\n\n")
    assert (failed["id"], failed["object"], failed["model"]) == ("gen-1", "chat.completion.chunk", "a/b")
    assert failed["choices"] == [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]
    assert (failed["error"]["code"], failed["error"]["metadata"]) == (504, {"error_type": "upstream_timeout"})
    assert failed["gateway"] == {"request_id": "request-1"}


def test_responses_name_errors_by_words_for_everybody() -> None:
    failed = {**RESPONSE, "status": "failed", "error": {"code": "server_error", "message": "x"}}
    events = [*OPENING, event("response.failed", response=failed)]
    assert run(FOR_OPENROUTER[RESPONSES], events)[:2] == run(RESPONSES, events)[:2]
    _, tail, _ = run(FOR_OPENROUTER[RESPONSES], OPENING, UpstreamError())
    (data,) = datas(tail)
    assert (data["type"], data["code"]) == ("error", "upstream_error")
    assert (data["error"]["code"], data["error"]["metadata"]) == (502, {"error_type": "upstream_error"})


def test_every_status_is_one_of_a_failure() -> None:
    assert all(400 <= status < 600 for status in STATUSES.values())


@pytest.mark.parametrize("dialect", [RESPONSES, MESSAGES])
def test_the_operator_is_named_nowhere(dialect: Dialect) -> None:
    events = (
        [
            event("response.created", response={**RESPONSE, "user_id": "operator"}, user_id="operator"),
            COMPLETED,
        ]
        if dialect is RESPONSES
        else [START.replace(b'"type":"message"', b'"type":"message","user_id":"operator"'), DELTA, STOP]
    )
    passed, tail, _ = run(dialect, events)
    assert b"operator" not in passed + tail and passed.startswith(events[0][: events[0].index(b"\n") + 1])


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(ALL), st.integers(min_value=0))
def test_any_bytes_are_survived(data: bytes, dialect: Dialect, place: int) -> None:
    place %= len(data) + 1
    prefix = b"event: x\ndata: "
    for raw in (data, prefix + data + b"\n\n"):
        assert run(dialect, [raw[:place], raw[place:]])[:2] == run(dialect, [raw])[:2]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        [
            "type",
            "response",
            "message",
            "error",
            "usage",
            "delta",
            "status",
            "id",
            "choices",
            "code",
            "input_tokens",
        ]
    ),
    JSON
    | st.dictionaries(
        st.sampled_from(["usage", "error", "type", "input_tokens", "stop_reason", "id", "message", "code"]),
        JSON,
        max_size=4,
    ),
    max_size=5,
)
KINDS = st.sampled_from(
    ["error", "response.error", "response.failed", "message_start", "message_delta", "message_stop"]
)


@settings(deadline=None)
@given(st.lists(st.tuples(FIELDS, KINDS | st.none()), max_size=4), st.sampled_from(ALL))
def test_any_json_is_survived(events: list[tuple[dict[str, Any], str | None]], dialect: Dialect) -> None:
    for fields, kind in events:
        data = fields if kind is None else {**fields, "type": kind}
        raw = orjson.dumps(data)
        Stream(sanitised_error, dialect).feed(b"data: " + raw + b"\n\n")
        with suppress(GatewayError):
            read_answer(raw, dialect, Outcome(), SANDBOX)
    run(dialect, [b"data: " + orjson.dumps(data) + b"\n\n" for data, _ in events])


# Whole answers.


def answer(dialect: Dialect, **data: Any) -> tuple[bytes, Outcome]:
    ending = Outcome()
    return read_answer(orjson.dumps(data), dialect, ending, SANDBOX), ending


def test_whole_answers_say_what_they_cost() -> None:
    raw, ending = answer(RESPONSES, **WHOLE)
    assert orjson.loads(raw) == WHOLE and ending.completed and ending.usage is not None
    assert (ending.finish_reason, ending.usage.cost, ending.generation_id) == (
        "completed",
        Decimal("0.25"),
        "gen-1",
    )
    usage = {"input_tokens": 7, "cache_read_input_tokens": 100, "output_tokens": 9}
    _, ending = answer(
        MESSAGES, id="gen-2", type="message", model="a/b", content=[], stop_reason="end_turn", usage=usage
    )
    assert ending.completed and ending.usage is not None and ending.usage.cost is None
    assert (ending.usage.prompt_tokens, ending.usage.cached_tokens, ending.finish_reason) == (
        107,
        100,
        "end_turn",
    )
    _, ending = answer(
        CHAT, id="gen-3", model="a/b", results=[], usage={"search_units": 1, "total_tokens": 8, "cost": 0.002}
    )
    assert ending.completed and ending.usage is not None and ending.usage.cost == Decimal("0.002")


@pytest.mark.parametrize(
    ("status", "completed"),
    [("completed", True), ("incomplete", True), ("failed", False), ("cancelled", False)],
)
def test_a_whole_response_s_status_says_how_it_ended(status: str, completed: bool) -> None:
    error = {"code": "server_error", "message": "of user_abcdefgh"} if status == "failed" else None
    raw, ending = answer(RESPONSES, **{**WHOLE, "status": status, "error": error})
    assert (ending.completed, ending.finish_reason) == (completed, status) and b"user_abcdefgh" not in raw


@pytest.mark.parametrize(
    ("dialect", "data", "status"),
    [
        (CHAT, {"error": {"code": 429, "message": "x"}}, 429),
        (RESPONSES, {"error": {"code": 429, "message": "x"}}, 429),
        (RESPONSES, {"error": {"code": "server_error", "message": "x"}}, 502),
        (MESSAGES, {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}, 429),
        (MESSAGES, {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, 503),
        (MESSAGES, {"type": "error", "error": {"type": "invalid_request_error", "message": "x"}}, 400),
        (MESSAGES, {"type": "error", "error": {"type": "billing_error", "message": "x"}}, 503),
        (MESSAGES, {"type": "error"}, 502),
    ],
)
def test_an_error_in_a_successful_answer_is_an_error(
    dialect: Dialect, data: dict[str, Any], status: int
) -> None:
    with pytest.raises(GatewayError) as caught:
        answer(dialect, **data)
    assert caught.value.status == status


def test_what_an_answer_says_of_itself_starts_empty() -> None:
    assert AnswerState().counts is not AnswerState().counts


# Anthropic's names for our errors.


def leaves(kind: type[GatewayError]) -> list[type[GatewayError]]:
    return [kind, *(leaf for each in kind.__subclasses__() for leaf in leaves(each))]


NAMES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    504: "timeout_error",
}


@pytest.mark.parametrize("kind", [kind for kind in leaves(GatewayError) if kind is not UpstreamRefused])
def test_every_error_has_a_name_in_anthropic_s_form(kind: type[GatewayError]) -> None:
    error = kind("What happened.", param="model")
    body = error.anthropic_body("request-1")
    assert set(body) == {"type", "error", "request_id"} and (body["type"], body["request_id"]) == (
        "error",
        "request-1",
    )
    assert body["error"] == {
        "type": error.anthropic_type,
        "message": "What happened.",
        "param": "model",
        "code": kind.code,
    }
    assert error.anthropic_type == NAMES.get(kind.status, error.anthropic_type)


def test_busy_models_are_overloaded_and_a_broken_gateway_is_not() -> None:
    assert UpstreamUnavailable().anthropic_type == "overloaded_error"
    assert DatabaseUnavailable().anthropic_type == "api_error"
    for status, name in NAMES.items():
        if 400 <= status < 500:
            assert UpstreamRefused(status=status).anthropic_type == name
    assert UpstreamRefused(status=422).anthropic_type == "invalid_request_error"


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_message_names_no_citations_where_it_has_none(separators: tuple[str, str]) -> None:
    citation = {"type": "char_location", "cited_text": "x"}
    tool = {"type": "tool_use", "id": "t", "name": "n", "input": {"type": "text", "citations": None}}
    content = [
        {"type": "text", "text": '"citations":null', "citations": None},
        {"type": "text", "text": "b", "citations": [citation]},
        tool,
    ]
    message = {
        "id": "gen-1",
        "type": "message",
        "content": content,
        "usage": {"input_tokens": 1, "output_tokens": 1, "cost": 1e-9},
    }
    raw = json.dumps(message, separators=separators).encode()
    message_sent = json.loads(read_answer(raw, MESSAGES, Outcome(), RequestOrigin()))
    assert message_sent == {
        **message,
        "content": [{"type": "text", "text": '"citations":null'}, content[1], tool],
    }


@pytest.mark.parametrize(
    "value",
    ["1" + "0" * 60, "1e999", "-0.12345678901234567890123", '"\\ud83d\\ude00 \\u0000 é"'],
    ids=["long", "huge", "fine", "text"],
)
def test_what_a_tool_is_called_with_stays_as_it_is_where_citations_go(value: str) -> None:
    usage = '"usage":{"input_tokens":1,"output_tokens":1,"cost":0.000000001}'
    text, tool = (
        '{"type":"text","text":"a"%s}',
        f'{{"type":"tool_use","id":"t","name":"n","input":{{"x":{value}}}}}',
    )
    raw, expected = (
        f'{{"id":"gen-1","type":"message","content":[{text % name},{tool}],{usage}}}'
        for name in (',"citations":null', "")
    )
    sent = read_answer(raw.encode(), MESSAGES, Outcome(), RequestOrigin())
    written = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
    assert written.decode(sent.decode()) == written.decode(expected)


@pytest.mark.parametrize("value", ['"\\ud800"', "[" * 300 + "]" * 300], ids=["half a surrogate", "deep"])
def test_what_cannot_be_rewritten_passes_unchanged(value: str) -> None:
    tool = f'{{"type":"tool_use","id":"t","name":"n","input":{{"x":{value}}}}}'
    content = f'[{{"type":"text","text":"a","citations":null}},{tool}]'
    usage = '{"input_tokens":1,"output_tokens":1}'
    raw = f'{{"id":"gen-1","type":"message","content":{content},"usage":{usage}}}'.encode()
    assert read_answer(raw, MESSAGES, Outcome(), RequestOrigin()) == raw
