"""Chat and text completions. Where an answer, a stream and an error keep usage, cost, and their end.

`Dialect` itself speaks for chat and text completions, and for everything that answers with one JSON object
and its `usage`. It knows nothing of accounts or databases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from common.errors import GatewayError
from gateway.proxy.dialects.base import AnswerState, EventAction, Sanitise, as_object, note_origin
from gateway.proxy.sse import DONE, with_charge, with_field
from gateway.upstream.usage import read_integer, read_text, read_usage

FINISHED = re.compile(rb'"finish_reason"(?!:null)')


# What clients do not get to see: the operator's account, and numbers that are no JSON.
HIDDEN = ("user_id", "openrouter_metadata", "debug")
MARKS = (*(b'"' + name.encode() + b'"' for name in (*HIDDEN, "error")), b"NaN", b"Infinity")


class Dialect:
    """One of the upstream's APIs. This is chat completions'; the others say what differs."""

    # Chunks that begin so and hold nothing remarkable pass unparsed, whole runs of events at once.
    # Keys stand in quotes, so that no text that a model writes is taken for one.
    starts: bytes | tuple[bytes, ...] = b"data:"
    remarkable: tuple[bytes, ...] = (b'"usage"', b'"error"', b'"user_id"', b"[DONE]", b"\r")
    marks: tuple[bytes, ...] = MARKS  # without one of these there is nothing to hide
    is_anthropic = False

    def plain_until(self, chunk: bytes) -> int:
        """Where the first thing stands that we would have to look at; the chunk's length where there is none."""
        end = self._marked(chunk)
        if chunk.count(b'"finish_reason"', 0, end) != chunk.count(b'"finish_reason":null', 0, end):
            finished = FINISHED.search(chunk, 0, end)
            end = finished.start() if finished else end
        return end

    def _marked(self, chunk: bytes) -> int:
        end = len(chunk)
        for (
            mark
        ) in self.remarkable:  # each by itself: a search for all of them at once takes ten times as long
            found = chunk.find(mark, 0, end)
            end = end if found < 0 else found
        return end

    def is_plain(self, event: bytes) -> bool:
        """Nothing in this event that we would have to look at."""
        return (
            b'"usage"' not in event
            and b'"error"' not in event
            and b'"user_id"' not in event
            and event.count(b'"finish_reason"') == event.count(b'"finish_reason":null')
        )

    def read(self, data: Mapping[str, Any], state: AnswerState, sanitise: Sanitise) -> EventAction:
        """Notes what one event, or a whole answer, says of itself."""
        note_origin(data, state)
        _note_ends(data.get("choices"), state)
        if error := data.get("error"):
            state.error = sanitise(as_object(error))
        found = read_usage(data.get("usage"))
        state.usage = found or state.usage
        return EventAction.PASS if found is None else EventAction.HOLD

    def is_whole(self, state: AnswerState) -> bool:
        """Whether the answer in a stream has come to its end, whatever may follow."""
        return state.finish_reason is not None and len(state.ended_choices) >= state.choices

    def has_failed(self, state: AnswerState) -> bool:
        """Whether the answer says itself that it failed."""
        return state.error is not None or state.finish_reason == "error"

    def is_error(self, data: Mapping[str, Any]) -> bool:
        """Whether a whole body is nothing but an error."""
        return bool(data.get("error")) and not data.get("choices")

    def error_of(self, error: Mapping[str, Any]) -> Mapping[str, Any]:
        """An `error` object with its status as a `code`, as the other dialects have it."""
        return error

    def parts(self, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of an answer that may name the operator or hold an `error`."""
        yield data
        choices = data.get("choices")
        yield from (part for part in (choices if isinstance(choices, list) else ()) if isinstance(part, dict))

    def show_error(self, error: Mapping[str, Any], sanitise: Sanitise) -> dict[str, Any]:
        """An upstream's error as clients may see it."""
        return sanitise(error)

    def without_secrets(self, raw: bytes, sanitise: Sanitise) -> bytes:
        """A JSON object as clients may see it: the same bytes, unless it holds an error, the operator's
        identity or NaN.
        """
        if not any(mark in raw for mark in self.marks):
            return raw
        constants: list[str] = []
        data = json.loads(raw, parse_constant=constants.append, parse_int=read_integer)
        changed = [*constants, *(name for part in self.parts(data) for name in self._clean(part, sanitise))]
        return json.dumps(data, separators=(",", ":")).encode() if changed else raw

    def _clean(self, part: dict[str, Any], sanitise: Sanitise) -> list[str]:
        changed = [name for name in HIDDEN if name in part]
        for name in changed:
            del part[name]
        if part.get("error"):
            part["error"] = self.show_error(as_object(part["error"]), sanitise)
            changed.append("error")
        return changed

    def tail(
        self,
        state: AnswerState,
        held: bytes | None,
        last: bytes,
        gateway_usage: bytes,
        failure: GatewayError | None,
        request_id: str,
    ) -> bytes:
        """The last bytes of a stream: its accounting, with `gateway_usage`, and our error where there is one."""
        parts = [usage_event(held, state, gateway_usage)]
        if failure is not None:
            parts.append(
                b"data: "
                + orjson.dumps(self.failure_event(failure, state, request_id), default=str)
                + b"\n\n"
            )
        return b"".join((*parts, DONE))

    def failure_event(self, failure: GatewayError, state: AnswerState, request_id: str) -> dict[str, Any]:
        """Our own error, as an event of a stream."""
        return failure.body(request_id)


def usage_event(held: bytes | None, state: AnswerState, gateway_usage: bytes) -> bytes:
    """The event that ends a chat stream's accounting: the held one with `gateway_usage`, or one of our own
    with empty choices.
    """
    if held is not None:
        return with_charge(held, gateway_usage)
    return b"data: " + with_field(orjson.dumps(own_chunk(state)), "gateway_usage", gateway_usage) + b"\n\n"


def own_chunk(state: AnswerState, choices: tuple[Mapping[str, Any], ...] = ()) -> dict[str, Any]:
    """A chunk of a chat stream that is ours."""
    return {
        "id": state.body_id or "gen-unknown",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": state.model or "",
        "choices": choices,
    }


def _note_ends(choices: object, state: AnswerState) -> None:
    """Which choices have ended and why: the first one's reason is told, but for that of one that failed."""
    for choice in reversed(choices) if isinstance(choices, list) else ():
        reason = read_text(choice.get("finish_reason")) if isinstance(choice, dict) else None
        if reason is not None:
            state.ended_choices.add(repr(choice.get("index")))
            state.finish_reason = state.finish_reason if state.finish_reason == "error" else reason


CHAT = Dialect()
