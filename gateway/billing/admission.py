"""Admission: asks for a hold, or finds a stored answer, in one round trip. Asks the database, and turns its
refusals into errors.

Nothing is decided here: the answer comes from one SQL call that other requests share. It may be the answer of
an earlier request: that of the same Idempotency-Key, or of the response cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from common.errors import GatewayError
from common.money import plain
from common.request_ids import new_request_id
from gateway.billing.group_commit import GroupCommit
from gateway.billing.hold import Answer, Hold, StoredReply
from gateway.billing.refusals import error_for_refusal
from gateway.billing.stored_answers import AnswerSlot, StoredAnswer, open_answer
from gateway.billing.unknown_keys import UnknownKeys
from gateway.pricing.upper_bound import Bound
from security import Credential, Vault

MAX_CACHING_KEYS = 10_000


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What one request asks of admission, besides who is asking.

    `price_basis`: fixed_nanos and output_nanos without markup and max_price as sent, for the receipt.
    `cache`: of a request that asks for the cache; of one that says nothing, `default_cache` gives the place
    where its key uses it by default. Neither: it takes no part.
    """

    request_id: str
    client_request_id: str | None
    endpoint: str
    resource: str
    streamed: bool
    bound: Bound
    end_user: str | None = None
    price_basis: Mapping[str, Any] | None = None
    idempotency: AnswerSlot | None = None
    cache: AnswerSlot | None = None
    default_cache: Callable[[], AnswerSlot] | None = None


