"""Server-sent events pass through unchanged, in whatever pieces they arrive, except for what must change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.proxy.dialects.chat import CHAT, usage_event
from gateway.proxy.sse import with_field
from gateway.proxy.stream import MAX_EVENT_BYTES, EventTooLarge, Stream


def shown(error: Mapping[str, Any]) -> dict[str, Any]:
    return {"message": "sanitised", "code": str(error.get("code"))[:9]}


def run(pieces: Iterable[bytes]) -> tuple[bytes, Stream]:
    stream = Stream(shown)
    out = b"".join([stream.feed(piece) for piece in pieces]) + stream.end()
    return out, stream


def split(data: bytes, places: Iterable[int]) -> list[bytes]:
    cuts = sorted({place % (len(data) + 1) for place in places})
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def chunk(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps({"id": "gen-1", "model": "a/b", "provider": "OpenAI", **fields}) + b"\n\n"


def delta(text: str, finish: str | None = None) -> bytes:
    return chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "cost": 0.5}
EVENTS = [
    delta("Hi"),
    delta('he said "usage" and "error" and data: [DONE]\n\n'),
    delta("żółć 🎈"),
    delta("", "stop"),
    chunk(
        choices=[
            {
                "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"usage":'}}]},
                "finish_reason": None,
            }
        ]
    ),
    chunk(
        choices=[
            {
                "delta": {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
                "finish_reason": None,
            }
        ]
    ),
    chunk(choices=[], usage=USAGE),
    chunk(choices=[{"delta": {}, "finish_reason": "stop"}], usage=USAGE),
    chunk(choices=[], usage=None),
    chunk(choices=[], usage={"cost": None}),
    chunk(choices=[], error={"code": 429, "message": "no"}),
    chunk(choices=[], error="text"),
    chunk(choices=[], user_id="user_operator"),
    b": OPENROUTER PROCESSING\n\n",
    b"data: : OPENROUTER PROCESSING\n\n",
    b"event: message\nid: 5\ndata: {}\n\n",
    b'data: {"id":"gen-2",\ndata: "choices":[]}\n\n',
    b"data: [DONE]\n\n",
    b"data:[DONE]\n\n",
    b"\n\n",
    b"retry: 5\n\n",
    b"data: {broken\n\n",
    b"\xef\xbb\xbfdata: {}\n\n",
    b'data: {"cost":NaN,"choices":[{"finish_reason": "stop"}]}\n\n',
]
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
STREAMS = st.lists(st.tuples(st.sampled_from(EVENTS), LINE_ENDS), max_size=8).map(
    lambda events: b"".join(event.replace(b"\n", end) for event, end in events)
)
PLACES = st.lists(st.integers(min_value=0), max_size=12)


@given(STREAMS, PLACES)
@example(b"data: {}\r\n\r\ndata: {}\r\n\r\n", [9, 10, 11])
@example(b"data: {}\r\r" + EVENTS[0], [9, 10])
@example(EVENTS[0] + EVENTS[17] + EVENTS[1], [len(EVENTS[0]) + len(EVENTS[17])])
def test_any_splitting_gives_the_same_output_as_none(data: bytes, places: list[int]) -> None:
    whole, one = run([data])
    parts, other = run(split(data, places))
    assert parts == whole
    names = ("usage", "error", "done", "held", "finish_reason", "body_id", "model", "provider")
    assert {name: getattr(one, name) for name in names} == {name: getattr(other, name) for name in names}


@given(st.binary(max_size=300), PLACES)
def test_any_bytes_at_all_are_survived_and_split_alike(data: bytes, places: list[int]) -> None:
    assert run(split(data, places))[0] == run([data])[0]


@given(
    st.lists(st.sampled_from([*EVENTS[:6], EVENTS[8], *EVENTS[13:16], *EVENTS[19:21]]), max_size=8), PLACES
)
def test_events_pass_to_the_byte_where_nothing_must_change(events: list[bytes], places: list[int]) -> None:
    data = b"".join(events)
    assert run(split(data, places))[0] == data


@given(
    st.lists(
        st.sampled_from([EVENTS[6], EVENTS[7], EVENTS[9], EVENTS[0], EVENTS[13]]), min_size=1, max_size=8
    ),
    PLACES,
)
def test_usage_waits_for_the_next_event_and_only_the_last_is_held(
    events: list[bytes], places: list[int]
) -> None:
    data = b"".join([*events, EVENTS[17]])
    out, stream = run(split(data, places))
    datas = [event for event in events if event.startswith(b"data:")]
    last_is_usage = bool(datas) and b'"usage"' in datas[-1]
    assert stream.done
    assert stream.held == (datas[-1] if last_is_usage else None)
    assert sorted([*out.split(b"\n\n"), *(stream.held or b"").split(b"\n\n")]) == sorted(
        [*b"".join(events).split(b"\n\n"), b""]
    )
    if any(b'"usage"' in event for event in datas):
        assert stream.usage is not None
        assert (stream.usage.cost is None) == (
            next(e for e in reversed(datas) if b'"usage"' in e) == EVENTS[9]
        )


def test_the_end_completes_an_event_that_lacks_its_blank_line_and_drops_half_a_one() -> None:
    assert run([EVENTS[0] + EVENTS[1][:-2]])[0] == EVENTS[0] + EVENTS[1]
    assert run([EVENTS[0] + EVENTS[1][:-9]])[0] == EVENTS[0]
    assert run([b"data:[DONE]"])[1].done
    assert run([EVENTS[0], EVENTS[6][:-1]])[1].held == EVENTS[6]


def test_nothing_passes_after_the_end() -> None:
    out, stream = run([EVENTS[0], b"data: [DONE]\n\n", EVENTS[1], b": comment\n\n", EVENTS[6]])
    assert out == EVENTS[0] and stream.usage is None


def test_what_a_stream_says_of_itself_is_noted_with_and_without_spaces() -> None:
    for event in (
        b'data: {"id": "x", "choices": [{"finish_reason": "length"}]}\n\n',
        b'data: {"choices":[{"finish_reason":"length"}]}\n\n',
    ):
        assert run([EVENTS[0], event])[1].finish_reason == "length"
    _, stream = run([b"data: : comment\n\n", EVENTS[0]])
    assert (stream.body_id, stream.model, stream.provider) == ("gen-1", "a/b", "OpenAI")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_errors_lose_what_must_not_be_shown(end: bytes) -> None:
    event = chunk(
        choices=[{"error": {"message": "s3cret"}}],
        error={"message": "s3cret", "metadata": {"raw": "s3cret"}},
        user_id="s3cret",
    )
    out, stream = run([EVENTS[0], event.replace(b"\n", end)])
    assert b"s3cret" not in out and out.count(b"sanitised") == 2
    assert stream.error == {"message": "sanitised", "code": "None"}


def test_an_event_too_large_ends_the_stream_before_memory_does() -> None:
    stream, megabyte = Stream(shown), b"x" * (1 << 20)
    for _ in range(MAX_EVENT_BYTES // len(megabyte)):
        assert stream.feed(megabyte) == b""
    with pytest.raises(EventTooLarge):
        stream.feed(megabyte)
    many = EVENTS[13] + EVENTS[0] * (MAX_EVENT_BYTES // len(EVENTS[0]))
    assert Stream(shown).feed(many) == many  # many events are no large one


def test_the_accounting_event_is_the_held_one_or_one_of_our_own() -> None:
    _, stream = run([EVENTS[0]])
    own = orjson.loads(usage_event(None, stream, b'{"cost":0}').removeprefix(b"data: "))
    assert own == {
        "id": "gen-1",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "a/b",
        "choices": [],
        "gateway_usage": {"cost": 0},
    }
    held = usage_event(b'data: {"usage":\r\ndata: {}}\r\n\r\n', stream, b'{"cost":0}')
    assert held == b'data: {"usage": {},"gateway_usage":{"cost":0}}\n\n'


@given(
    st.dictionaries(st.text(), st.integers(min_value=-(2**53), max_value=2**53) | st.text()),
    st.sampled_from([b"", b" ", b"\n\t "]),
)
def test_a_field_is_added_and_the_rest_stays(fields: dict[str, Any], space: bytes) -> None:
    fields.pop("own", None)
    event = with_field(space + orjson.dumps(fields) + space, "own", b"[1]")
    assert orjson.loads(event) == {**fields, "own": [1]}


def test_a_body_without_secrets_stays_as_it_is() -> None:
    for raw in (b'{"a": "NaN and Infinity"}', b'{"error": null, "choices": 5}', b'{ "x" : "\\ud800" }'):
        assert CHAT.without_secrets(raw, shown) is raw
    assert orjson.loads(CHAT.without_secrets(b'{"cost":NaN,"debug":1}', shown)) == {"cost": None}
