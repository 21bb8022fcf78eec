"""The table of the management endpoints, each with what it needs, takes and answers, and the users that tests
call them as. A test compares the table with the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from security import new_key
from tests.support.gateway import Gateway, User
from tests.support.users import make_unknown

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
    "id", "api_key", "key_name", "environment_tag", "scope_permissions", "is_active", "is_primary",
    "expiration_date", "days_remaining", "max_requests", "requests_used", "requests_remaining",
    "usage_percentage", "ip_allowlist", "domain_referrers", "created_at", "updated_at", "last_used_at",
}  # fmt: skip

PROFILE = {
    "user_id", "api_key", "credits", "username", "email", "auth_method", "subscription_status",
    "trial_expires_at", "is_active", "registration_date", "created_at", "updated_at",
}  # fmt: skip
PLAN = {
    "id", "name", "description", "price_per_month", "daily_request_limit", "monthly_request_limit",
    "daily_token_limit", "monthly_token_limit", "features",
}  # fmt: skip
CORRECTED = {"status", "message", "new_balance", "user_id", "transaction_id"}
END_USER = {
    "id", "end_user", "budget_of", "budget", "budget_window", "window_start", "spent", "held", "remaining",
    "created_at", "updated_at",
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
    Public("GET", "/", {
        "name", "version", "description", "status", "endpoints", "features", "documentation",
    }),
    Public("GET", "/health", {"status", "database", "openrouter", "user_count", "timestamp"}),
    Public("GET", "/health/live", {"status"}),
    Public("GET", "/health/ready", {"status"}),
    Public("GET", "/models", MODELS),
    Public("GET", "/models/providers", {"status", "provider_statistics", "timestamp"}),
    Public("GET", "/plans", set()),
    Public("GET", "/plans/{plan_id}", PLAN, "/plans/1", (
        ("/plans/999999", None, 404, "plan_id"), ("/plans/0", None, 400, "plan_id"),
        ("/plans/x", None, 400, "plan_id"), (f"/plans/{10**30}", None, 400, "plan_id"),
    )),
    Public("POST", "/auth/register", {
        "user_id", "username", "email", "api_key", "credits", "environment_tag", "scope_permissions",
        "auth_method", "subscription_status", "message", "timestamp",
    }, "/auth/register", (
        ("/auth/register", {}, 400, "username"),
        ("/auth/register", {"username": "a", "email": "nobody"}, 400, "email"),
        ("/auth/register", [], 400, None), ("/auth/register", None, 400, None),
    ), {"username": "everybody", "email": "everybody@example.com"}),
]  # fmt: skip


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
        body = {"end_user": "ada", **BUDGET}
        budgets.append(
            (await gateway.http.post("/user/end-users", headers=each.headers, json=body)).json()["id"]
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
