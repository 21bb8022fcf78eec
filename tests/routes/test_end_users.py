"""A tenant's customers spend what the tenant allows each, to the last and not one more, and the tenant is
told before it is spent.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest

import db
from gateway.webhooks.deliveries import BATCH, Deliveries
from gateway.webhooks.sender import Sender
from security import new_key
from tests.support.gateway import ADMIN_KEY, Gateway, User
from tests.support.receiver import Receiver, verified
from tests.support.servers import eventually
from tests.support.users import PROVIDER_KEY, scoped
from tests.support.users import ask as manage

# Each request to this model costs half a credit.
CHAT = {"model": "sandbox/fixed-price", "messages": [{"role": "user", "content": "Hi"}]}
NAMED = [
    pytest.param("/v1/chat/completions", {**CHAT, "user": "ann"}, {}, id="chat"),
    pytest.param("/v1/chat/completions", {**CHAT, "user": "ann", "stream": True}, {}, id="chat-streamed"),
    pytest.param(
        "/v1/completions",
        {"model": "openai/gpt-4o-mini", "prompt": "Hi", "user": "ann"},
        {},
        id="completions",
    ),
    pytest.param(
        "/v1/responses", {"model": "openai/gpt-4o-mini", "input": "Hi", "user": "ann"}, {}, id="responses"
    ),
    pytest.param(
        "/v1/embeddings",
        {"model": "openai/text-embedding-3-small", "input": "Hi", "user": "ann"},
        {},
        id="embeddings",
    ),
    pytest.param(
        "/v1/messages", {**CHAT, "max_tokens": 10, "metadata": {"user_id": "ann"}}, {}, id="messages"
    ),
    pytest.param("/v1/chat/completions", {**CHAT, "user": "bob"}, {"x-end-user": "ann"}, id="header-first"),
    pytest.param(
        "/v1/messages",
        {**CHAT, "max_tokens": 10, "metadata": {"user_id": "bob"}},
        {"x-end-user": "ann"},
        id="header-messages",
    ),
]


@pytest.fixture
async def user(gateway: Gateway) -> User:
    return await gateway.register(credits=100)


async def budget(user: User, end_user: str, amount: float, window: str = "day") -> int:
    made = await manage(
        user, "POST", "/user/end-users", {"end_user": end_user, "budget": amount, "budget_window": window}
    )
    assert made.status_code == 201, made.text
    return int(made.json()["id"])


async def ask(tenant: User, end_user: str | None = None, **body: Any) -> httpx.Response:
    named = {} if end_user is None else {"user": end_user}
    return await tenant.gateway.http.post(
        "/v1/chat/completions", headers=tenant.headers, json={**CHAT, **named, **body}
    )


async def standing(user: User, end_user: str) -> dict[str, Any]:
    (row,) = (await manage(user, "GET", f"/user/end-users?end_user={end_user}")).json()["end_users"]
    return dict(row)


async def recorded(user: User) -> list[str | None]:
    rows = await user.gateway.database.rows(
        "select end_user from public.usage_records where user_id = $1 order by created_at", user.id
    )
    return [row["end_user"] for row in rows]


@pytest.mark.parametrize(("path", "body", "headers"), NAMED)
async def test_a_request_counts_for_whom_it_names(
    user: User, path: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    await budget(user, "ann", 10)
    response = await user.gateway.http.post(path, headers={**user.headers, **headers}, json=body)
    assert response.status_code == 200, response.text
    await user.settled_record()
    assert await recorded(user) == ["ann"]
    row = await standing(user, "ann")
    assert row["spent"] == (await user.records())[0]["cost"] > 0 == row["held"]
    receipt = await manage(user, "GET", f"/v1/receipts/{response.headers['x-request-id']}")
    assert receipt.json()["end_user"] == "ann"


async def test_a_budget_by_name_comes_before_the_one_for_everybody(user: User) -> None:
    await budget(user, "*", 0.5)
    await budget(user, "ann", 1)
    assert [(await ask(user, "ann")).status_code for _ in range(3)] == [200, 200, 402]
    assert [(await ask(user, "bob")).status_code for _ in range(2)] == [200, 402]
    assert [(await ask(user, "eve")).status_code for _ in range(2)] == [200, 402]
    assert [(await ask(user)).status_code for _ in range(2)] == [
        200,
        200,
    ]  # for nobody: no end user's budget applies


async def test_what_is_used_up_is_a_402_that_says_whose(user: User) -> None:
    await budget(user, "ann", 0.5)
    before = (await user.balance())["credits"]
    for streamed in (False, True):
        await ask(user, "ann")
        refused = await ask(user, "ann", stream=streamed)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (402, "end_user_budget_exceeded")
        assert "budget of this end user" in error["message"] and refused.headers["x-should-retry"] == "false"
    assert (await ask(user, "bob")).status_code == 200
    assert (await user.balance())["credits"] == before - 1


@pytest.mark.parametrize("end_user", ["ann", "bob"])
async def test_fifty_at_once_spend_it_to_the_last(user: User, end_user: str) -> None:
    await user.gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"concurrency": None, "burst": None}}
    )
    await budget(user, "ann", 3.5)
    await budget(user, "*", 3.5)
    before = (await user.balance())["credits"]
    answers = await asyncio.gather(*(ask(user, end_user, stream=number % 2 == 0) for number in range(50)))
    assert Counter(answer.status_code for answer in answers) == {200: 7, 402: 43}
    row = await standing(user, end_user)
    assert (row["spent"], row["held"], row["remaining"]) == (3.5, 0, 0)
    assert (await user.balance())["credits"] == before - 3.5
    await user.gateway.database.assert_books_balance()


async def test_a_new_window_begins_at_nothing(user: User) -> None:
    await budget(user, "ann", 0.5)
    assert [(await ask(user, "ann")).status_code for _ in range(2)] == [200, 402]
    await user.gateway.database.value(
        "update public.end_user_usage set budget_since = budget_since - interval '1 day'"
    )
    assert [(await ask(user, "ann")).status_code for _ in range(2)] == [200, 402]
    assert (await standing(user, "ann"))["spent"] == 0.5


async def test_a_budget_leaves_what_a_failure_did_not_cost(user: User) -> None:
    await budget(user, "ann", 0.5)
    failed = await ask(user, "ann", model="sandbox/fixed-price:error-500")
    assert failed.status_code == 502
    row = await standing(user, "ann")
    assert (row["spent"], row["held"]) == (0, 0)
    assert (await ask(user, "ann")).status_code == 200


async def test_what_leaves_less_output_than_asked_for_grants_less(user: User) -> None:
    await budget(user, "ann", 0.0001)
    response = await ask(user, "ann", model="openai/gpt-4o-mini")
    assert response.status_code == 200 and 0 < int(response.headers["x-gateway-max-tokens"]) < 1000
    explicit = await ask(user, "ann", model="openai/gpt-4o-mini", max_tokens=16_000)
    assert (explicit.status_code, explicit.json()["error"]["code"]) == (402, "end_user_budget_exceeded")
    assert explicit.json()["gateway"]["affordable_max_tokens"] > 0


async def test_budgets_are_their_tenants_own(user: User) -> None:
    other = await user.gateway.register(credits=10)
    await budget(user, "ann", 0)
    assert (await ask(user, "ann")).status_code == 402
    assert (await ask(other, "ann")).status_code == 200
    testing = await scoped(user, {"read": ["*"], "write": ["*"]}, environment_tag="test")
    assert (await ask(testing, "ann")).status_code == 200  # costs nothing


async def test_under_an_own_upstream_key_nothing_is_spent_of_them(user: User) -> None:
    await budget(user, "ann", 0)
    assert (await manage(user, "PUT", "/user/provider-key", {"key": PROVIDER_KEY})).status_code == 200
    assert (await ask(user, "ann")).status_code == 200
    assert (await standing(user, "ann"))["spent"] == 0 and await recorded(user) == ["ann"]


# Names.


@pytest.mark.parametrize(
    ("headers", "body", "param"),
    [
        ({}, {"user": "x" * 257}, "user"),
        ({}, {"user": "a\x00b"}, "user"),
        ({}, {"user": "a\nb"}, "user"),
        ({}, {"user": 7}, "user"),
        ({}, {"user": ["ann"]}, "user"),
        ({"x-end-user": b""}, {"user": "ann"}, "x-end-user"),
        ({"x-end-user": b"x" * 257}, {}, "x-end-user"),
        ({"x-end-user": b"a\tb"}, {}, "x-end-user"),
    ],
)
async def test_what_is_no_name_is_refused(
    user: User, headers: dict[str, bytes], body: dict[str, Any], param: str
) -> None:
    for key, status in ((user.key, 400), (new_key("live"), 401)):  # strangers learn nothing of what is wrong
        sent: Any = {"authorization": f"Bearer {key}", **headers}
        response = await user.gateway.http.post("/v1/chat/completions", headers=sent, json={**CHAT, **body})
        assert response.status_code == status, response.text
        if status == 400:
            assert response.json()["error"]["param"] == param
    assert await user.records() == []


async def test_anthropics_name_is_refused_in_anthropics_form(user: User) -> None:
    body = {**CHAT, "max_tokens": 10, "metadata": {"user_id": "x" * 257}}
    response = await user.gateway.http.post("/v1/messages", headers=user.headers, json=body)
    assert response.status_code == 400 and response.json()["type"] == "error" and "user_id" in response.text


@pytest.mark.parametrize("name", ["x" * 256, "Müller & 日本", "a b", "*"])
async def test_any_other_name_is_a_name_everywhere(user: User, name: str) -> None:
    assert (await ask(user, name)).status_code == 200
    sent: Any = {**user.headers, "x-end-user": name.encode()}
    assert (await user.gateway.http.post("/v1/chat/completions", headers=sent, json=CHAT)).status_code == 200
    assert await recorded(user) == [name, name]


async def test_a_name_in_latin_1_is_read_as_such(user: User) -> None:
    sent: Any = {**user.headers, "x-end-user": "Müller".encode("latin-1")}
    assert (await user.gateway.http.post("/v1/chat/completions", headers=sent, json=CHAT)).status_code == 200
    assert await recorded(user) == ["Müller"]


@pytest.mark.parametrize("body", [{"user": ""}, {"user": None}, {}])
async def test_no_name_is_nobody(user: User, body: dict[str, Any]) -> None:
    assert (await ask(user, **body)).status_code == 200
    assert await recorded(user) == [None]


# Soft limits.


async def test_a_level_that_is_reached_is_told_once_and_delivered_by_the_sweep(
    user: User,
    receiver: Receiver,
    trusting: Callable[..., Sender],
) -> None:
    runtime = user.gateway.app.state.service.runtime
    runtime.deliveries = Deliveries(
        lambda only: db.claim_deliveries(runtime.client, limit=BATCH, lease_seconds=90, delivery_id=only),
        lambda order: db.finish_delivery(runtime.client, order),
        decrypt=runtime.vault.decrypt,
        open_sender=trusting,
    )
    made = (await manage(user, "POST", "/user/webhooks", {"url": receiver.url})).json()
    await budget(user, "ann", 2)
    levels = []
    for number in range(1, 5):
        assert (await ask(user, "ann", stream=number % 2 == 0)).status_code == 200
        events = (await manage(user, "GET", "/user/budget-events")).json()["events"]
        levels.append(max((event["level"] for event in events), default=0))
        assert len(events) == len(set(levels) - {0})
    assert levels == [0, 50, 50, 100]
    assert receiver.got == []

    async def delivered() -> int:
        await user.gateway.admin("POST", "/internal/sweep")
        return len(receiver.got)

    await eventually(delivered, lambda value: value == 2)
    told = []
    for headers, body in receiver.got:
        assert verified(made["secret"], headers, body)
        told.append(orjson.loads(body)["data"])
    assert sorted(data["level"] for data in told) == [50, 100]
    assert {data["end_user"] for data in told} == {"ann"}
    await user.gateway.admin("POST", "/internal/sweep")
    assert len(receiver.got) == 2


async def test_a_report_says_what_each_has_used(gateway: Gateway) -> None:
    tenant, other = await gateway.register(credits=1), await gateway.register(credits=1)
    for name in ("ann", "ann", "bob", None):
        assert (await ask(tenant, name)).status_code == 200
    assert (await ask(other, "ann")).status_code == 200
    report = (await manage(tenant, "GET", "/user/usage?group_by=end_user&bucket=none")).json()
    assert {row["group"]: row["requests"] for row in report["rows"]} == {"ann": 2, "bob": 1, None: 1}
    whole = (await manage(tenant, "GET", "/user/usage?group_by=none&bucket=none")).json()["rows"][0]
    for name in ("requests", "prompt_tokens", "completion_tokens", "cost", "upstream_cost"):
        assert round(sum(row[name] for row in report["rows"]), 9) == round(whole[name], 9) > 0
    seen = await gateway.admin("GET", f"/admin/usage?group_by=end_user&bucket=none&user_id={tenant.id}")
    assert seen["rows"] == report["rows"]
    everybody = await gateway.http.get(
        "/admin/usage?group_by=end_user", headers={"authorization": f"Bearer {ADMIN_KEY}"}
    )
    assert (everybody.status_code, everybody.json()["error"]["param"]) == (400, "user_id")
    records = (await manage(tenant, "GET", "/user/usage/records")).json()["records"]
    assert [record["end_user"] for record in records] == [None, "bob", "ann", "ann"]
