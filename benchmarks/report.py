"""What did the benchmark find? One table: absolute figures, and ratios to the same load without the gateway."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(
            _aligned(cell, width, column)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([*(line.rstrip() for line in lines), "", _where()])


def _cells(row: Row) -> tuple[str, ...]:
    ratios = (_ratio(row.gateway, other) for other in (row.direct, row.nginx))
    return (
        row.name,
        _number(row.gateway),
        row.unit,
        _number(row.direct),
        _number(row.nginx),
        *ratios,
        row.goal,
    )


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in (0, 2) else cell.rjust(width)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _ratio(value: float, other: float | None) -> str:
    return f"{value / other:.3f}" if other else ""


def _where() -> str:
    load = os.getloadavg()[0]
    return f"Medians. {os.cpu_count()} cores, load average {load:.1f} at the end (2 of it our own): compare ratios, not machines."
