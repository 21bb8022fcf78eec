"""The in-process transport streams, waits, times out, aborts and fails as a connection does."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from sandbox import SandboxTransport
from sandbox.transport import CHANNEL_LENGTH
from sandbox.wire import Message, Receive, Scope, Send
from tests.support.sandbox_client import Client

START: Message = {"type": "http.response.start", "status": 200, "headers": []}


def piece(number: int) -> Message:
    return {"type": "http.response.body", "body": b"%d," % number, "more_body": True}


class Counting:
    """An app that sends pieces until its client leaves, and remembers how it ended."""

    def __init__(self) -> None:
        self.sent = 0
        self.disconnected = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(START)
        try:
            while True:
                await send(piece(self.sent))
                self.sent += 1
        except OSError:
            assert await receive() == {"type": "http.disconnect"}
            self.disconnected.set()


async def open_stream(app: Counting) -> httpx2.Response:
    client = httpx2.AsyncClient(transport=SandboxTransport(app))
    return await client.send(client.build_request("GET", "http://sandbox.invalid/"), stream=True)


async def test_pieces_arrive_while_the_app_still_runs() -> None:
    app = Counting()
    response = await open_stream(app)
    pieces = response.aiter_raw()
    assert [await anext(pieces) for _ in range(3)] == [b"0,", b"1,", b"2,"]
    assert not app.disconnected.is_set()
    await response.aclose()


async def test_the_app_waits_for_a_slow_reader() -> None:
    app = Counting()
    response = await open_stream(app)
    await anext(response.aiter_raw())
    for _ in range(100):
        await asyncio.sleep(0)
    assert app.sent <= CHANNEL_LENGTH + 1
    await response.aclose()


async def test_closing_early_is_seen_by_the_app_before_close_returns() -> None:
    app = Counting()
    response = await open_stream(app)
    await anext(response.aiter_raw())
    await response.aclose()
    assert app.disconnected.is_set()


async def test_a_cancelled_request_is_seen_by_the_app(client: Client) -> None:
    asking = asyncio.create_task(client.ask("hang"))
    while not client.app.state.in_flight:
        await client.http.get("/sandbox/bill")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    while client.app.state.in_flight:
        await client.http.get("/sandbox/bill")
    assert [call.cost for call in client.app.state.calls if call.generation_id] != [None]


@pytest.mark.parametrize("scenario", ["hang", "stall;count=1"])
async def test_silence_is_a_read_timeout(client: Client, scenario: str) -> None:
    request = client.request(scenario, stream=True)
    request.extensions["timeout"] = {"read": 0.02}
    with pytest.raises(httpx2.ReadTimeout):
        await client.http.send(request)


async def test_an_exception_in_the_app_is_a_protocol_error_with_its_cause() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("a bug")

    async with httpx2.AsyncClient(transport=SandboxTransport(broken)) as client:
        with pytest.raises(httpx2.RemoteProtocolError) as raised:
            await client.get("http://sandbox.invalid/")
    assert isinstance(raised.value.__cause__, LookupError)


async def test_an_exception_after_the_start_surfaces_in_the_body() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(piece(1))
        raise LookupError("a bug")

    async with httpx2.AsyncClient(transport=SandboxTransport(broken)) as client:
        response = await client.send(client.build_request("GET", "http://sandbox.invalid/"), stream=True)
        with pytest.raises(httpx2.RemoteProtocolError):
            await response.aread()


async def test_closing_the_client_ends_open_streams() -> None:
    app = Counting()
    client = httpx2.AsyncClient(transport=SandboxTransport(app))
    await client.send(client.build_request("GET", "http://sandbox.invalid/"), stream=True)
    await client.aclose()
    assert app.disconnected.is_set()


async def test_many_streams_run_side_by_side(client: Client) -> None:
    answers = await asyncio.gather(*(client.ask("slow;ms=1;tokens=10", stream=True) for _ in range(50)))
    assert {answer.text.count("data: ") for answer in answers} == {13}
    assert not client.app.state.in_flight
