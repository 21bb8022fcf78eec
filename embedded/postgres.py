"""The embedded server: starts it, shares it between processes, and says how to connect.

The server must never listen on a port, and has no password: it has a UNIX socket in a 0700 folder, and `peer`
authentication for exactly our user. Every process that uses it holds a shared lock on `users.lock`. A process
that can make that lock exclusive is the last one, and stops the server. The kernel drops the locks of a
killed process, so nothing stale remains.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .binaries import borrowed_identity, find_binaries
from .cluster import Cluster
from .errors import EmbeddedDatabaseError

# A socket's path may have 108 bytes with the closing zero on Linux and 104 on macOS, see unix(7).
SOCKET_PATH_LIMIT = 103
SOCKET_NAME = "/.s.PGSQL.5432"


class EmbeddedPostgres:
    """One process's share in the server of a data folder. Made by `start`."""

    def __init__(self, data_dir: Path, binaries: Path | None, settings: Mapping[str, str]) -> None:
        self._folder = data_dir.absolute()
        self._binaries = binaries
        self._settings = dict(settings)
        self._cluster = Cluster(self._folder / "data", self._folder / "server.log")
        self._users_lock: int | None = None
        self._socket_folder: int | None = None
        self._restarting = asyncio.Lock()

    @classmethod
    async def start(
        cls, data_dir: Path, *, binaries: Path | None = None, settings: Mapping[str, str] | None = None
    ) -> EmbeddedPostgres:
        """Joins the server of `data_dir`, starting it (and creating its database) where needed.

        `binaries` is a folder with `postgres` and `initdb`. `settings` are PostgreSQL's own and override our
        defaults. Raises EmbeddedDatabaseError when the folder or the programs cannot be used.
        """
        server = cls(data_dir, binaries, settings or {})
        joining = asyncio.ensure_future(asyncio.to_thread(server._join))
        try:
            await asyncio.shield(joining)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: wait until it has joined, or its server would outlive this
            # process.
            await joining
            await server.stop()
            raise
        return server

    def connect_kwargs(self, role: str) -> dict[str, Any]:
        """The arguments of `asyncpg.connect` in this process.

        `role` is `postgres`, the owner, or `authenticator`, the login of the API.
        """
        # An open folder's entry in /proc is a short path to it.
        short = f"/proc/self/fd/{self._socket_folder}"
        host = short if self._socket_path_is_long() else str(self._cluster.folder)
        return {"host": host, "port": 5432, "user": role, "database": "postgres", "ssl": False}

    async def ensure_running(self) -> None:
        """Restarts a server that has died. While it runs, this only reads a file.

        Raises EmbeddedDatabaseError when it cannot be started.
        """
        if self._users_lock is None:
            raise EmbeddedDatabaseError(
                "The embedded database has been stopped: start it again before using it."
            )
        if self._cluster.is_ready():
            return
        # Callers that notice the crash together wait here; the file lock would block a thread for each of
        # them.
        async with self._restarting:
            await asyncio.shield(asyncio.to_thread(self._restart))

    async def stop(self) -> None:
        """Leaves the server, and shuts it down when no other process uses it. May be called twice."""
        # Shielded, because a cancelled caller must not leave the server running without a user.
        await asyncio.shield(asyncio.to_thread(self._leave))

    def _join(self) -> None:
        with _translated_os_errors(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._exclusively():
                self._users_lock = self._join_locked()

    def _join_locked(self) -> int:
        """Runs the server, and returns the descriptor that holds our shared lock on it."""
        users_lock = os.open(self._folder / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(users_lock, fcntl.LOCK_SH)
            self._require_reachable_socket()
            self._run()
            # A path too long for a socket is shortened by way of this descriptor, see connect_kwargs.
            self._socket_folder = os.open(self._cluster.folder, os.O_RDONLY | os.O_DIRECTORY)
        except BaseException:
            os.close(users_lock)
            raise
        return users_lock

    def _restart(self) -> None:
        with _translated_os_errors(self._folder), self._exclusively():
            self._run()

    def _run(self) -> None:
        """Starts the server unless it runs. The caller holds the start lock."""
        user_name = _user_name()
        owner = self._cluster.owner()
        self._require_own_database(owner)
        if self._cluster.is_ready():
            self._require_admission(user_name)
            return
        binaries = find_binaries(self._binaries, borrowed_identity(owner))
        self._cluster.create(binaries)
        self._cluster.admit(user_name)
        self._cluster.launch(binaries, self._settings)

    def _require_own_database(self, owner: int | None) -> None:
        if owner is not None and os.geteuid() not in (0, owner):
            raise EmbeddedDatabaseError(
                f"The database in {self._cluster.folder} belongs to user id {owner}: "
                "start the gateway as that user, or choose another data folder."
            )

    def _require_admission(self, user_name: str) -> None:
        # A running server has already read the file: writing our name into it now would not let us in.
        if not self._cluster.admits(user_name):
            raise EmbeddedDatabaseError(
                f"The server of {self._cluster.folder} was started by another user and admits nobody else: "
                "start the gateway as that user, or stop the other gateway first."
            )

    def _leave(self) -> None:
        if self._users_lock is None:
            return
        # Under the start lock nobody can join between the test for the last user and the shutdown.
        with self._exclusively():
            users_lock, self._users_lock = self._users_lock, None
            try:
                if _can_be_exclusive(users_lock):
                    self._cluster.shut_down()
            finally:
                os.close(users_lock)
                self._close_socket_folder()

    def _close_socket_folder(self) -> None:
        if self._socket_folder is not None:
            os.close(self._socket_folder)
            self._socket_folder = None

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Lets one process at a time start or stop the server of a folder."""
        lock = os.open(self._folder / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _socket_path_is_long(self) -> bool:
        return len(os.fsencode(str(self._cluster.folder) + SOCKET_NAME)) > SOCKET_PATH_LIMIT

    def _require_reachable_socket(self) -> None:
        if self._socket_path_is_long() and not Path("/proc/self/fd").is_dir():
            raise EmbeddedDatabaseError(
                f"The path {self._cluster.folder} is too long for a socket: "
                "choose a data folder with a shorter path."
            )


def _user_name() -> str:
    """Our name on this machine: `peer` authentication compares names, not uids."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as exc:
        raise EmbeddedDatabaseError(
            f"User id {os.geteuid()} has no name on this machine, and PostgreSQL needs one: "
            "add it to /etc/passwd, start the gateway as another user, or set DATABASE_URL."
        ) from exc


def _can_be_exclusive(lock: int) -> bool:
    """Whether nobody else holds the lock, which is then ours alone."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _translated_os_errors(folder: Path) -> Iterator[None]:
    """Raises EmbeddedDatabaseError for an operating system's error: what it means for the data folder."""
    try:
        yield
    except OSError as exc:
        subject = exc.filename or folder
        raise EmbeddedDatabaseError(
            f"The data folder {folder} cannot be used ({subject}: {exc.strerror}): "
            "choose a folder that you may write to and that has space left."
        ) from exc
