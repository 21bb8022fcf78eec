"""The headers of a request are limited, and so is what one connection can make the server remember."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn

from gateway.runtime.bounded_headers import MAX_HEAD_BYTES, BoundedHeads
from tests.support.servers import listening

BEGINNING = b"POST / HTTP/1.1\r\nhost: x\r\n"


async def hello(scope: object, receive: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"hello"})  # type: ignore[operator]


@pytest.fixture
async def address() -> AsyncIterator[tuple[str, int]]:
    with listening() as listener:
        server = uvicorn.Server(uvicorn.Config(hello, http=BoundedHeads, log_config=None, lifespan="off"))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        running = asyncio.create_task(server._serve(sockets=[listener]))
        host, port = listener.getsockname()
        yield host, port
        server.should_exit = True
        await running


async def exchange(address: tuple[str, int], *parts: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read(4096)
    finally:
        writer.close()


async def test_a_head_without_end_is_refused_before_it_fills_the_memory(address: tuple[str, int]) -> None:
    response = await exchange(
        address, BEGINNING + b"x-long: ", *[b"a" * 16_384] * (MAX_HEAD_BYTES // 16_384 + 1)
    )
    assert response.startswith(b"HTTP/1.1 400") and b"longer than 65536 bytes" in response


async def test_long_bodies_and_many_requests_on_a_connection_are_none_of_its_business(
    address: tuple[str, int],
) -> None:
    body = b"b" * 4 * MAX_HEAD_BYTES
    request = BEGINNING + b"content-length: %d\r\n\r\n" % len(body) + body
    assert (await exchange(address, request, request)).endswith(b"hello")
    assert (
        await exchange(address, BEGINNING + b"x-long: " + b"a" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n")
    ).endswith(b"hello")
