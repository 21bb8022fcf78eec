"""A request costs two round trips to the database, whatever is switched on; one that is answered from storage
costs one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx
import orjson
import pytest

from tests.support.database import Database
from tests.support.database_link import DatabaseLink, database_link
from tests.support.gateway import Gateway, User, live
from tests.support.upstream import TEXT, Reply, Upstream, running_script
from tests.support.users import PROVIDER_KEY, ask, scoped

Start = Callable[..., Awaitable[Gateway]]
RESTRICTED = {
    "ip_allowlist": ["127.0.0.0/8"],
    "domain_referrers": ["*.example.com"],
    "allowed_models": ["openai/*", TEXT],
    "max_requests": 1000,
    "expiration_days": 7,
    "budget": 0.001,
    "budget_window": "day",
    "cache_ttl_seconds": 600,
}
KEY_LIMITS = """
insert into public.rate_limit_configs (subject, subject_id, requests_per_minute, requests_per_hour,
requests_per_day,
                                       tokens_per_minute, tokens_per_hour, tokens_per_day)
select 'key', id, 500, 5000, 50000, 500000, 5000000, 50000000 from public.api_keys_new where user_id = $1
"""
USER_LIMITS = {
    "requests_per_minute": 600,
    "requests_per_hour": 6000,
    "requests_per_day": 60000,
    "tokens_per_minute": 600_000,
    "tokens_per_hour": 6_000_000,
    "tokens_per_day": 60_000_000,
    "burst": 100,
    "concurrency": 50,
}
PLAN = {
    "slug": "all",
    "name": "All",
    "daily_request_limit": 1000,
    "monthly_request_limit": 10_000,
    "daily_token_limit": 10**7,
    "monthly_token_limit": 10**8,
}


@pytest.fixture
async def link(database: Database) -> AsyncIterator[DatabaseLink]:
    async with database_link(database) as opened:
        yield opened


@dataclass
class Customer:
    """A user with everything that there is to switch on."""

    user: User
    link: DatabaseLink
    asked: int = 0

    async def post(self, number: int | None = None, **body: Any) -> tuple[httpx.Response, int]:
        """The answer to a question of its own, or to that of this number again, and the round trips that it
        took.
        """
        self.asked += 1
        question = str(self.asked if number is None else number)
        headers = {
            **self.user.headers,
            "idempotency-key": question,
            "x-end-user": "ann",
            "referer": "https://app.example.com/",
            "x-forwarded-for": "192.0.2.1",
        }
        return await self.send(headers, question, **body)

    async def send(self, headers: dict[str, str], question: str, **body: Any) -> tuple[httpx.Response, int]:
        content = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": question}], **body}
        before = self.link.round_trips
        response = await self.user.gateway.http.post("/v1/chat/completions", headers=headers, json=content)
        return response, self.link.round_trips - before


async def customer_of(
    gateway: Gateway, link: DatabaseLink, *, own_key: bool = False, budget: float = 0.001
) -> Customer:
    user = await gateway.register(credits=10)
    admin = gateway.admin
    plan = await admin("POST", "/admin/plans", json=PLAN)
    await admin(
        "POST", "/admin/assign-plan", json={"user_id": user.id, "plan_id": plan["id"], "duration_months": 1}
    )
    for end_user in ("*", "ann"):
        made = await ask(
            user, "POST", "/user/end-users", {"end_user": end_user, "budget": budget, "budget_window": "week"}
        )
        assert made.status_code == 201, made.text
    assert (
        await ask(user, "POST", "/user/webhooks", {"url": "https://hooks.example.com/"})
    ).status_code == 201
    if own_key:
        assert (await ask(user, "PUT", "/user/provider-key", {"key": PROVIDER_KEY})).status_code == 200
    restricted = await scoped(user, {"read": ["chat"], "write": ["chat"]}, **RESTRICTED)
    await admin("POST", "/admin/limit", json={"user_id": user.id, "rate_limits": USER_LIMITS})
    await gateway.database.value(KEY_LIMITS, user.id)
    return Customer(restricted, link)


@pytest.mark.parametrize("own_key", [False, True], ids=["credits", "own-key"])
async def test_two_with_everything_switched_on_at_once(
    start_gateway: Start, link: DatabaseLink, upstream: Upstream, own_key: bool
) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    customer = await customer_of(gateway, link, own_key=own_key, budget=0.00018)  # a level of it is reached
    for _ in range(3):
        assert (await customer.post())[
            0
        ].status_code == 200  # connections, statements and models are there from now on
    for streamed in (False, True):
        answer, count = await customer.post(stream=streamed)
        assert (answer.status_code, answer.headers["x-gateway-cache"], count) == (200, "MISS", 2), answer.text
        assert answer.headers.get("x-gateway-byok") == ("true" if own_key else None)
        replay, count = await customer.post(customer.asked, stream=streamed)
        assert (
            replay.headers["idempotent-replayed"] == "true"
            and replay.content == answer.content
            and count == 1
        )
        hit, count = await customer.send(
            {**customer.user.headers, "referer": "https://app.example.com/"},
            str(customer.asked - 1),
            stream=streamed,
        )
        assert (hit.headers.get("x-gateway-cache"), count) == ("HIT", 1)
    upstream.scenario = "slow;ms=120;tokens=20"
    answer, count = await customer.post(stream=True)
    assert (answer.status_code, count) == (
        200,
        3,
    )  # it ran for more than two seconds: its generation id was stored
    rows = await gateway.database.rows(
        "select has_end_user_budget, has_idempotency_key, byok from public.usage_records where not cache_hit"
    )
    assert {tuple(row.values()) for row in rows} == {(not own_key, True, own_key)}
    levels = await gateway.database.value("select count(*) from public.budget_events")
    assert levels == await gateway.database.value("select count(*) from public.webhook_deliveries")
    assert levels > 0 or own_key  # what was told was told within them
    await gateway.database.assert_books_balance()


async def test_refusals_take_one(start_gateway: Start, link: DatabaseLink, upstream: Upstream) -> None:
    gateway = await start_gateway(database_url=link.url, **live(upstream.url))
    customer = await customer_of(gateway, link)
    for _ in range(3):
        assert (await customer.post())[0].status_code == 200
    for body, status in (
        ({"max_tokens": 16_000}, 402),
        ({"model": "anthropic/claude-haiku-4.5"}, 403),
        ({"max_tokens": "many"}, 400),
    ):
        answer, count = await customer.post(**body)
        assert (answer.status_code, count) == (status, 1), answer.text
    first = customer.asked + 1
    upstream.scenario = "slow-first-token;seconds=0.3"
    waiting = asyncio.create_task(customer.post())
    while upstream.inferences < 4:  # noqa: ASYNC110  # the upstream says so
        await asyncio.sleep(0.01)
    answer, count = await customer.post(first)
    assert (answer.status_code, count) == (409, 1)
    assert (await waiting)[0].status_code == 200


async def test_a_raised_hold_takes_one_more(start_gateway: Start, link: DatabaseLink) -> None:
    refusal = {
        "error": {
            "message": "No endpoints",
            "http_status": 404,
            "availability": {"excluded_by": ["max_price"]},
        }
    }
    body = {
        "id": "gen-1",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hi"}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "cost": 0.0000123},
    }
    async with running_script() as upstream:
        gateway = await start_gateway(database_url=link.url, **live(upstream.url))
        upstream.say(Reply([orjson.dumps(body)]))
        customer = await customer_of(gateway, link)
        for _ in range(3):
            assert (await customer.post(model=TEXT))[0].status_code == 200
        upstream.say(Reply([orjson.dumps(refusal)], status=404), Reply([orjson.dumps(body)]))
        upstream.factor = Decimal(2)
        answer, count = await customer.post(model=TEXT)
        assert (answer.status_code, count) == (200, 3), answer.text
