"""The embedded server: running, and how to connect.

The server listens on no port and knows no password: a UNIX socket in a 0700 folder, and `peer` for exactly
our user. Every process that uses it holds a shared lock on `users.lock`; whoever can make that lock exclusive
is the last and stops the server. The kernel drops the locks of a killed process, so nothing stale remains.
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

# 108 bytes with the closing zero on Linux, 104 on macOS, see unix(7).
SOCKET_PATH_LIMIT = 103
SOCKET_NAME = "/.s.PGSQL.5432"


class EmbeddedPostgres:
    """One process's share in the server of a data folder; made by `start`."""

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

        `binaries` is a folder with `postgres` and `initdb`; `settings` are PostgreSQL's own, put above our
        defaults. Raises EmbeddedDatabaseError with one sentence when the folder or the programs cannot be
        used.
        """
        server = cls(data_dir, binaries, settings or {})
        starting = asyncio.ensure_future(asyncio.to_thread(server._join))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await starting
            await server.stop()
            raise
        return server

    def connect_kwargs(self, role: str) -> dict[str, Any]:
        """What `asyncpg.connect` needs in this process for the role `postgres` (the owner) or
        `authenticator`.
        """
        host = (
            f"/proc/self/fd/{self._socket_folder}"
            if self._socket_path_is_long()
            else str(self._cluster.folder)
        )
        return {"host": host, "port": 5432, "user": role, "database": "postgres", "ssl": False}

    async def ensure_running(self) -> None:
        """Restarts a server that died; costs one look at a file when it runs.

        Raises EmbeddedDatabaseError when it cannot be started.
        """
        if self._users_lock is None:
            raise EmbeddedDatabaseError(
                "The embedded database has been stopped: start it again before using it."
            )
        if self._cluster.is_ready():
            return
        async with self._restarting:
            await asyncio.shield(asyncio.to_thread(self._restart))

    async def stop(self) -> None:
        """Leaves the server, and shuts it down when no other process uses it. May be called twice."""
        await asyncio.shield(asyncio.to_thread(self._leave))

    def _join(self) -> None:
        with _one_sentence(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._exclusively():
                users_lock = os.open(self._folder / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(users_lock, fcntl.LOCK_SH)
                    self._check_socket_path()
                    self._run()
                    self._socket_folder = os.open(self._cluster.folder, os.O_RDONLY | os.O_DIRECTORY)
                except BaseException:
                    os.close(users_lock)
                    raise
                self._users_lock = users_lock

    def _restart(self) -> None:
        with _one_sentence(self._folder), self._exclusively():
            self._run()

    def _run(self) -> None:
        cluster = self._cluster
        user_name = _user_name()
        owner = cluster.owner()
        if owner is not None and os.geteuid() not in (0, owner):
            raise EmbeddedDatabaseError(
                f"The database in {cluster.folder} belongs to user id {owner}: start the gateway as that user, "
                "or choose another data folder."
            )
        if cluster.is_ready():
            if cluster.admits(user_name):
                return
            raise EmbeddedDatabaseError(
                f"The server of {cluster.folder} was started by another user and admits only him: "
                "start the gateway as that user, or stop his first."
            )
        identity = borrowed_identity(owner)
        binaries = find_binaries(self._binaries, identity)
        cluster.create(binaries, identity)
        cluster.admit(user_name)
        cluster.launch(binaries, identity, self._settings)

    def _leave(self) -> None:
        if self._users_lock is None:
            return
        with self._exclusively():
            users_lock, self._users_lock = self._users_lock, None
            try:
                if _can_be_exclusive(users_lock):
                    self._cluster.shut_down()
            finally:
                os.close(users_lock)
                if self._socket_folder is not None:
                    os.close(self._socket_folder)
                    self._socket_folder = None

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """One process at a time starts or stops the server of a folder."""
        lock = os.open(self._folder / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _socket_path_is_long(self) -> bool:
        return len(os.fsencode(str(self._cluster.folder) + SOCKET_NAME)) > SOCKET_PATH_LIMIT

    def _check_socket_path(self) -> None:
        if self._socket_path_is_long() and not Path("/proc/self/fd").is_dir():
            raise EmbeddedDatabaseError(
                f"The path {self._cluster.folder} is too long for a socket: choose a data folder with a shorter path."
            )


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as exc:
        raise EmbeddedDatabaseError(
            f"User id {os.geteuid()} has no name on this machine, and PostgreSQL needs one: "
            "add it to /etc/passwd, start the gateway as another user, or set DATABASE_URL."
        ) from exc


def _can_be_exclusive(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    """Says of an operating system's refusal what it means for the data folder."""
    try:
        yield
    except OSError as exc:
        subject = exc.filename or folder
        raise EmbeddedDatabaseError(
            f"The data folder {folder} cannot be used ({subject}: {exc.strerror}): "
            "choose a folder that you may write to and that has space left."
        ) from exc
