"""Every management endpoint, one by one: nobody, a key that may not, somebody else's, and the valid call with
its documented fields.

The table is complete: a test compares it with the OpenAPI document. Proxied endpoints (/v1) have tests of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import httpx
import pytest
import pytest_asyncio

from gateway.proxy.endpoints import ENDPOINTS
from routes.schemas.keys import Resource
from security import new_key
from tests.billing.test_reconciliation import make_unknown
from tests.support.gateway import ADMIN_KEY, Gateway, Upstream, User

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
UNKNOWN = 2**62


@dataclass
class World:
    """A user with some history, somebody else, and what the orders name."""

    gateway: Gateway
    user: User
    stranger: User
    key_id: int
    strangers_key_id: int
    plan_id: int
    request_id: str
    unknown_id: str  # a request whose cost nobody knew
    budget_id: int
    strangers_budget_id: int
    webhook_id: int
    strangers_webhook_id: int

    def fill(self, text: str, **changes: Any) -> str:
        ids = {
            "user_id": self.user.id,
            "key_id": self.key_id,
            "plan_id": self.plan_id,
            "request_id": self.unknown_id,
        }
        return text.format(**{**ids, "budget_id": self.budget_id, "webhook_id": self.webhook_id, **changes})


Body = Callable[[World], Any]
Missing = Callable[[World], tuple[dict[str, Any], Any]]


@dataclass(frozen=True)
class Endpoint:
    """One row of the table. `scope`: what a user's key needs, None for administrators. `missing`: path and
    body that find nothing.
    """

    method: str
    path: str
    scope: tuple[str, str] | None
    fields: set[str]
    body: Body | None = None
    missing: tuple[Missing, ...] = ()
    query: str = ""
    status: int = 200

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def of_path(**ids: int | str) -> Missing:
    return lambda world: (ids, None)


def strangers_budget(world: World) -> tuple[dict[str, Any], Any]:
    return {"budget_id": world.strangers_budget_id}, None


def strangers_webhook(world: World) -> tuple[dict[str, Any], Any]:
    return {"webhook_id": world.strangers_webhook_id}, None


def strangers_key(world: World) -> tuple[dict[str, Any], Any]:
    return {"key_id": world.strangers_key_id}, None


def of_body(**body: Any) -> Missing:
    return lambda world: ({}, body)


NO_KEY = (of_path(key_id=UNKNOWN), strangers_key)
NO_USER = (of_path(user_id=UNKNOWN),)
NO_BUDGET = (of_path(budget_id=UNKNOWN), strangers_budget)
NO_WEBHOOK = (of_path(webhook_id=UNKNOWN), strangers_webhook)
NO_REQUEST = "019a9f5e-0000-7000-8000-000000000000"
READ_KEYS, WRITE_KEYS = ("read", "keys"), ("write", "keys")
KEY = {
    "id", "api_key", "key_name", "environment_tag", "scope_permissions", "is_active", "is_primary", "expiration_date", "days_remaining",
    "max_requests", "requests_used", "requests_remaining", "usage_percentage", "ip_allowlist", "domain_referrers", "created_at",
    "updated_at", "last_used_at",
}  # fmt: skip
PROFILE = {
    "user_id", "api_key", "credits", "username", "email", "auth_method", "subscription_status", "trial_expires_at", "is_active",
    "registration_date", "created_at", "updated_at",
}  # fmt: skip
PLAN = {
    "id", "name", "description", "price_per_month", "daily_request_limit", "monthly_request_limit", "daily_token_limit",
    "monthly_token_limit", "features",
}  # fmt: skip
CORRECTED = {"status", "message", "new_balance", "user_id", "transaction_id"}
END_USER = {
    "id", "end_user", "budget_of", "budget", "budget_window", "window_start", "spent", "held", "remaining", "created_at", "updated_at",
}  # fmt: skip
BUDGET = {"budget": 5, "budget_window": "month"}
WEBHOOK = {"status", "message", "webhook", "secret"}
HOOK = {"url": "https://hooks.invalid/budgets"}  # a name that no resolver knows (RFC 6761)
OWN_KEY = {"key": "sk-or-v1-" + "0" * 64}
REPORT = {"status", "start", "end", "timezone", "bucket", "group_by", "total", "rows"}

TABLE = [
    Endpoint(
        "GET",
        "/user/balance",
        ("read", "balance"),
        {"api_key", "credits", "status", "user_id", "held", "available"},
    ),
    Endpoint("GET", "/user/profile", ("read", "profile"), PROFILE),
    Endpoint(
        "PUT",
        "/user/profile",
        ("write", "profile"),
        PROFILE,
        lambda w: {"name": f"new{w.user.id}", "settings": {"a": 1}},
    ),
    Endpoint(
        "DELETE",
        "/user/account",
        ("write", "account"),
        {"status", "message", "user_id", "timestamp"},
        lambda w: {"confirmation": "DELETE_ACCOUNT"},
    ),
    Endpoint(
        "GET",
        "/user/monitor",
        ("read", "usage"),
        {"status", "timestamp", "user_id", "api_key", "current_credits", "usage_metrics", "rate_limits"},
    ),
    Endpoint(
        "GET",
        "/user/limit",
        ("read", "usage"),
        {"status", "api_key", "current_limits", "current_usage", "reset_times"},
    ),
    Endpoint("GET", "/user/environment-usage", ("read", "usage"), {"environment_usage"}),
    Endpoint("GET", "/user/usage", ("read", "usage"), REPORT),
    Endpoint("GET", "/user/usage/records", ("read", "usage"), {"status", "records", "next_cursor"}),
    Endpoint(
        "GET", "/user/transactions", ("read", "transactions"), {"status", "transactions", "next_cursor"}
    ),
    Endpoint("GET", "/user/provider-key", ("read", "account"), {"status", "provider_key"}),
    Endpoint(
        "PUT",
        "/user/provider-key",
        ("write", "account"),
        {"status", "provider_key", "checked"},
        lambda w: OWN_KEY,
    ),
    Endpoint("DELETE", "/user/provider-key", ("write", "account"), {"status", "message"}),
    Endpoint("GET", "/user/end-users", ("read", "budgets"), {"status", "end_users", "next_cursor"}),
    Endpoint(
        "POST",
        "/user/end-users",
        ("write", "budgets"),
        END_USER,
        lambda w: {"end_user": "new", **BUDGET},
        status=201,
    ),
    Endpoint(
        "PUT",
        "/user/end-users/{budget_id}",
        ("write", "budgets"),
        END_USER,
        lambda w: {"budget": 6},
        NO_BUDGET,
    ),
    Endpoint(
        "DELETE",
        "/user/end-users/{budget_id}",
        ("write", "budgets"),
        {"status", "message", "deleted_id"},
        missing=NO_BUDGET,
    ),
    Endpoint("GET", "/user/budget-events", ("read", "budgets"), {"status", "events", "next_cursor"}),
    Endpoint("GET", "/user/webhooks", ("read", "webhooks"), {"status", "webhooks"}),
    Endpoint("POST", "/user/webhooks", ("write", "webhooks"), WEBHOOK, lambda w: HOOK, status=201),
    Endpoint(
        "GET", "/user/webhooks/deliveries", ("read", "webhooks"), {"status", "deliveries", "next_cursor"}
    ),
    Endpoint(
        "PUT",
        "/user/webhooks/{webhook_id}",
        ("write", "webhooks"),
        WEBHOOK,
        lambda w: {"rotate_secret": True},
        NO_WEBHOOK,
    ),
    Endpoint(
        "DELETE",
        "/user/webhooks/{webhook_id}",
        ("write", "webhooks"),
        {"status", "message", "deleted_id"},
        missing=NO_WEBHOOK,
    ),
    Endpoint(
        "POST",
        "/user/webhooks/{webhook_id}/test",
        ("write", "webhooks"),
        {"status", "message", "delivery"},
        missing=NO_WEBHOOK,
    ),
    Endpoint(
        "GET",
        "/user/plan",
        ("read", "plan"),
        {"status", "plan", "limits", "start_date", "end_date", "is_active"},
    ),
    Endpoint("DELETE", "/user/plan", ("write", "plan"), {"status", "message", "plan_id"}),
    Endpoint(
        "GET", "/user/plan/usage", ("read", "plan"), {"plan_name", "usage", "limits", "remaining", "at_limit"}
    ),
    Endpoint(
        "GET",
        "/user/plan/entitlements",
        ("read", "plan"),
        {"has_plan", "plan_name", "limits", "features", "can_access_feature", "plan_expires"},
    ),
    Endpoint("GET", "/user/api-keys", READ_KEYS, {"status", "total_keys", "keys"}),
    Endpoint(
        "POST",
        "/user/api-keys",
        WRITE_KEYS,
        {"status", "message", "api_key", "key_name", "environment_tag", "security_features"},
        lambda w: {"key_name": "third"},
    ),
    Endpoint("GET", "/user/api-keys/usage", READ_KEYS, {"user_id", "total_keys", "keys", "audit_logging"}),
    Endpoint(
        "GET", "/user/api-keys/audit-logs", ("read", "audit"), {"status", "total_logs", "logs", "next_cursor"}
    ),
    Endpoint("GET", "/user/api-keys/{key_id}", READ_KEYS, KEY, missing=NO_KEY),
    Endpoint(
        "PUT",
        "/user/api-keys/{key_id}",
        WRITE_KEYS,
        {"status", "message", "updated_key", "timestamp"},
        lambda w: {"key_name": "renamed"},
        NO_KEY,
    ),
    Endpoint(
        "DELETE",
        "/user/api-keys/{key_id}",
        WRITE_KEYS,
        {"status", "message", "deleted_key_id", "timestamp"},
        lambda w: {"confirmation": "DELETE_KEY"},
        NO_KEY,
    ),
    Endpoint(
        "POST",
        "/user/api-keys/{key_id}/rotate",
        WRITE_KEYS,
        {"status", "message", "updated_key", "api_key"},
        lambda w: {"grace_period": 60},
        NO_KEY,
    ),
    Endpoint(
        "GET", "/user/api-keys/{key_id}/reveal", WRITE_KEYS, {"status", "api_key", "key"}, missing=NO_KEY
    ),
    Endpoint(
        "POST",
        "/admin/add_credits",
        None,
        {"status", "message", "new_balance", "user_id"},
        lambda w: {"user_id": w.user.id, "credits": 1},
        (of_body(user_id=UNKNOWN, credits=1), of_body(api_key=new_key("live"), credits=1)),
    ),
    Endpoint(
        "POST",
        "/admin/adjust_credits",
        None,
        CORRECTED,
        lambda w: {"user_id": w.user.id, "credits": -1, "reason": "x"},
        (of_body(user_id=UNKNOWN, credits=1, reason="x"),),
    ),
    Endpoint(
        "POST",
        "/admin/refund",
        None,
        {*CORRECTED, "refunded"},
        lambda w: {"request_id": w.request_id},
        (of_body(request_id=NO_REQUEST),),
    ),
    Endpoint(
        "POST",
        "/admin/limit",
        None,
        {"status", "message", "rate_limits"},
        lambda w: {"user_id": w.user.id, "rate_limits": {"burst": 9}},
        (of_body(user_id=UNKNOWN, rate_limits={"burst": 9}),),
    ),
    Endpoint(
        "POST",
        "/admin/assign-plan",
        None,
        {"status", "message", "user_id", "plan_id", "duration_months"},
        lambda w: {"user_id": w.user.id, "plan_id": w.plan_id, "duration_months": 2},
        (of_body(user_id=UNKNOWN, plan_id=1), lambda w: ({}, {"user_id": w.user.id, "plan_id": UNKNOWN})),
    ),
    Endpoint("GET", "/admin/balance", None, {"total_users", "users"}),
    Endpoint(
        "GET",
        "/admin/monitor",
        None,
        {
            "total_users",
            "active_users_today",
            "requests_today",
            "tokens_today",
            "cost_today",
            "system_usage_metrics",
            "top_users_by_usage",
            "recent_activity",
        },
    ),
    Endpoint("GET", "/admin/usage", None, REPORT),
    Endpoint("GET", "/admin/usage/records", None, {"status", "records", "next_cursor"}),
    Endpoint("GET", "/admin/transactions", None, {"status", "transactions", "next_cursor"}),
    Endpoint("GET", "/admin/audit-logs", None, {"status", "total_logs", "logs", "next_cursor"}),
    Endpoint("GET", "/admin/keys", None, {"status", "keys", "next_cursor"}),
    Endpoint(
        "POST",
        "/admin/keys",
        None,
        {"status", "message", "api_key", "key_name", "environment_tag", "security_features"},
        lambda w: {"user_id": w.user.id, "key_name": "issued"},
        (of_body(user_id=UNKNOWN, key_name="x"),),
    ),
    Endpoint(
        "DELETE",
        "/admin/keys/{key_id}",
        None,
        {"status", "message", "user_id", "deleted_key_id"},
        missing=(of_path(key_id=UNKNOWN),),
    ),
    Endpoint(
        "POST",
        "/admin/keys/import",
        None,
        {"status", "imported", "known_before"},
        lambda w: {"keys": [{"user_id": w.user.id, "api_key": f"old-key-of-user-{w.user.id:06}"}]},
        (of_body(keys=[{"user_id": UNKNOWN, "api_key": "x" * 20}]),),
    ),
    Endpoint("GET", "/admin/users", None, {"status", "users", "next_cursor"}),
    Endpoint(
        "GET", "/admin/users/{user_id}", None, {"status", "user", "keys", "usage_metrics"}, missing=NO_USER
    ),
    Endpoint(
        "PUT", "/admin/users/{user_id}", None, {"status", "user"}, lambda w: {"is_active": True}, NO_USER
    ),
    Endpoint("POST", "/admin/plans", None, PLAN, lambda w: {"slug": f"made-{w.user.id}", "name": "Made"}),
    Endpoint(
        "PUT",
        "/admin/plans/{plan_id}",
        None,
        PLAN,
        lambda w: {"daily_request_limit": 5},
        (of_path(plan_id=UNKNOWN),),
    ),
    Endpoint(
        "DELETE",
        "/admin/plans/{plan_id}",
        None,
        {"status", "message", "plan_id"},
        missing=(of_path(plan_id=UNKNOWN),),
    ),
    Endpoint("POST", "/admin/refresh-models", None, {"total_models"}),
    Endpoint("GET", "/admin/cache-status", None, {"cache_info"}),
    Endpoint(
        "GET",
        "/admin/reconciliation",
        None,
        {"status", "mode", "upstream", "windows", "open", "journal_waiting", "timestamp"},
    ),
    Endpoint(
        "GET",
        "/admin/reconciliation/items",
        None,
        {"status", "kind", "items", "next_cursor"},
        query="?kind=unknown",
    ),
    Endpoint(
        "POST",
        "/admin/reconciliation/{request_id}/resolve",
        None,
        {"status", "message", "request_id", "charged", "overrun"},
        missing=(of_path(request_id=NO_REQUEST),),
    ),
    Endpoint("GET", "/internal/sweep", None, {"status", "expired", "resolved"}),
]
SCOPED = [endpoint for endpoint in TABLE if endpoint.scope is not None]
FOR_ADMINS = [endpoint for endpoint in TABLE if endpoint.path.startswith("/admin")]
WITH_MISSING = [(endpoint, n) for endpoint in TABLE for n in range(len(endpoint.missing))]
RESOURCES = sorted({endpoint.scope[1] for endpoint in SCOPED if endpoint.scope})


@dataclass(frozen=True)
class Public:
    """An endpoint for everybody; `wrong` are (path, body, status, param) that are not."""

    method: str
    path: str
    fields: set[str]
    call: str = ""
    wrong: tuple[tuple[str, Any, int, str | None], ...] = ()
    body: Any = field(default=None, hash=False)


MODELS = {"status", "total_models", "models", "timestamp"}
PUBLIC = [
    Public("GET", "/", {"name", "version", "description", "status", "endpoints", "features", "documentation"}),
    Public("GET", "/health", {"status", "database", "openrouter", "user_count", "timestamp"}),
    Public("GET", "/health/live", {"status"}),
    Public("GET", "/health/ready", {"status"}),
    Public("GET", "/models", MODELS),
    Public("GET", "/models/providers", {"status", "provider_statistics", "timestamp"}),
    Public("GET", "/plans", set()),
    Public("GET", "/plans/{plan_id}", PLAN, "/plans/1", (
        ("/plans/999999", None, 404, "plan_id"), ("/plans/0", None, 400, "plan_id"), ("/plans/x", None, 400, "plan_id"),
        (f"/plans/{10**30}", None, 400, "plan_id"),
    )),
    Public("POST", "/auth/register", {
        "user_id", "username", "email", "api_key", "credits", "environment_tag", "scope_permissions", "auth_method", "subscription_status",
        "message", "timestamp",
    }, "/auth/register", (
        ("/auth/register", {}, 400, "username"), ("/auth/register", {"username": "a", "email": "nobody"}, 400, "email"),
        ("/auth/register", [], 400, None), ("/auth/register", None, 400, None),
    ), {"username": "everybody", "email": "everybody@example.com"}),
]  # fmt: skip


@pytest.fixture
def gateway(stage: tuple[Gateway, Upstream]) -> Gateway:
    stage[1].forget()
    return stage[0]


async def make_world(gateway: Gateway) -> World:
    user, stranger = await gateway.register(credits=5), await gateway.register()
    made = await gateway.http.post(
        "/user/api-keys", headers=user.headers, json={"key_name": "second", "revealable": True}
    )
    (strangers,) = (await gateway.http.get("/user/api-keys", headers=stranger.headers)).json()["keys"]
    plan = await gateway.admin("POST", "/admin/plans", json={"slug": f"plan-{user.id}", "name": "Plan"})
    await gateway.admin("POST", "/admin/assign-plan", json={"user_id": user.id, "plan_id": plan["id"]})
    known, unknown = [
        (await user.chat(model="sandbox/fixed-price")).headers["x-request-id"] for _ in range(2)
    ]
    await make_unknown(gateway, user, unknown)
    budgets, webhooks = [], []
    for each in (user, stranger):
        order = {"end_user": "ada", **BUDGET}
        budgets.append(
            (await gateway.http.post("/user/end-users", headers=each.headers, json=order)).json()["id"]
        )
        webhooks.append(
            (await gateway.http.post("/user/webhooks", headers=each.headers, json=HOOK)).json()["webhook"][
                "id"
            ]
        )
    assert (
        await gateway.http.put("/user/provider-key", headers=user.headers, json=OWN_KEY)
    ).status_code == 200
    keys = (made.json()["key"]["id"], strangers["id"])
    return World(gateway, user, stranger, *keys, plan["id"], known, unknown, *budgets, *webhooks)


@pytest_asyncio.fixture(loop_scope="module")
async def world(gateway: Gateway) -> World:
    """One of the test's own, for what changes it."""
    return await make_world(gateway)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(stage: tuple[Gateway, Upstream]) -> World:
    """One for all the tests that are refused."""
    return await make_world(stage[0])


