"""The gateway's own headers on the answer to an admitted request."""

from __future__ import annotations

from gateway.billing.rate_limit_headers import limit_headers
from gateway.proxy.admitted_request import AdmittedRequest
from gateway.proxy.idempotency_and_cache import MISS
from gateway.proxy.outcome import Outcome


def response_headers(admitted: AdmittedRequest, outcome: Outcome) -> dict[str, str]:
    """Limits, generation id, and what the gateway decided for the request."""
    hold, bound = admitted.hold, admitted.bound
    headers = limit_headers(hold.limits)
    if outcome.generation_id:
        headers["x-generation-id"] = outcome.generation_id
    if hold.cache is not None:
        headers |= MISS
    if hold.byok:
        headers["x-gateway-byok"] = "true"
    if bound.min_output != bound.max_output:
        headers["x-gateway-max-tokens"] = str(hold.granted_output)
    return headers
