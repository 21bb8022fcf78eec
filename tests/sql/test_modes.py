"""A database that went live never serves invented answers again, and play money never becomes real."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest

from tests.support.sql_client import Client, registration, request, until_blocked

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_mode_of_a_new_database_is_entered_again_and_again(fresh: Client) -> None:
    for _ in range(2):
        assert await fresh.call("enter_mode", "sandbox") == {"outcome": "entered", "mode": "sandbox"}


async def test_a_live_database_refuses_sandbox_mode(fresh: Client) -> None:
    assert await fresh.call("enter_mode", "live") == {"outcome": "entered", "mode": "live"}
    assert await fresh.call("enter_mode", "live") == {"outcome": "entered", "mode": "live"}
    assert await fresh.call("enter_mode", "sandbox") == {"outcome": "refused", "mode": "live"}


@pytest.mark.parametrize("mode", ["", "Live", "production", None])
async def test_a_mode_that_does_not_exist_is_misuse_and_ends_no_play_money(
    client: Client, mode: str | None
) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError):
        await client.call("enter_mode", mode)
    assert await client.value("select mode from public.gateway_state") == "sandbox"


async def test_going_live_ends_play_money_but_for_what_is_held_and_that_at_settlement(fresh: Client) -> None:
    account, idle = await fresh.register(credits_nanos=5_000), await fresh.register(credits_nanos=70)
    running = await fresh.admit_one(account)
    await fresh.call("enter_mode", "live")
    assert [(await fresh.user(a))["credits_nanos"] for a in (account, idle)] == [1_100, 0]
    await fresh.assert_sound()
    assert (await fresh.admit_one(account))["outcome"] == "wrong_mode"
    await fresh.settle_one(running["request_id"], billable_nanos="300")
    user = await fresh.user(account)
    assert (user["credits_nanos"], user["held_nanos"], user["is_funded"]) == (0, 0, False)
    assert (
        await fresh.value(
            "select count(*) from public.credit_transactions where kind = 'expiry' and user_id = $1",
            account.id,
        )
        == 2
    )
    await fresh.assert_sound()


async def test_a_play_requests_overrun_takes_no_real_money(fresh: Client) -> None:
    account = await fresh.register(credits_nanos=5_000)
    running, lost = await fresh.admit_one(account), await fresh.admit_one(account)
    await fresh.call("enter_mode", "live")
    await fresh.grant(account, 9_000)
    answer = await fresh.settle_one(running["request_id"], billable_nanos="5000")
    assert (answer["cost_nanos"], answer["overrun_nanos"]) == (1_100, 3_900)
    await fresh.settle_one(lost["request_id"], source="none", status="expired", billable_nanos="0")
    answer = await fresh.settle_one(lost["request_id"], source="generation", billable_nanos="800")
    assert (answer["cost_nanos"], answer["balance_nanos"]) == (0, 9_000)
    await fresh.assert_sound()


async def test_a_registration_that_races_the_switch_leaves_no_play_money(fresh: Client) -> None:
    async with fresh.database.connection("postgres") as other:
        await other.execute("begin")
        await other.execute(
            "select public.register_user($1)", json.dumps(registration("early", "early", signup_nanos=500))
        )
        switching = asyncio.create_task(fresh.call("enter_mode", "live"))
        await until_blocked(fresh)
        await other.execute("commit")
        await switching
    assert await fresh.value("select sum(credits_nanos) from public.users") == 0
    assert (
        await fresh.call("register_user", registration("late", "late", signup_nanos=500, mode="sandbox"))
    )["outcome"] == "wrong_mode"
    await fresh.assert_sound()


async def test_admissions_that_race_the_switch_hold_play_money_or_are_refused(fresh: Client) -> None:
    accounts = [await fresh.register(credits_nanos=20_000) for _ in range(4)]

    async def admit() -> list[dict[str, Any]]:
        return [
            answer
            for _ in range(6)
            for answer in await fresh.admit(*(request(account) for account in accounts))
        ]

    async def switch() -> None:
        async with asyncio.timeout(10):
            while not await fresh.value("select exists (select from public.usage_records)"):  # noqa: ASYNC110
                await asyncio.sleep(0)
        await fresh.call("enter_mode", "live")

    first, second, _ = await asyncio.gather(admit(), admit(), switch())
    outcomes = [answer["outcome"] for answer in (*first, *second)]
    assert set(outcomes) <= {"admitted", "wrong_mode", "busy"}
    await fresh.assert_sound()
    for answer in (*first, *second):
        if answer["outcome"] == "admitted":
            await fresh.settle_one(answer["request_id"], billable_nanos="10")
    assert await fresh.value("select sum(credits_nanos + held_nanos) from public.users") == 0
    await fresh.assert_sound()


async def test_play_money_of_a_deleted_account_leaves_once_when_the_database_has_gone_live(
    client: Client,
) -> None:
    account = await client.register(credits_nanos=5_000)
    held = await client.admit_one(account)
    await client.call("delete_account", {"user_id": account.id, "actor": "admin"})
    await client.call("enter_mode", "live")
    await client.settle_one(held["request_id"])
    assert (
        await client.value("select credits_nanos + held_nanos from public.users where id = $1", account.id)
        == 0
    )
    await client.assert_sound()
