"""The embedded server starts, survives, is shared and is stopped, as root and as an ordinary user."""

# ruff: noqa: ASYNC110, ASYNC222, ASYNC240 (processes and /proc are watched from here, and nothing else runs
# in the loop)
from __future__ import annotations

import asyncio
import ctypes
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from embedded import EmbeddedDatabaseError
from embedded.binaries import borrowed_identity, find_binaries
from embedded.postgres import EmbeddedPostgres
from embedded.postgrest import PostgrestTransport
from tests.support import ROOT
from tests.support.installations import INSTALLATIONS, QUICK

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, see prctl(2)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="uses prctl")

# A process that takes part in the server: it says so, and leaves when its input ends. It becomes another user
# only once it has imported everything, since the interpreter may lie in a folder that is closed to others.
PARTICIPANT = """
import asyncio, concurrent.futures.thread, os, sys
from pathlib import Path
from embedded.errors import EmbeddedDatabaseError
from embedded.postgres import EmbeddedPostgres
async def take_part():
    try:
        server = await EmbeddedPostgres.start(Path(sys.argv[1]), settings={"fsync": "off"})
    except EmbeddedDatabaseError as exc:
        print("refused:", exc, flush=True)
        return
    print("joined", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()
if len(sys.argv) > 2:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
asyncio.run(take_part())
"""


