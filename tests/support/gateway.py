"""Gateways on sockets, with the means to use them as a stranger would.

Nothing in them is mocked: their database is real, and their upstream is the sandbox.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

import app as application
from config import Configuration, Settings
from embedded.postgres import EmbeddedPostgres
from tests.support.database import UNLIMITED, Database, fresh_database
from tests.support.servers import eventually, served
from tests.support.upstream import Upstream, running_upstream

ADMIN_KEY = "admin-key-for-tests"
SECRET = base64.urlsafe_b64encode(b"s" * 32).decode()
OPERATOR_KEY = "sk-or-v1-operator-secret"


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
        response = await self.http.request(
            method, path, headers={"authorization": f"Bearer {ADMIN_KEY}"}, **rest
        )
        assert response.is_success, response.text
        return response.json()


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
        response = await self.gateway.http.get("/user/balance", headers=self.headers)
        return dict(response.json())

    async def records(self) -> list[dict[str, Any]]:
        response = await self.gateway.http.get("/user/usage/records", headers=self.headers)
        return list(response.json()["records"])

    async def settled_record(self) -> dict[str, Any]:
        """The user's only record, once it is no longer pending."""
        records = await eventually(
            self.records, lambda value: len(value) == 1 and value[0]["status"] != "pending"
        )
        return dict(records[0])


def settings_for(database: Database, **changes: Any) -> Settings:
    """Settings of a gateway on this database, untouched by the environment."""
    defaults: dict[str, Any] = {
        "database_url": database.url,
        "admin_api_key": ADMIN_KEY,
        "key_hash_secrets": SECRET,
        "encryption_keys": SECRET,
        "gateway_mode": "sandbox",
        "log_level": "error",
        "log_format": "console",
    }
    return Settings(_env_file=None, **{**defaults, **changes})  # type: ignore[call-arg]  # pydantic-settings' own, without its plugin


def live(url: str) -> dict[str, Any]:
    """The settings of live mode with this upstream."""
    return {"gateway_mode": "live", "openrouter_api_key": OPERATOR_KEY, "openrouter_base_url": url}


@asynccontextmanager
async def running_gateway(database: Database, **settings: Any) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        app = application.create_app(Configuration(settings_for(database, **settings), ()))
        url = await stack.enter_async_context(served(app))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30))
        yield Gateway(url, app, database, http, stack)


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


@pytest.fixture
async def gateway(start_gateway: Callable[..., Awaitable[Gateway]]) -> Gateway:
    """A gateway in sandbox mode: answers come from its own simulator, credits are play money."""
    return await start_gateway()


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


@pytest.fixture
async def refusing() -> AsyncIterator[Callable[[int], Awaitable[dict[str, Any]]]]:
    """Settings of a live gateway whose OpenRouter answers GET /key with this status."""
    async with AsyncExitStack() as stack:

        async def start(status: int) -> dict[str, Any]:
            upstream = await stack.enter_async_context(running_upstream())

            async def front(scope: Any, receive: Any, send: Any) -> None:
                if scope["type"] != "http" or not scope["path"].endswith("/key"):
                    await upstream(scope, receive, send)
                    return
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": b'{"error": {"code": 1, "message": "no"}}'})

            return live(f"{await stack.enter_async_context(served(front))}/api/v1")

        yield start
