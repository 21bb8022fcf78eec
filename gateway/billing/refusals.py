"""The database's refusals as errors that name what is short, for how long, and what to do."""

from __future__ import annotations

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
from db_rows.requests import (
    AdmissionVerdict,
    IdempotencyPending,
    IdempotencyRefused,
    LimitRefused,
    MoneyRefused,
    RaiseVerdict,
)
from gateway.billing.rate_limit_headers import limit_headers

log = structlog.get_logger("admission")

FORBIDDEN: dict[str, type[GatewayError]] = {
    "IP_NOT_ALLOWED": IpNotAllowed,
    "DOMAIN_NOT_ALLOWED": DomainNotAllowed,
    "MODEL_NOT_ALLOWED": ModelNotAllowed,
    "ACCOUNT_SUSPENDED": AccountSuspended,
    "REQUEST_LIMIT_EXCEEDED": KeyExhausted,
    "trial_expired": TrialExpired,
}
# Told apart to whoever holds the key; somebody who guesses always gets the first.
UNUSABLE_KEYS = {
    "INVALID_KEY": "This API key does not exist.",
    "INACTIVE_KEY": "This API key has been revoked.",
    "EXPIRED_KEY": "This API key has expired.",
}
MONEY: dict[str, tuple[type[InsufficientCredits], str]] = {
    "credits": (InsufficientCredits, "Your account has"),
    "budget": (BudgetExceeded, "The budget of this API key leaves"),
    "end_user_budget": (EndUserBudgetExceeded, "The budget of this end user leaves"),
}

Refusal = AdmissionVerdict | RaiseVerdict


def error_for_refusal(
    refusal: Refusal, resource: str, *, client_limit_field: str | None = None
) -> GatewayError:
    """The error that a refusal of the database means.

    `resource`: what the key's scopes had to allow. `client_limit_field`: the field in which the client set an
    output limit. An answer that is no refusal is a fault of ours: it is logged, and becomes a plain 500.
    """
    match refusal["outcome"]:
        case "INVALID_KEY" | "INACTIVE_KEY" | "EXPIRED_KEY" as outcome:
            return InvalidKey(UNUSABLE_KEYS[outcome])
        case "SCOPE_NOT_ALLOWED":
            return MissingScope(f"This API key's scopes do not allow `{resource}`.", scope=resource)
        case "rate_limit" | "plan_limit" | "concurrency":
            return _limit_error(refusal)
        case "idempotency_conflict" | "idempotency_not_kept" | "idempotency_running":
            return _idempotency_error(refusal)
        case "credits" | "budget" | "end_user_budget":
            return _money_error(refusal, client_limit_field)
        case "wrong_mode":
            return wrong_mode()
    if refusal["outcome"] in FORBIDDEN:
        return FORBIDDEN[refusal["outcome"]]()
    log.error(
        "admission_failed",
        outcome=refusal["outcome"],
        sqlstate=refusal.get("sqlstate"),
        reason=refusal.get("message"),
    )
    return GatewayError()


def wrong_mode() -> Misconfigured:
    """Another instance took the database live, or this one was started in another mode."""
    return Misconfigured(
        "The database and this instance disagree on live or sandbox mode; restart the instance."
    )


def _limit_error(refusal: LimitRefused) -> GatewayError:
    headers = limit_headers(refusal["limits"])
    # A client that is told to wait would wait for ever, so these two are not "try again later".
    if refusal["never"] and refusal["unit"] == "tokens" and refusal["limit"]:
        return _never_fits(refusal, headers)
    kind, message = _limit_and_message(refusal)
    if refusal["never"]:
        message = f"The limit is {refusal['limit']} {refusal['unit'] or 'requests'}: nothing is allowed."
        return kind(message, headers={**headers, "x-should-retry": "false"})
    return kind(
        message,
        retry_after=refusal["retry_after"],
        headers=headers,
        window=refusal["window"],
        unit=refusal["unit"],
        limit=refusal["limit"],
    )


def _limit_and_message(refusal: LimitRefused) -> tuple[type[RateLimited], str]:
    limit, unit, window = refusal["limit"], refusal["unit"], _window_of(refusal)
    if refusal["outcome"] == "concurrency":
        are_running = "request is running" if limit == 1 else "requests are running"
        return ConcurrencyExceeded, f"{limit} {are_running} already, and more are not allowed at a time."
    if refusal["outcome"] == "plan_limit":
        return PlanLimitExceeded, f"Your plan's limit of {limit} {unit} per {window} is reached."
    return RateLimited, f"The limit of {limit} {unit} per {window} is reached."


def _window_of(refusal: LimitRefused) -> str:
    return refusal["window"].removeprefix("plan ")


def _never_fits(refusal: LimitRefused, headers: dict[str, str]) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This request is estimated at {refusal['need']} tokens, above your limit of "
        f"{refusal['limit']} tokens per {_window_of(refusal)}: no waiting will let it through. "
        "Shorten it or ask for a higher limit.",
        param="messages",
        code="token_limit_exceeded",
    )


def _idempotency_error(refusal: IdempotencyRefused | IdempotencyPending) -> GatewayError:
    header, first = "Idempotency-Key", refusal["original_request_id"]
    match refusal["outcome"]:
        case "idempotency_conflict":
            return IdempotencyConflict(param=header, original_request_id=first)
        case "idempotency_running":
            wait = refusal["retry_after"]
            return IdempotencyRunning(param=header, retry_after=wait, original_request_id=first)
        case "idempotency_not_kept":
            cost = credits_from_nanos(refusal["cost_nanos"])
            return AnswerNotKept(param=header, original_request_id=first, cost=cost)


def _money_error(refusal: MoneyRefused, client_limit_field: str | None) -> GatewayError:
    needed, available = (
        credits_from_nanos(refusal["needed_nanos"]),
        credits_from_nanos(refusal["available_nanos"]),
    )
    affordable = refusal["affordable_output"]
    # Which of them is the least decides the error: only credits can be bought, a budget has to be raised.
    kind, purse = MONEY[refusal["outcome"]]
    request = "This request" if client_limit_field else "Even a short answer to this request"
    message = f"{request} may cost up to {plain(needed)} credits. {purse} {plain(available)} available"
    if refusal["held_nanos"] and refusal["outcome"] == "credits":
        held = credits_from_nanos(refusal["held_nanos"])
        message += f" ({plain(held)} more are held for running requests)"
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
