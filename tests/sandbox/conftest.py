"""Clients of the simulator: in process through its transport, and over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from sandbox import Sandbox, SandboxTransport, create_app

BASE_URL = "https://openrouter.ai/api/v1"
KEY = {"Authorization": "Bearer sk-or-v1-test"}
HI = [{"role": "user", "content": "Say hi"}]


@dataclass
class Client:
    """Short ways to ask the simulator."""

    app: Sandbox
    http: httpx2.AsyncClient

    def request(
        self, scenario: str = "ordinary", path: str = "/chat/completions", **body: Any
    ) -> httpx2.Request:
        body = {"model": "openai/gpt-4o-mini", "messages": HI, **body}
        headers = {**KEY, "x-sandbox-scenario": scenario}
        return self.http.build_request("POST", path, headers=headers, json=body)

    async def ask(self, scenario: str = "ordinary", **body: Any) -> httpx2.Response:
        return await self.http.send(self.request(scenario, **body))

    async def open_stream(self, scenario: str = "ordinary", **body: Any) -> httpx2.Response:
        return await self.http.send(self.request(scenario, stream=True, **body), stream=True)

    async def look_up(self, generation_id: str) -> httpx2.Response:
        return await self.http.get("/generation", params={"id": generation_id}, headers=KEY)


@pytest.fixture
def app() -> Sandbox:
    return create_app()


@pytest.fixture
async def client(app: Sandbox) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(transport=SandboxTransport(app), base_url=BASE_URL) as http:
        yield Client(app, http)


@pytest.fixture
async def sdk(app: Sandbox) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx2.AsyncClient(transport=SandboxTransport(app))
    async with openai.AsyncOpenAI(
        api_key="sk-or-v1-test", base_url=BASE_URL, http_client=http, max_retries=0
    ) as client:
        yield client


class _Server(uvicorn.Server):
    """uvicorn, telling when it listens and on which port."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @property
    def port(self) -> int:
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port


@pytest.fixture
async def served(app: Sandbox) -> AsyncIterator[Client]:
    """The simulator behind uvicorn on a free port."""
    server = _Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await server.listening.wait()
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.port}/api/v1") as http:
        yield Client(app, http)
    server.should_exit = True
    await serving
