"""Clients of the simulator: in process through its transport, and over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from sandbox import Sandbox, SandboxTransport, create_app
from tests.support.sandbox_client import BASE_URL, Client


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
