"""The parts that tests are made of: a real PostgreSQL, a gateway on a socket, and the sandbox as its upstream
on another.

A database is a copy of a migrated template, so a test begins with an empty one within some 50 ms. Nothing is
mocked.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import openai
import pytest
import pytest_asyncio
import uvicorn

import app as application
from config import Configuration, Settings
from embedded.migrate import migrate
from embedded.postgres import EmbeddedPostgres
from sandbox import Sandbox
from sandbox import create_app as create_sandbox
from supabase_config import MIGRATIONS

ROOT = Path(__file__).parents[2]
ADMIN_KEY = "admin-key-for-tests"
SECRET = base64.urlsafe_b64encode(b"s" * 32).decode()
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
TEMPLATE = "gateway_template"
MEMORY, ROOM = Path("/dev/shm"), 2 * 2**30
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300"}

_numbers = itertools.count()


@dataclass
class Database:
    """One test's own database. `owner` connects as its owner, past every grant."""

    server: EmbeddedPostgres
    name: str

    def connect_kwargs(self, role: str) -> dict[str, Any]:
        return {**self.server.connect_kwargs(role), "database": self.name}

    @property
    def url(self) -> str:
        """What DATABASE_URL would be."""
        found = self.connect_kwargs("authenticator")
        return f"postgresql://authenticator@/{self.name}?host={found['host']}"

    @asynccontextmanager
    async def owner(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(**self.connect_kwargs("postgres"))
        try:
            yield connection
        finally:
            await connection.close()

    async def value(self, query: str, *arguments: Any) -> Any:
        async with self.owner() as connection:
            return await connection.fetchval(query, *arguments)

    async def rows(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        async with self.owner() as connection:
            return [dict(row) for row in await connection.fetch(query, *arguments)]

    async def assert_books_balance(self) -> None:
        """Promise 2: what was granted less what was charged is what is there, for every account."""
        assert await self.rows("select * from public.audit_ledger()") == []


def started_postgres(folder: Path, binaries: Path | None) -> Iterator[EmbeddedPostgres]:
    async def begin() -> EmbeddedPostgres:
        server = await EmbeddedPostgres.start(folder, binaries=binaries, settings=FAST)
        owner = await asyncpg.connect(**server.connect_kwargs("postgres"))
        await owner.execute(f"create database {TEMPLATE}")
        await owner.close()
        template = Database(server, TEMPLATE)
        async with template.owner() as connection:
            await connection.execute(BOOTSTRAP)
        await migrate(template.connect_kwargs("postgres"), MIGRATIONS)
        return server

    server = asyncio.run(begin())
    yield server
    asyncio.run(server.stop())


# A new database has none of the privileges that a hosted project of the older kind gives away; the tests need
# them, so that a forgotten revoke shows.
BOOTSTRAP = """
grant usage on schema public to anon, authenticated, service_role;
alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges in schema public grant all on functions to anon, authenticated, service_role;
alter default privileges in schema public grant all on sequences to anon, authenticated, service_role;
"""


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory, where a test's database is made in a tenth of the time; on the disk where memory
    has no room for it.
    """
    in_memory = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(prefix="gateway-tests-", dir=MEMORY if in_memory else None) as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as another user; its own folder in here is 0700
        yield folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The embedded PostgreSQL of the wheel, version 18."""
    with quick_folder() as folder:
        yield from started_postgres(folder / "pg18", None)


@pytest.fixture(scope="session")
def postgres_15() -> Iterator[EmbeddedPostgres]:
    """PostgreSQL 15, the oldest that the SQL is written for."""
    if not DEBIAN_15.is_dir():
        pytest.skip("PostgreSQL 15 is not installed (Debian: apt-get install postgresql-15)")
    with quick_folder() as folder:
        yield from started_postgres(folder / "pg15", DEBIAN_15)


@asynccontextmanager
async def fresh_database(server: EmbeddedPostgres) -> AsyncIterator[Database]:
    name = f"test_{next(_numbers)}"
    owner = await asyncpg.connect(**server.connect_kwargs("postgres"))
    try:
        await owner.execute(f"create database {name} template {TEMPLATE} strategy file_copy")
        yield Database(server, name)
        await owner.execute(f"drop database {name} with (force)")
    finally:
        await owner.close()


@pytest.fixture
async def database(postgres: EmbeddedPostgres) -> AsyncIterator[Database]:
    """An empty, migrated database on PostgreSQL 18."""
    async with fresh_database(postgres) as found:
        yield found


@pytest.fixture(params=["18", "15"])
async def sql(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """An empty, migrated database, on PostgreSQL 18 and on 15: for tests of the SQL itself."""
    server = request.getfixturevalue("postgres" if request.param == "18" else "postgres_15")
    async with fresh_database(server) as found:
        yield found


def listening() -> socket.socket:
    """A free port of 127.0.0.1."""
    # Named by its protocol: asyncio sets TCP_NODELAY on no other, and every answer would wait 40 ms for an
    # acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    return listener


@asynccontextmanager
async def served(app: Any, *, grace: int = 5) -> AsyncIterator[str]:
    """Serves an ASGI app on a free port of 127.0.0.1; yields its base URL. At its end, requests have `grace`
    seconds to end.
    """
    listener = listening()
    config = uvicorn.Config(
        app, log_config=None, proxy_headers=False, access_log=False, timeout_graceful_shutdown=grace
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server._serve(sockets=[listener]))
    while not server.started:
        if running.done():
            running.result()
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running
        listener.close()


@dataclass
class Gateway:
    """A gateway on a socket, with the means to use it as a stranger would."""

    url: str
    app: Any
    database: Database
    http: httpx.AsyncClient
    stack: AsyncExitStack
    _users: Iterator[int] = field(default_factory=itertools.count)

    async def register(self, *, credits: float | str = 0, environment: str = "live") -> User:
        """A new user; `credits` are granted by an admin on top of what signing up gives."""
        number = next(self._users)
        body = {
            "username": f"user{number}",
            "email": f"user{number}@example.com",
            "environment_tag": environment,
        }
        answer = await self.admin("POST", "/auth/register", json=body)
        user = User(self, answer["user_id"], answer["api_key"])
        if float(credits):
            await self.admin("POST", "/admin/add_credits", json={"user_id": user.id, "credits": credits})
        await self.admin("POST", "/admin/limit", json={"user_id": user.id, "rate_limits": UNLIMITED})
        return user

    async def admin(self, method: str, path: str, **rest: Any) -> Any:
        answer = await self.http.request(
            method, path, headers={"authorization": f"Bearer {ADMIN_KEY}"}, **rest
        )
        assert answer.is_success, answer.text
        return answer.json()


UNLIMITED = dict.fromkeys(
    (
        "requests_per_minute",
        "requests_per_hour",
        "requests_per_day",
        "tokens_per_minute",
        "tokens_per_hour",
        "tokens_per_day",
    )
)


@dataclass
class User:
    """A registered user and their key."""

    gateway: Gateway
    id: int
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def sdk(self, **options: Any) -> openai.AsyncOpenAI:
        """The official SDK, pointed at the gateway, without retries of its own."""
        client = openai.AsyncOpenAI(
            api_key=self.key, base_url=f"{self.gateway.url}/v1", **{"max_retries": 0, **options}
        )
        self.gateway.stack.push_async_callback(client.close)
        return client

    async def chat(
        self, *, scenario: str | None = None, model: str = "openai/gpt-4o-mini", **body: Any
    ) -> httpx.Response:
        headers = {**self.headers, **({"x-sandbox-scenario": scenario} if scenario else {})}
        body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], **body}
        return await self.gateway.http.post("/v1/chat/completions", headers=headers, json=body)

    async def balance(self) -> dict[str, Any]:
        answer = await self.gateway.http.get("/user/balance", headers=self.headers)
        return dict(answer.json())

    async def records(self) -> list[dict[str, Any]]:
        answer = await self.gateway.http.get("/user/usage/records", headers=self.headers)
        return list(answer.json()["records"])

    async def settled_record(self) -> dict[str, Any]:
        """The user's only record, once it is no longer pending."""
        records = await eventually(
            self.records, lambda found: len(found) == 1 and found[0]["status"] != "pending"
        )
        return dict(records[0])


async def eventually(
    ask: Callable[[], Awaitable[Any]], accept: Callable[[Any], bool], seconds: float = 10.0
) -> Any:
    """Asks again until the answer is accepted; for what happens after a client is gone, when there is nothing
    to await.
    """
    async with asyncio.timeout(seconds):
        while not accept(found := await ask()):  # noqa: ASYNC110  # what it waits for happens elsewhere
            await asyncio.sleep(0.02)
    return found


def settings_for(database: Database, **changes: Any) -> Settings:
    """Settings of a gateway on this database, untouched by the environment."""
    found: dict[str, Any] = {
        "database_url": database.url,
        "admin_api_key": ADMIN_KEY,
        "key_hash_secrets": SECRET,
        "encryption_keys": SECRET,
        "gateway_mode": "sandbox",
        "log_level": "error",
        "log_format": "console",
    }
    return Settings(_env_file=None, **{**found, **changes})  # type: ignore[call-arg]  # pydantic-settings' own, without its plugin


@pytest.fixture
async def start_gateway(
    database: Database, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[Gateway]]]:
    """Starts gateways on the test's database; settings as keyword arguments."""
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> Gateway:
            return await stack.enter_async_context(
                running_gateway(database, **{"gateway_data_dir": tmp_path, **settings})
            )

        yield start


