"""Stream: events pass unchanged; the one with the bill waits. Split, watched, and held back where money is
due.

Events go on as they came, comments and keep-alives included. The event that carries the bill waits: another
data event releases it unchanged, the end hands it to whoever settles. Errors lose what must not be shown.
What says which is its dialect. It knows nothing of accounts or databases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from common.errors import GatewayError
from gateway.proxy.dialects.base import AnswerState, EventAction, Sanitise
from gateway.proxy.dialects.chat import CHAT, Dialect
from gateway.proxy.sse import (
    BOM,
    DONE,
    NUMBERED,
    data_of,
    event_end,
    first_end,
    has_data,
    is_done,
    payload_of,
    with_payload,
)

MAX_EVENT_BYTES = 32 * 1024 * 1024
SHORTCUTS = 4
SHORT = 16 * 1024


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
    last: bytes = b""
    data_events: int = 0
    _rest: bytearray = field(default_factory=bytearray)
    _scanned: int = 0
    _has_returns: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the answer in it has come to its end, whatever may follow."""
        return self.done or self.dialect.is_whole(self)

    @property
    def has_failed(self) -> bool:
        """Whether the upstream says in it that it failed."""
        return self.dialect.has_failed(self)

    def feed(self, chunk: bytes) -> bytes:
        """What goes on to the client now that this has arrived; nothing after `[DONE]`. Raises EventTooLarge."""
        passed: list[bytes] = []
        if NUMBERED in chunk:
            self.latest = chunk
        if (
            0 < len(self._rest) < SHORT and not self._has_returns
        ):  # the beginning of an event goes before the rest of it
            chunk, self._scanned = bytes(self._rest) + chunk, 0
            self._rest.clear()
        for _ in range(SHORTCUTS):
            if not chunk or self._rest or self.held is not None or self.done:
                break
            if self.body_id is not None and (end := _plain_end(chunk, self.dialect)):
                self.data_events += 1
                passed.append(chunk[:end])
            elif end := first_end(chunk):
                passed.extend(self._pass(chunk[:end]))
            else:
                break
            chunk = chunk[end:]
        if chunk:
            passed.append(self._take(chunk))
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def _take(self, chunk: bytes) -> bytes:
        """The same, event by event."""
        self._has_returns = self._has_returns or b"\r" in chunk
        self._rest += chunk
        passed = b"".join([part for event in self._complete_events() for part in self._pass(event)])
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLarge
        return passed

    def end(self) -> bytes:
        """What goes on when the upstream has ended: a last event that lacked its blank line is completed,
        half a one is not data.
        """
        rest, self._rest = bytes(self._rest).strip(b"\r\n"), bytearray()
        if not has_data(rest) or not (is_done(rest) or data_of(rest) is not None):
            return b""
        return b"".join(self._pass(rest + b"\n\n"))

    def tail(self, gateway_usage: bytes, failure: GatewayError | None, request_id: str) -> bytes:
        """The last bytes, once it is settled: what was held, with `gateway_usage`, and our error where there
        is one.
        """
        last = self.last + (DONE if self.done else b"")
        return self.dialect.tail(self, self.held, last, gateway_usage, failure, request_id)

    def _complete_events(self) -> Iterator[bytes]:
        buffer = self._rest
        start = 0
        while (end := event_end(buffer, max(start, self._scanned - 3), self._has_returns)) > 0:
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
        if not has_data(event):
            yield event
            return
        if is_done(event):
            self.done = True
            return
        self.data_events += 1
        if self.body_id is not None and self.dialect.is_plain(event):
            if self.held is not None:
                yield from self._released()
            yield event
            return
        data = data_of(event)
        if not isinstance(data, dict):
            yield from self._released()
            yield event
            return
        yield from self._apply(self._shown(event), self.dialect.read(data, self, self.sanitise))

    def _apply(self, event: bytes, action: EventAction) -> Iterator[bytes]:
        if action is EventAction.TRAIL and self.held is not None:
            self.last += event
        elif action is EventAction.PASS_BESIDE:
            yield event
        else:
            yield from self._released()
            if action is EventAction.PASS:
                yield event
            else:
                self.held = event

    def _released(self) -> Iterator[bytes]:
        """What was held, as it came: more has come after it."""
        if self.held is not None:
            yield self.held + self.last
            self.held, self.last = None, b""

    def _shown(self, event: bytes) -> bytes:
        payload = payload_of(event)
        shown = self.dialect.without_secrets(payload, self.sanitise)
        return event if shown is payload else with_payload(event, shown)


def _plain_end(chunk: bytes, dialect: Dialect) -> int:
    """Where the unremarkable events at the start of a chunk end, 0 where there are none."""
    if not chunk.startswith(dialect.starts):
        return 0
    last = chunk.rfind(b"\n\n", 0, dialect.plain_until(chunk))
    return last + 2 if last >= 0 else 0
