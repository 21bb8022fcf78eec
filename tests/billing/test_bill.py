"""The charges of random requests with random endings are the upstream's bill, to the nano-dollar."""

from __future__ import annotations

import random
from pathlib import Path

from sandbox import create_app as create_sandbox
from tests.bill import RandomUpstream, report, run
from tests.support.database import Database
from tests.support.servers import served
from tests.support.workers import running_workers

REQUESTS, SEED = 300, 7


async def test_charges_of_random_requests_on_two_workers_equal_the_upstreams_bill(
    database: Database, tmp_path: Path
) -> None:
    upstream = RandomUpstream("", create_sandbox())
    upstream.rng = random.Random(SEED)
    async with served(upstream) as url, running_workers(database, f"{url}/api/v1", tmp_path) as (gateway, _):
        result = await run(database, gateway, upstream, requests=REQUESTS, seed=SEED)
    assert not result.faults, "\n".join(report(result))
    assert result.billed > 0 and len(result.endings) > 5
