"""What a caller sees of their key, account and requests: OpenRouter's shapes, receipts and quotes, from our
own books.
"""

from __future__ import annotations

import asyncio
import datetime
import json
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from tests.support.gateway import Gateway, User
from tests.support.upstream import Upstream
from tests.support.users import CHAT_BODY, quote, scoped

NANO = Decimal("0.000000001")
READERS = [
    "/v1/key",
    "/v1/credits",
    "/v1/generation?id=gen-1786988078-x",
    "/v1/receipts/0199f0a0-0000-7000-8000-000000000000",
]


async def exact(user: User, path: str) -> Any:
    """An answer's JSON with exact numbers."""
    response = await user.gateway.http.get(path, headers=user.headers)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_float=Decimal)


@pytest.mark.parametrize("path", READERS)
async def test_strangers_and_keys_without_the_scope_see_nothing(gateway: Gateway, path: str) -> None:
    user = await gateway.register()
    assert (await gateway.http.get(path)).status_code == 401
    chats = await scoped(user, {"read": ["profile"], "write": ["chat"]})
    refused = await gateway.http.get(path, headers=chats.headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")


async def test_the_older_name_of_the_key_still_works(gateway: Gateway) -> None:
    user = await gateway.register()
    assert await exact(user, "/api/v1/auth/key") == await exact(user, "/api/v1/key")


@pytest.mark.parametrize(
    "path", ["/v1/key", "/v1/credits", "/v1/models/count", "/v1/models/openai/gpt-4o-mini/endpoints"]
)
async def test_openrouters_paths_work_too(gateway: Gateway, path: str) -> None:
    user = await gateway.register()
    first, second = [await gateway.http.get(prefix + path, headers=user.headers) for prefix in ("", "/api")]
    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()


async def test_a_key_shows_its_budget_and_what_it_has_used(gateway: Gateway) -> None:
    user = await gateway.register()
    limited = await scoped(user, {"read": ["*"], "write": ["*"]}, budget=2, budget_window="week")
    before = (await exact(limited, "/v1/key"))["data"]
    assert (before["limit"], before["limit_remaining"], before["limit_reset"], before["usage"]) == (
        2,
        2,
        "weekly",
        0,
    )
    await user.chat()
    cost = Decimal((await limited.chat()).headers["x-gateway-cost"])
    data = (await exact(limited, "/v1/key"))["data"]
    assert {
        name: data[name] for name in ("usage", "usage_daily", "usage_weekly", "usage_monthly")
    } == dict.fromkeys(("usage", "usage_daily", "usage_weekly", "usage_monthly"), cost)
    assert data["limit_remaining"] == 2 - cost
    assert data["label"] == f"gw_live_...{limited.key[-4:]}"
    assert (data["byok_usage"], data["include_byok_in_limit"], data["is_management_key"]) == (0, False, False)
    assert (data["rate_limit"]["requests"], data["rate_limit"]["interval"]) == (-1, "1m") and data[
        "rate_limit"
    ]["note"]
    assert data["free_model_daily_requests"] == {"limit": 0, "remaining": 0, "used": 0} and data[
        "allowed_data_regions"
    ] == ["global"]
    own = (await exact(user, "/v1/key"))["data"]
    assert (own["limit"], own["limit_remaining"], own["limit_reset"], own["is_free_tier"]) == (
        None,
        None,
        None,
        True,
    )


async def test_what_a_key_used_is_the_same_before_and_after_it_is_summed_up(gateway: Gateway) -> None:
    user = await gateway.register()
    await user.chat()
    await user.chat()
    before = await exact(user, "/v1/key")
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    async with gateway.database.owner() as owner:
        await owner.execute("alter table public.usage_records disable trigger all")
        await owner.execute("update public.usage_records set created_at = $1", moment)
        await owner.execute("alter table public.usage_records enable trigger all")
    await gateway.admin("GET", "/internal/sweep")
    assert await gateway.database.value("select count(*) from public.usage_slots") == 1
    after = await exact(user, "/v1/key")
    assert after["data"]["usage"] == before["data"]["usage"] > 0


async def test_credits_less_usage_are_the_balance_whatever_was_booked(gateway: Gateway) -> None:
    user = await gateway.register(credits="3.000000007")
    for _ in range(3):
        await user.chat()
    record = (await user.records())[0]
    await gateway.admin("POST", "/admin/refund", json={"request_id": record["request_id"]})
    await gateway.admin(
        "POST", "/admin/adjust_credits", json={"user_id": user.id, "credits": -1.5, "reason": "too much"}
    )
    await gateway.admin(
        "POST", "/admin/adjust_credits", json={"user_id": user.id, "credits": 0.25, "reason": "too little"}
    )
    data = (await exact(user, "/v1/credits"))["data"]
    assert data["total_credits"] - data["total_usage"] == Decimal(
        str((await exact(user, "/user/balance"))["credits"])
    )
    charged = await gateway.database.value("select sum(cost_nanos) from public.usage_records")
    refunded = await gateway.database.value(
        "select sum(amount_nanos) from public.credit_transactions where kind = 'refund'"
    )
    assert data["total_usage"] == (charged - refunded) * NANO
    assert data["total_credits"] == Decimal("11.750000007")


async def test_a_generation_is_found_by_either_id_and_by_its_owner_only(gateway: Gateway) -> None:
    user, other = await gateway.register(), await gateway.register()
    response = await user.chat()
    generation, request = response.headers["x-generation-id"], response.headers["x-request-id"]
    for wanted in (generation, request, request.upper()):
        data = (await exact(user, f"/v1/generation?id={wanted}"))["data"]
        assert (data["id"], data["request_id"], data["model"]) == (generation, request, "openai/gpt-4o-mini")
        assert data["total_cost"] == data["usage"] == Decimal(response.headers["x-gateway-cost"])
        assert data["native_tokens_prompt"] == response.json()["usage"]["prompt_tokens"]
        assert (data["cancelled"], data["streamed"], data["is_byok"], data["finish_reason"]) == (
            False,
            False,
            False,
            "stop",
        )
        refused = await gateway.http.get(f"/v1/generation?id={wanted}", headers=other.headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "id")


@pytest.mark.parametrize(
    "wanted",
    [
        "gen-1786988078-unknown",
        "gen-unknown",
        "gen-9999999999-x",
        "%00",
        "'; drop table users; --",
        "x" * 256,
    ],
)
async def test_an_unknown_generation_is_not_found(gateway: Gateway, wanted: str) -> None:
    user = await gateway.register()
    assert (await gateway.http.get(f"/v1/generation?id={wanted}", headers=user.headers)).status_code == 404


async def test_an_old_generation_is_found_by_the_time_in_its_id_alone(gateway: Gateway) -> None:
    user = await gateway.register()
    for _ in range(2):
        await user.chat()
    first, second = [record["request_id"] for record in await user.records()]
    then = datetime.datetime(2026, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)
    async with gateway.database.owner() as owner:
        await owner.execute("alter table public.usage_records disable trigger all")
        for request_id, generation_id in (
            (first, f"gen-{int(then.timestamp()) + 100}-abc"),
            (second, "gen-abc"),
        ):
            await owner.execute(
                "update public.usage_records set created_at = $2, generation_id = $3 where request_id = $1",
                request_id,
                then,
                generation_id,
            )
        await owner.execute("alter table public.usage_records enable trigger all")
    assert (await exact(user, f"/v1/generation?id=gen-{int(then.timestamp()) + 100}-abc"))["data"][
        "request_id"
    ] == first
    assert (await gateway.http.get("/v1/generation?id=gen-abc", headers=user.headers)).status_code == 404


async def test_a_request_that_still_runs_has_a_receipt_and_no_generation(gateway: Gateway) -> None:
    user = await gateway.register()
    completions: Any = user.sdk().chat.completions.with_streaming_response
    slow = {"x-sandbox-scenario": "slow;ms=400;tokens=8"}
    async with completions.create(**CHAT_BODY, stream=True, extra_headers=slow) as running:
        request_id = running.headers["x-request-id"]
        receipt = await exact(user, f"/v1/receipts/{request_id}")
        assert (receipt["status"], receipt["charge"], receipt["tokens"], receipt["ending"]) == (
            "pending",
            None,
            None,
            None,
        )
        assert receipt["hold"]["amount"] > 0
        assert "not settled" in receipt["message"]
        refused = await gateway.http.get(f"/v1/generation?id={request_id}", headers=user.headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "generation_pending")


async def test_a_receipt_adds_up_and_lists_its_refunds(start_gateway: Any) -> None:
    gateway = await start_gateway(price_markup="1.25")
    user, other = await gateway.register(), await gateway.register()
    request_id = (await user.chat(max_tokens=30)).headers["x-request-id"]
    await gateway.admin(
        "POST", "/admin/refund", json={"request_id": request_id, "credits": 0.000000002, "reason": "sorry"}
    )
    receipt = await exact(user, f"/v1/receipts/{request_id}")
    charge = receipt["charge"]
    assert (
        receipt["status"],
        receipt["ending"]["settlement_source"],
        receipt["ending"]["finish_reason"],
    ) == (
        "completed",
        "usage",
        "length",
    )
    assert Decimal(str(charge["markup"])) == Decimal("1.25")
    assert 0 <= charge["charged"] - charge["upstream_cost"] * Decimal("1.25") < NANO
    assert charge["markup_amount"] == charge["charged"] - charge["upstream_cost"] > 0
    assert receipt["hold"]["amount"] >= charge["charged"]
    assert receipt["hold"]["granted_output_tokens"] == 30
    assert charge["refunded"] == 2 * NANO
    (refund,) = receipt["refunds"]
    assert (refund["amount"], refund["reason"]) == (2 * NANO, "sorry")
    assert charge["balance_after"] == Decimal("10") - charge["charged"]
    basis = {
        name: Decimal(text) for name, text in receipt["hold"]["price_basis"].items() if isinstance(text, str)
    }
    held = (basis["fixed_nanos"] + basis["output_nanos"] * 30) * Decimal("1.25")
    assert 0 <= receipt["hold"]["amount"] / NANO - held < 1
    assert receipt["timings"]["latency_ms"] >= 0
    assert receipt["timings"]["settled_at"] >= receipt["timings"]["created_at"]
    assert receipt["tokens"]["prompt"] > 0
    for path in (f"/v1/receipts/{request_id}", f"/v1/receipts/{uuid4()}"):
        refused = await gateway.http.get(path, headers=other.headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "request_id")
    malformed = await gateway.http.get("/v1/receipts/1", headers=user.headers)
    assert (malformed.status_code, malformed.json()["error"]["param"]) == (400, "request_id")


async def test_a_test_keys_receipt_says_that_it_is_free(gateway: Gateway) -> None:
    user = await gateway.register(environment="test")
    request_id = (await user.chat()).headers["x-request-id"]
    receipt = await exact(user, f"/v1/receipts/{request_id}")
    assert (receipt["charge"]["charged"], receipt["environment"]) == (0, "test")
    assert "test key" in receipt["message"]


# Quotes.


async def test_a_quote_is_what_the_request_then_holds_and_changes_nothing(start_gateway: Any) -> None:
    gateway = await start_gateway(price_markup="1.1")
    user = await gateway.register()
    before = await user.balance()
    response = await quote(user, {"body": CHAT_BODY, "output_tokens": 10})
    assert response.status_code == 200, response.text
    quoted = json.loads(response.text, parse_float=Decimal)
    assert (quoted["affordable"], quoted["reason"], quoted["max_output_tokens"], quoted["free"]) == (
        True,
        None,
        50,
        False,
    )
    assert quoted["models"] == ["openai/gpt-4o-mini"]
    assert 0 < quoted["estimated_cost"] < quoted["would_hold"]
    assert Decimal(str(quoted["markup"])) == Decimal("1.1")
    assert {"fixed_nanos", "output_nanos", "max_price"} == quoted["price_basis"].keys()
    assert await user.balance() == before
    assert await user.records() == []
    content = json.dumps(CHAT_BODY, separators=(",", ":"))
    sent = await gateway.http.post(
        "/v1/chat/completions",
        headers={**user.headers, "content-type": "application/json"},
        content=content.encode(),
    )
    receipt = await exact(user, f"/v1/receipts/{sent.headers['x-request-id']}")
    assert receipt["hold"]["amount"] == quoted["would_hold"]


async def test_a_quote_says_what_could_be_afforded(gateway: Gateway) -> None:
    user = await gateway.register()
    poor = await scoped(user, {"read": ["*"], "write": ["*"]}, budget=0.00001, budget_window="day")
    explicit = (await quote(poor, {"body": CHAT_BODY})).json()
    assert (explicit["affordable"], explicit["reason"], explicit["max_output_tokens"]) == (
        False,
        "budget_exceeded",
        0,
    )
    assert explicit["would_hold"] > explicit["available"] == 0.00001
    await gateway.admin(
        "POST", "/admin/adjust_credits", json={"user_id": user.id, "credits": -9.9999, "reason": "less"}
    )
    open_ended = (
        await quote(user, {"body": {name: CHAT_BODY[name] for name in ("model", "messages")}})
    ).json()
    assert open_ended["affordable"]
    assert 16 <= open_ended["max_output_tokens"] < 4096
    await gateway.admin(
        "POST", "/admin/adjust_credits", json={"user_id": user.id, "credits": -0.0001, "reason": "nothing"}
    )
    assert (await quote(user, {"body": CHAT_BODY})).json()["reason"] == "insufficient_credits"


@pytest.mark.parametrize("limit", [50, 16_000, None])
async def test_a_quote_that_is_not_affordable_says_what_is_needed_as_the_refusal_does(
    gateway: Gateway, limit: int | None
) -> None:
    user = await gateway.register()
    await gateway.admin(
        "POST", "/admin/adjust_credits", json={"user_id": user.id, "credits": -9.99994, "reason": "less"}
    )
    long = [{"role": "user", "content": "Say hello. " * (100 if limit is None else 1)}]
    body: dict[str, Any] = {"model": "openai/gpt-4o-mini", "messages": long} | (
        {} if limit is None else {"max_tokens": limit}
    )
    quoted = (await quote(user, {"body": body})).json()
    refused = await gateway.http.post("/v1/chat/completions", headers=user.headers, json=body)
    told, error = refused.json()["gateway"], refused.json()["error"]
    assert (quoted["affordable"], refused.status_code, quoted["reason"]) == (False, 402, error["code"])
    assert (quoted["needed"], quoted["available"], quoted["affordable_max_tokens"]) == (
        told["needed"],
        told["available"],
        told["affordable_max_tokens"],
    )
    assert (
        0 < quoted["estimated_cost"] <= quoted["would_hold"]
        and quoted["available"] < quoted["needed"] <= quoted["would_hold"]
    )
    assert quoted["message"].startswith(error["message"])
    if quoted["affordable_max_tokens"]:
        again = (await quote(user, {"body": {**body, "max_tokens": quoted["affordable_max_tokens"]}})).json()
        assert (again["affordable"], again["affordable_max_tokens"]) == (True, None)


async def test_a_quote_for_a_model_that_is_not_allowed_still_says_what_it_would_hold(
    gateway: Gateway,
) -> None:
    user = await gateway.register()
    narrow = await scoped(user, {"read": ["*"], "write": ["*"]}, allowed_models=["anthropic/*"])
    refused, allowed = (
        (await quote(narrow, {"body": CHAT_BODY})).json(),
        (await quote(user, {"body": CHAT_BODY})).json(),
    )
    assert (refused["affordable"], refused["affordable_max_tokens"], refused["would_hold"]) == (
        False,
        None,
        allowed["would_hold"],
    )
    assert refused["message"].startswith("This API key or plan does not allow this model.")
    testing = await scoped(
        user, {"read": ["*"], "write": ["*"]}, allowed_models=["anthropic/*"], environment_tag="test"
    )
    free = (await quote(testing, {"body": CHAT_BODY})).json()
    assert (free["reason"], free["free"], free["would_hold"]) == ("model_not_allowed", True, 0)


async def test_a_quote_knows_the_keys_models_and_its_number_of_requests(gateway: Gateway) -> None:
    user = await gateway.register()
    narrow = await scoped(user, {"read": ["*"], "write": ["*"]}, allowed_models=["anthropic/*"])
    assert (await quote(narrow, {"body": CHAT_BODY})).json()["reason"] == "model_not_allowed"
    once = await scoped(user, {"read": ["*"], "write": ["*"]}, max_requests=1)
    assert (await quote(once, {"body": CHAT_BODY})).json()["affordable"]
    await once.chat()
    assert (await quote(once, {"body": CHAT_BODY})).json()["reason"] == "key_request_limit_exceeded"


async def test_a_test_keys_quote_is_free(gateway: Gateway) -> None:
    user = await gateway.register(environment="test")
    body = (await quote(user, {"body": CHAT_BODY})).json()
    assert (body["free"], body["affordable"], body["would_hold"], body["estimated_cost"]) == (
        True,
        True,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("completions", {"model": "openai/gpt-4o-mini", "prompt": "Hello", "max_tokens": 20}),
        ("responses", {"model": "openai/gpt-4o-mini", "input": "Hello", "max_output_tokens": 20}),
        (
            "messages",
            {
                "model": "openai/gpt-4o-mini",
                "messages": CHAT_BODY["messages"],
                "max_tokens": 20,
                "metadata": {"user_id": "x"},
            },
        ),
    ],
)
async def test_every_endpoint_that_takes_json_can_be_quoted(
    gateway: Gateway, endpoint: str, body: dict[str, Any]
) -> None:
    user = await gateway.register()
    quoted = (await quote(user, {"endpoint": endpoint, "body": body})).json()
    assert (quoted["affordable"], quoted["max_output_tokens"]) == (True, 20)
    content = json.dumps(body, separators=(",", ":")).encode()
    headers = {**user.headers, "content-type": "application/json"}
    sent = await gateway.http.post(f"/v1/{endpoint}", headers=headers, content=content)
    assert sent.status_code == 200, sent.text
    receipt = await exact(user, f"/v1/receipts/{sent.headers['x-request-id']}")
    assert receipt["hold"]["amount"] == Decimal(str(quoted["would_hold"]))


