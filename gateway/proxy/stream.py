"""A stream on its way to the client: events pass unchanged, and the event with the bill waits.

Events pass as they came, comments and keep-alives included. The event that carries the bill is held: another
data event releases it unchanged, and the end of the stream hands it to whoever settles. An error loses what
no client may see. The dialect says which event is which. Nothing here knows accounts or databases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from common.errors import GatewayError
from gateway.proxy.dialects.base import AnswerState, EventAction, Sanitise, StreamEnd
from gateway.proxy.dialects.chat import CHAT, Dialect
from gateway.proxy.sse import (
    BOM,
    DONE,
    NUMBERED,
    first_event_end,
    has_data,
    is_done,
    next_event_end,
    parse_data,
    payload_of,
    with_payload,
)

MAX_EVENT_BYTES = 32 * 1024 * 1024  # an upstream that never ends an event must not fill the memory
# Events at the start of a chunk that are taken without the buffer. Each copies the rest of the chunk, so of
# many small ones the buffer is faster.
MAX_DIRECT_EVENTS = 4
SHORT_BYTES = 16 * 1024  # an unfinished event below this is joined with the next chunk, at the cost of a copy


class EventTooLarge(Exception):
    """An event of the upstream exceeds MAX_EVENT_BYTES."""


@dataclass(slots=True)
class Stream(AnswerState):
    """One stream on its way through. `sanitise` turns an upstream's `error` object into one that clients may
    see.
    """

    sanitise: Sanitise
    dialect: Dialect = CHAT
    done: bool = False
    held: bytes | None = None
    trailing: bytes = b""  # events that follow the held one
    data_events: int = 0
    _rest: bytearray = field(default_factory=bytearray)  # an event that has not ended yet
    _scanned: int = 0  # how much of `_rest` has been searched for an end
    _has_returns: bool = False  # a CR has come, so that lines may end with CRLF or CR

    @property
    def is_whole(self) -> bool:
        """Whether the answer in it has come to its end, whatever may follow."""
        return self.done or self.dialect.is_whole(self)

    @property
    def has_failed(self) -> bool:
        """Whether the upstream says in it that it failed."""
        return self.dialect.has_failed(self)

    def feed(self, chunk: bytes) -> bytes:
        """The bytes to send to the client now that this chunk has arrived; none after `[DONE]`. Raises
        EventTooLarge.
        """
        # This runs for every chunk of every stream. A few searches let whole runs of plain events pass, and
        # nothing is split or parsed. What remains of the chunk goes through the buffer.
        passed: list[bytes] = []
        if NUMBERED in chunk:
            self.latest = chunk
        if 0 < len(self._rest) < SHORT_BYTES and not self._has_returns:
            chunk, self._scanned = bytes(self._rest) + chunk, 0
            self._rest.clear()
        for _ in range(MAX_DIRECT_EVENTS):
            if not chunk or self._rest or self.held is not None or self.done:
                break
            # Until the id of the answer is known, every event is parsed.
            if self.body_id is not None and (end := _plain_end(chunk, self.dialect)):
                self.data_events += 1
                passed.append(chunk[:end])
            elif end := first_event_end(chunk):
                passed.append(self._pass(chunk[:end]))
            else:
                break
            chunk = chunk[end:]
        if chunk:
            passed.append(self._feed_buffered(chunk))
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def _feed_buffered(self, chunk: bytes) -> bytes:
        self._has_returns = self._has_returns or b"\r" in chunk
        self._rest += chunk
        passed = b"".join([self._pass(event) for event in self._complete_events()])
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLarge
        return passed

    def end(self) -> bytes:
        """The bytes to send when the upstream has ended. A last event that lacks only its blank line counts;
        half an event does not.
        """
        rest, self._rest = bytes(self._rest).strip(b"\r\n"), bytearray()
        if not has_data(rest) or not (is_done(rest) or parse_data(rest) is not None):
            return b""
        return self._pass(rest + b"\n\n")

    def tail(self, gateway_usage: bytes, failure: GatewayError | None, request_id: str) -> bytes:
        """The last bytes, once the request is settled: what was held, with `gateway_usage`, and our error
        where the request failed.
        """
        trailing = self.trailing + (DONE if self.done else b"")
        end = StreamEnd(self.held, trailing, gateway_usage, failure, request_id)
        return self.dialect.write_end(self, end)

    def _complete_events(self) -> Iterator[bytes]:
        """Takes the events that have ended out of the buffer."""
        buffer = self._rest
        start = 0
        # A blank line of up to four bytes may have been cut in two: three of them are searched again.
        while (end := next_event_end(buffer, max(start, self._scanned - 3), self._has_returns)) > 0:
            yield bytes(buffer[start:end])
            start = end
            self._scanned = end
        del buffer[:start]
        self._scanned = len(buffer)

    def _pass(self, event: bytes) -> bytes:
        """The bytes that may be sent now that this event has come; they may be none."""
        if self.done:
            return b""
        if not self.data_events:
            event = event.removeprefix(BOM)
        if not has_data(event):
            return event
        if is_done(event):
            self.done = True
            return b""
        self.data_events += 1
        return self._apply(*self._inspect(event))

    def _inspect(self, event: bytes) -> tuple[bytes, EventAction]:
        """The event as clients may see it, and what happens to it. Notes what it says of the answer."""
        if self.body_id is not None and self.dialect.is_plain(event):
            return event, EventAction.PASS
        data = parse_data(event)
        if not isinstance(data, dict):
            return event, EventAction.PASS
        return self._without_secrets(event), self.dialect.read(data, self, self.sanitise)

    def _without_secrets(self, event: bytes) -> bytes:
        payload = payload_of(event)
        shown = self.dialect.without_secrets(payload, self.sanitise)
        return event if shown is payload else with_payload(event, shown)

    def _apply(self, event: bytes, action: EventAction) -> bytes:
        if action is EventAction.TRAIL and self.held is not None:
            self.trailing += event
            return b""
        if action is EventAction.PASS_BESIDE:
            return event
        released = self._release()
        if action is EventAction.PASS:
            return released + event
        self.held = event
        return released

    def _release(self) -> bytes:
        """The held event as it came, and what follows it: another event shows that it was not the last."""
        if self.held is None:
            return b""
        released = self.held + self.trailing
        self.held, self.trailing = None, b""
        return released


def _plain_end(chunk: bytes, dialect: Dialect) -> int:
    """The end of the plain events at the start of a chunk; 0 where there are none."""
    if not chunk.startswith(dialect.starts):
        return 0
    blank_line = chunk.rfind(b"\n\n", 0, dialect.plain_until(chunk))
    return blank_line + 2 if blank_line >= 0 else 0
