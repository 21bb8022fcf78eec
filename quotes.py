"""What would this body hold, and roughly cost? The proxy's own bound of it, without sending, counting or holding anything."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Any

import orjson

from bounds import Bound, BoundPolicy, bound_request
from catalog import ModelIndex
from endpoints import Endpoint
from errors import BadRequest
from money import EXACT, credits_from_nanos, plain
from outgoing import read_request

USUAL_OUTPUT_TOKENS = 256
REFUSALS = {
    "credits": "insufficient_credits",
    "budget": "budget_exceeded",
    "end_user_budget": "end_user_budget_exceeded",
    "MODEL_NOT_ALLOWED": "model_not_allowed",
    "REQUEST_LIMIT_EXCEEDED": "key_request_limit_exceeded",
    "trial_expired": "trial_expired",
    "not_found": "invalid_api_key",
}


def bound_of(endpoint: Endpoint, body: Mapping[str, Any], models: ModelIndex, policy: BoundPolicy) -> Bound:
    """The bound of a body, taken as JSON without superfluous spaces. Raises what the proxy would: BadRequest, ModelNotFound, ..."""
    try:
        raw = orjson.dumps(body)
    except TypeError as error:
        raise BadRequest(f"The request body cannot be read: {error}.", param="body", code="invalid_json") from None
    asked = read_request(endpoint, raw, "application/json")
    return bound_request(endpoint.name, asked.fields, len(raw), models, policy)


def question(bound: Bound, *, markup: Decimal) -> dict[str, Any]:
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


def answer(bound: Bound, found: Mapping[str, Any], *, markup: Decimal, output_tokens: int | None) -> dict[str, Any]:
    """The fields of a Quote; `found` is what the database says of it."""
    granted = found["outcome"] == "granted"
    most = found["granted_output"] if granted else bound.max_output
    expected = min(USUAL_OUTPUT_TOKENS if output_tokens is None else output_tokens, most)
    pays = not (found.get("free") or found.get("byok"))
    estimate = EXACT.multiply(bound.typical_nanos(expected), markup) if pays else Decimal(0)
    available = found.get("available_nanos")
    hold = int(found.get("hold_nanos") or 0)
    return {
        "models": list(bound.models),
        "would_hold": credits_from_nanos(hold),
        "estimated_cost": credits_from_nanos(int(estimate.to_integral_value(rounding=ROUND_CEILING))),
        "estimated_output_tokens": expected,
        "prompt_tokens_estimate": bound.prompt_estimate,
        "max_output_tokens": found["granted_output"] if granted else 0,
        "affordable": granted,
        "reason": None if granted else REFUSALS[found["outcome"]],
        "available": None if available is None else credits_from_nanos(available),
        "byok": bool(found.get("byok")),
        "free": bool(found.get("free")),
        "markup": markup,
        "price_basis": bound.price_basis,
        "message": "An estimate of this moment: nothing is held or counted, and rate limits are not looked at.",
    }
