"""What a body would hold and roughly cost. A quote must never send, count or hold anything.

It is computed by the code that bounds the real request, and judged by the same database, so that it cannot
promise what the proxy would refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import TypedDict

import orjson

from common.errors import BadRequest, GatewayError
from common.json_types import JsonObject
from common.money import EXACT, credits_from_nanos, plain
from db_rows.books import QuoteAnswer, QuoteRefused, QuoteShort
from db_rows.requests import IdentityRefused, MoneyRefused, PriceBasis, QuoteItem
from gateway.billing.refusals import error_for_refusal
from gateway.pricing.catalog import ModelIndex
from gateway.pricing.upper_bound import Bound, BoundPolicy, bound_request
from gateway.proxy.endpoints import Endpoint
from gateway.proxy.request import read_request

USUAL_OUTPUT_TOKENS = 256
ESTIMATE = "An estimate of this moment: nothing is held or counted, and rate limits are not looked at."


class QuoteFields(TypedDict):
    """The fields of a quote. Amounts are credits."""

    models: list[str]
    would_hold: Decimal
    needed: Decimal
    estimated_cost: Decimal
    estimated_output_tokens: int
    prompt_tokens_estimate: int
    max_output_tokens: int
    affordable_max_tokens: int | None
    affordable: bool
    reason: str | None
    available: Decimal | None
    byok: bool
    free: bool
    markup: Decimal
    price_basis: PriceBasis
    message: str


def bound_of(endpoint: Endpoint, body: JsonObject, models: ModelIndex, policy: BoundPolicy) -> Bound:
    """The bound of a body, taken as JSON without superfluous spaces. Raises what the proxy would: BadRequest,
    ModelNotFound, UnboundedCost or Forbidden.
    """
    try:
        raw = orjson.dumps(body, default=_as_written)
    except TypeError as error:
        message = f"The request body cannot be read: {error}."
        raise BadRequest(message, param="body", code="invalid_json") from None
    request = read_request(endpoint, raw, "application/json")
    return bound_request(endpoint.name, request.fields, len(raw), models, policy)


def _as_written(value: object) -> orjson.Fragment:
    """A number as the client wrote it: quotes are read with exact decimals, and the proxy reads the text."""
    if isinstance(value, Decimal):
        return orjson.Fragment(str(value))
    raise TypeError(f"{type(value).__name__} is not JSON")


def quote_item(bound: Bound, *, markup: Decimal) -> QuoteItem:
    """The amounts of an admission item."""
    return {
        "models": list(bound.models),
        "prompt_estimate": bound.prompt_estimate,
        "fixed_nanos": format(bound.fixed_nanos, "f"),
        "output_nanos": format(bound.output_nanos, "f"),
        "min_output": bound.min_output,
        "max_output": bound.max_output,
        "markup": plain(markup),
    }


def quote_fields(
    bound: Bound, answer: QuoteAnswer, *, is_test: bool, markup: Decimal, output_tokens: int | None
) -> QuoteFields:
    """The fields of a quote, from the database's answer. `is_test`: the key is a test key. `output_tokens`:
    what the client expects; None for USUAL_OUTPUT_TOKENS.
    """
    standing = _standing(answer, is_test=is_test)
    refusal = standing.refusal
    most = bound.max_output if standing.granted_output is None else standing.granted_output
    expected = min(USUAL_OUTPUT_TOKENS if output_tokens is None else output_tokens, most)
    # Where the gateway charges nothing, nothing is held either.
    rate = Decimal(0) if standing.free or standing.byok else markup
    needed = _charged(_most_nanos(bound, bound.min_output), rate)
    error = None if refusal is None else _error(refusal, bound, needed)
    return {
        "models": list(bound.models),
        "would_hold": credits_from_nanos(_charged(_most_nanos(bound, most), rate)),
        "needed": credits_from_nanos(needed),
        "estimated_cost": credits_from_nanos(_charged(bound.typical_nanos(expected), rate)),
        "estimated_output_tokens": expected,
        "prompt_tokens_estimate": bound.prompt_estimate,
        "max_output_tokens": standing.granted_output or 0,
        "affordable_max_tokens": standing.affordable_output,
        "affordable": refusal is None,
        "reason": None if error is None else error.code,
        "available": None if standing.available is None else credits_from_nanos(standing.available),
        "byok": standing.byok,
        "free": standing.free,
        "markup": markup,
        "price_basis": bound.price_basis,
        "message": ESTIMATE if error is None else f"{error.message} {ESTIMATE}",
    }


@dataclass(frozen=True, slots=True)
class _Standing:
    """The database's answer, in one form for all outcomes. `available`: nano-dollars; None: none count."""

    free: bool
    byok: bool = False
    granted_output: int | None = None
    affordable_output: int | None = None  # where money is short
    available: int | None = None
    refusal: QuoteShort | QuoteRefused | None = None


def _standing(answer: QuoteAnswer, *, is_test: bool) -> _Standing:
    match answer["outcome"]:
        case "granted":
            available = answer.get("available_nanos")
            return _Standing(answer["free"], answer["byok"], answer["granted_output"], None, available)
        case "credits" | "budget" | "end_user_budget":
            affordable, available = answer["granted_output"], answer["available_nanos"]
            return _Standing(is_test, False, None, affordable, available, answer)
    return _Standing(is_test, refusal=answer)


def _most_nanos(bound: Bound, output_tokens: int) -> Decimal:
    """What a hold for this much output covers, without markup."""
    return EXACT.add(bound.fixed_nanos, EXACT.multiply(bound.output_nanos, Decimal(output_tokens)))


def _charged(nanos: Decimal, markup: Decimal) -> int:
    """Whole nano-dollars, rounded up as the database rounds them."""
    return int(EXACT.multiply(nanos, markup).to_integral_value(rounding=ROUND_CEILING))


def _error(refusal: QuoteShort | QuoteRefused, bound: Bound, needed: int) -> GatewayError:
    """The error that the request itself would end with."""
    field = bound.client_limit_field
    return error_for_refusal(_admission_refusal(refusal, needed), "chat", client_limit_field=field)


def _admission_refusal(refusal: QuoteShort | QuoteRefused, needed: int) -> MoneyRefused | IdentityRefused:
    """The refusal as admission would answer it; there is no request, so its id is empty."""
    match refusal["outcome"]:
        case "credits" | "budget" | "end_user_budget" as outcome:
            available = refusal["available_nanos"]
            return {
                "outcome": outcome,
                "request_id": "",
                "needed_nanos": needed,
                "available_nanos": available,
                "balance_nanos": available,
                "held_nanos": 0,
                "affordable_output": refusal["granted_output"],
            }
        case "not_found":  # the key was deleted since it was verified
            return {"outcome": "INVALID_KEY", "request_id": ""}
        case outcome:
            return {"outcome": outcome, "request_id": ""}
