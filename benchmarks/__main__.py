"""`python -m benchmarks` measures the gateway and prints one table.

It fails, without a table, where an answer or the books were wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from benchmarks.report import table
from benchmarks.rig import BenchmarkError, open_rig, run_to_the_end
from benchmarks.run import Plan, measure

LIMIT_SECONDS = 240.0


async def bench(plan: Plan) -> str:
    async with asyncio.timeout(LIMIT_SECONDS), open_rig() as rig:
        return table(await measure(rig, plan))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=Plan.rounds, help="how often each figure is taken (the median counts)"
    )
    parser.add_argument("--seconds", type=int, default=Plan.seconds, help="length of one load on the gateway")
    arguments = parser.parse_args()
    try:
        print(run_to_the_end(bench(Plan(arguments.rounds, arguments.seconds))))
    except BenchmarkError as error:
        print(f"The benchmark failed. {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("The benchmark was interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
