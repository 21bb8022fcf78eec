"""All charges together equal the upstream's own bill: random requests with random endings, on two workers.

`make bill` sends 2,000 (`ARGS="REQUESTS SEED"` as many as it is told). Not collected by pytest:
`billing/test_bill.py` runs a few.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import httpx

from embedded.postgres import EmbeddedPostgres
from sandbox import create_app as create_sandbox
from sandbox.generation import Generation
from tests.support.database import Database, fresh_database, quick_folder, started_postgres
from tests.support.gateway import Gateway, User
from tests.support.kinds import KINDS, Kind
from tests.support.servers import eventually, served
from tests.support.upstream import Upstream
from tests.support.workers import running_workers

USERS = 8
AT_ONCE = 24
SETTLED_SECONDS = 120.0

# How the upstream may answer, and how often. Where it leaves neither usage nor a generation that can be asked
# for, nothing is charged by design: those are not among them.
ANSWERS = {
    "": 30,
    "usage-empty-choices": 3,
    "usage-null-finish": 3,
    "usage-every-event": 3,
    "usage-twice": 2,
    "usage-missing": 2,
    "usage-missing-no-done": 2,
    "no-done": 2,
    "keepalive": 2,
    "crlf": 2,
    "split-chunks": 2,
    "tool-call": 2,
    "reasoning": 2,
    "stream-error": 3,
    "stream-error-string": 2,
    "stream-error-empty": 2,
    "error-first": 2,
    "error-in-200": 2,
    "provider-died": 2,
    "cost-null": 2,
    "cost-zero": 2,
    "cost-negative": 2,
    "cost-nan": 2,
    "cost-string": 2,
    "cost-above-hold": 2,
    "byok": 2,
    "cache-read": 2,
    "cache-write": 2,
    "cache-hit": 2,
    "fallback": 2,
    "dearer-provider": 2,
    "gzip": 2,
    "slow;ms=5;tokens=40": 8,
    "abort;ms=10;times=1": 8,
    "generation-late;times=1": 2,
    "cut": 4,
    "error-429": 2,
    "error-500": 2,
    "error-503": 2,
}


class RandomUpstream(Upstream):
    """Answers each billable request in a way of its own choice."""

    rng: random.Random = random.Random(0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            self.scenario = self.rng.choices(list(ANSWERS), list(ANSWERS.values()))[0]
        else:
            self.scenario = ""
        await super().__call__(scope, receive, send)


@dataclass(slots=True)
class Result:
    """What came of it all. `faults` is empty where every charge is right."""

    requests: int
    endings: Counter[str] = field(default_factory=Counter)
    charged: Decimal = Decimal(0)
    billed: Decimal = Decimal(0)
    faults: list[str] = field(default_factory=list)


async def send(user: User, kind: Kind, rng: random.Random) -> str:
    """One request, and how its client saw it end."""
    body = kind.body(rng)
    streamed = kind.streams and rng.random() < 0.6
    if streamed:
        body["stream"] = True
    patience = rng.choice((None, None, None, 0.0, 0.01, 0.05, 0.2))  # seconds until this client leaves
    content = kind.content(body)
    try:
        async with (
            asyncio.timeout(patience),
            user.gateway.http.stream("POST", kind.url, headers=user.headers, **content) as response,
        ):
            async for _ in response.aiter_raw():
                pass
            return f"{kind.path} {'stream ' if streamed else ''}{response.status_code}"
    except (TimeoutError, httpx.HTTPError) as error:
        ending = "left" if isinstance(error, TimeoutError) else "broken"
        return f"{kind.path} {'stream ' if streamed else ''}{ending}"


async def run(
    database: Database, gateway: Gateway, upstream: Upstream, *, requests: int, seed: int
) -> Result:
    """Sends that many requests, waits until all are settled, and compares the books."""
    users = [await gateway.register(credits=10_000) for _ in range(USERS)]
    for user in users:
        await gateway.admin(
            "POST",
            "/admin/limit",
            json={"user_id": user.id, "rate_limits": {"concurrency": None, "burst": None}},
        )
    result = Result(requests)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        own = random.Random(seed * 1_000_003 + number)
        async with gate:
            result.endings[await send(own.choice(users), own.choice(KINDS), own)] += 1

    await asyncio.gather(*(one(number) for number in range(requests)))
    pending = "select count(*) from public.usage_records where status = 'pending'"
    try:
        await eventually(lambda: database.value(pending), lambda count: count == 0, seconds=SETTLED_SECONDS)
    except TimeoutError:
        result.faults.append(
            f"{await database.value(pending)} requests are still pending after {SETTLED_SECONDS:g} s"
        )
    await compare(database, upstream, result)
    return result


async def compare(database: Database, upstream: Upstream, result: Result) -> None:
    """Each record against the generation that it paid for, then the sums."""
    query = (
        "select request_id, endpoint, status, settlement_source, generation_id, cost_nanos, "
        "overrun_nanos from public.usage_records"
    )
    generations = dict(upstream.sandbox.state.generations)
    for record in await database.rows(query):
        due = Decimal(record["cost_nanos"] + record["overrun_nanos"]).scaleb(-9)
        generation = generations.pop(record["generation_id"] or "", None)
        bill = _bill(generation) if generation else Decimal(0)
        result.charged += due
        if due != bill.quantize(Decimal("1e-9"), ROUND_CEILING):
            what = f"{record['endpoint']} {record['status']} by {record['settlement_source']}"
            result.faults.append(
                f"{what}: charged {due}, billed {bill} ({record['request_id']}, {record['generation_id']})"
            )
        result.billed += bill
    result.faults += [
        f"billed and not charged: {name} {_bill(found)}"
        for name, found in generations.items()
        if _bill(found)
    ]
    if books := await database.rows("select * from public.audit_ledger()"):
        result.faults.append(f"the books do not add up: {books}")
    if held := await database.value("select sum(held_nanos) from public.users"):
        result.faults.append(f"{held} nano-dollars are still held")


def _bill(generation: Generation) -> Decimal:
    """What the operator pays: the upstream, and the provider whose own key was used."""
    return generation.cost + (generation.upstream_cost if generation.byok else Decimal(0))


@contextmanager
def postgres() -> Iterator[EmbeddedPostgres]:
    with quick_folder() as folder:
        yield from started_postgres(folder / "data", None)


async def main(server: EmbeddedPostgres, requests: int, seed: int) -> Result:
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(fresh_database(server))
        upstream = RandomUpstream("", create_sandbox())
        upstream.rng = random.Random(seed)
        upstream.url = await stack.enter_async_context(served(upstream)) + "/api/v1"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-bill-")))
        gateway, _ = await stack.enter_async_context(running_workers(database, upstream.url, folder))
        return await run(database, gateway, upstream, requests=requests, seed=seed)


def report(result: Result) -> Iterator[str]:
    yield from (f"{count:6}  {ending}" for ending, count in sorted(result.endings.items()))
    yield f"{result.requests} requests: charged {result.charged:f}, billed {result.billed:f}"
    yield from result.faults[:50]


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with postgres() as running:
        found = asyncio.run(main(running, count, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
    print("\n".join(report(found)))
    raise SystemExit(bool(found.faults))
