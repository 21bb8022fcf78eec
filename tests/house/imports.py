"""The rules of imports that import-linter cannot check, because it sees packages and not single files.

The layers are read from import-linter's own contract in pyproject.toml, so that there is one list. `python -m
tests.house.imports` prints each breach and fails if there is one.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
PACKAGES: list[str] = CONFIGURATION["root_packages"]
LAYERS: list[list[str]] = [
    [name.strip(" ()") for name in layer.split("|")] for layer in CONFIGURATION["contracts"][0]["layers"]
]
OUTSIDE = {"tests", "benchmarks"}
"""Folders of Python that are no part of the service: they may import all of it."""


def sources() -> list[Path]:
    """Every file of the service: those at the root, and those of the packages."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted([*ROOT.glob("*.py"), *files])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sources()}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path, within: ast.AST | None = None) -> set[str]:
    """Modules that a file imports, anywhere in it: ours by their full names, others by their first."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(within or parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name if name in MODULES else name.split(".")[0] for name in names} - {name_of(path)}


def imports_of_ours(path: Path, within: ast.AST | None = None) -> set[str]:
    return imported(path, within) & MODULES.keys()


def layer_of(module: str) -> tuple[int, str] | None:
    """How far down the list a module stands, and under which name."""
    for height, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(f"{name}."):
                return height, name
    return None


def missing_layers() -> Iterator[str]:
    """Modules and packages of which the contract says nothing."""
    for module, path in MODULES.items():
        if layer_of(module) is None and path.name != "__init__.py":
            yield f"{module} stands in no layer of pyproject.toml"
    for folder in ROOT.iterdir():
        if (folder / "__init__.py").exists() and folder.name not in {*PACKAGES, *OUTSIDE}:
            yield f"the package {folder.name} is missing from root_packages in pyproject.toml"


def upward_imports() -> Iterator[str]:
    for module, path in MODULES.items():
        own = layer_of(module)
        for name in sorted(imports_of_ours(path)):
            other = layer_of(name)
            if own and other and own != other and other[0] <= own[0]:
                yield f"{module} may not import {name}"


def circles() -> Iterator[str]:
    """Modules that import each other, directly or through others."""
    waiting = {module: imports_of_ours(path) for module, path in MODULES.items()}
    while waiting:
        free = {name for name, needs in waiting.items() if not needs & waiting.keys()}
        if not free:
            yield f"these import each other, or a module that does: {', '.join(sorted(waiting))}"
            return
        waiting = {name: needs for name, needs in waiting.items() if name not in free}


def typing_imports() -> Iterator[str]:
    """Imports of ours under `if TYPE_CHECKING`: they hide a circle from everything but the type checker."""
    outside = (path for folder in OUTSIDE for path in (ROOT / folder).rglob("*.py"))
    for path in (*MODULES.values(), *sorted(outside)):
        if "TYPE_CHECKING" not in path.read_text():
            continue  # most files: parsing them would take a second
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                for name in sorted(imports_of_ours(path, node)):
                    yield f"{name_of(path)} imports {name} under TYPE_CHECKING: import it plainly"


def breaches() -> list[str]:
    return [*missing_layers(), *upward_imports(), *circles(), *typing_imports()]


if __name__ == "__main__":
    problems = breaches()
    print("\n".join(problems) or f"{len(MODULES)} modules: imports point one way, in no circle")
    sys.exit(bool(problems))
