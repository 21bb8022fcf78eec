"""Asks the database, in one round trip that other requests share, whether a request may be sent and on which
hold.

Nothing is decided here. The answer may also be that of an earlier request: the one with the same
Idempotency-Key, or one in the response cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TypedDict

from common.errors import GatewayError
from common.money import plain
from common.request_ids import new_request_id
from db_rows.requests import (
    AdmissionAnswer,
    AdmissionItem,
    AdmissionOptions,
    AdmissionVerdict,
    Admitted,
    BoundItem,
    Cached,
    ExpiredHold,
    IdempotencyRefused,
    PriceBasis,
    RaiseAnswer,
    RaiseItem,
    RaiseVerdict,
    Replayed,
    VerificationItem,
    Verified,
)
from db_rows.shared import Mode
from gateway.billing.group_commit import GroupCommit
from gateway.billing.hold import Hold, StoredReply
from gateway.billing.refusals import error_for_refusal
from gateway.billing.stored_answers import AnswerSlot, StoredAnswer, open_answer
from gateway.billing.unknown_keys import UnknownKeys
from gateway.pricing.upper_bound import Bound
from security import Credential, Vault

MAX_CACHING_KEYS = 10_000

Item = VerificationItem | AdmissionItem


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What one request asks of admission, besides who is asking.

    `cache` is set where the request asks for the cache. Where it says nothing, `default_cache` makes the
    slot, in case its key uses the cache by default. With neither, the request takes no part in the cache.
    """

    request_id: str
    client_request_id: str | None
    endpoint: str
    resource: str
    streamed: bool
    bound: Bound
    end_user: str | None = None
    price_basis: PriceBasis | None = None
    idempotency: AnswerSlot | None = None
    cache: AnswerSlot | None = None
    default_cache: Callable[[], AnswerSlot] | None = None


class _Common(TypedDict):
    """What every item of an instance says."""

    mode: Mode
    markup: str
    ttl_seconds: int
    resent: bool
    byok: bool


class _Presented(TypedDict):
    """Who is asking, as an item says it."""

    hashes: Sequence[str]
    secret_id: str
    legacy_hash: str | None
    prefix_environment: str | None
    address: str
    domain: str | None
    user_agent: str | None


