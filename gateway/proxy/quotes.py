"""The bound of a body without sending it. The proxy's own bound of it, without sending, counting or holding
anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Any

import orjson

from common.errors import BadRequest, GatewayError
from common.money import EXACT, credits_from_nanos, plain
from db_rows.requests import IdentityRefused, MoneyRefused, QuoteItem
from gateway.billing.refusals import MONEY, error_for_refusal
from gateway.pricing.catalog import ModelIndex
from gateway.pricing.upper_bound import Bound, BoundPolicy, bound_request
from gateway.proxy.endpoints import Endpoint
from gateway.proxy.request import read_request

USUAL_OUTPUT_TOKENS = 256
ESTIMATE = "An estimate of this moment: nothing is held or counted, and rate limits are not looked at."


def bound_of(endpoint: Endpoint, body: Mapping[str, Any], models: ModelIndex, policy: BoundPolicy) -> Bound:
    """The bound of a body, taken as JSON without superfluous spaces. Raises what the proxy would: BadRequest,
    ModelNotFound, ...
    """
    try:
        raw = orjson.dumps(body, default=_as_written)
    except TypeError as error:
        raise BadRequest(
            f"The request body cannot be read: {error}.", param="body", code="invalid_json"
        ) from None
    asked = read_request(endpoint, raw, "application/json")
    return bound_request(endpoint.name, asked.fields, len(raw), models, policy)


def _as_written(value: object) -> orjson.Fragment:
    """Orders are read with exact decimals; the proxy reads the text."""
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
    bound: Bound, found: Mapping[str, Any], *, markup: Decimal, output_tokens: int | None
) -> dict[str, Any]:
    """The fields of a Quote; `found` is what the database says of it."""
    granted, short = found["outcome"] == "granted", found["outcome"] in MONEY
    most = found["granted_output"] if granted else bound.max_output
    expected = min(USUAL_OUTPUT_TOKENS if output_tokens is None else output_tokens, most)
    rate = Decimal(0) if found.get("free") or found.get("byok") else markup
    needed = _charged(_most_nanos(bound, bound.min_output), rate)
    refusal = None if granted else _refusal(found, bound, needed)
    available = found.get("available_nanos")
    return {
        "models": list(bound.models),
        "would_hold": credits_from_nanos(_charged(_most_nanos(bound, most), rate)),
        "needed": credits_from_nanos(needed),
        "estimated_cost": credits_from_nanos(_charged(bound.typical_nanos(expected), rate)),
        "estimated_output_tokens": expected,
        "prompt_tokens_estimate": bound.prompt_estimate,
        "max_output_tokens": most if granted else 0,
        "affordable_max_tokens": found["granted_output"] if short else None,
        "affordable": granted,
        "reason": None if refusal is None else refusal.code,
        "available": None if available is None else credits_from_nanos(available),
        "byok": bool(found.get("byok")),
        "free": bool(found.get("free")),
        "markup": markup,
        "price_basis": bound.price_basis,
        "message": ESTIMATE if refusal is None else f"{refusal.message} {ESTIMATE}",
    }


def _most_nanos(bound: Bound, output_tokens: int) -> Decimal:
    """What a hold for this much output covers, without markup."""
    return EXACT.add(bound.fixed_nanos, EXACT.multiply(bound.output_nanos, Decimal(output_tokens)))


def _charged(nanos: Decimal, markup: Decimal) -> int:
    """Whole nano-dollars, rounded up as the database rounds them."""
    return int(EXACT.multiply(nanos, markup).to_integral_value(rounding=ROUND_CEILING))


def _refusal(answer: Mapping[str, Any], bound: Bound, needed: int) -> GatewayError:
    """What the request would be told instead of an answer."""
    outcome: Any = "INVALID_KEY" if answer["outcome"] == "not_found" else answer["outcome"]
    refusal: MoneyRefused | IdentityRefused = {"outcome": outcome, "request_id": ""}
    if outcome in MONEY:
        refusal = {
            "outcome": outcome,
            "request_id": "",
            "needed_nanos": needed,
            "available_nanos": answer["available_nanos"],
            "balance_nanos": answer["available_nanos"],
            "held_nanos": 0,
            "affordable_output": answer["granted_output"],
        }
    return error_for_refusal(refusal, "chat", client_limit_field=bound.client_limit_field)
