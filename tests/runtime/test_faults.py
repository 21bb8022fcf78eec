"""When the database, the upstream, the configuration or a valid request is missing, each case has a plain
answer of its own.
"""

from __future__ import annotations

import asyncio
import base64
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from starlette.responses import PlainTextResponse

import app as application
from config import Configuration, load_configuration
from security import new_key
from tests.support import ROOT
from tests.support.database import Database
from tests.support.database_link import DatabaseLink, staged_link
from tests.support.gateway import (
    ADMIN_KEY,
    Gateway,
    User,
    live,
    running_gateway,
    settings_for,
    staged_gateway,
    staged_start,
    staged_upstream,
)
from tests.support.servers import clean_environment, eventually, served
from tests.support.upstream import Upstream, running_upstream

Start = Callable[..., Awaitable[Gateway]]


pytestmark = pytest.mark.asyncio(loop_scope="module")


upstream = staged_upstream
live_gateway = staged_gateway
start_gateway = staged_start
link = staged_link


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error", "gateway"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["gateway"]["request_id"] == response.headers["x-request-id"]
    return dict(body["error"])


async def upstream_was_asked(upstream: Upstream) -> None:
    async def count() -> int:
        return upstream.inferences

    await eventually(count, lambda value: value == 1)


async def assert_settled_exactly(user: User, upstream: Upstream) -> None:
    record = await user.settled_record()
    assert record["status"] == "completed"
    assert Decimal(str(record["cost"])) == upstream.sandbox.state.billed > 0
    assert upstream.inferences == 1
    assert (await user.balance())["held"] == 0
    await user.gateway.database.assert_books_balance()


# The database is gone.