class Admission:
    """The gate in front of the upstream, through one shared queue."""

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[Sequence[AdmissionAnswer]]],
        *,
        mode: Mode,
        markup: Decimal,
        hold_ttl_seconds: int,
        vault: Vault,
        raise_holds: Callable[[Sequence[RaiseItem]], Awaitable[Sequence[RaiseAnswer]]],
        abandoned: Callable[[str], None],
        resolve_expired: Callable[[Sequence[ExpiredHold]], Awaitable[None]],
    ) -> None:
        self._queue: GroupCommit[Item, AdmissionVerdict] = GroupCommit(
            send,
            abandoned=lambda item, answer: _release_abandoned(abandoned, item, answer),
            mark_resent=_marked_resent,
        )
        self._raises: GroupCommit[RaiseItem, RaiseVerdict] = GroupCommit(raise_holds)
        self._vault = vault
        self._common: _Common = {
            "mode": mode,
            "markup": plain(markup),
            "ttl_seconds": hold_ttl_seconds,
            "resent": False,
            "byok": True,
        }
        self._resolve_expired = resolve_expired
        # Keys (their first hash) seen to use the cache by default. This is only a hint: to compute the slot
        # for every other request would cost each the reading of its body, so a key's first request is never a
        # hit.
        self._caching: set[str] = set()
        self._unknown_keys = UnknownKeys()

    async def verify(self, credential: Credential, *, request_id: str, verb: str, resource: str) -> Verified:
        """The key and its user. Raises InvalidKey, Forbidden and their kin, DatabaseUnavailable."""
        # In the same queue as admissions: under load a verification costs no round trip of its own.
        item: VerificationItem = {
            **self._common,
            **_presented(credential),
            "request_id": request_id,
            "verb": verb,
            "resource": resource,
            "holds": False,
        }
        answer = await self._queue.submit(item, group=credential.hashes[0])
        if answer["outcome"] != "verified":
            raise self._refusal(answer, credential, resource)
        self._unknown_keys.clear(credential.hashes[0])
        return answer

    def is_suspect(self, credential: Credential) -> bool:
        """Whether to verify the key before reading the body: it is not known here, and unknown keys came from
        its address lately.
        """
        return self._unknown_keys.is_suspect(credential.address, credential.hashes[0])

    async def admit(self, credential: Credential, request: AdmissionRequest) -> Hold | StoredReply:
        """The hold, or an answer that was given before.

        Where holds of crashed requests are in the way, they are resolved and the database is asked once more.
        Raises the refusal, or DatabaseUnavailable: then nothing was held, and nothing may be sent.
        """
        slot = self._cache_slot(credential, request)
        item = self._item(credential, request, slot)
        answer = await self._ask(item, credential)
        if answer["outcome"] == "cached" or answer["outcome"] == "replayed":
            reply = await self._open(answer, request)
            if reply is not None:
                return reply
            # It was not readable, so it is as if it had never been stored: the request is sent and charged.
            answer = await self._ask(_without_stored_answers(item), credential)
        if answer["outcome"] != "admitted":
            raise self._refusal(
                answer, credential, request.resource, client_limit_field=request.bound.client_limit_field
            )
        return _hold(answer, self._learn_cache_default(credential, request, answer, slot))

    async def raise_hold(self, hold: Hold, bound: Bound, *, price_basis: PriceBasis | None = None) -> Hold:
        """The hold for a running request that is sent again under another bound; a hold never falls.

        Raises what `admit` raises for money, and then the hold stays as it was.
        """
        item: RaiseItem = {
            "request_id": hold.request_id,
            **_bound_item(bound),
            "price_basis": price_basis,
        }
        answer = await self._raises.submit(item, group=hold.user_id)
        if answer["outcome"] != "raised":
            raise error_for_refusal(answer, "", client_limit_field=bound.client_limit_field)
        return replace(
            hold,
            granted_output=answer["granted_output"],
            hold_nanos=answer["hold_nanos"],
            balance_nanos=answer["balance_nanos"],
        )

    async def drain(self) -> None:
        """Waits until every item that was sent has been answered."""
        await self._queue.drain()
        await self._raises.drain()

    def _refusal(
        self,
        refusal: AdmissionVerdict,
        credential: Credential,
        resource: str,
        *,
        client_limit_field: str | None = None,
    ) -> GatewayError:
        if refusal["outcome"] == "INVALID_KEY":
            self._unknown_keys.add(credential.address)
        return error_for_refusal(refusal, resource, client_limit_field=client_limit_field)

    async def _ask(self, item: AdmissionItem, credential: Credential) -> AdmissionVerdict:
        answer = await self._queue.submit(item, group=credential.hashes[0])
        # No worker is needed to free what a crash left held: whoever is short of it resolves it and asks
        # again.
        if expired := _expired_holds(answer):
            await self._resolve_expired(expired)
            answer = await self._queue.submit(item, group=credential.hashes[0])
        return answer

    async def _open(self, answer: Cached | Replayed, request: AdmissionRequest) -> StoredReply | None:
        """The stored answer, None for a cached one that cannot be read: then the request is sent after all.

        Raises AnswerNotKept where the answer of an idempotency key cannot be read: it was charged once.
        """
        stored = await open_answer(answer["answer"], self._vault)
        if stored is not None:
            return _stored_reply(answer, stored)
        if answer["outcome"] == "replayed":
            raise error_for_refusal(_not_kept(answer), request.resource)
        return None

    def _cache_slot(self, credential: Credential, request: AdmissionRequest) -> AnswerSlot | None:
        by_default = request.default_cache if request.cache is None else None
        if by_default is not None and credential.hashes[0] in self._caching:
            return by_default()
        return request.cache

    def _learn_cache_default(
        self,
        credential: Credential,
        request: AdmissionRequest,
        answer: Admitted,
        slot: AnswerSlot | None,
    ) -> AnswerSlot | None:
        """Where this answer is to be cached; notes for the key's next request whether the key caches."""
        if request.cache is not None or request.default_cache is None:
            return slot
        if answer.get("cache_ttl") is None:
            self._caching.discard(credential.hashes[0])
            return None
        # Forgetting them all costs each one cache hit, and needs no bookkeeping per request.
        if len(self._caching) >= MAX_CACHING_KEYS:
            self._caching.clear()
        self._caching.add(credential.hashes[0])
        return slot or request.default_cache()

    def _item(
        self, credential: Credential, request: AdmissionRequest, cache: AnswerSlot | None
    ) -> AdmissionItem:
        return {
            **self._common,
            **_presented(credential),
            "request_id": request.request_id,
            "client_request_id": request.client_request_id,
            "verb": "write",
            "resource": request.resource,
            "holds": True,
            "endpoint": request.endpoint,
            "streamed": request.streamed,
            "models": request.bound.models,
            "prompt_estimate": request.bound.prompt_estimate,
            **_bound_item(request.bound),
            **_options(request, cache),
        }


