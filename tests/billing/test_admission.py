"""A request gets its hold, or the stored answer of an earlier one, in one real round trip; refusals say what
to do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

import db
from common.errors import (
    AnswerNotKept,
    EndUserBudgetExceeded,
    GatewayError,
    IdempotencyConflict,
    IdempotencyRunning,
    InsufficientCredits,
)
from common.json_types import JsonObject
from common.request_ids import new_request_id
from gateway.billing.admission import AdmissionRequest
from gateway.billing.hold import Hold, StoredReply
from gateway.billing.settlement import settlement
from gateway.billing.stored_answers import (
    CHARGE_MARK,
    AnswerSlot,
    Recording,
    StoredAnswer,
    cache_slot,
    idempotency_slot,
)
from gateway.pricing.prices import Rates
from gateway.pricing.upper_bound import Bound
from gateway.runtime.instance import Runtime
from gateway.runtime.maintenance import sweep
from gateway.upstream.usage import Usage
from security import Credential
from tests.support.gateway import SECRET, Gateway, User, live
from tests.support.servers import served
from tests.support.upstream import Upstream

BODY: JsonObject = {"model": "m", "messages": []}


@dataclass
class Caller:
    """A user, as a route would let them in."""

    runtime: Runtime
    user: User

    @property
    def credential(self) -> Credential:
        keyring = self.runtime.keyring
        return Credential(
            tuple(keyring.hashes(self.user.key)), keyring.ids[0], None, "live", "192.0.2.1", None, None
        )

    async def ask(
        self, *, fixed: str = "1000", output: str = "10", most: int = 100, least: int = 100, **changes: Any
    ) -> Hold | StoredReply:
        """Admission of a request that costs at most `fixed` + 100 x `output` nano-dollars."""
        bound = bound_of(fixed, output, least, most)
        order = AdmissionRequest(new_request_id(), None, "chat/completions", "chat", False, bound, **changes)
        return await self.runtime.admission.admit(self.credential, order)

    async def hold(self, **changes: Any) -> Hold:
        admitted = await self.ask(**changes)
        assert isinstance(admitted, Hold)
        return admitted

    async def reply(self, **changes: Any) -> StoredReply:
        admitted = await self.ask(**changes)
        assert isinstance(admitted, StoredReply)
        return admitted

    async def settle(
        self,
        hold: Hold,
        *,
        cost: str = "0.0000005",
        body: bytes | None = b'{"gateway_usage":' + CHARGE_MARK + b"}",
    ) -> Any:
        usage = Usage(prompt_tokens=3, completion_tokens=4, cost=Decimal(cost))
        rest: dict[str, Any] = {}
        if body is not None:
            recording = Recording()
            recording.add(body)
            answer = StoredAnswer(200, {"content-type": "application/json"}, recording.pieces() or ())
            rest = {"stored_answer": await answer.seal(self.runtime.vault), "cache": hold.cache}
        return await self.runtime.settlements.settle(
            settlement(hold.request_id, "completed", "usage", usage, **rest)
        )

    def key(self, name: str = "a", raw: bytes = b"{}") -> AnswerSlot:
        return idempotency_slot("sandbox", "live", "chat/completions", name, raw)

    def cache(self, **changes: Any) -> AnswerSlot:
        return cache_slot(
            "sandbox", "live", "chat/completions", BODY, self.runtime.vault, **{"ttl_seconds": 60, **changes}
        )


def bound_of(fixed: str, output: str, least: int = 100, most: int = 100) -> Bound:
    nothing = Decimal(0)
    rates = Rates(nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, None, None, None)
    return Bound(("m",), Decimal(fixed), Decimal(output), least, most, 10, {}, {}, False, rates, 1, 1)


async def caller_of(gateway: Gateway, credits: float | str = 1) -> Caller:
    user = await gateway.register(credits=credits)
    return Caller(await gateway.app.state.service.ready(), user)


@pytest.fixture
async def caller(gateway: Gateway) -> Caller:
    return await caller_of(gateway)


async def test_a_replay_is_the_first_answer_with_its_charge(caller: Caller) -> None:
    first = await caller.hold(idempotency=caller.key())
    settled = await caller.settle(first)
    again = await caller.reply(idempotency=caller.key())
    assert (again.source, again.request_id, again.tokens, again.environment) == (
        "idempotency",
        first.request_id,
        7,
        "live",
    )
    assert again.charge == {"cost_nanos": 500, "balance_nanos": settled["balance_nanos"]}
    assert again.answer.body(b'{"cost":1}') == b'{"gateway_usage":{"cost":1}}'
    assert again.answer.headers == {"content-type": "application/json"}


async def test_a_running_first_request_is_a_409_that_may_be_tried_again(caller: Caller) -> None:
    first = await caller.hold(idempotency=caller.key())
    with pytest.raises(IdempotencyRunning) as refusal:
        await caller.ask(idempotency=caller.key())
    error = refusal.value
    assert (error.status, error.code, error.details["original_request_id"]) == (
        409,
        "idempotency_request_running",
        first.request_id,
    )
    assert int(error.headers()["retry-after"]) >= 1 and error.headers()["x-should-retry"] == "true"


async def test_another_body_is_a_409_that_may_not(caller: Caller) -> None:
    await caller.hold(idempotency=caller.key())
    with pytest.raises(IdempotencyConflict) as refusal:
        await caller.ask(idempotency=caller.key(raw=b'{"a":1}'))
    assert (refusal.value.code, refusal.value.headers()["x-should-retry"]) == (
        "idempotency_key_reused",
        "false",
    )


async def test_an_answer_that_was_charged_and_not_kept_is_a_409_that_names_the_charge(caller: Caller) -> None:
    first = await caller.hold(idempotency=caller.key())
    await caller.settle(first, body=None)
    with pytest.raises(AnswerNotKept) as refusal:
        await caller.ask(idempotency=caller.key())
    assert refusal.value.details == {"original_request_id": first.request_id, "cost": Decimal("0.0000005")}


async def test_a_lost_first_request_is_resolved_on_the_way(caller: Caller) -> None:
    first = await caller.hold(idempotency=caller.key())
    database = caller.user.gateway.database
    await database.value("update public.usage_records set expires_at = now() - interval '1 second'")
    second = await caller.hold(idempotency=caller.key())
    assert second.request_id != first.request_id
    assert (
        await database.value(
            "select status from public.usage_records where request_id = $1::text::uuid", first.request_id
        )
        == "expired"
    )
    await database.assert_books_balance()


async def test_a_cached_answer_costs_nothing_and_has_a_record_of_its_own(caller: Caller) -> None:
    first = await caller.hold(cache=caller.cache())
    assert first.cache == caller.cache().item()
    settled = await caller.settle(first)
    hit = await caller.reply(cache=caller.cache())
    assert (hit.source, hit.original_request_id, hit.tokens, hit.age_seconds) == (
        "cache",
        first.request_id,
        0,
        0,
    )
    assert hit.charge == {"cost_nanos": 0, "balance_nanos": settled["balance_nanos"]}
    receipt = await db.read_receipt(caller.runtime.client, caller.user.id, hit.request_id)
    assert receipt is not None and (receipt["cache_hit"], receipt["status"], receipt["cost_nanos"]) == (
        True,
        "completed",
        0,
    )
    cleared = await caller.hold(cache=caller.cache(clear=True))
    assert cleared.cache == first.cache
    assert (await caller.hold(cache=caller.cache(ttl_seconds=None))).cache is None


async def test_a_key_that_caches_by_default_does_from_its_second_request_on_an_instance(
    caller: Caller,
) -> None:
    database = caller.user.gateway.database
    worked_out: list[AnswerSlot] = []

    def place() -> AnswerSlot:
        worked_out.append(caller.cache(ttl_seconds=None))
        return worked_out[-1]

    assert (await caller.hold(default_cache=place)).cache is None
    assert worked_out == []
    await database.value(
        "update public.api_keys_new set cache_ttl_seconds = 77 where user_id = $1", caller.user.id
    )
    first = await caller.hold(default_cache=place)
    assert first.cache == caller.cache(ttl_seconds=77).item()
    await caller.settle(first)
    assert (await caller.reply(default_cache=place)).original_request_id == first.request_id
    assert (await caller.hold()).cache is None
    await database.value(
        "update public.api_keys_new set cache_ttl_seconds = null where user_id = $1", caller.user.id
    )
    assert (await caller.hold(default_cache=place)).cache is None
    worked_out.clear()
    assert (await caller.hold(default_cache=place)).cache is None
    assert worked_out == []


async def test_a_cached_answer_that_cannot_be_read_is_not_there(caller: Caller) -> None:
    await caller.settle(await caller.hold(cache=caller.cache()))
    await caller.user.gateway.database.value("update public.stored_answers set answer = 'torn'")
    anew = await caller.hold(cache=caller.cache(), idempotency=caller.key())
    await caller.settle(anew)
    assert (await caller.reply(cache=caller.cache())).original_request_id == anew.request_id


async def test_a_replay_that_cannot_be_read_is_not_run_again(caller: Caller) -> None:
    await caller.settle(await caller.hold(idempotency=caller.key()))
    await caller.user.gateway.database.value("update public.stored_answers set answer = 'torn'")
    with pytest.raises(AnswerNotKept):
        await caller.ask(idempotency=caller.key())


async def test_after_a_change_of_the_encryption_key_answers_are_found_only_where_they_can_be_read(
    start_gateway: Callable[..., Awaitable[Gateway]],
) -> None:
    caller = await caller_of(await start_gateway())
    await caller.settle(await caller.hold(cache=caller.cache(), idempotency=caller.key()))
    new = "B" * 42 + "A"
    changed = await start_gateway(encryption_keys=f"{new},{SECRET}")
    later = Caller(await changed.app.state.service.ready(), caller.user)
    assert isinstance(await later.ask(cache=later.cache()), Hold)
    assert (await later.reply(idempotency=later.key())).source == "idempotency"


async def test_an_end_users_budget_is_a_402_that_says_whose(caller: Caller) -> None:
    await caller.user.gateway.database.value(
        "insert into public.end_user_budgets (user_id, end_user, budget_nanos, budget_window) "
        "values ($1, 'ann', 1500, 'day')",
        caller.user.id,
    )
    with pytest.raises(EndUserBudgetExceeded) as refusal:
        await caller.ask(end_user="ann")
    error = refusal.value
    assert (error.status, error.code) == (402, "end_user_budget_exceeded")
    assert "budget of this end user leaves 0.0000015" in error.message
    assert error.details["affordable_max_tokens"] == 50


async def test_a_receipt_has_what_the_hold_was_made_of(caller: Caller) -> None:
    basis = {"fixed_nanos": "1000", "output_nanos": "10", "max_price": {"prompt": 1.5}}
    hold = await caller.hold(price_basis=basis, end_user="ann")
    settled = await caller.settle(hold)
    receipt = await db.read_receipt(caller.runtime.client, caller.user.id, hold.request_id)
    assert receipt is not None
    assert (receipt["price_basis"], receipt["end_user"], receipt["refunds"]) == (basis, "ann", [])
    assert receipt["balance_after_nanos"] == settled["balance_nanos"]
    assert await db.read_receipt(caller.runtime.client, caller.user.id + 1, hold.request_id) is None


async def test_under_their_own_key_a_user_without_credits_is_served(gateway: Gateway) -> None:
    caller = await caller_of(gateway, credits=0)
    sealed = caller.runtime.vault.encrypt("sk-or-v1-own")
    insert = "insert into public.provider_keys (user_id, encrypted_key, label) values ($1, $2, 'own')"
    await gateway.database.value(insert, caller.user.id, sealed)
    hold = await caller.hold()
    assert (hold.byok, hold.hold_nanos, hold.provider_key) == (True, 0, sealed)
    assert (await caller.settle(hold))["cost_nanos"] == 0


async def test_a_hold_is_raised_and_refused_as_an_admission_is(gateway: Gateway) -> None:
    caller = await caller_of(gateway, credits="0.00001")
    user = await db.get_user(caller.runtime.client, caller.user.id)
    assert user is not None
    available = user["credits_nanos"]
    hold = await caller.hold(fixed=str(available - 2_000), least=1)
    raised = await caller.runtime.admission.raise_hold(
        hold,
        bound_of(str(available - 1_500), "10", 1, 100),
        price_basis={"fixed_nanos": "1", "output_nanos": "1", "max_price": {}},
    )
    assert (raised.request_id, raised.granted_output) == (hold.request_id, 100)
    with pytest.raises(InsufficientCredits) as refusal:
        await caller.runtime.admission.raise_hold(raised, bound_of(str(available - 500), "10"))
    assert refusal.value.details["affordable_max_tokens"] > 0
    await caller.settle(raised)
    with pytest.raises(GatewayError):
        await caller.runtime.admission.raise_hold(raised, bound_of("1", "1"))
    await gateway.database.assert_books_balance()


async def test_the_sweep_deletes_answers_whose_time_is_over(caller: Caller) -> None:
    await caller.settle(await caller.hold(idempotency=caller.key()))
    database = caller.user.gateway.database
    await database.value("update public.stored_answers set expires_at = now() - interval '1 second'")
    await sweep(caller.runtime)
    assert await database.value("select count(*) from public.stored_answers") == 0


# Where a request went out under the user's own key, only that account knows of its generation.


async def own_lookup(gateway: Gateway, upstream: Upstream, provider_key: str | None) -> list[bytes]:
    """The Authorization headers of the lookups that a lost request under this stored key leads to; it is
    settled then.
    """
    caller = await caller_of(gateway)
    insert = "insert into public.provider_keys (user_id, encrypted_key, label) values ($1, $2, 'own')"
    await gateway.database.value(insert, caller.user.id, provider_key or "gone")
    hold = await caller.hold()
    await caller.runtime.settlements.keep_generation(hold.request_id, "gen-1")
    if provider_key is None:
        await gateway.database.value("delete from public.provider_keys")
    await gateway.database.value("update public.usage_records set expires_at = now() - interval '1 second'")
    upstream.forget()
    await sweep(caller.runtime)
    assert await gateway.database.rows(
        "select status, settlement_source, cost_nanos from public.usage_records"
    ) == [{"status": "expired", "settlement_source": "none", "cost_nanos": 0}]
    calls = [call for call in upstream.sandbox.state.calls if call.path == "/generation"]
    return [value for call in calls for name, value in call.raw_headers if name == b"authorization"]


async def test_a_lost_request_under_the_users_key_is_looked_up_under_it(
    live_gateway: Gateway, upstream: Upstream
) -> None:
    sealed = (await live_gateway.app.state.service.ready()).vault.encrypt("sk-or-v1-own")
    assert await own_lookup(live_gateway, upstream, sealed) == [b"Bearer sk-or-v1-own"]


@pytest.mark.parametrize("provider_key", [None, "sealed by nobody"])
async def test_without_that_key_no_upstream_is_asked(
    live_gateway: Gateway, upstream: Upstream, provider_key: str | None
) -> None:
    assert await own_lookup(live_gateway, upstream, provider_key) == []


async def test_a_users_key_that_is_refused_by_now_does_not_keep_the_request_pending(
    start_gateway: Callable[..., Awaitable[Gateway]], upstream: Upstream
) -> None:
    async def refuse_lookups(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/generation"):
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"authorization"]}
        await upstream(scope, receive, send)

    async with served(refuse_lookups) as url:
        gateway = await start_gateway(**live(f"{url}/api/v1"))
        sealed = (await gateway.app.state.service.ready()).vault.encrypt("sk-or-v1-revoked")
        assert await own_lookup(gateway, upstream, sealed) == []
    assert [call.status for call in upstream.sandbox.state.calls if call.path == "/generation"] == [401]
