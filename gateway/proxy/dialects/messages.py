"""Anthropic Messages: https://docs.anthropic.com/en/docs/build-with-claude/streaming.

`message_start` holds the prompt's tokens; `message_delta` holds the finish reason and the output's tokens so
far, and `message_stop` ends the stream. `ping` may come anywhere. An `error` event may be the last one; its
errors have a type in place of a status (https://docs.anthropic.com/en/api/errors). OpenRouter writes `cost`
into the usage, which Anthropic's schema does not have: where it is missing, /generation is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import orjson

from common.errors import ANTHROPIC_TYPES, GatewayError
from common.json_types import Json, JsonObject
from gateway.proxy.dialects.base import AnswerState, EventAction, Sanitise, as_object, note_origin
from gateway.proxy.dialects.chat import Dialect
from gateway.proxy.dialects.named import NamedEvents, answer_in
from gateway.upstream.usage import Usage, read_text, read_usage

# Anthropic's error types that concern the request, and not the operator's account.
SHOWN_TYPES = frozenset((*ANTHROPIC_TYPES.values(), "api_error")) - {"authentication_error", "billing_error"}
STATUS_OF_TYPE = {kind: status for status, kind in ANTHROPIC_TYPES.items()}
NULL_CITATIONS = (b'"citations":null', b'"citations": null')
PROMPT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Messages(NamedEvents):
    """Usage comes in two parts; the second waits for the settlement, and `message_stop` behind it."""

    remarkable = (*Dialect.remarkable, b"message_start", b"message_delta", b"message_stop", b'"ping"')
    usage_event_name = b"ping"  # which every client takes, with fields that it does not know
    is_anthropic = True

    def read(self, data: JsonObject, state: AnswerState, sanitise: Sanitise) -> EventAction:
        message, kind = answer_in(data, "message"), read_text(data.get("type"))
        note_origin(message, state)
        _note_usage(message.get("usage"), state)
        _note_usage(data.get("usage"), state)
        delta = data.get("delta") if kind == "message_delta" else None
        reason = (delta if isinstance(delta, dict) else message).get("stop_reason")
        state.finish_reason = read_text(reason) or state.finish_reason
        if error := data.get("error"):
            state.error = self.show_error(as_object(error), sanitise)
        state.ended = state.ended or kind == "message_stop"
        return _action(data, kind)

    def is_whole(self, state: AnswerState) -> bool:
        return state.ended or state.finish_reason is not None

    def has_failed(self, state: AnswerState) -> bool:
        return state.error is not None

    def is_error(self, data: JsonObject) -> bool:
        return data.get("type") == "error" or (bool(data.get("error")) and data.get("content") is None)

    def with_status(self, error: JsonObject) -> JsonObject:
        status = STATUS_OF_TYPE.get(str(error.get("type")))
        return error if status is None or error.get("code") is not None else {**error, "code": status}

    def revealing_parts(self, data: dict[str, Json]) -> Iterator[dict[str, Json]]:
        yield data
        if isinstance(message := data.get("message"), dict):
            yield message

    def without_secrets(self, raw: bytes, sanitise: Sanitise) -> bytes:
        return without_null_citations(super().without_secrets(raw, sanitise))

    def show_error(self, error: JsonObject, sanitise: Sanitise) -> dict[str, Json]:
        shown = sanitise(self.with_status(error))
        kind, code = error.get("type"), shown["code"]
        if not isinstance(kind, str) or kind not in SHOWN_TYPES:
            kind = ANTHROPIC_TYPES.get(code, "api_error") if isinstance(code, int) else "api_error"
        return {"type": kind, "message": shown["message"], "code": code}

    def failure_data(self, failure: GatewayError, state: AnswerState, request_id: str) -> dict[str, Json]:
        return failure.anthropic_body(request_id)


def _action(data: JsonObject, kind: str | None) -> EventAction:
    if kind == "message_stop":
        return EventAction.TRAIL
    if kind == "ping":  # may come between the bill and the end, and must not release the bill
        return EventAction.PASS_BESIDE
    has_usage = kind == "message_delta" and data.get("usage")
    return EventAction.HOLD if data.get("error") or has_usage else EventAction.PASS


def _note_usage(usage: Json, state: AnswerState) -> None:
    """Adds a part of the usage to the parts before it. Counts are totals so far: the latest one is right."""
    if isinstance(usage, dict):
        state.counts |= {name: count for name, count in usage.items() if count is not None}
        state.usage = read_message_usage(state.counts)


def without_null_citations(raw: bytes) -> bytes:
    """A whole message without `citations` in text blocks where that is null; everything else is unchanged.

    OpenRouter writes null where Anthropic writes nothing, and some of Anthropic's clients reject null
    (Vercel's AI SDK).
    """
    if not any(mark in raw for mark in NULL_CITATIONS):
        return raw
    try:
        # Numbers stay as they are written: a tool's arguments may hold one that a float would round.
        message = json.loads(raw, parse_int=orjson.Fragment, parse_float=orjson.Fragment)
        blocks = _blocks_with_null_citations(message.get("content"))
        for block in blocks:
            del block["citations"]
        return orjson.dumps(message) if blocks else raw
    except (orjson.JSONEncodeError, RecursionError):
        return raw  # it has lone surrogates, or a depth, that no strict encoder takes


def _blocks_with_null_citations(content: Json) -> list[dict[str, Json]]:
    """Text blocks only: a tool's input may have a field of this name."""
    return [
        block
        for block in (content if isinstance(content, list) else ())
        if isinstance(block, dict) and block.get("type") == "text"
        if "citations" in block and block["citations"] is None
    ]


def read_message_usage(counts: JsonObject) -> Usage | None:
    """Anthropic's usage, in which `input_tokens` leaves out what was written to and read from the cache."""
    parts = [counts.get(name) or 0 for name in PROMPT_COUNTS]
    known = [part for part in parts if isinstance(part, int) and not isinstance(part, bool) and part >= 0]
    usage: dict[str, Json] = {
        **counts,
        # A sum of fewer parts would be too small: then the prompt's tokens are unknown.
        "prompt_tokens": sum(known) if len(known) == len(parts) else None,
        "prompt_tokens_details": {"cached_tokens": counts.get("cache_read_input_tokens")},
    }
    return read_usage(usage)


MESSAGES = Messages()
