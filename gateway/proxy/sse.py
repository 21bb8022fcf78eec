"""Server-sent events as bytes: finds where they end, reads and replaces their data, writes new ones.

https://html.spec.whatwg.org/multipage/server-sent-events.html. JSON that passes is never written anew: its
numbers and its spaces stay as the upstream wrote them.
"""

from __future__ import annotations

import re

import orjson

from common.json_types import Json
from gateway.upstream.usage import parse_json

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
BOM = b"\xef\xbb\xbf"
NUMBERED = b'"sequence_number"'
SEQUENCE_NUMBER = re.compile(rb'"sequence_number":\s*(\d{1,15})\b')
# A blank line ends an event. The last form: CRLF and LF may be mixed.
BLANK_LINE = re.compile(rb"\n\n|\r\n\r\n|\r\r|\n\r\n")


def first_event_end(chunk: bytes) -> int:
    """The end of the first event in a chunk; 0 where it is not all there, or a CR makes that unclear."""
    position = -1 if b"\r" in chunk else chunk.find(b"\n\n")
    return position + 2 if position >= 0 else 0


def next_event_end(buffer: bytearray, start: int, has_returns: bool) -> int:
    """The end of the first event after `start`, with its blank line; 0 while it is incomplete.

    Lines end with LF, CRLF or CR. Without CRs a plain search does, which is much faster.
    """
    start = max(0, start)
    if has_returns:
        blank_line = BLANK_LINE.search(buffer, start)
        return blank_line.end() if blank_line else 0
    position = buffer.find(b"\n\n", start)
    return position + 2 if position >= 0 else 0


def has_data(event: bytes) -> bool:
    """Whether the event has data; comments, which keep a connection alive, have none."""
    return event.startswith(b"data:") or b"\ndata:" in event or b"\rdata:" in event


def payload_of(event: bytes) -> bytes:
    """The data of an event: its data lines without their prefix, joined."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)


def with_payload(event: bytes, payload: bytes) -> bytes:
    """The event with other data, its other lines (`event:`, `id:`) kept."""
    others = [line + b"\n" for line in event.splitlines() if line and not line.startswith(b"data:")]
    return b"".join((*others, b"data: ", payload, b"\n\n"))


def data_event(payload: bytes) -> bytes:
    """An event without a name."""
    return b"data: " + payload + b"\n\n"


def named_event(name: bytes, payload: bytes) -> bytes:
    return b"event: " + name + b"\n" + data_event(payload)


def is_done(event: bytes) -> bool:
    """Whether this is `[DONE]`, with which chat streams end."""
    return b"[DONE]" in event and payload_of(event).strip() == b"[DONE]"


def parse_data(event: bytes) -> Json:
    """The parsed data; None where it is not JSON (some middlemen send comments as data).

    Numbers are exact where money may be among them; else the faster parser does.
    """
    payload = payload_of(event)
    if b'"usage"' not in payload:
        try:
            data: Json = orjson.loads(payload)
        except orjson.JSONDecodeError:
            pass  # it rejects what other parsers read: NaN, lone surrogates
        else:
            return data
    try:
        return parse_json(payload)
    except ValueError:
        return None


def next_number(latest: bytes) -> int:
    """The `sequence_number` after the last one in a chunk of a stream; 0 where it has none."""
    numbers = SEQUENCE_NUMBER.findall(latest)
    return int(numbers[-1]) + 1 if numbers else 0


def with_field(json_object: bytes, name: str, value: bytes) -> bytes:
    """A JSON object with one more field at its end; the rest stays as it was, to the byte."""
    # As bytes, since parsing and writing it would round its numbers.
    text = json_object.rstrip()
    head = text[:-1].rstrip()
    comma = b"" if head.endswith(b"{") else b","
    return head + comma + b'"' + name.encode() + b'":' + value + b"}"


def with_charge(event: bytes, gateway_usage: bytes) -> bytes:
    """The event with `gateway_usage` in its data."""
    # Data of several lines becomes one line: in JSON a line break only parts tokens, as a space does.
    payload = payload_of(event).replace(b"\n", b" ")
    return with_payload(event, with_field(payload, "gateway_usage", gateway_usage))
