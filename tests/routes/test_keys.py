"""A user's keys are made, changed, rotated and revoked, and are never broader than the key that does it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.gateway import ADMIN_KEY, Gateway, User


async def send(user: User | str, method: str, path: str, gateway: Gateway, **body: Any) -> httpx.Response:
    key = user if isinstance(user, str) else user.key
    return await gateway.http.request(
        method, path, headers={"authorization": f"Bearer {key}"}, json=body or None
    )


async def make(user: User | str, gateway: Gateway, **order: Any) -> dict[str, Any]:
    response = await send(user, "POST", "/user/api-keys", gateway, **{"key_name": "second", **order})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_a_made_key_works_and_is_listed_masked(gateway: Gateway) -> None:
    user = await gateway.register()
    made = await make(
        user,
        gateway,
        expiration_days=30,
        max_requests=100,
        ip_allowlist=["127.0.0.0/8"],
        budget=1.5,
        budget_window="day",
    )
    assert made["api_key"].startswith("gw_live_")
    listed = (await send(user, "GET", "/user/api-keys", gateway)).json()
    assert listed["total_keys"] == 2
    second = listed["keys"][1]
    assert second["api_key"] == f"gw_live_...{made['api_key'][-4:]}"
    assert (second["requests_remaining"], second["days_remaining"], second["budget"]) == (100, 29, 1.5)
    assert (await send(made["api_key"], "GET", "/user/balance", gateway)).status_code == 200


async def test_a_revoked_key_is_dead_with_the_next_request(gateway: Gateway) -> None:
    user = await gateway.register()
    made = await make(user, gateway)
    gone = await send(
        user, "DELETE", f"/user/api-keys/{made['key']['id']}", gateway, confirmation="DELETE_KEY"
    )
    assert gone.json()["deleted_key_id"] == made["key"]["id"]
    assert (await send(made["api_key"], "GET", "/user/balance", gateway)).status_code == 401


async def test_a_deleted_primary_key_no_longer_works(gateway: Gateway) -> None:
    user = await gateway.register()
    (primary,) = (await send(user, "GET", "/user/api-keys", gateway)).json()["keys"]
    assert primary["is_primary"]
    await send(user, "DELETE", f"/user/api-keys/{primary['id']}", gateway, confirmation="DELETE_KEY")
    assert (await send(user, "GET", "/user/api-keys", gateway)).status_code == 401


async def test_deleting_a_key_needs_the_confirmation(gateway: Gateway) -> None:
    user = await gateway.register()
    made = await make(user, gateway)
    response = await send(user, "DELETE", f"/user/api-keys/{made['key']['id']}", gateway, confirmation="yes")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "confirmation")


async def test_rotation_changes_the_secret_and_keeps_id_and_settings(gateway: Gateway) -> None:
    user = await gateway.register()
    made = await make(user, gateway, max_requests=7)
    rotated = (await send(user, "POST", f"/user/api-keys/{made['key']['id']}/rotate", gateway)).json()
    assert rotated["updated_key"]["id"] == made["key"]["id"]
    assert rotated["updated_key"]["max_requests"] == 7
    assert (await send(made["api_key"], "GET", "/user/balance", gateway)).status_code == 401
    assert (await send(rotated["api_key"], "GET", "/user/balance", gateway)).status_code == 200


async def test_the_old_secret_works_until_its_grace_period_ends(gateway: Gateway) -> None:
    user = await gateway.register()
    made = await make(user, gateway)
    await send(user, "POST", f"/user/api-keys/{made['key']['id']}/rotate", gateway, grace_period=3600)
    assert (await send(made["api_key"], "GET", "/user/balance", gateway)).status_code == 200
    await gateway.database.value(
        "update public.api_keys_new set previous_valid_until = now() - interval '1 second' where id = $1",
        made["key"]["id"],
    )
    assert (await send(made["api_key"], "GET", "/user/balance", gateway)).status_code == 401


async def test_bulk_rotation_takes_the_keys_of_one_environment(gateway: Gateway) -> None:
    user = await gateway.register()
    staging = await make(user, gateway, key_name="a", environment_tag="staging")
    await make(user, gateway, key_name="b", environment_tag="staging")
    response = await send(
        user,
        "PUT",
        f"/user/api-keys/{staging['key']['id']}",
        gateway,
        action="bulk_rotate",
        environment_tag="staging",
    )
    body = response.json()
    assert (body["rotated_count"], [key["key_name"] for key in body["new_keys"]]) == (2, ["a", "b"])
    assert (await send(staging["api_key"], "GET", "/user/balance", gateway)).status_code == 401
    assert (await send(body["new_keys"][0]["api_key"], "GET", "/user/balance", gateway)).status_code == 200
    assert (await send(user, "GET", "/user/balance", gateway)).status_code == 200


async def test_an_update_changes_the_key_of_the_path_and_no_other(gateway: Gateway) -> None:
    user = await gateway.register()
    made = await make(user, gateway)
    response = await send(
        user,
        "PUT",
        f"/user/api-keys/{made['key']['id']}",
        gateway,
        key_name="renamed",
        ip_allowlist=["10.0.0.1"],
    )
    assert response.json()["updated_key"]["key_name"] == "renamed"
    refused = await send(made["api_key"], "GET", "/user/balance", gateway)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "ip_not_allowed")
    assert (await send(user, "GET", "/user/balance", gateway)).status_code == 200


@pytest.mark.parametrize(
    ("order", "param"),
    [
        ({"key_name": ""}, "key_name"),
        ({"expiration_days": 0}, "expiration_days"),
        ({"expiration_days": 36501}, "expiration_days"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_requests": 10**30}, "max_requests"),
        ({"ip_allowlist": ["10.0.0.1/8"]}, "ip_allowlist.0"),
        ({"ip_allowlist": ["nonsense"]}, "ip_allowlist.0"),
        ({"domain_referrers": ["http://example.com"]}, "domain_referrers.0"),
        ({"scope_permissions": {"fly": ["*"]}}, "scope_permissions.fly"),
        ({"scope_permissions": {"read": ["a b"]}}, "scope_permissions.read.0"),
        ({"scope_permissions": {"write": ["chat", "foo"]}}, "scope_permissions.write.1"),
        ({"environment_tag": "moon"}, "environment_tag"),
        ({"budget": -1, "budget_window": "day"}, "budget"),
        ({"unknown": 1}, "unknown"),
    ],
)
async def test_a_key_order_that_is_wrong_names_its_field(
    gateway: Gateway, order: dict[str, Any], param: str
) -> None:
    user = await gateway.register()
    response = await send(user, "POST", "/user/api-keys", gateway, **{"key_name": "second", **order})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_name_is_unique_among_a_users_keys(gateway: Gateway) -> None:
    user = await gateway.register()
    await make(user, gateway)
    response = await send(user, "POST", "/user/api-keys", gateway, key_name="second")
    assert (response.status_code, response.json()["error"]["param"]) == (409, "key_name")


async def test_a_user_has_at_most_fifty_active_keys(gateway: Gateway) -> None:
    user = await gateway.register()
    for number in range(49):
        await make(user, gateway, key_name=f"key {number}")
    assert (await send(user, "POST", "/user/api-keys", gateway, key_name="one more")).status_code == 409


@pytest.mark.parametrize(
    ("rules", "order", "field"),
    [
        (
            {"scope_permissions": {"write": ["keys"]}},
            {"scope_permissions": {"write": ["*"]}},
            "scope_permissions",
        ),
        (
            {"scope_permissions": {"write": ["*"]}},
            {"scope_permissions": {"write": ["*"], "admin": ["*"]}},
            "scope_permissions",
        ),
        ({"environment_tag": "test"}, {"environment_tag": "live"}, "environment_tag"),
        ({"environment_tag": "staging"}, {"environment_tag": "live"}, "environment_tag"),
        ({"expiration_days": 3}, {}, "expiration_date"),
        ({"expiration_days": 3}, {"expiration_days": 4}, "expiration_date"),
        ({"allowed_models": ["openai/*"]}, {}, "allowed_models"),
        ({"allowed_models": ["openai/*"]}, {"allowed_models": ["anthropic/*"]}, "allowed_models"),
        ({"ip_allowlist": ["127.0.0.0/8"]}, {}, "ip_allowlist"),
        ({"ip_allowlist": ["127.0.0.0/8"]}, {"ip_allowlist": ["0.0.0.0/0"]}, "ip_allowlist"),
        ({"max_requests": 5}, {"max_requests": 5}, "max_requests"),
        ({"budget": 1, "budget_window": "day"}, {"budget": 1, "budget_window": "day"}, "budget"),
    ],
)
async def test_a_key_cannot_mint_a_broader_key(
    gateway: Gateway, rules: dict[str, Any], order: dict[str, Any], field: str
) -> None:
    user = await gateway.register()
    narrow = await make(user, gateway, **{"scope_permissions": {"write": ["*"], "read": ["*"]}, **rules})
    wanted = {"key_name": "third", "environment_tag": rules.get("environment_tag", "live"), **order}
    response = await send(
        narrow["api_key"],
        "POST",
        "/user/api-keys",
        gateway,
        **{"scope_permissions": {"write": ["keys"]}, **wanted},
    )
    assert (response.status_code, response.json()["error"]["param"]) == (403, field)


async def test_a_narrow_key_cannot_rotate_a_broad_one_into_its_hands(gateway: Gateway) -> None:
    user = await gateway.register()
    (primary,) = (await send(user, "GET", "/user/api-keys", gateway)).json()["keys"]
    narrow = await make(user, gateway, scope_permissions={"write": ["keys"], "read": ["keys"]})
    response = await send(narrow["api_key"], "POST", f"/user/api-keys/{primary['id']}/rotate", gateway)
    assert response.status_code == 403
    assert (await send(user, "GET", "/user/balance", gateway)).status_code == 200


async def test_a_key_cannot_widen_itself(gateway: Gateway) -> None:
    user = await gateway.register()
    narrow = await make(user, gateway, scope_permissions={"write": ["keys"]})
    response = await send(
        narrow["api_key"],
        "PUT",
        f"/user/api-keys/{narrow['key']['id']}",
        gateway,
        scope_permissions={"write": ["*"]},
    )
    assert response.status_code == 403


async def test_somebody_elses_key_does_not_exist(gateway: Gateway) -> None:
    owner, stranger = await gateway.register(), await gateway.register()
    made = await make(owner, gateway)
    path = f"/user/api-keys/{made['key']['id']}"
    for method, address, body in (
        ("GET", path, {}),
        ("PUT", path, {"key_name": "mine"}),
        ("POST", f"{path}/rotate", {"grace_period": 0}),
        ("DELETE", path, {"confirmation": "DELETE_KEY"}),
        ("GET", f"{path}/reveal", {}),
    ):
        assert (await send(stranger, method, address, gateway, **body)).status_code == 404, (method, address)
    assert (await send(made["api_key"], "GET", "/user/balance", gateway)).status_code == 200


async def test_only_a_revealable_key_can_be_shown_again_and_the_look_is_audited(gateway: Gateway) -> None:
    user = await gateway.register()
    shown = await make(user, gateway, key_name="shown", revealable=True)
    hidden = await make(user, gateway, key_name="hidden")
    response = await send(user, "GET", f"/user/api-keys/{shown['key']['id']}/reveal", gateway)
    assert response.json()["api_key"] == shown["api_key"]
    assert (
        await send(user, "GET", f"/user/api-keys/{hidden['key']['id']}/reveal", gateway)
    ).status_code == 400
    stored = await gateway.database.value(
        "select encrypted_key from public.api_keys_new where id = $1", shown["key"]["id"]
    )
    assert shown["api_key"] not in stored
    logs = (await send(user, "GET", "/user/api-keys/audit-logs?action=reveal", gateway)).json()["logs"]
    assert [log["key_id"] for log in logs] == [shown["key"]["id"]]


async def test_every_change_of_a_key_is_audited_and_no_secret_with_it(gateway: Gateway) -> None:
    user = await gateway.register()
    made = await make(user, gateway)
    rotated = (await send(user, "POST", f"/user/api-keys/{made['key']['id']}/rotate", gateway)).json()
    await send(user, "PUT", f"/user/api-keys/{made['key']['id']}", gateway, key_name="renamed")
    await send(user, "DELETE", f"/user/api-keys/{made['key']['id']}", gateway, confirmation="DELETE_KEY")
    response = await send(user, "GET", f"/user/api-keys/audit-logs?key_id={made['key']['id']}", gateway)
    assert [log["action"] for log in response.json()["logs"]] == ["delete", "update", "rotate", "create"]
    assert made["api_key"] not in response.text
    assert rotated["api_key"] not in response.text


async def test_a_key_of_an_older_system_works_once_imported_and_moves_on_first_use(
    start_gateway: Any,
) -> None:
    gateway: Gateway = await start_gateway(legacy_keys=True)
    user = await gateway.register()
    old = "old-system-key-0123456789"
    await gateway.admin("POST", "/admin/keys/import", json={"keys": [{"user_id": user.id, "api_key": old}]})
    again = await gateway.admin(
        "POST", "/admin/keys/import", json={"keys": [{"user_id": user.id, "api_key": old}]}
    )
    assert (again["imported"], again["known_before"]) == (0, 1)
    for _ in range(2):
        assert (await send(old, "GET", "/user/balance", gateway)).json()["user_id"] == user.id
    assert (
        await gateway.database.value("select count(*) from public.api_keys_new where user_id = $1", user.id)
        == 2
    )
    assert old not in str(await gateway.database.rows("select * from public.api_keys"))


async def test_a_replaced_secret_in_its_grace_period_cannot_take_the_key_over(gateway: Gateway) -> None:
    user = await gateway.register()
    (primary,) = (await send(user, "GET", "/user/api-keys", gateway)).json()["keys"]
    new = (
        await send(user, "POST", f"/user/api-keys/{primary['id']}/rotate", gateway, grace_period=3600)
    ).json()["api_key"]
    refused = await send(user, "POST", f"/user/api-keys/{primary['id']}/rotate", gateway)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
    assert (await send(user, "GET", "/user/balance", gateway)).status_code == 200
    assert (await send(new, "GET", "/user/balance", gateway)).status_code == 200


async def test_a_test_key_cannot_delete_the_account(gateway: Gateway) -> None:
    user = await gateway.register(environment="test")
    response = await gateway.http.request(
        "DELETE", "/user/account", headers=user.headers, json={"confirmation": "DELETE_ACCOUNT"}
    )
    assert response.status_code == 403


async def test_an_imported_key_cannot_be_a_test_key(gateway: Gateway) -> None:
    user = await gateway.register()
    body = {"keys": [{"user_id": user.id, "api_key": "old-system-key-0123456789", "environment_tag": "test"}]}
    response = await gateway.http.post(
        "/admin/keys/import", headers={"authorization": f"Bearer {ADMIN_KEY}"}, json=body
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "keys.0.environment_tag")


async def test_a_limited_key_makes_no_key_that_would_be_unlimited(gateway: Gateway) -> None:
    user = await gateway.register()
    await gateway.admin(
        "POST", "/admin/limit", json={"api_key": user.key, "rate_limits": {"requests_per_minute": 10}}
    )
    response = await send(user, "POST", "/user/api-keys", gateway, key_name="second")
    assert (response.status_code, response.json()["error"]["param"]) == (403, "rate_limits")
