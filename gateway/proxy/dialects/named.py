"""APIs with named events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.proxy.dialects.chat import Dialect


class Named(Dialect):
    """Events with names: what stands in `remarkable` tells all that we would have to look at."""

    starts = (b"event:", b"data:")

    def plain_until(self, chunk: bytes) -> int:
        return self._marked(chunk)

    def is_plain(self, event: bytes) -> bool:
        return not any(mark in event for mark in self.remarkable if mark != b"\r")


def event(name: bytes, data: bytes) -> bytes:
    return b"event: " + name + b"\ndata: " + data + b"\n\n"


def envelope(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The answer within an event, or the event itself where it is the answer."""
    inner = data.get(name)
    return inner if isinstance(inner, dict) else data
