"""Chat and text completions: https://openrouter.ai/docs/api-reference/streaming.

A stream has unnamed events, each a chunk of the answer. Its last chunk holds `usage`, with empty `choices` or
the last ones; then comes `[DONE]`. A provider that fails in mid-stream sends a chunk with `error` and the
finish reason "error". `Dialect` also reads every whole answer that is one JSON object with `usage`:
embeddings, rerank, images and transcriptions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import orjson

from common.errors import GatewayError
from common.json_types import Json, JsonObject
from gateway.proxy.dialects.base import (
    AnswerState,
    EventAction,
    Sanitise,
    StreamEnd,
    as_object,
    note_origin,
)
from gateway.proxy.sse import DONE, data_event, with_charge, with_field
from gateway.upstream.usage import read_integer, read_text, read_usage

FINISH_REASON = re.compile(rb'"finish_reason"(?!:null)')
# Fields that name or describe the operator's account. No client sees them.
HIDDEN = ("user_id", "openrouter_metadata", "debug")
# Without one of these there is nothing to hide: the fields above, errors, and numbers that are not JSON.
HIDDEN_MARKS = (*(b'"' + name.encode() + b'"' for name in (*HIDDEN, "error")), b"NaN", b"Infinity")


class Dialect:
    """One of the upstream's APIs: chat completions. The others override what differs."""

    # A chunk that begins so and has nothing remarkable in it passes unparsed, whole runs of events at once.
    # The names are searched with their quotes: inside a string that a model writes, quotes are escaped.
    starts: bytes | tuple[bytes, ...] = b"data:"
    remarkable: tuple[bytes, ...] = (b'"usage"', b'"error"', b'"user_id"', b"[DONE]", b"\r")
    hidden_marks: tuple[bytes, ...] = HIDDEN_MARKS
    is_anthropic = False

    def plain_until(self, chunk: bytes) -> int:
        """The position of the first thing in a chunk that must be parsed; its length where there is none."""
        end = self._first_remarkable(chunk)
        if chunk.count(b'"finish_reason"', 0, end) != chunk.count(b'"finish_reason":null', 0, end):
            finish = FINISH_REASON.search(chunk, 0, end)
            end = finish.start() if finish else end
        return end

    def _first_remarkable(self, chunk: bytes) -> int:
        end = len(chunk)
        # Each by itself: a search for all of them at once takes ten times as long.
        for mark in self.remarkable:
            position = chunk.find(mark, 0, end)
            end = end if position < 0 else position
        return end

    def is_plain(self, event: bytes) -> bool:
        """Whether nothing in this event has to be parsed."""
        # Written out: a loop over `remarkable` takes a quarter longer, and this runs for every event.
        return (
            b'"usage"' not in event
            and b'"error"' not in event
            and b'"user_id"' not in event
            and event.count(b'"finish_reason"') == event.count(b'"finish_reason":null')
        )

    def read(self, data: JsonObject, state: AnswerState, sanitise: Sanitise) -> EventAction:
        """Notes what one event, or a whole answer, says of itself."""
        note_origin(data, state)
        _note_finish_reasons(data.get("choices"), state)
        if error := data.get("error"):
            state.error = sanitise(as_object(error))
        usage = read_usage(data.get("usage"))
        state.usage = usage or state.usage
        # Usage may be a running count: only the next event shows that this one was not the last.
        return EventAction.PASS if usage is None else EventAction.HOLD

    def is_whole(self, state: AnswerState) -> bool:
        """Whether the answer in a stream has come to its end, whatever may follow."""
        return state.finish_reason is not None and len(state.ended_choices) >= state.choices

    def has_failed(self, state: AnswerState) -> bool:
        """Whether the answer says itself that it failed."""
        return state.error is not None or state.finish_reason == "error"

    def is_error(self, data: JsonObject) -> bool:
        """Whether a whole body is nothing but an error."""
        return bool(data.get("error")) and not data.get("choices")

    def with_status(self, error: JsonObject) -> JsonObject:
        """An `error` object whose `code` is its status, where the API's own errors have none."""
        return error

    def revealing_parts(self, data: dict[str, Json]) -> Iterator[dict[str, Json]]:
        """The objects of an answer that may name the operator or hold an `error`."""
        yield data
        choices = data.get("choices")
        yield from (part for part in (choices if isinstance(choices, list) else ()) if isinstance(part, dict))

    def show_error(self, error: JsonObject, sanitise: Sanitise) -> dict[str, Json]:
        """An upstream's error as clients may see it."""
        return sanitise(error)

    def without_secrets(self, raw: bytes, sanitise: Sanitise) -> bytes:
        """A JSON object as clients may see it: the same bytes, unless it holds an error, the operator's
        identity or NaN.
        """
        if not any(mark in raw for mark in self.hidden_marks):
            return raw
        constants: list[str] = []
        # `append` returns None, so that NaN and infinities, which are not JSON, become null.
        data = json.loads(raw, parse_constant=constants.append, parse_int=read_integer)
        parts = self.revealing_parts(data)
        changed = [*constants, *(name for part in parts for name in self._clean(part, sanitise))]
        return json.dumps(data, separators=(",", ":")).encode() if changed else raw

    def _clean(self, part: dict[str, Json], sanitise: Sanitise) -> list[str]:
        """Cleans an object in place; returns the names of the fields that changed."""
        changed = [name for name in HIDDEN if name in part]
        for name in changed:
            del part[name]
        if error := part.get("error"):
            part["error"] = self.show_error(as_object(error), sanitise)
            changed.append("error")
        return changed

    def write_end(self, state: AnswerState, end: StreamEnd) -> bytes:
        """The last bytes of a stream: the charge, and our error where the request failed."""
        usage = usage_event(end.held, state, end.gateway_usage)
        if end.failure is None:
            return usage + DONE
        failure = self.failure_data(end.failure, state, end.request_id)
        return usage + data_event(write_failure(failure)) + DONE

    def failure_data(self, failure: GatewayError, state: AnswerState, request_id: str) -> dict[str, Json]:
        """The data of an event that tells the client of our own error."""
        return failure.body(request_id)


def write_failure(failure: dict[str, Json]) -> bytes:
    """An error of ours as JSON. Amounts in its details are exact decimals, and are written as text."""
    return orjson.dumps(failure, default=str)


def usage_event(held: bytes | None, state: AnswerState, gateway_usage: bytes) -> bytes:
    """The event of a chat stream with the charge: the held one, or one of our own with empty choices."""
    if held is not None:
        return with_charge(held, gateway_usage)
    return data_event(with_field(orjson.dumps(own_chunk(state)), "gateway_usage", gateway_usage))


def own_chunk(state: AnswerState, *choices: Json) -> dict[str, Json]:
    """A chunk of a chat stream that is ours, with every field that clients' SDKs require."""
    return {
        "id": state.body_id or "gen-unknown",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": state.model or "",
        "choices": [*choices],
    }


def _note_finish_reasons(choices: Json, state: AnswerState) -> None:
    """Notes which choices have ended, and why: the reason of the first one, unless one has failed."""
    for choice in reversed(choices) if isinstance(choices, list) else ():
        if isinstance(choice, dict) and (reason := read_text(choice.get("finish_reason"))) is not None:
            # As text: an index that is wrong may be a list, which cannot be in a set.
            state.ended_choices.add(repr(choice.get("index")))
            state.finish_reason = state.finish_reason if state.finish_reason == "error" else reason


CHAT = Dialect()
