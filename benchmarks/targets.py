"""The servers under load: the gateway with the money on, nginx in its place, and the upstream."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.ledger import stop_left_behind
from benchmarks.rig import ROOT, BenchmarkError, Rig, free_port, program, wait_until_healthy

ADMIN_KEY = "gw_admin_for_the_benchmark_only"
CREDITS = 10_000
LIMITS = (
    "requests_per_minute",
    "requests_per_hour",
    "requests_per_day",
    "tokens_per_minute",
    "tokens_per_hour",
    "tokens_per_day",
)
UNLIMITED = dict.fromkeys((*LIMITS, "concurrency", "burst"))

# As it is served in production; the port is in the environment.
UVICORN = (
    *(sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(ROOT), "--host", "127.0.0.1"),
    *("--no-proxy-headers", "--no-access-log"),
)

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
    env = {"PYTHONPATH": str(ROOT)}
    async with rig.running("upstream", *command, cores=rig.cores.others, env=env) as process:
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
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30) as http:
            names = {"username": f"bench{number}", "email": f"bench{number}@example.com"}
            user = await _post(http, "/auth/register", names)
            await _post(http, "/admin/add_credits", {"user_id": user["user_id"], "credits": CREDITS})
            await _post(http, "/admin/limit", {"user_id": user["user_id"], "rate_limits": UNLIMITED})
        return str(user["api_key"])


async def _post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await http.post(path, json=body)
    if not response.is_success:
        raise BenchmarkError(f"POST {path} answered {response.status_code}: {response.text[:500]}")
    return dict(response.json())


@asynccontextmanager
async def gateway(
    rig: Rig,
    upstream: str,
    data: Path,
    *,
    cores: frozenset[int],
    command: Sequence[str] = UVICORN,
    name: str = "gateway",
) -> AsyncIterator[Gateway]:
    """A gateway on an embedded database in `data`, with `upstream` for OpenRouter; its log has its name."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        env = _settings(upstream, data, port)
        async with rig.running(name, *command, cores=cores, env=env) as process:
            await wait_until_healthy(f"{url}/health", process, rig.folder / f"{name}.log")
            yield Gateway(url, process)
    finally:
        stop_left_behind(data)


def _settings(upstream: str, data: Path, port: int) -> dict[str, str]:
    return {
        "OPENROUTER_API_KEY": "sk-or-v1-benchmark",
        "OPENROUTER_BASE_URL": f"{upstream}/api/v1",
        "ADMIN_API_KEY": ADMIN_KEY,
        "GATEWAY_DATA_DIR": str(data),
        "PORT": str(port),
        "UVICORN_PORT": str(port),
    }


async def start_seconds(rig: Rig, upstream: str, data: Path) -> float:
    """How long the gateway takes from its command to a healthy answer, on all cores."""
    began = time.perf_counter()
    async with gateway(rig, upstream, data, cores=rig.cores.all):
        return time.perf_counter() - began
