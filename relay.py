"""How do server-sent events pass through, unchanged but for what must change? Split, watched, and held back where money is due.

Events go on as they came, comments and keep-alives included. The event that carries `usage` waits: another data event releases it
unchanged, the end hands it to whoever settles. Errors lose what must not be shown. It knows nothing of accounts or databases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from usage import Usage, parse_json, read_integer, read_text, read_usage

MAX_EVENT_BYTES = 32 * 1024 * 1024
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
BOM = b"\xef\xbb\xbf"
BLANK_LINE = re.compile(rb"\n\n|\r\n\r\n|\r\r|\n\r\n")

# What clients do not get to see: the operator's account, and numbers that are no JSON.
HIDDEN = ("user_id", "openrouter_metadata", "debug")
MARKS = (*(b'"' + name.encode() + b'"' for name in (*HIDDEN, "error")), b"NaN", b"Infinity")

Sanitise = Callable[[Mapping[str, Any]], dict[str, Any]]


# What has to be looked at: keys stand in quotes, so that no text that a model writes is taken for one.
REMARKABLE = (b'"usage"', b'"error"', b'"user_id"', b"[DONE]", b"\r")
FINISHED = re.compile(rb'"finish_reason"(?!:null)')
SHORTCUTS = 4


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
    _has_returns: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the answer in it has come to its end, whatever may follow."""
        return self.done or self.finish_reason is not None

    def feed(self, chunk: bytes) -> bytes:
        """What goes on to the client now that this has arrived; nothing after `[DONE]`. Raises EventTooLarge."""
        passed = []
        for _ in range(SHORTCUTS):
            if not chunk or self._rest or self.held is not None or self.done:
                break
            if self.body_id is not None and (end := _plain_end(chunk)):
                self.data_events += 1
                passed.append(chunk[:end])
            elif (end := _first_end(chunk)) and end < len(chunk):
                passed.append(self._take(chunk[:end]))
            else:
                break
            chunk = chunk[end:]
        passed.append(self._take(chunk))
        return b"".join(passed)

    def _take(self, chunk: bytes) -> bytes:
        """The same, event by event."""
        self._has_returns = self._has_returns or b"\r" in chunk
        self._rest += chunk
        passed = b"".join([part for event in self._complete_events() for part in self._pass(event)])
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLarge
        return passed

    def end(self) -> bytes:
        """What goes on when the upstream has ended: a last event that lacked its blank line is completed, half a one is not data."""
        rest, self._rest = bytes(self._rest).strip(b"\r\n"), bytearray()
        if not _has_data(rest) or not (_is_done(rest) or _data_of(rest) is not None):
            return b""
        return b"".join(self._pass(rest + b"\n\n"))

    def _complete_events(self) -> Iterator[bytes]:
        buffer = self._rest
        start = 0
        while (end := _event_end(buffer, max(start, self._scanned - 3), self._has_returns)) > 0:
            yield bytes(buffer[start:end])
            start = end
            self._scanned = end
        del buffer[:start]
        self._scanned = len(buffer)

    def _pass(self, event: bytes) -> Iterator[bytes]:
        if self.done:
            return
        if not self.data_events:
            event = event.removeprefix(BOM)
        if not _has_data(event):
            yield event
            return
        if _is_done(event):
            self.done = True
            return
        if self.held is not None:
            yield self.held
            self.held = None
        self.data_events += 1
        if self.body_id is not None and _is_unremarkable(event):
            yield event
            return
        data = _data_of(event)
        if not isinstance(data, dict):
            yield event
            return
        shown = self._shown(event)
        if self._read(data):
            self.held = shown
        else:
            yield shown

    def _read(self, data: Mapping[str, Any]) -> bool:
        """Notes what this event says; True where it says what was used."""
        self.body_id = self.body_id or read_text(data.get("id"))
        self.model = read_text(data.get("model")) or self.model
        self.provider = read_text(data.get("provider")) or self.provider
        choices = data.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            self.finish_reason = read_text(choices[0].get("finish_reason")) or self.finish_reason
        if error := data.get("error"):
            self.error = self.sanitise(error if isinstance(error, dict) else {"message": str(error)})
        found = read_usage(data.get("usage"))
        self.usage = found or self.usage
        return found is not None

    def _shown(self, event: bytes) -> bytes:
        payload = _payload(event)
        shown = without_secrets(payload, self.sanitise)
        return event if shown is payload else b"data: " + shown + b"\n\n"


