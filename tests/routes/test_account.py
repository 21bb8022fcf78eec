"""A user's account: profile, deletion, suspension, plans and limits, as they hold at admission."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.gateway import Gateway, User
from tests.support.servers import eventually

LIMITS_OF_FREE = {
    "daily_requests": 100,
    "daily_tokens": 10000,
    "monthly_requests": 1000,
    "monthly_tokens": 100000,
}


async def get(user: User, path: str) -> Any:
    response = await user.gateway.http.get(path, headers=user.headers)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_profile_is_read_and_changed(gateway: Gateway) -> None:
    user = await gateway.register()
    before = await get(user, "/user/profile")
    response = await gateway.http.put(
        "/user/profile", headers=user.headers, json={"name": "Ada", "preferences": {"theme": "dark"}}
    )
    after = response.json()
    assert (after["username"], after["preferences"], after["email"]) == (
        "Ada",
        {"theme": "dark"},
        before["email"],
    )


@pytest.mark.parametrize(
    "body", [{}, {"name": None}, {"role": "admin"}, {"credits": 100}, {"email": "nonsense"}]
)
async def test_a_profile_change_that_is_wrong_changes_nothing(gateway: Gateway, body: dict[str, Any]) -> None:
    user = await gateway.register()
    before = await get(user, "/user/profile")
    assert (await gateway.http.put("/user/profile", headers=user.headers, json=body)).status_code == 400
    assert await get(user, "/user/profile") == before


async def test_a_taken_email_is_a_conflict(gateway: Gateway) -> None:
    first, second = await gateway.register(), await gateway.register()
    taken = (await get(first, "/user/profile"))["email"].upper()
    response = await gateway.http.put("/user/profile", headers=second.headers, json={"email": taken})
    assert (response.status_code, response.json()["error"]["param"]) == (409, "email")


async def test_deleting_an_account_kills_its_keys_and_keeps_the_books(gateway: Gateway) -> None:
    user = await gateway.register(credits=5)
    assert (await user.chat()).status_code == 200
    refused = await gateway.http.request(
        "DELETE", "/user/account", headers=user.headers, json={"confirmation": "yes"}
    )
    assert refused.status_code == 400
    gone = await gateway.http.request(
        "DELETE", "/user/account", headers=user.headers, json={"confirmation": "DELETE_ACCOUNT"}
    )
    assert gone.json()["user_id"] == user.id
    assert (await user.chat()).status_code == 401
    (row,) = await gateway.database.rows("select * from public.users where id = $1", user.id)
    assert (row["username"], row["email"], row["credits_nanos"], row["is_active"]) == (
        f"deleted-{user.id}",
        f"deleted-{user.id}",
        0,
        False,
    )
    assert (
        await gateway.database.value("select count(*) from public.usage_records where user_id = $1", user.id)
        == 1
    )
    await gateway.database.assert_books_balance()


async def test_what_a_running_request_held_of_a_deleted_account_expires_as_it_settles(
    gateway: Gateway,
) -> None:
    user = await gateway.register()
    running = asyncio.create_task(user.chat(scenario="slow;ms=100;tokens=8", stream=True))
    await eventually(
        lambda: gateway.database.value("select held_nanos from public.users where id = $1", user.id), bool
    )
    await gateway.http.request(
        "DELETE", "/user/account", headers=user.headers, json={"confirmation": "DELETE_ACCOUNT"}
    )
    assert (await running).status_code == 200
    assert await gateway.database.rows(
        "select credits_nanos, held_nanos from public.users where id = $1", user.id
    ) == [{"credits_nanos": 0, "held_nanos": 0}]
    await gateway.database.assert_books_balance()


async def test_a_suspended_user_is_refused_and_a_restored_one_served(gateway: Gateway) -> None:
    user = await gateway.register()
    await gateway.admin("PUT", f"/admin/users/{user.id}", json={"is_active": False})
    refused = await user.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "account_suspended")
    await gateway.admin("PUT", f"/admin/users/{user.id}", json={"is_active": True})
    assert (await user.chat()).status_code == 200


async def test_an_ended_trial_is_refused_until_credits_are_granted(gateway: Gateway) -> None:
    user = await gateway.register()
    await gateway.database.value(
        "update public.users set trial_expires_at = now() - interval '1 second' where id = $1", user.id
    )
    refused = await user.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "trial_expired")
    await gateway.admin("POST", "/admin/add_credits", json={"user_id": user.id, "credits": 1})
    assert (await user.chat()).status_code == 200
    assert (await get(user, "/user/profile"))["subscription_status"] == "active"


async def test_without_a_plan_the_free_limits_apply_and_credits_lift_them(gateway: Gateway) -> None:
    user = await gateway.register()
    assert (await gateway.http.get("/user/plan", headers=user.headers)).status_code == 404
    usage = await get(user, "/user/plan/usage")
    assert (usage["has_plan"], usage["plan_name"], usage["limits"]) == (False, "Free", LIMITS_OF_FREE)
    await gateway.admin("POST", "/admin/add_credits", json={"user_id": user.id, "credits": 1})
    assert (await get(user, "/user/plan/usage"))["plan_name"] == "Pay as you go"


async def test_a_plan_is_made_assigned_enforced_cancelled_and_taken_off(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    plan = await gateway.admin(
        "POST",
        "/admin/plans",
        json={
            "slug": "tiny",
            "name": "Tiny",
            "daily_request_limit": 1,
            "features": ["export"],
            "price_per_month": 9.99,
        },
    )
    assert plan["price_per_month"] == 9.99
    await gateway.admin(
        "POST", "/admin/assign-plan", json={"user_id": user.id, "plan_id": plan["id"], "duration_months": 2}
    )
    assert (await get(user, "/user/plan"))["plan"]["slug"] == "tiny"
    entitlements = await get(user, "/user/plan/entitlements?feature=export")
    assert (entitlements["has_plan"], entitlements["can_access_feature"]) == (True, True)
    assert (await user.chat()).status_code == 200
    refused = await user.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "plan_limit_exceeded")
    assert 0 < int(refused.headers["retry-after"]) <= 86400
    assert (await get(user, "/user/plan/usage"))["at_limit"]["daily_requests"] is True
    assert (await gateway.http.delete("/user/plan", headers=user.headers)).status_code == 200
    assert (await user.chat()).status_code == 200
    await gateway.admin("DELETE", f"/admin/plans/{plan['id']}")
    assert (await gateway.http.get(f"/plans/{plan['id']}")).status_code == 404
    assert "tiny" not in [each["slug"] for each in (await gateway.http.get("/plans")).json()]


async def test_a_plan_that_has_ended_applies_no_more(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    plan = await gateway.admin(
        "POST", "/admin/plans", json={"slug": "none", "name": "None", "daily_request_limit": 0}
    )
    await gateway.admin("POST", "/admin/assign-plan", json={"user_id": user.id, "plan_id": plan["id"]})
    assert (await user.chat()).status_code == 429
    await gateway.database.value(
        "update public.user_plans set start_date = now() - interval '2 days', "
        "end_date = now() - interval '1 second' where user_id = $1",
        user.id,
    )
    assert (await user.chat()).status_code == 200


async def test_a_staging_key_has_the_plans_limit_times_its_factor(gateway: Gateway) -> None:
    user = await gateway.register(credits=1, environment="staging")
    plan = await gateway.admin(
        "POST",
        "/admin/plans",
        json={
            "slug": "half",
            "name": "Half",
            "daily_request_limit": 4,
            "environment_factors": {"staging": 0.5},
        },
    )
    await gateway.admin("POST", "/admin/assign-plan", json={"user_id": user.id, "plan_id": plan["id"]})
    assert [(await user.chat()).status_code for _ in range(3)] == [200, 200, 429]


async def test_models_that_a_plan_does_not_allow_are_refused(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    plan = await gateway.admin(
        "POST", "/admin/plans", json={"slug": "few", "name": "Few", "allowed_models": ["openai/*"]}
    )
    await gateway.admin("POST", "/admin/assign-plan", json={"user_id": user.id, "plan_id": plan["id"]})
    assert (await user.chat()).status_code == 200
    refused = await user.chat(model="anthropic/claude-haiku-4.5")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")


async def test_limits_are_shown_with_what_is_used_of_them(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    await gateway.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"requests_per_minute": 2}}
    )
    assert [(await user.chat()).status_code for _ in range(3)] == [200, 200, 429]
    response = await get(user, "/user/limit")
    assert (
        response["current_limits"]["requests_per_minute"],
        response["current_usage"]["requests_per_minute"],
    ) == (2, 2)


async def test_two_instances_enforce_one_limit_exactly(start_gateway: Any) -> None:
    first, second = await start_gateway(), await start_gateway()
    user = await first.register(credits=1)
    await first.admin(
        "POST", "/admin/limit", json={"user_id": user.id, "rate_limits": {"requests_per_minute": 7}}
    )
    elsewhere = User(second, user.id, user.key)
    answers = await asyncio.gather(*(each.chat() for _ in range(10) for each in (user, elsewhere)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [429] * 13


async def test_environment_usage_adds_up_the_keys(gateway: Gateway) -> None:
    user = await gateway.register()
    await user.chat()
    response = (await get(user, "/user/environment-usage"))["environment_usage"]
    assert response == {"live": {"total_requests": 1, "total_max_requests": None, "key_count": 1}}


async def test_the_monitor_counts_what_was_used(gateway: Gateway) -> None:
    user = await gateway.register()
    await user.chat()
    response = await get(user, "/user/monitor")
    metrics = response["usage_metrics"]
    assert (metrics["total_requests"], metrics["requests_today"], metrics["most_used_model"]) == (
        1,
        1,
        "openai/gpt-4o-mini",
    )
    assert round(10 - metrics["total_cost"], 9) == response["current_credits"]


@pytest.mark.parametrize(
    "preferences", [{"a": "x" * 9000}, {"a": "\x00"}, {"a": [{"b": 1e300}]}, {"a": -1e19}, {"a": 2**64}]
)
async def test_preferences_are_bounded(gateway: Gateway, preferences: dict[str, Any]) -> None:
    user = await gateway.register()
    response = await gateway.http.put(
        "/user/profile", headers=user.headers, json={"preferences": preferences}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "preferences")


async def test_preferences_may_hold_fractions(gateway: Gateway) -> None:
    user = await gateway.register()
    response = await gateway.http.put(
        "/user/profile", headers=user.headers, json={"preferences": {"a": 1.5, "b": 9e18, "c": 2**64 - 1}}
    )
    assert response.json()["preferences"] == {"a": 1.5, "b": 9e18, "c": 2**64 - 1}


async def test_names_of_deleted_accounts_are_reserved(gateway: Gateway) -> None:
    user = await gateway.register()
    response = await gateway.http.put("/user/profile", headers=user.headers, json={"name": "Deleted-7"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name")


async def test_an_order_of_a_megabyte_is_refused_before_it_is_read(gateway: Gateway) -> None:
    response = await gateway.http.post("/auth/register", content=b"[" * 2**20)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_completion_with_a_million_parts_is_refused_before_it_is_parsed(gateway: Gateway) -> None:
    user = await gateway.register()
    body = b'{"z":[' + b"[]," * 300_000 + b"[]]}"
    response = await gateway.http.post("/v1/chat/completions", headers=user.headers, content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