@asynccontextmanager
async def running_gateway(database: Database, **settings: Any) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        app = application.create_app(Configuration(settings_for(database, **settings), ()))
        url = await stack.enter_async_context(served(app))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30))
        yield Gateway(url, app, database, http, stack)


@pytest.fixture
async def gateway(start_gateway: Callable[..., Awaitable[Gateway]]) -> Gateway:
    """A gateway in sandbox mode: answers come from its own simulator, credits are play money."""
    return await start_gateway()


@dataclass
class Upstream:
    """The sandbox as an upstream of its own, on a socket. In live mode no client can ask it for a scenario:
    `scenario` does.
    """

    url: str
    sandbox: Sandbox
    scenario: str = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.scenario:
            scope = {**scope, "headers": [*scope["headers"], (b"x-sandbox-scenario", self.scenario.encode())]}
        await self.sandbox(scope, receive, send)

    def forget(self) -> Upstream:
        """As if nothing had been asked yet."""
        self.scenario = ""
        self.sandbox.state.reset()
        self.sandbox.state.billed = Decimal(0)
        return self

    @property
    def inferences(self) -> int:
        """How often it was asked for a completion."""
        return self.sandbox.state.counts["/chat/completions"]

    def sent(self) -> dict[str, Any]:
        """The body of the last completion it was asked for."""
        bodies = [call.body for call in self.sandbox.state.calls if call.path == "/chat/completions"]
        assert isinstance(bodies[-1], dict)
        return bodies[-1]


