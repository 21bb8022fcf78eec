"""The operator's bill is exact, the same wherever it is read, and knows every generation, whatever the
scenario and the ending.
"""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from sandbox import SCENARIOS, SandboxTransport, create_app
from sandbox.bill import MAX_CHARGES, Bill, Charge
from sandbox.failures import FAILURES
from tests.support.sandbox_client import Client

KEY = {"Authorization": "Bearer sk-or-v1-test"}
HI = [{"role": "user", "content": "Say hi"}]
MINI = "openai/gpt-4o-mini"
BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": {"model": MINI, "messages": HI},
    "/completions": {"model": MINI, "prompt": "Say hi"},
    "/responses": {"model": MINI, "input": "Say hi"},
    "/messages": {"model": MINI, "messages": HI, "max_tokens": 50},
    "/embeddings": {"model": "openai/text-embedding-3-small", "input": "x"},
    "/rerank": {"model": "cohere/rerank-v3.5", "query": "x", "documents": ["x"]},
    "/images": {"model": "openai/gpt-5-image-mini", "prompt": "x"},
    "/audio/speech": {"model": "openai/gpt-4o-mini-tts", "input": "Hello"},
    "/audio/transcriptions": {
        "model": "openai/whisper-1",
        "input_audio": {"data": "UklGRiQA", "format": "wav"},
    },
}
STREAMING = ("/chat/completions", "/completions", "/responses", "/messages", "/images")
CASES = [(path, stream) for path in BODIES for stream in ((False, True) if path in STREAMING else (False,))]
# Those that would take a minute, or for ever, are cut short.
QUICK = {
    "slow-first-token": "slow-first-token;seconds=0.001",
    "slow": "slow;ms=0;tokens=9",
    "abort": "abort;ms=0;tokens=9",
    "oversized": "oversized;bytes=100000",
    "generation-late": "generation-late;times=0",
    "price-rise": "price-rise;factor=1",
}
ENDLESS = {"hang", "stall"}


def exact(response: httpx2.Response) -> Any:
    return json.loads(response.text, parse_float=Decimal)


async def bill_of(client: Client) -> dict[str, Any]:
    return dict((await client.http.get("/sandbox/bill")).json())


@pytest.mark.parametrize(("path", "stream"), CASES)
async def test_every_scenario_at_every_endpoint_is_billed_as_generation_tells(
    client: Client, path: str, stream: bool
) -> None:
    for scenario in sorted(set(SCENARIOS) - ENDLESS):
        headers = {**KEY, "x-sandbox-scenario": QUICK.get(scenario, scenario)}
        body = {**BODIES[path], **({"stream": True} if stream else {})}
        charged = client.app.state.bill.count
        try:
            response = await client.http.post(path, json=body, headers=headers)
        except httpx2.RemoteProtocolError:
            assert scenario == "cut"
        else:
            failure = FAILURES.get(scenario)
            assert response.status_code == (
                failure.status if failure else 302 if scenario == "redirect" else 200
            ), scenario
        assert client.app.state.bill.count == charged + (scenario not in FAILURES)
    told = await bill_of(client)
    for generation in told["generations"]:
        data = await client.look_up(generation["id"])
        lost = client.app.state.generations[generation["id"]].late_lookups
        if not lost:
            assert exact(data)["data"]["total_cost"] == Decimal(generation["cost"]), generation
        assert generation["endpoint"] == path
    assert Decimal(told["total"]) == sum(Decimal(generation["cost"]) for generation in told["generations"])
    assert told["in_flight"] == 0


@pytest.mark.parametrize(("path", "stream"), [case for case in CASES if case[0] != "/audio/speech"])
async def test_what_usage_says_is_what_is_billed(client: Client, path: str, stream: bool) -> None:
    for scenario in (
        "ordinary",
        "cost-zero",
        "cost-above-hold",
        "cache-read",
        "cache-write",
        "price-change",
        "dearer-provider",
    ):
        headers = {**KEY, "x-sandbox-scenario": scenario}
        response = await client.http.post(path, json={**BODIES[path], "stream": stream}, headers=headers)
        (cost,) = {cost for cost in costs_in(response.text) if cost is not None}
        assert cost == client.app.state.bill.charges[-1].cost, scenario


