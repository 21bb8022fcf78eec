"""The simulator behaves the same behind a real server: it streams, is aborted, cuts connections, and is
itself killed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator

import httpx2
import openai
import pytest

from sandbox import SandboxTransport, create_app
from tests.support import ROOT
from tests.support.sandbox_client import Client

KEY = {"Authorization": "Bearer sk-or-v1-test"}


async def test_a_paced_stream_arrives_event_by_event(served: Client) -> None:
    response = await served.open_stream("slow;ms=2;tokens=5")
    pieces = [piece async for piece in response.aiter_raw()]
    assert len(pieces) >= 8


async def test_the_openai_sdk_streams_over_a_socket(served: Client) -> None:
    async with openai.AsyncOpenAI(api_key="sk-or-x", base_url=str(served.http.base_url)) as sdk:
        stream = await sdk.chat.completions.create(
            model="openai/gpt-4o-mini", messages=[{"role": "user", "content": "Say hi"}], stream=True
        )
        assert [chunk async for chunk in stream][-1].usage


async def test_an_abort_over_a_socket_is_seen(served: Client) -> None:
    response = await served.open_stream("slow;ms=2;tokens=400")
    await anext(response.aiter_raw())
    await response.aclose()
    while (lookup := await served.look_up(response.headers["x-generation-id"])).status_code == 404:
        pass
    data = lookup.json()["data"]
    assert data["cancelled"] is True and data["tokens_completion"] < 400


@pytest.mark.parametrize("scenario", ["cut", "hang"])
async def test_cuts_and_silence_are_transport_errors(served: Client, scenario: str) -> None:
    request = served.request(scenario, stream=True)
    request.extensions["timeout"] = {"read": 0.2}
    with pytest.raises(httpx2.RemoteProtocolError if scenario == "cut" else httpx2.ReadTimeout):
        await served.http.send(request)


@pytest.mark.parametrize("stream", [True, False])
async def test_gzip_and_split_pieces_pass_a_real_server(served: Client, stream: bool) -> None:
    for scenario in ("gzip", "split-chunks", "gzip,split-chunks"):
        assert "usage" in (await served.ask(scenario, stream=stream)).text


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "sandbox", "--port", "0"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_a_killed_server_leaves_ids_that_any_instance_can_price(process: Process) -> None:
    assert process.stdout is not None
    base_url = (await process.stdout.readline()).decode().strip().removeprefix("OPENROUTER_BASE_URL=")
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "x"}], "stream": True}
    headers = {**KEY, "x-sandbox-scenario": "stall;tokens=9"}
    async with httpx2.AsyncClient(base_url=base_url) as http:
        request = http.build_request("POST", "/chat/completions", json=body, headers=headers)
        response = await http.send(request, stream=True)
        process.kill()
        with pytest.raises((httpx2.RemoteProtocolError, httpx2.ReadError)):
            await response.aread()
    async with httpx2.AsyncClient(transport=SandboxTransport(create_app()), base_url=base_url) as other:
        query = {"id": response.headers["x-generation-id"]}
        data = (await other.get("/generation", params=query, headers=KEY)).json()["data"]
    assert data["tokens_completion"] == 9 and data["total_cost"] > 0


async def test_a_process_of_its_own_has_a_bill_of_its_own(process: Process) -> None:
    assert process.stdout is not None
    base_url = (await process.stdout.readline()).decode().strip().removeprefix("OPENROUTER_BASE_URL=")
    async with httpx2.AsyncClient(base_url=base_url.removesuffix("/api/v1")) as http:
        body = {"model": "sandbox/fixed-price", "input": "x"}
        response = await http.post("/api/v1/responses", json=body, headers=KEY)
        bill = (await http.get("/sandbox/bill")).json()
    generation = {
        "id": response.headers["x-generation-id"],
        "cost": "0.5",
        "endpoint": "/responses",
        "status": "completed",
    }
    assert bill == {"total": "0.5", "count": 1, "in_flight": 0, "generations": [generation]}
