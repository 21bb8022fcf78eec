"""How do server-sent events pass through, unchanged but for what must change? Split, watched, and held back where money is due.

Events go on as they came, comments and keep-alives included. The event that carries `usage` waits: another data event releases it
unchanged, the end hands it to whoever settles. Errors lose what must not be shown. It knows nothing of accounts or databases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from usage import Usage, parse_json, read_usage

MAX_EVENT_BYTES = 32 * 1024 * 1024
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

Sanitise = Callable[[Mapping[str, Any]], dict[str, Any]]


class EventTooLarge(Exception):
    """An event of the upstream exceeds MAX_EVENT_BYTES."""


@dataclass(slots=True)
class Stream:
    """One stream on its way through. `sanitise` turns an upstream's `error` object into one that clients may see."""

    sanitise: Sanitise
    usage: Usage | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    held: bytes | None = None
    body_id: str | None = None
    model: str | None = None
    provider: str | None = None
    finish_reason: str | None = None
    data_events: int = 0
    _rest: bytearray = field(default_factory=bytearray)
    _scanned: int = 0

    def feed(self, chunk: bytes) -> bytes:
        """What goes on to the client now that this has arrived. Raises EventTooLarge."""
        if not self._rest and self.held is None and self.data_events and _is_plain(chunk):
            self.data_events += 1
            return chunk
        self._rest += chunk
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLarge
        return b"".join([part for event in self._complete_events() for part in self._pass(event)])

    def end(self) -> bytes:
        """What goes on when the upstream has ended: a last event that lacked its blank line is completed, half a one is not data."""
        rest, self._rest = bytes(self._rest).strip(b"\r\n"), bytearray()
        if not rest.startswith(b"data:") or (rest != b"data: [DONE]" and _data_of(rest) is None):
            return b""
        return b"".join(self._pass(rest + b"\n\n"))

    def _complete_events(self) -> Iterator[bytes]:
        buffer = self._rest
        start = 0
        while (end := _event_end(buffer, max(start, self._scanned - 3))) > 0:
            yield bytes(buffer[start:end])
            start = end
            self._scanned = end
        del buffer[:start]
        self._scanned = len(buffer)

    def _pass(self, event: bytes) -> Iterator[bytes]:
        if not _has_data(event):
            yield event
            return
        if self.done:
            return
        if _is_done(event):
            self.done = True
            return
        if self.held is not None:
            yield self.held
            self.held = None
        self.data_events += 1
        if self.data_events > 1 and b'"usage"' not in event and b'"error"' not in event and b'"finish_reason":"' not in event:
            yield event
            return
        event = self._read(event)
        if self.usage is not None and b'"usage"' in event and self._carries_usage(event):
            self.held = event
        else:
            yield event

    def _carries_usage(self, event: bytes) -> bool:
        data = _data_of(event)
        return isinstance(data, dict) and isinstance(data.get("usage"), dict)

    def _read(self, event: bytes) -> bytes:
        """Notes what this event says; an event with an error comes back without what must not be shown."""
        data = _data_of(event)
        if not isinstance(data, dict):
            return event
        self.body_id = self.body_id or _text(data.get("id"))
        self.model = _text(data.get("model")) or self.model
        self.provider = _text(data.get("provider")) or self.provider
        choices = data.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            self.finish_reason = _text(choices[0].get("finish_reason")) or self.finish_reason
        found = read_usage(data.get("usage"))
        if found is not None:
            self.usage = found
        if isinstance(data.get("error"), dict) or (data.get("error") is not None and "choices" not in data):
            return self._without_secrets(event)
        return event

    def _without_secrets(self, event: bytes) -> bytes:
        data = orjson.loads(_payload(event))
        error = data["error"] if isinstance(data["error"], dict) else {"message": str(data["error"])}
        self.error = data["error"] = self.sanitise(error)
        for name in ("user_id", "openrouter_metadata", "debug"):
            data.pop(name, None)
        return b"data: " + orjson.dumps(data) + b"\n\n"


def _is_plain(chunk: bytes) -> bool:
    """Whole events with nothing in them that we would have to look at."""
    return (
        chunk.endswith(b"\n\n")
        and b'"usage"' not in chunk
        and b'"error"' not in chunk
        and b"[DONE]" not in chunk
        and b'"finish_reason":"' not in chunk
        and chunk.startswith(b"data:")
    )


def _event_end(buffer: bytearray, start: int) -> int:
    """Where the first event after `start` ends, with its blank line; 0 while it is incomplete. Lines end with LF, CRLF or CR."""
    ends = [found + len(blank) for blank in (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n") if (found := buffer.find(blank, max(0, start))) >= 0]
    return min(ends, default=0)


def _has_data(event: bytes) -> bool:
    return event.startswith(b"data:") or b"\ndata:" in event or b"\rdata:" in event


def _payload(event: bytes) -> bytes:
    """The data of an event: its data lines without their prefix, joined."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)


def _is_done(event: bytes) -> bool:
    return b"[DONE]" in event and _payload(event).strip() == b"[DONE]"


def _data_of(event: bytes) -> Any:
    """The parsed data, or None where it is no JSON (some middlemen send comments as data)."""
    try:
        return parse_json(_payload(event))
    except ValueError:
        return None


def _text(value: object) -> str | None:
    return value[:256] if isinstance(value, str) and value else None


def with_field(json_object: bytes, name: str, value: bytes) -> bytes:
    """A JSON object with one more field at its end, the rest to the byte as it was."""
    text = json_object.rstrip()
    head = text[:-1].rstrip()
    comma = b"" if head.endswith(b"{") else b","
    return head + comma + b'"' + name.encode() + b'":' + value + b"}"


def usage_event(held: bytes | None, stream: Stream, gateway_usage: bytes) -> bytes:
    """The event that ends the accounting: the held one with `gateway_usage`, or one of our own with empty choices."""
    if held is not None:
        return b"data: " + with_field(_payload(held), "gateway_usage", gateway_usage) + b"\n\n"
    own = {
        "id": stream.body_id or "gen-unknown",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": stream.model or "",
        "choices": [],
    }
    return b"data: " + with_field(orjson.dumps(own), "gateway_usage", gateway_usage) + b"\n\n"
