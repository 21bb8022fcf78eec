"""Administrators find and correct things, once each, and leave a trace of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.gateway import ADMIN_KEY, Gateway, User, live
from tests.support.upstream import Upstream

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
ROUTES = [
    ("GET", "/admin/users"),
    ("GET", "/admin/users/1"),
    ("PUT", "/admin/users/1"),
    ("GET", "/admin/balance"),
    ("GET", "/admin/monitor"),
    ("GET", "/admin/usage"),
    ("GET", "/admin/keys"),
    ("POST", "/admin/keys"),
    ("DELETE", "/admin/keys/1"),
    ("POST", "/admin/keys/import"),
    ("GET", "/admin/audit-logs"),
    ("POST", "/admin/refund"),
    ("POST", "/admin/adjust_credits"),
    ("POST", "/admin/plans"),
    ("PUT", "/admin/plans/1"),
    ("DELETE", "/admin/plans/1"),
    ("POST", "/admin/refresh-models"),
    ("GET", "/admin/cache-status"),
    ("POST", "/admin/add_credits"),
    ("POST", "/admin/limit"),
    ("POST", "/admin/assign-plan"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_an_admin_route_is_closed_to_strangers_and_users(
    gateway: Gateway, method: str, path: str
) -> None:
    user = await gateway.register()
    assert (await gateway.http.request(method, path)).status_code == 401
    refused = await gateway.http.request(method, path, headers=user.headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")


async def test_an_admin_users_key_needs_the_scope_too(gateway: Gateway) -> None:
    user = await gateway.register()
    await gateway.admin("PUT", f"/admin/users/{user.id}", json={"role": "admin"})
    assert (await gateway.http.get("/admin/users", headers=user.headers)).status_code == 403
    await gateway.database.value(
        """update public.api_keys_new
           set scope_permissions = '{"read": ["*"], "write": ["*"], "admin": ["*"]}' where user_id = $1""",
        user.id,
    )
    assert (await gateway.http.get("/admin/users", headers=user.headers)).status_code == 200
    await gateway.admin("PUT", f"/admin/users/{user.id}", json={"role": "user"})
    assert (await gateway.http.get("/admin/users", headers=user.headers)).status_code == 403


async def test_users_are_searched_and_paged(gateway: Gateway) -> None:
    for _ in range(5):
        await gateway.register()
    found = await gateway.admin("GET", "/admin/users?search=USER3")
    assert [user["username"] for user in found["users"]] == ["user3"]
    assert (await gateway.admin("GET", "/admin/users?search=%25"))["users"] == []
    seen, cursor = [], ""
    while cursor is not None:
        page = await gateway.admin("GET", f"/admin/users?limit=2{cursor and '&cursor=' + cursor}")
        seen += [user["username"] for user in page["users"]]
        cursor = page["next_cursor"]
    assert seen == ["user4", "user3", "user2", "user1", "user0"]


async def test_balances_show_keys_masked(gateway: Gateway) -> None:
    user = await gateway.register(credits=2)
    (row,) = (await gateway.admin("GET", "/admin/balance"))["users"]
    assert (row["credits"], row["api_key"]) == (12, f"gw_live_...{user.key[-4:]}")


async def test_a_grant_with_the_same_idempotency_key_is_granted_once(gateway: Gateway) -> None:
    user = await gateway.register()
    body = {"user_id": user.id, "credits": 5, "idempotency_key": "invoice-17"}
    answers = await asyncio.gather(
        *(gateway.admin("POST", "/admin/add_credits", json=body) for _ in range(8))
    )
    assert len({answer["transaction_id"] for answer in answers}) == 1
    assert (await user.balance())["credits"] == 15
    changed = await gateway.http.post("/admin/add_credits", headers=ADMIN, json={**body, "credits": 6})
    assert (changed.status_code, changed.json()["error"]["param"]) == (409, "idempotency_key")
    await gateway.database.assert_books_balance()


async def test_a_request_is_refunded_at_most_its_cost(gateway: Gateway) -> None:
    user = await gateway.register()
    await user.chat(model="sandbox/fixed-price")
    (record,) = await user.records()
    part = await gateway.admin(
        "POST", "/admin/refund", json={"request_id": record["request_id"], "credits": 0.2}
    )
    assert part["new_balance"] == 9.7
    again = await gateway.http.post(
        "/admin/refund", headers=ADMIN, json={"request_id": record["request_id"], "credits": 0.4}
    )
    assert again.status_code == 400
    assert "at most 0.3" in again.json()["error"]["message"]
    rest = await gateway.admin("POST", "/admin/refund", json={"request_id": record["request_id"]})
    assert (rest["refunded"], rest["new_balance"]) == (0.3, 10)
    assert (
        await gateway.http.post("/admin/refund", headers=ADMIN, json={"request_id": record["request_id"]})
    ).status_code == 400
    await gateway.database.assert_books_balance()


async def test_a_refund_or_adjustment_that_cannot_be_says_why_and_what_can(gateway: Gateway) -> None:
    user = await gateway.register()

    async def refused(path: str, order: dict[str, Any], status: int = 400) -> tuple[str, str | None]:
        response = await gateway.http.post(f"/admin/{path}", headers=ADMIN, json=order)
        assert response.status_code == status, response.text
        return response.json()["error"]["message"], response.json()["error"]["param"]

    request_id = (await user.chat(model="sandbox/fixed-price")).headers["x-request-id"]
    assert await refused("refund", {"request_id": request_id, "credits": 0.6}) == (
        "`credits`: at most 0.5 of the 0.5 that this request cost can still be refunded.",
        "credits",
    )
    await gateway.admin("POST", "/admin/refund", json={"request_id": request_id})
    assert await refused("refund", {"request_id": request_id}) == (
        "All 0.5 credits that this request cost have been refunded already.",
        "request_id",
    )
    failed = (await user.chat(scenario="error-500")).headers["x-request-id"]
    assert await refused("refund", {"request_id": failed}) == (
        "Nothing was charged for this request, so there is nothing to refund.",
        "request_id",
    )
    pending = await user.chat(scenario="cost-missing, generation-lost")
    assert pending.headers["x-gateway-settlement"] == "pending"
    message, param = await refused("refund", {"request_id": pending.headers["x-request-id"]}, 409)
    assert message.endswith("It can be refunded once it is settled.") and param == "request_id"
    message, param = await refused("refund", {"request_id": "0199f0a0-0000-7000-8000-000000000000"}, 404)
    assert "x-request-id" in message and param == "request_id"
    available = (await user.balance())["available"]
    assert await refused("adjust_credits", {"user_id": user.id, "credits": -11, "reason": "x"}) == (
        f"`credits`: at most {available} can be taken from this account; what running requests hold cannot.",
        "credits",
    )
    assert await refused("adjust_credits", {"user_id": 9**9, "credits": 1, "reason": "x"}, 404) == (
        "There is no such user.",
        "user_id",
    )
    assert await refused("adjust_credits", {"api_key": "gw_live", "credits": 1, "reason": "x"}, 404) == (
        "There is no such API key; give it in full.",
        "api_key",
    )


async def test_play_credits_are_not_refunded_as_real_ones(start_gateway: Any, upstream: Upstream) -> None:
    sandbox = await start_gateway()
    request_id = (await (await sandbox.register()).chat(model="sandbox/fixed-price")).headers["x-request-id"]
    gateway = await start_gateway(**live(upstream.url))
    response = await gateway.http.post("/admin/refund", headers=ADMIN, json={"request_id": request_id})
    message = "This request was paid with play credits of the sandbox, which are not refunded."
    assert (response.status_code, response.json()["error"]["message"]) == (400, message)


async def test_concurrent_refunds_of_one_request_give_its_cost_back_once(gateway: Gateway) -> None:
    user = await gateway.register()
    await user.chat(model="sandbox/fixed-price")
    (record,) = await user.records()
    body = {"request_id": record["request_id"], "credits": 0.5}
    answers = await asyncio.gather(
        *(gateway.http.post("/admin/refund", headers=ADMIN, json=body) for _ in range(8))
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * 7
    assert (await user.balance())["credits"] == 10


async def test_an_adjustment_takes_no_more_than_is_unheld(gateway: Gateway) -> None:
    user = await gateway.register()
    refused = await gateway.http.post(
        "/admin/adjust_credits", headers=ADMIN, json={"user_id": user.id, "credits": -11, "reason": "x"}
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "credits")
    done = await gateway.admin(
        "POST", "/admin/adjust_credits", json={"user_id": user.id, "credits": -4, "reason": "a mistake"}
    )
    assert done["new_balance"] == 6
    (entry, _) = (await gateway.http.get("/user/transactions", headers=user.headers)).json()["transactions"]
    assert (entry["kind"], entry["amount"], entry["reason"]) == ("adjustment", -4, "a mistake")


async def test_amounts_keep_every_digit(gateway: Gateway) -> None:
    user = await gateway.register()
    response = await gateway.http.post(
        "/admin/add_credits",
        headers={**ADMIN, "content-type": "application/json"},
        content=f'{{"user_id": {user.id}, "credits": 123456789.123456789}}',
    )
    assert '"new_balance":123456799.123456789' in response.text


@pytest.mark.parametrize("credits", [0, -1, 1e-10, 1e300, "NaN", "Infinity", True, None, [], "ten"])
async def test_a_grant_of_nonsense_is_refused(gateway: Gateway, credits: Any) -> None:
    user = await gateway.register()
    response = await gateway.http.post(
        "/admin/add_credits", headers=ADMIN, json={"user_id": user.id, "credits": credits}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "credits")
    assert (await user.balance())["credits"] == 10


async def test_an_admin_finds_and_revokes_anybodys_key(gateway: Gateway) -> None:
    user = await gateway.register()
    page = await gateway.admin("GET", f"/admin/keys?search=gw_live_...{user.key[-4:]}")
    assert [key["user_id"] for key in page["keys"]] == [user.id]
    await gateway.admin("DELETE", f"/admin/keys/{page['keys'][0]['id']}")
    assert (await user.chat()).status_code == 401
    assert (
        await gateway.http.delete(f"/admin/keys/{page['keys'][0]['id']}", headers=ADMIN)
    ).status_code == 404


async def test_a_user_who_has_lost_their_last_key_gets_another(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    (own,) = (await gateway.http.get("/user/api-keys", headers=user.headers)).json()["keys"]
    revoked = await gateway.http.request(
        "DELETE", f"/user/api-keys/{own['id']}", headers=user.headers, json={"confirmation": "DELETE_KEY"}
    )
    assert revoked.status_code == 200 and (await user.chat()).status_code == 401
    issued = await gateway.admin(
        "POST", "/admin/keys", json={"user_id": user.id, "key_name": "again", "ip_allowlist": ["127.0.0.0/8"]}
    )
    again = User(gateway, user.id, issued["api_key"])
    assert (await again.chat()).status_code == 200
    assert issued["security_features"]["ip_allowlist"] == ["127.0.0.0/8"]
    logs = (await gateway.http.get("/user/api-keys/audit-logs", headers=again.headers)).json()["logs"]
    assert (logs[0]["action"], logs[0]["actor"], logs[0]["ip"]) == ("create", "admin", None)
    twice = await gateway.http.post(
        "/admin/keys", headers=ADMIN, json={"user_id": user.id, "key_name": "again"}
    )
    assert (twice.status_code, twice.json()["error"]["param"]) == (409, "key_name")


async def test_an_administrators_own_key_is_issued_by_one(gateway: Gateway) -> None:
    user = await gateway.register()
    await gateway.admin("PUT", f"/admin/users/{user.id}", json={"role": "admin"})
    scopes = {"read": ["*"], "write": ["*"], "admin": ["*"]}
    body = {"key_name": "operations", "scope_permissions": scopes}
    itself = await gateway.http.post("/user/api-keys", headers=user.headers, json=body)
    assert itself.status_code == 403
    issued = await gateway.admin("POST", "/admin/keys", json={**body, "user_id": user.id})
    headers = {"authorization": f"Bearer {issued['api_key']}"}
    assert (await gateway.http.get("/admin/balance", headers=headers)).status_code == 200
    await gateway.admin("PUT", f"/admin/users/{user.id}", json={"role": "user"})
    assert (await gateway.http.get("/admin/balance", headers=headers)).status_code == 403


async def test_a_user_has_fifty_active_keys_whoever_makes_them(gateway: Gateway) -> None:
    user = await gateway.register()
    for number in range(49):
        await gateway.admin("POST", "/admin/keys", json={"user_id": user.id, "key_name": f"key{number}"})
    response = await gateway.http.post(
        "/admin/keys", headers=ADMIN, json={"user_id": user.id, "key_name": "one more"}
    )
    assert response.status_code == 409


async def test_every_action_is_in_the_audit_log_with_its_request(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    await gateway.admin("PUT", f"/admin/users/{user.id}", json={"role": "admin"})
    logs = (await gateway.admin("GET", f"/admin/audit-logs?user_id={user.id}"))["logs"]
    assert [log["action"] for log in logs] == ["set_user", "set_limits", "add_credits", "create"]
    assert all(log["actor"] == "admin" and log["request_id"] and log["ip"] == "127.0.0.1" for log in logs)


async def test_security_refusals_are_in_the_audit_log_once_a_minute_with_a_count(gateway: Gateway) -> None:
    user = await gateway.register()
    await gateway.database.value(
        "update public.api_keys_new set ip_allowlist = '{10.0.0.0/8}' where user_id = $1", user.id
    )
    for _ in range(3):
        assert (await user.chat()).status_code == 403
    logs = (await gateway.admin("GET", "/admin/audit-logs?action=IP_NOT_ALLOWED"))["logs"]
    assert sum(log["occurrences"] for log in logs) == 3
    assert len(logs) <= 2  # the minute may turn in between


@pytest.mark.parametrize(
    "query",
    [
        "start_date=2026-02-01T00:00:00Z&end_date=2026-01-01T00:00:00Z",
        "start_date=yesterday",
        "limit=0",
        "limit=1001",
        "cursor=%00",
        "key_id=0",
    ],
)
async def test_an_audit_query_that_is_wrong_is_a_400(gateway: Gateway, query: str) -> None:
    assert (await gateway.http.get(f"/admin/audit-logs?{query}", headers=ADMIN)).status_code == 400


async def test_the_monitor_shows_the_busiest_and_the_latest(gateway: Gateway) -> None:
    quiet, busy = await gateway.register(), await gateway.register()
    await quiet.chat()
    for _ in range(2):
        await busy.chat()
    report = await gateway.admin("GET", "/admin/monitor")
    assert report["system_usage_metrics"]["last_request_time"] == report["recent_activity"][0]["created_at"]
    assert (report["total_users"], report["active_users_today"], report["requests_today"]) == (2, 2, 3)
    assert [row["user_id"] for row in report["top_users_by_usage"]] == [busy.id, quiet.id]
    assert len(report["recent_activity"]) == 3


async def test_the_model_cache_is_refreshed_on_demand(gateway: Gateway) -> None:
    assert (await gateway.admin("GET", "/admin/cache-status"))["cache_info"]["has_data"] is False
    total = (await gateway.admin("POST", "/admin/refresh-models"))["total_models"]
    info = (await gateway.admin("GET", "/admin/cache-status"))["cache_info"]
    assert (info["is_valid"], info["ttl_seconds"]) == (True, 300)
    assert info["total_cached_models"] == total > 10


async def spend(user: User) -> None:
    await user.chat()
    await user.chat(model="anthropic/claude-haiku-4.5")
    await user.chat(scenario="error-500")
    await user.chat(model="sandbox/fixed-price", stream=True)


@pytest.mark.parametrize(
    "group",
    ["model", "key", "provider", "environment", "endpoint", "status", "error_code", "end_user", "none"],
)
@pytest.mark.parametrize("bucket", ["hour", "day", "month", "none"])
async def test_every_grouping_adds_up_to_the_ledger(gateway: Gateway, group: str, bucket: str) -> None:
    user = await gateway.register()
    await spend(user)
    response = await gateway.http.get(
        f"/user/usage?group_by={group}&bucket={bucket}&timezone=Asia/Kolkata", headers=user.headers
    )
    report = response.json()
    spent = 10 - (await user.balance())["credits"]
    assert report["total"]["requests"] == sum(row["requests"] for row in report["rows"]) == 4
    assert round(report["total"]["cost"], 9) == round(spent, 9)
    assert await gateway.database.rows("select * from public.audit_usage()") == []


async def test_the_percentiles_of_one_request_are_its_own_latency(gateway: Gateway) -> None:
    user = await gateway.register()
    await user.chat()
    await gateway.database.value("alter table public.usage_records disable trigger all")
    await gateway.database.value("update public.usage_records set latency_ms = 4")
    (row,) = (await gateway.http.get("/user/usage", headers=user.headers)).json()["rows"]
    assert {row[name] for name in row if name.startswith("latency")} == {4}


async def test_usage_is_exported_as_csv(gateway: Gateway) -> None:
    user = await gateway.register()
    await spend(user)
    response = await gateway.http.get("/user/usage?format=csv", headers=user.headers)
    assert response.headers["content-type"].startswith("text/csv")
    header, *rows = response.text.splitlines()
    assert header.startswith("bucket,group,requests,")
    assert len(rows) == 3
    records = await gateway.http.get("/user/usage/records?format=csv", headers=user.headers)
    assert len(records.text.splitlines()) == 5


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("timezone=Moon/Sea", "timezone"),
        ("bucket=second", "bucket"),
        ("group_by=user", "group_by"),
        ("start=2026-02-01T00:00:00Z&end=2026-01-01T00:00:00Z", "end"),
        ("start=2026-01-01", "start"),
        ("start=0001-01-01T00:00:00Z", "start"),
    ],
)
async def test_a_report_that_is_wrong_names_its_field(gateway: Gateway, query: str, param: str) -> None:
    user = await gateway.register()
    response = await gateway.http.get(f"/user/usage?{query}", headers=user.headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