async def call(
    world: World, endpoint: Endpoint, headers: dict[str, str], ids: dict[str, Any], body: Any
) -> httpx.Response:
    return await world.gateway.http.request(
        endpoint.method, world.fill(endpoint.path, **ids) + endpoint.query, headers=headers, json=body
    )


def body_of(endpoint: Endpoint, world: World) -> Any:
    return None if endpoint.body is None else endpoint.body(world)


def headers_for(endpoint: Endpoint, world: World) -> dict[str, str]:
    return ADMIN if endpoint.scope is None else world.user.headers


def documented(schema: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (method.upper(), path)
        for path, operations in schema["paths"].items()
        for method in operations
        if not path.startswith(("/v1/", "/api/v1/"))
    }


async def test_the_table_is_complete(gateway: Gateway) -> None:
    schema = (await gateway.http.get("/openapi.json")).json()
    listed = [*((each.method, each.path) for each in TABLE), *((each.method, each.path) for each in PUBLIC)]
    assert sorted(listed) == sorted(documented(schema))


async def test_scopes_name_what_there_is() -> None:
    asked = {*RESOURCES} | {endpoint.resource for endpoint in ENDPOINTS}
    assert asked == {*get_args(Resource)} - {"*"}


@pytest.mark.parametrize("endpoint", TABLE, ids=str)
async def test_nobody_is_told_to_send_a_key(gateway: Gateway, endpoint: Endpoint) -> None:
    path = (
        endpoint.path.format(user_id=1, key_id=1, plan_id=1, budget_id=1, webhook_id=1, request_id=NO_REQUEST)
        + endpoint.query
    )
    answer = await gateway.http.request(endpoint.method, path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("endpoint", SCOPED, ids=str)
async def test_a_key_with_every_scope_but_this_one_is_refused(shared: World, endpoint: Endpoint) -> None:
    assert endpoint.scope is not None
    verb, resource = endpoint.scope
    scopes = {
        each: [name for name in RESOURCES if (each, name) != (verb, resource)] for each in ("read", "write")
    }
    made = await shared.gateway.http.post(
        "/user/api-keys",
        headers=shared.user.headers,
        json={"key_name": str(endpoint), "scope_permissions": scopes},
    )
    headers = {"authorization": f"Bearer {made.json()['api_key']}"}
    answer = await call(shared, endpoint, headers, {}, body_of(endpoint, shared))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")
    assert answer.json()["gateway"]["scope"] == resource


@pytest.mark.parametrize("endpoint", FOR_ADMINS, ids=str)
async def test_a_user_s_key_opens_no_administrator_s_endpoint(shared: World, endpoint: Endpoint) -> None:
    answer = await call(shared, endpoint, shared.user.headers, {}, body_of(endpoint, shared))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")


@pytest.mark.parametrize(("endpoint", "number"), WITH_MISSING, ids=str)
async def test_what_is_not_there_or_somebody_else_s_is_a_404_that_names_it(
    shared: World, endpoint: Endpoint, number: int
) -> None:
    ids, body = endpoint.missing[number](shared)
    answer = await call(
        shared,
        endpoint,
        headers_for(endpoint, shared),
        ids,
        body if body is not None else body_of(endpoint, shared),
    )
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["param"]


@pytest.mark.parametrize(
    "endpoint",
    [e for e in TABLE if e.path.startswith("/user/plan") and e.method in ("GET", "DELETE")],
    ids=str,
)
async def test_without_a_plan_there_is_none_to_see_or_cancel(shared: World, endpoint: Endpoint) -> None:
    answer = await call(shared, endpoint, shared.stranger.headers, {}, None)
    assert answer.status_code == (404 if endpoint.path == "/user/plan" else 200)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_without_a_key_of_one_s_own_there_is_none_to_see_or_forget(shared: World, method: str) -> None:
    answer = await shared.gateway.http.request(method, "/user/provider-key", headers=shared.stranger.headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("endpoint", TABLE, ids=str)
async def test_a_valid_call_answers_with_its_documented_fields(world: World, endpoint: Endpoint) -> None:
    answer = await call(world, endpoint, headers_for(endpoint, world), {}, body_of(endpoint, world))
    assert answer.status_code == endpoint.status, answer.text
    assert endpoint.fields <= answer.json().keys()
    assert answer.headers["x-request-id"] and answer.headers["content-type"] == "application/json"
    await world.gateway.database.assert_books_balance()


@pytest.mark.parametrize("endpoint", PUBLIC, ids=lambda e: f"{e.method} {e.path}")
async def test_a_public_endpoint_answers_anybody_and_refuses_nonsense(
    gateway: Gateway, endpoint: Public
) -> None:
    headers = (
        ADMIN if endpoint.method == "POST" else {}
    )  # registration is closed in live mode, but for administrators
    answer = await gateway.http.request(
        endpoint.method, endpoint.call or endpoint.path, headers=headers, json=endpoint.body
    )
    assert answer.status_code == 200, answer.text
    assert not endpoint.fields or endpoint.fields <= answer.json().keys()
    for path, body, status, param in endpoint.wrong:
        refused = await gateway.http.request(endpoint.method, path, headers=headers, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), path
