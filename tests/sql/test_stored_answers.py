"""One idempotency key runs once, a cached answer costs nothing, and neither is kept longer, or told to
others, than it should be.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.sql_client import (
    Account,
    Client,
    Json,
    hash_of,
    locked_user,
    new_id,
    open_client,
    request,
    settlement,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
FULL = 1_100
DAY = 86_400


def key(name: str, body: str = "body", **changes: Any) -> Json:
    """The fields of a request with this idempotency key."""
    return {
        "idempotency": {"place": hash_of(name), "fingerprint": hash_of(body), "ttl_seconds": DAY, **changes}
    }


def cache(body: str = "body", **changes: Any) -> Json:
    """The fields of a request that may be answered from the cache."""
    return {"cache": {"place": hash_of(body), "fingerprint": hash_of("vault"), "ttl_seconds": 300, **changes}}


def kept(body: str = "body", seconds: int = 300) -> Json:
    """The fields of a settlement whose answer goes to the cache."""
    return {
        "stored_answer": "sealed",
        "cache": {"place": hash_of(body), "fingerprint": hash_of("vault"), "ttl_seconds": seconds},
    }


async def stored(client: Client, account: Account, kind: str = "idempotency") -> list[Json]:
    return await client.rows(
        "select * from public.stored_answers where user_id = $1 and kind = $2 order by id", account.id, kind
    )


async def has_expired(client: Client, account: Account) -> None:
    await client.value(
        "update public.stored_answers set expires_at = now() - interval '1 second' where user_id = $1",
        account.id,
    )


# Idempotency keys.


async def test_a_key_runs_once_and_then_gives_its_answer_again(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"))
    assert first["outcome"] == "admitted"
    await client.settle_one(first["request_id"], stored_answer="sealed")
    again = await client.admit_one(account, **key("a"))
    assert again == {
        "outcome": "replayed",
        "answer": "sealed",
        "tokens": 30,
        "original_request_id": first["request_id"],
        "request_id": again["request_id"],
        "user_id": account.id,
        "key_id": account.key_id,
        "environment": "live",
        "status": "completed",
        "cost_nanos": 500,
        "balance_after_nanos": 4_500,
        "age": 0,
    }
    assert (await client.user(account))["credits_nanos"] == 4_500
    assert await client.value("select count(*) from public.usage_records where user_id = $1", account.id) == 1
    assert (await client.counters(account))["requests_used"] == 1
    await client.assert_sound()


async def test_a_replay_tells_the_balance_of_then(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"))
    await client.settle_one(first["request_id"], stored_answer="sealed")
    await client.grant(account, 90_000)
    assert (await client.admit_one(account, **key("a")))["balance_after_nanos"] == 4_500


async def test_no_limit_prevents_a_replay(client: Client) -> None:
    account = await client.register(credits_nanos=FULL, limits={"requests_per_minute": 1, "concurrency": 1})
    first = await client.admit_one(account, **key("a"))
    await client.settle_one(first["request_id"], stored_answer="sealed", billable_nanos=str(FULL))
    assert (await client.admit_one(account, **key("b")))["outcome"] == "rate_limit"
    assert (await client.admit_one(account, **key("a")))["outcome"] == "replayed"


async def test_a_key_that_may_not_be_used_gets_no_replay(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"))
    await client.settle_one(first["request_id"], stored_answer="sealed")
    await client.change_key(account, allowed_models=["another/model"])
    assert (await client.admit_one(account, **key("a")))["outcome"] == "MODEL_NOT_ALLOWED"


async def test_while_the_first_runs_the_second_is_told_to_wait(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"))
    second = await client.admit_one(account, **key("a"))
    assert (second["outcome"], second["original_request_id"], second["expired"]) == (
        "idempotency_running",
        first["request_id"],
        None,
    )
    assert 1 <= second["retry_after"] <= 30
    assert (await client.user(account))["held_nanos"] == FULL


@pytest.mark.parametrize("settled", [False, True])
async def test_another_body_under_the_same_key_is_a_conflict(client: Client, settled: bool) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a", "one body"))
    if settled:
        await client.settle_one(first["request_id"], stored_answer="sealed")
    other = await client.admit_one(account, **key("a", "another body"))
    assert (other["outcome"], other["original_request_id"]) == ("idempotency_conflict", first["request_id"])


async def test_keys_of_different_users_do_not_meet(client: Client) -> None:
    one, other = await client.register(credits_nanos=5_000), await client.register(credits_nanos=5_000)
    first = await client.admit_one(one, **key("a"))
    await client.settle_one(first["request_id"], stored_answer="sealed")
    assert (await client.admit_one(other, **key("a")))["outcome"] == "admitted"


async def test_a_refusal_leaves_the_key_free(client: Client) -> None:
    account = await client.register()
    assert (await client.admit_one(account, **key("a")))["outcome"] == "credits"
    assert await stored(client, account) == []
    await client.grant(account, 5_000)
    assert (await client.admit_one(account, **key("a")))["outcome"] == "admitted"


@pytest.mark.parametrize("status", ["failed", "cancelled", "completed"])
async def test_what_cost_nothing_and_has_no_answer_frees_the_key(client: Client, status: str) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"))
    await client.settle_one(first["request_id"], status=status, billable_nanos="0")
    assert await stored(client, account) == []
    assert (await client.admit_one(account, **key("a")))["outcome"] == "admitted"


async def test_what_was_charged_and_has_no_answer_is_not_run_again(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"))
    await client.settle_one(first["request_id"], status="cancelled")
    again = await client.admit_one(account, **key("a"))
    assert (again["outcome"], again["original_request_id"], again["cost_nanos"]) == (
        "idempotency_not_kept",
        first["request_id"],
        500,
    )
    assert again["status"] == "cancelled" and "answer" not in again
    assert (await client.user(account))["credits_nanos"] == 4_500


async def test_an_answer_at_no_cost_is_kept(client: Client) -> None:
    account = await client.register(credits_nanos=5_000, environment="test")
    first = await client.admit_one(account, **key("a"))
    await client.settle_one(first["request_id"], stored_answer="sealed")
    again = await client.admit_one(account, **key("a"))
    assert (again["outcome"], again["environment"], again["cost_nanos"]) == ("replayed", "test", 0)


async def test_a_key_is_free_again_after_its_time(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a", "one body"))
    row = (await stored(client, account))[0]
    assert (row["expires_at"] - row["created_at"]).total_seconds() == DAY
    await client.settle_one(first["request_id"], stored_answer="sealed")
    await has_expired(client, account)
    second = await client.admit_one(account, **key("a", "another body"))
    assert second["outcome"] == "admitted"
    row = (await stored(client, account))[0]
    assert (str(row["request_id"]), row["state"], row["answer"]) == (second["request_id"], "running", None)


async def test_a_key_outlives_neither_its_time_nor_a_request_that_still_runs(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    await client.admit_one(account, **key("a", ttl_seconds=1))
    row = (await stored(client, account))[0]
    assert (row["expires_at"] - row["created_at"]).total_seconds() == 600
    await has_expired(client, account)
    assert (await client.admit_one(account, **key("a")))["outcome"] == "idempotency_running"


async def test_a_crashed_first_request_is_named_to_be_resolved_and_then_frees_the_key(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"), ttl_seconds=-1)
    second = request(account, **key("a"))
    (waiting,) = await client.admit(second)
    (hold,) = waiting["expired"]
    assert (waiting["outcome"], hold["request_id"], hold["byok"], hold["provider_key"]) == (
        "idempotency_running",
        first["request_id"],
        False,
        None,
    )
    await client.settle_one(first["request_id"], source="none", status="expired", billable_nanos="0")
    assert (await client.admit(second))[0]["outcome"] == "admitted"
    await client.assert_sound()


async def test_a_key_whose_request_is_settled_but_that_was_left_running_is_free(client: Client) -> None:
    """A release that knew nothing of idempotency keys has settled it."""
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"))
    await client.value(
        "update public.usage_records set has_idempotency_key = false where request_id = $1::text::uuid",
        first["request_id"],
    )
    await client.settle_one(first["request_id"])
    assert (await client.admit_one(account, **key("a", "another body")))["outcome"] == "admitted"


async def test_settling_twice_keeps_the_first_answer(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **key("a"))
    await client.settle_one(first["request_id"], stored_answer="sealed")
    assert (await client.settle_one(first["request_id"], stored_answer="another"))["outcome"] == "repeated"
    assert (await client.admit_one(account, **key("a")))["answer"] == "sealed"


async def test_the_late_settlement_of_one_request_does_not_touch_the_key_of_another(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    lost = await client.admit_one(account, **key("a"))
    await client.settle_one(lost["request_id"], source="none", status="expired", billable_nanos="0")
    second = await client.admit_one(account, **key("a"))
    await client.settle_one(lost["request_id"], source="generation", stored_answer="late")
    (row,) = await stored(client, account)
    assert (str(row["request_id"]), row["state"]) == (second["request_id"], "running")


async def test_of_twenty_requests_with_one_key_exactly_one_runs(client: Client) -> None:
    account = await client.register(credits_nanos=500_000)
    async with open_client(client.database, 8) as crowd:
        singles = [crowd.admit(request(account, **key("a"))) for _ in range(12)]
        batches = [crowd.admit(*(request(account, **key("a")) for _ in range(4))) for _ in range(2)]
        answers = [answer for batch in await asyncio.gather(*singles, *batches) for answer in batch]
    outcomes = [answer["outcome"] for answer in answers]
    assert (outcomes.count("admitted"), outcomes.count("idempotency_running")) == (1, 19)
    assert (await client.user(account))["held_nanos"] == FULL
    await client.assert_sound()


async def test_of_twenty_requests_with_an_expired_key_exactly_one_runs(client: Client) -> None:
    account = await client.register(credits_nanos=500_000)
    first = await client.admit_one(account, **key("a"))
    await client.settle_one(first["request_id"], stored_answer="sealed")
    await has_expired(client, account)
    async with open_client(client.database, 8) as crowd:
        answers = await asyncio.gather(
            *(crowd.admit_one(account, **key("a")) for _ in range(20)), crowd.call("delete_expired_answers")
        )
    outcomes = [answer["outcome"] for answer in answers[:-1]]
    assert (outcomes.count("admitted"), outcomes.count("idempotency_running")) == (1, 19)


async def test_a_resent_item_gets_its_own_hold_again_and_no_conflict_with_itself(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    item = request(account, **key("a"), resent=True)
    first, again = (await client.admit(item))[0], (await client.admit(item))[0]
    assert (first["outcome"], again["outcome"], again["hold_nanos"]) == ("admitted", "admitted", FULL)


@pytest.mark.parametrize(
    "poison",
    [
        {"idempotency": 5},
        {"idempotency": {}},
        {"idempotency": {"place": "x", "fingerprint": "y", "ttl_seconds": 5}},
        {"idempotency": {"place": "0" * 64, "fingerprint": "0" * 64, "ttl_seconds": "long"}},
        {"cache": 5},
        {"cache": {"ttl_seconds": "long"}},
        {"cache": {"place": "0" * 64, "ttl_seconds": 5, "clear": "perhaps"}},
        {"end_user": "x" * 300},
        {"price_basis": None, "end_user": ""},
    ],
    ids=str,
)
async def test_a_poisoned_item_fails_alone_or_is_served(client: Client, poison: Json) -> None:
    account = await client.register(credits_nanos=50_000)
    answers = await client.admit(request(account), request(account, **poison), request(account))
    assert [answer["outcome"] for answer in answers[::2]] == ["admitted", "admitted"]
    assert answers[1]["outcome"] in ("failed", "admitted")
    await client.assert_sound()


async def test_an_answer_that_cannot_be_stored_fails_its_own_settlement_alone(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    first, second = await client.admit_one(account, **key("a")), await client.admit_one(account)
    answers = await client.settle(
        settlement(first["request_id"], stored_answer="x" * 2_000_001), settlement(second["request_id"])
    )
    assert [answer["outcome"] for answer in answers] == ["failed", "settled"]
    assert (await client.settle_one(first["request_id"]))["outcome"] == "settled"
    await client.assert_sound()


# The cache.


async def test_a_cached_answer_is_on_record_and_costs_nothing(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **cache())
    assert (first["outcome"], first["cache_ttl"]) == ("admitted", 300)
    await client.settle_one(first["request_id"], **kept())
    hit = await client.admit_one(account, **cache(), end_user="customer")
    assert hit == {
        "outcome": "cached",
        "answer": "sealed",
        "original_request_id": first["request_id"],
        "request_id": hit["request_id"],
        "user_id": account.id,
        "key_id": account.key_id,
        "environment": "live",
        "status": "completed",
        "cost_nanos": 0,
        "balance_after_nanos": 4_500,
        "age": 0,
        "limits": hit["limits"],
    }
    record = await client.record(hit["request_id"])
    assert (record["status"], record["settlement_source"], record["cost_nanos"], record["hold_nanos"]) == (
        "completed",
        "usage",
        0,
        0,
    )
    assert (
        record["cache_hit"],
        record["prompt_tokens"],
        record["completion_tokens"],
        record["end_user"],
    ) == (True, 0, 0, "customer")
    assert (record["balance_after_nanos"], record["upstream_cost_nanos"]) == (4_500, 0)
    await client.assert_sound()


async def test_a_hit_counts_as_a_request_without_tokens_and_takes_no_slot(client: Client) -> None:
    account = await client.register(
        credits_nanos=5_000, limits={"requests_per_minute": 2, "tokens_per_minute": 40, "concurrency": 1}
    )
    first = await client.admit_one(account, **cache())
    await client.settle_one(first["request_id"], **kept())
    hit = await client.admit_one(account, **cache(), prompt_estimate=30)
    assert (hit["outcome"], hit["limits"]["request_left"], hit["limits"]["token_left"]) == ("cached", 0, 10)
    counters = await client.counters(account)
    assert (counters["slots"], counters["requests_used"]) == (0, 2)
    assert (await client.admit_one(account, **cache()))["outcome"] == "rate_limit"
    await client.assert_sound()


async def test_a_hit_needs_no_credits(client: Client) -> None:
    account = await client.register(credits_nanos=FULL)
    first = await client.admit_one(account, **cache())
    await client.settle_one(first["request_id"], **kept(), billable_nanos=str(FULL))
    assert (await client.admit_one(account, **cache("another body")))["outcome"] == "credits"
    assert (await client.admit_one(account, **cache()))["outcome"] == "cached"


async def test_a_hit_may_be_the_answer_of_an_idempotency_key(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **cache())
    await client.settle_one(first["request_id"], **kept())
    hit = await client.admit_one(account, **cache(), **key("a"))
    again = await client.admit_one(account, **cache(), **key("a"))
    assert (hit["outcome"], again["outcome"], again["original_request_id"]) == (
        "cached",
        "replayed",
        hit["request_id"],
    )
    assert (again["answer"], again["cost_nanos"], again["balance_after_nanos"]) == ("sealed", 0, 4_500)


@pytest.mark.parametrize(
    "other",
    [
        {},
        cache("another body"),
        {"cache": {"place": hash_of("body"), "fingerprint": hash_of("another vault"), "ttl_seconds": 300}},
        {"cache": {"place": hash_of("body"), "fingerprint": hash_of("vault")}},
    ],
    ids=[
        "the cache is not asked",
        "another body",
        "sealed with another key",
        "neither request nor key say how long",
    ],
)
async def test_what_is_another_question_is_no_hit(client: Client, other: Json) -> None:
    account = await client.register(credits_nanos=50_000)
    first = await client.admit_one(account, **cache())
    await client.settle_one(first["request_id"], **kept())
    assert (await client.admit_one(account, **other))["outcome"] == "admitted"


async def test_an_answer_is_cached_for_its_user_alone(client: Client) -> None:
    one, other = await client.register(credits_nanos=5_000), await client.register(credits_nanos=5_000)
    first = await client.admit_one(one, **cache())
    await client.settle_one(first["request_id"], **kept())
    assert (await client.admit_one(other, **cache()))["outcome"] == "admitted"


async def test_the_keys_own_default_caches_what_says_nothing(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    await client.change_key(account, cache_ttl_seconds=77)
    assert (await client.admit_one(account))["cache_ttl"] == 77
    silent = {"cache": {"place": hash_of("body"), "fingerprint": hash_of("vault")}}
    first = await client.admit_one(account, **silent)
    assert first["cache_ttl"] == 77
    await client.settle_one(first["request_id"], **kept(seconds=77))
    assert (await client.admit_one(account, **silent))["outcome"] == "cached"
    (row,) = await stored(client, account, "cache")
    assert (row["expires_at"] - row["created_at"]).total_seconds() == 77


async def test_a_cached_answer_ends_with_its_time_and_is_replaced(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **cache())
    await client.settle_one(first["request_id"], **kept())
    await has_expired(client, account)
    second = await client.admit_one(account, **cache())
    assert second["outcome"] == "admitted"
    await client.settle_one(second["request_id"], **{**kept(), "stored_answer": "fresh"})
    assert (await client.admit_one(account, **cache()))["answer"] == "fresh"
    assert len(await stored(client, account, "cache")) == 1


async def test_clearing_removes_what_is_there_and_asks_again(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **cache())
    await client.settle_one(first["request_id"], **kept())
    assert (await client.admit_one(account, **cache(clear=True)))["outcome"] == "admitted"
    assert await stored(client, account, "cache") == []


@pytest.mark.parametrize(
    "change", [{"status": "failed"}, {"status": "cancelled"}, {"stored_answer": None}], ids=str
)
async def test_only_whole_answers_are_cached(client: Client, change: Json) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **cache())
    assert (await client.settle_one(first["request_id"], **{**kept(), **change}))["outcome"] == "settled"
    assert await stored(client, account, "cache") == []


async def test_many_misses_at_once_leave_one_entry(client: Client) -> None:
    account = await client.register(credits_nanos=500_000)
    admitted = [(await client.admit_one(account, **cache()))["request_id"] for _ in range(12)]
    async with open_client(client.database, 8) as crowd:
        await asyncio.gather(*(crowd.settle_one(request_id, **kept()) for request_id in admitted))
        hits = await asyncio.gather(*(crowd.admit_one(account, **cache()) for _ in range(12)))
    assert {hit["outcome"] for hit in hits} == {"cached"}
    assert len(await stored(client, account, "cache")) == 1
    await client.assert_sound()


async def test_a_resent_hit_is_a_hit_again_or_nothing_at_all(client: Client) -> None:
    account = await client.register(credits_nanos=5_000)
    first = await client.admit_one(account, **cache())
    await client.settle_one(first["request_id"], **kept())
    item = request(account, **cache(), resent=True)
    hit, again = (await client.admit(item))[0], (await client.admit(item))[0]
    assert {**hit, "limits": None} == {**{name: again[name] for name in hit}, "limits": None}
    assert (await client.counters(account))["requests_used"] == 2
    await client.value("delete from public.stored_answers where user_id = $1", account.id)
    assert (await client.call("admit_requests", [item]))[0]["outcome"] == "busy"


async def test_hits_add_up_in_every_sum(fresh: Client) -> None:
    account = await fresh.register(credits_nanos=50_000)
    first = await fresh.admit_one(account, **cache())
    await fresh.settle_one(first["request_id"], **kept())
    for _ in range(3):
        assert (await fresh.admit_one(account, **cache()))["outcome"] == "cached"
    metrics = await fresh.call("usage_metrics", account.id)
    assert (metrics["total_requests"], metrics["total_cost_nanos"], metrics["total_tokens"]) == (4, 500, 30)
    assert await fresh.rows("select * from public.audit_usage()") == []


# Forgetting.


async def test_the_sweep_deletes_what_has_expired_and_nothing_else(fresh: Client) -> None:
    one, other = await fresh.register(credits_nanos=50_000), await fresh.register(credits_nanos=50_000)
    for account in (one, other):
        first = await fresh.admit_one(account, **key("a"), **cache())
        await fresh.settle_one(first["request_id"], **kept())
    running = await fresh.admit_one(one, **key("b"))
    await has_expired(fresh, one)
    assert await fresh.call("delete_expired_answers") == 2
    assert await fresh.call("delete_expired_answers") == 0
    assert [str(row["request_id"]) for row in await stored(fresh, one)] == [running["request_id"]]
    assert len(await stored(fresh, other)) == 1
    await fresh.settle_one(running["request_id"], stored_answer="sealed")
    assert await fresh.call("delete_expired_answers") == 1


async def test_the_sweep_deletes_a_thousand_at_most_and_waits_for_nobody(fresh: Client) -> None:
    account = await fresh.register()
    await fresh.value(
        "insert into public.stored_answers (kind, user_id, place, fingerprint, request_id, state, answer, "
        "expires_at)"
        " select 'cache', $1, encode(sha256(n::text::bytea), 'hex'), repeat('0', 64), gen_random_uuid(), "
        "'finished', 'x',"
        " now() - interval '1 s' from generate_series(1, 1005) as n",
        account.id,
    )
    async with locked_user(fresh, account) as other:
        await other.execute("select from public.stored_answers order by id limit 3 for update")
        assert await fresh.call("delete_expired_answers") == 1_000
        assert await fresh.call("delete_expired_answers") == 2
    assert await fresh.call("delete_expired_answers") == 3


async def test_a_deleted_accounts_answers_and_secrets_go_with_it(client: Client) -> None:
    account = await client.register(credits_nanos=50_000)
    first = await client.admit_one(account, **key("a"), **cache())
    await client.settle_one(first["request_id"], **kept())
    running = await client.admit_one(account, **key("b"))
    caching = await client.admit_one(account, **cache("another body"))
    await client.value(
        "insert into public.provider_keys (user_id, encrypted_key, label) "
        "values ($1, 'sealed', 'sk-or-...1')",
        account.id,
    )
    await client.value(
        "insert into public.webhooks (user_id, url, encrypted_secret) values ($1, 'https://a.example', 's')",
        account.id,
    )
    assert (await client.call("delete_account", {"user_id": account.id, "actor": "admin"}))[
        "outcome"
    ] == "deleted"
    for table in ("stored_answers", "provider_keys", "webhooks"):
        assert await client.value(f"select count(*) from public.{table} where user_id = $1", account.id) == 0
    assert (await client.settle_one(running["request_id"], stored_answer="sealed"))["outcome"] == "settled"
    assert (await client.settle_one(caching["request_id"], **kept()))["outcome"] == "settled"
    assert await stored(client, account) == await stored(client, account, "cache") == []
    await client.assert_sound()


# Receipts.


async def test_a_receipt_shows_the_record_and_what_was_refunded(client: Client) -> None:
    account, stranger = await client.register(credits_nanos=5_000), await client.register()
    basis = {"fixed_nanos": "100", "output_nanos": "10", "max_price": {"prompt": 1}}
    request_id = (await client.admit_one(account, price_basis=basis, end_user="customer"))["request_id"]
    await client.settle_one(request_id)
    for number, amount in enumerate((100, 50)):
        order = {
            "refunded_request_id": request_id,
            "amount_nanos": amount,
            "actor": "admin",
            "idempotency_key": f"{request_id} {number}",
        }
        assert (await client.call("refund_request", order))["outcome"] == "refunded"
    receipt = await client.call("read_receipt", account.id, request_id)
    assert [refund["amount_nanos"] for refund in receipt["refunds"]] == [100, 50]
    assert (receipt["cost_nanos"], receipt["balance_after_nanos"]) == (500, 4_500)
    assert (receipt["price_basis"], receipt["end_user"], receipt["hold_nanos"]) == (basis, "customer", FULL)
    assert await client.call("read_receipt", stranger.id, request_id) is None
    assert await client.call("read_receipt", account.id, new_id()) is None
    await client.assert_sound()


async def test_the_balance_on_a_receipt_is_what_the_settlement_said(fresh: Client) -> None:
    """Also where more leaves the account with the settlement: play credits at the switch to live, the rest of
    a deleted account.
    """
    played, deleted = await fresh.register(credits_nanos=5_000), await fresh.register(credits_nanos=5_000)
    requests = [(await fresh.admit_one(account))["request_id"] for account in (played, deleted)]
    await fresh.call("delete_account", {"user_id": deleted.id, "actor": "admin"})
    await fresh.call("enter_mode", "live")
    for request_id in requests:
        answer = await fresh.settle_one(request_id)
        assert answer["balance_nanos"] == (await fresh.record(request_id))["balance_after_nanos"] == 0
    await fresh.assert_sound()
