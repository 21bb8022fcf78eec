"""docs/clients.md is true: its programs run as printed there, and its versions are the locked ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from account import AWAITED, SAID, URL, Account

CLIENTS = Path(__file__).parent.parent
ROOT = CLIENTS.parent.parent
TEXT = (ROOT / "docs" / "clients.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n+```\w+\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
TABLE = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \| (.+?) \|", TEXT, re.MULTILINE)
NEEDS = {"Anthropic SDK for Python": "POST /v1/messages"}
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.parametrize("client", SECTIONS)
def test_the_program_runs_as_printed(account: Account, client: str) -> None:
    if (needed := NEEDS.get(client)) in AWAITED:
        pytest.skip(f"awaits {needed}")
    program = SECTIONS[client]
    assert ADDRESS in program
    is_node = program.startswith("import ") and " from " in program.splitlines()[0]
    command = ["node", "--input-type=module", "--eval"] if is_node else [sys.executable, "-c"]
    environment = {**os.environ, "GATEWAY_API_KEY": account.key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    found = subprocess.run(
        [*command, program.replace(ADDRESS, URL)],
        cwd=CLIENTS / "node",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert SAID in found.stdout
    record = account.settled_record()
    assert record["status"] == "completed" and record["cost"] > 0


def test_every_client_has_a_line_and_a_program() -> None:
    assert [name for name, _, _ in TABLE] == list(SECTIONS)
    assert [anchor for _, anchor, _ in TABLE] == [name.lower().replace(" ", "-") for name in SECTIONS]


def test_the_versions_are_those_that_are_locked() -> None:
    python = dict(
        re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / "requirements-clients.txt").read_text(), re.MULTILINE)
    )
    node = json.loads((CLIENTS / "node" / "package.json").read_text())["dependencies"]
    for name, _, versions in TABLE:
        locked = node if name.endswith("Node") or name in ("Vercel AI SDK", "OpenRouter SDK") else python
        for package, version in (entry.split(" ") for entry in versions.split(", ")):
            assert locked[package] == version, package