async def test_a_body_with_fractions_is_quoted_as_it_would_be_held(gateway: Gateway) -> None:
    user = await gateway.register()
    body = (
        b'{"model":"openai/gpt-4o-mini","messages":[{"role":"user","content":"Hi"}],'
        b'"max_tokens":20,"temperature":0.70,"top_p":0.5}'
    )
    headers = {**user.headers, "content-type": "application/json"}
    response = await gateway.http.post("/v1/quote", headers=headers, content=b'{"body":' + body + b"}")
    assert response.status_code == 200, response.text
    sent = await gateway.http.post("/v1/chat/completions", headers=headers, content=body)
    receipt = await exact(user, f"/v1/receipts/{sent.headers['x-request-id']}")
    assert receipt["hold"]["amount"] == json.loads(response.text, parse_float=Decimal)["would_hold"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "nobody/nothing"},
        {"model": None},
        {"model": "openrouter/auto"},
        {"max_tokens": -1},
        {"messages": "hello"},
        {"n": 0},
    ],
    ids=str,
)
async def test_a_body_that_the_proxy_refuses_is_refused_in_the_same_words(
    gateway: Gateway, changes: dict[str, Any]
) -> None:
    user = await gateway.register()
    body = {**CHAT_BODY, **changes}
    quoted = await quote(user, {"body": body})
    sent = await gateway.http.post("/v1/chat/completions", headers=user.headers, json=body)
    assert quoted.status_code == sent.status_code >= 400
    assert quoted.json()["error"] == sent.json()["error"]


