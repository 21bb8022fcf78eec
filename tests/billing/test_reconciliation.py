"""What we charged beside what the upstream says, what is open in the books, and the second look at costs that
were unknown.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.support.gateway import Gateway, User, live
from tests.support.upstream import Upstream, running_upstream
from tests.support.users import make_unknown

ROUTES = [
    ("GET", "/admin/reconciliation"),
    ("GET", "/admin/reconciliation/items?kind=unknown"),
    ("POST", "/admin/reconciliation/0199f0a0-0000-7000-8000-000000000000/resolve"),
]
ITEMS = "/admin/reconciliation/items"


async def reconciled(gateway: Gateway) -> Any:
    """The comparison, with exact numbers."""
    headers = {"authorization": "Bearer admin-key-for-tests"}
    response = await gateway.http.get("/admin/reconciliation", headers=headers)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_float=Decimal)


async def resolve(gateway: Gateway, request_id: str) -> Any:
    headers = {"authorization": "Bearer admin-key-for-tests"}
    return await gateway.http.post(f"/admin/reconciliation/{request_id}/resolve", headers=headers)


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_it_is_closed_to_strangers_and_users(gateway: Gateway, method: str, path: str) -> None:
    user = await gateway.register()
    assert (await gateway.http.request(method, path)).status_code == 401
    assert (await gateway.http.request(method, path, headers=user.headers)).status_code == 403


async def test_our_costs_are_what_the_upstream_says(start_gateway: Any, upstream: Upstream) -> None:
    gateway = await start_gateway(price_markup="1.5", **live(upstream.url))
    user, tester = await gateway.register(credits=5), await gateway.register(environment="test")
    for _ in range(3):
        await user.chat()
    await tester.chat()
    report = await reconciled(gateway)
    assert (report["mode"], report["upstream_problem"], report["journal_waiting"]) == ("live", None, [])
    for window in ("daily", "weekly", "monthly"):
        part = report["windows"][window]
        assert part["requests"] == 3
        assert part["upstream_cost"] == part["upstream_says"] == upstream.sandbox.state.billed > 0
        assert (part["drift"], part["drift_percent"], part["overrun"]) == (0, 0, 0)
        assert 0 <= part["charged"] - part["upstream_cost"] * Decimal("1.5") < 3 * Decimal("1e-9")
        assert part["margin"] == part["charged"] - part["upstream_cost"]
    assert report["open"] == {"expired": [], "unknown": [], "overrun": []}
    assert "sk-or" not in json.dumps(report, default=str)


async def test_what_went_out_with_a_users_own_key_is_not_the_operators_bill(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    user = await live_gateway.register(credits=5)
    own = await user.chat()
    await user.chat()
    async with live_gateway.database.owner() as owner:
        await owner.execute("alter table public.usage_records disable trigger all")
        await owner.execute(
            "update public.usage_records set byok = true where request_id = $1", own.headers["x-request-id"]
        )
    part = (await reconciled(live_gateway))["windows"]["daily"]
    assert part["requests"] == 1
    assert part["drift"] == Decimal(own.headers["x-gateway-cost"])
    key = await live_gateway.http.get("/v1/key", headers=user.headers)
    assert Decimal(str(key.json()["data"]["byok_usage_daily"])) == Decimal(own.headers["x-gateway-cost"])


async def test_play_money_is_no_part_of_it_once_the_database_is_live(
    start_gateway: Any, upstream: Upstream
) -> None:
    sandbox = await start_gateway()
    await (await sandbox.register()).chat()
    gateway = await start_gateway(**live(upstream.url))
    user = User(
        gateway,
        0,
        (await gateway.admin("POST", "/auth/register", json={"username": "l", "email": "l@example.com"}))[
            "api_key"
        ],
    )
    await gateway.admin("POST", "/admin/add_credits", json={"api_key": user.key, "credits": 5})
    await user.chat()
    part = (await reconciled(gateway))["windows"]["monthly"]
    assert (part["requests"], part["drift"]) == (1, 0)


async def test_an_upstream_that_cannot_be_reached_leaves_our_numbers(start_gateway: Any) -> None:
    async with running_upstream() as gone:
        url = gone.url
    gateway = await start_gateway(**live(url))
    report = await reconciled(gateway)
    assert report["upstream"] is None
    assert report["upstream_problem"]
    assert (report["windows"]["daily"]["upstream_cost"], report["windows"]["daily"]["drift"]) == (0, None)


async def test_an_upstream_that_refuses_the_operators_key_is_said_so(
    start_gateway: Any, upstream: Upstream, refusing: Any
) -> None:
    await start_gateway(**live(upstream.url))  # a database goes live with a key that is taken
    gateway = await start_gateway(**await refusing(401))
    report = await reconciled(gateway)
    assert (report["upstream"], report["upstream_problem"]) == (
        None,
        "The upstream refuses the operator's key.",
    )


async def test_settlements_that_wait_on_this_instance_are_named(gateway: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "settlements"
    folder.mkdir()
    waiting = str(uuid4())
    (folder / f"{waiting}.json").write_text("{}")
    (folder / f"{waiting}.1.tmp").write_text("{}")
    assert (await reconciled(gateway))["journal_waiting"] == [waiting]


async def test_a_hold_whose_time_is_up_is_listed(gateway: Gateway) -> None:
    user = await gateway.register()
    request_id = (await user.chat()).headers["x-request-id"]
    async with gateway.database.owner() as owner:
        await owner.execute("alter table public.usage_records disable trigger usage_records_frozen")
        await owner.execute(
            "update public.usage_records set status = 'pending', settled_at = null, "
            "settlement_source = null, cost_nanos = 0, "
            "expires_at = now() - interval '1 minute'"
        )
    (item,) = (await reconciled(gateway))["open"]["expired"]
    assert (item["request_id"], item["status"], item["user_id"]) == (request_id, "pending", user.id)


async def test_unknown_costs_are_listed_by_page_before_and_after_they_are_noted(gateway: Gateway) -> None:
    user = await gateway.register()
    ids = [(await user.chat()).headers["x-request-id"] for _ in range(3)]
    for request_id in ids:
        await make_unknown(gateway, user, request_id)
    for _ in range(2):
        seen: list[str] = []
        cursor = ""
        while cursor is not None:
            page = await gateway.admin("GET", f"{ITEMS}?kind=unknown&limit=2{cursor and '&cursor=' + cursor}")
            seen += [item["request_id"] for item in page["items"]]
            cursor = page["next_cursor"]
        assert seen == sorted(ids, reverse=True)
        async with gateway.database.owner() as owner:
            await owner.execute(
                "update public.usage_sums_state set summed_until = now() + interval '1 minute'"
            )
    assert await gateway.database.value("select count(*) from public.open_items") == 3
    assert (await gateway.admin("GET", f"{ITEMS}?kind=overrun"))["items"] == []
    headers = {"authorization": "Bearer admin-key-for-tests"}
    for query in ("kind=other", "kind=unknown&cursor=nonsense", "kind=unknown&limit=0", ""):
        assert (await gateway.http.get(f"{ITEMS}?{query}", headers=headers)).status_code == 400


async def test_an_unknown_cost_is_resolved_once(live_gateway: Gateway) -> None:
    user = await live_gateway.register(credits=5)
    response = await user.chat()
    request_id, cost = response.headers["x-request-id"], Decimal(response.headers["x-gateway-cost"])
    known = await resolve(live_gateway, request_id)
    assert (known.status_code, known.json()["error"]["param"]) == (409, "request_id")
    await make_unknown(live_gateway, user, request_id)
    assert (await user.balance())["credits"] == 5
    resolved = await resolve(live_gateway, request_id)
    assert resolved.status_code == 200, resolved.text
    assert Decimal(str(resolved.json()["charged"])) == cost
    assert Decimal(str((await user.balance())["credits"])) == 5 - cost
    (record,) = await user.records()
    assert (record["settlement_source"], record["status"]) == ("generation", "cancelled")
    await live_gateway.database.assert_books_balance()
    assert (await resolve(live_gateway, request_id)).status_code == 409
    assert (await reconciled(live_gateway))["open"]["unknown"] == []
    logs = (await live_gateway.admin("GET", "/admin/audit-logs?action=resolve_request"))["logs"]
    assert [log["target"] for log in logs] == [f"request:{request_id}"]


async def test_what_cannot_be_resolved_says_why(live_gateway: Gateway) -> None:
    user = await live_gateway.register(credits=5)
    assert (await resolve(live_gateway, str(uuid4()))).status_code == 404
    assert (await resolve(live_gateway, "1")).status_code == 400
    for columns, status, code in (
        ({"generation_id": None}, 409, "not_resolvable"),
        ({"byok": True}, 409, "not_resolvable"),
        ({"generation_id": "gen-1700000000-nobody"}, 404, "generation_unknown"),
    ):
        request_id = (await user.chat()).headers["x-request-id"]
        await make_unknown(live_gateway, user, request_id, **columns)
        refused = await resolve(live_gateway, request_id)
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    await live_gateway.database.assert_books_balance()
