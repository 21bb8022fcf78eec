"""Quotes say what admission then does, sums for reconciliation agree with the journal, and a delivery is one
instance's at a time.
"""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from tests.support.sql_client import INSERT_RECORD, Account, Client, Json, new_id, request, settlement

pytestmark = pytest.mark.asyncio(loop_scope="module")

AMOUNTS = ("models", "prompt_estimate", "fixed_nanos", "output_nanos", "min_output", "max_output", "markup")


async def quote(client: Client, account: Account, item: Json) -> Json:
    amounts = {name: item[name] for name in AMOUNTS}
    return dict(
        await client.call("quote_request", {**amounts, "user_id": account.id, "key_id": account.key_id})
    )


async def test_a_quote_says_what_admission_then_does(client: Client) -> None:
    dice = random.Random("quotes")
    granted = 0
    for _ in range(60):
        account = await client.register(credits_nanos=dice.choice([0, 99, 1500, 10**6]))
        budget = dice.choice([None, 0, 500, 1200, 10**6])
        await client.change_key(account, budget_nanos=budget, budget_window=None if budget is None else "day")
        item = request(
            account,
            fixed_nanos=str(dice.choice(["0", "99.5", "100", "1200"])),
            output_nanos=str(dice.choice(["0", "10", "0.3"])),
            min_output=dice.choice([1, 16, 100]),
            markup=dice.choice(["1", "1.1"]),
        )
        quoted = await quote(client, account, item)
        assert await quote(client, account, item) == quoted
        (answer,) = await client.admit(item)
        assert quoted["outcome"] == {"admitted": "granted"}.get(answer["outcome"], answer["outcome"])
        if answer["outcome"] == "admitted":
            granted += 1
            assert (quoted["granted_output"], quoted["hold_nanos"]) == (
                answer["granted_output"],
                answer["hold_nanos"],
            )
        else:
            assert (quoted["hold_nanos"], quoted["available_nanos"]) == (
                answer["needed_nanos"],
                answer["available_nanos"],
            )
    assert 10 < granted < 50
    await client.assert_sound()


async def test_a_quote_for_somebody_elses_key_is_refused(client: Client) -> None:
    account, other = await client.register(credits_nanos=1000), await client.register(credits_nanos=1000)
    item = request(account)
    assert (await quote(client, Account(account.id, other.key_id, other.hash), item))[
        "outcome"
    ] == "not_found"
    assert (await quote(client, Account(10**9, account.key_id, account.hash), item))["outcome"] == "not_found"


async def test_the_free_plan_and_a_trial_that_is_over_are_known_to_a_quote(client: Client) -> None:
    account = await client.register(credits_nanos=10**6)
    await client.change_user(
        account, subscription_status="trial", trial_expires_at=datetime.now(UTC) - timedelta(days=1)
    )
    assert (await quote(client, account, request(account)))["outcome"] == "trial_expired"
    assert (await client.admit_one(account))["outcome"] == "trial_expired"


# Costs for reconciliation.


@pytest_asyncio.fixture(loop_scope="module")
async def books(fresh: Client) -> tuple[Client, list[Json]]:
    """A database that went live in the middle of a quarter of an hour, with requests before and after it."""
    dice = random.Random("books")
    user = await fresh.register()
    start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=6)
    live_from = start + timedelta(hours=2, minutes=7)
    written = []
    for _ in range(300):
        moment = start + timedelta(seconds=dice.randrange(4 * 3600))
        mode = "live" if moment >= live_from else "sandbox"
        record = {"id": UUID(new_id()), "cost": dice.randrange(1, 10**6), "moment": moment, "mode": mode}
        record |= {
            "environment": dice.choice(["live", "live", "staging", "test"]),
            "byok": dice.random() < 0.2,
        }
        await fresh.owner.execute(
            INSERT_RECORD,
            record["id"],
            user.id,
            user.key_id,
            "a/one",
            None,
            1,
            1,
            record["cost"],
            "completed",
            "usage",
            None,
            5,
            moment,
        )
        written.append(record)
    await fresh.owner.execute("alter table public.usage_records disable trigger all")
    for record in written:
        await fresh.owner.execute(
            "update public.usage_records set mode = $2, environment = $3, byok = $4 where request_id = $1",
            record["id"], record["mode"], record["environment"], record["byok"],
        )  # fmt: skip
    await fresh.owner.execute("alter table public.usage_records enable trigger all")
    await fresh.owner.execute("update public.gateway_state set mode = 'live', mode_since = $1", live_from)
    return fresh, written


async def test_live_costs_are_the_journals_before_and_after_they_are_summed_up(
    books: tuple[Client, list[Json]],
) -> None:
    client, written = books
    first = min(record["moment"] for record in written).replace(minute=0, second=0, microsecond=0)
    bill = [r for r in written if r["mode"] == "live" and r["environment"] != "test" and not r["byok"]]
    starts = (
        first,
        first + timedelta(hours=2),
        first + timedelta(hours=2, minutes=15),
        first + timedelta(hours=3),
    )
    expected = {start: sum(r["cost"] for r in bill if r["moment"] >= start) for start in starts}
    for summed in (False, True):
        for start, cost in expected.items():
            costs = await client.ask("select public.live_costs($1)", start)
            assert (costs["upstream_cost_nanos"], costs["charged_nanos"]) == (cost, cost), (summed, start)
            assert costs["requests"] == sum(r["moment"] >= start for r in bill)
        while await client.call("sum_up_usage"):
            pass
    assert await client.value("select count(*) from public.usage_totals") > 0


