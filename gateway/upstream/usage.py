"""Tokens and exact costs, as every API and the generation records report them.

A value that cannot be trusted (null, negative, NaN, absurd) is unknown, and unknown must never become zero.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation

from common.json_types import Json, JsonObject
from common.money import EXACT, parse_amount

MAX_TOKENS = 2**53
# No single answer costs a million dollars: a larger number is a fault, and would overflow the column that it
# is stored in.
MAX_COST = Decimal(1_000_000)
# Finer costs are rounded up: an exponent like 1e-999999 would be written out in full.
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


def parse_json(raw: bytes) -> Json:
    """JSON in UTF-8 with exact decimals; NaN, infinities and absurdly long integers read as null. Raises
    ValueError for anything else.
    """
    try:
        value: Json = EXACT_JSON.decode(raw.decode().removeprefix("\ufeff"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def read_text(value: Json) -> str | None:
    """A short text as it may be stored and logged: without control characters and lone surrogates, which
    PostgreSQL refuses.
    """
    if not isinstance(value, str):
        return None
    text = value[: 4 * MAX_TEXT]
    return (text if text.isprintable() else "".join(c for c in text if c.isprintable()))[:MAX_TEXT] or None


def read_generation_id(value: Json) -> str | None:
    """The id in a body where it is one that GET /generation knows; None for any other."""
    if not isinstance(value, str) or not value.startswith("gen-"):
        return None
    return value if len(value) <= MAX_TEXT and value.isprintable() else None


def read_integer(text: str) -> int | None:
    """An integer literal; None where it has more digits than any number that is known of."""
    return int(text) if len(text) <= MAX_DIGITS else None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond all bounds
        return None


EXACT_JSON = json.JSONDecoder(parse_float=_decimal, parse_int=read_integer, parse_constant=lambda _: None)


def read_usage(value: Json) -> Usage | None:
    """The usage object of any endpoint, or None where the value is none."""
    if not isinstance(value, dict):
        return None
    completion = _object(value.get("completion_tokens_details") or value.get("output_tokens_details"))
    prompt = _object(value.get("prompt_tokens_details") or value.get("input_tokens_details"))
    inference_cost = _object(value.get("cost_details")).get("upstream_inference_cost")
    return Usage(
        prompt_tokens=_tokens(value.get("prompt_tokens", value.get("input_tokens"))),
        completion_tokens=_tokens(value.get("completion_tokens", value.get("output_tokens"))),
        cached_tokens=_tokens(prompt.get("cached_tokens")),
        reasoning_tokens=_tokens(completion.get("reasoning_tokens")),
        cost=_cost(value.get("cost"), value.get("is_byok"), inference_cost),
    )


def read_generation(value: JsonObject) -> Usage:
    """The `data` of GET /generation."""
    return Usage(
        prompt_tokens=_first(value, "native_tokens_prompt", "tokens_prompt"),
        completion_tokens=_first(value, "native_tokens_completion", "tokens_completion"),
        cached_tokens=_tokens(value.get("native_tokens_cached")),
        reasoning_tokens=_tokens(value.get("native_tokens_reasoning")),
        cost=_cost(value.get("total_cost"), value.get("is_byok"), value.get("upstream_inference_cost")),
    )


def _cost(cost: Json, is_byok: Json, inference: Json) -> Decimal | None:
    """`cost`, and on top what the provider billed to the key of an own account at the provider, where one was
    used.
    """
    total = _amount(cost)
    if total is None or is_byok is not True:
        return total
    billed = _amount(inference)
    return None if billed is None else EXACT.add(total, billed)


def _amount(value: Json) -> Decimal | None:
    amount = parse_amount(value)
    if amount is None or amount > MAX_COST:
        return None
    return max(amount, amount.quantize(FINEST_COST, ROUND_CEILING, EXACT))


def _first(value: JsonObject, *names: str) -> int | None:
    return next((tokens for name in names if (tokens := _tokens(value.get(name))) is not None), None)


def _tokens(value: Json) -> int | None:
    if isinstance(value, Decimal) and 0 <= value <= MAX_TOKENS and value == value.to_integral_value():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        return None
    return value


def _object(value: Json) -> JsonObject:
    return value if isinstance(value, dict) else {}
