"""`python -m benchmarks.compare COMMIT` measures the working tree against another commit, side by side.

Both gateways run at the same time, each on a database of its own, and take turns under the same load. It
prints figures; a person judges them, unless `--limit` says how much more CPU a request may take.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from benchmarks.checkout import Checkout, check_out, working_tree
from benchmarks.comparison import Comparison, compare_text, over_limit
from benchmarks.load import BUSY, PLAIN, STREAMED
from benchmarks.meter import Meter, Metered, open_meter
from benchmarks.rig import BenchmarkError, Rig, open_rig, require_tools, run_to_the_end
from benchmarks.targets import mock_upstream

SIDES = ("new", "old")
OVER_LIMIT, NOT_MEASURED = 1, 2
START_SECONDS = 100
# What a load takes beyond its own length: wrk's start, and the books after it.
LOAD_OVERHEAD_SECONDS = 2
WARM_UP_SECONDS = 2


@dataclass(frozen=True, slots=True)
class Load:
    """A load, and the figures that count of it."""

    name: str
    body: str
    connections: int
    units: Mapping[str, str]

    def figures(self, metered: Metered) -> dict[str, float]:
        """The values of one run, by the names of `units`."""
        values = {
            "gateway": metered.gateway_us,
            "PostgreSQL": metered.database_us,
            "p50": metered.run.p50_ms,
            "p99": metered.run.p99_ms,
        }
        return {name: values[name] for name in self.units}


CPU = {"gateway": "us", "PostgreSQL": "us"}
LOADS = (
    Load("json", PLAIN, BUSY, CPU),
    Load("streams", STREAMED, BUSY, CPU),
    Load("latency at c=1", PLAIN, 1, {"p50": "ms", "p99": "ms"}),
)


@dataclass(frozen=True)
class Plan:
    """How many rounds, and the length of one load in whole seconds."""

    rounds: int = 9
    seconds: int = 5

    @property
    def limit_seconds(self) -> float:
        """After how long the comparison is given up: under eight minutes for nine rounds."""
        return START_SECONDS + self.rounds * 2 * len(LOADS) * (self.seconds + LOAD_OVERHEAD_SECONDS)


@dataclass(frozen=True, slots=True)
class Sides:
    """Both gateways, and every value so far: by side, load and figure, in the order of the rounds."""

    meters: Mapping[str, Meter]
    values: dict[tuple[str, str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    async def warm_up(self) -> None:
        for meter in self.meters.values():
            await meter.warm_up(WARM_UP_SECONDS)
            # Else a plan of the empty tables serves the one side for longer than the other.
            await meter.ledger.analyse()

    async def round(self, number: int, seconds: int) -> None:
        """One value for each figure of both sides, which take turns load by load."""
        for load in LOADS:
            for side in order_of(number):
                metered = await self.meters[side].load(
                    load.body, connections=load.connections, seconds=seconds
                )
                for figure, value in load.figures(metered).items():
                    self.values[side, load.name, figure].append(value)

    async def check_charges(self) -> None:
        for meter in self.meters.values():
            await meter.ledger.check_charges(meter.answered)

    def comparisons(self) -> list[Comparison]:
        return [
            Comparison(load.name, figure, unit, *(self.values[side, load.name, figure] for side in SIDES))
            for load in LOADS
            for figure, unit in load.units.items()
        ]


def order_of(number: int) -> tuple[str, ...]:
    """Who goes first changes from round to round, since the first leaves the machine warmer than it was."""
    return SIDES if number % 2 else SIDES[::-1]


async def compare(new: Checkout, old: Checkout, plan: Plan) -> list[Comparison]:
    """Runs all rounds. Raises BenchmarkError where an answer or the books of a side were wrong."""
    async with asyncio.timeout(plan.limit_seconds), open_rig() as rig, AsyncExitStack() as stack:
        sides = Sides(await _open_meters(rig, stack, new, old))
        await sides.warm_up()
        for number in range(1, plan.rounds + 1):
            print(f"Round {number} of {plan.rounds}", file=sys.stderr, flush=True)
            await sides.round(number, plan.seconds)
        await sides.check_charges()
        return sides.comparisons()


async def _open_meters(rig: Rig, stack: AsyncExitStack, new: Checkout, old: Checkout) -> dict[str, Meter]:
    upstream = await stack.enter_async_context(mock_upstream(rig))
    return {
        side: await stack.enter_async_context(open_meter(rig, upstream, side, checkout.command))
        for side, checkout in zip(SIDES, (new, old), strict=True)
    }


def judge(comparisons: list[Comparison], limit: float | None) -> int:
    """Prints what was measured; returns the exit status."""
    print(compare_text(comparisons))
    too_dear = [] if limit is None else over_limit(comparisons, limit)
    if too_dear:
        print(f"More than {limit:g} % and the spread: {', '.join(too_dear)}.", file=sys.stderr)
        return OVER_LIMIT
    return 0


def _run(revision: str, plan: Plan, limit: float | None) -> int:
    require_tools()
    new, old = working_tree(), check_out(revision)
    print(f"new: {new.label}\nold: {old.label}\n", flush=True)
    return judge(run_to_the_end(compare(new, old, plan)), limit)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("commit", help="what git calls the commit to compare with")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="how often each side has its turn")
    parser.add_argument("--seconds", type=int, default=Plan.seconds, help="length of one load")
    parser.add_argument(
        "--limit", type=float, help="fail where a request takes so many percent more CPU, beyond the spread"
    )
    arguments = parser.parse_args()
    try:
        return _run(arguments.commit, Plan(arguments.rounds, arguments.seconds), arguments.limit)
    except BenchmarkError as error:
        print(f"The comparison failed. {error}", file=sys.stderr)
        return NOT_MEASURED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("The comparison was interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
