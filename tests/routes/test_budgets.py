"""Who pays and who may spend: users' own upstream keys, and budgets of their customers."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from tests.support.gateway import Gateway, live
from tests.support.servers import eventually
from tests.support.upstream import Upstream
from tests.support.users import CHAT_BODY, PROVIDER_KEY, ask, quote, scoped

ORDER = {"end_user": "customer-17", "budget": 5, "budget_window": "month"}
ROUTES: list[tuple[str, str, Any, str]] = [
    ("GET", "/user/provider-key", None, "account"),
    ("PUT", "/user/provider-key", {"key": PROVIDER_KEY}, "account"),
    ("DELETE", "/user/provider-key", None, "account"),
    ("GET", "/user/end-users", None, "budgets"),
    ("POST", "/user/end-users", ORDER, "budgets"),
    ("PUT", "/user/end-users/1", {"budget": 1}, "budgets"),
    ("DELETE", "/user/end-users/1", None, "budgets"),
    ("GET", "/user/budget-events", None, "budgets"),
]


@pytest.mark.parametrize(("method", "path", "body", "resource"), ROUTES)
async def test_a_route_is_closed_without_its_scope(
    gateway: Gateway, method: str, path: str, body: Any, resource: str
) -> None:
    user = await gateway.register()
    assert (await gateway.http.request(method, path, json=body)).status_code == 401
    everything_else = ["keys", "usage", "chat", *({"account", "budgets", "webhooks"} - {resource})]
    other = await scoped(user, {"read": everything_else, "write": everything_else})
    refused = await ask(other, method, path, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")


@pytest.mark.parametrize(
    ("method", "path", "body", "resource"), [route for route in ROUTES if route[0] != "GET"]
)
async def test_a_test_key_changes_nothing(
    gateway: Gateway, method: str, path: str, body: Any, resource: str
) -> None:
    user = await gateway.register(environment="test")
    refused = await ask(user, method, path, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")


# The user's own upstream key.


async def test_an_own_key_is_kept_encrypted_and_shown_masked(gateway: Gateway) -> None:
    user, other = await gateway.register(), await gateway.register()
    assert (await ask(user, "GET", "/user/provider-key")).status_code == 404
    body = (await ask(user, "PUT", "/user/provider-key", {"key": PROVIDER_KEY})).json()
    assert body["provider_key"]["label"] == "sk-or-v1-012...def"
    assert body["checked"] is False
    response = await ask(user, "GET", "/user/provider-key")
    assert (response.status_code, response.json()["provider_key"]["label"]) == (200, "sk-or-v1-012...def")
    assert PROVIDER_KEY not in response.text
    assert (await ask(other, "GET", "/user/provider-key")).status_code == 404
    stored = await gateway.database.value(
        "select encrypted_key from public.provider_keys where user_id = $1", user.id
    )
    assert PROVIDER_KEY not in stored
    assert gateway.app.state.service.runtime.vault.decrypt(stored) == PROVIDER_KEY
    assert (await ask(other, "DELETE", "/user/provider-key")).status_code == 404
    assert (await ask(user, "DELETE", "/user/provider-key")).status_code == 200
    assert (await ask(user, "DELETE", "/user/provider-key")).status_code == 404
    assert await gateway.database.value("select count(*) from public.provider_keys") == 0


async def test_a_newer_key_takes_the_place_of_the_old_and_both_are_audited_without_the_secret(
    gateway: Gateway,
) -> None:
    user = await gateway.register()
    for key in (PROVIDER_KEY, "sk-or-v1-" + "f" * 64):
        assert (await ask(user, "PUT", "/user/provider-key", {"key": key})).status_code == 200
    assert (await ask(user, "GET", "/user/provider-key")).json()["provider_key"][
        "label"
    ] == "sk-or-v1-fff...fff"
    await ask(user, "DELETE", "/user/provider-key")
    logs = (await ask(user, "GET", "/user/api-keys/audit-logs")).json()["logs"]
    actions = [(log["action"], log["details"]) for log in logs if "provider" in log["action"]]
    assert actions == [
        ("delete_provider_key", {"label": "sk-or-v1-fff...fff"}),
        ("set_provider_key", {"label": "sk-or-v1-fff...fff"}),
        ("set_provider_key", {"label": "sk-or-v1-012...def"}),
    ]
    dump = await gateway.database.value("select string_agg(a::text, '') from public.audit_logs a")
    assert PROVIDER_KEY not in dump
    assert "f" * 64 not in dump


@pytest.mark.parametrize(
    "key",
    [
        "",
        "sk-or-v1-",
        PROVIDER_KEY[:-1],
        PROVIDER_KEY + "0",
        PROVIDER_KEY.upper(),
        "sk-proj-" + "0" * 64,
        7,
        None,
    ],
)
async def test_what_is_no_openrouter_key_is_refused(gateway: Gateway, key: Any) -> None:
    user = await gateway.register()
    refused = await ask(user, "PUT", "/user/provider-key", {"key": key})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "key")
    assert "0123456789abcdef" not in refused.text


async def test_a_live_gateway_asks_openrouter_about_the_key(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register()
    stored = await ask(user, "PUT", "/user/provider-key", {"key": PROVIDER_KEY})
    assert (stored.status_code, stored.json()["checked"]) == (200, True)
    call = [call for call in upstream.sandbox.state.calls if call.path == "/key"][-1]
    assert (b"authorization", f"Bearer {PROVIDER_KEY}".encode()) in call.raw_headers


async def test_a_key_that_openrouter_refuses_is_not_kept(
    start_gateway: Any, upstream: Upstream, refusing: Any
) -> None:
    await start_gateway(**live(upstream.url))  # a database goes live with a key that is taken
    gateway = await start_gateway(**await refusing(401))
    user = await gateway.register()
    refused = await ask(user, "PUT", "/user/provider-key", {"key": PROVIDER_KEY})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "provider_key_refused")
    assert (await ask(user, "GET", "/user/provider-key")).status_code == 404


async def test_a_key_that_cannot_be_checked_now_is_kept_and_that_is_said(
    start_gateway: Any, refusing: Any
) -> None:
    gateway = await start_gateway(**await refusing(503))
    user = await gateway.register()
    stored = await ask(user, "PUT", "/user/provider-key", {"key": PROVIDER_KEY})
    assert (stored.status_code, stored.json()["checked"]) == (200, False)


async def test_what_goes_out_with_an_own_key_is_shown_as_such(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=1)
    await ask(user, "PUT", "/user/provider-key", {"key": PROVIDER_KEY})
    sent = await user.chat()
    assert sent.status_code == 200, sent.text
    assert (b"authorization", f"Bearer {PROVIDER_KEY}".encode()) in upstream.sandbox.state.calls[
        -1
    ].raw_headers
    receipt = (await ask(user, "GET", f"/v1/receipts/{sent.headers['x-request-id']}")).json()
    assert (receipt["byok"], receipt["charge"]["charged"], receipt["charge"]["markup_amount"]) == (
        True,
        0,
        None,
    )
    assert receipt["charge"]["upstream_cost"] > 0
    assert receipt["charge"]["balance_after"] == 1
    assert "own upstream key" in receipt["message"]
    data = (await ask(user, "GET", "/v1/key")).json()["data"]
    assert (data["usage"], data["byok_usage"], data["byok_usage_daily"]) == (
        0,
        *[receipt["charge"]["upstream_cost"]] * 2,
    )
    generation = (await ask(user, "GET", f"/v1/generation?id={sent.headers['x-generation-id']}")).json()[
        "data"
    ]
    assert (generation["is_byok"], generation["total_cost"]) == (True, 0)
    assert generation["upstream_inference_cost"] == receipt["charge"]["upstream_cost"]


async def test_with_an_own_key_a_quote_holds_nothing(gateway: Gateway) -> None:
    user = await gateway.register()
    await ask(user, "PUT", "/user/provider-key", {"key": PROVIDER_KEY})
    body = (await quote(user, {"body": CHAT_BODY})).json()
    assert (body["byok"], body["affordable"], body["would_hold"], body["estimated_cost"]) == (
        True,
        True,
        0,
        0,
    )


# Budgets of end users.


async def test_budgets_of_end_users_are_made_changed_and_taken_away(gateway: Gateway) -> None:
    user, other = await gateway.register(), await gateway.register()
    made = await ask(user, "POST", "/user/end-users", {**ORDER, "budget": "0.123456789"})
    assert made.status_code == 201, made.text
    view = json.loads(made.text, parse_float=Decimal)
    assert (view["budget"], view["remaining"], view["spent"], view["held"]) == (
        Decimal("0.123456789"),
        Decimal("0.123456789"),
        0,
        0,
    )
    assert (view["end_user"], view["budget_of"], view["budget_window"]) == (
        "customer-17",
        "customer-17",
        "month",
    )
    assert view["window_start"].endswith("-01T00:00:00+00:00")
    path = f"/user/end-users/{view['id']}"
    for method, body in (("PUT", {"budget": 9}), ("DELETE", None)):
        refused = await ask(other, method, path, body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "budget_id")
    assert (await ask(other, "GET", "/user/end-users")).json()["end_users"] == []
    changed = (await ask(user, "PUT", path, {"budget_window": "lifetime"})).json()
    assert (changed["budget"], changed["budget_window"], changed["window_start"]) == (
        0.123456789,
        "lifetime",
        None,
    )
    assert (await ask(user, "PUT", path, {"budget": 0})).json()["remaining"] == 0
    assert (await ask(user, "DELETE", path)).status_code == 200
    assert (await ask(user, "DELETE", path)).status_code == 404
    actions = [log["action"] for log in (await ask(user, "GET", "/user/api-keys/audit-logs")).json()["logs"]]
    assert actions[:4] == [
        "delete_end_user_budget",
        "update_end_user_budget",
        "update_end_user_budget",
        "create_end_user_budget",
    ]


async def test_a_name_has_one_budget(gateway: Gateway) -> None:
    user, other = await gateway.register(), await gateway.register()
    assert (await ask(user, "POST", "/user/end-users", ORDER)).status_code == 201
    taken = await ask(user, "POST", "/user/end-users", ORDER)
    assert (taken.status_code, taken.json()["error"]["param"]) == (409, "end_user")
    assert (await ask(other, "POST", "/user/end-users", ORDER)).status_code == 201


async def test_the_default_holds_for_each_end_user_without_a_budget(gateway: Gateway) -> None:
    user = await gateway.register()
    await ask(user, "POST", "/user/end-users", {"end_user": "*", "budget": 2, "budget_window": "day"})
    await ask(user, "POST", "/user/end-users", ORDER)
    async with gateway.database.owner() as owner:
        await owner.execute(
            "insert into public.end_user_usage (user_id, end_user, budget_since, budget_spent_nanos, "
            "budget_held_nanos) values "
            "($1, 'stranger', date_trunc('day', now(), 'UTC'), 500000000, 250000000),"
            "($1, 'customer-17', date_trunc('month', now(), 'UTC') - interval '1 day', 4000000000, 0)",
            user.id,
        )
    (stranger,) = (await ask(user, "GET", "/user/end-users?end_user=stranger")).json()["end_users"]
    assert (stranger["budget_of"], stranger["spent"], stranger["held"], stranger["remaining"]) == (
        "*",
        0.5,
        0.25,
        1.25,
    )
    (known,) = (await ask(user, "GET", "/user/end-users?end_user=customer-17")).json()["end_users"]
    assert (known["budget_of"], known["spent"], known["remaining"]) == ("customer-17", 0, 5)
    listed = (await ask(user, "GET", "/user/end-users?limit=1")).json()
    assert [view["end_user"] for view in listed["end_users"]] == ["customer-17"]
    assert [known[name] for name in ("created_at", "updated_at")] == [
        listed["end_users"][0][name] for name in ("created_at", "updated_at")
    ]
    assert known["created_at"] > stranger["created_at"]
    rest = (await ask(user, "GET", f"/user/end-users?cursor={listed['next_cursor']}")).json()
    assert [view["end_user"] for view in rest["end_users"]] == ["*"]


async def test_without_any_budget_an_end_user_has_no_standing(gateway: Gateway) -> None:
    user = await gateway.register()
    assert (await ask(user, "GET", "/user/end-users?end_user=anybody")).json()["end_users"] == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"end_user": ""}, "end_user"),
        ({"end_user": "x" * 257}, "end_user"),
        ({"end_user": "a\x00b"}, "end_user"),
        ({"end_user": 7}, "end_user"),
        ({"budget": -1}, "budget"),
        ({"budget": "0.0000000001"}, "budget"),
        ({"budget": "NaN"}, "budget"),
        ({"budget": 1e300}, "budget"),
        ({"budget_window": "year"}, "budget_window"),
        ({"typo": 1}, "typo"),
    ],
    ids=str,
)
async def test_a_budget_that_makes_no_sense_names_its_field(
    gateway: Gateway, changes: dict[str, Any], param: str
) -> None:
    user = await gateway.register()
    refused = await ask(user, "POST", "/user/end-users", {**ORDER, **changes})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert (await ask(user, "GET", "/user/end-users")).json()["end_users"] == []


async def test_a_change_that_changes_nothing_is_refused(gateway: Gateway) -> None:
    user = await gateway.register()
    assert (await ask(user, "PUT", "/user/end-users/1", {})).status_code == 400


async def test_a_quote_is_bounded_by_the_end_users_budget(gateway: Gateway) -> None:
    user = await gateway.register()
    await ask(
        user, "POST", "/user/end-users", {"end_user": "poor", "budget": "0.000001", "budget_window": "day"}
    )
    body = {name: CHAT_BODY[name] for name in ("model", "messages")}
    assert (await quote(user, {"body": body})).json()["affordable"]
    for asked, headers in (({**body, "user": "poor"}, {}), (body, {"x-end-user": "poor"})):
        quoted = (await quote(user, {"body": asked}, **headers)).json()
        assert (quoted["affordable"], quoted["reason"], quoted["available"]) == (
            False,
            "end_user_budget_exceeded",
            0.000001,
        )


async def test_a_key_that_was_revoked_in_the_meantime_changes_nothing(gateway: Gateway) -> None:
    user = await gateway.register()
    item = {
        "user_id": user.id,
        "maker_id": 10**9,
        "actor": "key:0",
        "address": None,
        "user_agent": None,
        "request_id": None,
    }
    for function, rest in (
        ("set_provider_key", {"encrypted_key": "x", "label": "x"}),
        ("create_end_user_budget", {"end_user": "a", "budget_nanos": "1", "budget_window": "day"}),
        ("create_webhook", {"url": "https://a.example.com", "encrypted_secret": "x"}),
    ):
        result = await gateway.database.value(f"select public.{function}($1)", json.dumps({**item, **rest}))
        assert json.loads(result) == {"outcome": "not_found"}


async def test_budget_events_are_listed_by_page_and_for_their_owner_only(gateway: Gateway) -> None:
    user, other = await gateway.register(), await gateway.register()
    await user.chat()
    (record,) = await eventually(user.records, lambda value: len(value) == 1)
    async with gateway.database.owner() as owner:
        for level in (50, 80):
            await owner.execute(
                "insert into public.budget_events (user_id, key_id, level, budget_nanos, spent_nanos, "
                "budget_window, window_start, "
                "request_id) values ($1, $2, $3, 1000000000, 800000001, 'lifetime', '-infinity', $4)",
                user.id,
                record["key_id"],
                level,
                record["request_id"],
            )
    first = (await ask(user, "GET", "/user/budget-events?limit=1")).json()
    second = (await ask(user, "GET", f"/user/budget-events?limit=1&cursor={first['next_cursor']}")).json()
    assert [page["events"][0]["level"] for page in (first, second)] == [80, 50]
    event = first["events"][0]
    assert (event["budget"], event["spent"], event["window_start"], event["end_user"]) == (
        1,
        0.800000001,
        None,
        None,
    )
    assert (await ask(other, "GET", "/user/budget-events")).json()["events"] == []
