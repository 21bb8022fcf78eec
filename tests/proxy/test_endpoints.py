"""Every billable endpoint goes through the same steps: key, scope, hold, upstream, answer, charge. Its errors
have the form of its own API.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx
import openai
import orjson
import pytest
import pytest_asyncio

from embedded.postgres import EmbeddedPostgres
from gateway.proxy.endpoints import ENDPOINTS
from tests.support.database import fresh_database
from tests.support.gateway import Gateway, User, live, running_gateway
from tests.support.servers import eventually
from tests.support.upstream import (
    EMBEDDER,
    GENERATION,
    MODELS,
    PAINTER,
    RANKER,
    SPEAKER,
    TEXT,
    WRITER,
    Reply,
    Scripted,
    running_script,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

Stage = tuple[Gateway, Scripted]
COST = "0.0000123"
HELLO = [{"role": "user", "content": "Say hello."}]
AUDIO = b"RIFF\x00\r\n\xff--"
# name: a request, and an answer that costs COST
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chat/completions": (
        {"model": TEXT, "messages": HELLO, "max_tokens": 50},
        {
            "id": GENERATION,
            "model": TEXT,
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}}
            ],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "cost": float(COST)},
        },
    ),
    "completions": (
        {"model": TEXT, "prompt": "Once", "max_tokens": 50},
        {
            "id": GENERATION,
            "model": TEXT,
            "choices": [{"index": 0, "finish_reason": "stop", "text": " upon"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "cost": float(COST)},
        },
    ),
    "embeddings": (
        {"model": EMBEDDER, "input": "Hello."},
        {
            "object": "list",
            "model": EMBEDDER,
            "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
            "usage": {"prompt_tokens": 13, "total_tokens": 13, "cost": float(COST)},
        },
    ),
    "responses": (
        {"model": TEXT, "input": "Say hello.", "max_output_tokens": 50},
        {
            "id": GENERATION,
            "object": "response",
            "status": "completed",
            "error": None,
            "model": TEXT,
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "Hello."}]}],
            "usage": {
                "input_tokens": 9,
                "output_tokens": 4,
                "total_tokens": 13,
                "cost": float(COST),
                "is_byok": False,
            },
        },
    ),
    "messages": (
        {"model": TEXT, "messages": HELLO, "max_tokens": 50},
        {
            "id": GENERATION,
            "type": "message",
            "role": "assistant",
            "model": TEXT,
            "content": [{"type": "text", "text": "Hello."}],
            "stop_reason": "end_turn",
            "usage": {
                "input_tokens": 4,
                "cache_read_input_tokens": 5,
                "output_tokens": 4,
                "cost": float(COST),
            },
        },
    ),
    "rerank": (
        {"model": RANKER, "query": "hello", "documents": ["a", "b"]},
        {
            "id": GENERATION,
            "model": RANKER,
            "results": [{"index": 1, "relevance_score": 0.9}],
            "usage": {
                "search_units": 1,
                "prompt_tokens": 9,
                "completion_tokens": 4,
                "total_tokens": 13,
                "cost": float(COST),
            },
        },
    ),
    "images": (
        {"model": PAINTER, "prompt": "A lighthouse"},
        {
            "created": 1,
            "data": [{"b64_json": "eA=="}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "cost": float(COST)},
        },
    ),
    "audio/transcriptions": (
        {"model": WRITER, "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {
            "text": "Hello.",
            "usage": {
                "seconds": 2,
                "input_tokens": 9,
                "output_tokens": 4,
                "total_tokens": 13,
                "cost": float(COST),
            },
        },
    ),
}
LONG = bytes(range(256)) * 1_000  # more than arrives in one piece
SPEECH = {"model": SPEAKER, "input": "Hello.", "voice": "alloy"}
REQUESTS: dict[str, dict[str, Any]] = {
    **{name: request for name, (request, _) in CASES.items()},
    "audio/speech": SPEECH,
}
RESOURCES = {endpoint.name: endpoint.resource for endpoint in ENDPOINTS}
ERROR_BODY = {
    "error": {
        "code": 429,
        "message": "Slow down, user_abcdefgh",
        "metadata": {"error_type": "rate_limit_exceeded"},
    }
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with fresh_database(postgres) as database, running_script() as upstream:
        folder = tmp_path_factory.mktemp("scene")
        limits = {"max_body_bytes": 2_000_000, "request_deadline_seconds": 20}
        async with running_gateway(
            database, gateway_data_dir=folder, **limits, **live(upstream.url)
        ) as gateway:
            yield gateway, upstream


def plain(answer: dict[str, Any], **rest: Any) -> Reply:
    return Reply([orjson.dumps(answer)], **rest)


async def post(
    user: User, name: str, body: Any = None, *, prefix: str = "/v1", **rest: Any
) -> httpx.Response:
    if not {"content", "files"} & rest.keys():
        rest["json"] = REQUESTS[name] if body is None else body
    headers = {**user.headers, **rest.pop("headers", {})}
    return await user.gateway.http.post(f"{prefix}/{name}", headers=headers, **rest)


async def settled(user: User, cost: str = COST) -> dict[str, Any]:
    record = await user.settled_record()
    assert Decimal(str(record["cost"])) == Decimal(cost)
    assert (await user.balance())["held"] == 0
    await user.gateway.database.assert_books_balance()
    return record


def assert_error(name: str, response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, in the form of this endpoint."""
    assert response.status_code == status, response.text
    body = response.json()
    if name.startswith("messages"):
        assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
        assert body["request_id"] == response.headers["x-request-id"]
        assert {"type", "message", "param", "code"} <= set(body["error"])
    else:
        openrouter = {"metadata"} if response.request.url.path.startswith("/api/v1/") else set()
        assert (
            set(body) == {"error", "gateway"}
            and set(body["error"]) == {"type", "message", "param", "code"} | openrouter
        )
        assert body["gateway"]["request_id"] == response.headers["x-request-id"]
        assert not openrouter or body["error"]["code"] == status
    return dict(body["error"])