def costs_in(text: str) -> list[Decimal | None]:
    """Every `usage.cost` in an answer, streamed or not."""
    lines = [line.removeprefix("data: ") for line in text.split("\n")]
    events = [
        json.loads(line, parse_float=Decimal, parse_int=Decimal) for line in lines if line.startswith("{")
    ]
    usages = [event.get("usage") or event.get("response", {}).get("usage") or {} for event in events]
    return [usage.get("cost") for usage in usages]


async def test_an_aborted_stream_is_billed_at_what_generation_says(client: Client) -> None:
    response = await client.open_stream("slow;ms=1;tokens=500")
    await anext(response.aiter_raw())
    assert (await bill_of(client))["in_flight"] == 1
    await response.aclose()
    (charge,) = (await bill_of(client))["generations"]
    assert (charge["id"], charge["endpoint"], charge["status"]) == (
        response.headers["x-generation-id"],
        "/chat/completions",
        "cancelled",
    )
    assert (
        exact(await client.look_up(charge["id"]))["data"]["total_cost"]
        == Decimal(charge["cost"])
        == client.app.state.billed
    )


async def test_a_failed_generation_is_marked_and_a_refused_one_costs_nothing(client: Client) -> None:
    await client.ask("provider-died")
    await client.ask("error-503")
    assert [charge["status"] for charge in (await bill_of(client))["generations"]] == ["failed"]


async def test_two_hundred_costs_add_up_to_the_last_digit(client: Client) -> None:
    answers = await asyncio.gather(*(client.ask(f"ordinary;tokens={number}") for number in range(1, 201)))
    total = sum(exact(answer)["usage"]["cost"] for answer in answers)
    assert Decimal((await bill_of(client))["total"]) == total
    key = exact(await client.http.get("/key", headers=KEY))["data"]
    assert {key[f"usage{window}"] for window in ("", "_daily", "_weekly", "_monthly")} == {total}
    assert exact(await client.http.get("/credits", headers=KEY))["data"]["total_usage"] == total


async def test_the_account_is_asked_for_with_a_key(client: Client) -> None:
    assert (
        (await client.http.get("/key")).status_code == (await client.http.get("/credits")).status_code == 401
    )


async def test_the_key_tells_what_own_keys_have_paid(client: Client) -> None:
    paid = exact(await client.ask("byok"))["usage"]["cost_details"]["upstream_inference_cost"]
    data = exact(await client.http.get("/key", headers=KEY))["data"]
    assert data["byok_usage"] == data["byok_usage_daily"] == paid > 0 == data["usage"]


async def test_a_new_bill_starts_at_nothing(client: Client) -> None:
    await client.ask()
    assert (await client.http.delete("/sandbox/bill")).json() == {
        "total": "0",
        "count": 0,
        "in_flight": 0,
        "generations": [],
    }
    await client.ask()
    assert (await bill_of(client))["count"] == 1


def test_the_bill_keeps_the_last_charges_and_the_whole_total() -> None:
    bill, now = Bill(), datetime(2026, 3, 1, tzinfo=UTC)
    for number in range(MAX_CHARGES + 5):
        bill.add(Charge(str(number), Decimal("0.000000001"), "/rerank", "completed"), Decimal(0), now)
    told = bill.render(0)
    assert isinstance(told["generations"], list) and len(told["generations"]) == MAX_CHARGES
    assert (told["count"], told["total"]) == (MAX_CHARGES + 5, "0.000010005")


def test_days_weeks_and_months_are_those_of_utc() -> None:
    bill = Bill()
    # A Saturday, and the Sunday and Monday after it, which begin a month and a week.
    for day, cost in (
        (datetime(2026, 2, 28, tzinfo=UTC), 1),
        (datetime(2026, 3, 1, 23, 59, tzinfo=UTC), 2),
        (datetime(2026, 3, 2, tzinfo=UTC), 4),
    ):
        bill.add(Charge("x", Decimal(cost), "/rerank", "completed"), Decimal(0), day)
    used = bill.render_key(datetime(2026, 3, 2, 12, tzinfo=UTC))
    assert [used[f"usage{window}"] for window in ("", "_daily", "_weekly", "_monthly")] == [7, 4, 4, 6]


