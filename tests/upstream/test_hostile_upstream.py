"""An upstream that misbehaves is asked once, one record has its true cost, and nothing stays held.

The upstreams are each scenario of the sandbox, and a server of our own that breaks HTTP itself. A client
learns nothing that is the operator's.
"""

from __future__ import annotations

import asyncio
import gzip
import resource
import socket
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio

from embedded.postgres import EmbeddedPostgres
from sandbox import SCENARIOS
from sandbox.failures import KEY_HASH, USER_ID
from sandbox.models.catalog import list_models
from sandbox.wire import dumps
from tests.support.database import fresh_database
from tests.support.gateway import OPERATOR_KEY, Gateway, User, live, running_gateway, staged_start
from tests.support.servers import eventually
from tests.support.upstream import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")
start_gateway = staged_start

SECRETS = (
    OPERATOR_KEY,
    "operator-secret",
    USER_ID,
    KEY_HASH,
    KEY_HASH[:16],
    "Traceback",
    "openrouter.ai",
    "elsewhere.invalid",
)


def assert_no_secrets(response: httpx.Response) -> None:
    seen = response.text + str(response.headers.multi_items())
    assert [secret for secret in SECRETS if secret in seen] == []


def assert_envelope(response: httpx.Response) -> None:
    """The one shape of every error answer."""
    body = response.json()
    assert set(body) == {"error", "gateway"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["code"]
    assert body["gateway"]["request_id"] == response.headers["x-request-id"]


async def only_record(user: User) -> dict[str, Any]:
    """The user's only record, settled; with nothing left held and the books in order."""
    record = await user.settled_record()
    balance = await user.balance()
    assert balance["held"] == 0
    await user.gateway.database.assert_books_balance()
    return record


# Every scenario of the sandbox.


@pytest.fixture
def hub(stage: tuple[Gateway, Upstream]) -> tuple[Gateway, Upstream]:
    stage[1].forget()
    return stage


# Those that would take a minute, or for ever, are cut short; their endings have tests of their own.
QUICK = {
    "slow-first-token": "slow-first-token;seconds=0.1",
    "slow": "slow;ms=1",
    "abort": "abort;ms=1",
    "oversized": "oversized;bytes=3000000",
}
ENDLESS = {"hang", "stall"}
LASTING = {"price-rise"}  # changes the catalog for whoever comes next
SERVED = sorted(set(SCENARIOS) - ENDLESS - LASTING)
# The status that a client sees, where it is not 200: (plain, streamed).
REFUSED = {
    "error-in-200": (429, 429),
    "cut": (502, 200),
    "redirect": (502, 502),
    "html-body": (502, 502),
    "invalid-json": (502, 502),
    "price-change": (503, 503),
    "max-price-refused": (503, 503),
    "error-400": (400, 400),
    "error-400-context": (400, 400),
    "error-401": (503, 503),
    "error-402": (503, 503),
    "error-402-max-tokens": (503, 503),
    "error-402-key-limit": (503, 503),
    "error-403": (403, 403),
    "error-403-moderation": (403, 403),
    "error-403-guardrail": (403, 403),
    "error-404": (404, 404),
    "error-404-availability": (404, 404),
    "error-408": (504, 504),
    "error-413": (413, 413),
    "error-422": (422, 422),
    "error-429": (429, 429),
    "error-429-upstream": (429, 429),
    "error-500": (502, 502),
    "error-502": (502, 502),
    "error-503": (503, 503),
    "error-503-availability": (503, 503),
    "error-504": (504, 504),
    "error-524": (504, 504),
    "error-529": (503, 503),
}


@dataclass
class Outcome:
    """One request under a scenario: what the client got, what the books say, what the upstream billed."""

    answer: httpx.Response
    record: dict[str, Any]
    billed: Decimal
    balance: Decimal

    @property
    def cost(self) -> Decimal:
        return Decimal(str(self.record["cost"]))


async def ask(hub: tuple[Gateway, Upstream], scenario: str, *, credits: str = "5", **body: Any) -> Outcome:
    gateway, upstream = hub
    user = await gateway.register(credits=credits)
    upstream.sandbox.state.reset()
    before = upstream.sandbox.state.billed
    upstream.scenario = scenario
    response = await user.chat(**{"max_tokens": 40, **body})
    upstream.scenario = ""
    record = await only_record(user)
    assert upstream.inferences == 1
    assert_no_secrets(response)
    assert response.headers["x-request-id"] == record["request_id"]
    balance = Decimal(str((await user.balance())["credits"]))
    assert balance == Decimal(credits) - Decimal(str(record["cost"]))
    return Outcome(response, record, upstream.sandbox.state.billed - before, balance)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("scenario", SERVED)
async def test_each_scenario_is_charged_what_the_upstream_bills_for_one_call(
    hub: tuple[Gateway, Upstream], scenario: str, streamed: bool
) -> None:
    response = await ask(hub, QUICK.get(scenario, scenario), stream=streamed)
    status = REFUSED.get(scenario, (200, 200))[streamed]
    assert response.answer.status_code == status, response.answer.text
    if scenario == "byok":
        assert response.billed == 0 and response.cost == Decimal(
            "0.00002055"
        )  # what the provider billed to the operator's own key
    else:
        assert response.cost == response.billed
    assert response.record["status"] == (
        "failed" if status != 200 or _fails(scenario, streamed) else "completed"
    )
    if status != 200:
        assert_envelope(response.answer)
    elif response.answer.headers["content-type"] == "text/event-stream":
        assert response.answer.text.endswith("data: [DONE]\n\n")
        assert response.answer.text.count("[DONE]") == 1
        (usage,) = [event["gateway_usage"] for event in events(response.answer) if "gateway_usage" in event]
        assert Decimal(str(usage["cost"])) == response.cost
        assert Decimal(str(usage["user_balance_after"])) == response.balance
    else:
        assert Decimal(response.answer.headers["x-gateway-cost"]) == response.cost
        assert Decimal(response.answer.headers["x-gateway-balance"]) == response.balance
        assert Decimal(str(response.answer.json()["gateway_usage"]["cost"])) == response.cost


def _fails(scenario: str, streamed: bool) -> bool:
    return scenario.startswith(("stream-error", "error-first", "provider-died", "error-in-200")) or (
        streamed and scenario == "cut"
    )


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream."""
    datas = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [orjson.loads(data) for data in datas]


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_a_bill_above_the_hold_takes_what_is_there_and_records_the_rest(
    hub: tuple[Gateway, Upstream], streamed: bool
) -> None:
    response = await ask(hub, "cost-above-hold;factor=10000", credits="0.001", stream=streamed)
    assert response.billed > Decimal("0.001")
    assert response.cost == Decimal("0.001") and response.balance == 0
    assert Decimal(str(response.record["overrun"])) == response.billed - response.cost
    assert Decimal(str(response.record["upstream_cost"])) == response.billed


async def test_an_overrun_never_takes_what_other_requests_hold(hub: tuple[Gateway, Upstream]) -> None:
    gateway, upstream = hub
    user = await gateway.register(credits="0.01")
    async with gateway.database.owner() as owner:
        await owner.execute("update public.users set held_nanos = 9900000 where id = $1", user.id)
        upstream.scenario = "cost-above-hold;factor=10000"
        response = await user.chat(max_tokens=40)
        upstream.scenario = ""
        assert response.status_code == 200
        record = await user.settled_record()
        assert Decimal(str(record["cost"])) == Decimal("0.0001")
        assert (await user.balance())["available"] == 0
        await owner.execute("update public.users set held_nanos = 0 where id = $1", user.id)
    await gateway.database.assert_books_balance()


@pytest.mark.parametrize("scenario", ["error-429", "error-429-upstream", "error-503"])
async def test_a_busy_upstream_says_when_to_try_again(hub: tuple[Gateway, Upstream], scenario: str) -> None:
    response = await ask(hub, scenario)
    assert 1 <= int(response.answer.headers["retry-after"]) <= 3600


async def test_every_answer_of_a_provider_that_failed_names_the_limits_and_the_charge(
    hub: tuple[Gateway, Upstream],
) -> None:
    response = await ask(hub, "error-502")
    assert response.answer.headers["x-gateway-cost"] == "0"


async def test_not_a_number_reaches_no_client(hub: tuple[Gateway, Upstream]) -> None:
    for streamed in (False, True):
        response = await ask(hub, "cost-nan", stream=streamed)
        assert "NaN" not in response.answer.text


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_a_cost_that_nobody_knows_yet_is_settled_later_and_exactly(
    hub: tuple[Gateway, Upstream], streamed: bool
) -> None:
    gateway, upstream = hub
    user = await gateway.register(credits=1)
    upstream.scenario = "usage-missing,generation-late;times=4"
    response = await user.chat(stream=streamed)
    assert response.status_code == 200
    if streamed:
        (usage,) = [event["gateway_usage"] for event in events(response) if "gateway_usage" in event]
        assert usage["settlement"] == "pending" and usage["cost"] is None
    else:
        assert response.headers["x-gateway-settlement"] == "pending"
    (record,) = await eventually(user.records, lambda value: value[0]["generation_id"] is not None)
    assert record["status"] == "pending" and record["held"] > 0  # any other instance could finish it now
    record = await only_record(user)
    assert record["settlement_source"] == "generation"
    assert Decimal(str(record["cost"])) == upstream.sandbox.state.billed > 0


async def test_a_running_count_of_a_broken_stream_is_not_taken_for_the_bill(
    hub: tuple[Gateway, Upstream],
) -> None:
    response = await ask(hub, "usage-every-event,cut;count=3", stream=True)
    assert response.record["settlement_source"] == "generation"
    assert response.cost == response.billed > 0


async def test_a_generation_that_only_the_body_names_is_found(hub: tuple[Gateway, Upstream]) -> None:
    for streamed in (False, True):
        response = await ask(hub, "usage-missing,no-generation-id,comment-as-data", stream=streamed)
        assert response.record["settlement_source"] == "generation"
        assert response.cost == response.billed > 0


# A server that breaks HTTP itself.

GENERATION = "gen-1790000000-known"
KNOWN_COST = "0.0000071"
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11, "cost": 0.0000123, "is_byok": False}
SAID = {"role": "assistant", "content": "Hello."}
ANSWER: dict[str, Any] = {
    "id": GENERATION,
    "object": "chat.completion",
    "created": 1790000000,
    "model": "openai/gpt-4o-mini",
    "provider": "OpenAI",
    "choices": [{"index": 0, "finish_reason": "stop", "message": SAID}],
    "usage": USAGE,
}
CHUNK: dict[str, Any] = {
    **ANSWER,
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "delta": SAID, "finish_reason": None}],
}
del CHUNK["usage"]
LAST = {**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": USAGE}

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Hostile:
    """A server whose completions are whatever `script` writes on the socket."""

    url: str = ""
    script: Script | None = None
    calls: int = 0
    seen: list[bytes] = field(default_factory=list)
    models: bytes = dumps({"data": list_models({}, Decimal(1))})

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.splitlines()
                        if line.lower().startswith(b"content-length")
                    ),
                    0,
                )
                await reader.readexactly(length)
                if head.startswith(b"POST"):
                    self.calls += 1
                    self.seen.append(head)
                    assert self.script is not None
                    await self.script(reader, writer)
                    return
                writer.write(self._look_up(head))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _look_up(self, head: bytes) -> bytes:
        path = head.split(b" ")[1]
        if path.startswith(b"/models"):
            return http(self.models)
        if path.endswith(GENERATION.encode()):
            facts = {
                "id": GENERATION,
                "total_cost": Decimal(KNOWN_COST),
                "native_tokens_prompt": 9,
                "native_tokens_completion": 1,
            }
            return http(dumps({"data": facts}))
        return http(b'{"error":{"code":404,"message":"Generation not found"}}', status="404 Not Found")


def http(
    body: bytes,
    *headers: str,
    status: str = "200 OK",
    kind: str = "application/json",
    length: int | None = None,
) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body


def named(body: bytes, *headers: str, **rest: Any) -> bytes:
    """An answer that names its generation."""
    return http(body, f"X-Generation-Id: {GENERATION}", *headers, **rest)


def plain(**changes: Any) -> bytes:
    return orjson.dumps({**ANSWER, **changes})


def sse(*payloads: bytes, end: bytes = b"\n") -> bytes:
    return b"".join(b"data: " + payload + end + end for payload in payloads)


def event_stream(body: bytes, *headers: str) -> bytes:
    return named(body, *headers, kind="text/event-stream")


CHUNKS = (orjson.dumps(CHUNK), orjson.dumps(LAST))


def writes(data: bytes) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), 1 << 20):
            writer.write(data[start : start + (1 << 20)])
            await writer.drain()

    return script


def resets_after(data: bytes) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return script


def drips(data: bytes, seconds: float) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for place in range(len(data)):
            writer.write(data[place : place + 1])
            await writer.drain()
            await asyncio.sleep(seconds)

    return script


def repeats(head: bytes, again: bytes) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while not writer.is_closing():
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(0.01)

    return script


def bomb(megabytes: int) -> bytes:
    """Gzip of that many megabytes of spaces, a kilobyte each."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * (megabytes - 1)


@asynccontextmanager
async def hostile_server() -> AsyncIterator[Hostile]:
    upstream = Hostile()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield upstream
    server.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def den(
    postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Gateway, Hostile]]:
    async with fresh_database(postgres) as database, hostile_server() as hostile:
        limits = {"upstream_timeout_seconds": 0.5, "request_deadline_seconds": 3}
        folder = tmp_path_factory.mktemp("den")
        async with running_gateway(
            database, gateway_data_dir=folder, log_level="error", **limits, **live(hostile.url)
        ) as gateway:
            yield gateway, hostile


