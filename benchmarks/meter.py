"""A gateway under load: what each load costs it and its database. After each load its books must be whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.ledger import Ledger, ledger
from benchmarks.load import BUSY, PLAIN, STREAMED, Run, check_answers, run_wrk
from benchmarks.processes import cpu_seconds
from benchmarks.rig import Rig
from benchmarks.targets import UVICORN, Gateway, gateway

USERS = 16


@dataclass(frozen=True, slots=True)
class Metered:
    """One load: what wrk saw, and the CPU time a request took, in microseconds."""

    run: Run
    gateway_us: float
    database_us: float


@dataclass(slots=True)
class Meter:
    """Everything of one gateway, and how many requests it has answered."""

    gateway: Gateway
    ledger: Ledger
    keys: Sequence[str]
    answered: int = 0

    async def warm_up(self, seconds: int) -> None:
        """Fills caches, connections and plans; nothing of it counts."""
        await check_answers(self.gateway.url, self.keys[0], expected='"gateway_usage"')
        for body in (PLAIN, STREAMED):
            await self.load(body, seconds=seconds)

    async def load(
        self, body: str, *, seconds: int, connections: int = BUSY, keys: Sequence[str] | None = None
    ) -> Metered:
        """Runs one load. Raises BenchmarkError where an answer failed or the books are not whole after it."""
        before = self._cpu()
        run = await run_wrk(
            self.gateway.url, body, keys or self.keys, connections=connections, seconds=seconds
        )
        # Before the books are looked at: that costs the database something, too.
        ours, database = (after - earlier for after, earlier in zip(self._cpu(), before, strict=True))
        self.answered += run.requests
        await self.ledger.check_books()
        return Metered(run, ours / run.requests * 1e6, database / run.requests * 1e6)

    def _cpu(self) -> tuple[float, float]:
        return cpu_seconds(self.gateway.process.pid), self.ledger.cpu_seconds()


@asynccontextmanager
async def open_meter(
    rig: Rig, upstream: str, name: str = "gateway", command: Sequence[str] = UVICORN
) -> AsyncIterator[Meter]:
    """A gateway on its core, with a database of its own on the other ones and users who may spend."""
    data = rig.folder / f"{name}-data"
    async with (
        gateway(rig, upstream, data, cores=rig.cores.gateway, command=command, name=name) as served,
        ledger(data, cores=rig.cores.others) as books,
    ):
        yield Meter(served, books, [await served.register(number) for number in range(USERS)])
