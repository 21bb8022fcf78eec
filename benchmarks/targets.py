"""What is measured? The gateway with the money on, nginx in its place, and the upstream itself."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from benchmarks.mock_upstream import COST_NANOS
from benchmarks.rig import ROOT, BenchmarkError, Rig, free_port, program, wait_until_healthy
from embedded.postgres import EmbeddedPostgres

ADMIN_KEY = "gw_admin_for_the_benchmark_only"
CREDITS = 10_000
DRAIN_SECONDS = 20.0
LIMITS = (
    "requests_per_minute",
    "requests_per_hour",
    "requests_per_day",
    "tokens_per_minute",
    "tokens_per_hour",
    "tokens_per_day",
)
UNLIMITED = dict.fromkeys((*LIMITS, "concurrency", "burst"))

NGINX = """
{user}worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/nginx-body;
    proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-fastcgi;
    uwsgi_temp_path {folder}/nginx-uwsgi;
    scgi_temp_path {folder}/nginx-scgi;
    keepalive_requests 1000000000;
    upstream mock {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


@asynccontextmanager
async def mock_upstream(rig: Rig) -> AsyncIterator[str]:
    """The upstream's base URL, without a path."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-m", "benchmarks.mock_upstream", str(port))
    async with rig.running(
        "upstream", *command, cores=rig.cores.others, env={"PYTHONPATH": str(ROOT)}
    ) as process:
        await wait_until_healthy(f"{url}/api/v1/models", process, rig.folder / "upstream.log")
        yield url


@dataclass(frozen=True, slots=True)
class Server:
    """Something that serves, and the process that started its others, if it has any."""

    url: str
    process: subprocess.Popen[bytes]


@asynccontextmanager
async def nginx(rig: Rig, upstream: str) -> AsyncIterator[Server]:
    """nginx as a plain proxy in front of the upstream."""
    port = free_port()
    configuration = rig.folder / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""
    configuration.write_text(
        NGINX.format(user=user, folder=rig.folder, port=port, upstream=upstream.rpartition(":")[2])
    )
    command = (program("nginx") or "nginx", "-e", "stderr", "-c", str(configuration))
    async with rig.running("nginx", *command, cores=rig.cores.gateway) as process:
        await wait_until_healthy(f"http://127.0.0.1:{port}/api/v1/models", process, rig.folder / "nginx.log")
        yield Server(f"http://127.0.0.1:{port}", process)


@dataclass(frozen=True, slots=True)
class Gateway(Server):
    """A gateway that serves."""

    async def register(self, number: int) -> str:
        """A new user with credits and without limits; returns their key."""
        async with httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=30
        ) as http:
            user = await _post(
                http, "/auth/register", {"username": f"bench{number}", "email": f"bench{number}@example.com"}
            )
            await _post(http, "/admin/add_credits", {"user_id": user["user_id"], "credits": CREDITS})
            await _post(http, "/admin/limit", {"user_id": user["user_id"], "rate_limits": UNLIMITED})
        return str(user["api_key"])


async def _post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(path, json=body)
    if not answer.is_success:
        raise BenchmarkError(f"POST {path} answered {answer.status_code}: {answer.text[:500]}")
    return dict(answer.json())


@asynccontextmanager
async def gateway(rig: Rig, upstream: str, data: Path, *, cores: frozenset[int]) -> AsyncIterator[Gateway]:
    """The gateway as it is served in production, on an embedded database in `data`, with `upstream` for
    OpenRouter.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {
        "OPENROUTER_API_KEY": "sk-or-v1-benchmark",
        "OPENROUTER_BASE_URL": f"{upstream}/api/v1",
        "ADMIN_API_KEY": ADMIN_KEY,
        "GATEWAY_DATA_DIR": str(data),
        "PORT": str(port),
    }
    options = (
        "--app-dir",
        str(ROOT),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-proxy-headers",
        "--no-access-log",
    )
    command = (sys.executable, "-m", "uvicorn", "app:app", *options)
    async with rig.running("gateway", *command, cores=cores, env=settings) as process:
        await wait_until_healthy(f"{url}/health", process, rig.folder / "gateway.log")
        yield Gateway(url, process)


async def start_seconds(rig: Rig, upstream: str, data: Path) -> float:
    """How long the gateway takes from its command to a healthy answer, on all cores."""
    began = time.perf_counter()
    async with gateway(rig, upstream, data, cores=rig.cores.all):
        return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Ledger:
    """The gateway's database, seen by its owner."""

    server: EmbeddedPostgres
    connection: asyncpg.Connection[asyncpg.Record]

    @property
    def postmaster(self) -> int:
        """The process whose children are PostgreSQL's."""
        folder = Path(self.server.connect_kwargs("postgres")["host"])
        return int((folder / "postmaster.pid").read_text().split()[0])

    async def check(self, answered: int) -> None:
        """Raises BenchmarkError unless every request has its record, no record is pending, costs are exact
        and the books add up.
        """
        pending = await self.drained()
        if pending:
            raise BenchmarkError(f"{pending} records are still pending {DRAIN_SECONDS:g} s after the load.")
        unbalanced = await self.connection.fetch("select * from public.audit_ledger()")
        if unbalanced:
            raise BenchmarkError(
                f"The books of {len(unbalanced)} accounts do not add up: {dict(unbalanced[0])}."
            )
        records = await self._count("true")
        if records < answered:
            raise BenchmarkError(f"{answered} requests were answered, but there are only {records} records.")
        inexact = await self._count(f"status = 'completed' and cost_nanos <> {COST_NANOS}")
        if inexact:
            raise BenchmarkError(
                f"{inexact} completed requests were not charged exactly {COST_NANOS} nano-dollars."
            )

    async def drained(self) -> int:
        """Waits until no record is pending, for some time; returns how many still are."""
        pending = 0
        for _ in range(int(DRAIN_SECONDS / 0.1)):
            if not (pending := await self._count("status = 'pending'")):
                break
            await asyncio.sleep(0.1)
        return pending

    async def _count(self, condition: str) -> int:
        return int(
            await self.connection.fetchval(f"select count(*) from public.usage_records where {condition}")
        )


@asynccontextmanager
async def ledger(data: Path, settings: dict[str, str] | None = None) -> AsyncIterator[Ledger]:
    """The embedded PostgreSQL, started here so that it runs on our cores; the gateway joins it."""
    async with AsyncExitStack() as stack:
        server = await EmbeddedPostgres.start(data, settings=settings)
        stack.push_async_callback(server.stop)
        connection = await asyncpg.connect(**server.connect_kwargs("postgres"))
        stack.push_async_callback(connection.close)
        yield Ledger(server, connection)
