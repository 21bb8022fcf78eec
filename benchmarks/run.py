"""The order of one benchmark: starts, rounds of loads on upstream, nginx and gateway, then the books."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from benchmarks.load import BUSY, PACED, PLAIN, STREAMED, Run, check_answers, run_wrk
from benchmarks.meter import Meter, open_meter
from benchmarks.mock_upstream import EVENTS
from benchmarks.processes import family_cpu_seconds, memory_of
from benchmarks.report import Row
from benchmarks.rig import Rig
from benchmarks.targets import Server, mock_upstream, nginx, start_seconds

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

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, value: float) -> None:
        self.values[name].append(value)

    def add_latency(self, name: str, run: Run) -> None:
        self.add(f"p50 {name}", run.p50_ms)
        self.add(f"p99 {name}", run.p99_ms)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that runs, and what was measured so far."""

    plan: Plan
    meter: Meter
    direct: str
    nginx: Server
    figures: Figures = field(default_factory=Figures)

    async def warm_up(self) -> None:
        for base in (self.direct, self.nginx.url):
            await check_answers(base, STRANGER[0])
        await self.meter.warm_up(self.plan.baseline_seconds)

    async def round(self) -> None:
        """One value for each figure."""
        for name, base in (("direct", self.direct), ("nginx", self.nginx.url)):
            await self._baseline(name, base)
        await self._pace_nginx()
        alone = await self.meter.load(PLAIN, connections=1, seconds=self.plan.seconds)
        self.figures.add_latency("gateway", alone.run)
        await self._metered("json", PLAIN)
        await self._metered("stream", STREAMED)
        await self._metered("hot", PLAIN, self.meter.keys[:1])
        await self._metered("paced", PACED)

    async def _baseline(self, name: str, base: str) -> None:
        seconds = self.plan.baseline_seconds
        for kind, body in (("json", PLAIN), ("stream", STREAMED)):
            run = await run_wrk(base, body, STRANGER, connections=BUSY, seconds=seconds)
            self.figures.add(f"{kind} {name}", run.per_second)
        self.figures.add_latency(name, await run_wrk(base, PLAIN, STRANGER, connections=1, seconds=seconds))

    async def _pace_nginx(self) -> None:
        """What an event costs that comes alone: most of it is waking up, and differs between machines."""
        pid = self.nginx.process.pid
        seconds = 2 * self.plan.baseline_seconds
        before = family_cpu_seconds(pid)
        run = await run_wrk(self.nginx.url, PACED, STRANGER, connections=BUSY, seconds=seconds)
        self.figures.add("paced nginx cpu", (family_cpu_seconds(pid) - before) / run.requests * 1e6)

    async def _metered(self, kind: str, body: str, keys: Sequence[str] | None = None) -> None:
        load = await self.meter.load(body, keys=keys, seconds=self.plan.seconds)
        self.figures.add(f"{kind} gateway", load.run.per_second)
        self.figures.add(f"{kind} gateway cpu", load.gateway_us)
        self.figures.add(f"{kind} database cpu", load.database_us)


async def measure(rig: Rig, plan: Plan) -> list[Row]:
    """The rows of the report. Raises BenchmarkError when an answer failed or the books do not add up."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(mock_upstream(rig))
        starts = await _starts(rig, upstream, plan.rounds)
        proxy = await stack.enter_async_context(nginx(rig, upstream))
        meter = await stack.enter_async_context(open_meter(rig, upstream))
        bench = Bench(plan, meter, upstream, proxy)
        await bench.warm_up()
        for _ in range(plan.rounds):
            await bench.round()
        await meter.ledger.check_charges(meter.answered)
        return [*_speed(bench.figures), *_cost(bench.figures), *_memory(meter), *starts]


async def _starts(rig: Rig, upstream: str, rounds: int) -> list[Row]:
    starts = [
        [await start_seconds(rig, upstream, rig.folder / f"start{number}") for _ in range(2)]
        for number in range(rounds)
    ]
    first, later = (statistics.median(column) for column in zip(*starts, strict=True))
    return [
        Row("start, first (creates its database)", first, "s", goal="< 3"),
        Row("start, later", later, "s", goal="< 1.5"),
    ]


def _memory(meter: Meter) -> list[Row]:
    memory = memory_of(meter.gateway.process.pid)
    return [
        Row("memory of the worker after load, RSS", memory.rss, "MB", goal="< 115"),
        Row("memory of the worker after load, PSS", memory.pss, "MB"),
    ]


def _speed(figures: Figures) -> list[Row]:
    return [
        _throughput(figures, f"json requests, c={BUSY}", "json", "json", "2,000"),
        _throughput(figures, f"streams of {EVENTS} events, c={BUSY}", "stream", "stream", "1,500"),
        _throughput(figures, f"one hot account, json, c={BUSY}", "hot", "json", "1,500"),
        _added_latency(figures, "p50", "< 2.5"),
        _added_latency(figures, "p99", "< 8"),
    ]


def _throughput(figures: Figures, name: str, kind: str, baseline: str, goal: str) -> Row:
    direct, proxied = figures.median(f"{baseline} direct"), figures.median(f"{baseline} nginx")
    return Row(name, figures.median(f"{kind} gateway"), "/s", direct, proxied, goal)


def _added_latency(figures: Figures, percentile: str, goal: str) -> Row:
    direct = figures.median(f"{percentile} direct")
    gateway_adds = figures.median(f"{percentile} gateway") - direct
    nginx_adds = max(figures.median(f"{percentile} nginx") - direct, 0.0)
    return Row(f"latency added at c=1, {percentile}", gateway_adds, "ms", nginx=nginx_adds, goal=goal)


def _cost(figures: Figures) -> list[Row]:
    event, nginx_event = (figures.median(f"paced {name} cpu") / EVENTS for name in ("gateway", "nginx"))
    return [
        Row("CPU of the gateway a json request", figures.median("json gateway cpu"), "us"),
        Row("CPU of PostgreSQL a json request", figures.median("json database cpu"), "us"),
        Row("CPU of the gateway a stream", figures.median("stream gateway cpu"), "us"),
        Row("CPU of PostgreSQL a stream", figures.median("stream database cpu"), "us"),
        Row("CPU of the gateway a paced event", event, "us", nginx=nginx_event, goal="< 30"),
    ]
