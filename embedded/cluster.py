"""The data folder of the embedded server, and the PostgreSQL server that runs on it.

Callers must hold the lock of the data folder: two processes that do this at once would destroy the database.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .binaries import Binaries, ProcessIdentity
from .errors import EmbeddedDatabaseError
from .roles import bootstrap_statements

START_SECONDS = 60.0
POLL_SECONDS = 0.002
LARGEST_LOG_BYTES = 1 << 20

# Settings of a small server. Durability stays on (fsync, synchronous_commit), and values that a client has
# sent stay out of the log (log_min_error_statement).
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
# The default `worker` would start three more processes, which takes longer.
SETTINGS_SINCE_18 = {"io_method": "sync"}


class Cluster:
    """One data folder as `initdb` makes it, and the server that runs on it."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self._log = log
        self._pid_file = folder / "postmaster.pid"

    def owner(self) -> int | None:
        """The uid that owns the database; None before it was created."""
        try:
            return self.folder.stat().st_uid
        except FileNotFoundError:
            return None

    def is_ready(self) -> bool:
        """Whether a living server accepts connections here."""
        # PostgreSQL writes its state into line 8 of the file: LOCK_FILE_LINE_PM_STATUS in its miscadmin.h.
        lines = self._pid_lines()
        return len(lines) > 7 and lines[7].strip() == "ready" and self._postmaster() is not None

    def create(self, binaries: Binaries) -> None:
        """Creates the database with Supabase's roles unless there is one; completely or not at all.

        Raises EmbeddedDatabaseError when it cannot be made, or was made by another major version.
        """
        if self.folder.exists():
            self._require_version(binaries)
            return
        # Built under another name and renamed at the end: a process that dies here leaves no half-made
        # database.
        new = self.folder.with_name("data.new")
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        _initialise(new, binaries)
        new.replace(self.folder)

    def admits(self, user_name: str) -> bool:
        """Whether the server lets this user of the machine in."""
        return (self.folder / "pg_ident.conf").read_text() == _identity_map(user_name)

    def admit(self, user_name: str) -> None:
        """Lets this user of the machine in and nobody else, from the next launch on."""
        if not self.admits(user_name):
            _replace_text(self.folder / "pg_ident.conf", _identity_map(user_name))

    def launch(self, binaries: Binaries, settings: Mapping[str, str]) -> None:
        """Starts the server unless it runs, and returns when it accepts connections.

        Raises EmbeddedDatabaseError with the server's own reason when it does not come up.
        """
        started = None
        if self._postmaster() is None:
            self._remove_leftovers()
            started = self._spawn(binaries, settings)
        complaint = f"PostgreSQL was not ready after {START_SECONDS:.0f} s: see {self._log}."
        _wait_until(lambda: self._is_up(started), complaint)

    def shut_down(self) -> None:
        """Stops the server fast: open transactions are rolled back, and everything committed is on disk."""
        pid = self._postmaster()
        if pid is None:
            return
        os.kill(pid, signal.SIGINT)  # "fast shutdown" in PostgreSQL's documentation of its server
        complaint = f"PostgreSQL (process {pid}) did not stop: see {self._log}."
        _wait_until(lambda: _program(pid) != "postgres", complaint)

    def _is_up(self, started: int | None) -> bool:
        """Whether the server is ready. Raises EmbeddedDatabaseError once it can no longer become ready."""
        if self.is_ready():
            return True
        if started is not None and _program(started) is None and self._postmaster() is None:
            raise EmbeddedDatabaseError(f"PostgreSQL did not start ({self._last_words()}): see {self._log}.")
        return False

    def _require_version(self, binaries: Binaries) -> None:
        try:
            made_by = (self.folder / "PG_VERSION").read_text().strip()
        except FileNotFoundError as exc:
            raise EmbeddedDatabaseError(
                f"{self.folder} is not a PostgreSQL database: move it away, or choose another data folder."
            ) from exc
        if made_by != str(binaries.major):
            raise EmbeddedDatabaseError(
                f"The database in {self.folder} was made by PostgreSQL {made_by} and {binaries.folder} is "
                f"version {binaries.major}: use binaries of version {made_by}, or dump with them and restore "
                "into a new folder."
            )

    def _spawn(self, binaries: Binaries, settings: Mapping[str, str]) -> int:
        """The process id of a new server, which outlives this process and is not its child."""
        # A shell in between ends at once, so that init adopts and reaps the server. In a session of its own,
        # a terminal's Ctrl-C reaches only the gateway.
        detach = '"$@" </dev/null >&2 & echo $!'
        with self._open_log() as log, _reachable(self.folder, binaries.identity) as (path, descriptors):
            server = [str(binaries.folder / "postgres"), "-D", path, *_options(binaries, settings)]
            launched = subprocess.run(
                ["/bin/sh", "-c", detach, "sh", *server],
                cwd="/",
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                check=True,
                start_new_session=True,
                pass_fds=descriptors,
                **binaries.identity,
            )
        return int(launched.stdout)

    @contextmanager
    def _open_log(self) -> Iterator[int]:
        """The log's descriptor. We open it, because the server's user may not write into its folder."""
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if os.fstat(log).st_size > LARGEST_LOG_BYTES:
                os.ftruncate(log, 0)
            yield log
        finally:
            os.close(log)

    def _last_words(self) -> str:
        """The reason that the server gave in its log before it died."""
        lines = self._log.read_text(errors="replace").splitlines()
        reasons = [line for line in lines if "FATAL" in line or "PANIC" in line]
        return reasons[-1].split("FATAL:")[-1].strip() if reasons else "it left no reason"

    def _pid_lines(self) -> list[str]:
        """The lines of postmaster.pid; none unless it begins with a process id."""
        try:
            lines = self._pid_file.read_text().splitlines()
        except FileNotFoundError:
            return []
        return lines if lines and lines[0].strip().isdigit() else []

    def _postmaster(self) -> int | None:
        """The server's process id; None where it is dead or its number has gone to another program."""
        lines = self._pid_lines()
        return int(lines[0]) if lines and _program(int(lines[0])) == "postgres" else None

    def _remove_leftovers(self) -> None:
        """Removes a dead server's lock files, once no process is attached to its memory any more.

        PostgreSQL does this itself, with two exceptions: a dead server that is still a zombie (nothing reaps
        in a container without an init), and a process id that has gone to another program. Then it only says
        that the lock file exists.
        """
        # Line 7 of the file is the key and the id of the shared memory segment.
        lines = self._pid_lines()
        if len(lines) > 6 and len(lines[6].split()) == 2:
            memory_id = int(lines[6].split()[1])
            # A backend that outlived its postmaster could still write to the data files.
            complaint = (
                f"Processes of a dead PostgreSQL still use {self.folder}: "
                "end them, then start the gateway again."
            )
            _wait_until(lambda: not _attached_processes(memory_id), complaint)
        for name in ("postmaster.pid", ".s.PGSQL.5432.lock", ".s.PGSQL.5432"):
            (self.folder / name).unlink(missing_ok=True)


