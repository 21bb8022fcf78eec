"""The arithmetic of comparing two commits: ratios round by round, their median and spread, and the verdict.

The two sides of a round are measured one right after the other, so what disturbs the machine for longer than
a round disturbs both, and drops out of their ratio. It does not drop out of the ratio of two medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import align, number


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of both commits, one value a round: CPU of a request in us, or a latency in ms."""

    load: str
    part: str
    unit: str
    new: Sequence[float]
    old: Sequence[float]

    @property
    def name(self) -> str:
        return f"{self.load}: {self.part}"

    @property
    def changes(self) -> list[float]:
        """By how many percent the new commit's value exceeds the old one's, round by round."""
        return [100 * (new / old - 1) for new, old in zip(self.new, self.old, strict=True)]

    @property
    def change(self) -> float:
        """The median of the changes, in percent."""
        return statistics.median(self.changes)

    @property
    def spread(self) -> float:
        """Half the interquartile range of the changes, in percentage points."""
        return half_interquartile_range(self.changes)

    def exceeds(self, limit: float) -> bool:
        """Whether the new commit's value is higher by more than `limit` percent and the spread together."""
        return self.change > limit + self.spread


def half_interquartile_range(values: Sequence[float]) -> float:
    """Half the distance between the quartiles: the middle half of the values lies within about so much of
    the median, and a single wild round does not move it. 0 for a single value.
    """
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / 2


def compare_text(comparisons: Sequence[Comparison]) -> str:
    """Both commits' figures, the changes of every round, and a verdict for each load."""
    return "\n".join([*_figures(comparisons), "", *_rounds(comparisons), "", *verdicts(comparisons)])


def verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """A line for each load: `json: gateway +0.8 % (rounds -1.9 % .. +2.6 %), PostgreSQL -0.2 % (...)`."""
    loads = dict.fromkeys(comparison.load for comparison in comparisons)
    return [
        f"{load}: {', '.join(_verdict(each) for each in comparisons if each.load == load)}" for load in loads
    ]


def over_limit(comparisons: Sequence[Comparison], limit: float) -> list[str]:
    """What costs more CPU than the limit allows, a phrase each; latency has no limit, it is too unsteady."""
    return [
        f"{each.name} {percent(each.change)} (spread {each.spread:.1f})"
        for each in comparisons
        if each.unit == "us" and each.exceeds(limit)
    ]


def percent(value: float) -> str:
    """Signed, with one digit after the point."""
    return f"{_signed(value)} %"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # -0.04 becomes +0.0


def _verdict(comparison: Comparison) -> str:
    lowest, highest = min(comparison.changes), max(comparison.changes)
    return f"{comparison.part} {percent(comparison.change)} (rounds {percent(lowest)} .. {percent(highest)})"


def _figures(comparisons: Sequence[Comparison]) -> list[str]:
    headings = ("medians", "unit", "old", "spread", "new", "spread")
    return align([headings, *(_figure_cells(each) for each in comparisons)], left=(0, 1))


def _figure_cells(comparison: Comparison) -> tuple[str, ...]:
    sides = [
        cell
        for values in (comparison.old, comparison.new)
        for cell in (number(statistics.median(values)), number(half_interquartile_range(values)))
    ]
    return (comparison.name, comparison.unit, *sides)


def _rounds(comparisons: Sequence[Comparison]) -> list[str]:
    rounds = (str(position + 1) for position in range(len(comparisons[0].new)))
    headings = ("new / old by round, %", *rounds, "median", "lowest", "highest", "spread")
    return align([headings, *(_round_cells(each) for each in comparisons)])


def _round_cells(comparison: Comparison) -> tuple[str, ...]:
    changes = comparison.changes
    signed = (*changes, comparison.change, min(changes), max(changes))
    return (comparison.name, *map(_signed, signed), f"{comparison.spread:.1f}")
