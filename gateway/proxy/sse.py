"""One server-sent event: split, read, rewritten. Bytes in, bytes out; the JSON in it stays as it was."""

from __future__ import annotations

import re
from typing import Any

import orjson

from gateway.upstream.usage import parse_json

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
BOM = b"\xef\xbb\xbf"
NUMBERED = b'"sequence_number"'
SEQUENCE_NUMBER = re.compile(rb'"sequence_number":\s*(\d{1,15})\b')
BLANK_LINE = re.compile(rb"\n\n|\r\n\r\n|\r\r|\n\r\n")


def first_end(chunk: bytes) -> int:
    """Where the first event of a chunk ends, 0 where it does not or its lines are not plain."""
    first = -1 if b"\r" in chunk else chunk.find(b"\n\n")
    return first + 2 if first >= 0 else 0


def event_end(buffer: bytearray, start: int, has_returns: bool) -> int:
    """Where the first event after `start` ends, with its blank line; 0 while it is incomplete. Lines end with
    LF, CRLF or CR.
    """
    start = max(0, start)
    if has_returns:
        found = BLANK_LINE.search(buffer, start)
        return found.end() if found else 0
    place = buffer.find(b"\n\n", start)
    return place + 2 if place >= 0 else 0


def has_data(event: bytes) -> bool:
    return event.startswith(b"data:") or b"\ndata:" in event or b"\rdata:" in event


def payload_of(event: bytes) -> bytes:
    """The data of an event: its data lines without their prefix, joined."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)


def with_payload(event: bytes, payload: bytes) -> bytes:
    """The event with other data, its other lines (`event:`, `id:`) kept."""
    others = [line + b"\n" for line in event.splitlines() if line and not line.startswith(b"data:")]
    return b"".join((*others, b"data: ", payload, b"\n\n"))


def is_done(event: bytes) -> bool:
    return b"[DONE]" in event and payload_of(event).strip() == b"[DONE]"


def data_of(event: bytes) -> Any:
    """The parsed data, or None where it is no JSON (some middlemen send comments as data). Exact where money
    may be in it.
    """
    payload = payload_of(event)
    if b'"usage"' not in payload:
        try:
            return orjson.loads(payload)
        except orjson.JSONDecodeError:
            pass  # it is stricter: NaN, lone surrogates
    try:
        return parse_json(payload)
    except ValueError:
        return None


def next_number(latest: bytes) -> int:
    """The `sequence_number` after the last one in a piece of a stream, 0 without one. Some clients drop an
    event that has none.
    """
    numbers = SEQUENCE_NUMBER.findall(latest)
    return int(numbers[-1]) + 1 if numbers else 0


def with_field(json_object: bytes, name: str, value: bytes) -> bytes:
    """A JSON object with one more field at its end, the rest to the byte as it was."""
    text = json_object.rstrip()
    head = text[:-1].rstrip()
    comma = b"" if head.endswith(b"{") else b","
    return head + comma + b'"' + name.encode() + b'":' + value + b"}"


def with_charge(event: bytes, gateway_usage: bytes) -> bytes:
    """The event with `gateway_usage` in its data."""
    # Line breaks in JSON stand between tokens, where a space does as well.
    return with_payload(
        event, with_field(payload_of(event).replace(b"\n", b" "), "gateway_usage", gateway_usage)
    )