# Each endpoint.


@pytest.mark.parametrize("name", CASES)
async def test_an_answer_passes_and_is_charged(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    request, answer_body = CASES[name]
    upstream.say(plain(answer_body))
    response = await post(user, name, prefix="/api/v1")
    assert response.status_code == 200, response.text
    charge = response.json().pop("gateway_usage")
    assert {key: value for key, value in response.json().items() if key != "gateway_usage"} == answer_body
    assert (charge["tokens_charged"], Decimal(str(charge["cost"]))) == (13, Decimal(COST))
    assert (
        Decimal(response.headers["x-gateway-cost"]) == Decimal(COST)
        and response.headers["x-generation-id"] == GENERATION
    )
    record = await settled(user)
    assert (record["endpoint"], record["status"], record["streamed"]) == (name, "completed", False)
    assert record["prompt_tokens"] + (record["completion_tokens"] or 0) == 13
    (sent,) = upstream.sent
    assert sent.path == f"/{name}" and sent.fields["model"] == request["model"]


async def test_images_have_openai_s_path_too(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(plain(CASES["images"][1]))
    assert (await post(user, "images/generations", REQUESTS["images"])).status_code == 200
    assert (await settled(user))["endpoint"] == "images" and upstream.sent[0].path == "/images"


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_refusal_of_the_upstream_costs_nothing_and_names_no_operator(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(plain(ERROR_BODY, status=429))
    response = await post(user, name)
    error = assert_error(name, response, 429)
    assert (error["type"], error["code"], error["message"]) == (
        "rate_limit_error",
        "rate_limit_exceeded",
        "Slow down, ***",
    )
    assert response.headers["retry-after"] and response.headers["x-gateway-cost"] == "0"
    assert (await settled(user, "0"))["status"] == "failed" and len(upstream.sent) == 1


@pytest.mark.parametrize("name", REQUESTS)
async def test_an_answer_that_is_no_json_is_settled_by_its_generation(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(Reply([b"<html>"], content_type="text/html"))
    upstream.known_cost = COST
    assert_error(name, await post(user, name), 502)
    record = await settled(user)
    assert (record["status"], record["settlement_source"]) == ("failed", "generation")


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_bad_body_is_refused_before_anything_is_sent(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(Reply([]))
    for content in (b"{", b"[]", b'"x"', b""):
        assert assert_error(name, await post(user, name, content=content), 400)["code"] == "invalid_json"
    for model, status in ((None, 400), (5, 400), ("no/such", 404)):
        error = assert_error(name, await post(user, name, {**REQUESTS[name], "model": model}), status)
        assert error["param"] == "model"
    assert upstream.sent == [] and await user.records() == []


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_key_needs_the_scope_of_the_endpoint(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    resource = RESOURCES[name]
    upstream.say(plain(ERROR_BODY, status=429))
    others = sorted({*RESOURCES.values()} - {resource})
    for scopes, status in (({"write": others}, 403), ({"read": ["*"]}, 403), ({"write": [resource]}, 429)):
        made = await gateway.http.post(
            "/user/api-keys",
            headers=user.headers,
            json={"key_name": f"k{status}{len(scopes)}{'read' in scopes}", "scope_permissions": scopes},
        )
        assert made.is_success, made.text
        error = assert_error(name, await post(User(gateway, user.id, made.json()["api_key"]), name), status)
        assert status != 403 or (error["code"] == "missing_scope" and f"`{resource}`" in error["message"])
    assert len(upstream.sent) == 1


@pytest.mark.parametrize("name", REQUESTS)
async def test_without_a_key_nothing_is_read(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    upstream.say(Reply([]))
    response = await gateway.http.post(f"/v1/{name}", content=b"{")
    assert_error(name, response, 401)
    assert response.headers["www-authenticate"] == "Bearer" and upstream.sent == []


@pytest.mark.parametrize("name", REQUESTS)
async def test_an_account_without_credits_sends_nothing(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register()
    upstream.say(Reply([]))
    error = assert_error(name, await post(user, name), 402)
    assert (
        error["type"] == ("billing_error" if name == "messages" else "insufficient_quota")
        and upstream.sent == []
    )


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_body_too_large_is_refused_by_its_length_and_while_it_arrives(
    scene: Stage, name: str
) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(Reply([]))

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 100_000

    for content in (b" " * 2_000_001, endless()):
        assert_error(name, await post(user, name, content=content), 413)


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_method_that_it_does_not_take_is_a_405(scene: Stage, name: str) -> None:
    response = await scene[0].http.get(f"/v1/{name}")
    assert_error(name, response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_browser_is_served_too(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    reply = Reply([b"all"], content_type="audio/mpeg") if name == "audio/speech" else plain(CASES[name][1])
    upstream.say(reply)
    upstream.known_cost = COST
    response = await post(user, name, headers={"origin": "https://app.example"})
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "*"
    assert "x-gateway-cost" in response.headers["access-control-expose-headers"]
    await settled(user)


# Streams.


def sse(*events: tuple[str, dict[str, Any]], named: bool = True) -> bytes:
    lines = [
        (f"event: {kind}\n" if named else "").encode() + b"data: " + orjson.dumps(data) + b"\n\n"
        for kind, data in events
    ]
    return b"".join(lines)


def responses_stream() -> bytes:
    whole = CASES["responses"][1]
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    return sse(
        ("response.created", {"type": "response.created", "sequence_number": 0, "response": begun}),
        (
            "response.output_text.delta",
            {"type": "response.output_text.delta", "sequence_number": 1, "delta": "Hello."},
        ),
        ("response.completed", {"type": "response.completed", "sequence_number": 2, "response": whole}),
    )


def messages_stream(**usage: Any) -> bytes:
    whole = CASES["messages"][1]
    begun = {
        **whole,
        "content": [],
        "stop_reason": None,
        "usage": {"input_tokens": 4, "cache_read_input_tokens": 5, "output_tokens": 1},
    }
    return sse(
        ("message_start", {"type": "message_start", "message": begun}),
        (
            "content_block_delta",
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello."}},
        ),
        (
            "message_delta",
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn"},
                "usage": {"output_tokens": 4, **usage},
            },
        ),
        ("message_stop", {"type": "message_stop"}),
    )


def completions_stream() -> bytes:
    whole = CASES["completions"][1]
    begun = {
        "id": GENERATION,
        "model": TEXT,
        "choices": [{"index": 0, "text": " upon", "finish_reason": None}],
    }
    return sse(("", begun), ("", whole), named=False) + b"data: [DONE]\n\n"


STREAMS = {
    "completions": completions_stream(),
    "responses": responses_stream(),
    "messages": messages_stream(cost=float(COST)),
}
LAST = {"completions": "[DONE]", "responses": "response.completed", "messages": "message_stop"}


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [orjson.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_passes_and_its_last_event_tells_the_charge(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    raw = STREAMS[name]
    upstream.say(Reply([raw[:70], raw[70:201], raw[201:]], content_type="text/event-stream"))
    response = await post(user, name, {**REQUESTS[name], "stream": True})
    assert response.status_code == 200 and response.headers["content-type"] == "text/event-stream"
    (charged,) = [event for event in events_of(response) if "gateway_usage" in event]
    assert (
        Decimal(str(charged["gateway_usage"]["cost"])) == Decimal(COST)
        and charged["gateway_usage"]["tokens_charged"] == 13
    )
    assert [{**event, "gateway_usage": 0} for event in events_of(response)] == [
        {**orjson.loads(line[6:]), "gateway_usage": 0}
        for line in raw.decode().splitlines()
        if line.startswith("data: {")
    ]
    assert LAST[name] in response.text.strip().splitlines()[-1]
    assert response.text.count("event: ") == raw.count(b"event: ")
    record = await settled(user)
    assert (record["endpoint"], record["status"], record["streamed"], record["settlement_source"]) == (
        name,
        "completed",
        True,
        "usage",
    )


async def test_a_message_without_a_cost_is_charged_by_its_generation(scene: Stage) -> None:
    gateway, upstream = scene
    for body, reply in (
        ({"stream": True}, Reply([messages_stream()], content_type="text/event-stream")),
        ({}, plain({**CASES["messages"][1], "usage": {"input_tokens": 4, "output_tokens": 4}})),
    ):
        user = await gateway.register(credits=1)
        upstream.say(reply)
        upstream.known_cost = COST
        response = await post(user, "messages", {**REQUESTS["messages"], **body})
        assert response.status_code == 200 and f'"cost":{COST}' in response.text
        assert (await settled(user))["settlement_source"] == "generation"


@pytest.mark.parametrize("name", STREAMS)
async def test_a_json_answer_to_a_streamed_request_passes_as_json(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(plain(CASES[name][1]))
    response = await post(user, name, {**REQUESTS[name], "stream": True})
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert Decimal(str(response.json()["gateway_usage"]["cost"])) == Decimal(COST)
    assert (await settled(user))["streamed"] is True


@pytest.mark.parametrize("name", ["chat/completions", "completions", "responses", "messages"])
async def test_a_stream_of_openrouter_s_clients_ends_with_an_error_of_theirs(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    raw = STREAMS.get(name, STREAMS["completions"])
    upstream.say(Reply([raw[: raw.index(b"\n\n") + 2]], content_type="text/event-stream"))
    upstream.known_cost = COST
    response = await post(user, name, {**REQUESTS[name], "stream": True}, prefix="/api/v1")
    (failed,) = [event for event in events_of(response) if event.get("error")]
    if name == "messages":
        assert failed["error"]["code"] == "upstream_error"
    else:
        assert (failed["error"]["code"], failed["error"]["metadata"]["error_type"]) == (502, "upstream_error")
    assert (await settled(user))["error_code"] == "upstream_error"


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_that_breaks_off_ends_with_an_error_of_its_api(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    raw = STREAMS[name]
    upstream.say(Reply([raw[: raw.index(b"\n\n") + 2]], content_type="text/event-stream"))
    upstream.known_cost = COST
    response = await post(user, name, {**REQUESTS[name], "stream": True})
    events = events_of(response)
    (failed,) = [event for event in events if event.get("error")]
    (charged,) = [event for event in events if "gateway_usage" in event]
    assert Decimal(str(charged["gateway_usage"]["cost"])) == Decimal(COST)
    assert failed["error"]["code"] == "upstream_error"
    if name != "completions":
        assert failed["type"] == "error" and "event: error\n" in response.text and charged == failed
    if name == "responses":
        assert [event["sequence_number"] for event in events] == [0, 1]
    assert (await settled(user))["status"] == "failed"


@pytest.mark.parametrize(("status", "outcome"), [("failed", "failed"), ("incomplete", "completed")])
async def test_a_response_is_recorded_by_its_status(scene: Stage, status: str, outcome: str) -> None:
    gateway, upstream = scene
    error = {"code": "server_error", "message": "x"} if status == "failed" else None
    whole = {**CASES["responses"][1], "status": status, "error": error}
    event = sse((f"response.{status}", {"type": f"response.{status}", "response": whole}))
    for reply in (plain(whole), Reply([event], content_type="text/event-stream")):
        user = await gateway.register(credits=1)
        upstream.say(reply)
        assert (
            await post(
                user,
                "responses",
                {**REQUESTS["responses"], "stream": reply.content_type != "application/json"},
            )
        ).status_code == 200
        record = await settled(user)
        assert (record["status"], record["finish_reason"]) == (outcome, status)


# Anthropic's clients.


async def test_anthropic_s_headers_are_taken_and_not_needed(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(plain(CASES["messages"][1]))
    headers = {
        "x-api-key": user.key,
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "context-1m-2025-08-07",
    }
    response = await gateway.http.post("/v1/messages", headers=headers, json=REQUESTS["messages"])
    assert response.status_code == 200
    (sent,) = upstream.sent
    assert "x-api-key" not in sent.headers and "anthropic-beta" not in sent.headers
    assert len(sent.fields["metadata"]["user_id"]) == 32 and "user" not in sent.fields


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (400, "invalid_request_error", 400),
        (401, "overloaded_error", 503),
        (402, "overloaded_error", 503),
        (403, "permission_error", 403),
        (404, "not_found_error", 404),
        (408, "timeout_error", 504),
        (413, "request_too_large", 413),
        (422, "invalid_request_error", 422),
        (429, "rate_limit_error", 429),
        (500, "api_error", 502),
        (502, "api_error", 502),
        (503, "overloaded_error", 503),
        (504, "timeout_error", 504),
        (524, "timeout_error", 504),
        (529, "overloaded_error", 503),
    ],
)
async def test_what_the_upstream_refuses_has_anthropic_s_name(
    scene: Stage, status: int, kind: str, told: int
) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    error = {
        "type": "error",
        "error": {"type": "x", "message": "Said by user_abcdefgh", "error_type": "some_reason"},
        "request_id": None,
    }
    upstream.say(plain(error, status=status, headers={}))
    found = assert_error("messages", await post(user, "messages"), told)
    assert found["type"] == kind and "user_abcdefgh" not in found["message"]
    await settled(user, "0")


async def test_below_messages_everything_speaks_as_anthropic(scene: Stage) -> None:
    error = assert_error("messages", await scene[0].http.post("/v1/messages/count_tokens", json={}), 404)
    assert (
        error["type"] == "not_found_error"
        and error["code"] == "not_offered"
        and "`messages`" in error["message"]
    )


# Speech.


async def test_speech_passes_in_pieces_and_its_last_piece_waits_for_the_charge(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    rest = asyncio.Event()
    upstream.say(Reply([LONG, rest, b"\x00\xff", b"last"], content_type="audio/mpeg"))
    upstream.known_cost = COST
    async with gateway.http.stream("POST", "/v1/audio/speech", headers=user.headers, json=SPEECH) as response:
        assert response.status_code == 200 and response.headers["content-type"] == "audio/mpeg"
        assert response.headers["x-generation-id"] == GENERATION and "x-gateway-cost" not in response.headers
        pieces = response.aiter_raw()
        first = await anext(pieces)
        assert LONG.startswith(first) and (await user.records())[0]["status"] == "pending"
        rest.set()
        assert first + b"".join([piece async for piece in pieces]) == LONG + b"\x00\xfflast"
        assert (await user.records())[0]["status"] == "completed"
    record = await settled(user)
    assert (record["endpoint"], record["settlement_source"]) == ("audio/speech", "generation")


async def test_speech_in_one_piece_tells_its_charge_in_the_headers(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(Reply([b"all"], content_type="audio/pcm;rate=24000"))
    upstream.known_cost = COST
    response = await post(user, "audio/speech")
    assert response.content == b"all" and response.headers["content-type"] == "audio/pcm;rate=24000"
    assert Decimal(response.headers["x-gateway-cost"]) == Decimal(COST)
    await settled(user)


async def test_speech_that_breaks_off_breaks_off_for_the_client_too(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(
        Reply(
            [LONG],
            content_type="audio/mpeg",
            headers={"x-generation-id": GENERATION, "content-length": "999999"},
        )
    )
    upstream.known_cost = COST
    with pytest.raises(httpx.RemoteProtocolError):
        await post(user, "audio/speech")
    record = await settled(user)
    assert (record["status"], record["error_code"]) == ("failed", "upstream_error")


async def test_no_speech_at_all_is_an_error(scene: Stage) -> None:
    gateway, upstream = scene
    for reply in (Reply([], content_type="audio/mpeg"), plain({"error": {"code": 500, "message": "x"}})):
        user = await gateway.register(credits=1)
        upstream.say(reply)
        upstream.known_cost = COST
        assert_error("audio/speech", await post(user, "audio/speech"), 502)
        await settled(user)


async def test_a_listener_who_leaves_is_charged_for_what_was_made(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    rest = asyncio.Event()
    upstream.say(Reply([LONG, rest, b"last"], content_type="audio/mpeg"))
    upstream.known_cost = COST
    async with gateway.http.stream("POST", "/v1/audio/speech", headers=user.headers, json=SPEECH) as response:
        assert LONG.startswith(await anext(response.aiter_raw()))
    await eventually(user.records, lambda value: value[0]["status"] == "pending")
    rest.set()
    assert (await settled(user))["status"] == "cancelled"


# Forms.


async def test_a_file_goes_out_as_it_came_in_and_its_transcript_is_charged(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(plain(CASES["audio/transcriptions"][1]))
    made = await user.sdk().audio.transcriptions.create(
        model=WRITER,
        file=("a.wav", AUDIO, "audio/wav"),
        timestamp_granularities=["word"],
        response_format="verbose_json",
    )
    assert made.text == "Hello."
    (sent,) = upstream.sent
    assert sent.headers["content-type"].startswith("multipart/form-data; boundary=gateway-")
    assert (
        sent.body.count(b"\r\n\r\n" + AUDIO + b"\r\n") == 1
        and b'filename="a.wav"' in sent.body
        and b'name="user"' in sent.body
    )
    assert (await settled(user))["endpoint"] == "audio/transcriptions"


async def test_a_form_without_its_model_or_file_names_the_field(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(Reply([]))
    for files, data, param in (
        ({"file": ("a.wav", AUDIO)}, {}, "model"),
        ({"other": ("a.wav", AUDIO)}, {"model": WRITER}, "other"),
    ):
        response = await post(user, "audio/transcriptions", files=files, data=data)
        assert assert_error("audio/transcriptions", response, 400)["param"] == param
    response = await post(user, "chat/completions", files={"file": ("a.wav", AUDIO)})
    assert assert_error("chat/completions", response, 400)["param"] == "content-type"
    assert upstream.sent == []


# What is not offered.


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "moderations",
        "files",
        "files/abc/content",
        "images/edits",
        "audio/translations",
        "threads/1/runs",
        "batches",
        "keys",
        "generation/content",
    ],
)
async def test_what_is_not_offered_says_so_by_name(scene: Stage, method: str, path: str) -> None:
    gateway, upstream = scene
    upstream.say(Reply([]))
    for prefix in ("/v1", "/api/v1"):
        error = assert_error(path, await gateway.http.request(method, f"{prefix}/{path}"), 404)
        code = error["code"] if prefix == "/v1" else error["metadata"]["error_type"]
        assert code == "not_offered" and error["message"].startswith("`")
    assert (
        assert_error("x", await gateway.http.request(method, "/v1/nothing-here"), 404)["code"] == "not_found"
    )
    assert upstream.sent == []


# Signs of life.


@pytest.mark.parametrize("name", ["chat/completions", "responses", "messages"])
async def test_a_silent_stream_is_kept_alive_until_it_speaks(scene: Stage, name: str) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    runtime = gateway.app.state.service.runtime
    usual, runtime.keep_alive_seconds = runtime.keep_alive_seconds, 0.02
    rest = asyncio.Event()
    raw = STREAMS.get(name, STREAMS["completions"])
    upstream.say(Reply([b": x\n\n", rest, raw], content_type="text/event-stream"))
    body = {**REQUESTS[name], "stream": True}
    async with gateway.http.stream("POST", f"/v1/{name}", headers=user.headers, json=body) as response:
        lines = response.aiter_lines()
        seen = [line for line in [await anext(lines) for _ in range(8)] if line]
        assert seen == [": x", ": keep-alive", ": keep-alive", ": keep-alive"]
        rest.set()
        left = [line async for line in lines]
    runtime.keep_alive_seconds = usual
    assert sum('"gateway_usage"' in line for line in left) == 1
    await settled(user)


async def test_the_models_of_the_script_are_those_of_the_cases() -> None:
    assert {request["model"] for request in REQUESTS.values()} == {entry["id"] for entry in MODELS}


# The official SDK.


async def test_the_sdk_streams_responses_and_finds_the_charge_in_the_last_event(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(Reply([STREAMS["responses"]], content_type="text/event-stream"))
    stream = await user.sdk().responses.create(
        model=TEXT, input="Say hello.", max_output_tokens=50, stream=True
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "response.created",
        "response.output_text.delta",
        "response.completed",
    ]
    assert Decimal(str((events[-1].model_extra or {})["gateway_usage"]["cost"])) == Decimal(COST)
    assert events[-1].type == "response.completed" and events[-1].response.status == "completed"
    await settled(user)


async def test_the_sdk_raises_what_breaks_off_in_a_response(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    upstream.say(
        Reply(
            [STREAMS["responses"].partition(b"event: response.completed")[0]],
            content_type="text/event-stream",
        )
    )
    upstream.known_cost = COST
    stream = await user.sdk().responses.create(
        model=TEXT, input="Say hello.", max_output_tokens=50, stream=True
    )
    events = aiter(stream)
    assert [(await anext(events)).type for _ in range(2)] == [
        "response.created",
        "response.output_text.delta",
    ]
    with pytest.raises(openai.APIError, match="ended too early"):
        await anext(events)
    await settled(user)


async def test_the_sdk_hears_speech_draws_images_and_embeds(scene: Stage) -> None:
    gateway, upstream = scene
    user = await gateway.register(credits=1)
    sdk = user.sdk()
    upstream.say(Reply([LONG], content_type="audio/mpeg"))
    upstream.known_cost = COST
    async with sdk.audio.speech.with_streaming_response.create(
        model=SPEAKER, input="Hello.", voice="alloy"
    ) as speech:
        assert b"".join([piece async for piece in speech.iter_bytes()]) == LONG
    upstream.say(plain(CASES["images"][1]))
    drawn = await sdk.images.generate(model=PAINTER, prompt="A lighthouse")
    assert drawn.data is not None and drawn.data[0].b64_json == "eA=="
    upstream.say(plain(CASES["embeddings"][1]))
    embedding = await sdk.embeddings.create(model=EMBEDDER, input="Hello.", encoding_format="float")
    assert embedding.data[0].embedding == [0.5]
    assert Decimal(str((await user.balance())["credits"])) == 1 - 3 * Decimal(COST)
