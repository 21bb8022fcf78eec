"""How much does a server answer, and how fast? One run of wrk; every answer must be a 200."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.mock_upstream import EVENTS, MODEL
from benchmarks.rig import BenchmarkError, minimal_environment, program

SCRIPT = Path(__file__).with_name("load.lua")
PATH = "/api/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Which proverb is about gold? Answer in one short sentence, please."}]
PLAIN = json.dumps({"model": MODEL, "messages": MESSAGES, "max_tokens": 100}, separators=(",", ":"))
STREAMED = json.dumps(
    {"model": MODEL, "messages": MESSAGES, "max_tokens": 100, "stream": True}, separators=(",", ":")
)
PACED = json.dumps(
    {"model": MODEL, "messages": MESSAGES, "max_tokens": 100, "stream": True, "seed": 1},
    separators=(",", ":"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """What wrk saw."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds


async def run_wrk(base: str, body: str, keys: Sequence[str], *, connections: int, seconds: int) -> Run:
    """Loads `base` for that long. Raises BenchmarkError where any answer was not a 200 or a connection broke."""
    wrk = program("wrk") or "wrk"
    command = [
        wrk,
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        "10s",
        "-s",
        str(SCRIPT),
        base + PATH,
    ]
    env = {**minimal_environment(), "BENCH_KEYS": ",".join(keys), "BENCH_BODY": body}
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    found = json.loads(output.splitlines()[-1])
    if found["failed"] or not found["requests"]:
        raise BenchmarkError(
            f"{found['failed']} of {found['requests']} answers of {base} failed: the figures would mean nothing."
        )
    return Run(found["requests"], found["seconds"], found["p50_us"] / 1000, found["p99_us"] / 1000)


async def check_answers(base: str, key: str, *, metered: bool) -> None:
    """Looks at one plain and one streamed answer in full before any is counted. Raises BenchmarkError."""
    async with httpx.AsyncClient(
        timeout=10, headers={"authorization": f"Bearer {key}", "content-type": "application/json"}
    ) as http:
        plain = await http.post(base + PATH, content=PLAIN)
        streamed = await http.post(base + PATH, content=STREAMED)
    for answer in (plain, streamed):
        if answer.status_code != 200 or '"cost":0.000027' not in answer.text:
            raise BenchmarkError(f"{base} answered {answer.status_code}: {answer.text[:500]}")
        if metered and '"gateway_usage"' not in answer.text:
            raise BenchmarkError(f"{base} answered without gateway_usage: {answer.text[:500]}")
    events = streamed.text.count("data: ")
    if events != EVENTS or not streamed.text.endswith("data: [DONE]\n\n"):
        raise BenchmarkError(f"{base} streamed {events} events instead of {EVENTS}.")