def without_secrets(raw: bytes, sanitise: Sanitise) -> bytes:
    """A JSON object as clients may see it: the same bytes, unless it holds an error, the operator's identity or NaN."""
    if not any(mark in raw for mark in MARKS):
        return raw
    constants: list[str] = []
    data = json.loads(raw, parse_constant=constants.append, parse_int=read_integer)
    hidden = [data.pop(name) for name in HIDDEN if name in data]
    choices = data.get("choices")
    failed = [part for part in (data, *(choices if isinstance(choices, list) else ())) if isinstance(part, dict) and part.get("error")]
    if not (constants or hidden or failed):
        return raw
    for part in failed:
        part["error"] = sanitise(part["error"] if isinstance(part["error"], dict) else {"message": str(part["error"])})
    return json.dumps(data, separators=(",", ":")).encode()


def _is_unremarkable(data: bytes) -> bool:
    """Nothing in it that we would have to look at. Keys stand in quotes, so that no text that a model writes is taken for one."""
    return (
        b'"usage"' not in data
        and b'"error"' not in data
        and b'"user_id"' not in data
        and data.count(b'"finish_reason"') == data.count(b'"finish_reason":null')
    )


def _plain_end(chunk: bytes) -> int:
    """Where the unremarkable events at the start of a chunk end, 0 where there are none."""
    if not chunk.startswith(b"data:"):
        return 0
    end = len(chunk)
    for mark in REMARKABLE:  # each by itself: a search for all of them at once takes ten times as long
        found = chunk.find(mark, 0, end)
        end = end if found < 0 else found
    if chunk.count(b'"finish_reason"', 0, end) != chunk.count(b'"finish_reason":null', 0, end):
        finished = FINISHED.search(chunk, 0, end)
        end = finished.start() if finished else end
    last = chunk.rfind(b"\n\n", 0, end)
    return last + 2 if last >= 0 else 0


def _first_end(chunk: bytes) -> int:
    """Where the first event of a chunk ends, 0 where it does not or its lines are not plain."""
    first = -1 if b"\r" in chunk else chunk.find(b"\n\n")
    return first + 2 if first >= 0 else 0


def _event_end(buffer: bytearray, start: int, has_returns: bool) -> int:
    """Where the first event after `start` ends, with its blank line; 0 while it is incomplete. Lines end with LF, CRLF or CR."""
    start = max(0, start)
    if has_returns:
        found = BLANK_LINE.search(buffer, start)
        return found.end() if found else 0
    place = buffer.find(b"\n\n", start)
    return place + 2 if place >= 0 else 0


def _has_data(event: bytes) -> bool:
    return event.startswith(b"data:") or b"\ndata:" in event or b"\rdata:" in event


def _payload(event: bytes) -> bytes:
    """The data of an event: its data lines without their prefix, joined."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)


def _is_done(event: bytes) -> bool:
    return b"[DONE]" in event and _payload(event).strip() == b"[DONE]"


def _data_of(event: bytes) -> Any:
    """The parsed data, or None where it is no JSON (some middlemen send comments as data). Exact where money may be in it."""
    payload = _payload(event)
    if b'"usage"' not in payload:
        try:
            return orjson.loads(payload)
        except orjson.JSONDecodeError:
            pass  # it is stricter: NaN, lone surrogates
    try:
        return parse_json(payload)
    except ValueError:
        return None


def with_field(json_object: bytes, name: str, value: bytes) -> bytes:
    """A JSON object with one more field at its end, the rest to the byte as it was."""
    text = json_object.rstrip()
    head = text[:-1].rstrip()
    comma = b"" if head.endswith(b"{") else b","
    return head + comma + b'"' + name.encode() + b'":' + value + b"}"


def usage_event(held: bytes | None, stream: Stream, gateway_usage: bytes) -> bytes:
    """The event that ends the accounting: the held one with `gateway_usage`, or one of our own with empty choices."""
    if held is not None:
        # Line breaks in JSON stand between tokens, where a space does as well.
        return b"data: " + with_field(_payload(held).replace(b"\n", b" "), "gateway_usage", gateway_usage) + b"\n\n"
    own = {
        "id": stream.body_id or "gen-unknown",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": stream.model or "",
        "choices": [],
    }
    return b"data: " + with_field(orjson.dumps(own), "gateway_usage", gateway_usage) + b"\n\n"
