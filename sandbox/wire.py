"""JSON with exact decimals, and one HTTP exchange over raw ASGI.

No amount may pass through a float: a `Decimal` is written as a plain JSON number, and a `Raw` exactly as it
is.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, TypeAlias
from urllib.parse import parse_qs

import orjson

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Scope: TypeAlias = MutableMapping[str, Any]
Raw = orjson.Fragment

MAX_REQUEST_BYTES = 32 * 1024 * 1024


class ClientGone(ConnectionError):
    """The client closed the connection before the response was complete."""


class BodyTooLarge(ValueError):
    """The request body is larger than any client needs."""


def plain(amount: Decimal) -> str:
    """A decimal in plain notation without superfluous zeros (`0.000004`, never `4E-6`)."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _write_decimal(value: object) -> Raw:
    if isinstance(value, Decimal):
        return Raw(plain(value).encode())
    raise TypeError(f"{type(value).__name__} is not JSON")


def dumps(value: object) -> bytes:
    """Compact JSON; decimals become plain numbers."""
    return orjson.dumps(value, default=_write_decimal)


class Connection:
    """One request and its response. Within `watching` it notices a client that leaves."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.raw_headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        self.started = False
        self.finished = False
        self.farewell = b""
        """The bytes that end a stream which has taken too long. Without them the connection is dropped."""
        self._query: bytes = scope.get("query_string", b"")
        self._receive = receive
        self._send = send
        self._gone = asyncio.Event()
        self._gzip: zlib._Compress | None = None

    def header(self, name: str) -> str:
        """The first header of that (lower-case) name, or an empty string."""
        raw_name = name.encode()
        return next((value.decode("latin-1") for key, value in self.raw_headers if key == raw_name), "")

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(self._query.decode("latin-1")).items()}

    async def read_body(self) -> bytes:
        """The whole request body; raises ClientGone or BodyTooLarge."""
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > MAX_REQUEST_BYTES:
                raise BodyTooLarge
            if not message.get("more_body", False):
                return bytes(body)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listens for the client's leaving while the block runs. The body must have been read before."""
        # Only one task may receive at a time, so the body and the disconnect are read one after the other.
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()

    async def pause(self, seconds: float) -> None:
        """Waits. Raises ClientGone as soon as a watched client leaves."""
        try:
            async with asyncio.timeout(seconds):
                await self._gone.wait()
        except TimeoutError:
            return
        raise ClientGone

    async def hang(self) -> None:
        """Stays silent until the client leaves, then raises ClientGone."""
        await self._gone.wait()
        raise ClientGone

    async def start(self, status: int, headers: dict[str, str], *, compressed: bool = False) -> None:
        """Sends status and headers. `compressed` makes the body gzip, whatever the client accepts."""
        if compressed:
            headers = {**headers, "content-encoding": "gzip"}
            # 16 more than the window size selects the gzip format, see zlib's documentation.
            self._gzip = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        self.started = True
        await self._deliver({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, chunk: bytes) -> None:
        """Sends one piece of the body. It arrives as a piece of its own, compressed or not."""
        if self._gzip is not None:
            # The flush sends what the compressor would keep for later.
            chunk = self._gzip.compress(chunk) + self._gzip.flush(zlib.Z_SYNC_FLUSH)
        await self._deliver({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self) -> None:
        """Completes the response. Without this the connection is dropped in the middle of the body."""
        self.finished = True
        rest = self._gzip.flush() if self._gzip is not None else b""
        await self._deliver({"type": "http.response.body", "body": rest, "more_body": False})

    async def respond(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, compressed: bool = False
    ) -> None:
        """Sends a whole response with its length. It is JSON unless the headers say otherwise."""
        if compressed:
            body = gzip.compress(body)
        fields = {"content-type": "application/json", **(headers or {}), "content-length": str(len(body))}
        if compressed:
            fields["content-encoding"] = "gzip"
        await self.start(status, fields)
        self.finished = True
        await self._deliver({"type": "http.response.body", "body": body, "more_body": False})

    async def _deliver(self, message: Message) -> None:
        if self._gone.is_set():
            raise ClientGone
        try:
            # An ASGI server raises an OSError when the client has left.
            await self._send(message)
        except OSError as exc:
            raise ClientGone from exc
