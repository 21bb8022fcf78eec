"""Documents name files that exist, and one version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.version import VERSION
from tests.house.imports import MODULES, ROOT, imports_of_ours, sources

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
MADE = (".gateway/", ".env", ".venv/", "build/")
"""What appears only when the gateway has run, or is the reader's own."""
FOREIGN = {
    "docs/clients.md": {"config.toml"},  # Codex's
    "docs/deploy-vercel.md": {"api"},  # what must not be there
    "docs/management.md": {"_base_client.py"},  # the OpenAI SDK's
}
FOLDERS = "benchmarks|common|docs|embedded|gateway|routes|supabase|tests"
NO_PART_OF_A_LONGER_WORD = r"(?<![\w./@:<>{}-])"
FILE = r"(?:[\w.-]+/)*[\w.-]+\.(?:py|sql|md|toml|ya?ml|json|txt|in|lua|sh)\b(?![\w*<{(])"
FOLDER = r"(?:[\w.-]+/)+(?=[`\s])"
BELOW = r"(?:benchmarks|common|docs|embedded|gateway|routes|supabase|tests)/[\w./-]+\w(?![*{])"
PATH = re.compile(f"{NO_PART_OF_A_LONGER_WORD}(?:{FILE}|{FOLDER}|{BELOW})")


def named_paths(document: Path) -> set[str]:
    """Files and folders that a document names in code or draws in a diagram, and what its links lead to."""
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    code = [*re.findall(r"```.*?```", text, re.DOTALL), *re.findall(r"`[^`\n]+`", text)]
    linked = {(document.parent / link).resolve().relative_to(ROOT).as_posix() for link in links}
    return linked | {name.rstrip("/") for block in code for name in PATH.findall(block)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    foreign = FOREIGN.get(document.relative_to(ROOT).as_posix(), set())
    names = {name for name in named_paths(document) - foreign if not name.startswith(MADE)}
    assert {name for name in names if not (ROOT / name).exists()} == set()


def test_the_newest_version_of_the_changelog_is_the_one_that_the_gateway_tells() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == VERSION
    assert versions == sorted(versions, key=lambda version: [*map(int, version.split("."))], reverse=True)


def test_the_version_is_written_once() -> None:
    assert [path.name for path in sources() if f'"{VERSION}"' in path.read_text()] == ["version.py"]


def package_of(module: str) -> str:
    """What the picture calls it: a package of the gateway by its own name, others by that of their room."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gateway" and len(parts) > 1 else parts[0]


def reached(arrows: set[tuple[str, str]], start: str) -> set[str]:
    ahead = {end for origin, end in arrows if origin == start}
    return ahead.union(*(reached(arrows, end) for end in ahead))


def test_the_picture_of_packages_shows_the_imports_as_they_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = set(re.findall(r"^  (\w+)(?:\[.*?\])? --> (\w+)", text, re.MULTILINE))
    imports = {
        (package_of(module), package_of(name))
        for module, path in MODULES.items()
        for name in imports_of_ours(path)
        if package_of(module) != package_of(name)
    }
    assert drawn - imports == set(), "drawn, and no import"
    assert {(a, b) for a, b in imports if b not in reached(drawn, a)} == set(), "imports that are not drawn"