@asynccontextmanager
async def running_upstream() -> AsyncIterator[Upstream]:
    found = Upstream("", create_sandbox())
    async with served(found) as url:
        found.url = f"{url}/api/v1"
        yield found


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with running_upstream() as found:
        yield found


@pytest.fixture
async def live_gateway(start_gateway: Callable[..., Awaitable[Gateway]], upstream: Upstream) -> Gateway:
    """A gateway in live mode, whose OpenRouter is `upstream`."""
    return await start_gateway(**live(upstream.url))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Gateway, Upstream]]:
    """A live gateway and its upstream for a whole module, whose tests have users of their own and run on its
    loop.
    """
    async with fresh_database(postgres) as database, running_upstream() as upstream:
        folder = tmp_path_factory.mktemp("stage")
        async with running_gateway(database, gateway_data_dir=folder, **live(upstream.url)) as gateway:
            yield gateway, upstream


# The stage's parts, and what needs a database of the test's own beside it, on the loop of the module. A
# module gives them the names that its tests know them by: `upstream, live_gateway = staged_upstream,
# staged_gateway`.


@pytest.fixture
def staged_upstream(stage: tuple[Gateway, Upstream]) -> Upstream:
    return stage[1].forget()


@pytest.fixture
def staged_gateway(stage: tuple[Gateway, Upstream]) -> Gateway:
    return stage[0]


