"""One load: wrk against a server for some seconds. Every answer must be a 200, or no figure counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.mock_upstream import EVENTS, MODEL
from benchmarks.rig import BenchmarkError, minimal_environment, program

BUSY = 64
SCRIPT = Path(__file__).with_name("load.lua")
PATH = "/api/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Which proverb is about gold? Answer in one short sentence, please."}]


def _body(**more: object) -> str:
    return json.dumps(
        {"model": MODEL, "messages": MESSAGES, "max_tokens": 100, **more}, separators=(",", ":")
    )


PLAIN = _body()
STREAMED = _body(stream=True)
PACED = _body(stream=True, seed=1)


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
    """Loads `base` for that long. Raises BenchmarkError where any answer was not a 200."""
    options = ("-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(SCRIPT))
    env = {**minimal_environment(), "BENCH_KEYS": ",".join(keys), "BENCH_BODY": body}
    output = await _output_of((program("wrk") or "wrk", *options, base + PATH), env)
    counts = json.loads(output.splitlines()[-1])
    if counts["failed"] or not counts["requests"]:
        raise BenchmarkError(
            f"{counts['failed']} of {counts['requests']} answers of {base} failed: "
            "the figures would mean nothing."
        )
    return Run(counts["requests"], counts["seconds"], counts["p50_us"] / 1000, counts["p99_us"] / 1000)


async def _output_of(command: Sequence[str], env: dict[str, str]) -> bytes:
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output


async def check_answers(base: str, key: str, *, expected: str = "") -> None:
    """Looks at one plain and one streamed answer in full before any is counted; both must hold `expected`.

    Raises BenchmarkError.
    """
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    async with httpx.AsyncClient(timeout=10, headers=headers) as http:
        plain = await http.post(base + PATH, content=PLAIN)
        streamed = await http.post(base + PATH, content=STREAMED)
    for response in (plain, streamed):
        if response.status_code != 200 or '"cost":0.000027' not in response.text:
            raise BenchmarkError(f"{base} answered {response.status_code}: {response.text[:500]}")
        if expected not in response.text:
            raise BenchmarkError(f"{base} answered without {expected}: {response.text[:500]}")
    events = streamed.text.count("data: ")
    if events != EVENTS or not streamed.text.endswith("data: [DONE]\n\n"):
        raise BenchmarkError(f"{base} streamed {events} events instead of {EVENTS}.")