def _wait_until(condition: Callable[[], bool], complaint: str) -> None:
    """Polls until the condition holds. Raises EmbeddedDatabaseError(complaint) after START_SECONDS."""
    give_up = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > give_up:
            raise EmbeddedDatabaseError(complaint)
        time.sleep(POLL_SECONDS)


def _options(binaries: Binaries, settings: Mapping[str, str]) -> list[str]:
    """The server's settings as arguments, since the data folder's own configuration file stays untouched."""
    values = SETTINGS | (SETTINGS_SINCE_18 if binaries.major >= 18 else {}) | dict(settings)
    return [argument for name, value in values.items() for argument in ("-c", f"{name}={value}")]


def _program(pid: int) -> str | None:
    """The program that the process runs; None where there is no process, or only its zombie.

    Without a /proc every process counts as PostgreSQL.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "postgres" if not Path("/proc/self/stat").exists() and _answers_signals(pid) else None
    # The name is in parentheses and may contain some itself, see proc_pid_stat(5).
    name, _, rest = status.partition("(")[2].rpartition(")")
    return None if rest.split()[0] in "ZX" else name


def _answers_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _attached_processes(memory_id: int) -> int:
    """The number of processes attached to a System V shared memory segment, see proc_sysvipc_shm(5)."""
    table = Path("/proc/sysvipc/shm")
    for line in table.read_text().splitlines()[1:] if table.exists() else []:
        columns = line.split()
        if int(columns[1]) == memory_id:
            return int(columns[6])
    return 0


@contextmanager
def _reachable(folder: Path, identity: ProcessIdentity) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A path to `folder` that a borrowed user can take, and the descriptors to pass on to the program.

    The user may not be allowed through the folders above. An open folder's entry in /proc leads straight to
    it.
    """
    if not identity or not Path("/proc/self/fd").is_dir():
        yield str(folder), ()
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}", (descriptor,)
    finally:
        os.close(descriptor)


