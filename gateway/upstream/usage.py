"""Usage: tokens and exact cost, as every API reports them. Reads usage objects and generation records into
exact numbers.

What cannot be trusted (null, negative, NaN, absurd) is unknown, and unknown is never zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import Any

from common.money import EXACT, parse_amount

MAX_TOKENS = 2**53
# No single answer costs a million dollars: a larger number is a fault, and would only overflow what it is
# stored in.
MAX_COST = Decimal(1_000_000)
# Finer costs are rounded up here: an exponent like 1e-999999 would otherwise be written out in full.
FINEST_COST = Decimal("1e-30")
MAX_DIGITS = 40
MAX_TEXT = 256


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


def parse_json(raw: bytes) -> Any:
    """JSON in UTF-8 with exact decimals; NaN, infinities and absurdly long integers read as null. Raises
    ValueError for anything else.
    """
    try:
        return EXACT_JSON.decode(raw.decode().removeprefix("\ufeff"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_text(value: object) -> str | None:
    """A short text as it may be stored and logged: without control characters and lone surrogates, which
    PostgreSQL refuses.
    """
    if not isinstance(value, str):
        return None
    text = value[: 4 * MAX_TEXT]
    return (text if text.isprintable() else "".join(c for c in text if c.isprintable()))[:MAX_TEXT] or None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def read_generation_id(value: object) -> str | None:
    """The id of an answer's body where it is one that GET /generation knows."""
    return (
        value
        if isinstance(value, str)
        and value.startswith("gen-")
        and len(value) <= MAX_TEXT
        and value.isprintable()
        else None
    )


def read_integer(text: str) -> int | None:
    """An integer literal; None where it has more digits than anything we know of."""
    return int(text) if len(text) <= MAX_DIGITS else None


EXACT_JSON = json.JSONDecoder(parse_float=_decimal, parse_int=read_integer, parse_constant=lambda _: None)


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
        cost=_cost(
            value.get("cost"),
            value.get("is_byok"),
            _object(value.get("cost_details")).get("upstream_inference_cost"),
        ),
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
    total = _amount(cost)
    if total is not None and is_byok is True:
        own = _amount(inference)
        total = None if own is None else EXACT.add(total, own)
    return total


def _amount(value: object) -> Decimal | None:
    amount = parse_amount(value)
    return (
        None
        if amount is None or amount > MAX_COST
        else max(amount, amount.quantize(FINEST_COST, ROUND_CEILING, EXACT))
    )


def _first(value: Mapping[str, Any], *names: str) -> int | None:
    return next((tokens for name in names if (tokens := _tokens(value.get(name))) is not None), None)


def _tokens(value: object) -> int | None:
    if isinstance(value, Decimal) and 0 <= value <= MAX_TOKENS and value == value.to_integral_value():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        return None
    return value


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
