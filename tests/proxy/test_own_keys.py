"""A user with an OpenRouter key of their own pays OpenRouter: nothing is charged here, and neither key is
ever sent in place of the other.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio

from tests.support.database import Database
from tests.support.gateway import (
    OPERATOR_KEY,
    Gateway,
    User,
    live,
    staged_gateway,
    staged_start,
    staged_upstream,
)
from tests.support.kinds import KINDS, Kind
from tests.support.servers import eventually, is_ready
from tests.support.upstream import TEXT, Reply, Upstream, running_script
from tests.support.users import ask, scoped
from tests.support.workers import running_workers, start_stream, workers_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

Start = Callable[..., Awaitable[Gateway]]
SHAPES = [pytest.param(kind, streamed, id=f"{kind.path}{'-streamed' if streamed else ''}")
          for kind in KINDS for streamed in ((False, True) if kind.streams else (False,))]  # fmt: skip
KEY = "sk-or-v1-" + "0123456789abcdef" * 4
OWN, OPERATOR = f"Bearer {KEY}", f"Bearer {OPERATOR_KEY}"


upstream, gateway, start_gateway = staged_upstream, staged_gateway, staged_start


async def owner_of_a_key(gateway: Gateway, credits: float = 0) -> User:
    """A user who has stored an upstream key."""
    user = await gateway.register(credits=credits)
    assert (await ask(user, "PUT", "/user/provider-key", {"key": KEY})).status_code == 200
    return user


@pytest_asyncio.fixture(loop_scope="module")
async def user(gateway: Gateway, upstream: Upstream) -> User:
    owner = await owner_of_a_key(gateway)
    await gateway.app.state.service.runtime.catalog("live").models()
    upstream.forget()  # what was asked about the key, and for the list
    return owner


def authorized(upstream: Upstream, path: str = "") -> list[str]:
    """The Authorization headers of the calls to a path, or of all."""
    calls = [call for call in upstream.sandbox.state.calls if not path or call.path == path]
    return [value.decode() for call in calls for name, value in call.raw_headers if name == b"authorization"]


async def settled(user: User, upstream: Upstream) -> dict[str, Any]:
    """The one record, which cost nothing; nothing is held, and what the upstream billed is noted."""
    await user.settled_record()
    (row,) = await user.gateway.database.rows(
        "select * from public.usage_records where user_id = $1", user.id
    )
    assert (row["byok"], row["hold_nanos"], row["cost_nanos"], row["overrun_nanos"]) == (True, 0, 0, 0)
    assert row["upstream_cost_nanos"] == upstream.sandbox.state.billed.scaleb(9).to_integral_value(
        ROUND_CEILING
    )
    balance = await user.balance()
    assert balance["held"] == 0
    await user.gateway.database.assert_books_balance()
    return row


@pytest.mark.parametrize(("kind", "streamed"), SHAPES)
async def test_a_request_goes_out_under_it_and_costs_nothing_here(
    gateway: Gateway, upstream: Upstream, user: User, kind: Kind, streamed: bool
) -> None:
    body = kind.body(random.Random(kind.path))
    content = kind.content({**body, "stream": True} if streamed else body)
    response = await gateway.http.post(kind.url, headers=user.headers, **content)
    assert response.status_code == 200 and response.headers["x-gateway-byok"] == "true", response.text
    assert authorized(upstream, kind.upstream_path) == [OWN]
    assert set(authorized(upstream)) == {OWN}
    row = await settled(user, upstream)
    assert (row["status"], row["upstream_cost_nanos"] > 0) == ("completed", True)
    if kind.tells:
        assert '"cost":0,"user_balance_after":0}' in response.text
    receipt = (await gateway.http.get(f"/v1/receipts/{row['request_id']}", headers=user.headers)).json()
    assert receipt["byok"] is True and receipt["charge"]["charged"] == 0 < receipt["charge"]["upstream_cost"]


async def test_limits_count_and_budgets_do_not(gateway: Gateway, upstream: Upstream, user: User) -> None:
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"requests_per_minute": 2}}
    )
    spender = await scoped(user, {"read": ["*"], "write": ["*"]}, budget=0, budget_window="day")
    assert [(await spender.chat()).status_code for _ in range(3)] == [200, 200, 429]
    assert set(authorized(upstream)) == {OWN}


async def test_a_test_key_never_uses_it(gateway: Gateway, upstream: Upstream, user: User) -> None:
    testing = await scoped(user, {"read": ["*"], "write": ["*"]}, environment_tag="test")
    response = await testing.chat()
    assert response.status_code == 200 and "x-gateway-byok" not in response.headers
    assert authorized(upstream) == []
    assert (await testing.records())[0]["cost"] == 0


async def test_once_it_is_forgotten_the_operators_is_used_and_credits_are_due(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    assert (await user.chat()).status_code == 200
    assert (await ask(user, "DELETE", "/user/provider-key")).status_code == 200
    assert (await user.chat()).status_code == 402
    await gateway.admin("POST", "/admin/add_credits", json={"user_id": user.id, "credits": 1})
    assert (await user.chat()).json()["gateway_usage"]["cost"] > 0
    assert authorized(upstream, "/chat/completions") == [OWN, OPERATOR]


# When it is refused.


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("scenario", ["error-401", "error-402", "error-402-key-limit"])
async def test_a_refused_key_is_the_users_to_mend_and_alarms_nobody(
    gateway: Gateway,
    upstream: Upstream,
    user: User,
    capsys: pytest.CaptureFixture[str],
    scenario: str,
    streamed: bool,
) -> None:
    upstream.scenario = scenario
    response = await user.chat(stream=streamed)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "provider_key_refused"), (
        response.text
    )
    assert response.headers["x-gateway-byok"] == "true"
    row = await settled(user, upstream)
    assert (row["status"], row["error_code"]) == ("failed", "provider_key_refused")
    assert "upstream_refuses_operator" not in capsys.readouterr().out
    assert authorized(upstream) == [OWN]
    payer = await gateway.register(credits=1)
    assert (await payer.chat(stream=streamed)).status_code == 503
    assert "upstream_refuses_operator" in capsys.readouterr().out  # as it does where it is the operator's


async def test_a_refusal_inside_a_200_is_the_users_too(
    start_gateway: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_script() as upstream:
        gateway = await start_gateway(**live(upstream.url))
        upstream.say(Reply([b'{"error": {"code": 402, "message": "Insufficient credits"}}']))
        user = await sealed_by(gateway, KEY)
        response = await user.chat(model=TEXT)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "provider_key_refused")
        assert "upstream_refuses_operator" not in capsys.readouterr().out
        assert [sent.headers["authorization"] for sent in upstream.sent] == [OWN]


async def sealed_by(gateway: Gateway, key: str | None) -> User:
    """A user whose key was stored without being asked about; None: by nobody that we know."""
    user = await gateway.register()
    vault = (await gateway.app.state.service.ready()).vault
    stored = "sealed by nobody" if key is None else vault.encrypt(key)
    insert = "insert into public.provider_keys (user_id, encrypted_key, label) values ($1, $2, 'own')"
    await gateway.database.value(insert, user.id, stored)
    return user


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_key_that_cannot_be_read_is_never_replaced_by_the_operators(
    gateway: Gateway, upstream: Upstream, streamed: bool
) -> None:
    user = await sealed_by(gateway, None)
    await gateway.admin("POST", "/admin/add_credits", json={"user_id": user.id, "credits": 1})
    response = await user.chat(stream=streamed)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "provider_key_refused")
    assert upstream.inferences == 0
    row = await settled(user, upstream)
    assert (row["status"], row["settlement_source"]) == ("failed", "usage")


# What is asked afterwards is asked under it.


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_missing_cost_is_asked_for_under_it(
    gateway: Gateway, upstream: Upstream, user: User, streamed: bool
) -> None:
    upstream.scenario = "cost-null,generation-late;times=1"
    assert (await user.chat(stream=streamed)).status_code == 200
    row = await settled(user, upstream)
    assert row["settlement_source"] == "generation" and row["upstream_cost_nanos"] > 0
    assert authorized(upstream, "/generation") == [OWN, OWN] and set(authorized(upstream)) == {OWN}


async def test_what_an_abort_cost_is_asked_for_under_it(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    upstream.scenario = "abort;ms=20;tokens=60;times=1"
    await leave(user)
    row = await settled(user, upstream)
    assert (row["status"], row["settlement_source"]) == ("cancelled", "generation") and row[
        "upstream_cost_nanos"
    ] > 0
    assert set(authorized(upstream)) == {OWN} and len(authorized(upstream, "/generation")) >= 2


async def leave(user: User) -> None:
    body = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with user.gateway.http.stream(
        "POST", "/v1/chat/completions", headers=user.headers, json=body
    ) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                return


@pytest.mark.parametrize("removed", [False, True])
async def test_a_killed_process_is_swept_under_it_or_not_at_all(
    database: Database, upstream: Upstream, tmp_path: Path, removed: bool
) -> None:
    """A key that was removed meanwhile is gone: no other key knows that generation, so nobody is asked."""
    async with running_workers(database, upstream.url, tmp_path) as (gateway, pid):
        user = await owner_of_a_key(gateway)
        upstream.forget().scenario = "slow;ms=100;tokens=300"
        reading, begun = await start_stream(user)
        await begun.wait()
        noted = "select count(*) from public.usage_records where generation_id is not null"
        await eventually(lambda: database.value(noted), lambda value: value == 1)
        for worker in workers_of(pid):
            os.kill(worker, signal.SIGKILL)
        await asyncio.wait([reading])

        async def generating() -> int:
            return len(upstream.sandbox.state.in_flight)

        await eventually(generating, lambda value: value == 0, seconds=60)
        await eventually(lambda: is_ready(gateway.http), lambda ready: ready, seconds=90)
        if removed:
            assert (await ask(user, "DELETE", "/user/provider-key")).status_code == 200
        await database.age_holds()
        await gateway.admin("POST", "/internal/sweep")  # unless the workers' own loop came before
        await user.settled_record()
    row = (
        await database.rows(
            "select status, settlement_source, cost_nanos, upstream_cost_nanos from public.usage_records"
        )
    )[0]
    lookups = authorized(upstream, "/generation")
    if removed:
        assert lookups == [] and (row["status"], row["settlement_source"], row["cost_nanos"]) == (
            "expired",
            "none",
            0,
        )
    else:
        assert set(lookups) == {OWN} and (row["status"], row["settlement_source"], row["cost_nanos"]) == (
            "cancelled",
            "generation",
            0,
        )
        assert row["upstream_cost_nanos"] > 0
    await database.assert_books_balance()


async def test_a_key_removed_in_mid_stream_serves_what_it_has_begun(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    upstream.scenario = "slow;ms=50;tokens=20"
    waiting = asyncio.create_task(user.chat(stream=True))

    async def asked() -> int:
        return upstream.inferences

    await eventually(asked, lambda value: value == 1)
    assert (await ask(user, "DELETE", "/user/provider-key")).status_code == 200
    answer = await waiting
    assert answer.text.endswith("data: [DONE]\n\n") and '"cost":0,' in answer.text
    assert (await settled(user, upstream))["status"] == "completed"
    assert set(authorized(upstream)) == {OWN}


# With everything else.


async def test_a_changed_price_sends_it_again_under_it(start_gateway: Start) -> None:
    facts = {
        "error": {
            "message": "No endpoints",
            "http_status": 404,
            "availability": {"excluded_by": ["max_price"]},
        }
    }
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "cost": 0.0000123}
    body = {
        "id": "gen-1",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hi"}}],
        "usage": usage,
    }
    async with running_script() as upstream:
        gateway = await start_gateway(**live(upstream.url))
        upstream.say(Reply([orjson.dumps(body)]))
        user = await sealed_by(gateway, KEY)
        assert (await user.chat(model=TEXT)).status_code == 200
        upstream.say(Reply([orjson.dumps(facts)], status=404), Reply([orjson.dumps(body)]))
        upstream.factor = Decimal(3)
        response = await user.chat(model=TEXT, max_tokens=50)
        assert response.status_code == 200 and response.json()["gateway_usage"]["cost"] == 0, response.text
        assert [sent.headers["authorization"] for sent in upstream.sent] == [OWN, OWN]
        assert (await user.balance())["held"] == 0


async def test_its_answers_are_kept_and_what_they_cost_is_paid_once(
    gateway: Gateway, upstream: Upstream, user: User
) -> None:
    async def post(**headers: str) -> httpx.Response:
        content = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
        return await gateway.http.post(
            "/v1/chat/completions", headers={**user.headers, **headers}, json=content
        )

    first, again = [await post(**{"idempotency-key": "a", "x-gateway-cache": "true"}) for _ in range(2)]
    assert again.content == first.content and again.headers["idempotent-replayed"] == "true"
    hit = await post(**{"x-gateway-cache": "true"})
    assert hit.headers["x-gateway-cache"] == "HIT" and upstream.inferences == 1
    upstream.scenario = "provider-died"
    assert (await post(**{"idempotency-key": "b"})).status_code == 200
    row = (
        await gateway.database.rows(
            "select * from public.usage_records where user_id = $1 order by created_at desc limit 1", user.id
        )
    )[0]
    refused = await post(**{"idempotency-key": "b"})
    assert row["status"] == "failed" and row["upstream_cost_nanos"] > 0 == row["cost_nanos"]
    assert refused.json()["error"]["code"] == "idempotency_answer_not_kept"  # it has cost them upstream
    assert set(authorized(upstream)) == {OWN}


async def test_nothing_shows_it(
    gateway: Gateway, upstream: Upstream, user: User, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.scenario = "error-401"
    response = await user.chat()
    assert KEY not in response.text + str(response.headers) + capsys.readouterr().out