ODD = (
    b'[{"id":"odd/\\ud800","name":"\\udfff: x","created":1e999,"pricing":{"prompt":"0"},'
    b'"big":1267650600228229401496703205376}]'
)


@pytest.mark.parametrize(
    "path", ["/models", "/models/providers", "/v1/models", "/v1/models?limit=1", "/api/v1/models", "/health"]
)
async def test_a_model_list_that_no_strict_encoder_takes_is_shown(
    path: str, start_gateway: Callable[..., Awaitable[Gateway]]
) -> None:
    async with hostile_server() as hostile:
        hostile.models = b'{"data":' + ODD + b"}"
        gateway = await start_gateway(**live(hostile.url))
        response = await gateway.http.get(path)
        assert response.status_code == 200 and response.json()


TRUE = "0.0000123"
FOUND = KNOWN_COST
OVER = 9 * 10**400
DEEP = b"[" * 100_000 + b"]" * 100_000


# name: what is written, streamed?, the status, the charge
def streams(*payloads: bytes) -> Script:
    return writes(event_stream(sse(*payloads)))


def chunk(**changes: Any) -> bytes:
    return orjson.dumps({**CHUNK, **changes})


ENDLESS_STREAM = event_stream(b"", "Connection: close").replace(b"Content-Length: 0\r\n", b"")
CASES: dict[str, tuple[Script, bool, int, str]] = {
    "no HTTP at all": (writes(b"\x00\xff\xfe garbage\r\n\r\n"), False, 502, "0"),
    "no answer": (writes(b""), False, 502, "0"),
    "no answer to a stream": (writes(b""), True, 502, "0"),
    "a reset before the answer": (resets_after(b""), False, 502, "0"),
    "a reset within the headers": (resets_after(b"HTTP/1.1 200 OK\r\nContent-Ty"), False, 502, "0"),
    "a reset within a body": (resets_after(named(plain()[:50], length=900)), False, 502, FOUND),
    "a reset within a stream": (resets_after(event_stream(sse(*CHUNKS))[:-150]), True, 200, FOUND),
    "a content-length beyond all bounds": (writes(named(plain(), length=10**30)), False, 502, "0"),
    "a content-length never reached": (writes(named(plain(), length=10**12)), False, 502, FOUND),
    "headers byte by byte": (
        drips(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", 0.3),
        False,
        504,
        "0",
    ),
    "silence after the headers": (drips(named(plain())[:1], 2), False, 504, "0"),
    "a stream without end": (repeats(ENDLESS_STREAM, sse(CHUNKS[0])), True, 200, FOUND),
    "comments without end": (repeats(ENDLESS_STREAM, b": x\n\n"), True, 200, FOUND),
    "a gzip bomb": (writes(named(bomb(10_000), "Content-Encoding: gzip")), False, 502, FOUND),
    "a gzip bomb as a stream": (
        writes(
            event_stream(b"", "Content-Encoding: gzip").replace(
                b"Content-Length: 0", b"Content-Length: 99999999"
            )
            + bomb(1000)
        ),
        True,
        200,
        FOUND,
    ),
    "a gzip bomb as an error": (
        writes(named(bomb(10_000), "Content-Encoding: gzip", status="500 Oh")),
        False,
        502,
        "0",
    ),
    "an error without end": (
        repeats(named(b"", status="500 Oh", length=10**12), b"x" * 65536),
        False,
        502,
        "0",
    ),
    "broken gzip": (writes(named(b"\x1f\x8b no gzip at all", "Content-Encoding: gzip")), False, 502, FOUND),
    "half of gzip": (writes(named(gzip.compress(plain())[:60], "Content-Encoding: gzip")), False, 502, FOUND),
    "gzip in gzip": (
        writes(named(gzip.compress(gzip.compress(plain())), "Content-Encoding: gzip, gzip")),
        False,
        200,
        TRUE,
    ),
    "an encoding that nobody knows": (writes(named(plain(), "Content-Encoding: rot13")), False, 200, TRUE),
    "nesting without end": (writes(named(b'{"a":' + DEEP + b"}")), False, 502, FOUND),
    "nesting without end in a stream": (streams(DEEP, *CHUNKS, b"[DONE]"), True, 200, TRUE),
    "the usage twice": (
        writes(named(plain().replace(b'"usage":', b'"usage":{"cost":5},"usage":'))),
        False,
        200,
        TRUE,
    ),
    "a cost beyond all bounds": (writes(named(plain(usage={**USAGE, "cost": "1e400"}))), False, 200, FOUND),
    "a cost below all bounds": (
        writes(named(plain(usage={**USAGE, "cost": "1e-999999999"}))),
        False,
        200,
        "0.000000001",
    ),
    "costs that overflow when added": (
        writes(
            named(
                plain(
                    usage={
                        "cost": "9e999999",
                        "is_byok": True,
                        "cost_details": {"upstream_inference_cost": "9e999999"},
                    }
                )
            )
        ),
        False,
        200,
        FOUND,
    ),
    "a cost of 400 digits": (
        writes(named(plain().replace(b"0.0000123", str(OVER).encode()))),
        False,
        200,
        FOUND,
    ),
    "a cost of 5000 digits": (writes(named(plain().replace(b"0.0000123", b"9" * 5000))), False, 200, FOUND),
    "tokens beyond all bounds": (
        writes(named(plain().replace(b'"prompt_tokens":9', b'"prompt_tokens":1e999999999'))),
        False,
        200,
        TRUE,
    ),
    "a negative number of tokens": (
        writes(named(plain(usage={**USAGE, "prompt_tokens": -5, "completion_tokens": "x"}))),
        False,
        200,
        TRUE,
    ),
    "a list as usage": (writes(named(plain(usage=[USAGE]))), False, 200, FOUND),
    "an object as cost": (writes(named(plain(usage={**USAGE, "cost": {"usd": 1}}))), False, 200, FOUND),
    "true as cost": (writes(named(plain(usage={**USAGE, "cost": True}))), False, 200, FOUND),
    "a text as details": (
        writes(named(plain(usage={**USAGE, "cost_details": "none", "prompt_tokens_details": 5}))),
        False,
        200,
        TRUE,
    ),
    "control characters in names": (
        writes(
            named(
                plain(
                    model="a\x00b", provider="\x00", choices=[{"finish_reason": "st\x00op", "message": SAID}]
                )
            )
        ),
        False,
        200,
        TRUE,
    ),
    "half a surrogate in names": (
        writes(named(plain().replace(b'"OpenAI"', b'"\\ud800"'))),
        False,
        200,
        TRUE,
    ),
    "half a surrogate in a stream": (
        streams(CHUNKS[0].replace(b'"OpenAI"', b'"\\ud800\\u0000"'), CHUNKS[1], b"[DONE]"),
        True,
        200,
        TRUE,
    ),
    "a number as choices beside an error": (
        writes(named(plain(choices=5, error={"code": 500, "message": USER_ID}))),
        False,
        200,
        TRUE,
    ),
    "an error code of 5000 digits": (
        streams(CHUNKS[0], b'{"error":{"code":' + b"9" * 5000 + b'},"choices":[]}'),
        True,
        200,
        FOUND,
    ),
    "an error code of a megabyte": (
        streams(CHUNKS[0], orjson.dumps({"error": {"code": "x" * 1_000_000}})),
        True,
        200,
        FOUND,
    ),
    "a secret as the error code": (
        streams(CHUNKS[0], orjson.dumps({"error": {"code": OPERATOR_KEY, "message": OPERATOR_KEY}})),
        True,
        200,
        FOUND,
    ),
    "a text as the error of a chunk": (
        streams(CHUNKS[0], chunk(error=f"of {USER_ID} {OPERATOR_KEY}")),
        True,
        200,
        FOUND,
    ),
    "an error within a choice": (
        streams(
            CHUNKS[0], chunk(choices=[{"error": {"message": OPERATOR_KEY, "metadata": {"raw": USER_ID}}}])
        ),
        True,
        200,
        FOUND,
    ),
    "the operator beside the answer": (
        writes(named(plain(user_id=USER_ID, openrouter_metadata={"account": KEY_HASH}))),
        False,
        200,
        TRUE,
    ),
    "the operator within a stream": (
        streams(CHUNKS[0], chunk(user_id=USER_ID), CHUNKS[1], b"[DONE]"),
        True,
        200,
        TRUE,
    ),
    "NaN in an error": (
        streams(CHUNKS[0], b'{"error":{"code":NaN,"message":"x"},"choices":[]}'),
        True,
        200,
        FOUND,
    ),
    "headers of their own": (
        writes(
            named(
                plain(),
                "Set-Cookie: a=b",
                "X-Evil: 1",
                "Server: operator-secret",
                "Access-Control-Allow-Origin: evil",
            )
        ),
        False,
        200,
        TRUE,
    ),
    "a fold in a header": (writes(named(plain(), "X-Evil: a", " b: c")), False, 200, TRUE),
    "early hints before the answer": (
        writes(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + named(plain())),
        False,
        200,
        TRUE,
    ),
    "no content": (
        writes(f"HTTP/1.1 204 No\r\nX-Generation-Id: {GENERATION}\r\n\r\n".encode()),
        False,
        502,
        FOUND,
    ),
    "another success": (writes(named(plain(), status="206 Partial")), False, 502, FOUND),
    "an empty answer": (writes(named(b"")), False, 502, FOUND),
    "an empty stream": (writes(event_stream(b"")), True, 200, FOUND),
    "garbage after the end": (
        writes(event_stream(sse(*CHUNKS, b"[DONE]") + b"\xff\x00 garbage" + sse(b'{"usage":{"cost":9}}'))),
        True,
        200,
        TRUE,
    ),
    "lines that end with CR": (writes(event_stream(sse(*CHUNKS, b"[DONE]", end=b"\r"))), True, 200, TRUE),
    "a byte order mark before a stream": (
        writes(event_stream(b"\xef\xbb\xbf" + sse(*CHUNKS, b"[DONE]"))),
        True,
        200,
        TRUE,
    ),
    "a byte order mark before a body": (writes(named(b"\xef\xbb\xbf" + plain())), False, 200, TRUE),
    "another encoding of the text": (writes(named(plain().decode().encode("utf-16"))), False, 502, FOUND),
    "broken UTF-8": (writes(named(plain().replace(b"Hello", b"\xff\xfe"))), False, 502, FOUND),
    "an event of 40 MB": (streams(chunk(x="y" * 40_000_000)), True, 200, FOUND),
    "a stream where a body was asked for": (writes(event_stream(sse(*CHUNKS, b"[DONE]"))), False, 200, TRUE),
    "a body that says it is a stream": (writes(event_stream(plain())), True, 200, FOUND),
    "a stream that says it is a body": (writes(named(sse(*CHUNKS, b"[DONE]"))), True, 502, FOUND),
    "two bodies": (writes(named(plain() + plain())), False, 502, FOUND),
    "a list": (writes(named(b"[]")), False, 502, FOUND),
    "null": (writes(named(b"null")), False, 502, FOUND),
    "usage over several lines": (
        writes(event_stream(sse(CHUNKS[0]) + b"data: " + CHUNKS[1][:-1] + b"\ndata: }\n\ndata: [DONE]\n\n")),
        True,
        200,
        TRUE,
    ),
    "JSON with spaces, and no [DONE]": (
        writes(
            event_stream(
                sse(
                    CHUNKS[0],
                    b'{"id": "x", "choices": [{"delta": {}, "finish_reason": "stop"}]}',
                    b'{"choices": [], "usage": {"cost": 0.0000123}}',
                )
            )
        ),
        True,
        200,
        TRUE,
    ),
    "a redirect to itself": (
        writes(named(b"", "Location: /chat/completions", status="307 Again")),
        False,
        502,
        FOUND,
    ),
    "a status that does not exist": (writes(named(plain(), status="999 What")), False, 502, FOUND),
    "an error that is no JSON": (
        writes(named(b"<html>" + OPERATOR_KEY.encode(), status="503 No")),
        False,
        503,
        "0",
    ),
    "a list of exclusions that is none": (
        writes(
            named(orjson.dumps({"error": {"availability": {"excluded_by": 5}, "code": 404}}), status="404 No")
        ),
        False,
        404,
        "0",
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_hostile_upstream_is_survived_and_settled(den: tuple[Gateway, Hostile], case: str) -> None:
    gateway, hostile = den
    hostile.script, streamed, status, cost = CASES[case]
    user = await gateway.register(credits=1)
    hostile.calls = 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    response = await user.chat(stream=streamed)
    assert time.monotonic() - started < 8
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400_000
    )  # kilobytes; a bomb holds ten gigabytes
    assert response.status_code == status, response.text[:500]
    assert hostile.calls == 1
    record = await only_record(user)
    assert Decimal(str(record["cost"])) == Decimal(cost)
    assert record["request_id"] == response.headers["x-request-id"]
    assert_no_secrets(response)
    assert not {"set-cookie", "x-evil", "server-timing"} & set(response.headers)
    if status != 200:
        assert_envelope(response)
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert response.text.count(',"gateway_usage":{"request_id":"') == 1
    else:
        assert response.text.count(',"gateway_usage":{"request_id":"') == 1 and response.text.endswith("}}")


async def test_what_neither_usage_nor_a_generation_tells_is_charged_nothing_and_listed(
    den: tuple[Gateway, Hostile],
) -> None:
    gateway, hostile = den
    hostile.script = writes(http(orjson.dumps({"choices": ANSWER["choices"]})))
    user = await gateway.register(credits=1)
    assert (await user.chat()).status_code == 200
    record = await only_record(user)
    assert (record["cost"], record["settlement_source"]) == (0, "none")


async def test_a_model_list_without_end_takes_no_memory(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    async with fresh_database(postgres) as database, hostile_server() as hostile:
        hostile.models = b" " * (80 << 20)
        async with running_gateway(
            database, gateway_data_dir=tmp_path, log_level="error", **live(hostile.url)
        ) as gateway:
            user = await gateway.register(credits=1)
            response = await user.chat()
            assert response.status_code == 503
            assert_envelope(response)
            assert hostile.calls == 0 and await user.records() == []
