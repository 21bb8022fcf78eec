"""The data folder's states.

Callers hold the lock that keeps two processes from doing this at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .binaries import Binaries, ProcessIdentity
from .errors import EmbeddedDatabaseError
from .roles import bootstrap_statements

START_SECONDS = 60.0
POLL_SECONDS = 0.002
LARGEST_LOG_BYTES = 1 << 20

# A small durable server: fsync and synchronous_commit stay on. Values that a client sent are kept out of the
# log.
SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_directories": ".",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_logical_replication_workers": "0",
    "max_parallel_workers_per_gather": "0",
    "random_page_cost": "1.1",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_checkpoints": "off",
}
# Three fewer processes and a quicker start than with the default, `worker`.
SETTINGS_SINCE_18 = {"io_method": "sync"}


class Cluster:
    """One data folder as `initdb` makes it, and the server that runs on it."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self._log = log
        self._pid_file = folder / "postmaster.pid"

    def owner(self) -> int | None:
        """The uid that the database belongs to, None before it was created."""
        try:
            return self.folder.stat().st_uid
        except FileNotFoundError:
            return None

    def is_ready(self) -> bool:
        """Whether a living server accepts connections here."""
        lines = self._pid_lines()
        return len(lines) > 7 and lines[7].strip() == "ready" and self._postmaster() is not None

    def create(self, binaries: Binaries, identity: ProcessIdentity) -> None:
        """Creates the database with Supabase's roles unless there is one; complete or not at all.

        Raises EmbeddedDatabaseError when it cannot be made or was made by another major version.
        """
        if self.folder.exists():
            self._check_version(binaries)
            return
        new = self.folder.with_name("data.new")
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        if identity:
            os.chown(new, identity["user"], identity["group"])
        with _reachable(new, identity) as (path, descriptors):
            _run_initdb(binaries, path, identity, descriptors)
            _run_bootstrap(binaries, path, identity, descriptors)
        _replace_text(new / "pg_hba.conf", "local all all peer map=gateway\n")
        new.replace(self.folder)

    def admits(self, user_name: str) -> bool:
        """Whether the server lets this user of the machine in."""
        return (self.folder / "pg_ident.conf").read_text() == _identity_map(user_name)

    def admit(self, user_name: str) -> None:
        """Lets this user of the machine in, and nobody else, from the next launch on."""
        if not self.admits(user_name):
            _replace_text(self.folder / "pg_ident.conf", _identity_map(user_name))

    def launch(self, binaries: Binaries, identity: ProcessIdentity, settings: Mapping[str, str]) -> None:
        """Starts the server unless it runs, and returns when it accepts connections.

        Raises EmbeddedDatabaseError with the server's own reason when it does not come up.
        """
        started = None
        if self._postmaster() is None:
            self._remove_leftovers()
            started = self._spawn(binaries, identity, settings)
        give_up = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if started is not None and _program(started) is None and self._postmaster() is None:
                raise EmbeddedDatabaseError(
                    f"PostgreSQL did not start ({self._last_words()}): see {self._log}."
                )
            if time.monotonic() > give_up:
                raise EmbeddedDatabaseError(
                    f"PostgreSQL was not ready after {START_SECONDS:.0f} s: see {self._log}."
                )
            time.sleep(POLL_SECONDS)

    def shut_down(self) -> None:
        """Stops the server fast: open transactions are rolled back, everything committed is on disk."""
        pid = self._postmaster()
        if pid is None:
            return
        os.kill(pid, signal.SIGINT)
        give_up = time.monotonic() + START_SECONDS
        while _program(pid) == "postgres":
            if time.monotonic() > give_up:
                raise EmbeddedDatabaseError(f"PostgreSQL (process {pid}) did not stop: see {self._log}.")
            time.sleep(POLL_SECONDS)

    def _check_version(self, binaries: Binaries) -> None:
        try:
            made_by = (self.folder / "PG_VERSION").read_text().strip()
        except FileNotFoundError as exc:
            raise EmbeddedDatabaseError(
                f"{self.folder} is not a PostgreSQL database: move it away, or choose another data folder."
            ) from exc
        if made_by != str(binaries.major):
            raise EmbeddedDatabaseError(
                f"The database in {self.folder} was made by PostgreSQL {made_by} and {binaries.folder} is version "
                f"{binaries.major}: use binaries of version {made_by}, or dump with them and restore into a new folder."
            )

    def _spawn(self, binaries: Binaries, identity: ProcessIdentity, settings: Mapping[str, str]) -> int:
        """The process id of a new server, which outlives this process and is nobody's child here."""
        values = SETTINGS | (SETTINGS_SINCE_18 if binaries.major >= 18 else {}) | dict(settings)
        options = [argument for name, value in values.items() for argument in ("-c", f"{name}={value}")]
        # A shell in between, so that the server is reaped by init and a terminal's Ctrl-C reaches only the
        # gateway.
        detach = '"$@" </dev/null >&2 & echo $!'
        with self._open_log() as log, _reachable(self.folder, identity) as (path, descriptors):
            launched = subprocess.run(
                ["/bin/sh", "-c", detach, "sh", str(binaries.folder / "postgres"), "-D", path, *options],
                cwd="/",
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                check=True,
                start_new_session=True,
                pass_fds=descriptors,
                **identity,
            )
        return int(launched.stdout)

    @contextmanager
    def _open_log(self) -> Iterator[int]:
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if os.fstat(log).st_size > LARGEST_LOG_BYTES:
                os.ftruncate(log, 0)
            yield log
        finally:
            os.close(log)

    def _last_words(self) -> str:
        lines = [
            line
            for line in self._log.read_text(errors="replace").splitlines()
            if "FATAL" in line or "PANIC" in line
        ]
        return lines[-1].split("FATAL:")[-1].strip() if lines else "it left no reason"

    def _pid_lines(self) -> list[str]:
        """The lines of postmaster.pid, none unless it begins with a process id."""
        try:
            lines = self._pid_file.read_text().splitlines()
        except FileNotFoundError:
            return []
        return lines if lines and lines[0].strip().isdigit() else []

    def _postmaster(self) -> int | None:
        """The server's process id, None where it is dead or its number has gone to another program."""
        lines = self._pid_lines()
        return int(lines[0]) if lines and _program(int(lines[0])) == "postgres" else None

    def _remove_leftovers(self) -> None:
        """Removes a dead server's lock files, once no process of it is attached to its memory any more.

        PostgreSQL does this itself, except where the dead server is a zombie (nothing reaps in a container
        without an init) or its process id has gone to another program: then it says that the lock file
        exists.
        """
        lines = self._pid_lines()
        if len(lines) > 6 and len(lines[6].split()) == 2:
            self._await_detached(int(lines[6].split()[1]))
        for name in ("postmaster.pid", ".s.PGSQL.5432.lock", ".s.PGSQL.5432"):
            (self.folder / name).unlink(missing_ok=True)

    def _await_detached(self, memory_id: int) -> None:
        give_up = time.monotonic() + START_SECONDS
        while _attached_processes(memory_id):
            if time.monotonic() > give_up:
                raise EmbeddedDatabaseError(
                    f"Processes of a dead PostgreSQL still use {self.folder}: end them, then start the gateway again."
                )
            time.sleep(POLL_SECONDS)


