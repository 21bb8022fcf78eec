"""Measures a month's usage report over millions of records, asked for as /admin/usage does.

`python -m benchmarks.reports [--records 5000000]` fills an embedded database and sums it up first. It needs
some minutes and, for five million records, about 6 GB below build/.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import time
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

import asyncpg

from embedded.migrate import migrate
from embedded.postgres import EmbeddedPostgres
from supabase_config import MIGRATIONS

FOLDER = Path(__file__).parent.parent / "build" / "reports"
USERS, MODELS, DAYS, RUNS = 500, 12, 30, 9

PEOPLE = """
insert into public.users (username, email)
select 'user' || n, 'user' || n || '@example.com' from generate_series(1, $1::int) n;
"""
KEYS = """
insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id)
select id, 'Primary Key', 'gw_live_', 'abcd', lpad(to_hex(id), 64, '0'), 's' from public.users;
"""
RECORDS = """
insert into public.usage_records (
    request_id, user_id, key_id, mode, environment, endpoint, model, provider,
    prompt_tokens, completion_tokens, hold_nanos, upstream_cost_nanos, cost_nanos, markup,
    status, settlement_source, latency_ms, created_at, expires_at, settled_at)
select gen_random_uuid(), u, u, 'live', 'live', 'chat/completions', 'author/model-' || m, 'Provider',
       100, 200, 0, 1000, 1000, 1,
       'completed', 'usage', (random() * 5000)::int, t, t, t
from (select 1 + n % $4::int as u, n % $5::int as m,
             $2::timestamptz + ($3::float8 * n) * interval '1 second' as t
      from generate_series(0, $1::int - 1) n) as made
"""
BOUNDS = "select date_trunc('day', now(), 'UTC') - make_interval(days => $1), date_trunc('day', now(), 'UTC')"
REPORT = "select public.report_usage($1::bigint, $2, $3, $4, 'day', 'model', 10001)"


# Nothing here is worth keeping, and filling is most of the time.
SETTINGS = {"fsync": "off", "synchronous_commit": "off", "max_wal_size": "4GB"}
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def fill(connection: Connection, records: int) -> None:
    """A month of evenly spread records, summed up."""
    await connection.execute(PEOPLE.replace("$1::int", str(USERS)))
    await connection.execute(KEYS)
    start, _ = await _month(connection)
    share = records // DAYS
    for day in range(DAYS):
        moment = await connection.fetchval("select $1::timestamptz + make_interval(days => $2)", start, day)
        await connection.execute(RECORDS, share, moment, 86400 / share, USERS, MODELS)
    await connection.execute("vacuum analyze public.usage_records")
    while await connection.fetchval("select public.sum_up_usage()"):
        pass
    for table in ("usage_slots", "usage_days"):
        await connection.execute(f"vacuum analyze public.{table}")


async def median_ms(connection: Connection, user_id: int | None, zone: str) -> float:
    """The median time of a month's report by day and model, in milliseconds."""
    start, end = await _month(connection)
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        await connection.fetchval(REPORT, user_id, start, end, zone)
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


async def _month(connection: Connection) -> tuple[datetime, datetime]:
    row = await connection.fetchrow(BOUNDS, DAYS)
    assert row is not None
    return row[0], row[1]


async def measure(records: int) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    server = await EmbeddedPostgres.start(FOLDER, settings=SETTINGS)
    try:
        await migrate(server.connect_kwargs("postgres"), MIGRATIONS)
        connection = await asyncpg.connect(**server.connect_kwargs("postgres"), statement_cache_size=0)
        await _fill_and_report(connection, records)
        await connection.close()
    finally:
        await server.stop()
        shutil.rmtree(FOLDER, ignore_errors=True)


async def _fill_and_report(connection: Connection, records: int) -> None:
    began = time.perf_counter()
    await fill(connection, records)
    seconds = time.perf_counter() - began
    print(f"{records:,} records of {USERS} users and {MODELS} models in {DAYS} days; made in {seconds:.0f} s")
    for user, zone in ((None, "UTC"), (None, "Europe/Berlin"), (7, "UTC"), (7, "Europe/Berlin")):
        name = "everybody" if user is None else "one user"
        milliseconds = await median_ms(connection, user, zone)
        print(f"a month by day and model, {name}, {zone}: {milliseconds:.0f} ms (median of {RUNS})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=5_000_000)
    asyncio.run(measure(parser.parse_args().records))
