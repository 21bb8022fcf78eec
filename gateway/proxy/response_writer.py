"""Sends the response to the client: its headers once, its body as it comes, and keep-alives while a stream is
silent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

from gateway.billing.stored_answers import Recording
from gateway.proxy.outcome import Client
from gateway.proxy.sse import KEEP_ALIVE


@dataclass(slots=True)
class ResponseWriter:
    """One response; to a client that is gone it sends nothing, but it still records."""

    client: Client
    spawn: Callable[[Coroutine[object, None, object], str], None]
    keep_alive_seconds: float
    recording: Recording | None = None
    started: bool = False
    _silent_since: float = 0.0
    _timer: asyncio.TimerHandle | None = None

    async def start_stream(self, headers: Mapping[str, str]) -> None:
        """Sends the headers of a stream of events, which from now on is never silent for long."""
        self._silent_since = time.monotonic()
        self._wait()
        await self.start({**headers, "content-type": "text/event-stream", "cache-control": "no-cache"})

    async def start(self, headers: Mapping[str, str]) -> None:
        """Sends the status and the headers."""
        self.started = True
        if not self.client.gone:
            await self.client.start(200, headers)

    async def send(self, data: bytes) -> None:
        """Sends a part of the body."""
        # Recorded although the client may be gone: a repetition of the request gets the whole answer.
        if self.recording is not None:
            self.recording.add(data)
        if data and not self.client.gone:
            self._silent_since = time.monotonic()
            await self.client.send(data, more=True)

    async def end(self, data: bytes) -> None:
        """Sends the last part."""
        self.stop_keep_alives()
        if not self.client.gone:
            await self.client.send(data, more=False)

    def stop_keep_alives(self) -> None:
        """To be called before the last part: a comment after it would follow the end of the stream."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        due = self._silent_since + self.keep_alive_seconds - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due), self._tick)

    def _tick(self) -> None:
        """Sends a comment after so many seconds of silence: a proxy in between would take the stream for
        dead.
        """
        if self.client.gone:
            return
        if time.monotonic() - self._silent_since >= self.keep_alive_seconds:
            self._silent_since = time.monotonic()
            self.spawn(self.client.send(KEEP_ALIVE, more=True), "keep-alive")
        self._wait()
