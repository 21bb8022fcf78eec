"""ASGI applications on sockets of 127.0.0.1, and waiting for what happens in them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment of a server in a process of its own: these variables, and no settings of the machine.

    Variables of coverage.py pass, so that `make coverage` measures the process.
    """
    measuring = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return {"PATH": os.environ["PATH"], **measuring, **variables}


def listening() -> socket.socket:
    """A free port of 127.0.0.1."""
    # Named by its protocol: asyncio sets TCP_NODELAY on no other, and every answer would wait 40 ms for an
    # acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    return listener


@asynccontextmanager
async def served(app: Any, *, grace: int = 5) -> AsyncIterator[str]:
    """Serves an ASGI app on a free port of 127.0.0.1; yields its base URL. At its end, requests have `grace`
    seconds to end.
    """
    listener = listening()
    config = uvicorn.Config(
        app, log_config=None, proxy_headers=False, access_log=False, timeout_graceful_shutdown=grace
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server._serve(sockets=[listener]))
    while not server.started:
        if running.done():
            running.result()
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running
        listener.close()


async def is_ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health/ready")).status_code == 200
    except httpx.HTTPError:
        return False


async def eventually(
    ask: Callable[[], Awaitable[Any]], accept: Callable[[Any], bool], seconds: float = 10.0
) -> Any:
    """Asks again until the answer is accepted; for what happens after a client is gone, when there is nothing
    to await.
    """
    async with asyncio.timeout(seconds):
        while not accept(response := await ask()):  # noqa: ASYNC110  # what it waits for happens elsewhere
            await asyncio.sleep(0.02)
    return response
