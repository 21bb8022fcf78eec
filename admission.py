"""May this request go out, and on which hold? Asks the database, and turns its refusals into errors.

Nothing is decided here: the answer comes from one SQL call that other requests share.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import structlog

from batching import Queue
from bounds import Bound
from errors import (
    AccountSuspended,
    BudgetExceeded,
    ConcurrencyExceeded,
    ContextLengthExceeded,
    DomainNotAllowed,
    GatewayError,
    InsufficientCredits,
    InvalidKey,
    IpNotAllowed,
    KeyExhausted,
    Misconfigured,
    MissingScope,
    ModelNotAllowed,
    PlanLimitExceeded,
    RateLimited,
    TrialExpired,
)
from money import credits_from_nanos, plain
from security import Credential

log = structlog.get_logger("admission")

Answer = Mapping[str, Any]

IDENTITY: dict[str, type[GatewayError]] = {
    "IP_NOT_ALLOWED": IpNotAllowed,
    "DOMAIN_NOT_ALLOWED": DomainNotAllowed,
    "SCOPE_NOT_ALLOWED": MissingScope,
    "MODEL_NOT_ALLOWED": ModelNotAllowed,
    "ACCOUNT_SUSPENDED": AccountSuspended,
    "REQUEST_LIMIT_EXCEEDED": KeyExhausted,
    "trial_expired": TrialExpired,
}
KEY_TROUBLE = {
    "INVALID_KEY": "This API key does not exist.",
    "INACTIVE_KEY": "This API key has been revoked.",
    "EXPIRED_KEY": "This API key has expired.",
}


@dataclass(frozen=True, slots=True)
class Hold:
    """An admitted request: its record is pending, and this much is held for it."""

    request_id: str
    user_id: int
    key_id: int
    environment: str
    granted_output: int
    hold_nanos: int
    balance_nanos: int
    limits: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Order:
    """What one request asks of admission, besides who is asking."""

    request_id: str
    client_request_id: str | None
    endpoint: str
    resource: str
    streamed: bool
    bound: Bound


class Admission:
    """The gate in front of the upstream, through one shared queue."""

    def __init__(
        self,
        send: Callable[[Sequence[dict[str, Any]]], Awaitable[list[dict[str, Any]]]],
        *,
        mode: str,
        markup: Decimal,
        hold_ttl_seconds: int,
        abandoned: Callable[[str], None],
        resolve_expired: Callable[[Sequence[Answer]], Awaitable[None]],
    ) -> None:
        self._queue = Queue(send, abandoned=lambda item, answer: _hand_over(abandoned, item, answer))
        self._common = {"mode": mode, "markup": plain(markup), "ttl_seconds": hold_ttl_seconds, "resent": False}
        self._resolve_expired = resolve_expired

    async def verify(self, credential: Credential, *, request_id: str, verb: str, resource: str) -> Answer:
        """The key and its user. Raises InvalidKey, Forbidden and their kin, DatabaseUnavailable."""
        item = {**self._common, **credential.item(), "request_id": request_id, "verb": verb, "resource": resource, "holds": False}
        answer = await self._queue.submit(item, group=credential.hashes[0])
        if answer["outcome"] != "verified":
            raise refusal_error(answer, resource)
        return answer

    async def admit(self, credential: Credential, order: Order) -> Hold:
        """The hold. Raises the refusal, or DatabaseUnavailable; then nothing was held and nothing may be sent.

        Where holds of crashed requests stand in the way, they are resolved and the question is asked once more.
        """
        item = {**self._common, **credential.item(), **_order_item(order)}
        answer = await self._queue.submit(item, group=credential.hashes[0])
        if answer.get("expired"):
            await self._resolve_expired(answer["expired"])
            answer = await self._queue.submit(item, group=credential.hashes[0])
        if answer["outcome"] != "admitted":
            raise refusal_error(answer, order.resource, explicit=order.bound.min_output == order.bound.max_output)
        return Hold(
            request_id=order.request_id,
            user_id=answer["user_id"],
            key_id=answer["key_id"],
            environment=answer["environment"],
            granted_output=answer["granted_output"],
            hold_nanos=answer["hold_nanos"],
            balance_nanos=answer["balance_nanos"],
            limits=answer["limits"],
        )

    async def drain(self) -> None:
        await self._queue.drain()


def _hand_over(abandoned: Callable[[str], None], item: dict[str, Any], answer: dict[str, Any]) -> None:
    if answer["outcome"] == "admitted":
        abandoned(item["request_id"])


def _order_item(order: Order) -> dict[str, Any]:
    bound = order.bound
    return {
        "request_id": order.request_id,
        "client_request_id": order.client_request_id,
        "verb": "write",
        "resource": order.resource,
        "holds": True,
        "endpoint": order.endpoint,
        "streamed": order.streamed,
        "models": bound.models,
        "prompt_estimate": bound.prompt_estimate,
        "fixed_nanos": format(bound.fixed_nanos, "f"),
        "output_nanos": format(bound.output_nanos, "f"),
        "min_output": bound.min_output,
        "max_output": bound.max_output,
    }


# What a refusal says to the client.


def refusal_error(answer: Answer, resource: str, *, explicit: bool = False) -> GatewayError:
    """The error that a refusal of the database means. `explicit`: the client had set the output limit itself."""
    outcome = answer["outcome"]
    if outcome in KEY_TROUBLE:
        return InvalidKey(KEY_TROUBLE[outcome])
    if outcome == "SCOPE_NOT_ALLOWED":
        return MissingScope(f"This API key's scopes do not allow `{resource}`.", scope=resource)
    if outcome in IDENTITY:
        return IDENTITY[outcome]()
    if outcome in ("rate_limit", "plan_limit", "concurrency"):
        return _limit_error(answer)
    if outcome in ("credits", "budget"):
        return _money_error(answer, explicit=explicit)
    if outcome == "wrong_mode":
        return Misconfigured("The database and this instance disagree on live or sandbox mode; restart the instance.")
    log.error("admission_failed", outcome=outcome, sqlstate=answer.get("sqlstate"), reason=answer.get("message"))
    return GatewayError()


def _limit_error(answer: Answer) -> GatewayError:
    window, unit, limit = answer["window"], answer["unit"], answer["limit"]
    headers = limit_headers(answer["limits"])
    if window == "concurrency":
        kind: type[RateLimited] = ConcurrencyExceeded
        message = f"{limit} requests are running already, and more are not allowed at a time."
    else:
        kind = PlanLimitExceeded if answer["outcome"] == "plan_limit" else RateLimited
        message = f"The limit of {limit} {unit} per {window.removeprefix('plan ')} is reached."
        if kind is PlanLimitExceeded:
            message = message.replace("The limit", "Your plan's limit")
    if answer["never"] and unit == "tokens" and limit:
        return ContextLengthExceeded(
            f"This request is estimated at {answer['need']} tokens, above your limit of {limit} tokens per {window.removeprefix('plan ')}: "
            "no waiting will let it through. Shorten it or ask for a higher limit.",
            param="messages",
            code="token_limit_exceeded",
        )
    if answer["never"]:
        return kind(f"The limit is {limit} {unit or 'requests'}: nothing is allowed.", headers={**headers, "x-should-retry": "false"})
    return kind(message, retry_after=answer["retry_after"], headers=headers, window=window, unit=unit, limit=limit)


def _money_error(answer: Answer, *, explicit: bool) -> GatewayError:
    needed, available = (credits_from_nanos(answer[name]) for name in ("needed_nanos", "available_nanos"))
    affordable = answer["affordable_output"]
    what = "The budget of this API key leaves" if answer["outcome"] == "budget" else "Your account has"
    message = f"This request may cost up to {plain(needed)} credits. {what} {plain(available)} available"
    if answer["held_nanos"] and answer["outcome"] == "credits":
        message += f" ({plain(credits_from_nanos(answer['held_nanos']))} more are held for running requests)"
    message += "."
    if explicit and affordable > 0:
        message += f" With `max_tokens` of at most {affordable} it would be let through."
    kind = BudgetExceeded if answer["outcome"] == "budget" else InsufficientCredits
    return kind(
        message,
        param="max_tokens" if explicit and affordable > 0 else None,
        needed=needed,
        available=available,
        affordable_max_tokens=affordable,
    )


def limit_headers(limits: Mapping[str, Any]) -> dict[str, str]:
    """The tightest limits in OpenAI's headers and in those of the IETF draft (draft-ietf-httpapi-ratelimit-headers)."""
    found: dict[str, str] = {}
    states, policies = [], []
    for unit, name in (("requests", "request"), ("tokens", "token")):
        limit, left, reset = (limits.get(f"{name}_{part}") for part in ("limit", "left", "reset"))
        if limit is None or left is None:
            continue
        found[f"x-ratelimit-limit-{unit}"] = str(limit)
        found[f"x-ratelimit-remaining-{unit}"] = str(max(0, left))
        found[f"x-ratelimit-reset-{unit}"] = f"{reset}s"
        states.append(f'"{unit}";r={max(0, left)};t={reset}')
        policies.append(f'"{unit}";q={limit}')
    if states:
        found["RateLimit"] = ", ".join(states)
        found["RateLimit-Policy"] = ", ".join(policies)
    return found
