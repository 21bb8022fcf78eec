"""What every endpoint must be able to render from a plan: its response, whole or as a stream, and its errors.

The errors in mid-stream are those of https://openrouter.ai/docs/api-reference/streaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sandbox.planning import Plan
from sandbox.wire import dumps

EVENT_STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"
FRAGMENT_TOKENS = 3
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
    """One piece of a stream, and the number of completion tokens delivered once it is sent."""

    data: bytes
    tokens: int


class Dialect(Protocol):
    """The form of one endpoint's responses."""

    stream_type: str
    """The media type of a stream. Comments and line ends are changed in event streams only."""
    only_streams: bool
    """Whether every response is a stream, whatever the request says."""
    farewell: bytes
    """The last event of a stream that has taken too long."""

    def render(self, plan: Plan) -> Mapping[str, object] | str:
        """The body of a response that is sent whole. A text is sent as it is."""

    def render_error(self, error: Mapping[str, object]) -> Mapping[str, object]:
        """The body of an error with status 200, or what is added to the response."""

    def frames(self, plan: Plan) -> Iterator[Frame]:
        """All pieces of a stream, in order. Comments are added on delivery."""


class JsonDialect:
    """What dialects with JSON responses have in common. Those that can stream override `frames`."""

    stream_type = EVENT_STREAM
    only_streams = False
    farewell = b"data: " + dumps({"error": TOO_LATE}) + b"\n\n"

    def render_error(self, error: Mapping[str, object]) -> Mapping[str, object]:
        return {"error": error}

    def frames(self, plan: Plan) -> Iterator[Frame]:
        raise TypeError(f"{type(self).__name__} is never streamed, so neither is {plan.id}")


def pad(frames: Iterator[Frame], padding: int) -> Iterator[Frame]:
    """The same pieces, with this many spaces before the JSON of the first event."""
    for frame in frames:
        if padding:
            data = frame.data.replace(b"data: ", b"data: " + b" " * padding, 1)
            frame, padding = Frame(data, frame.tokens), 0
        yield frame


def sse(name: str, event: Mapping[str, object]) -> bytes:
    """A server-sent event with a name, as in OpenAI's responses and Anthropic's messages."""
    return b"event: " + name.encode() + b"\ndata: " + dumps(event) + b"\n\n"


def data_event(event: Mapping[str, object]) -> bytes:
    """A server-sent event without a name, as in chat completions and image streams."""
    return b"data: " + dumps(event) + b"\n\n"


def fragments(pieces: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The arguments of a tool call as they are streamed: a few tokens at a time, and how many."""
    for start in range(0, len(pieces), FRAGMENT_TOKENS):
        fragment = pieces[start : start + FRAGMENT_TOKENS]
        yield "".join(fragment), len(fragment)
