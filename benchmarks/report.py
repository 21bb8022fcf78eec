"""The benchmark's table: absolute figures, and ratios to the same load without the gateway."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `direct` and `nginx` are the same load without the gateway, where that makes sense."""

    name: str
    gateway: float
    unit: str
    direct: float | None = None
    nginx: float | None = None
    goal: str = ""


HEADINGS = ("", "gateway", "unit", "direct", "nginx", "of direct", "of nginx", "goal")


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, and where it was measured."""
    lines = align([HEADINGS, *(_cells(row) for row in rows)], left=(0, 2))
    return "\n".join([*lines, "", _where()])


def align(cells: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> list[str]:
    """Lines of equal columns, numbers to the right; `left` are the columns of words."""
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    figures = (number(row.gateway), row.unit, number(row.direct), number(row.nginx))
    ratios = (_ratio(row.gateway, other) for other in (row.direct, row.nginx))
    return (row.name, *figures, *ratios, row.goal)


def number(value: float | None) -> str:
    """Three digits or more; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _ratio(value: float, other: float | None) -> str:
    return f"{value / other:.3f}" if other else ""


def _where() -> str:
    load = os.getloadavg()[0]
    return (
        f"Medians. {os.cpu_count()} cores, load average {load:.1f} at the end (2 of it our own): "
        "compare ratios, not machines."
    )
