"""A request with an Idempotency-Key runs once and is paid once, over HTTP, whatever happens to the first
attempt and whoever repeats it.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio

from gateway.billing.stored_answers import MAX_ANSWER_BYTES
from gateway.proxy.endpoints import ENDPOINTS
from sandbox.wire import dumps
from security import new_key
from tests.support.database import Database
from tests.support.database_link import DatabaseLink, staged_link
from tests.support.gateway import Gateway, User, live, staged_gateway, staged_start, staged_upstream
from tests.support.kinds import KINDS, Kind
from tests.support.servers import eventually, is_ready
from tests.support.upstream import TEXT, Reply, Upstream, running_script
from tests.support.users import scoped
from tests.support.workers import running_workers, workers_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

Start = Callable[..., Awaitable[Gateway]]
SHAPES = [pytest.param(kind, streamed, id=f"{kind.path}{'-streamed' if streamed else ''}")
          for kind in KINDS for streamed in ((False, True) if kind.streams else (False,))]  # fmt: skip
CHAT = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Say hello."}]}


upstream = staged_upstream
gateway = staged_gateway
start_gateway = staged_start
link = staged_link


@pytest_asyncio.fixture(loop_scope="module")
async def user(gateway: Gateway) -> User:
    return await gateway.register(credits=10)


async def ask(
    user: User, key: str = "a", *, url: str = "/v1/chat/completions", **body: Any
) -> httpx.Response:
    headers = {**user.headers, "idempotency-key": key}
    content = {"model": CHAT["model"], "input": "Hi"} if url.endswith("/responses") else CHAT
    return await user.gateway.http.post(url, headers=headers, json={**content, **body})


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def is_replay(response: httpx.Response) -> bool:
    assert response.headers.get("idempotent-replayed") in (None, "true")
    return response.status_code == 200 and "idempotent-replayed" in response.headers


async def assert_paid_once(user: User, upstream: Upstream, billed: Decimal | None = None) -> dict[str, Any]:
    """One upstream call, one record, one charge, nothing held."""
    record = await user.settled_record()
    assert Decimal(str(record["cost"])) == (upstream.sandbox.state.billed if billed is None else billed) > 0
    assert (await user.balance())["held"] == 0
    await user.gateway.database.assert_books_balance()
    return record


async def running(upstream: Upstream, count: int = 1) -> None:
    async def asked() -> int:
        return upstream.inferences

    await eventually(asked, lambda value: value == count)


# Again.


async def test_all_that_is_billed_is_asked_twice_here() -> None:
    assert {kind.asks or kind.path for kind in KINDS} == {endpoint.name for endpoint in ENDPOINTS}


@pytest.mark.parametrize(("kind", "streamed"), SHAPES)
async def test_the_second_time_it_is_the_first_answer(
    gateway: Gateway, upstream: Upstream, kind: Kind, streamed: bool
) -> None:
    user = await gateway.register(credits=100)
    body = kind.body(random.Random(kind.path))
    content = kind.content({**body, "stream": True} if streamed else body)
    first, second = [
        await gateway.http.post(kind.url, headers={**user.headers, "idempotency-key": "x"}, **content)
        for _ in range(2)
    ]  # a form is parted anew each time
    assert first.status_code == second.status_code == 200, second.text
    assert not is_replay(first) and is_replay(second)
    assert second.content == first.content
    names = ["content-type", "x-generation-id", "cache-control", "x-gateway-mode"]
    for name in names + (["x-gateway-cost", "x-gateway-balance"] if kind.tells else []):
        assert second.headers.get(name) == first.headers.get(name), name
    record = await user.settled_record()
    assert second.headers["x-request-id"] != first.headers["x-request-id"] == record["request_id"]
    if kind.tells:
        assert f'"request_id":"{record["request_id"]}"'.encode() in second.content
    assert [
        call.path
        for call in upstream.sandbox.state.calls
        if call.path in {each.upstream_path for each in KINDS}
    ] == [kind.upstream_path]
    await assert_paid_once(user, upstream)


@pytest.mark.parametrize("streamed", [False, True])
async def test_twenty_at_once_are_one_request(
    gateway: Gateway, upstream: Upstream, user: User, streamed: bool
) -> None:
    upstream.scenario = "slow-first-token;seconds=2"
    answers = await asyncio.gather(*(ask(user, stream=streamed) for _ in range(20)))
    assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 19}
    for refused in (answer for answer in answers if answer.status_code == 409):
        assert code_of(refused)[1] == "idempotency_request_running"
        assert int(refused.headers["retry-after"]) >= 1 and refused.headers["x-should-retry"] == "true"
    again = await ask(user, stream=streamed)
    assert is_replay(again) and again.content == next(
        answer.content for answer in answers if answer.status_code == 200
    )
    assert upstream.inferences == 1
    await assert_paid_once(user, upstream)


async def test_the_sdk_waits_for_the_first_and_gets_its_answer(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    upstream.scenario = "slow-first-token;seconds=3"
    first = asyncio.create_task(ask(user))
    await running(upstream)
    patient = user.sdk(max_retries=5)
    response = await patient.chat.completions.with_raw_response.create(
        **CHAT, extra_headers={"idempotency-key": "a"}, extra_body={}
    )  # type: ignore[call-overload]
    assert response.retries_taken >= 1 and response.headers["idempotent-replayed"] == "true"
    assert response.content == (await first).content
    await assert_paid_once(user, upstream)


async def test_a_replay_needs_no_credits_and_no_room_in_the_limits(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    first = await ask(user)
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"requests_per_minute": 1}}
    )
    await gateway.admin(
        "POST", "/admin/adjust_credits", json={"user_id": user.id, "credits": -9, "reason": "test"}
    )
    assert (await user.chat()).status_code == 429
    assert (await ask(user)).content == first.content


async def test_a_pending_charge_is_told_once_it_is_known(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    """Of a stream whose cost only GET /generation knew: the first answer could not wait for it, the replay
    has it.
    """
    upstream.scenario = "cost-null,generation-late;times=4"
    first = await ask(user)
    assert first.json()["gateway_usage"]["settlement"] == "pending"
    assert code_of(await ask(user)) == (409, "idempotency_request_running")
    record = await user.settled_record()
    body = (await ask(user)).json()
    usage = body.pop("gateway_usage")
    assert body == {name: value for name, value in first.json().items() if name != "gateway_usage"}
    assert (
        usage["request_id"] == record["request_id"]
        and Decimal(str(usage["cost"])) == upstream.sandbox.state.billed
    )
    assert usage["tokens_charged"] == record["prompt_tokens"] + record["completion_tokens"] > 0


# Not again.


async def test_another_body_is_a_mistake(gateway: Gateway, upstream: Upstream, user: User) -> None:
    await ask(user)
    refused = await ask(user, max_tokens=7)
    assert (
        code_of(refused) == (409, "idempotency_key_reused") and refused.headers["x-should-retry"] == "false"
    )
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(ask(user, "b"))
    await running(upstream, 2)
    assert code_of(await ask(user, "b", max_tokens=7)) == (409, "idempotency_key_reused")
    assert (await waiting).status_code == 200


async def test_another_file_in_a_form_is_a_mistake_too(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    async def transcribe(sound: bytes, **fields: str) -> httpx.Response:
        body = {"model": "openai/gpt-4o-transcribe", **fields}
        headers = {**user.headers, "idempotency-key": "form"}
        return await gateway.http.post(
            "/v1/audio/transcriptions",
            headers=headers,
            data=body,
            files={"file": ("a.wav", sound, "audio/wav")},
        )

    assert (await transcribe(b"RIFF one")).status_code == 200
    assert is_replay(await transcribe(b"RIFF one"))
    assert code_of(await transcribe(b"RIFF two")) == (409, "idempotency_key_reused")
    assert code_of(await transcribe(b"RIFF one", language="de")) == (409, "idempotency_key_reused")


async def test_everybody_has_keys_of_their_own(gateway: Gateway, upstream: Upstream, user: User) -> None:
    other = await gateway.register(credits=10)
    testing = await scoped(user, {"read": ["*"], "write": ["*"]}, environment_tag="test")
    for caller, url in (
        (user, "/v1/chat/completions"),
        (other, "/v1/chat/completions"),
        (testing, "/v1/chat/completions"),
        (user, "/v1/responses"),
    ):
        response = await ask(caller, url=url)
        assert response.status_code == 200 and not is_replay(response), response.text
    assert is_replay(await ask(user, url="/api/v1/chat/completions"))
    second = await scoped(user, {"read": ["*"], "write": ["*"]})
    assert is_replay(await ask(second))  # another key of the same account and environment


@pytest.mark.parametrize("key", ["", "x" * 256, "x" * 300, "a\tb", "a\x85b"])
async def test_what_cannot_be_a_key_is_refused_by_name(
    gateway: Gateway, upstream: Upstream, user: User, key: str
) -> None:
    for headers, status in ((user.headers, 400), ({"authorization": f"Bearer {new_key('live')}"}, 401)):
        sent = {**headers, "idempotency-key": key.encode("latin-1")}
        response = await gateway.http.post("/v1/chat/completions", headers=sent, json=CHAT)  # type: ignore[arg-type]
        assert response.status_code == status, response.text
        if status == 400:
            assert response.json()["error"]["param"] == "Idempotency-Key"
    assert upstream.inferences == 0 and await user.records() == []


async def test_the_longest_key_is_one(gateway: Gateway, upstream: Upstream, user: User) -> None:
    assert (await ask(user, "x" * 255)).status_code == 200
    assert is_replay(await ask(user, "x" * 255))


# What frees a key.


async def test_a_refusal_frees_it(gateway: Gateway, upstream: Upstream) -> None:
    poor = await gateway.register()
    assert code_of(await ask(poor, max_tokens=100)) == (402, "insufficient_credits")
    await gateway.admin("POST", "/admin/add_credits", json={"user_id": poor.id, "credits": 1})
    assert code_of(await ask(poor, max_tokens="many")) == (400, "invalid_request")
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": poor.id, "rate_limits": {"requests_per_minute": 0}}
    )
    assert code_of(await ask(poor)) == (429, "rate_limit_exceeded")
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": poor.id, "rate_limits": {"requests_per_minute": None}}
    )
    assert (await ask(poor, max_tokens=100)).status_code == 200
    assert is_replay(await ask(poor, max_tokens=100))
    await assert_paid_once(poor, upstream)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("scenario", ["error-500", "error-429", "error-in-200", "html-body", "error-first"])
async def test_a_failure_that_cost_nothing_frees_it(
    gateway: Gateway, upstream: Upstream, user: User, streamed: bool, scenario: str
) -> None:
    upstream.scenario = scenario
    failed = await ask(user, stream=streamed)
    assert failed.status_code >= 400 or "error" in failed.text
    charged = (await user.settled_record())["cost"]
    upstream.scenario = ""
    again = await ask(user, stream=streamed)
    if charged:
        assert code_of(again) == (409, "idempotency_answer_not_kept")
    else:
        assert again.status_code == 200 and not is_replay(again)
    await gateway.database.assert_books_balance()


async def test_a_failure_that_was_charged_is_not_run_again(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    upstream.scenario = "stream-error;count=5"
    assert '"error"' in (await ask(user, stream=True)).text
    upstream.scenario = ""
    record = await assert_paid_once(user, upstream)
    refused = await ask(user, stream=True)
    assert (
        code_of(refused) == (409, "idempotency_answer_not_kept")
        and refused.headers["x-should-retry"] == "false"
    )
    details = refused.json()["gateway"]
    assert details["original_request_id"] == record["request_id"] and details["cost"] == record["cost"]
    assert upstream.inferences == 1


# The client goes.


async def leave(user: User, **body: Any) -> None:
    """Reads the beginning of a stream and goes."""
    headers = {**user.headers, "idempotency-key": "a"}
    content = {**CHAT, "stream": True, **body}
    async with user.gateway.http.stream(
        "POST", "/v1/chat/completions", headers=headers, json=content
    ) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                break


async def test_a_client_that_left_finds_the_answer_that_was_read_to_its_end(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    upstream.scenario = "slow;ms=20;tokens=20"
    model = "google/gemini-2.5-flash"  # whose provider bills on after an abort
    await leave(user, model=model)
    await assert_paid_once(user, upstream)
    again = await ask(user, stream=True, model=model)
    assert is_replay(again) and again.text.endswith("data: [DONE]\n\n") and '"gateway_usage"' in again.text
    assert upstream.inferences == 1


async def test_a_client_that_left_where_the_upstream_stopped_learns_the_charge(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    upstream.scenario = "abort;ms=20;tokens=60;times=1"
    await leave(user)
    record = await assert_paid_once(user, upstream)
    assert record["status"] == "cancelled"
    refused = await ask(user, stream=True)
    assert code_of(refused) == (409, "idempotency_answer_not_kept")
    assert refused.json()["gateway"]["cost"] == record["cost"] and upstream.inferences == 1


async def test_a_client_that_left_before_the_answer_finds_it(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(ask(user))
    await running(upstream)
    waiting.cancel()
    record = await user.settled_record()
    again = await ask(user)
    assert is_replay(again) and again.json()["gateway_usage"]["request_id"] == record["request_id"]
    await assert_paid_once(user, upstream)


# Large answers.


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_beyond_a_mebibyte_is_given_once(start_gateway: Start, streamed: bool) -> None:
    async with running_script() as upstream:
        gateway = await start_gateway(**live(upstream.url))
        user = await gateway.register(credits=10)
        for size, kept in ((MAX_ANSWER_BYTES - 2000, True), (MAX_ANSWER_BYTES, False)):
            upstream.say(large(size, streamed=streamed))
            first = await ask(user, f"{size}", model=TEXT, stream=streamed, max_tokens=100)
            assert first.status_code == 200 and len(first.content) > size
            again = await ask(user, f"{size}", model=TEXT, stream=streamed, max_tokens=100)
            assert is_replay(again) is kept
            assert (
                again.content == first.content
                if kept
                else code_of(again) == (409, "idempotency_answer_not_kept")
            )
            assert len(upstream.sent) == 1
        await gateway.database.assert_books_balance()


def large(size: int, *, streamed: bool) -> Reply:
    body = {
        "id": "gen-1",
        "model": TEXT,
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "cost": Decimal("0.000017")},
    }
    text = "x" * size
    if not streamed:
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return Reply([dumps({**body, "choices": [message]})])
    events = [
        {"id": "gen-1", "choices": [{"index": 0, "delta": {"content": text[i : i + 65_536]}}]}
        for i in range(0, size, 65_536)
    ]
    last = {**body, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    pieces = [b"data: " + dumps(event) + b"\n\n" for event in (*events, last)]
    return Reply([*pieces, b"data: [DONE]\n\n"], content_type="text/event-stream")


# Everything fails.


async def test_a_crash_frees_it_when_its_hold_is_swept(
    database: Database, upstream: Upstream, tmp_path: Path
) -> None:
    async with running_workers(database, upstream.url, tmp_path) as (gateway, pid):
        user = await gateway.register(credits=10)
        upstream.scenario = "hang"
        waiting = asyncio.create_task(ask(user))
        await running(upstream)
        for worker in workers_of(pid):
            os.kill(worker, signal.SIGKILL)
        await asyncio.wait([waiting])
        upstream.scenario = ""
        await eventually(lambda: is_ready(gateway.http), lambda ready: ready, seconds=90)
        assert code_of(await ask(user)) == (409, "idempotency_request_running")
        await database.age_holds()
        again = await ask(user)  # finds it, unless the workers' own loop came before
        assert again.status_code == 200 and not is_replay(again)
        assert [record["status"] for record in await user.records()] == ["completed", "expired"]
        assert is_replay(await ask(user))
        await database.assert_books_balance()


async def test_instances_share_it(start_gateway: Start, upstream: Upstream) -> None:
    one, other = await start_gateway(**live(upstream.url)), await start_gateway(**live(upstream.url))
    user = await one.register(credits=10)
    elsewhere = User(other, user.id, user.key)
    upstream.scenario = "slow-first-token;seconds=2"
    waiting = asyncio.create_task(ask(user))
    await running(upstream)
    assert code_of(await ask(elsewhere)) == (409, "idempotency_request_running")
    first = await waiting
    again = await ask(elsewhere)
    assert is_replay(again) and again.content == first.content
    await assert_paid_once(user, upstream)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_database_gone_at_settlement_loses_neither_charge_nor_answer(
    start_gateway: Start, link: DatabaseLink, upstream: Upstream, streamed: bool
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    user = await gateway.register(credits=10)
    upstream.scenario = "slow-first-token;seconds=2"
    waiting = asyncio.create_task(ask(user, stream=streamed))
    await running(upstream)
    link.cut()
    first = await waiting
    assert first.status_code == 200 and '"settlement":"pending"' in first.text
    link.mend()
    await assert_paid_once(user, upstream)
    again = await ask(user, stream=streamed)
    assert is_replay(again) and '"settlement"' not in again.text
    assert without_charge(again) == without_charge(first)
    assert upstream.inferences == 1


def without_charge(response: httpx.Response) -> list[Any]:
    """The JSON of an answer's events, or the answer's own, but for the charge."""
    lines = (
        response.text.split("\n")
        if "event-stream" in response.headers["content-type"]
        else [f"data: {response.text}"]
    )
    sent = [orjson.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return [{name: value for name, value in event.items() if name != "gateway_usage"} for event in sent]


async def test_an_answer_is_kept_even_where_its_request_is_stopped_as_it_is_sealed(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    """Shutdown gives up on requests that take too long; each is then settled once more, with the answer that
    it had.
    """
    upstream.scenario = (
        "oversized;bytes=200000,slow-first-token;seconds=0.3"  # large enough to be sealed in a thread
    )
    waiting = asyncio.create_task(ask(user))
    await running(upstream)
    free, threads = threading.Event(), ThreadPoolExecutor(max_workers=1)
    asyncio.get_running_loop().set_default_executor(threads)
    busy = asyncio.create_task(asyncio.to_thread(free.wait, 10))  # and there is none to be had

    async def sealing() -> bool:
        return any(getattr(task.get_coro(), "__name__", "") == "seal_answer" for task in asyncio.all_tasks())

    try:
        await eventually(sealing, lambda value: value, seconds=5)
        (exchange,) = gateway.app.state.service.runtime.exchanges
        exchange.cancel()
        await asyncio.wait([exchange])
    finally:
        free.set()
    await asyncio.wait([waiting, busy])
    await assert_paid_once(user, upstream)
    upstream.scenario = ""
    again = await ask(user)
    assert is_replay(again) and len(again.content) > 200_000
