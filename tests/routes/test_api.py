"""The management endpoints: anonymous, wrong, not found, valid; exact numbers, one envelope, and nothing
without a key.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import httpx
import pytest

from security import DEFAULT_SCOPES, key_environment, new_key
from tests.support.gateway import ADMIN_KEY, Gateway, User, staged_gateway, staged_upstream
from tests.support.upstream import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

Start = Callable[..., Awaitable[Gateway]]
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}

# Whatever is not listed here wants a key.
PUBLIC = {
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/models"),
    ("GET", "/v1/models"),
    ("GET", "/api/v1/models"),
    ("GET", "/v1/models/{model_id:path}"),
    ("GET", "/api/v1/models/{model_id:path}"),
    *(
        ("GET", f"{prefix}/models/{rest}")
        for prefix in ("/v1", "/api/v1")
        for rest in ("count", "{author}/{slug}/endpoints")
    ),
    *(("GET", f"{prefix}/model/{{author}}/{{slug}}") for prefix in ("/v1", "/api/v1")),
    ("POST", "/auth/register"),  # open only where the operator wants it
    ("GET", "/docs"),
    ("GET", "/models/providers"),
    ("GET", "/plans"),
    ("GET", "/plans/{plan_id}"),
    ("GET", "/openapi.json"),
}


upstream, live_gateway = staged_upstream, staged_gateway


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    error = body["error"]
    if response.request.url.path.startswith("/api/v1/"):  # OpenRouter's form
        assert error["code"] == status
        error["code"] = error.pop("metadata")["error_type"]
    assert set(body) == {"error", "gateway"} and set(error) == {"message", "type", "param", "code"}
    assert body["gateway"]["request_id"] == response.headers["x-request-id"]
    return dict(error)


def routes_of(app: Any) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    def walk(routes: Any) -> None:
        for route in routes:
            if methods := getattr(route, "methods", None):
                found.extend((method, route.path) for method in methods - {"HEAD"})
            elif nested := getattr(getattr(route, "original_router", None), "routes", None) or getattr(
                route, "routes", None
            ):
                walk(nested)

    walk(app.routes)
    return sorted(set(found))


# Who gets in.


async def test_every_route_but_the_public_ones_wants_a_key(live_gateway: Gateway) -> None:
    routes = routes_of(live_gateway.app)
    assert len(routes) > 20 and set(routes) >= PUBLIC
    for method, path in set(routes) - PUBLIC:
        if path.endswith("/messages"):
            continue  # whose errors have Anthropic's form: test_endpoints.py
        url = path.replace("{", "").replace("}", "")
        error = error_of(await live_gateway.http.request(method, url, json={}), 401)
        assert error["code"] == "invalid_api_key", (method, path)
        await forget_guesses(live_gateway)
        wrong = await live_gateway.http.request(method, url, json={}, headers={"x-api-key": new_key("live")})
        error_of(
            wrong, 503 if path.startswith("/internal") else 401
        )  # the sweep's own secret is not set here


async def forget_guesses(gateway: Gateway) -> None:
    """As if this address had presented no wrong secret yet."""
    await gateway.database.value("delete from public.rate_limit_usage where subject = 'address'")


async def test_a_user_s_key_opens_no_admin_route(live_gateway: Gateway) -> None:
    user = await live_gateway.register()
    for method, path in routes_of(live_gateway.app):
        if path.startswith(("/admin", "/internal")):
            response = await live_gateway.http.request(
                method, path.replace("{", "").replace("}", ""), json={}, headers=user.headers
            )
            assert response.status_code in (401, 403, 503), (path, response.text)
            assert not response.is_success


async def test_an_admin_user_s_key_needs_the_scope_and_the_role(live_gateway: Gateway) -> None:
    user = await live_gateway.register()
    body = {"user_id": user.id, "credits": 1}

    async def grant() -> httpx.Response:
        return await live_gateway.http.post("/admin/add_credits", headers=user.headers, json=body)

    error_of(await grant(), 403)
    async with live_gateway.database.owner() as owner:
        await owner.execute(
            """update public.api_keys_new set scope_permissions = '{"admin": ["*"]}' where user_id = $1""",
            user.id,
        )
        error_of(await grant(), 403)
        await owner.execute("update public.users set role = 'admin' where id = $1", user.id)
    assert (await grant()).status_code == 200
    error_of(
        await live_gateway.http.get("/user/balance", headers=user.headers), 403
    )  # this key has no scope to read


async def test_scopes_are_asked_for_by_name(live_gateway: Gateway) -> None:
    user = await live_gateway.register()
    async with live_gateway.database.owner() as owner:
        await owner.execute(
            """update public.api_keys_new
               set scope_permissions = '{"read": ["balance"]}' where user_id = $1""",
            user.id,
        )
    assert (await live_gateway.http.get("/user/balance", headers=user.headers)).status_code == 200
    for path in ("/user/usage/records", "/user/transactions"):
        error = error_of(await live_gateway.http.get(path, headers=user.headers), 403)
        assert error["code"] == "missing_scope"


# Registration.


def registration(**changes: Any) -> dict[str, Any]:
    number = next(NUMBERS)
    return {"username": f"ada{number}", "email": f"ada{number}@example.com", **changes}


NUMBERS = iter(range(1000, 9999))


async def test_a_new_account_gets_a_key_once_and_its_first_credits(live_gateway: Gateway) -> None:
    response = await live_gateway.http.post(
        "/auth/register", headers=ADMIN, json=registration(environment_tag="staging", key_name="Mine")
    )
    body = response.json()
    assert response.status_code == 200
    assert key_environment(body["api_key"]) == "staging" and body["scope_permissions"] == DEFAULT_SCOPES
    assert body["credits"] == 0 and body["subscription_status"] == "trial"
    balance = await User(live_gateway, body["user_id"], body["api_key"]).balance()
    assert (
        body["api_key"] not in str(balance) and balance["api_key"] == f"gw_staging_...{body['api_key'][-4:]}"
    )
    stored = await live_gateway.database.value(
        "select to_jsonb(k)::text from public.api_keys_new k where user_id = $1", body["user_id"]
    )
    assert body["api_key"] not in stored and body["api_key"][12:-6] not in stored


async def test_credits_never_come_from_the_person_who_registers(live_gateway: Gateway) -> None:
    order = registration(
        credits=1000, initial_credits=1000, role="admin", signup_nanos="5", scope_permissions={"admin": ["*"]}
    )
    body = (await live_gateway.http.post("/auth/register", headers=ADMIN, json=order)).json()
    assert body["credits"] == 0 and body["scope_permissions"] == DEFAULT_SCOPES
    user = User(live_gateway, body["user_id"], body["api_key"])
    assert (await user.balance())["credits"] == 0
    error_of(
        await live_gateway.http.post(
            "/admin/add_credits", headers=user.headers, json={"user_id": user.id, "credits": 1}
        ),
        403,
    )


async def test_names_and_addresses_are_taken_once_whatever_their_case(live_gateway: Gateway) -> None:
    order = registration()
    assert (await live_gateway.http.post("/auth/register", headers=ADMIN, json=order)).status_code == 200
    for changes, param in (
        ({"email": "other@example.com"}, "username"),
        ({"username": "other", "email": order["email"].upper()}, "email"),
    ):
        error = error_of(
            await live_gateway.http.post("/auth/register", headers=ADMIN, json={**order, **changes}), 409
        )
        assert error["param"] == param


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"username": ""}, "username"),
        ({"username": "a\x00b"}, "username"),
        ({"username": "x" * 65}, "username"),
        ({"username": None}, "username"),
        ({"email": "nobody"}, "email"),
        ({"email": "a@" + "b" * 300 + ".com"}, "email"),
        ({"auth_method": "magic"}, "auth_method"),
        ({"environment_tag": "prod"}, "environment_tag"),
        ({"key_name": "x" * 101}, "key_name"),
    ],
)
async def test_what_is_wrong_in_a_registration_is_named(
    live_gateway: Gateway, changes: dict[str, Any], param: str
) -> None:
    error = error_of(
        await live_gateway.http.post("/auth/register", headers=ADMIN, json=registration(**changes)), 400
    )
    assert error["param"] == param and error["type"] == "invalid_request_error"


async def test_registration_is_closed_in_live_mode_but_for_the_admin(live_gateway: Gateway) -> None:
    assert (
        error_of(await live_gateway.http.post("/auth/register", json=registration()), 403)["code"]
        == "registration_closed"
    )
    user = await live_gateway.register()
    for headers, status in (
        (user.headers, 403),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic x"}, 401),
    ):
        error = error_of(
            await live_gateway.http.post("/auth/register", headers=headers, json=registration()), status
        )
        assert error["message"].startswith("Registration takes no key, or an administrator's")


@pytest.mark.asyncio(loop_scope="function")
async def test_open_registration_is_limited_by_address_and_grants_what_the_operator_set(
    start_gateway: Start,
) -> None:
    gateway = await start_gateway(
        registration="open", signup_credits=Decimal("0.000000001"), trusted_proxies="127.0.0.0/8"
    )
    for number in range(5):
        headers = {"x-forwarded-for": f"2001:db8::{number}"}  # one /64 is one address
        response = await gateway.http.post("/auth/register", headers=headers, json=registration())
        assert response.status_code == 200
        assert '"credits":0.000000001,' in response.text
    response = await gateway.http.post(
        "/auth/register", headers={"x-forwarded-for": "2001:db8::9"}, json=registration()
    )
    assert error_of(response, 429)["type"] == "rate_limit_error" and int(response.headers["retry-after"]) > 0
    response = await gateway.http.post(
        "/auth/register", headers={"x-forwarded-for": "2001:db8:1::1"}, json=registration()
    )
    assert response.status_code == 200
    await gateway.database.assert_books_balance()


# Credits, limits and plans.


async def test_a_grant_is_exact_and_made_once_per_idempotency_key(live_gateway: Gateway) -> None:
    user = await live_gateway.register()
    body = {
        "user_id": user.id,
        "credits": 0.000000001,
        "idempotency_key": f"grant-{user.id}",
        "reason": "welcome",
    }
    for message in ("Added 0.000000001 credits", "Was granted before; nothing added"):
        response = await live_gateway.http.post("/admin/add_credits", headers=ADMIN, json=body)
        assert response.json()["message"] == message
        assert '"new_balance":0.000000001,' in response.text
    error_of(
        await live_gateway.http.post("/admin/add_credits", headers=ADMIN, json={**body, "credits": 2}), 409
    )
    response = await live_gateway.http.get("/user/balance", headers=user.headers)
    assert '"credits":0.000000001,"held":0,"available":0.000000001' in response.text
    assert "e-" not in response.text.lower().replace("key", "")
    transactions = (await live_gateway.http.get("/user/transactions", headers=user.headers)).json()[
        "transactions"
    ]
    assert [(row["kind"], row["amount"], row["balance_after"], row["reason"]) for row in transactions] == [
        ("grant", 1e-9, 1e-9, "welcome")
    ]
    await live_gateway.database.assert_books_balance()


async def test_a_grant_by_key_reaches_the_key_s_user(live_gateway: Gateway) -> None:
    user = await live_gateway.register()
    await live_gateway.admin("POST", "/admin/add_credits", json={"api_key": user.key, "credits": 2})
    assert (await user.balance())["credits"] == 2


@pytest.mark.parametrize(
    ("order", "status", "param"),
    [
        ({"credits": 1}, 400, None),
        ({"user_id": 1, "api_key": "gw_live_x", "credits": 1}, 400, None),
        ({"user_id": 999_999, "credits": 1}, 404, None),
        ({"api_key": "gw_live_unknown", "credits": 1}, 404, None),
        ({"user_id": 1}, 400, "credits"),
        ({"user_id": 1, "credits": 0}, 400, "credits"),
        ({"user_id": 1, "credits": -5}, 400, "credits"),
        ({"user_id": 1, "credits": "NaN"}, 400, "credits"),
        ({"user_id": 1, "credits": "Infinity"}, 400, "credits"),
        ({"user_id": 1, "credits": 1e300}, 400, "credits"),
        ({"user_id": 1, "credits": "0.0000000001"}, 400, "credits"),
        ({"user_id": 2**63, "credits": 1}, 400, "user_id"),
        ({"user_id": 1, "credits": 1, "typo": 1}, 400, "typo"),
        ([], 400, None),
    ],
)
async def test_what_is_wrong_in_a_grant_is_refused(
    live_gateway: Gateway, order: Any, status: int, param: str | None
) -> None:
    error = error_of(await live_gateway.http.post("/admin/add_credits", headers=ADMIN, json=order), status)
    assert param is None or error["param"] == param


async def test_limits_are_set_for_a_user_or_a_key_and_only_those_named(live_gateway: Gateway) -> None:
    user = await live_gateway.register(credits=1)
    for target in ({"user_id": user.id}, {"api_key": user.key}):
        body = {**target, "rate_limits": {"requests_per_minute": 3}}
        answered = await live_gateway.admin("POST", "/admin/limit", json=body)
        answered = await live_gateway.admin(
            "POST", "/admin/limit", json={**target, "rate_limits": {"tokens_per_day": 5}}
        )
        assert (
            answered["rate_limits"]["requests_per_minute"],
            answered["rate_limits"]["tokens_per_day"],
        ) == (3, 5)
    for rate_limits in ({}, {"requests_per_minute": -1}, {"requests_per_minute": 1.5}, {"typo": 1}):
        error_of(
            await live_gateway.http.post(
                "/admin/limit", headers=ADMIN, json={"user_id": user.id, "rate_limits": rate_limits}
            ),
            400,
        )
    missing = {"user_id": 999_999, "rate_limits": {"burst": 1}}
    error_of(await live_gateway.http.post("/admin/limit", headers=ADMIN, json=missing), 404)


async def test_a_plan_is_assigned_or_said_to_be_missing(live_gateway: Gateway) -> None:
    user = await live_gateway.register()
    plan = await live_gateway.database.value("select min(id) from public.plans")
    assigned = await live_gateway.admin(
        "POST", "/admin/assign-plan", json={"user_id": user.id, "plan_id": plan, "duration_months": 2}
    )
    assert assigned["plan_id"] == plan and assigned["end_date"]
    for order in ({"user_id": 999_999, "plan_id": plan}, {"user_id": user.id, "plan_id": 999_999}):
        error_of(await live_gateway.http.post("/admin/assign-plan", headers=ADMIN, json=order), 404)
    error_of(
        await live_gateway.http.post(
            "/admin/assign-plan", headers=ADMIN, json={"user_id": user.id, "plan_id": 1, "duration_months": 0}
        ),
        400,
    )


# A user's own books.


async def test_pages_hold_every_record_once_and_only_one_s_own(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user, other = await live_gateway.register(credits=1), await live_gateway.register(credits=1)
    for _ in range(5):
        assert (await user.chat()).status_code == 200
    assert (await other.chat()).status_code == 200
    seen: list[str] = []
    cursor = None
    while True:
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (
            await live_gateway.http.get("/user/usage/records", headers=user.headers, params=params)
        ).json()
        seen += [record["request_id"] for record in page["records"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(seen) == len(set(seen)) == 5 and seen == sorted(seen, reverse=True)
    assert len(await other.records()) == 1
    response = await live_gateway.http.get("/user/usage/records", headers=user.headers)
    assert Decimal(response.text.split('"cost":')[1].split(",")[0]) > 0
    assert not re.search(r"\d[eE]-\d+[,}]", response.text), "an amount in exponent notation"


@pytest.mark.parametrize("path", ["/user/usage/records", "/user/transactions"])
async def test_pages_and_cursors_are_bounded(live_gateway: Gateway, path: str) -> None:
    user = await live_gateway.register()

    def encoded(text: str) -> str:
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    for limit in ("0", "1001", "-1", "x", "1e9"):
        assert (
            error_of(await live_gateway.http.get(path, headers=user.headers, params={"limit": limit}), 400)[
                "param"
            ]
            == "limit"
        )
    cursors = [
        "x" * 201,
        "ü",
        "*",
        encoded("5 5"),
        encoded("2020-01-01T00:00:00 x"),
        encoded("9" * 30),
        encoded('2020",x.eq.1 '),
        encoded("-1"),
    ]
    for cursor in cursors:
        error = error_of(
            await live_gateway.http.get(path, headers=user.headers, params={"cursor": cursor}), 400
        )
        assert error["param"] == "cursor"


async def test_a_transaction_page_continues_where_the_last_one_ended(live_gateway: Gateway) -> None:
    user = await live_gateway.register()
    for amount in (1, 2, 3):
        await live_gateway.admin("POST", "/admin/add_credits", json={"user_id": user.id, "credits": amount})
    first = (
        await live_gateway.http.get("/user/transactions", headers=user.headers, params={"limit": 2})
    ).json()
    params = {"limit": 2, "cursor": first["next_cursor"]}
    second = (await live_gateway.http.get("/user/transactions", headers=user.headers, params=params)).json()
    assert [row["amount"] for row in first["transactions"] + second["transactions"]] == [3, 2, 1]
    assert second["next_cursor"] is None


# What anybody may see.


async def test_the_public_pages_say_what_this_is(live_gateway: Gateway) -> None:
    root = (await live_gateway.http.get("/")).json()
    assert root["mode"] == "live" and root["status"] == "running"
    listed = {endpoint for area in root["endpoints"].values() for endpoint in area}
    routes = {
        f"{method} {path.replace(':path', '')}"
        for method, path in routes_of(live_gateway.app)
        if not path.startswith("/api/v1")
    }
    assert listed == routes - {
        "GET /docs",
        "GET /docs/oauth2-redirect",
        "GET /openapi.json",
        "POST /internal/sweep",
    }
    assert all(about for area in root["endpoints"].values() for about in area.values())
    health = await live_gateway.http.get("/health")
    assert (
        health.status_code == 200
        and health.json()["database"] == "connected"
        and health.json()["problem"] is None
    )
    assert (await live_gateway.http.get("/health/live")).json() == {"status": "alive"}
    assert (await live_gateway.http.get("/health/ready")).json() == {"status": "ready"}
    assert (await live_gateway.http.get("/openapi.json")).json()["paths"]["/v1/chat/completions"]["post"]


async def test_the_model_list_is_the_upstream_s(live_gateway: Gateway) -> None:
    listed = (await live_gateway.http.get("/v1/models")).json()["data"]
    assert (await live_gateway.http.get("/api/v1/models")).json()["data"] == listed
    catalog = (await live_gateway.http.get("/models")).json()
    assert catalog["models"] == listed and catalog["total_models"] == len(listed) > 10
    one = (await live_gateway.http.get("/v1/models/openai/gpt-4o-mini")).json()
    assert one in listed and one["pricing"]["prompt"] == "0.00000015"
    error = error_of(await live_gateway.http.get("/v1/models/no/model"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_the_model_list_comes_page_by_page_until_it_ends(live_gateway: Gateway) -> None:
    for prefix in ("/v1", "/api/v1"):
        whole = (await live_gateway.http.get(f"{prefix}/models")).json()
        assert (whole["total_count"], whole["links"]) == (len(whole["data"]), {"next": None})
        models: list[Any] = []
        path, pages = f"{prefix}/models?limit=7", 0
        while path is not None:
            page = (await live_gateway.http.get(path)).json()
            assert page["total_count"] == whole["total_count"] and 0 < len(page["data"]) <= 7
            models, path, pages = models + page["data"], page["links"]["next"], pages + 1
        assert models == whole["data"] and pages == -(-len(models) // 7)
        rest = (await live_gateway.http.get(f"{prefix}/models?offset=3")).json()
        assert (rest["data"], rest["links"]["next"]) == (whole["data"][3:], None)
        beyond = (await live_gateway.http.get(f"{prefix}/models?offset={len(models)}&limit=7")).json()
        assert (beyond["data"], beyond["total_count"], beyond["links"]["next"]) == ([], len(models), None)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=1001", "limit"), ("limit=x", "limit"), ("offset=-1", "offset")],
)
async def test_a_page_that_cannot_be_is_refused(live_gateway: Gateway, query: str, param: str) -> None:
    assert error_of(await live_gateway.http.get(f"/v1/models?{query}"), 400)["param"] == param


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
async def test_one_model_is_read_by_its_author_and_slug(live_gateway: Gateway, prefix: str) -> None:
    listed = (await live_gateway.http.get("/v1/models")).json()["data"]
    entry = (await live_gateway.http.get(f"{prefix}/model/openai/gpt-4o-mini")).json()["data"]
    assert entry in listed and entry["id"] == "openai/gpt-4o-mini"
    error = error_of(await live_gateway.http.get(f"{prefix}/model/openai/nothing"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "slug")


async def test_errors_under_openrouter_s_prefix_have_its_form_and_anthropic_s_keep_theirs(
    live_gateway: Gateway,
) -> None:
    response = await live_gateway.http.post("/api/v1/chat/completions", json={})
    assert response.status_code == 401
    error = response.json()["error"]
    assert (error["code"], error["metadata"]) == (401, {"error_type": "invalid_api_key"})
    assert (error["type"], error["param"]) == ("authentication_error", None) and error["message"]
    for path, status in (
        ("/api/v1/nowhere", 404),
        ("/api/v1/models?limit=0", 400),
        ("/api/v1/moderations", 404),
        ("/api/v1/key", 401),
    ):
        refused = await live_gateway.http.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, status), path
    wrong_method = await live_gateway.http.delete("/api/v1/models")
    assert (wrong_method.status_code, wrong_method.json()["error"]["code"]) == (405, 405)
    for path in ("/v1/messages", "/api/v1/messages"):
        body = (await live_gateway.http.post(path, json={})).json()
        assert (body["type"], body["error"]["type"], body["error"]["code"]) == (
            "error",
            "authentication_error",
            "invalid_api_key",
        )


async def test_what_is_not_there_is_said_in_the_same_envelope(live_gateway: Gateway) -> None:
    assert error_of(await live_gateway.http.get("/nowhere"), 404)["code"] == "not_found"
    response = await live_gateway.http.get("/v1/chat/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed" and "POST" in response.headers["allow"]
    response = await live_gateway.http.post(
        "/auth/register", headers={**ADMIN, "content-type": "application/json"}, content=b"{"
    )
    assert error_of(response, 400)["code"] == "invalid_json"


# The sweep.


async def test_the_sweep_wants_the_admin_s_key_or_its_own_secret(live_gateway: Gateway) -> None:
    for method in ("GET", "POST"):
        response = await live_gateway.http.request(method, "/internal/sweep", headers=ADMIN)
        assert response.json() == {"status": "success", "expired": 0, "resolved": 0}
    assert (
        error_of(
            await live_gateway.http.get("/internal/sweep", headers={"authorization": "Bearer wrong"}), 503
        )["code"]
        == "misconfigured"
    )


@pytest.mark.asyncio(loop_scope="function")
async def test_a_cron_secret_opens_the_sweep_and_nothing_else(start_gateway: Start) -> None:
    gateway = await start_gateway(cron_secret="cron-secret-of-tests")
    cron = {"authorization": "Bearer cron-secret-of-tests"}
    assert (await gateway.http.get("/internal/sweep", headers=cron)).status_code == 200
    error_of(await gateway.http.get("/internal/sweep", headers={"authorization": "Bearer wrong"}), 401)
    error_of(
        await gateway.http.post("/admin/add_credits", headers=cron, json={"user_id": 1, "credits": 1}), 401
    )


# Browsers.


async def test_any_origin_may_ask_but_none_with_credentials(live_gateway: Gateway) -> None:
    preflight = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = await live_gateway.http.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    for path in ("/health/live", "/user/balance", "/nowhere"):
        answer = await live_gateway.http.get(path, headers={"origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        exposed = answer.headers["access-control-expose-headers"].lower()
        assert all(
            name in exposed
            for name in ("x-request-id", "x-gateway-cost", "retry-after", "x-ratelimit-remaining-tokens")
        )


@pytest.mark.asyncio(loop_scope="function")
async def test_only_the_origins_that_are_named_may_ask_with_credentials(start_gateway: Start) -> None:
    gateway = await start_gateway(cors_origins="https://app.example,https://b.example")
    response = await gateway.http.get("/health/live", headers={"origin": "https://app.example"})
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert response.headers["access-control-allow-credentials"] == "true"
    response = await gateway.http.get("/health/live", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers
