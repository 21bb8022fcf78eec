"""What every endpoint must be able to say. Its answer, whole or as a stream, and its errors, all made from
one plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from sandbox.planning import Plan
from sandbox.wire import dumps

EVENT_STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"
STREAM_ERRORS: Mapping[str, Mapping[str, object]] = {
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
PROVIDER_DIED: Mapping[str, object] = {
    "code": 502,
    "message": "Upstream error: the provider closed the connection.",
    "metadata": {"error_type": "provider_unavailable"},
}
TOO_LATE: Mapping[str, object] = {
    "code": 504,
    "message": "The sandbox ends answers here.",
    "metadata": {"error_type": "timeout"},
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of a stream, and how many tokens of the completion have been delivered with it."""

    data: bytes
    tokens: int


class Dialect(Protocol):
    """What one endpoint's answers look like."""

    stream_type: str
    """The media type of a stream; comments and line ends are changed in event streams only."""
    only_streams: bool
    """Whether there is no other form than a stream, asked for or not."""
    farewell: bytes
    """The last event of a stream that has taken too long."""

    def render(self, plan: Plan) -> Mapping[str, object] | str:
        """The body of an answer that is sent whole; a text is sent as it is."""

    def render_error(self, error: Mapping[str, object]) -> Mapping[str, object]:
        """The body (or what is put beside the answer) of an error in status 200."""

    def frames(self, plan: Plan) -> Iterator[Frame]:
        """All pieces of a stream, in order; comments are the delivery's affair."""


class Whole:
    """What the dialects have in common whose answers are JSON; those that stream override `frames`."""

    stream_type = EVENT_STREAM
    only_streams = False
    farewell = b"data: " + dumps({"error": TOO_LATE}) + b"\n\n"

    def render_error(self, error: Mapping[str, object]) -> Mapping[str, object]:
        return {"error": error}

    def frames(self, plan: Plan) -> Iterator[Frame]:
        raise TypeError(f"{type(self).__name__} is never streamed, so neither is {plan.id}")


def pad(frames: Iterator[Frame], padding: int) -> Iterator[Frame]:
    """The same pieces, the first event with so many spaces before its JSON."""
    for frame in frames:
        yield (
            Frame(frame.data.replace(b"data: ", b"data: " + b" " * padding, 1), frame.tokens)
            if padding
            else frame
        )
        padding = 0


def sse(name: str, event: Mapping[str, object]) -> bytes:
    """A server-sent event with a name, as OpenAI's responses and Anthropic's messages have it."""
    return b"event: " + name.encode() + b"\ndata: " + dumps(event) + b"\n\n"
