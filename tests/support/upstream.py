"""Two upstreams on sockets: the sandbox, and one that answers what a test tells it to, byte for byte and
piece by piece. Both keep what they were sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import orjson
import pytest

from sandbox import Sandbox
from sandbox import create_app as create_sandbox
from sandbox.wire import dumps
from tests.support.servers import served


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
    running = Upstream("", create_sandbox())
    async with served(running) as url:
        running.url = f"{url}/api/v1"
        yield running


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with running_upstream() as running:
        yield running


GENERATION = "gen-1790000000-known"


def model(model_id: str, inputs: str, outputs: str, **prices: str) -> dict[str, Any]:
    return {
        "id": model_id,
        "canonical_slug": model_id,
        "name": model_id,
        "created": 1_700_000_000,
        "context_length": 32_768,
        "architecture": {"input_modalities": inputs.split(), "output_modalities": outputs.split()},
        "pricing": {"prompt": "0.000001", "completion": "0.000002", **prices},
        "top_provider": {"context_length": 32_768, "max_completion_tokens": 4_096, "is_moderated": False},
        "supported_parameters": ["max_tokens", "temperature"],
    }


TEXT, EMBEDDER, RANKER, PAINTER, SPEAKER, WRITER = (
    "a/text",
    "a/embedder",
    "a/ranker",
    "a/painter",
    "a/speaker",
    "a/writer",
)

MODELS = (
    model(TEXT, "text", "text"),
    model(EMBEDDER, "text", "embeddings", completion="0"),
    model(RANKER, "text", "rerank", prompt="0", completion="0", request="0.002"),
    model(PAINTER, "text image", "image text", image="0.001", image_output="0.00003"),
    model(SPEAKER, "text", "speech", audio_output="0.00001"),
    model(WRITER, "audio", "transcription", prompt="0", completion="0", audio="0.000001"),
)


@dataclass
class Reply:
    """One answer. An event among its pieces is waited for."""

    pieces: list[bytes | asyncio.Event]
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=lambda: {"x-generation-id": GENERATION})


@dataclass
class Sent:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        return dict(orjson.loads(self.body))


@dataclass
class Scripted:
    """The upstream. `replies` are given in turn, the last one for ever; `known_cost` is what GET /generation
    says.
    """

    url: str = ""
    replies: list[Reply] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    known_cost: str | None = None
    factor: Decimal = Decimal(1)
    lists: int = 0

    def say(self, *replies: Reply) -> None:
        """Sets the answers, and forgets what was sent before."""
        self.replies, self.sent, self.known_cost, self.lists = list(replies), [], None, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        reply = self._reply(scope, body)
        headers = {**reply.headers, "content-type": reply.content_type}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": encoded})
        for piece in reply.pieces:
            if isinstance(piece, asyncio.Event):
                await piece.wait()
            else:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _reply(self, scope: Any, body: bytes) -> Reply:
        if scope["method"] == "POST":
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            self.sent.append(Sent(scope["path"], headers, body))
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if scope["path"] == "/models":
            self.lists += 1
            return Reply([dumps({"data": [self._priced(each) for each in MODELS]})])
        if (
            scope["path"] == "/generation"
            and self.known_cost is not None
            and GENERATION.encode() in scope["query_string"]
        ):
            generation = {
                "id": GENERATION,
                "total_cost": Decimal(self.known_cost),
                "native_tokens_prompt": 9,
                "native_tokens_completion": 4,
            }
            return Reply([dumps({"data": generation})])
        return Reply([b'{"error":{"code":404,"message":"not found"}}'], status=404)

    def _priced(self, entry: dict[str, Any]) -> dict[str, Any]:
        pricing = {
            name: format(Decimal(price) * self.factor, "f") for name, price in entry["pricing"].items()
        }
        return {**entry, "pricing": pricing}


@asynccontextmanager
async def running_script() -> AsyncIterator[Scripted]:
    scripted = Scripted()
    async with served(scripted) as scripted.url:
        yield scripted
