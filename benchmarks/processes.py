"""CPU time, memory and cores of processes, as the kernel counts them."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Memory:
    """In MB of 10^6 bytes; `pss` counts a page shared with others in part."""

    rss: float
    pss: float


def memory_of(pid: int) -> Memory:
    """What the process holds now."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    rss, pss = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("Rss", "Pss"))
    return Memory(rss, pss)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far; 0 for one that is gone.

    /proc/PID/stat rounds to 10 ms, half a percent of a short load. The process's own clock does not, see
    clock_getcpuclockid(3).
    """
    clock = ctypes.c_int()
    if LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)):
        return 0.0
    try:
        return time.clock_gettime(clock.value)
    except OSError:
        return 0.0


def family_cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children so far, such as PostgreSQL's backends; ended ones count too."""
    running = sum(cpu_seconds(child) for child in _children(pid))
    # The ended come last: a child that ends in between is counted there, and not lost.
    return running + cpu_seconds(pid) + _ended_children_seconds(pid)


def move_family(pid: int, cores: Collection[int]) -> None:
    """Moves a process and its children to these cores; what they start later stays there too."""
    for each in (pid, *_children(pid)):
        try:
            os.sched_setaffinity(each, cores)
        except ProcessLookupError:
            continue


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def _ended_children_seconds(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[13]) + int(fields[14])) / TICKS if fields else 0.0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces; none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _children(pid: int) -> list[int]:
    every = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [each for each in every if (fields := _stat(each)) and int(fields[1]) == pid]
