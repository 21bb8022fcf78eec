"""Looks for input that makes the API answer with a 5xx or a status that its OpenAPI document does not name.

Schemathesis against a running gateway: `make fuzz`; `python -m tests.fuzz EXAMPLES` limits the examples an
operation. Not collected by pytest.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import ROOT

ADMIN_KEY = "fuzzing-admin-key"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"


@contextmanager
def gateway(folder: str) -> Iterator[str]:
    """A gateway in sandbox mode on a fresh embedded database."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "GATEWAY_DATA_DIR": folder,
        "ADMIN_API_KEY": ADMIN_KEY,
        "PORT": str(port),
        "LOG_LEVEL": "error",
    }
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health/ready"):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def register(url: str, name: str) -> str:
    """A user's key, with limits that fuzzing does not reach."""
    user = _post(url, "/auth/register", {"username": name, "email": f"{name}@example.com"})
    unlimited = dict.fromkeys(
        (
            "requests_per_minute",
            "requests_per_hour",
            "requests_per_day",
            "tokens_per_minute",
            "tokens_per_hour",
        )
    )
    _post(url, "/admin/limit", {"user_id": user["user_id"], "rate_limits": unlimited})
    _post(url, "/admin/add_credits", {"user_id": user["user_id"], "credits": 1000})
    return str(user["api_key"])


def _post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {ADMIN_KEY}", "content-type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return dict(json.load(answer))


def fuzz(url: str, key: str, paths: str, examples: int) -> int:
    """Runs Schemathesis over the paths that match; its exit status."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json",
        "-H", f"Authorization: Bearer {key}", "--include-path-regex", paths, "--checks", CHECKS,
        "--max-examples", str(examples), "--phases", "examples,coverage,fuzzing",
        "--seed", "1", "--generation-database", "none",
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    """The worst exit status of three passes: as nobody, as a user, as the administrator."""
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as folder, gateway(folder) as url:
        keys = [register(url, f"fuzz{number}") for number in range(8)]
        # Keys whose own ids fuzzing does not guess; account deletion would end a pass for everything after
        # it.
        passes = [
            (ADMIN_KEY, "^/(admin|internal|auth)"),
            (keys[6], "^/(user/(?!account|api-keys)|v1/|models|plans|health|$)"),
            (keys[7], "^/user/api-keys"),
        ]
        return max(fuzz(url, each, paths, examples) for each, paths in passes)


if __name__ == "__main__":
    sys.exit(main())
