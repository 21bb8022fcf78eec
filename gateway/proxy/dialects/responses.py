"""OpenAI Responses. OpenAI's Responses and Anthropic's Messages, and what differs for OpenRouter's clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from common.errors import GatewayError
from gateway.proxy.dialects.base import AnswerState, EventAction, Sanitise, as_object, note_origin
from gateway.proxy.dialects.chat import MARKS, Dialect
from gateway.proxy.dialects.named import Named, envelope, event
from gateway.proxy.sse import next_number, with_charge, with_field
from gateway.upstream.usage import read_text, read_usage


class Responses(Named):
    """OpenAI's Responses: named events, the answer within `response`, which the event that ends the stream
    holds whole.
    """

    remarkable = (
        *Dialect.remarkable,
        b'"response"',
        b"response.completed",
        b"response.incomplete",
        b"response.failed",
        b"response.error",
    )
    marks = (*MARKS, b"response.error")
    ends = frozenset(("response.completed", "response.incomplete", "response.failed", "response.cancelled"))
    errors = frozenset(("error", "response.error"))

    def read(self, data: Mapping[str, Any], state: AnswerState, sanitise: Sanitise) -> EventAction:
        answer, kind = envelope(data, "response"), read_text(data.get("type"))
        note_origin(answer, state)
        state.usage = read_usage(answer.get("usage")) or state.usage
        if error := answer.get("error") or data.get("error"):
            state.error = sanitise(as_object(error))
        elif kind in self.errors:
            state.error = sanitise(data)
        state.ended = state.ended or kind in self.ends
        if state.ended or answer is data:
            state.finish_reason = read_text(answer.get("status")) or (
                kind.removeprefix("response.") if kind in self.ends else None
            )
        return EventAction.HOLD if kind in self.ends or kind in self.errors else EventAction.PASS

    def is_whole(self, state: AnswerState) -> bool:
        return state.ended

    def has_failed(self, state: AnswerState) -> bool:
        return state.error is not None or state.finish_reason in ("failed", "cancelled")

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
            about = {"type": "error", "sequence_number": next_number(state.latest)}
            about |= {"code": failure.code, "message": failure.message, "param": failure.param}
            about |= self.failure_event(failure, state, request_id)
            data = orjson.dumps(about, default=str)
            parts.append(event(b"error", data if parts else with_field(data, "gateway_usage", gateway_usage)))
        elif not parts:
            parts.append(
                event(
                    b"gateway.usage", with_field(b'{"type":"gateway.usage"}', "gateway_usage", gateway_usage)
                )
            )
        return b"".join((*parts, last))


RESPONSES = Responses()
