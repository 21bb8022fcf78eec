"""What does a process cost? CPU time and memory, as /proc tells them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Memory:
    """In MB of 10^6 bytes; `pss` counts pages shared with others in part."""

    rss: float
    pss: float


def memory_of(pid: int) -> Memory:
    """What the process holds now."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    rss, pss = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("Rss", "Pss"))
    return Memory(rss, pss)


def cpu_seconds(pid: int, *, with_children: bool = False) -> float:
    """CPU time of a process so far; with its running children, as PostgreSQL's backends are."""
    pids = [pid, *(_children(pid) if with_children else ())]
    return sum(_ticks(each) for each in pids) / TICKS


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _ticks(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else 0


def _children(pid: int) -> list[int]:
    every = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [each for each in every if (fields := _stat(each)) and int(fields[1]) == pid]