def _program(pid: int) -> str | None:
    """What the process runs; None where there is none, or only its zombie.

    Without a /proc every process counts as PostgreSQL.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "postgres" if not Path("/proc/self/stat").exists() and _answers_signals(pid) else None
    name, _, rest = status.partition("(")[2].rpartition(")")
    return None if rest.split()[0] in "ZX" else name


def _answers_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _attached_processes(memory_id: int) -> int:
    """How many processes are attached to a System V shared memory segment, see proc_sysvipc_shm(5)."""
    table = Path("/proc/sysvipc/shm")
    for line in table.read_text().splitlines()[1:] if table.exists() else []:
        columns = line.split()
        if int(columns[1]) == memory_id:
            return int(columns[6])
    return 0


@contextmanager
def _reachable(folder: Path, identity: ProcessIdentity) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A path to `folder` that works for a borrowed user whatever its parents allow, and the descriptors to
    pass on.

    An open folder's entry in /proc leads straight to it; nothing between it and the root is looked at.
    """
    if not identity or not Path("/proc/self/fd").is_dir():
        yield str(folder), ()
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}", (descriptor,)
    finally:
        os.close(descriptor)


def _run_initdb(
    binaries: Binaries, path: str, identity: ProcessIdentity, descriptors: tuple[int, ...]
) -> None:
    options = ["--username=postgres", "--auth=peer", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    command = [str(binaries.folder / "initdb"), "-D", path, *options]
    made = subprocess.run(
        command, cwd="/", capture_output=True, text=True, check=False, pass_fds=descriptors, **identity
    )
    if made.returncode:
        raise EmbeddedDatabaseError(_why_not_created(made.stderr))


def _run_bootstrap(
    binaries: Binaries, path: str, identity: ProcessIdentity, descriptors: tuple[int, ...]
) -> None:
    command = [
        str(binaries.folder / "postgres"),
        "--single",
        "-D",
        path,
        "-j",
        "-c",
        "exit_on_error=on",
        "postgres",
    ]
    script = "".join(f"{statement};\n\n" for statement in bootstrap_statements())
    made = subprocess.run(
        command,
        cwd="/",
        input=script,
        capture_output=True,
        text=True,
        check=False,
        pass_fds=descriptors,
        **identity,
    )
    if made.returncode:
        raise EmbeddedDatabaseError(_why_not_created(made.stderr))


def _why_not_created(complaint: str) -> str:
    if "No space left on device" in complaint:
        return "PostgreSQL could not create its database because the disk is full: free some space, then start again."
    reasons = [
        line for line in complaint.splitlines() if "error:" in line or "FATAL" in line or "ERROR" in line
    ]
    reason = reasons[-1] if reasons else complaint.strip()[-200:]
    return f"PostgreSQL could not create its database ({reason.strip()}): choose another data folder, or set DATABASE_URL."


def _identity_map(user_name: str) -> str:
    return "".join(f'gateway "{user_name}" {role}\n' for role in ("postgres", "authenticator"))


def _replace_text(path: Path, text: str) -> None:
    """Rewrites a file that the server's user owns, keeping its owner."""
    owner = path.stat()
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.chmod(stat.S_IMODE(owner.st_mode))
    if os.geteuid() == 0:
        os.chown(new, owner.st_uid, owner.st_gid)
    new.replace(path)
