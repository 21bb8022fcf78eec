"""Another commit of this project beside the working tree: its files, and the packages that it names.

Both lie under build/against/ and stay there for the next comparison. Nothing of it is ever imported here: it
runs as a process, by its own `app.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rig import ROOT, BenchmarkError

AGAINST = ROOT / "build" / "against"
REQUIREMENTS = "requirements-dev.txt"
INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps")


@dataclass(frozen=True, slots=True)
class Checkout:
    """A tree of the project, and the interpreter that has the packages it needs."""

    label: str
    tree: Path
    python: Path

    @property
    def command(self) -> tuple[str, ...]:
        """What starts the gateway; it reads its port from PORT.

        It must not run in its folder, where a developer's .env would configure one side only.
        """
        return (str(self.python), str(self.tree / "app.py"))


def working_tree() -> Checkout:
    """This tree as it is, changes included."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = " with changes" if _git("status", "--porcelain") else ""
    return Checkout(f"the working tree ({head}{changed})", ROOT, Path(sys.executable))


def check_out(revision: str) -> Checkout:
    """A clone of the repository at that commit. Raises BenchmarkError where git does not know it."""
    commit = _commit(revision)
    folder = AGAINST / commit[:12]
    if not (folder / ".git").exists():
        AGAINST.mkdir(parents=True, exist_ok=True)
        _git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(folder))
    # Again each time: it mends a clone that was interrupted or edited.
    _git("checkout", "--quiet", "--force", "--detach", commit, folder=folder)
    return Checkout(commit[:7], folder, _python_for(folder))


def _commit(revision: str) -> str:
    """Its full hash: the same name may be another commit in the clone."""
    try:
        return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except BenchmarkError as exc:
        raise BenchmarkError(f"git knows no commit {revision} here.") from exc


def _python_for(tree: Path) -> Path:
    """Our own interpreter where the commit names the same packages; else one with those it names."""
    wanted = tree / REQUIREMENTS
    if not wanted.exists():
        raise BenchmarkError(f"{tree.name} has no {REQUIREMENTS}: what it needs is unknown.")
    if wanted.read_bytes() == (ROOT / REQUIREMENTS).read_bytes():
        return Path(sys.executable)
    return _own_python(tree, wanted)


def _own_python(tree: Path, wanted: Path) -> Path:
    folder = tree / ".venv"
    python, done = folder / "bin" / "python", folder / "dev.done"
    if not done.exists():
        print(f"Installing the packages of {tree.name} (once, about a minute)", file=sys.stderr, flush=True)
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), *INSTALL, "-r", str(wanted)])
        done.touch()
    return python


def _git(*arguments: str, folder: Path = ROOT) -> str:
    return _run(["git", "-C", str(folder), *arguments])


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed: {result.stderr.strip()[-2000:]}")
    return result.stdout.strip()
