"""What the APIs with named events share: Anthropic Messages and OpenAI Responses.

The name of an event is also the `type` in its data. The charge rides on the event that was held; where there
is none, on our error, or on an event of our own that clients ignore.
"""

from __future__ import annotations

from typing import ClassVar

from common.json_types import JsonObject
from gateway.proxy.dialects.base import AnswerState, StreamEnd
from gateway.proxy.dialects.chat import Dialect, write_failure
from gateway.proxy.sse import named_event, with_charge, with_field


class NamedEvents(Dialect):
    """A dialect whose events have names: `remarkable` lists every one that must be parsed."""

    starts = (b"event:", b"data:")
    usage_event_name: ClassVar[bytes]  # the name of our own event with the charge

    def plain_until(self, chunk: bytes) -> int:
        return self._first_remarkable(chunk)

    def is_plain(self, event: bytes) -> bool:
        # A CR alone makes a chunk remarkable, since its lines are cut in another way, but not an event.
        return not any(mark in event for mark in self.remarkable if mark != b"\r")

    def write_end(self, state: AnswerState, end: StreamEnd) -> bytes:
        usage = b"" if end.held is None else with_charge(end.held, end.gateway_usage)
        failure = b""
        if end.failure is not None:
            data = write_failure(self.failure_data(end.failure, state, end.request_id))
            # The charge is told once, on the first event that can carry it.
            data = data if usage else with_field(data, "gateway_usage", end.gateway_usage)
            failure = named_event(b"error", data)
        elif not usage:
            data = b'{"type":"' + self.usage_event_name + b'"}'
            usage = named_event(self.usage_event_name, with_field(data, "gateway_usage", end.gateway_usage))
        return usage + failure + end.trailing


def answer_in(data: JsonObject, name: str) -> JsonObject:
    """The answer within an event, or the data itself where that is a whole answer."""
    answer = data.get(name)
    return answer if isinstance(answer, dict) else data
