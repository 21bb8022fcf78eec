"""A streaming httpx2 transport to an ASGI app in the same process.

httpx2's own ASGITransport buffers the whole response. Here the app runs in a task, and its body passes
through a short, bounded channel. The client reads pieces as they are made, the app waits for a slow reader,
and the app sees a client that closes early as `http.disconnect`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2

from .wire import Message, Receive, Scope, Send

# Long enough to keep both sides busy, and short enough that a slow client really stops the app.
CHANNEL_LENGTH = 4
SECONDS_TO_LEAVE = 1.0


class SandboxTransport(httpx2.AsyncBaseTransport):
    """Serves the requests of an `httpx2.AsyncClient` from an ASGI app, without a socket."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self._open: set[_Exchange] = set()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        exchange = _Exchange(self.app, request, await _read_body(request))
        self._open.add(exchange)
        exchange.task.add_done_callback(lambda _: self._open.discard(exchange))
        try:
            start = await exchange.next_message()
        except BaseException:
            # The client has given up (a timeout, a cancellation): the app must hear of it.
            exchange.abort()
            raise
        if start is None or start["type"] != "http.response.start":
            raise httpx2.RemoteProtocolError(
                "Server disconnected without sending a response.", request=request
            )
        return httpx2.Response(
            start["status"],
            headers=start.get("headers", []),
            stream=_Body(exchange),
            extensions={"http_version": b"HTTP/1.1"},
        )

    async def aclose(self) -> None:
        for exchange in list(self._open):
            await exchange.aclose()


class _Exchange:
    """One request, the task that answers it, and the channel between the two."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        request: httpx2.Request,
        body: bytes,
    ) -> None:
        self._request = request
        self._read_timeout: float | None = request.extensions.get("timeout", {}).get("read")
        self._body: bytes | None = body
        self._messages: deque[Message] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._closed = asyncio.Event()
        self._complete = False
        self.task: asyncio.Future[None] = asyncio.ensure_future(
            app(_scope(request), self._receive, self._send)
        )
        # Whoever waits for a message must wake up when none can come any more.
        self.task.add_done_callback(lambda _: self._changed.set())

    async def _receive(self) -> Message:
        if self._body is None:
            # After the body, an ASGI server reports nothing but the client's leaving.
            await self._closed.wait()
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: Message) -> None:
        while len(self._messages) >= CHANNEL_LENGTH and not self._closed.is_set():
            self._room.clear()
            await self._room.wait()
        if self._closed.is_set():
            # What an ASGI server of spec version 2.4 raises:
            # https://asgi.readthedocs.io/en/latest/specs/www.html
            raise ConnectionResetError("the client closed the connection")
        self._messages.append(message)
        self._changed.set()

    async def next_message(self) -> Message | None:
        """The app's next message; None once the response is complete. Raises httpx2's errors otherwise."""
        while not self._messages:
            if self._complete:
                return None
            if self.task.done():
                self._raise_broken()
            self._changed.clear()
            await self._wait_for_app()
        message = self._messages.popleft()
        self._room.set()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True
        return message

    async def _wait_for_app(self) -> None:
        try:
            async with asyncio.timeout(self._read_timeout):
                await self._changed.wait()
        except TimeoutError as exc:
            raise httpx2.ReadTimeout("The answer took too long.", request=self._request) from exc

    def _raise_broken(self) -> None:
        cause = None if self.task.cancelled() else self.task.exception()
        raise httpx2.RemoteProtocolError(
            "peer closed connection without sending complete message body (incomplete chunked read)",
            request=self._request,
        ) from cause

    def abort(self) -> None:
        """Tells the app that the client is gone, and lets it end by itself."""
        self._closed.set()
        self._room.set()
        self.task.add_done_callback(_retrieve_exception)

    async def aclose(self) -> None:
        """Aborts, and waits until the app has noticed, so that whatever follows sees the outcome."""
        self.abort()
        await asyncio.wait({self.task}, timeout=SECONDS_TO_LEAVE)
        # An app that ignores the disconnect must not keep running after its client.
        self.task.cancel()


class _Body(httpx2.AsyncByteStream):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self._exchange.next_message()) is not None:
            if chunk := message.get("body", b""):
                yield chunk

    async def aclose(self) -> None:
        await self._exchange.aclose()


def _retrieve_exception(task: asyncio.Future[None]) -> None:
    """Keeps asyncio from logging "exception was never retrieved" for an app whose client has left."""
    if not task.cancelled():
        task.exception()


async def _read_body(request: httpx2.Request) -> bytes:
    if not isinstance(request.stream, httpx2.AsyncByteStream):
        raise TypeError("an asynchronous client is required")
    return b"".join([part async for part in request.stream])


def _scope(request: httpx2.Request) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, request.url.port),
        "client": ("127.0.0.1", 0),
        "root_path": "",
    }