# A price that rises between two requests.


async def test_a_risen_price_refuses_the_old_maximum_and_is_in_the_catalog(client: Client) -> None:
    listed = (await client.http.get(f"/model/{MINI}")).json()["data"]["pricing"]["prompt"]
    maximum = {"max_price": {"prompt": float(Decimal(listed) * 1_000_000)}}
    refused = await client.ask("price-rise;factor=3", provider=maximum)
    assert refused.status_code == 404
    assert refused.json()["error"]["availability"]["excluded_by"] == ["max_price"]
    assert (await client.ask("price-rise;factor=3", provider=maximum)).status_code == 404, (
        "it has risen, once"
    )
    now = (await client.http.get(f"/model/{MINI}")).json()["data"]["pricing"]["prompt"]
    assert Decimal(now) == 3 * Decimal(listed)
    (entry,) = [model for model in (await client.http.get("/models")).json()["data"] if model["id"] == MINI]
    assert entry["pricing"]["prompt"] == now
    accepted = await client.ask(
        "price-rise;factor=3", provider={"max_price": {"prompt": float(Decimal(now) * 1_000_000)}}
    )
    assert accepted.status_code == 200


async def test_a_risen_price_is_charged_and_concerns_one_model(client: Client) -> None:
    before, other = (
        exact(await client.ask())["usage"]["cost"],
        exact(await client.ask(model="openai/gpt-4o"))["usage"]["cost"],
    )
    assert (
        exact(await client.ask("price-rise"))["usage"]["cost"]
        == 2 * before
        == exact(await client.ask())["usage"]["cost"]
    )
    assert exact(await client.ask(model="openai/gpt-4o"))["usage"]["cost"] == other
    await client.http.delete("/sandbox/calls")
    assert exact(await client.ask())["usage"]["cost"] == before


async def test_nobody_makes_a_price_rise_beyond_ten_times(client: Client) -> None:
    before = exact(await client.ask())["usage"]["cost"]
    assert exact(await client.ask("price-rise;factor=1000"))["usage"]["cost"] == 10 * before


# What a stranger meets.


@pytest.mark.parametrize("role", ["boss", None, 1, "User"])
async def test_an_unknown_role_is_a_400_that_names_it(client: Client, role: object) -> None:
    response = await client.ask(messages=[HI[0], {"role": role, "content": "x"}])
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("messages.1.role: Invalid option")


@pytest.mark.parametrize("message", ["x", None, {"role": "user", "content": 1}])
async def test_an_invalid_message_is_a_400(client: Client, message: object) -> None:
    assert (await client.ask(messages=[message])).status_code == 400


async def test_an_unknown_scenario_gets_a_short_answer_with_what_may_be_meant(client: Client) -> None:
    message = (await client.ask("eror-429")).json()["error"]["message"]
    assert "error-429" in message and len(message) < 200
    assert len((await client.ask("x" * 5000)).json()["error"]["message"]) < 200


async def test_late_answers_end_in_the_words_of_their_endpoint() -> None:
    app = create_app(max_seconds=0.05)
    async with httpx2.AsyncClient(
        transport=SandboxTransport(app), base_url="http://sandbox.invalid", headers=KEY
    ) as http:
        for path, last in (
            ("/messages", "event: error"),
            ("/responses", "event: error"),
            ("/chat/completions", '"code":504'),
        ):
            body = {**BODIES[path], "stream": True}
            late = await http.post(path, json=body, headers={"x-sandbox-scenario": "stall"})
            assert late.status_code == 200 and last in late.text
            assert (
                await http.post(path, json=body, headers={"x-sandbox-scenario": "hang"})
            ).status_code == 504
        hung = await http.post("/messages", json=BODIES["/messages"], headers={"x-sandbox-scenario": "hang"})
        assert hung.json()["error"]["type"] == "timeout_error"
