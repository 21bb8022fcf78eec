"""What if no provider serves a request at the price that was held? Prices have changed: the model list is read anew, the hold raised.

A client's own `provider.max_price` may be what excludes: that is the client's to change, and no reason to ask for the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import structlog

from admission import Hold
from bounds import Bound
from catalog import ModelIndex
from errors import UpstreamUnavailable
from money import parse_amount

if TYPE_CHECKING:
    from runtime import Runtime

log = structlog.get_logger("repricing")

# However many requests meet a changed price, the list is fetched for them no oftener.
REFRESH_SECONDS = 30.0


def is_own_limit(fields: Mapping[str, Any], bound: Bound) -> bool:
    """Whether a price limit of the client's is the one that was sent, and not the price that is held; some endpoints send no other."""
    asked, sent = _limits(fields), _limits(bound.patch)
    return any(own is not None and own == sent.get(name, own) for name, own in asked.items())


def _limits(fields: Mapping[str, Any]) -> dict[str, Decimal | None]:
    provider = fields.get("provider")
    limits = provider.get("max_price") if isinstance(provider, Mapping) else None
    if not isinstance(limits, Mapping):
        return {}
    return {name: parse_amount(repr(value) if isinstance(value, float) else value) for name, value in limits.items()}


async def reprice(
    runtime: Runtime, environment: str | None, hold: Hold, bound: Bound, bound_with: Callable[[ModelIndex], Bound]
) -> tuple[Hold, Bound] | None:
    """The raised hold and the bound at today's prices; None where they are those that were held, or cannot be had.

    Raises InsufficientCredits or BudgetExceeded where the account does not cover them.
    """
    try:
        models = await runtime.catalog(environment).refresh_within(REFRESH_SECONDS)
    except UpstreamUnavailable as error:
        log.warning("prices_not_refreshed", reason=error.message)
        return None
    dearer = bound_with(models)
    if dearer == bound:
        return None
    return await runtime.admission.raise_hold(hold, dearer, price_basis=dearer.price_basis), dearer