def _options(request: AdmissionRequest, cache: AnswerSlot | None) -> AdmissionOptions:
    # Absent rather than null: each of them costs the database a look-up.
    options: AdmissionOptions = {}
    if request.end_user is not None:
        options["end_user"] = request.end_user
    if request.price_basis is not None:
        options["price_basis"] = request.price_basis
    if request.idempotency is not None:
        options["idempotency"] = request.idempotency.item()
    if cache is not None:
        options["cache"] = cache.item()
    return options


def _presented(credential: Credential) -> _Presented:
    return {
        "hashes": credential.hashes,
        "secret_id": credential.secret_id,
        "legacy_hash": credential.legacy_hash,
        "prefix_environment": credential.environment,
        "address": credential.address,
        "domain": credential.domain,
        "user_agent": credential.user_agent,
    }


def _bound_item(bound: Bound) -> BoundItem:
    return {
        # As text in plain notation: JSON numbers are read as floats on their way, and 1E-9 is no numeric of
        # ours.
        "fixed_nanos": format(bound.fixed_nanos, "f"),
        "output_nanos": format(bound.output_nanos, "f"),
        "min_output": bound.min_output,
        "max_output": bound.max_output,
    }


def _marked_resent(item: Item) -> Item:
    # The database then looks for the record of the first sending before it admits.
    again = item.copy()
    again["resent"] = True
    return again


def _without_stored_answers(item: AdmissionItem) -> AdmissionItem:
    """The item to send where a cached answer cannot be read: as if it were not there.

    It has another id, since the record of the cache hit has this one's.
    """
    again = item.copy()
    again["request_id"], again["idempotency"] = new_request_id(), None
    if "cache" in item:
        again["cache"] = {**item["cache"], "clear": True}
    return again


def _release_abandoned(abandoned: Callable[[str], None], item: Item, answer: AdmissionVerdict) -> None:
    # Only an admission holds money. Nobody is left to send the request, so its hold is released at once.
    if answer["outcome"] == "admitted":
        abandoned(item["request_id"])


def _expired_holds(answer: AdmissionVerdict) -> Sequence[ExpiredHold] | None:
    match answer["outcome"]:
        case "rate_limit" | "plan_limit" | "concurrency" | "idempotency_running":
            return answer["expired"]
        case "credits" | "budget" | "end_user_budget":
            return answer.get("expired")
        case _:
            return None


def _hold(answer: Admitted, cache: AnswerSlot | None) -> Hold:
    ttl = answer.get("cache_ttl")
    return Hold(
        request_id=answer["request_id"],
        user_id=answer["user_id"],
        key_id=answer["key_id"],
        environment=answer["environment"],
        granted_output=answer["granted_output"],
        hold_nanos=answer["hold_nanos"],
        balance_nanos=answer["balance_nanos"],
        limits=answer["limits"],
        byok=answer.get("byok", False),
        provider_key=answer.get("provider_key"),
        cache=None if cache is None or ttl is None else replace(cache, ttl_seconds=ttl, clear=False).item(),
    )


def _stored_reply(answer: Cached | Replayed, stored: StoredAnswer) -> StoredReply:
    reply = StoredReply(
        source="cache",
        request_id=answer["request_id"],
        original_request_id=answer["original_request_id"],
        user_id=answer["user_id"],
        key_id=answer["key_id"],
        environment=answer["environment"],
        answer=stored,
        tokens=0,
        age_seconds=answer["age"],
        cost_nanos=answer["cost_nanos"],
        balance_nanos=answer["balance_after_nanos"],
        limits={},
    )
    if answer["outcome"] == "cached":
        return replace(reply, limits=answer["limits"])
    first, tokens = answer["original_request_id"], answer["tokens"]
    return replace(reply, source="idempotency", request_id=first, tokens=tokens)


def _not_kept(answer: Replayed) -> IdempotencyRefused:
    return {
        "outcome": "idempotency_not_kept",
        "request_id": answer["request_id"],
        "original_request_id": answer["original_request_id"],
        "cost_nanos": answer["cost_nanos"],
    }