@asynccontextmanager
async def participant(folder: Path, *identity: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A second process that uses the server of `folder`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PARTICIPANT,
        str(folder),
        *map(str, identity),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            await process.communicate(b"")


async def said(process: asyncio.subprocess.Process) -> str:
    """The next line of a participant."""
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


@asynccontextmanager
async def running(folder: Path, binaries: Path | None = None) -> AsyncIterator[EmbeddedPostgres]:
    """This process's share in the server of `folder`."""
    server = await EmbeddedPostgres.start(folder, binaries=binaries, settings=QUICK)
    try:
        yield server
    finally:
        await server.stop()


async def ask(server: EmbeddedPostgres, query: str, role: str = "postgres") -> Any:
    """The answer of the server to one query."""
    connection = await asyncpg.connect(**server.connect_kwargs(role))
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def let_others_through(folder: Path) -> None:
    """Lets other users traverse a test's folder and those above it that pytest made."""
    for made_by_pytest in (folder, *folder.parents):
        if made_by_pytest == Path(tempfile.gettempdir()):
            return
        made_by_pytest.chmod(0o711)


def postmaster(folder: Path) -> int:
    """The process id of the server that runs in `folder`."""
    return int((folder / "data" / "postmaster.pid").read_text().split()[0])


def is_running(pid: int) -> bool:
    """Whether the process lives, a zombie being dead."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


async def until_dead(pid: int) -> None:
    """Returns once the process has ended."""
    while is_running(pid):
        await asyncio.sleep(0)


@pytest.fixture(scope="module", params=INSTALLATIONS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path | None]:
    """A data folder that was created and stopped again, and the binaries it is for."""
    folder = tmp_path_factory.mktemp("made") / "data folder"

    async def create() -> None:
        await (await EmbeddedPostgres.start(folder, binaries=request.param, settings=QUICK)).stop()

    asyncio.run(create())
    return folder, request.param


@pytest.fixture
def reaping_nothing() -> Iterator[None]:
    """This process adopts orphans and does not wait for them, as many a container's first process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(SUBREAPER, 1, 0, 0, 0)
    yield
    prctl(SUBREAPER, 0, 0, 0, 0)


async def test_a_new_database_is_what_a_supabase_project_starts_from(made: tuple[Path, Path | None]) -> None:
    async with running(made[0], made[1]) as server:
        roles = (
            "select string_agg(rolname || rolcanlogin || rolbypassrls, ' ' order by rolname) from pg_roles"
        )
        named = "where rolname in ('anon', 'authenticated', 'service_role', 'authenticator')"
        assert await ask(server, f"{roles} {named}") == (
            "anonfalsefalse authenticatedfalsefalse authenticatortruefalse service_rolefalsetrue"
        )
        assert await ask(server, "select pg_has_role('authenticator', 'service_role', 'member')")
        await ask(server, "create table forgotten ()")
        assert await ask(server, "select has_table_privilege('anon', 'forgotten', 'select')")
        assert await ask(server, "drop table forgotten") is None
        settings = (
            "select string_agg(name || '=' || setting, ' ' order by name) from pg_settings where name in"
        )
        assert await ask(
            server, f"{settings} ('listen_addresses', 'synchronous_commit', 'TimeZone', 'server_encoding')"
        ) == ("TimeZone=UTC listen_addresses= server_encoding=UTF8 synchronous_commit=on")
        assert (
            await ask(server, "select datcollate from pg_database where datname = current_database()") == "C"
        )


async def test_the_server_is_durable_unless_told_otherwise(made: tuple[Path, Path | None]) -> None:
    server = await EmbeddedPostgres.start(made[0], binaries=made[1])
    assert await ask(server, "select current_setting('fsync')") == "on"
    await server.stop()


async def test_nobody_else_can_reach_the_server(made: tuple[Path, Path | None]) -> None:
    async with running(made[0], made[1]) as server:
        assert stat.S_IMODE((made[0] / "data").stat().st_mode) == 0o700
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            await ask(server, "select 1", role="anon")
        me = pwd.getpwuid(os.geteuid()).pw_name
        assert (made[0] / "data" / "pg_hba.conf").read_text() == "local all all peer map=gateway\n"
        assert {
            line.split()[1] for line in (made[0] / "data" / "pg_ident.conf").read_text().splitlines()
        } == {f'"{me}"'}


async def test_the_last_one_out_stops_the_server(made: tuple[Path, Path | None]) -> None:
    first = await EmbeddedPostgres.start(made[0], binaries=made[1], settings=QUICK)
    second = await EmbeddedPostgres.start(made[0], binaries=made[1], settings=QUICK)
    server = postmaster(made[0])
    await first.stop()
    assert await ask(second, "select 1") == 1
    with pytest.raises(EmbeddedDatabaseError, match="has been stopped"):
        await first.ensure_running()
    await second.stop()
    assert not is_running(server)
    await second.stop()


async def test_a_killed_server_is_started_by_the_next_request(made: tuple[Path, Path | None]) -> None:
    async with running(made[0], made[1]) as server:
        await ask(server, "create table if not exists kept as select 7 as n")
        transport = PostgrestTransport(
            server.connect_kwargs("authenticator"), ensure_running=server.ensure_running
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://x.invalid/rest/v1") as http:
            assert (await http.get("/kept")).json() == [{"n": 7}]
            backend = await ask(
                server, "select min(pid) from pg_stat_activity where usename = 'authenticator'"
            )
            dead = postmaster(made[0])
            os.kill(dead, signal.SIGKILL)
            await until_dead(dead)
            await until_dead(backend)
            answers = await asyncio.gather(*(http.get("/kept") for _ in range(4)))
            assert [answer.json() for answer in answers] == [[{"n": 7}]] * 4
        assert postmaster(made[0]) != dead


@on_linux
@pytest.mark.usefixtures("reaping_nothing")
async def test_a_dead_server_that_nobody_reaps_is_replaced(made: tuple[Path, Path | None]) -> None:
    async with running(made[0], made[1]) as server:
        dead = postmaster(made[0])
        os.kill(dead, signal.SIGKILL)
        await until_dead(dead)
        assert Path(f"/proc/{dead}").exists()
        await server.ensure_running()
        assert await ask(server, "select 1") == 1
        os.waitpid(dead, 0)
        last = postmaster(made[0])
    os.waitpid(last, 0)


async def test_a_process_id_that_another_program_was_given_is_no_server(
    made: tuple[Path, Path | None],
) -> None:
    leftover = made[0] / "data" / "postmaster.pid"
    leftover.write_text(f"{os.getpid()}\n{made[0]}\n1\n5432\n.\n\n        0         0\nready   \n")
    os.chown(leftover, (made[0] / "data").stat().st_uid, -1)
    async with running(made[0], made[1]) as server:
        assert await ask(server, "select 1") == 1


async def test_processes_that_start_at_once_share_one_server(tmp_path: Path) -> None:
    async with participant(tmp_path) as one, participant(tmp_path) as two:
        assert [await said(one), await said(two)] == ["joined", "joined"]
        server = postmaster(tmp_path)
        await one.communicate(b"")
        assert is_running(server)
    assert not is_running(server)


async def test_a_killed_process_leaves_a_server_that_the_next_one_takes_over(
    made: tuple[Path, Path | None],
) -> None:
    if made[1] is not None:
        pytest.skip("the participant uses the wheel")
    async with participant(made[0]) as process:
        assert await said(process) == "joined"
        orphan = postmaster(made[0])
        process.kill()
        await process.wait()
    server = await EmbeddedPostgres.start(made[0])
    assert postmaster(made[0]) == orphan
    await server.stop()
    assert not is_running(orphan)


@as_root
async def test_an_ordinary_user_runs_the_server_as_himself(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    let_others_through(tmp_path)
    async with participant(folder, nobody.pw_uid) as process:
        assert await said(process) == "joined"
        assert Path(f"/proc/{postmaster(folder)}").stat().st_uid == nobody.pw_uid
        with pytest.raises(EmbeddedDatabaseError, match="another user"):
            await EmbeddedPostgres.start(folder)


@as_root
async def test_a_user_without_a_name_is_told_that_postgresql_needs_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    let_others_through(tmp_path.parent)
    async with participant(tmp_path / "x", 12345) as process:
        assert (await said(process)).startswith("refused: User id 12345 has no name on this machine")


@as_root
@pytest.mark.parametrize("binaries", INSTALLATIONS)
async def test_a_data_folder_below_a_closed_folder_works(tmp_path: Path, binaries: Path | None) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    async with running(closed / "data", binaries) as server:
        assert Path(f"/proc/{postmaster(closed / 'data')}").stat().st_uid != 0
        assert await ask(server, "select 1") == 1
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@as_root
def test_binaries_in_a_closed_folder_are_copied_once_to_an_open_one(tmp_path: Path) -> None:
    installed = find_binaries(None, {}).folder.parent
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(installed, closed / installed.parent.name / installed.name)
    libraries = installed.parent.with_name(installed.parent.name + ".libs")
    if libraries.is_dir():
        shutil.copytree(libraries, closed / libraries.name)
    with tempfile.TemporaryDirectory() as opened:
        Path(opened).chmod(0o755)
        copies = Path(opened) / "copies"
        for _ in range(2):
            binaries = closed / installed.parent.name / installed.name / "bin"
            programs = find_binaries(binaries, borrowed_identity(), copies=copies)
            assert programs.folder.is_relative_to(copies)
            assert len(list(copies.iterdir())) == 1
        initdb = subprocess.run([programs.folder / "initdb", "--version"], check=True, **borrowed_identity())
        assert initdb.returncode == 0


async def test_a_data_folder_with_a_path_too_long_for_a_socket_works(
    made: tuple[Path, Path | None], tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 100) / ("y" * 100)
    long.parent.mkdir()
    shutil.copytree(made[0], long)
    if os.geteuid() == 0:
        for path in [long / "data", *(long / "data").rglob("*")]:
            os.chown(path, (made[0] / "data").stat().st_uid, -1)
    async with running(long, made[1]) as server:
        assert await ask(server, "select 1", role="authenticator") == 1


async def refusal(folder: Path, **options: Any) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(EmbeddedDatabaseError) as refused:
        await EmbeddedPostgres.start(folder, **options)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


async def test_a_file_in_place_of_the_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "choose a folder that you may write to" in await refusal(tmp_path / "file")
    assert "choose a folder that you may write to" in await refusal(tmp_path / "file" / "below")


async def test_a_folder_that_holds_something_else_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "holiday.jpg").write_text("")
    assert "is not a PostgreSQL database" in await refusal(tmp_path)


@as_root
async def test_a_folder_that_may_not_be_written_is_refused_in_one_sentence(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    let_others_through(tmp_path)
    async with participant(tmp_path, nobody.pw_uid) as process:
        assert "choose a folder that you may write to" in await said(process)


async def test_missing_binaries_are_refused_in_one_sentence(tmp_path: Path) -> None:
    assert "name the folder that holds postgres and initdb" in await refusal(tmp_path, binaries=tmp_path)


async def test_a_database_of_another_version_is_refused_in_one_sentence(
    made: tuple[Path, Path | None], tmp_path: Path
) -> None:
    shutil.copytree(made[0], tmp_path / "copy")
    (tmp_path / "copy" / "data" / "PG_VERSION").write_text("14\n")
    assert "was made by PostgreSQL 14" in await refusal(tmp_path / "copy", binaries=made[1])


async def test_a_setting_that_the_server_refuses_is_named(made: tuple[Path, Path | None]) -> None:
    assert "PostgreSQL did not start" in await refusal(
        made[0], binaries=made[1], settings={"no_such_setting": "1"}
    )
