"""What did the upstream say this cost? Reads usage objects and generation records into exact numbers.

What cannot be trusted (null, negative, NaN, absurd) is unknown, and unknown is never zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from money import EXACT, parse_amount

MAX_TOKENS = 2**53
# No single answer costs a million dollars: a larger number is a fault, and would only overflow what it is stored in.
MAX_COST = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, and the cost in US dollars; None is unknown."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost: Decimal | None = None

    @property
    def billable_nanos(self) -> str | None:
        """The cost in nano-dollars, exactly, as text for a numeric."""
        return None if self.cost is None else format(self.cost.scaleb(9, EXACT), "f")

    @property
    def total_tokens(self) -> int:
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)


def parse_json(raw: bytes | str) -> Any:
    """JSON with exact decimals; NaN and infinities, which are no JSON, read as null. Raises ValueError for anything else."""
    try:
        return json.loads(raw, parse_float=_decimal, parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def read_usage(value: object) -> Usage | None:
    """A `usage` object of any endpoint, or None when it is none."""
    if not isinstance(value, dict):
        return None
    completion = _object(value.get("completion_tokens_details") or value.get("output_tokens_details"))
    prompt = _object(value.get("prompt_tokens_details") or value.get("input_tokens_details"))
    return Usage(
        prompt_tokens=_tokens(value.get("prompt_tokens", value.get("input_tokens"))),
        completion_tokens=_tokens(value.get("completion_tokens", value.get("output_tokens"))),
        cached_tokens=_tokens(prompt.get("cached_tokens")),
        reasoning_tokens=_tokens(completion.get("reasoning_tokens")),
        cost=_cost(value.get("cost"), value.get("is_byok"), _object(value.get("cost_details")).get("upstream_inference_cost")),
    )


def read_generation(value: Mapping[str, Any]) -> Usage:
    """The `data` of GET /generation."""
    return Usage(
        prompt_tokens=_first(value, "native_tokens_prompt", "tokens_prompt"),
        completion_tokens=_first(value, "native_tokens_completion", "tokens_completion"),
        cached_tokens=_tokens(value.get("native_tokens_cached")),
        reasoning_tokens=_tokens(value.get("native_tokens_reasoning")),
        cost=_cost(value.get("total_cost"), value.get("is_byok"), value.get("upstream_inference_cost")),
    )


def _cost(cost: object, is_byok: object, inference: object) -> Decimal | None:
    """usage.cost, plus what the provider billed to an own key where one was used."""
    total = parse_amount(cost)
    if total is not None and is_byok is True:
        own = parse_amount(inference)
        total = None if own is None else EXACT.add(total, own)
    return total if total is not None and total <= MAX_COST else None


def _first(value: Mapping[str, Any], *names: str) -> int | None:
    return next((tokens for name in names if (tokens := _tokens(value.get(name))) is not None), None)


def _tokens(value: object) -> int | None:
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        return None
    return value


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