class Admission:
    """The gate in front of the upstream, through one shared queue."""

    def __init__(
        self,
        send: Callable[[Sequence[dict[str, Any]]], Awaitable[list[dict[str, Any]]]],
        *,
        mode: str,
        markup: Decimal,
        hold_ttl_seconds: int,
        vault: Vault,
        raise_holds: Callable[[Sequence[dict[str, Any]]], Awaitable[list[dict[str, Any]]]],
        abandoned: Callable[[str], None],
        resolve_expired: Callable[[Sequence[Answer]], Awaitable[None]],
    ) -> None:
        self._queue = GroupCommit(send, abandoned=lambda item, answer: _hand_over(abandoned, item, answer))
        self._raises = GroupCommit(raise_holds)
        self._vault = vault
        self._common = {
            "mode": mode,
            "markup": plain(markup),
            "ttl_seconds": hold_ttl_seconds,
            "resent": False,
            "byok": True,
        }
        self._resolve_expired = resolve_expired
        # Keys (their first hash) seen to use the cache by default. No more than a hint: of others no place is
        # worked out before admission, which would cost every request the reading of its body, so their first
        # request here is never a hit.
        self._caching: set[str] = set()
        self._unknown_keys = UnknownKeys()

    async def verify(self, credential: Credential, *, request_id: str, verb: str, resource: str) -> Answer:
        """The key and its user. Raises InvalidKey, Forbidden and their kin, DatabaseUnavailable."""
        item = {
            **self._common,
            **credential.item(),
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
        """Whether the key is to be verified before anything else: it is not known, and invented ones have
        come from its address lately.
        """
        return self._unknown_keys.is_suspect(credential.address, credential.hashes[0])

    def _refusal(
        self, answer: Answer, credential: Credential, resource: str, *, client_limit_field: str | None = None
    ) -> GatewayError:
        if answer["outcome"] == "INVALID_KEY":
            self._unknown_keys.add(credential.address)
        return error_for_refusal(answer, resource, client_limit_field=client_limit_field)

    async def admit(self, credential: Credential, order: AdmissionRequest) -> Hold | StoredReply:
        """The hold, or the answer that was given before. Raises the refusal, or DatabaseUnavailable; then
        nothing was held and nothing may be sent.

        Where holds of crashed requests stand in the way, they are resolved and the question is asked once
        more.
        """
        by_default = order.default_cache if order.cache is None else None
        cache = (
            by_default() if by_default is not None and credential.hashes[0] in self._caching else order.cache
        )
        item = {**self._common, **credential.item(), **_order_item(order, cache)}
        answer = await self._ask(item, credential)
        if answer["outcome"] in ("cached", "replayed"):
            stored = await open_answer(answer["answer"], self._vault)
            if stored is not None:
                return _stored_reply(answer, stored)
            if answer["outcome"] == "replayed":
                raise error_for_refusal({**answer, "outcome": "idempotency_not_kept"}, order.resource)
            # What cannot be read is not there. This request's own id is on the record of the hit.
            again = {
                "request_id": new_request_id(),
                "idempotency": None,
                "cache": {**item["cache"], "clear": True},
            }
            answer = await self._ask({**item, **again}, credential)
        if answer["outcome"] != "admitted":
            raise self._refusal(
                answer, credential, order.resource, client_limit_field=order.bound.client_limit_field
            )
        if by_default is not None:
            cache = self._default_cache(credential, answer, cache, by_default)
        return _hold(answer, cache)

    async def raise_hold(
        self, hold: Hold, bound: Bound, *, price_basis: Mapping[str, Any] | None = None
    ) -> Hold:
        """The hold for a running request that goes out again under another bound; it never falls. Raises what
        `admit` raises for money, and then the hold stands as it was.
        """
        item = {"request_id": hold.request_id, **_bound_item(bound), "price_basis": price_basis}
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
        await self._queue.drain()
        await self._raises.drain()

    def _default_cache(
        self,
        credential: Credential,
        answer: Answer,
        known: AnswerSlot | None,
        place: Callable[[], AnswerSlot],
    ) -> AnswerSlot | None:
        """Where this answer is to be cached, and what the next request of this key should know."""
        if answer.get("cache_ttl") is None:
            self._caching.discard(credential.hashes[0])
            return None
        if len(self._caching) >= MAX_CACHING_KEYS:
            self._caching.clear()
        self._caching.add(credential.hashes[0])
        return known or place()

    async def _ask(self, item: dict[str, Any], credential: Credential) -> Answer:
        answer = await self._queue.submit(item, group=credential.hashes[0])
        if answer.get("expired"):
            await self._resolve_expired(answer["expired"])
            answer = await self._queue.submit(item, group=credential.hashes[0])
        return answer


def _hand_over(abandoned: Callable[[str], None], item: dict[str, Any], answer: dict[str, Any]) -> None:
    if answer["outcome"] == "admitted":
        abandoned(item["request_id"])


def _hold(answer: Answer, cache: AnswerSlot | None) -> Hold:
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


def _stored_reply(answer: Answer, stored: StoredAnswer) -> StoredReply:
    cached = answer["outcome"] == "cached"
    return StoredReply(
        source="cache" if cached else "idempotency",
        request_id=answer["request_id"] if cached else answer["original_request_id"],
        original_request_id=answer["original_request_id"],
        user_id=answer["user_id"],
        key_id=answer["key_id"],
        environment=answer["environment"],
        answer=stored,
        tokens=0 if cached else answer["tokens"],
        age_seconds=answer["age"],
        cost_nanos=answer["cost_nanos"],
        balance_nanos=answer["balance_after_nanos"],
        limits=answer.get("limits", {}),
    )


def _bound_item(bound: Bound) -> dict[str, Any]:
    return {
        "fixed_nanos": format(bound.fixed_nanos, "f"),
        "output_nanos": format(bound.output_nanos, "f"),
        "min_output": bound.min_output,
        "max_output": bound.max_output,
    }


def _order_item(order: AdmissionRequest, cache: AnswerSlot | None) -> dict[str, Any]:
    bound = order.bound
    item = {
        "request_id": order.request_id,
        "client_request_id": order.client_request_id,
        "verb": "write",
        "resource": order.resource,
        "holds": True,
        "endpoint": order.endpoint,
        "streamed": order.streamed,
        "models": bound.models,
        "prompt_estimate": bound.prompt_estimate,
        **_bound_item(bound),
    }
    if order.end_user is not None:
        item["end_user"] = order.end_user
    if order.price_basis is not None:
        item["price_basis"] = order.price_basis
    if order.idempotency is not None:
        item["idempotency"] = order.idempotency.item()
    if cache is not None:
        item["cache"] = cache.item()
    return item