async def test_a_quote_is_closed_to_strangers_and_to_keys_that_may_not_chat(gateway: Gateway) -> None:
    user = await gateway.register()
    assert (await gateway.http.post("/v1/quote", json={"body": CHAT_BODY})).status_code == 401
    reader = await scoped(user, {"read": ["*"], "write": ["keys"]})
    assert (await quote(reader, {"body": CHAT_BODY})).status_code == 403
    assert (await quote(user, {})).status_code == 400
    for order, param in (
        ({"body": CHAT_BODY, "endpoint": "videos"}, "endpoint"),
        ({"body": CHAT_BODY, "typo": 1}, "typo"),
    ):
        refused = await quote(user, order)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_a_body_nested_too_deeply_is_a_400(gateway: Gateway) -> None:
    user = await gateway.register()
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    refused = await quote(user, {"body": {**CHAT_BODY, "extra": deep}})
    assert refused.status_code == 400


# Models.


async def test_a_models_endpoints_are_the_upstreams_and_fetched_once(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    path = "/v1/models/openai/gpt-4o-mini/endpoints"
    answers = await asyncio.gather(*(live_gateway.http.get(path) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert answers[0].json()["data"]["endpoints"][0]["provider_name"]
    lookups = [call.path for call in upstream.sandbox.state.calls if "/endpoints" in call.path]
    assert len(lookups) == 1


@pytest.mark.parametrize(
    "model", ["nobody/nothing", "openai/..%2F..%2Fkey", "openai/gpt-4o-mini%3Fx=1", "%2e%2e/key"]
)
async def test_an_unknown_model_is_not_found_and_not_asked_for(
    live_gateway: Gateway, upstream: Upstream, model: str
) -> None:
    upstream.forget()
    response = await live_gateway.http.get(f"/v1/models/{model}/endpoints")
    assert response.status_code == 404
    assert {call.path for call in upstream.sandbox.state.calls} <= {"/models"}


async def test_models_are_counted(gateway: Gateway) -> None:
    models = (await gateway.http.get("/v1/models")).json()["data"]
    assert (await gateway.http.get("/v1/models/count")).json() == {"data": {"count": len(models)}}