def _initialise(new: Path, binaries: Binaries) -> None:
    """Makes a database in an empty folder, with Supabase's roles and one way in: the local socket."""
    if binaries.identity:
        os.chown(new, binaries.identity["user"], binaries.identity["group"])
    with _reachable(new, binaries.identity) as (path, descriptors):
        _run_initdb(binaries, path, descriptors)
        _run_bootstrap(binaries, path, descriptors)
    _replace_text(new / "pg_hba.conf", "local all all peer map=gateway\n")


def _run_initdb(binaries: Binaries, path: str, descriptors: tuple[int, ...]) -> None:
    options = ["--username=postgres", "--auth=peer", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    _require_success(binaries.run("initdb", "-D", path, *options, pass_fds=descriptors))


def _run_bootstrap(binaries: Binaries, path: str, descriptors: tuple[int, ...]) -> None:
    """Creates the roles in PostgreSQL's single-user mode, which needs no server and no login."""
    # With -j a statement ends at a semicolon and an empty line, so that each may span several lines.
    options = ["--single", "-D", path, "-j", "-c", "exit_on_error=on", "postgres"]
    script = "".join(f"{statement};\n\n" for statement in bootstrap_statements())
    _require_success(binaries.run("postgres", *options, script=script, pass_fds=descriptors))


def _require_success(ended: subprocess.CompletedProcess[str]) -> None:
    if ended.returncode:
        raise EmbeddedDatabaseError(_why_not_created(ended.stderr))


def _why_not_created(complaint: str) -> str:
    if "No space left on device" in complaint:
        return (
            "PostgreSQL could not create its database because the disk is full: "
            "free some space, then start again."
        )
    marks = ("error:", "FATAL", "ERROR")
    reasons = [line for line in complaint.splitlines() if any(mark in line for mark in marks)]
    reason = reasons[-1] if reasons else complaint.strip()[-200:]
    return (
        f"PostgreSQL could not create its database ({reason.strip()}): "
        "choose another data folder, or set DATABASE_URL."
    )


def _identity_map(user_name: str) -> str:
    """The lines of pg_ident.conf that let one user of the machine act as the owner and as the API's login."""
    return "".join(f'gateway "{user_name}" {role}\n' for role in ("postgres", "authenticator"))


def _replace_text(path: Path, text: str) -> None:
    """Rewrites a file in one step, keeping its owner and mode: the server's user must be able to read it."""
    old = path.stat()
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.chmod(stat.S_IMODE(old.st_mode))
    if os.geteuid() == 0:
        os.chown(new, old.st_uid, old.st_gid)
    new.replace(path)