async def test_without_a_database_nothing_is_sent_and_the_answer_says_why(
    start_gateway: Start, link: DatabaseLink, upstream: Upstream
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    user = await gateway.register(credits=1)
    link.cut()
    for streamed in (False, True):
        response = await user.chat(stream=streamed)
        assert response.status_code == 503
        assert (
            error_of(response)["code"] == "database_unavailable"
            and "database" in error_of(response)["message"]
        )
    assert upstream.inferences == 0
    health = await gateway.http.get("/health")
    assert health.status_code == 503 and health.json()["database"] == "unavailable"
    link.mend()
    assert (await user.chat()).status_code == 200
    await assert_settled_exactly(user, upstream)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_a_database_gone_at_settlement_costs_the_client_nothing_but_certainty(
    start_gateway: Start, link: DatabaseLink, upstream: Upstream, tmp_path: Path, streamed: bool
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    user = await gateway.register(credits=1)
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(user.chat(stream=streamed))
    await upstream_was_asked(upstream)
    link.cut()
    answer = await waiting
    assert answer.status_code == 200
    if streamed:
        assert '"settlement":"pending"' in answer.text and answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.headers["x-gateway-settlement"] == "pending"
        assert answer.json()["gateway_usage"]["cost"] is None and answer.json()["choices"]
    (kept,) = (tmp_path / "settlements").glob("*.json")
    assert orjson.loads(kept.read_bytes())["request_id"] == answer.headers["x-request-id"]
    link.mend()
    await assert_settled_exactly(user, upstream)

    async def journal() -> list[Path]:
        return [*(tmp_path / "settlements").iterdir()]

    await eventually(journal, lambda value: not value)


async def test_the_next_start_takes_up_what_the_journal_holds(
    start_gateway: Start, link: DatabaseLink, database: Database, upstream: Upstream, tmp_path: Path
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    user = await gateway.register(credits=1)
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(user.chat())
    await upstream_was_asked(upstream)
    link.cut()
    assert (await waiting).headers["x-gateway-settlement"] == "pending"
    (tmp_path / "settlements" / "broken.json").write_bytes(b"{")
    (tmp_path / "settlements" / "other.json").write_bytes(b"[]")
    async with running_gateway(database, gateway_data_dir=tmp_path, **live(upstream.url)) as other:
        elsewhere = User(other, user.id, user.key)
        await assert_settled_exactly(elsewhere, upstream)
    link.mend()  # the first one tries again too, which changes nothing

    async def waiting_settlements() -> int:
        return sum(task.get_name().startswith("settlement of") for task in asyncio.all_tasks())

    await eventually(waiting_settlements, lambda value: value == 0)
    await assert_settled_exactly(user, upstream)


async def test_a_settlement_whose_answer_was_lost_is_made_once(
    start_gateway: Start, link: DatabaseLink, upstream: Upstream
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    user = await gateway.register(credits=1)
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(user.chat())
    await upstream_was_asked(upstream)
    link.lose_replies()
    assert (await waiting).headers["x-gateway-settlement"] == "pending"
    status = "select status from public.usage_records"
    link.mend()
    await assert_settled_exactly(user, upstream)
    assert await gateway.database.value(status) == "completed"


async def test_an_admission_whose_answer_was_lost_ends_with_its_hold(
    start_gateway: Start, link: DatabaseLink, upstream: Upstream
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    user = await gateway.register(credits=1)
    link.lose_replies()
    assert (await user.chat()).status_code == 503
    link.mend()
    assert upstream.inferences == 0
    async with gateway.database.owner() as owner:
        await owner.execute(
            "update public.usage_records set expires_at = clock_timestamp() - interval '1 second'"
        )
    await gateway.admin("POST", "/internal/sweep")
    assert [(r["status"], r["cost"]) for r in await user.records()] in ([("expired", 0)], [])
    assert (await user.balance())["held"] == 0
    await gateway.database.assert_books_balance()


async def test_a_settlement_that_the_database_refuses_is_kept_for_later(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    async with live_gateway.database.owner() as owner:
        await owner.execute("revoke execute on function public.settle_requests(jsonb) from service_role")
        response = await user.chat()
        assert response.status_code == 200 and response.headers["x-gateway-settlement"] == "pending"
        await owner.execute("grant execute on function public.settle_requests(jsonb) to service_role")
    await assert_settled_exactly(user, upstream)


async def test_a_gateway_that_starts_before_its_database_serves_once_it_is_there(
    start_gateway: Start, link: DatabaseLink
) -> None:
    link.cut()
    gateway = await start_gateway(database_url=link.url)
    health = await gateway.http.get("/health")
    assert health.status_code == 503 and "database" in health.json()["problem"]
    assert (await gateway.http.get("/health/live")).status_code == 200
    link.mend()

    async def ready() -> int:
        return (await gateway.http.get("/health/ready")).status_code

    await eventually(ready, lambda status: status == 200)


async def test_a_request_takes_two_round_trips_to_the_database(
    start_gateway: Start, link: DatabaseLink, upstream: Upstream
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    user = await gateway.register(credits=1)
    for _ in range(3):
        assert (
            await user.chat()
        ).status_code == 200  # connections, statements and models are there from now on
    for streamed in (False, True):
        before = link.round_trips
        assert (await user.chat(stream=streamed)).status_code == 200
        assert link.round_trips - before == 2
    upstream.scenario = "slow;ms=120;tokens=20"
    before = link.round_trips
    assert (await user.chat(stream=True)).status_code == 200
    assert (
        link.round_trips - before == 3
    )  # this one ran for more than two seconds: its generation id was stored


# The upstream is gone.


async def test_an_upstream_that_cannot_be_reached_costs_nothing(start_gateway: Start) -> None:
    async with running_upstream() as upstream:
        gateway = await start_gateway(**live(upstream.url))
        user = await gateway.register(credits=1)
        assert (await user.chat()).status_code == 200
    answer = await eventually(
        user.chat, lambda value: value.status_code == 503
    )  # first a connection that was still open may break
    assert error_of(answer)["code"] == "upstream_unreachable"
    record = (await user.records())[0]
    assert (record["status"], record["cost"], record["settlement_source"]) == ("failed", 0, "usage")
    assert (await user.balance())["held"] == 0
    await gateway.database.assert_books_balance()


# The configuration is wrong.

SECRET = base64.urlsafe_b64encode(b"k" * 32).decode()
RIGHT = {
    "DATABASE_URL": "postgresql:///x",
    "KEY_HASH_SECRETS": SECRET,
    "ENCRYPTION_KEYS": SECRET,
    "ADMIN_API_KEY": ADMIN_KEY,
    "GATEWAY_MODE": "sandbox",
}
WRONG = [
    ({"PORT": "many"}, "PORT: must be a whole number."),
    ({"LOG_FORMAT": "loud"}, "LOG_FORMAT: must be 'json' or 'console'."),
    ({"UPSTREAM_TIMEOUT_SECONDS": "long"}, "UPSTREAM_TIMEOUT_SECONDS: must be a number."),
    ({"HOLD_TTL_SECONDS": "100"}, "HOLD_TTL_SECONDS (100) must be at least REQUEST_DEADLINE_SECONDS + 60"),
    ({"GATEWAY_MODE": "live"}, "OPENROUTER_API_KEY is missing"),
    ({"GATEWAY_MODE": ""}, "set GATEWAY_MODE=sandbox"),
    ({"SUPABASE_URL": "https://x.supabase.co"}, "SUPABASE_KEY is missing"),
    ({"SUPABASE_KEY": "secret-of-supabase"}, "SUPABASE_URL is missing"),
    ({"KEY_HASH_SECRETS": ""}, "KEY_HASH_SECRETS is missing"),
    ({"KEY_HASH_SECRETS": "c2hvcnQ="}, "KEY_HASH_SECRETS: must be 32 bytes"),
    ({"ENCRYPTION_KEYS": ""}, "ENCRYPTION_KEYS is missing"),
    ({"ENCRYPTION_KEYS": "no base64!"}, "ENCRYPTION_KEYS: must be 32 bytes in base64url"),
    ({"ADMIN_API_KEY": ""}, "ADMIN_API_KEY is missing"),
    ({"ADMIN_API_KEY": "short-one"}, "ADMIN_API_KEY is too short"),
    ({"OPENROUTER_BASE_URL": "openrouter.ai"}, "OPENROUTER_BASE_URL: must start with https://"),
    ({"PRICE_MARKUP": "0"}, "PRICE_MARKUP: must be greater than 0."),
    (
        {"TRUSTED_PROXIES": "10.0.0.1/33"},
        "TRUSTED_PROXIES: must be addresses or networks such as 203.0.113.0/24, comma-separated.",
    ),
]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    WRONG,
    ids=[" ".join(changes) + f" {number}" for number, (changes, _) in enumerate(WRONG)],
)
async def test_what_is_wrong_in_the_configuration_is_said_everywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, str], sentence: str
) -> None:
    for name, value in {**RIGHT, **changes, "LOG_LEVEL": "error"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    app = application.create_app(load_configuration())
    async with served(app) as url, httpx.AsyncClient(base_url=url) as http:
        health = await http.get("/health")
        assert health.status_code == 503 and sentence in health.json()["problem"]
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/user/balance"),
            ("GET", "/v1/models"),
            ("POST", "/admin/add_credits"),
        ):
            response = await http.request(
                method,
                path,
                headers={"authorization": f"Bearer {new_key('live')}"},
                json={"user_id": 1, "credits": 1},
            )
            error = error_of(response)
            assert (
                response.status_code == 503
                and error["code"] == "misconfigured"
                and sentence in error["message"]
            )
            assert response.headers["x-should-retry"] == "false"
        assert (await http.get("/health/live")).status_code == 200
        assert "secret-of-supabase" not in health.text and "short-one" not in health.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"PORT": "abc"}, "PORT: must be a whole number."),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL: must be 'debug', 'info', 'warning' or 'error'."),
        ({"ADMIN_API_KEY": "short-one"}, "ADMIN_API_KEY is too short: use at least 16 characters."),
    ],
)
async def test_a_wrong_setting_is_reported_at_the_start(
    tmp_path: Path, changes: dict[str, str], sentence: str
) -> None:
    environment = clean_environment(**{"PYTHONPATH": str(ROOT), "PORT": "0", **RIGHT, **changes})
    process = await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "app.py", cwd=tmp_path, env=environment, stdout=PIPE, stderr=PIPE
    )
    output = await process.communicate()
    assert (process.returncode, *output) == (1, b"", f"{sentence}\n".encode())


