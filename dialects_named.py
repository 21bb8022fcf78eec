"""How do the APIs with named events say it? OpenAI's Responses and Anthropic's Messages, and what differs for OpenRouter's clients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from dialects import CHAT, CHAT_FOR_OPENROUTER, MARKS, Dialect, Place, Said, Sanitise, as_object, note_origin
from errors import ANTHROPIC_TYPES, GatewayError
from events import next_number, with_charge, with_field
from usage import Usage, read_text, read_usage

# Those of Anthropic's error types that speak of the request, and not of the operator's account.
SHOWN_TYPES = frozenset((*ANTHROPIC_TYPES.values(), "api_error")) - {"authentication_error", "billing_error"}
NO_CITATIONS = (b'"citations":null', b'"citations": null')


class Named(Dialect):
    """Events with names: what stands in `remarkable` tells all that we would have to look at."""

    starts = (b"event:", b"data:")

    def plain_until(self, chunk: bytes) -> int:
        return self._marked(chunk)

    def is_plain(self, event: bytes) -> bool:
        return not any(mark in event for mark in self.remarkable if mark != b"\r")


class Responses(Named):
    """OpenAI's Responses: named events, the answer within `response`, which the event that ends the stream holds whole."""

    remarkable = (*Dialect.remarkable, b'"response"', b"response.completed", b"response.incomplete", b"response.failed", b"response.error")
    marks = (*MARKS, b"response.error")
    ends = frozenset(("response.completed", "response.incomplete", "response.failed", "response.cancelled"))
    errors = frozenset(("error", "response.error"))

    def read(self, data: Mapping[str, Any], said: Said, sanitise: Sanitise) -> Place:
        answer, kind = _envelope(data, "response"), read_text(data.get("type"))
        note_origin(answer, said)
        said.usage = read_usage(answer.get("usage")) or said.usage
        if error := answer.get("error") or data.get("error"):
            said.error = sanitise(as_object(error))
        elif kind in self.errors:
            said.error = sanitise(data)
        said.ended = said.ended or kind in self.ends
        if said.ended or answer is data:
            said.finish_reason = read_text(answer.get("status")) or (kind.removeprefix("response.") if kind in self.ends else None)
        return Place.HOLD if kind in self.ends or kind in self.errors else Place.GOES

    def is_whole(self, said: Said) -> bool:
        return said.ended

    def has_failed(self, said: Said) -> bool:
        return said.error is not None or said.finish_reason in ("failed", "cancelled")

    def is_error(self, data: Mapping[str, Any]) -> bool:
        return bool(data.get("error")) and data.get("status") is None

    def parts(self, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield data
        if isinstance(data.get("response"), dict):
            yield data["response"]

    def _clean(self, part: dict[str, Any], sanitise: Sanitise) -> list[str]:
        changed = super()._clean(part, sanitise)
        if read_text(part.get("type")) in self.errors and "message" in part:
            shown = sanitise(part)
            part |= {"message": shown["message"], "code": str(shown["code"])}
            changed.append("message")
        return changed

    def tail(
        self, said: Said, held: bytes | None, last: bytes, gateway_usage: bytes, failure: GatewayError | None, request_id: str
    ) -> bytes:
        parts = [] if held is None else [with_charge(held, gateway_usage)]
        if failure is not None:
            about = {"type": "error", "sequence_number": next_number(said.latest)}
            about |= {"code": failure.code, "message": failure.message, "param": failure.param}
            about |= self.failure_event(failure, said, request_id)
            data = orjson.dumps(about, default=str)
            parts.append(_event(b"error", data if parts else with_field(data, "gateway_usage", gateway_usage)))
        elif not parts:
            parts.append(_event(b"gateway.usage", with_field(b'{"type":"gateway.usage"}', "gateway_usage", gateway_usage)))
        return b"".join((*parts, last))


class OpenRouterResponses(Responses):
    """Responses name their errors by words for OpenRouter's clients, too; what is ours beside that has OpenRouter's form."""

    def failure_event(self, failure: GatewayError, said: Said, request_id: str) -> dict[str, Any]:
        return failure.openrouter_body(request_id)


class Messages(Named):
    """Anthropic's Messages: the prompt's tokens in the first event, the answer's in `message_delta`, then `message_stop`."""

    remarkable = (*Dialect.remarkable, b"message_start", b"message_delta", b"message_stop", b'"ping"')
    is_anthropic = True

    def read(self, data: Mapping[str, Any], said: Said, sanitise: Sanitise) -> Place:
        answer, kind = _envelope(data, "message"), read_text(data.get("type"))
        note_origin(answer, said)
        for usage in (answer.get("usage"), data.get("usage")):
            if isinstance(usage, dict):
                said.counts |= {name: value for name, value in usage.items() if value is not None}
                said.usage = read_message_usage(said.counts)
        delta = data.get("delta") if kind == "message_delta" else None
        reason = (delta if isinstance(delta, dict) else answer).get("stop_reason")
        said.finish_reason = read_text(reason) or said.finish_reason
        if error := data.get("error"):
            said.error = self.show_error(as_object(error), sanitise)
        said.ended = said.ended or kind == "message_stop"
        return self._place(data, kind)

    def _place(self, data: Mapping[str, Any], kind: str | None) -> Place:
        if kind == "message_stop":
            return Place.LAST
        if kind == "ping":
            return Place.BESIDE
        return Place.HOLD if data.get("error") or (kind == "message_delta" and data.get("usage")) else Place.GOES

    def is_whole(self, said: Said) -> bool:
        return said.ended or said.finish_reason is not None

    def has_failed(self, said: Said) -> bool:
        return said.error is not None

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
        self, said: Said, held: bytes | None, last: bytes, gateway_usage: bytes, failure: GatewayError | None, request_id: str
    ) -> bytes:
        parts = [] if held is None else [with_charge(held, gateway_usage)]
        if failure is not None:
            data = orjson.dumps(failure.anthropic_body(request_id), default=str)
            parts.append(_event(b"error", data if parts else with_field(data, "gateway_usage", gateway_usage)))
        elif not parts:  # a ping, which every client takes
            parts.append(_event(b"ping", with_field(b'{"type":"ping"}', "gateway_usage", gateway_usage)))
        return b"".join((*parts, last))


