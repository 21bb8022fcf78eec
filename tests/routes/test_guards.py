"""What protects the gateway from strangers: every key sees its limits, guesses are counted, credits are given
once, and rows stay.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import httpx
import pytest
from openai import RateLimitError
from openai._constants import MAX_RETRY_AFTER_DELAY

from routes.http.middleware import MAX_MANAGEMENT_BYTES
from security import new_key
from tests.support.database import Database
from tests.support.database_link import DatabaseLink, database_link
from tests.support.gateway import ADMIN_KEY, Gateway, User

Start = Callable[..., Awaitable[Gateway]]
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
STRANGER = "203.0.113.9"
ADMIN_SCOPE = """update public.api_keys_new set scope_permissions = '{"admin": ["*"]}' where user_id = $1"""


# Limits in the headers of management answers.


async def limited(gateway: Gateway, **limits: int) -> User:
    user = await gateway.register(credits=1)
    await gateway.admin("POST", "/admin/limit", json={"user_id": user.id, "rate_limits": limits})
    return user


@pytest.mark.parametrize(
    "path",
    [
        "/user/balance",
        "/user/usage/records?format=csv",
        "/user/api-keys/999999",
        "/user/usage?bucket=nonsense",
    ],
)
async def test_every_answer_to_a_key_says_what_is_left_of_its_limits(gateway: Gateway, path: str) -> None:
    user = await limited(gateway, requests_per_minute=5, tokens_per_day=100_000)
    assert (await user.chat()).status_code == 200
    response = await gateway.http.get(path, headers=user.headers)
    assert (
        response.headers["x-ratelimit-limit-requests"],
        response.headers["x-ratelimit-remaining-requests"],
    ) == ("5", "4")
    assert 0 < int(response.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 70
    assert 0 < int(response.headers["x-ratelimit-remaining-tokens"]) < 100_000
    assert (
        response.headers["ratelimit"].startswith('"requests";r=4;t=')
        and '"requests";q=5' in response.headers["ratelimit-policy"]
    )


async def test_management_answers_say_what_the_proxied_one_before_them_said(gateway: Gateway) -> None:
    user = await limited(gateway, requests_per_minute=5, requests_per_hour=50)
    proxied = await user.chat()
    response = await gateway.http.get("/user/balance", headers=user.headers)
    for name in ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "ratelimit-policy"):
        assert response.headers[name] == proxied.headers[name]


async def test_the_tighter_limit_of_key_and_user_is_shown(gateway: Gateway) -> None:
    user = await limited(gateway, requests_per_minute=50)
    await gateway.admin(
        "POST", "/admin/limit", json={"api_key": user.key, "rate_limits": {"requests_per_day": 3}}
    )
    response = await gateway.http.get("/user/balance", headers=user.headers)
    assert (
        response.headers["x-ratelimit-limit-requests"],
        response.headers["x-ratelimit-remaining-requests"],
    ) == ("3", "3")


async def test_management_requests_are_shown_the_limits_and_not_counted_against_them(
    gateway: Gateway,
) -> None:
    user = await limited(gateway, requests_per_minute=1)
    for _ in range(3):
        response = await gateway.http.get("/user/balance", headers=user.headers)
        assert (response.status_code, response.headers["x-ratelimit-remaining-requests"]) == (200, "1")
    assert (await user.chat()).status_code == 200
    assert (await user.chat()).status_code == 429
    response = await gateway.http.get("/user/balance", headers=user.headers)
    assert (response.status_code, response.headers["x-ratelimit-remaining-requests"]) == (200, "0")


async def test_answers_without_a_user_s_key_have_no_limits_to_show(gateway: Gateway) -> None:
    for path, headers in (("/health", {}), ("/plans", {}), ("/admin/users", ADMIN), ("/user/balance", {})):
        response = await gateway.http.get(path, headers=headers)
        assert not [name for name in response.headers if "ratelimit" in name]


async def test_without_any_limit_there_is_none_to_show(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    response = await gateway.http.get("/user/balance", headers=user.headers)
    assert response.status_code == 200 and not [name for name in response.headers if "ratelimit" in name]


async def test_the_sdk_waits_out_the_retry_after_of_a_minute_and_not_that_of_a_day(gateway: Gateway) -> None:
    """A place of the minute frees a bucket of ten seconds late at most: 70 s, which openai 3 honours and
    openai 1 and 2 (60 s) do not.
    """
    user = await limited(gateway, requests_per_minute=1)
    assert (await user.chat()).status_code == 200
    with pytest.raises(RateLimitError) as refused:
        await user.sdk().chat.completions.create(
            model="openai/gpt-4o-mini", messages=[{"role": "user", "content": "Hi"}]
        )
    assert 60 <= int(refused.value.response.headers["retry-after"]) <= 70 <= MAX_RETRY_AFTER_DELAY


# Guesses.


async def guess(
    gateway: Gateway, key: str = "not-the-admin-key", path: str = "/admin/users", address: str = "203.0.113.9"
) -> httpx.Response:
    return await gateway.http.get(
        path, headers={"authorization": f"Bearer {key}", "x-forwarded-for": address}
    )


@pytest.fixture
async def behind_proxy(start_gateway: Start) -> Gateway:
    return await start_gateway(
        trusted_proxies="127.0.0.0/8", legacy_keys=True, cron_secret="secret-of-the-scheduler"
    )


@pytest.mark.parametrize(
    "key", ["not-the-admin-key", new_key("live"), f"{ADMIN_KEY}x"], ids=["text", "key", "nearly"]
)
async def test_the_eleventh_wrong_admin_key_of_a_minute_is_told_to_wait(
    behind_proxy: Gateway, key: str
) -> None:
    answers = [await guess(behind_proxy, key) for _ in range(12)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 2
    assert answers[-1].json()["error"]["code"] == "too_many_wrong_keys"
    assert 0 < int(answers[-1].headers["retry-after"]) <= 70
    assert (await guess(behind_proxy, key, address="203.0.113.10")).status_code == 401


async def test_a_right_key_works_whatever_others_have_tried_from_its_address(behind_proxy: Gateway) -> None:
    user = await behind_proxy.register()
    await behind_proxy.admin("PUT", f"/admin/users/{user.id}", json={"role": "admin"})
    await behind_proxy.database.value(
        'update public.api_keys_new set scope_permissions = \'{"admin": ["*"]}\' where user_id = $1', user.id
    )
    for _ in range(12):
        await guess(behind_proxy)
    assert (await guess(behind_proxy)).status_code == 429
    assert (await guess(behind_proxy, ADMIN_KEY)).status_code == 200
    assert (await guess(behind_proxy, user.key)).status_code == 200


async def test_guesses_are_counted_by_all_instances_together_and_exactly(start_gateway: Start) -> None:
    first, second = await start_gateway(), await start_gateway()
    answers = await asyncio.gather(*(guess(each) for _ in range(10) for each in (first, second)))
    assert sorted(answer.status_code for answer in answers) == [401] * 10 + [429] * 10


async def test_an_ipv6_host_s_whole_network_is_one_address(behind_proxy: Gateway) -> None:
    answers = [await guess(behind_proxy, address=f"2001:db8::{n}") for n in range(11)]
    assert answers[-1].status_code == 429


async def test_wrong_admin_keys_are_audited_once_a_minute_with_a_count(behind_proxy: Gateway) -> None:
    for _ in range(13):
        await guess(behind_proxy)
    await guess(behind_proxy, path="/internal/sweep")
    logs = (await behind_proxy.admin("GET", "/admin/audit-logs?action=INVALID_ADMIN_KEY"))["logs"]
    assert sum(log["occurrences"] for log in logs) == 13 and len(logs) <= 2  # the minute may turn in between
    assert {(log["actor"], log["ip"], log["user_id"]) for log in logs} == {
        ("address:203.0.113.9", "203.0.113.9", None)
    }
    assert "not-the-admin-key" not in str(logs)
    sweeps = (await behind_proxy.admin("GET", "/admin/audit-logs?action=INVALID_SWEEP_SECRET"))["logs"]
    assert [log["occurrences"] for log in sweeps] == [1]


async def test_guesses_of_the_sweep_s_secret_and_at_registration_count_too(behind_proxy: Gateway) -> None:
    for _ in range(10):
        assert (await guess(behind_proxy, path="/internal/sweep")).status_code == 401
    assert (await guess(behind_proxy, path="/internal/sweep")).status_code == 429
    assert (await guess(behind_proxy)).status_code == 429
    body = {"username": "ada", "email": "ada@example.com"}
    headers = {"x-api-key": "wrong-admin-key", "x-forwarded-for": "203.0.113.9"}
    assert (await behind_proxy.http.post("/auth/register", headers=headers, json=body)).status_code == 429
    assert (await guess(behind_proxy, "secret-of-the-scheduler", path="/internal/sweep")).status_code == 200


async def test_no_key_at_all_and_a_user_s_key_are_no_guesses(behind_proxy: Gateway) -> None:
    user = await behind_proxy.register()
    for _ in range(12):
        assert (
            await behind_proxy.http.get("/admin/users", headers={"x-forwarded-for": "203.0.113.9"})
        ).status_code == 401
        assert (await guess(behind_proxy, user.key)).status_code == 403


async def test_a_wrong_user_s_key_is_audited_once_a_minute_with_a_count(behind_proxy: Gateway) -> None:
    for _ in range(3):
        assert (await guess(behind_proxy, new_key("live"), path="/user/balance")).status_code == 401
    logs = (await behind_proxy.admin("GET", "/admin/audit-logs?action=INVALID_KEY"))["logs"]
    assert sum(log["occurrences"] for log in logs) == 3 and logs[0]["actor"] == "address:203.0.113.9"


# Registration.


async def test_what_is_taken_counts_towards_the_five_an_hour_of_an_address(start_gateway: Start) -> None:
    """On purpose: who asks five times an hour whether names or addresses are registered learns five answers
    an hour.
    """
    gateway = await start_gateway(registration="open")
    body = {"username": "ada", "email": "ada@example.com"}
    answers = [await gateway.http.post("/auth/register", json=body) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200, 409, 409, 409, 409, 429]


async def delete(user: User) -> None:
    body = {"confirmation": "DELETE_ACCOUNT"}
    response = await user.gateway.http.request("DELETE", "/user/account", headers=user.headers, json=body)
    assert response.status_code == 200


async def credits_of_new(gateway: Gateway, username: str, email: str) -> tuple[User, Any]:
    body = await gateway.admin("POST", "/auth/register", json={"username": username, "email": email})
    return User(gateway, body["user_id"], body["api_key"]), body["credits"]


async def test_an_email_address_gets_signup_credits_once(gateway: Gateway) -> None:
    user, credits = await credits_of_new(gateway, "ada", "Ada@example.com")
    assert credits == 10
    await delete(user)
    again, credits = await credits_of_new(gateway, "ada", "ada@EXAMPLE.com")
    assert (credits, (await again.balance())["credits"]) == (0, 0)
    _, credits = await credits_of_new(gateway, "bob", "bob@example.com")
    assert credits == 10
    await gateway.database.assert_books_balance()


async def test_changing_the_address_before_leaving_earns_no_second_credits(gateway: Gateway) -> None:
    user, _ = await credits_of_new(gateway, "ada", "ada@example.com")
    changed = await gateway.http.put(
        "/user/profile", headers=user.headers, json={"email": "other@example.com"}
    )
    assert changed.status_code == 200
    await delete(user)
    for name, address in (("ada", "ada@example.com"), ("ada2", "other@example.com")):
        assert (await credits_of_new(gateway, name, address))[1] == 0


async def test_an_account_older_than_the_claims_claims_its_address_as_it_goes(gateway: Gateway) -> None:
    user, _ = await credits_of_new(gateway, "ada", "ada@example.com")
    await gateway.database.value("delete from public.signup_claims where true")
    await delete(user)
    assert (await credits_of_new(gateway, "ada", "ada@example.com"))[1] == 0


async def test_what_is_kept_of_an_address_is_no_plain_hash_and_outlives_a_change_of_secrets(
    start_gateway: Start,
) -> None:
    old, new = (base64.urlsafe_b64encode(bytes([n]) * 32).decode() for n in (1, 2))
    gateway = await start_gateway(key_hash_secrets=old)
    user, _ = await credits_of_new(gateway, "ada", "ada@example.com")
    await delete(user)
    (row,) = await gateway.database.rows("select email_hash from public.signup_claims")
    assert row["email_hash"] != hashlib.sha256(b"ada@example.com").hexdigest()
    later = await start_gateway(key_hash_secrets=f"{new},{old}")
    assert (await credits_of_new(later, "ada", "ada@example.com"))[1] == 0


async def test_a_user_without_signup_credits_may_get_them_later(start_gateway: Start) -> None:
    poor = await start_gateway(signup_credits=Decimal(0))
    user, credits = await credits_of_new(poor, "ada", "ada@example.com")
    assert credits == 0
    await delete(user)
    rich = await start_gateway(signup_credits=Decimal(5))
    assert (await credits_of_new(rich, "ada", "ada@example.com"))[1] == 5


# Keys and the log of who did what.


async def test_a_user_has_at_most_five_hundred_keys_in_all(gateway: Gateway) -> None:
    user = await gateway.register()
    await gateway.database.value(
        """insert into public.api_keys_new
               (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, is_active)
           select $1, 'idle ' || n, 'gw_live_', '0000', lpad(to_hex(n), 64, '0'), 'x', false
           from generate_series(1, 498) as n""",
        user.id,
    )
    makes = [
        await gateway.http.post("/user/api-keys", headers=user.headers, json={"key_name": name})
        for name in ("the last", "one too many")
    ]
    assert [answer.status_code for answer in makes] == [200, 409]
    assert "500 keys" in makes[1].json()["error"]["message"]
    body = {"confirmation": "DELETE_KEY"}
    made = makes[0].json()["key"]["id"]
    assert (
        await gateway.http.request("DELETE", f"/user/api-keys/{made}", headers=user.headers, json=body)
    ).status_code == 200
    assert (
        await gateway.http.post("/user/api-keys", headers=user.headers, json={"key_name": "again"})
    ).status_code == 200


async def test_a_user_sees_what_an_administrator_did_and_not_from_where(gateway: Gateway) -> None:
    user, staff = await gateway.register(), await gateway.register()
    await gateway.admin("PUT", f"/admin/users/{staff.id}", json={"role": "admin"})
    await gateway.database.value(
        'update public.api_keys_new set scope_permissions = \'{"admin": ["*"]}\' where user_id = $1', staff.id
    )
    body = {"user_id": user.id, "credits": 1}
    assert (
        await gateway.http.post("/admin/add_credits", headers=staff.headers, json=body)
    ).status_code == 200
    assert (
        await gateway.http.put("/user/profile", headers=user.headers, json={"name": "Ada"})
    ).status_code == 200
    own = (await gateway.http.get("/user/api-keys/audit-logs", headers=user.headers)).json()["logs"]
    assert [
        (log["action"], log["actor"] == "admin", log["ip"], log["user_agent"] is None) for log in own
    ] == [
        ("update_profile", False, "127.0.0.1", False),
        ("add_credits", True, None, True),
        ("set_limits", True, None, True),
        ("create", True, None, True),
    ]
    exported = await gateway.http.get(
        "/user/api-keys/audit-logs?format=jsonl&action=add_credits", headers=user.headers
    )
    assert "127.0.0.1" not in exported.text and "python-httpx" not in exported.text
    every = (await gateway.admin("GET", f"/admin/audit-logs?user_id={user.id}"))["logs"]
    assert {log["ip"] for log in every} == {"127.0.0.1"} and all(log["user_agent"] for log in every)
    assert every[1]["actor"].startswith("key:")


async def test_a_user_s_log_is_their_own_filtered_and_paged(gateway: Gateway) -> None:
    user, _ = await gateway.register(), await gateway.register()
    for number in range(5):
        await gateway.http.post("/user/api-keys", headers=user.headers, json={"key_name": f"key {number}"})
    seen, cursor = [], ""
    while cursor is not None:
        path = f"/user/api-keys/audit-logs?action=create&limit=4{cursor and '&cursor=' + cursor}"
        page = (await gateway.http.get(path, headers=user.headers)).json()
        seen += page["logs"]
        cursor = page["next_cursor"]
    assert len(seen) == 6 and {log["user_id"] for log in seen} == {user.id}
    moment = seen[2]["created_at"].replace("+", "%2B")
    part = (
        await gateway.http.get(
            f"/user/api-keys/audit-logs?action=create&start_date={moment}", headers=user.headers
        )
    ).json()["logs"]
    assert part == seen[:3]
    rest = (
        await gateway.http.get(
            f"/user/api-keys/audit-logs?action=create&end_date={moment}", headers=user.headers
        )
    ).json()["logs"]
    assert rest == seen[3:]
    (one,) = (
        await gateway.http.get(f"/user/api-keys/audit-logs?key_id={seen[0]['key_id']}", headers=user.headers)
    ).json()["logs"]
    assert one == seen[0]


# Rows that apply to everybody without one of their own.


async def test_built_in_plans_and_default_limits_can_still_be_changed(gateway: Gateway) -> None:
    free = next(plan for plan in (await gateway.http.get("/plans")).json() if plan["slug"] == "free")
    changed = await gateway.admin("PUT", f"/admin/plans/{free['id']}", json={"daily_request_limit": 7})
    assert changed["daily_request_limit"] == 7
    refused = await gateway.http.delete(f"/admin/plans/{free['id']}", headers=ADMIN)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "plan_id")
    await gateway.database.value(
        "update public.rate_limit_configs set requests_per_minute = 5 where subject = 'default'"
    )


# Health, and what a browser may read.


async def test_a_health_check_counts_the_users_once_in_a_while(
    database: Database, start_gateway: Start
) -> None:
    async with database_link(database) as link:
        gateway = await start_gateway(database_url=link.url)
        await gateway.register()
        first = (await gateway.http.get("/health")).json()
        assert (first["status"], first["user_count"]) == ("healthy", 1)
        before = link.round_trips
        assert (await gateway.http.get("/health")).json()["user_count"] == 1
        assert link.round_trips == before + 1
        await assert_dead(gateway, link)


async def assert_dead(gateway: Gateway, link: DatabaseLink) -> None:
    link.cut()
    response = await gateway.http.get("/health")
    assert (response.status_code, response.json()["database"]) == (503, "unavailable")
    link.mend()


@pytest.mark.parametrize("origins", ["*", "https://app.example"])
@pytest.mark.parametrize("path", ["/user/profile", "/v1/chat/completions"])
async def test_a_browser_may_read_that_its_body_was_too_large(
    start_gateway: Start, origins: str, path: str
) -> None:
    gateway = await start_gateway(cors_origins=origins, max_body_bytes=MAX_MANAGEMENT_BYTES)
    response = await gateway.http.post(
        path, headers={"origin": "https://app.example"}, content=b"x" * (MAX_MANAGEMENT_BYTES + 1)
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert response.headers["access-control-allow-origin"] == origins
    assert "x-request-id" in response.headers["access-control-expose-headers"].lower()


# 404s of administrators' orders name their field.


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/admin/add_credits", {"user_id": 999, "credits": 1}, "user_id"),
        ("POST", "/admin/add_credits", {"api_key": "gw_live_x", "credits": 1}, "api_key"),
        ("POST", "/admin/adjust_credits", {"user_id": 999, "credits": 1, "reason": "x"}, "user_id"),
        ("POST", "/admin/limit", {"user_id": 999, "rate_limits": {"burst": 1}}, "user_id"),
        ("POST", "/admin/limit", {"api_key": "gw_live_x", "rate_limits": {"burst": 1}}, "api_key"),
        ("POST", "/admin/assign-plan", {"user_id": 999, "plan_id": 1}, "user_id"),
        ("POST", "/admin/refund", {"request_id": "019a9f5e-0000-7000-8000-000000000000"}, "request_id"),
        ("POST", "/admin/keys/import", {"keys": [{"user_id": 999, "api_key": "x" * 20}]}, "keys.0.user_id"),
        ("GET", "/admin/users/999", None, "user_id"),
        ("PUT", "/admin/users/999", {"is_active": True}, "user_id"),
        ("PUT", "/admin/plans/999", {"name": "x"}, "plan_id"),
        ("DELETE", "/admin/plans/999", None, "plan_id"),
        ("DELETE", "/admin/keys/999", None, "key_id"),
    ],
)
async def test_the_missing_user_is_named(
    gateway: Gateway, method: str, path: str, body: Any, param: str
) -> None:
    response = await gateway.http.request(method, path, headers=ADMIN, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (404, param), response.text


async def test_an_unknown_plan_is_named_where_the_user_exists(gateway: Gateway) -> None:
    user = await gateway.register()
    response = await gateway.http.post(
        "/admin/assign-plan", headers=ADMIN, json={"user_id": user.id, "plan_id": 999}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (404, "plan_id")
