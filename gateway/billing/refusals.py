"""The database's refusals as errors. An error that names what is short, for how long, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from common.errors import (
    AccountSuspended,
    AnswerNotKept,
    BudgetExceeded,
    ConcurrencyExceeded,
    ContextLengthExceeded,
    DomainNotAllowed,
    EndUserBudgetExceeded,
    GatewayError,
    IdempotencyConflict,
    IdempotencyRunning,
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
from common.money import credits_from_nanos, plain
from gateway.billing.rate_limit_headers import limit_headers

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
MONEY: dict[str, tuple[type[InsufficientCredits], str]] = {
    "credits": (InsufficientCredits, "Your account has"),
    "budget": (BudgetExceeded, "The budget of this API key leaves"),
    "end_user_budget": (EndUserBudgetExceeded, "The budget of this end user leaves"),
}
KEY_TROUBLE = {
    "INVALID_KEY": "This API key does not exist.",
    "INACTIVE_KEY": "This API key has been revoked.",
    "EXPIRED_KEY": "This API key has expired.",
}


def error_for_refusal(
    answer: Answer, resource: str, *, client_limit_field: str | None = None
) -> GatewayError:
    """The error that a refusal of the database means. `client_limit_field`: the field in which the client set
    an output limit.
    """
    outcome = answer["outcome"]
    if outcome in KEY_TROUBLE:
        return InvalidKey(KEY_TROUBLE[outcome])
    if outcome == "SCOPE_NOT_ALLOWED":
        return MissingScope(f"This API key's scopes do not allow `{resource}`.", scope=resource)
    if outcome in IDENTITY:
        return IDENTITY[outcome]()
    if outcome in ("rate_limit", "plan_limit", "concurrency"):
        return _limit_error(answer)
    if outcome.startswith("idempotency_"):
        return _idempotency_error(answer)
    if outcome in MONEY:
        return _money_error(answer, client_limit_field=client_limit_field)
    if outcome == "wrong_mode":
        return Misconfigured(
            "The database and this instance disagree on live or sandbox mode; restart the instance."
        )
    log.error(
        "admission_failed", outcome=outcome, sqlstate=answer.get("sqlstate"), reason=answer.get("message")
    )
    return GatewayError()


def _limit_error(answer: Answer) -> GatewayError:
    window, unit, limit = answer["window"], answer["unit"], answer["limit"]
    headers = limit_headers(answer["limits"])
    if window == "concurrency":
        kind: type[RateLimited] = ConcurrencyExceeded
        message = f"{limit} {'request is' if limit == 1 else 'requests are'} running already, and more are not allowed at a time."
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
        return kind(
            f"The limit is {limit} {unit or 'requests'}: nothing is allowed.",
            headers={**headers, "x-should-retry": "false"},
        )
    return kind(
        message, retry_after=answer["retry_after"], headers=headers, window=window, unit=unit, limit=limit
    )


def _idempotency_error(answer: Answer) -> GatewayError:
    first = answer["original_request_id"]
    if answer["outcome"] == "idempotency_conflict":
        return IdempotencyConflict(param="Idempotency-Key", original_request_id=first)
    if answer["outcome"] == "idempotency_running":
        return IdempotencyRunning(
            param="Idempotency-Key", retry_after=answer["retry_after"], original_request_id=first
        )
    cost = credits_from_nanos(answer["cost_nanos"])
    return AnswerNotKept(param="Idempotency-Key", original_request_id=first, cost=cost)


def _money_error(answer: Answer, *, client_limit_field: str | None) -> GatewayError:
    needed, available = (credits_from_nanos(answer[name]) for name in ("needed_nanos", "available_nanos"))
    affordable = answer["affordable_output"]
    kind, what = MONEY[answer["outcome"]]
    request = "This request" if client_limit_field else "Even a short answer to this request"
    message = f"{request} may cost up to {plain(needed)} credits. {what} {plain(available)} available"
    if answer["held_nanos"] and answer["outcome"] == "credits":
        message += f" ({plain(credits_from_nanos(answer['held_nanos']))} more are held for running requests)"
    message += "."
    if client_limit_field and affordable > 0:
        message += f" With `{client_limit_field}` of at most {affordable} it would be let through."
    return kind(
        message,
        param=client_limit_field if affordable > 0 else None,
        needed=needed,
        available=available,
        affordable_max_tokens=affordable,
    )
