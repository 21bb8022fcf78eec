"""The database of a gateway under load, seen by its owner: its CPU time, and whether its books are whole.

It belongs to the gateway, which started it and stops it. Nothing here writes to it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from benchmarks.mock_upstream import COST_NANOS
from benchmarks.processes import family_cpu_seconds, is_running, move_family
from benchmarks.rig import STOP_SECONDS, BenchmarkError

DRAIN_SECONDS = 20.0
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Ledger:
    """A connection to the database, and the process whose children are PostgreSQL's."""

    postmaster: int
    connection: asyncpg.Connection[asyncpg.Record]

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        return family_cpu_seconds(self.postmaster)

    async def analyse(self) -> None:
        """Tells the planner how large the tables have become, before autovacuum would."""
        await self.connection.execute("analyze")

    async def check_books(self) -> None:
        """Raises BenchmarkError unless nothing is pending or held and every account's books add up.

        What the end of a load cut off is settled in the background, so this waits for it.
        """
        if pending := await self.drained():
            raise BenchmarkError(f"{pending} records are still pending {DRAIN_SECONDS:g} s after the load.")
        held = await self.connection.fetchval("select sum(held_nanos) from public.users")
        if held:
            raise BenchmarkError(
                f"{held} nano-dollars are still held after the load, though nothing is pending."
            )
        unbalanced = await self.connection.fetch("select * from public.audit_ledger()")
        if unbalanced:
            raise BenchmarkError(
                f"The books of {len(unbalanced)} accounts do not add up: {dict(unbalanced[0])}."
            )

    async def check_charges(self, answered: int) -> None:
        """Raises BenchmarkError unless every answer has its record and each cost exactly what it should."""
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
        for _ in range(int(DRAIN_SECONDS / POLL_SECONDS)):
            if not (pending := await self._count("status = 'pending'")):
                break
            await asyncio.sleep(POLL_SECONDS)
        return pending

    async def _count(self, condition: str) -> int:
        return int(
            await self.connection.fetchval(f"select count(*) from public.usage_records where {condition}")
        )


@asynccontextmanager
async def ledger(data: Path, *, cores: Collection[int]) -> AsyncIterator[Ledger]:
    """The database of the gateway that runs on `data`, moved away from the gateway to `cores`."""
    pid_file = _pid_file(data)
    if pid_file is None:
        raise BenchmarkError(f"The gateway started no PostgreSQL in {data}.")
    # The process id, the folder, the time of the start, the port and the socket's folder, a line each.
    lines = pid_file.read_text().splitlines()
    postmaster = int(lines[0])
    move_family(postmaster, cores)
    connection = await _connect(pid_file.parent / lines[4], int(lines[3]))
    try:
        yield Ledger(postmaster, connection)
    finally:
        await connection.close()


async def _connect(folder: Path, port: int) -> asyncpg.Connection[asyncpg.Record]:
    # By its descriptor: a socket's path must not be longer than 107 bytes, and build/ may lie deep.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return await asyncpg.connect(
            host=f"/proc/self/fd/{descriptor}", port=port, user="postgres", database="postgres", ssl=False
        )
    finally:
        os.close(descriptor)


def stop_left_behind(data: Path) -> None:
    """Stops the PostgreSQL of `data` where its gateway could not: it is no child that would end with us."""
    pid_file = _pid_file(data)
    if pid_file is None or not is_running(pid := int(pid_file.read_text().split()[0])):
        return
    os.kill(pid, signal.SIGINT)
    give_up = time.monotonic() + STOP_SECONDS
    while is_running(pid) and time.monotonic() < give_up:
        time.sleep(POLL_SECONDS)


def _pid_file(data: Path) -> Path | None:
    return next(data.rglob("postmaster.pid"), None)
