"""Which events does a stream consist of? One server-sent event per token, three usage shapes, errors in mid-stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .dialects import Dialect, render_usage
from .planning import Plan
from .wire import dumps

COMMENT = b": OPENROUTER PROCESSING\n\n"
COMMENT_AS_DATA = b"data: : OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"
ERRORS: Mapping[str, Mapping[str, object]] = {
    "code": {
        "code": 429,
        "message": "Rate limit exceeded",
        "metadata": {"error_type": "rate_limit_exceeded", "provider_code": "rate_limited"},
    },
    "empty": {
        "code": 502,
        "message": "Provider disconnected",
        "metadata": {"error_type": "provider_unavailable"},
    },
    "string": {"code": "server_error", "message": "Provider disconnected unexpectedly"},
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One event, and how many tokens of the completion have been delivered with it."""

    data: bytes
    tokens: int


def frames(plan: Plan, dialect: Dialect) -> Iterator[Frame]:
    """All events of a stream, in order; comments are the delivery's affair."""
    writer = _Writer(plan, dialect)
    padding = b" " * plan.behaviour.padding
    for frame in writer.content():
        yield Frame(b"data: " + padding + frame.data[6:], frame.tokens) if padding else frame
        padding = b""
    if plan.behaviour.stream_error:
        yield Frame(writer.error(plan.behaviour.stream_error), writer.tokens)
        if plan.behaviour.stream_error == "string":
            yield Frame(DONE, writer.tokens)
        return
    yield from (Frame(data, writer.tokens) for data in writer.ending())


class _Writer:
    def __init__(self, plan: Plan, dialect: Dialect) -> None:
        self.tokens = 0
        self._plan = plan
        self._dialect = dialect
        head = {
            "id": plan.id,
            "object": dialect.chunk,
            "created": plan.generation.created,
            "model": plan.model.id,
            "provider": plan.route.endpoint.provider,
        }
        self._head = b"data: " + dumps(head)[:-1]
        self._counts_along = plan.behaviour.usage == "every-event"

    def content(self) -> Iterator[Frame]:
        for choice in self._plan.choices:
            for delta, added in self._dialect.deltas(self._plan, choice):
                self.tokens += added
                yield Frame(self._event(delta), self.tokens)
            if not self._plan.behaviour.stream_error:
                end = self._dialect.end(self._plan, choice, choice.finish)
                yield Frame(self._event(dumps(end)), self.tokens)

    def ending(self) -> Iterator[bytes]:
        behaviour = self._plan.behaviour
        if behaviour.usage not in ("missing", "every-event"):
            for _ in range(2 if behaviour.usage == "twice" else 1):
                yield self._usage_event()
        if behaviour.done:
            yield DONE

    def error(self, form: str) -> bytes:
        end = self._dialect.end(self._plan, self._plan.choices[0], "error")
        choices = [] if form == "empty" else [end]
        return self._head + b',"error":' + dumps(ERRORS[form]) + b',"choices":' + dumps(choices) + b"}\n\n"

    def _event(self, choice: bytes) -> bytes:
        tail = b""
        if self._counts_along:
            tail = b',"usage":' + dumps(render_usage(self._plan, self._plan.running(self.tokens)))
        return self._head + b',"choices":[' + choice + b"]" + tail + b"}\n\n"

    def _usage_event(self) -> bytes:
        plan, last = self._plan, self._plan.choices[-1]
        shape = plan.behaviour.usage
        finish = None if shape == "null-finish" else last.finish
        choices = [] if shape == "empty-choices" else [self._dialect.end(plan, last, finish)]
        usage = dumps(render_usage(plan, plan.tokens))
        return self._head + b',"service_tier":null,"choices":' + dumps(choices) + b',"usage":' + usage + b"}\n\n"
