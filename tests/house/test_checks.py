"""The checks find what they look for: each is run on a copy of the project with one fault planted in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house.imports import PACKAGES, ROOT

Check = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's own files, without what is installed or made."""
    for name in (*PACKAGES, "tests/house"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "tests" / "__init__.py"):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


@pytest.fixture
def check(copy: Path) -> Check:
    """Runs one check as `make check` does, on the copy."""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.house.check", name]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True)

    return run


def add(path: Path, text: str) -> None:
    path.write_text(f"{path.read_text()}\n{text}\n")


def test_the_check_of_imports_passes_as_the_code_is(check: Check) -> None:
    done = check("imports")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        pytest.param(
            "gateway/upstream/usage.py",
            "import gateway.billing.hold",
            "gateway.upstream is not allowed to import gateway.billing",
            id="up",
        ),
        pytest.param(
            "gateway/upstream/usage.py",
            "import gateway.webhooks.signature",
            "gateway.upstream is not allowed to import gateway.webhooks",
            id="beside",
        ),
        pytest.param(
            "sandbox/content.py",
            "def late() -> None:\n    import common.money",
            "sandbox is not allowed to import common",
            id="from the ground, in a function",
        ),
        pytest.param(
            "common/money.py", "import config", "common is not allowed to import config", id="of a file"
        ),
        pytest.param("db.py", "import routes.public", "db may not import routes.public", id="by a file"),
        pytest.param("models.py", "import config", "models may not import config", id="between files"),
    ],
)
def test_an_upward_import_fails(check: Check, copy: Path, path: str, line: str, message: str) -> None:
    add(copy / path, line)
    done = check("imports")
    assert done.returncode == 1
    assert message in done.stdout


def test_a_circle_fails(check: Check, copy: Path) -> None:
    add(copy / "common/money.py", "import common.request_ids")
    add(copy / "common/request_ids.py", "def late() -> None:\n    import common.money")
    done = check("imports")
    assert done.returncode == 1
    assert "No cycles are allowed in common" in done.stdout
    assert "these import each other" in done.stdout


@pytest.mark.parametrize("path", ["gateway/upstream/usage.py", "app.py"])
def test_an_import_of_ours_for_types_only_fails_even_if_it_points_down(
    check: Check, copy: Path, path: str
) -> None:
    add(copy / path, "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import common.money")
    done = check("imports")
    assert done.returncode == 1
    assert "imports common.money under TYPE_CHECKING" in done.stdout


def test_a_package_that_no_layer_names_fails(check: Check, copy: Path) -> None:
    (copy / "payments").mkdir()
    (copy / "payments" / "__init__.py").write_text('"""A new room."""\n')
    done = check("imports")
    assert done.returncode == 1
    assert "the package payments is missing" in done.stdout
    assert check("shape").returncode == 1


def test_code_beyond_a_limit_fails(check: Check, copy: Path) -> None:
    body = "\n".join(f"    print({number})" for number in range(51))
    add(copy / "security.py", f"def endless() -> None:\n{body}\n\n\nWIDE = {'1 + ' * 30}1")
    (copy / "gateway" / "asking.py").write_text('"""What is this?"""\n')
    done = check("shape")
    assert done.returncode == 1
    for problem in ("endless has 51 lines", "has 128 columns", "asking.py opens with a question"):
        assert problem in done.stdout
