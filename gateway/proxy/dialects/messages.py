"""Anthropic Messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from common.errors import ANTHROPIC_TYPES, GatewayError
from gateway.proxy.dialects.base import AnswerState, EventAction, Sanitise, as_object, note_origin
from gateway.proxy.dialects.chat import Dialect
from gateway.proxy.dialects.named import Named, envelope, event
from gateway.proxy.sse import with_charge, with_field
from gateway.upstream.usage import Usage, read_text, read_usage

# Those of Anthropic's error types that speak of the request, and not of the operator's account.
SHOWN_TYPES = frozenset((*ANTHROPIC_TYPES.values(), "api_error")) - {"authentication_error", "billing_error"}
NO_CITATIONS = (b'"citations":null', b'"citations": null')


class Messages(Named):
    """Anthropic's Messages: the prompt's tokens in the first event, the answer's in `message_delta`, then
    `message_stop`.
    """

    remarkable = (*Dialect.remarkable, b"message_start", b"message_delta", b"message_stop", b'"ping"')
    is_anthropic = True

    def read(self, data: Mapping[str, Any], state: AnswerState, sanitise: Sanitise) -> EventAction:
        answer, kind = envelope(data, "message"), read_text(data.get("type"))
        note_origin(answer, state)
        for usage in (answer.get("usage"), data.get("usage")):
            if isinstance(usage, dict):
                state.counts |= {name: value for name, value in usage.items() if value is not None}
                state.usage = read_message_usage(state.counts)
        delta = data.get("delta") if kind == "message_delta" else None
        reason = (delta if isinstance(delta, dict) else answer).get("stop_reason")
        state.finish_reason = read_text(reason) or state.finish_reason
        if error := data.get("error"):
            state.error = self.show_error(as_object(error), sanitise)
        state.ended = state.ended or kind == "message_stop"
        return self._action(data, kind)

    def _action(self, data: Mapping[str, Any], kind: str | None) -> EventAction:
        if kind == "message_stop":
            return EventAction.TRAIL
        if kind == "ping":
            return EventAction.PASS_BESIDE
        return (
            EventAction.HOLD
            if data.get("error") or (kind == "message_delta" and data.get("usage"))
            else EventAction.PASS
        )

    def is_whole(self, state: AnswerState) -> bool:
        return state.ended or state.finish_reason is not None

    def has_failed(self, state: AnswerState) -> bool:
        return state.error is not None

    def is_error(self, data: Mapping[str, Any]) -> bool:
        return data.get("type") == "error" or (bool(data.get("error")) and data.get("content") is None)

    def error_of(self, error: Mapping[str, Any]) -> Mapping[str, Any]:
        statuses = {kind: status for status, kind in ANTHROPIC_TYPES.items()}
        status = statuses.get(str(error.get("type")))
        return error if status is None or error.get("code") is not None else {**error, "code": status}

    def parts(self, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield data
        if isinstance(data.get("message"), dict):
            yield data["message"]

    def without_secrets(self, raw: bytes, sanitise: Sanitise) -> bytes:
        return without_null_citations(super().without_secrets(raw, sanitise))

    def show_error(self, error: Mapping[str, Any], sanitise: Sanitise) -> dict[str, Any]:
        shown = sanitise(self.error_of(error))
        kind, code = error.get("type"), shown["code"]
        if not isinstance(kind, str) or kind not in SHOWN_TYPES:
            kind = ANTHROPIC_TYPES.get(code, "api_error") if isinstance(code, int) else "api_error"
        return {"type": kind, "message": shown["message"], "code": code}

    def tail(
        self,
        state: AnswerState,
        held: bytes | None,
        last: bytes,
        gateway_usage: bytes,
        failure: GatewayError | None,
        request_id: str,
    ) -> bytes:
        parts = [] if held is None else [with_charge(held, gateway_usage)]
        if failure is not None:
            data = orjson.dumps(failure.anthropic_body(request_id), default=str)
            parts.append(event(b"error", data if parts else with_field(data, "gateway_usage", gateway_usage)))
        elif not parts:  # a ping, which every client takes
            parts.append(event(b"ping", with_field(b'{"type":"ping"}', "gateway_usage", gateway_usage)))
        return b"".join((*parts, last))


def without_null_citations(raw: bytes) -> bytes:
    """A whole message whose text blocks name no citations where they have none; everything else as it came.

    OpenRouter writes null where Anthropic writes nothing, and some of Anthropic's clients take no null
    (Vercel's AI SDK).
    """
    if not any(mark in raw for mark in NO_CITATIONS):
        return raw
    try:
        # Numbers stay as they are written: what a tool is called with may be longer than a float.
        data = json.loads(raw, parse_int=orjson.Fragment, parse_float=orjson.Fragment)
        content = data.get("content")
        blocks = [
            block for block in (content if isinstance(content, list) else ()) if isinstance(block, dict)
        ]
        bare = [
            block
            for block in blocks
            if block.get("type") == "text" and "citations" in block and block["citations"] is None
        ]
        for block in bare:
            del block["citations"]
        return orjson.dumps(data) if bare else raw
    except (
        orjson.JSONEncodeError,
        RecursionError,
    ):  # half surrogates, and depths, that no strict encoder takes
        return raw


def read_message_usage(value: Mapping[str, Any]) -> Usage | None:
    """Anthropic's usage, in which `input_tokens` leaves out what was written to and read from the cache."""
    cached = value.get("cache_read_input_tokens")
    inputs = [
        value.get(name) or 0
        for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    ]
    plain = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in inputs)
    return read_usage(
        {
            **value,
            "prompt_tokens": sum(inputs) if plain else None,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
    )


MESSAGES = Messages()
