"""Runs the programs of other people's clients, unchanged, against a gateway that it starts.

`make clients`, or `make clients ARGS="langchain openai-node"` for some of them. The programs know the gateway
by its address and an admin key alone. Their Python packages are in a virtual environment of their own, their
Node packages in `node/node_modules`.
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
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CLIENTS_PYTHON = ROOT / ".venv-clients" / "bin" / "python"
ADMIN_KEY = "admin-key-for-clients"
SECONDS_TO_START = 120
AT_ONCE = 2  # programs; most of them wait most of the time

PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "openai-python": ("python/test_openai_chat.py", "python/test_openai_more.py"),
    "anthropic-python": ("python/test_anthropic.py",),
    "langchain": ("python/test_langchain.py",),
    "litellm": ("python/test_litellm.py",),
    "openai-node": ("node/openai.test.mjs", "node/openai-more.test.mjs"),
    "vercel-ai": ("node/vercel-ai.test.mjs", "node/vercel-ai-more.test.mjs"),
    "openrouter-sdk": ("node/openrouter-sdk.test.mjs", "node/openrouter-sdk-more.test.mjs"),
    "documents": ("python/test_documents.py",),
}

# What the programs ask for and this gateway does not have yet: their tests are skipped. An entry that turns
# out to be there is an error, so that nothing stays skipped by mistake.
AWAITED: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outcome:
    name: str
    status: int
    seconds: float


@contextmanager
def gateway(folder: str) -> Iterator[str]:
    """A gateway in sandbox mode, as its own process on a fresh embedded database. New users have no credits.
    Yields its URL.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", folder),
        "GATEWAY_DATA_DIR": folder,
        "GATEWAY_MODE": "sandbox",
        "SIGNUP_CREDITS": "0",
        "ADMIN_API_KEY": ADMIN_KEY,
        "PORT": str(port),
        "LOG_LEVEL": "error",
        # An operator's own .env must not reach it: what is set here wins, and empty is unset.
        **dict.fromkeys(
            ("DATABASE_URL", "SUPABASE_URL", "SUPABASE_KEY", "OPENROUTER_API_KEY", "TRUSTED_PROXIES"), ""
        ),
    }
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not _is_ready(url):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit("The gateway did not start; what it said stands above.")
        time.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready"):
            return True
    except OSError:
        return False


def is_there(url: str, wanted: str) -> bool:
    """Whether the gateway has this endpoint (without a key everything but 404 and 405 says so), or behaves
    like that.
    """
    if wanted == "pages of /api/v1/models":
        return len(ask(url, "GET /api/v1/models?limit=2")[1]["data"]) == 2
    if wanted == "numeric error codes under /api/v1":
        return isinstance(ask(url, "POST /api/v1/chat/completions")[1]["error"]["code"], int)
    return ask(url, wanted)[0] not in (404, 405)


def ask(url: str, endpoint: str) -> tuple[int, Any]:
    """Status and JSON of what an endpoint answers to somebody without a key."""
    method, path = endpoint.split()
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(url + path, body, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status), json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


def require_absent(url: str) -> None:
    """Ends the run where something is there that counts as missing."""
    present = sorted(wanted for wanted in AWAITED if is_there(url, wanted))
    if present:
        sys.exit(
            f"The gateway has these; take them off AWAITED in {Path(__file__).relative_to(ROOT)}: "
            f"{', '.join(present)}"
        )


def require_node() -> None:
    """Node 20 or newer, with npm; ends the run with a sentence otherwise. The Makefile calls it before it
    installs.
    """
    try:
        version = subprocess.run(
            ["node", "--version"], capture_output=True, text=True, check=True
        ).stdout.strip()
        subprocess.run(["npm", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            "The Node clients need node 20 or newer and npm, "
            "and they are not on the PATH (https://nodejs.org)."
        )
    if int(version.removeprefix("v").split(".")[0]) < 20:
        sys.exit(f"The Node clients need node 20 or newer; this is {version}.")


def command_of(file: str) -> list[str]:
    if file.startswith("node/"):
        return ["node", "--test", "--test-reporter=spec", file]
    return [str(CLIENTS_PYTHON), "-m", "pytest", "-q", "-rs", "-c", "python/pytest.ini", file]


def run(name: str, environment: Mapping[str, str]) -> Outcome:
    """One client's programs, one after the other; the first failure counts. What they print is printed in one
    piece.
    """
    started = time.monotonic()
    ended = [
        subprocess.run(
            command_of(file),
            cwd=HERE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        for file in PROGRAMS[name]
    ]
    print(f"\n== {name}\n" + "".join(program.stdout.decode() for program in ended), flush=True)
    return Outcome(
        name,
        next((program.returncode for program in ended if program.returncode), 0),
        time.monotonic() - started,
    )


def main(arguments: list[str]) -> int:
    """Exit status 0 when every chosen program passed."""
    if arguments == ["--check-node"]:
        require_node()
        return 0
    unknown = sorted(set(arguments) - PROGRAMS.keys())
    if unknown:
        sys.exit(f"No such client: {', '.join(unknown)}. There are: {', '.join(PROGRAMS)}.")
    require_node()
    with tempfile.TemporaryDirectory(prefix="gateway-clients-") as folder, gateway(folder) as url:
        require_absent(url)
        environment = {
            **os.environ,
            "CLIENTS_GATEWAY_URL": url,
            "CLIENTS_ADMIN_KEY": ADMIN_KEY,
            "CLIENTS_AWAITED": json.dumps(sorted(AWAITED)),
        }
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = list(pool.map(lambda name: run(name, environment), arguments or PROGRAMS))
    print()
    for outcome in outcomes:
        print(f"{'failed' if outcome.status else 'passed'}  {outcome.name:18}{outcome.seconds:6.1f} s")
    return int(any(outcome.status for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
