"""Raises the hold of a running request when prices changed since it was bounded.

Where the client's own `provider.max_price` excludes every provider (`Bound.client_caps_price`) nothing is
raised: that cap is the client's to change.
"""

from __future__ import annotations

import structlog

from common.errors import UpstreamUnavailable
from gateway.proxy.admitted_request import AdmittedRequest, bound_with
from gateway.proxy.services import Services

log = structlog.get_logger("repricing")

# However many requests meet a changed price, the model list is fetched for them at most this often.
REFRESH_SECONDS = 5.0


async def reprice(admitted: AdmittedRequest, services: Services) -> bool:
    """Gives the request the bound and the hold of today's prices. False where they are those that were held,
    or cannot be fetched.

    Raises InsufficientCredits or BudgetExceeded where the account does not cover them; the hold then stays as
    it was.
    """
    try:
        models = await services.catalog.refresh_within(REFRESH_SECONDS)
    except UpstreamUnavailable as error:
        log.warning("prices_not_refreshed", reason=error.message)
        return False
    bound = bound_with(models, services, admitted.incoming, admitted.parsed)
    # The same prices: the upstream refused for another reason, and a second attempt would end as the first.
    if bound == admitted.bound:
        return False
    basis = bound.price_basis
    admitted.hold = await services.admission.raise_hold(admitted.hold, bound, price_basis=basis)
    admitted.bound = bound
    return True