async def test_open_items_are_noted_once_and_listed_until_they_are_resolved(fresh: Client) -> None:
    account = await fresh.register(credits_nanos=1000)
    items = [request(account, ttl_seconds=1, fixed_nanos="1", output_nanos="0") for _ in range(3)]
    await fresh.admit(*items)
    unknown, overrun, fine = (item["request_id"] for item in items)
    await fresh.settle(
        settlement(unknown, status="expired", source="none", billable_nanos="0"),
        settlement(overrun, billable_nanos="5000"),
        settlement(fine, billable_nanos="0"),
    )
    for _ in range(2):
        assert [i["request_id"] for i in await fresh.call("list_open_items", "unknown", None, 10)] == [
            unknown
        ]
        assert [i["request_id"] for i in await fresh.call("list_open_items", "overrun", None, 10)] == [
            overrun
        ]
        assert await fresh.call("list_open_items", "unknown", unknown, 10) == []
        assert await fresh.call("list_open_items", "expired", None, 10) == []
        await fresh.owner.execute(
            "update public.usage_sums_state set summed_until = clock_timestamp() + interval '1 second'"
        )
        await asyncio.gather(*(fresh.call("note_open_items") for _ in range(4)))
    assert await fresh.value("select count(*) from public.open_items") == 2
    await fresh.settle(settlement(unknown, status="cancelled", source="generation", billable_nanos="0"))
    assert await fresh.call("list_open_items", "unknown", None, 10) == []


# Deliveries.


async def webhook_with(client: Client, deliveries: int) -> tuple[Account, int]:
    account = await client.register()
    order = {"user_id": account.id, "maker_id": account.key_id, "actor": "test"}
    made = await client.call(
        "create_webhook", {**order, "url": "https://a.example.com/", "encrypted_secret": "x"}
    )
    await client.owner.execute(
        "insert into public.webhook_deliveries (webhook_id, user_id) select $1, $2 "
        "from generate_series(1, $3)",
        made["id"], account.id, deliveries,
    )  # fmt: skip
    return account, int(made["id"])


async def test_a_delivery_is_claimed_by_one_at_a_time(fresh: Client) -> None:
    await webhook_with(fresh, 40)
    batches = await asyncio.gather(*(fresh.call("claim_deliveries", 15, 60, None) for _ in range(8)))
    claimed = [delivery["id"] for batch in batches for delivery in batch]
    assert len(claimed) == len(set(claimed)) == 40
    assert await fresh.call("claim_deliveries", 15, 60, None) == []


async def test_a_webhook_with_much_to_send_does_not_keep_another_waiting(fresh: Client) -> None:
    _, busy = await webhook_with(fresh, 50)
    _, quiet = await webhook_with(fresh, 1)
    claimed = await fresh.call("claim_deliveries", 10, 60, None)
    assert [delivery["webhook_id"] for delivery in claimed].count(quiet) == 1
    assert [delivery["webhook_id"] for delivery in claimed].count(busy) == 9


async def test_an_end_that_comes_after_the_lease_changes_nothing(fresh: Client) -> None:
    await webhook_with(fresh, 1)
    (first,) = await fresh.call("claim_deliveries", 1, 0, None)
    (second,) = await fresh.call("claim_deliveries", 1, 60, None)
    assert (first["id"], second["attempts"]) == (second["id"], 2)
    end: dict[str, Any] = {
        "id": first["id"],
        "status": 200,
        "delivered": True,
        "gone": False,
        "retry_seconds": 60,
    }
    assert (await fresh.call("finish_delivery", {**end, "attempt": 1}))["outcome"] == "stale"
    answers = await asyncio.gather(*(fresh.call("finish_delivery", {**end, "attempt": 2}) for _ in range(3)))
    assert sorted(answer["outcome"] for answer in answers) == ["finished", "stale", "stale"]


async def test_the_account_of_a_credit_view_is_of_one_moment(client: Client) -> None:
    account = await client.register(credits_nanos=10**6)
    item = request(account)
    await client.admit(item)
    await client.settle(settlement(item["request_id"]))
    row = await client.call("read_credits", account.id)
    assert row == {"balance_nanos": 10**6 - 500, "granted_nanos": Decimal(10**6)}
    assert await client.call("read_credits", 10**9) is None


async def test_a_deleted_account_leaves_no_customer_webhook_or_event(fresh: Client) -> None:
    account, _ = await webhook_with(fresh, 1)
    order = {"user_id": account.id, "maker_id": account.key_id, "actor": "test"}
    await fresh.call(
        "create_end_user_budget", {**order, "end_user": "ada", "budget_nanos": "1", "budget_window": "day"}
    )
    await fresh.call("set_provider_key", {**order, "encrypted_key": "x", "label": "x"})
    await fresh.owner.execute(
        "insert into public.budget_events (user_id, end_user, level, budget_nanos, spent_nanos, "
        "budget_window, window_start, request_id) "
        "values ($1, 'ada', 50, 2, 1, 'day', now(), gen_random_uuid())",
        account.id,
    )
    assert (await fresh.call("delete_account", order))["outcome"] == "deleted"
    for table in ("provider_keys", "webhooks", "webhook_deliveries", "budget_events", "end_user_budgets"):
        assert await fresh.value(f"select count(*) from public.{table}") == 0, table