def without_null_citations(raw: bytes) -> bytes:
    """A whole message whose text blocks name no citations where they have none; everything else as it came.

    OpenRouter writes null where Anthropic writes nothing, and some of Anthropic's clients take no null (Vercel's AI SDK).
    """
    if not any(mark in raw for mark in NO_CITATIONS):
        return raw
    try:
        # Numbers stay as they are written: what a tool is called with may be longer than a float.
        data = json.loads(raw, parse_int=orjson.Fragment, parse_float=orjson.Fragment)
        content = data.get("content")
        blocks = [block for block in (content if isinstance(content, list) else ()) if isinstance(block, dict)]
        bare = [block for block in blocks if block.get("type") == "text" and "citations" in block and block["citations"] is None]
        for block in bare:
            del block["citations"]
        return orjson.dumps(data) if bare else raw
    except (orjson.JSONEncodeError, RecursionError):  # half surrogates, and depths, that no strict encoder takes
        return raw


def read_message_usage(value: Mapping[str, Any]) -> Usage | None:
    """Anthropic's usage, in which `input_tokens` leaves out what was written to and read from the cache."""
    cached = value.get("cache_read_input_tokens")
    inputs = [value.get(name) or 0 for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")]
    plain = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in inputs)
    return read_usage({**value, "prompt_tokens": sum(inputs) if plain else None, "prompt_tokens_details": {"cached_tokens": cached}})


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: " + name + b"\ndata: " + data + b"\n\n"


def _envelope(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The answer within an event, or the event itself where it is the answer."""
    inner = data.get(name)
    return inner if isinstance(inner, dict) else data


RESPONSES, MESSAGES = Responses(), Messages()
FOR_OPENROUTER: Mapping[Dialect, Dialect] = {CHAT: CHAT_FOR_OPENROUTER, RESPONSES: OpenRouterResponses(), MESSAGES: MESSAGES}
