"""A gateway of several processes, as an operator would start it."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx

from tests.support import ROOT
from tests.support.database import Database
from tests.support.gateway import ADMIN_KEY, OPERATOR_KEY, SECRET, Gateway, User
from tests.support.servers import clean_environment, eventually, is_ready


@asynccontextmanager
async def running_workers(
    database: Database, upstream_url: str, folder: Path
) -> AsyncIterator[tuple[Gateway, int]]:
    """`uvicorn app:app --workers 2` in live mode, as an operator would start it, and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    environment = clean_environment(
        DATABASE_URL=database.url,
        ADMIN_API_KEY=ADMIN_KEY,
        KEY_HASH_SECRETS=SECRET,
        ENCRYPTION_KEYS=SECRET,
        OPENROUTER_API_KEY=OPERATOR_KEY,
        OPENROUTER_BASE_URL=upstream_url,
        GATEWAY_DATA_DIR=str(folder),
        LOG_LEVEL="error",
    )
    options = ("--no-proxy-headers", "--workers", "2", "--port", str(port), "--log-level", "error")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "app:app", *options),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    limits = httpx.Limits(
        max_connections=250, max_keepalive_connections=0
    )  # each request is a connection, to whichever worker takes it
    async with (
        AsyncExitStack() as stack,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http,
    ):
        try:
            await eventually(lambda: is_ready(http), lambda ready: ready, seconds=120)
            yield Gateway(f"http://127.0.0.1:{port}", None, database, http, stack), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()


def workers_of(pid: int) -> list[int]:
    """The server processes below the supervisor (multiprocessing also keeps a tracker there)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


async def start_stream(user: User) -> tuple[asyncio.Task[None], asyncio.Event]:
    """A stream that is read until it breaks; the event says that it has begun."""
    begun = asyncio.Event()

    async def read() -> None:
        body = {
            "model": "openai/gpt-4o-mini",
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "max_tokens": 400,
        }
        try:
            async with user.gateway.http.stream(
                "POST", "/v1/chat/completions", headers=user.headers, json=body
            ) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        begun.set()
        except httpx.HTTPError:
            return

    task = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), 10)
    return task, begun
