"""The processes that take part: starts them on their cores, and ends every one of them whatever happens.

The gateway (or nginx in its place) has one core to itself; PostgreSQL, the mock upstream and wrk share the
others. Everything listens on 127.0.0.1 or on a UNIX socket. If the benchmark is killed, the kernel ends its
children.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

ROOT = Path(__file__).parent.parent
START_SECONDS = 60.0
STOP_SECONDS = 15.0
PR_SET_PDEATHSIG = 1  # prctl(2)

T = TypeVar("T")


class BenchmarkError(Exception):
    """The benchmark cannot run, or what it ran must not be trusted; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores are whose. A machine with a single core shares it."""

    all: frozenset[int]
    gateway: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> Cores:
        every = frozenset(os.sched_getaffinity(0))
        last = frozenset([max(every)])
        return cls(every, last, every - last or every)


@dataclass(frozen=True, slots=True)
class Rig:
    """The place where the processes of one benchmark run."""

    folder: Path
    cores: Cores

    @asynccontextmanager
    async def running(
        self, name: str, *command: str, cores: frozenset[int], env: Mapping[str, str] | None = None
    ) -> AsyncIterator[subprocess.Popen[bytes]]:
        """Runs a program while the block does; what it prints goes to a file of its name."""
        process = self._start(name, command, cores, env or {})
        try:
            yield process
        finally:
            await _end(process)

    def _start(
        self, name: str, command: Sequence[str], cores: frozenset[int], env: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env={**minimal_environment(), **env},
                stdout=log,
                stderr=log,
                preexec_fn=_settle_on(cores),
            )


@asynccontextmanager
async def open_rig() -> AsyncIterator[Rig]:
    """A rig in a folder of its own under `build/`, removed afterwards.

    It lies on the disk, so that fsync means something.
    """
    require_tools()
    cores = Cores.of_this_machine()
    os.sched_setaffinity(0, cores.others)
    folder = _new_folder()
    try:
        yield Rig(folder, cores)
    finally:
        os.sched_setaffinity(0, cores.all)
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder() -> Path:
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "build"))
    folder.chmod(0o755)  # PostgreSQL may run as another user; its own folder in here is 0700
    return folder


def require_tools() -> None:
    """Raises BenchmarkError with one sentence where something is missing on this machine."""
    if sys.platform != "linux":
        raise BenchmarkError("The benchmark needs Linux: it pins processes to cores and reads /proc.")
    missing = [name for name in ("wrk", "nginx") if program(name) is None]
    if missing:
        names, packages = " and ".join(missing), " ".join(missing)
        raise BenchmarkError(f"The benchmark needs {names} (Debian, Ubuntu: apt-get install {packages}).")


def program(name: str) -> str | None:
    """The path of a program; system folders count, too, where an ordinary user's PATH lacks them."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


def run_to_the_end(main: Coroutine[object, None, T]) -> T:
    """Runs `main`; SIGTERM cancels it, so that all it started is ended.

    Raises BenchmarkError where it took too long.
    """
    try:
        return asyncio.run(_cancelled_by_sigterm(main))
    except TimeoutError as exc:
        raise BenchmarkError("It took too long, or a process did not start in time.") from exc


async def _cancelled_by_sigterm(main: Coroutine[object, None, T]) -> T:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await main


def minimal_environment() -> dict[str, str]:
    """Nothing of the caller's environment that could configure the gateway."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once `url` answers 200. Raises BenchmarkError with the end of the log when it does not."""
    async with httpx.AsyncClient(timeout=5) as http, asyncio.timeout(START_SECONDS):
        while True:
            if process.poll() is not None:
                raise BenchmarkError(f"{log.stem} ended with status {process.returncode}:\n{_end_of(log)}")
            try:
                if (await http.get(url)).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.005)


def _end_of(log: Path) -> str:
    return log.read_text()[-2000:]


def _settle_on(cores: frozenset[int]) -> Callable[[], None]:
    libc = ctypes.CDLL(None)

    def settle() -> None:  # runs in the child, before the program
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        os.sched_setaffinity(0, cores)
        os.setpgid(0, 0)  # an interrupt at the keyboard is for us to pass on

    return settle


async def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        await asyncio.shield(asyncio.to_thread(process.wait, STOP_SECONDS))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    except asyncio.CancelledError:
        process.wait(STOP_SECONDS)
        raise
