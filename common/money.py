"""Exact money: nano-US-dollars, decimals and their JSON notation. No float may ever pass through here.

1 credit = 1 US dollar = 1,000,000,000 nano-dollars. Inside, amounts are `int` nano-dollars; at the
edges they are `Decimal` credits.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation

NANOS_PER_CREDIT = 1_000_000_000
MAX_NANOS = 2**63 - 1

# With 50 digits, a price of 1e-12 dollars times millions of tokens stays exact: no product rounds silently.
EXACT = Context(prec=50)


def credits_from_nanos(nanos: int) -> Decimal:
    """Nano-dollars as credits, exactly."""
    return Decimal(nanos).scaleb(-9, EXACT)


def nanos_from_credits(amount: Decimal) -> int:
    """Credits as nano-dollars; an amount with more than nine decimals is rounded up."""
    return int(amount.scaleb(9, EXACT).to_integral_value(rounding=ROUND_CEILING))


def plain(amount: Decimal) -> str:
    """A JSON number in plain notation without superfluous zeros (`0.000000001`, never `1E-9`)."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def plain_credits(nanos: int) -> str:
    """Nano-dollars as credits in plain notation; `nanos` must not be negative."""
    # plain(credits_from_nanos(nanos)) without the decimals: every charge is written this way.
    whole, rest = divmod(nanos, NANOS_PER_CREDIT)
    return f"{whole}.{rest:09d}".rstrip("0") if rest else str(whole)


def in_credits(row: Mapping[str, object]) -> dict[str, object]:
    """A row with its amounts in credits: `cost_nanos` becomes `cost`, and an unknown one stays None.

    Raises TypeError for an amount that is no integer: shown as it is, it would be far too large.
    """
    return {
        name.removesuffix("_nanos"): _amount(value) if name.endswith("_nanos") else value
        for name, value in row.items()
    }


def _amount(nanos: object) -> Decimal | None:
    if nanos is None:
        return None
    # bool is a subclass of int in Python.
    if isinstance(nanos, bool) or not isinstance(nanos, int):
        raise TypeError(f"nano-dollars are integers, not {type(nanos).__name__}")
    return credits_from_nanos(nanos)


def parse_amount(value: object) -> Decimal | None:
    """A finite, non-negative amount from parsed JSON (number or numeric string); None for anything else.

    NaN, infinities and negative numbers are not amounts.
    """
    # bool is a subclass of int in Python, and `true` is not an amount.
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        return None
    try:
        amount = Decimal(value)
    except InvalidOperation:
        return None
    return amount if amount.is_finite() and amount >= 0 else None
