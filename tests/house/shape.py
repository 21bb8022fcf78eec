"""Prints how large, how wide and how well explained the code is, and fails where a limit is passed.

`python -m tests.house.shape` measures what is on disk. The limits are the tables below; they are only ever
made stricter.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

MODULE_LINES = 450
MODULE_LINES_OF = {"db.py": 600}  # flat: one function for each query
BODY_LINES = 50  # of one function, docstring included
BODY_LINES_MEDIAN = 5
BODY_LINES_P90 = 15
COLUMNS = 110
DIRECTIVE = re.compile(r"  # (?:type: ignore|noqa)\b.*")
LAST_WIDE_MIGRATION = "20261130100100"  # landed migrations are never edited

FILES = {
    "app.py",
    "config.py",
    "db.py",
    "db_security.py",
    "models.py",
    "security.py",
    "supabase_config.py",
}
BESIDE = {"tests", "benchmarks", "docs", "supabase", "deploy", "build"}  # build/ is what `make bench` keeps
PACKAGES = {"common", "console", "db_rows", "embedded", "gateway", "routes", "sandbox"}

# Comments in a hundred lines, at least. Raise a floor when a package has got above it.
COMMENTS = {
    "common": 3.0,
    "embedded": 3.0,
    "gateway/billing": 3.0,
    "gateway/pricing": 5.0,
    "gateway/proxy": 3.5,
    "gateway/upstream": 3.0,
    "gateway/webhooks": 3.5,
    "routes": 1.0,
    "sandbox": 2.0,
    "sandbox/endpoints": 2.0,
    "supabase/schema": 8.0,
}

SHOWN = 30  # breaches that are printed


@dataclass
class Package:
    """What was counted in one folder."""

    lines: int = 0
    comments: int = 0
    bodies: list[int] = field(default_factory=list)

    @property
    def comments_per_hundred(self) -> float:
        return 100 * self.comments / max(self.lines, 1)

    def percentile(self, share: float) -> int:
        return sorted(self.bodies)[int(len(self.bodies) * share)] if self.bodies else 0


def python_files(*, with_tests: bool) -> list[Path]:
    folders = [*sorted(PACKAGES), *(("benchmarks", "tests") if with_tests else ())]
    below = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [*sorted(ROOT.glob("*.py")), *sorted(path for path in below if "node_modules" not in path.parts)]


def sql_files() -> list[Path]:
    """The SQL whose form can still be changed."""
    migrations = sorted((ROOT / "supabase" / "migrations").glob("*.sql"))
    fresh = [path for path in migrations if path.name.split("_")[0] > LAST_WIDE_MIGRATION]
    return [*sorted((ROOT / "supabase" / "schema").rglob("*.sql")), *fresh]


def room(path: Path) -> str:
    return "/".join(path.relative_to(ROOT).parts[:-1][:2]) or "(root)"


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or 0) - function.body[0].lineno + 1


@cache
def text_of(path: Path) -> str:
    return path.read_text()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_comment(line: str, mark: str) -> bool:
    return line.strip().startswith(mark) or f"  {mark} " in line


def measured() -> dict[str, Package]:
    packages: dict[str, Package] = defaultdict(Package)
    for path in [*python_files(with_tests=False), *sql_files()]:
        package = packages[room(path)]
        lines = text_of(path).splitlines()
        package.lines += len(lines)
        package.comments += sum(is_comment(line, "--" if path.suffix == ".sql" else "#") for line in lines)
        if path.suffix == ".py":
            package.bodies += map(body_lines, functions(path))
    return dict(sorted(packages.items()))


def whole(packages: dict[str, Package]) -> Package:
    bodies = [length for package in packages.values() for length in package.bodies]
    comments = sum(package.comments for package in packages.values())
    return Package(sum(package.lines for package in packages.values()), comments, bodies)


def long_modules() -> Iterator[str]:
    for path in python_files(with_tests=False):
        lines, limit = len(text_of(path).splitlines()), MODULE_LINES_OF.get(shown(path), MODULE_LINES)
        if lines > limit:
            yield f"{shown(path)} has {lines} lines, at most {limit} are allowed"


def long_functions() -> Iterator[str]:
    for path in python_files(with_tests=False):
        for function in functions(path):
            if body_lines(function) > BODY_LINES:
                yield f"{shown(path)}: {function.name} has {body_lines(function)} lines, at most {BODY_LINES}"


def long_bodies(everything: Package) -> Iterator[str]:
    for name, share, limit in (("median", 0.5, BODY_LINES_MEDIAN), ("90th percentile", 0.9, BODY_LINES_P90)):
        if everything.percentile(share) > limit:
            yield f"function bodies: the {name} is {everything.percentile(share)} lines, at most {limit}"


def columns(line: str) -> int:
    """How wide a line is as Ruff counts: without directives to tools, and 0 if it is one word, as a URL."""
    text = DIRECTIVE.sub("", line)
    return len(text) if len(text.strip("#- ").split()) > 1 else 0


def wide_lines() -> Iterator[str]:
    for path in [*python_files(with_tests=True), *sql_files()]:
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if columns(line) > COLUMNS:
                yield f"{shown(path)}:{number} has {columns(line)} columns, at most {COLUMNS} are allowed"


def ragged_sql() -> Iterator[str]:
    """White space that no reader sees: at the end of a line or a file, and tabs."""
    for path in sql_files():
        text = text_of(path)
        ragged = [
            number for number, line in enumerate(text.split("\n"), 1) if line != line.rstrip() or "\t" in line
        ]
        yield from (f"{shown(path)}:{number} has a tab, or a space at its end" for number in ragged)
        if not text.endswith("\n") or text.endswith("\n\n"):
            yield f"{shown(path)} does not end with one line feed"


def openings() -> Iterator[str]:
    """Modules that do not open with a plain statement."""
    for path in python_files(with_tests=True):
        opening = ast.get_docstring(parsed(path)) or ""
        end = min((at for mark in (". ", ".\n", "?") if (at := opening.find(mark)) >= 0), default=-1)
        if not opening:
            yield f"{shown(path)} does not say what is in it"
        elif opening[end : end + 1] == "?":
            yield f"{shown(path)} opens with a question"


def rooms() -> Iterator[str]:
    for path in ROOT.iterdir():
        if path.suffix == ".py" and path.name not in FILES:
            yield f"{path.name} does not belong at the root"
        python = path.is_dir() and not path.name.startswith(".") and any(path.rglob("*.py"))
        if python and path.name not in PACKAGES | BESIDE:
            yield f"{path.name}/ does not belong at the root"


def bare_packages(packages: dict[str, Package]) -> Iterator[str]:
    for name, floor in COMMENTS.items():
        if name in packages and packages[name].comments_per_hundred < floor:
            share = packages[name].comments_per_hundred
            yield f"{name} has {share:.1f} comments in a hundred lines, at least {floor} are wanted"


def breaches(packages: dict[str, Package]) -> dict[str, list[str]]:
    """What is beyond a limit, by rule."""
    return {
        "rooms at the root": [*rooms()],
        "long modules": [*long_modules()],
        "long functions": [*long_functions()],
        "bodies over all": [*long_bodies(whole(packages))],
        "wide lines": [*wide_lines()],
        "white space": [*ragged_sql()],
        "openings": [*openings()],
        "comments": [*bare_packages(packages)],
    }


def table(packages: dict[str, Package]) -> Iterator[str]:
    yield row("package", "lines", "comments/100", "functions", "median", "p90", "longest")
    for name, package in [*packages.items(), ("everything", whole(packages))]:
        yield row(
            name,
            package.lines,
            f"{package.comments_per_hundred:.1f}",
            len(package.bodies),
            package.percentile(0.5),
            package.percentile(0.9),
            max(package.bodies, default=0),
        )


def row(name: str, *figures: int | str) -> str:
    widths = (7, 14, 11, 8, 5, 9)
    return f"{name:<20}" + "".join(
        f"{figure:>{width}}" for figure, width in zip(figures, widths, strict=True)
    )


def main() -> int:
    counted = measured()
    print("\n".join(table(counted)))
    problems = [problem for rule in breaches(counted).values() for problem in rule]
    print("\n".join(problems[:SHOWN]), *(["..."] if len(problems) > SHOWN else []), sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
