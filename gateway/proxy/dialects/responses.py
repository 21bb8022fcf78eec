"""OpenAI Responses: https://platform.openai.com/docs/api-reference/responses-streaming.

The answer is the `response` of an event. The event that ends the stream (`response.completed`, `.incomplete`
or `.failed`) holds it whole, with its usage; `[DONE]` may follow. Events are numbered. Errors come in
`response.failed`, or in an event `error` (OpenRouter: also `response.error`), whose code is a word.
"""

from __future__ import annotations

from collections.abc import Iterator

from common.errors import GatewayError
from common.json_types import Json, JsonObject
from gateway.proxy.dialects.base import AnswerState, EventAction, Sanitise, as_object, note_origin
from gateway.proxy.dialects.chat import HIDDEN_MARKS, Dialect
from gateway.proxy.dialects.named import NamedEvents, answer_in
from gateway.proxy.sse import next_number
from gateway.upstream.usage import read_text, read_usage

ENDS = frozenset(("response.completed", "response.incomplete", "response.failed", "response.cancelled"))
ERRORS = frozenset(("error", "response.error"))


class Responses(NamedEvents):
    """The event that ends a stream is also the one with the bill."""

    # A model's text that holds one of these names is parsed in vain, and passes: the `type` decides.
    remarkable = (
        *Dialect.remarkable,
        b'"response"',
        b"response.completed",
        b"response.incomplete",
        b"response.failed",
        b"response.error",
    )
    hidden_marks = (*HIDDEN_MARKS, b"response.error")
    usage_event_name = b"gateway.usage"

    def read(self, data: JsonObject, state: AnswerState, sanitise: Sanitise) -> EventAction:
        response, kind = answer_in(data, "response"), read_text(data.get("type"))
        note_origin(response, state)
        state.usage = read_usage(response.get("usage")) or state.usage
        if error := response.get("error") or data.get("error"):
            state.error = sanitise(as_object(error))
        elif kind in ERRORS:  # the fields of the error stand in the event itself
            state.error = sanitise(data)
        state.ended = state.ended or kind in ENDS
        if state.ended or response is data:
            state.finish_reason = read_text(response.get("status")) or _status_of_event(kind)
        return EventAction.HOLD if kind in ENDS or kind in ERRORS else EventAction.PASS

    def is_whole(self, state: AnswerState) -> bool:
        return state.ended

    def has_failed(self, state: AnswerState) -> bool:
        return state.error is not None or state.finish_reason in ("failed", "cancelled")

    def is_error(self, data: JsonObject) -> bool:
        return bool(data.get("error")) and data.get("status") is None

    def revealing_parts(self, data: dict[str, Json]) -> Iterator[dict[str, Json]]:
        yield data
        if isinstance(response := data.get("response"), dict):
            yield response

    def _clean(self, part: dict[str, Json], sanitise: Sanitise) -> list[str]:
        changed = super()._clean(part, sanitise)
        if read_text(part.get("type")) in ERRORS and "message" in part:
            # Here `code` is a text in OpenAI's schema, whatever the upstream writes.
            shown = sanitise(part)
            part |= {"message": shown["message"], "code": str(shown["code"])}
            changed.append("message")
        return changed

    def failure_data(self, failure: GatewayError, state: AnswerState, request_id: str) -> dict[str, Json]:
        return {
            "type": "error",
            # OpenAI requires a number, and some clients drop an event without one.
            "sequence_number": next_number(state.latest),
            "code": failure.code,
            "message": failure.message,
            "param": failure.param,
            **self._envelope(failure, request_id),
        }

    def _envelope(self, failure: GatewayError, request_id: str) -> dict[str, Json]:
        """What stands in the event beside OpenAI's own fields."""
        return failure.body(request_id)


def _status_of_event(kind: str | None) -> str | None:
    return kind.removeprefix("response.") if kind in ENDS and kind is not None else None


RESPONSES = Responses()
