"""In which order is what measured? Starts, then rounds of short loads against upstream, nginx and gateway,
then the books.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from benchmarks.load import PACED, PLAIN, STREAMED, Run, check_answers, run_wrk
from benchmarks.mock_upstream import EVENTS
from benchmarks.processes import cpu_seconds, memory_of
from benchmarks.report import Row
from benchmarks.rig import Rig
from benchmarks.targets import Gateway, Ledger, Server, gateway, ledger, mock_upstream, nginx, start_seconds

USERS = 16
BUSY = 64
STRANGER = ("gw_live_nobody_asks",)


@dataclass(frozen=True)
class Plan:
    """How long, in whole seconds, and how often."""

    rounds: int = 3
    seconds: int = 4
    baseline_seconds: int = 1


@dataclass(slots=True)
class Figures:
    """All measurements by name; a row of the report is a median."""

    found: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    answered: int = 0

    def add(self, name: str, value: float) -> None:
        self.found[name].append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.found[name])


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that runs, and what was measured so far."""

    plan: Plan
    gateway: Gateway
    ledger: Ledger
    direct: str
    nginx: Server
    keys: Sequence[str]
    figures: Figures = field(default_factory=Figures)

    async def warm_up(self) -> None:
        """Caches, connections and plans; nothing of it counts."""
        for base in (self.direct, self.nginx.url, self.gateway.url):
            await check_answers(base, self.keys[0], metered=base == self.gateway.url)
        for body in (PLAIN, STREAMED):
            await self._load(self.gateway.url, body, self.keys, seconds=self.plan.baseline_seconds)

    async def round(self) -> None:
        """One value for each figure."""
        for name, base in (("direct", self.direct), ("nginx", self.nginx.url)):
            await self._baseline(name, base)
        await self._pace_nginx()
        await self.ledger.drained()  # what earlier loads cut off is looked up and settled in the background
        alone = await self._load(self.gateway.url, PLAIN, self.keys, connections=1, seconds=self.plan.seconds)
        self._add_latency("gateway", alone)
        await self._metered("json", PLAIN, self.keys)
        await self._metered("stream", STREAMED, self.keys)
        await self._metered("hot", PLAIN, self.keys[:1])
        await self._metered("paced", PACED, self.keys)

    async def _baseline(self, name: str, base: str) -> None:
        seconds = self.plan.baseline_seconds
        for kind, body in (("json", PLAIN), ("stream", STREAMED)):
            run = await run_wrk(base, body, STRANGER, connections=BUSY, seconds=seconds)
            self.figures.add(f"{kind} {name}", run.per_second)
        self._add_latency(name, await run_wrk(base, PLAIN, STRANGER, connections=1, seconds=seconds))

    async def _pace_nginx(self) -> None:
        """What an event costs that comes alone: most of it is waking up, and differs between machines."""
        pid = self.nginx.process.pid
        before = cpu_seconds(pid, with_children=True)
        run = await run_wrk(
            self.nginx.url, PACED, STRANGER, connections=BUSY, seconds=2 * self.plan.baseline_seconds
        )
        self.figures.add(
            "paced nginx cpu", (cpu_seconds(pid, with_children=True) - before) / run.requests * 1e6
        )

    async def _metered(self, kind: str, body: str, keys: Sequence[str]) -> None:
        before = self._cpu()
        run = await self._load(self.gateway.url, body, keys, seconds=self.plan.seconds)
        ours, database = (after - earlier for after, earlier in zip(self._cpu(), before, strict=True))
        self.figures.add(f"{kind} gateway", run.per_second)
        self.figures.add(f"{kind} gateway cpu", ours / run.requests * 1e6)
        self.figures.add(f"{kind} database cpu", database / run.requests * 1e6)

    async def _load(
        self, base: str, body: str, keys: Sequence[str], *, seconds: int, connections: int = BUSY
    ) -> Run:
        run = await run_wrk(base, body, keys, connections=connections, seconds=seconds)
        self.figures.answered += run.requests
        return run

    def _cpu(self) -> tuple[float, float]:
        return cpu_seconds(self.gateway.process.pid), cpu_seconds(self.ledger.postmaster, with_children=True)

    def _add_latency(self, name: str, run: Run) -> None:
        self.figures.add(f"p50 {name}", run.p50_ms)
        self.figures.add(f"p99 {name}", run.p99_ms)


async def measure(rig: Rig, plan: Plan) -> list[Row]:
    """The rows of the report. Raises BenchmarkError when an answer failed or the books do not add up."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(mock_upstream(rig))
        starts = [
            [await start_seconds(rig, upstream, rig.folder / f"start{n}") for _ in range(2)]
            for n in range(plan.rounds)
        ]
        proxy = await stack.enter_async_context(nginx(rig, upstream))
        books = await stack.enter_async_context(ledger(rig.folder / "data"))
        served = await stack.enter_async_context(
            gateway(rig, upstream, rig.folder / "data", cores=rig.cores.gateway)
        )
        keys = [await served.register(number) for number in range(USERS)]
        bench = Bench(plan, served, books, upstream, proxy, keys)
        await bench.warm_up()
        for _ in range(plan.rounds):
            await bench.round()
        memory = memory_of(served.process.pid)
        await books.check(bench.figures.answered)
        first, later = (statistics.median(column) for column in zip(*starts, strict=True))
        return [
            *_speed(bench.figures),
            *_cost(bench.figures),
            Row("memory of the worker after load, RSS", memory.rss, "MB", goal="< 115"),
            Row("memory of the worker after load, PSS", memory.pss, "MB"),
            Row("start, first (creates its database)", first, "s", goal="< 3"),
            Row("start, later", later, "s", goal="< 1.5"),
        ]


def _speed(figures: Figures) -> list[Row]:
    median = figures.median

    def throughput(name: str, kind: str, goal: str) -> Row:
        like = "stream" if kind == "stream" else "json"
        return Row(
            name, median(f"{kind} gateway"), "/s", median(f"{like} direct"), median(f"{like} nginx"), goal
        )

    def added(percentile: str, goal: str) -> Row:
        direct = median(f"{percentile} direct")
        nginx_adds = max(median(f"{percentile} nginx") - direct, 0.0)
        return Row(
            f"latency added at c=1, {percentile}",
            median(f"{percentile} gateway") - direct,
            "ms",
            nginx=nginx_adds,
            goal=goal,
        )

    return [
        throughput(f"json requests, c={BUSY}", "json", "2,000"),
        throughput(f"streams of {EVENTS} events, c={BUSY}", "stream", "1,500"),
        throughput(f"one hot account, json, c={BUSY}", "hot", "1,500"),
        added("p50", "< 2.5"),
        added("p99", "< 8"),
    ]


def _cost(figures: Figures) -> list[Row]:
    return [
        Row("CPU of the gateway a json request", figures.median("json gateway cpu"), "us"),
        Row("CPU of PostgreSQL a json request", figures.median("json database cpu"), "us"),
        Row("CPU of the gateway a stream", figures.median("stream gateway cpu"), "us"),
        Row("CPU of PostgreSQL a stream", figures.median("stream database cpu"), "us"),
        Row(
            "CPU of the gateway a paced event",
            figures.median("paced gateway cpu") / EVENTS,
            "us",
            nginx=figures.median("paced nginx cpu") / EVENTS,
            goal="< 30",
        ),
    ]
