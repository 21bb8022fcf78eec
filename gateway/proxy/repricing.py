"""Raises a hold when prices changed in flight. Prices have changed: the model list is read anew, the hold
raised.

Where a client's own `provider.max_price` excludes (`Bound.client_caps_price`) it is not asked: that is the
client's to change.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.errors import UpstreamUnavailable
from gateway.billing.hold import Hold
from gateway.pricing.catalog import ModelIndex
from gateway.pricing.upper_bound import Bound
from gateway.runtime.instance import Runtime

log = structlog.get_logger("repricing")

# However many requests meet a changed price, the list is fetched for them no oftener.
REFRESH_SECONDS = 5.0


async def reprice(
    runtime: Runtime,
    environment: str | None,
    hold: Hold,
    bound: Bound,
    bound_with: Callable[[ModelIndex], Bound],
) -> tuple[Hold, Bound] | None:
    """The raised hold and the bound at today's prices; None where they are those that were held, or cannot be
    had.

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
