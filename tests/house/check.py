"""Runs every check of `make check`, two at a time, and prints how long each took.

`python -m tests.house.check imports spelling` runs only the checks that it names. A check that fails prints
what it found.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PYTHON = sys.executable
TOLD = {"shape"}  # checks whose output is worth reading when they pass, too

Command = Sequence[str | Path]


def undeclared(requirements: str, *outside: str) -> Command:
    """Looks for packages that are imported and not in this list of requirements, or the other way round."""
    excluded = [f"--exclude={folder}" for folder in (r"\.venv", "tests/clients", "supabase/", *outside)]
    return [BIN / "deptry", "--no-ansi", ".", f"--requirements-files={requirements}", *excluded]


# The longest first, so that none is left alone at the end.
CHECKS: dict[str, list[Command]] = {
    "types": [[BIN / "mypy"]],
    "lint": [[BIN / "ruff", "check", "--output-format=concise", "."]],
    "format": [[BIN / "ruff", "format", "--check", "."]],
    "spelling": [[BIN / "codespell"]],
    "imports": [[BIN / "lint-imports", "--no-logo", "--no-cache"], [PYTHON, "-m", "tests.house.imports"]],
    "shape": [[PYTHON, "-m", "tests.house.shape"]],
    "dependencies": [
        undeclared("requirements.in", "tests/", "benchmarks/", "embedded/"),
        undeclared("requirements-local.in", "tests/", "benchmarks/"),
        undeclared("requirements-dev.in"),
        [PYTHON, "-m", "pip", "check"],
    ],
}


@dataclass(frozen=True)
class Result:
    """How one check went."""

    name: str
    seconds: float
    passed: bool
    output: str


def run_check(name: str) -> Result:
    start, outputs, passed = time.monotonic(), [], True
    for command in CHECKS[name]:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        outputs.append(done.stdout.strip())
        passed = passed and done.returncode == 0
    return Result(name, time.monotonic() - start, passed, "\n".join(filter(None, outputs)))


def print_result(result: Result) -> None:
    mark = "passed" if result.passed else "FAILED"
    print(f"{result.name:<14}{result.seconds:>6.1f} s  {mark}", flush=True)
    if not result.passed or result.name in TOLD:
        print("\n".join(f"    {line}" for line in result.output.splitlines()), flush=True)


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"no such check: {', '.join(unknown)}; there are {', '.join(CHECKS)}")
        return 2
    start = time.monotonic()
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = [pool.submit(run_check, name) for name in names or CHECKS]
        for job in as_completed(running):
            print_result(job.result())
    print(f"{len(running)} checks took {time.monotonic() - start:.1f} s")
    return int(not all(job.result().passed for job in running))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