async def test_an_interrupted_server_says_what_it_waits_for_and_a_second_interrupt_ends_it(
    tmp_path: Path,
) -> None:
    environment = clean_environment(
        PYTHONPATH=str(ROOT), PORT="0", GATEWAY_DATA_DIR=str(tmp_path), LOG_LEVEL="error"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "app.py", cwd=tmp_path, env=environment, stdout=PIPE, stderr=PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    url = ""
    while not url:
        url = next(
            iter(re.findall(r"http://127\.0\.0\.1:\d+", (await process.stdout.readline()).decode())), ""
        )
    async with httpx.AsyncClient(base_url=url) as http:
        key = (
            await http.post("/auth/register", json={"username": "ada", "email": "ada@example.com"})
        ).json()["api_key"]
        body = {**GOOD, "model": "openai/gpt-4o-mini:slow;ms=100;tokens=400", "stream": True}
        async with http.stream(
            "POST", "/v1/chat/completions", headers={"authorization": f"Bearer {key}"}, json=body
        ) as response:
            await anext(response.aiter_raw())
            process.send_signal(signal.SIGINT)
            assert (
                await process.stderr.readline() == b"Waiting: 1 request is running. Ctrl-C stops at once.\n"
            )
            process.send_signal(signal.SIGINT)
            rest = await asyncio.wait_for(process.stderr.read(), 20)
    assert rest == b"Stopped. The sweep charges what was running once its cost is known.\n"
    await process.wait()


async def test_an_instance_whose_database_went_live_is_not_healthy(
    start_gateway: Start, upstream: Upstream
) -> None:
    playing = await start_gateway()
    assert (await playing.http.get("/health/ready")).status_code == 200
    await start_gateway(**live(upstream.url))
    for path in ("/health", "/health/ready"):
        response = await playing.http.get(path)
        assert response.status_code == 503 and "disagree on live or sandbox mode" in response.text


async def test_a_database_does_not_go_live_for_a_key_that_the_upstream_refuses(
    start_gateway: Start, upstream: Upstream
) -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await PlainTextResponse("no such key", status_code=401)(scope, receive, send)

    playing = await start_gateway()
    user = await playing.register()
    async with served(refuse) as url:
        gateway = await start_gateway(**live(url))
        health = await gateway.http.get("/health")
        assert (
            health.status_code == 503 and "OpenRouter refuses OPENROUTER_API_KEY" in health.json()["problem"]
        )
    assert (await user.balance())["credits"] == 10
    gateway = await start_gateway(**live(upstream.url))
    assert (await gateway.http.get("/health")).status_code == 200
    assert (await gateway.http.get("/user/balance", headers=user.headers)).json()["credits"] == 0


# The request is wrong.

GOOD = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
MALFORMED: list[tuple[bytes, int, str, str | None]] = [
    (b"", 400, "invalid_json", None),
    (b"{", 400, "invalid_json", None),
    (b"[]", 400, "invalid_json", None),
    (b'"text"', 400, "invalid_json", None),
    (b"\xff\xfe", 400, "invalid_json", None),
    (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "invalid_json", None),
    (orjson.dumps(GOOD)[:-1] + b',"x":' + b"[" * 300 + b"]" * 300 + b"}", 400, "invalid_json", None),
    (
        b'{"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "invalid_json",
        None,
    ),
    (b"{}", 400, "invalid_request", "model"),
    (orjson.dumps({**GOOD, "model": None}), 400, "invalid_request", "model"),
    (orjson.dumps({**GOOD, "model": 5}), 400, "invalid_request", "model"),
    (orjson.dumps({**GOOD, "model": "no/model"}), 404, "model_not_found", "model"),
    (orjson.dumps({**GOOD, "model": "openrouter/auto"}), 400, "no_cost_bound", "model"),
    (orjson.dumps({**GOOD, "messages": None}), 400, "invalid_request", "messages"),
    (orjson.dumps({**GOOD, "messages": "Hi"}), 400, "invalid_request", "messages"),
    (orjson.dumps({**GOOD, "messages": [5]}), 400, "invalid_request", "messages"),
    (orjson.dumps({**GOOD, "stream": "yes"}), 400, "invalid_request", "stream"),
    (orjson.dumps({**GOOD, "user": {}}), 400, "invalid_request", "user"),
    (orjson.dumps({**GOOD, "max_tokens": "many"}), 400, "invalid_request", "max_tokens"),
    (orjson.dumps({**GOOD, "max_tokens": 0}), 400, "invalid_request", "max_tokens"),
    (orjson.dumps({**GOOD, "n": -1}), 400, "invalid_request", "n"),
    (orjson.dumps({**GOOD, "service_tier": "priority"}), 400, "no_cost_bound", "service_tier"),
]


async def test_malformed_requests_are_refused_by_name_and_leave_no_trace(live_gateway: Gateway) -> None:
    gateway = live_gateway
    user = await gateway.register()
    stranger = {"authorization": f"Bearer {new_key('live')}"}
    for raw, status, code, param in MALFORMED:
        response = await gateway.http.post("/v1/chat/completions", headers=user.headers, content=raw)
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (status, code, param), (
            raw[:200],
            response.text,
        )
        assert error["type"] == "invalid_request_error"
        response = await gateway.http.post("/v1/chat/completions", headers=stranger, content=raw)
        assert response.status_code == 401  # who is not known here learns nothing of what is wrong
    assert await user.records() == [] and (await user.balance())["held"] == 0


async def test_scenarios_are_no_models_in_live_mode(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register(credits=1)
    assert (await user.chat(model="openai/gpt-4o-mini:error-429")).status_code == 404
    assert (await user.chat(scenario="error-429")).status_code == 200
    assert "x-sandbox-scenario" not in upstream.sandbox.state.calls[-1].headers


async def test_a_scope_is_asked_for_before_the_body_is_looked_at(live_gateway: Gateway) -> None:
    user = await live_gateway.register()
    async with live_gateway.database.owner() as owner:
        await owner.execute(
            "update public.api_keys_new set scope_permissions = '{}' where user_id = $1", user.id
        )
    response = await live_gateway.http.post("/v1/chat/completions", headers=user.headers, content=b"{")
    assert response.status_code == 403 and error_of(response)["code"] == "missing_scope"


STRANGERS: list[tuple[dict[str, str], int, str]] = [
    ({}, 401, "invalid_api_key"),
    ({"authorization": "Bearer"}, 401, "invalid_api_key"),
    ({"authorization": "Basic abc"}, 401, "invalid_api_key"),
    ({"authorization": "Bearer sk-or-v1-something"}, 401, "invalid_api_key"),
    ({"authorization": "Bearer gw_live_" + "0" * 49}, 401, "invalid_api_key"),
    ({"authorization": f"Bearer {new_key('live')}"}, 401, "invalid_api_key"),
    ({"authorization": f"Bearer {new_key('test')}"}, 401, "invalid_api_key"),
    ({"x-api-key": new_key("live")}, 401, "invalid_api_key"),
    ({"authorization": f"Bearer {new_key('live')}", "x-api-key": new_key("live")}, 400, "invalid_request"),
]


async def test_strangers_get_nothing_and_cause_nothing(start_gateway: Start, upstream: Upstream) -> None:
    gateway = await start_gateway(**live(upstream.url))
    upstream.forget()  # it was asked whether it takes the operator's key
    for headers, status, code in STRANGERS:
        for content in (orjson.dumps(GOOD), b"{", orjson.dumps({**GOOD, "model": "no/model"})):
            response = await gateway.http.post("/v1/chat/completions", headers=headers, content=content)
            assert (response.status_code, error_of(response)["code"]) == (status, code)
            if status == 401:
                assert response.headers["www-authenticate"] == "Bearer"
    assert not upstream.sandbox.state.counts  # not even the model list was fetched
    assert await gateway.database.value("select count(*) from public.usage_records") == 0


async def test_a_body_beyond_the_limit_is_refused_with_and_without_a_length(
    start_gateway: Start, upstream: Upstream
) -> None:
    gateway = await start_gateway(max_body_bytes=2048, **live(upstream.url))
    user = await gateway.register(credits=1)
    large = orjson.dumps({**GOOD, "x": "y" * 3000})

    async def pieces() -> Any:
        for start in range(0, len(large), 500):
            yield large[start : start + 500]

    for path in ("/v1/chat/completions", "/admin/add_credits"):
        for content in (large, pieces()):
            response = await gateway.http.post(
                path, headers={**user.headers, "content-type": "application/json"}, content=content
            )
            assert response.status_code == 413, response.text
            assert error_of(response)["code"] == "body_too_large" and "2048" in error_of(response)["message"]
    assert upstream.inferences == 0 and await user.records() == []


async def test_no_credits_is_402_which_no_client_retries(live_gateway: Gateway, upstream: Upstream) -> None:
    user = await live_gateway.register()
    response = await user.chat(max_tokens=100)
    error = error_of(response)
    assert response.status_code == 402 and error["code"] == "insufficient_credits"
    assert response.headers["x-should-retry"] == "false"
    assert upstream.inferences == 0 and await user.records() == []


async def test_every_answer_has_an_id_of_ours_and_the_client_s_own_is_only_kept(
    live_gateway: Gateway,
) -> None:
    user = await live_gateway.register(credits=1)
    ids = set()
    for method, path in (
        ("GET", "/"),
        ("GET", "/nowhere"),
        ("PUT", "/health"),
        ("POST", "/v1/chat/completions"),
        ("OPTIONS", "/"),
    ):
        response = await live_gateway.http.request(method, path, headers={"x-request-id": "mine"})
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 5 and "mine" not in ids
    for client_id in ("mine", "x" * 300, "ü"):
        headers = {**user.headers, "x-request-id": client_id.encode("latin-1")}
        response = await live_gateway.http.post("/v1/chat/completions", headers=headers, json=GOOD)  # type: ignore[arg-type]
        record = (await user.records())[0]
        assert record["request_id"] == response.headers["x-request-id"]
        assert record["client_request_id"] == client_id[:256]


async def test_a_fault_of_ours_is_a_plain_500_with_the_id(database: Database, tmp_path: Path) -> None:
    app = application.create_app(
        Configuration(settings_for(database, gateway_data_dir=tmp_path, log_level="error"), ())
    )

    async def break_down() -> None:
        raise RuntimeError("s3cret")

    app.add_api_route("/broken", break_down)
    async with served(app) as url, httpx.AsyncClient(base_url=url) as http:
        response = await http.get("/broken")
    assert response.status_code == 500 and error_of(response)["code"] == "internal_error"
    assert "s3cret" not in response.text and "Traceback" not in response.text