@pytest_asyncio.fixture(loop_scope="module")
async def staged_start(
    database: Database, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[Gateway]]]:
    """`start_gateway`."""
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> Gateway:
            return await stack.enter_async_context(
                running_gateway(database, **{"gateway_data_dir": tmp_path, **settings})
            )

        yield start


@pytest_asyncio.fixture(loop_scope="module")
async def staged_link(database: Database) -> AsyncIterator[DatabaseLink]:
    """A way to the database that can be cut; `start_gateway(database_url=link.url)` uses it."""
    async with database_link(database) as found:
        yield found


OPERATOR_KEY = "sk-or-v1-operator-secret"


def live(url: str) -> dict[str, Any]:
    """The settings of live mode with this upstream."""
    return {"gateway_mode": "live", "openrouter_api_key": OPERATOR_KEY, "openrouter_base_url": url}


@asynccontextmanager
async def running_workers(
    database: Database, upstream_url: str, folder: Path
) -> AsyncIterator[tuple[Gateway, int]]:
    """`uvicorn app:app --workers 2` in live mode, as an operator would start it, and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": database.url,
        "ADMIN_API_KEY": ADMIN_KEY,
        "KEY_HASH_SECRETS": SECRET,
        "ENCRYPTION_KEYS": SECRET,
        "OPENROUTER_API_KEY": OPERATOR_KEY,
        "OPENROUTER_BASE_URL": upstream_url,
        "GATEWAY_DATA_DIR": str(folder),
        "LOG_LEVEL": "error",
    }
    options = ("--no-proxy-headers", "--workers", "2", "--port", str(port), "--log-level", "error")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "app:app", *options),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    limits = httpx.Limits(
        max_connections=250, max_keepalive_connections=0
    )  # each request is a connection, to whichever worker takes it
    async with (
        AsyncExitStack() as stack,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http,
    ):
        try:
            await eventually(lambda: is_ready(http), lambda ready: ready, seconds=30)
            yield Gateway(f"http://127.0.0.1:{port}", None, database, http, stack), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def is_ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health/ready")).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass
class DatabaseLink:
    """A way to the test's database that can be cut, and that counts the round trips made over it."""

    database: Database
    folder: Path
    round_trips: int = 0
    is_up: bool = True
    losing_replies: bool = False
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"postgresql://authenticator@/{self.database.name}?host={self.folder}"

    def cut(self) -> None:
        """From now on nothing gets through, nor are there new connections."""
        self.is_up = False
        for writer in self._writers:
            writer.transport.abort()

    def lose_replies(self) -> None:
        """What is sent arrives, and then the connection breaks instead of answering."""
        self.losing_replies = True

    def mend(self) -> None:
        self.is_up, self.losing_replies = True, False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_up:
            writer.transport.abort()
            return
        target = self.database.connect_kwargs("postgres")
        server_reader, server_writer = await asyncio.open_unix_connection(
            f"{target['host']}/.s.PGSQL.{target.get('port', 5432)}"
        )
        self._writers |= {writer, server_writer}
        try:
            await asyncio.gather(self._forward(reader, server_writer), self._back(server_reader, writer))
        finally:
            for each in (writer, server_writer):
                each.transport.abort()
                self._writers.discard(each)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            # A client ends what it asks for at once with Sync, the last message it sends before it waits.
            self.round_trips += data.endswith(b"S\x00\x00\x00\x04")
            writer.write(data)
        writer.transport.abort()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.losing_replies:
                break
            writer.write(data)
        writer.transport.abort()


@asynccontextmanager
async def database_link(database: Database) -> AsyncIterator[DatabaseLink]:
    with tempfile.TemporaryDirectory(prefix="gw") as folder:  # a socket's path is short
        found = DatabaseLink(database, Path(folder))
        server = await asyncio.start_unix_server(found.carry, f"{folder}/.s.PGSQL.5432")
        yield found
        server.close()
        found.cut()
