"""A request that holds credits: what arrived, what it may cost, and what was granted."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gateway.billing.hold import Hold
from gateway.pricing.catalog import ModelIndex
from gateway.pricing.upper_bound import Bound, BoundPolicy, bound_request
from gateway.proxy.request import IncomingRequest, ParsedRequest
from gateway.proxy.services import Services


@dataclass(slots=True)
class AdmittedRequest:
    """`hold` and `bound` belong together: both are replaced when prices changed and a larger hold was
    granted.
    """

    incoming: IncomingRequest
    parsed: ParsedRequest
    bound: Bound
    hold: Hold
    started: float  # of the monotonic clock, when the request arrived

    @property
    def elapsed_ms(self) -> int:
        """Milliseconds since the request arrived."""
        return int((time.monotonic() - self.started) * 1000)


def bound_with(
    models: ModelIndex, services: Services, incoming: IncomingRequest, parsed: ParsedRequest
) -> Bound:
    """What the request can cost at most at these models' prices. Raises BadRequest, ModelNotFound,
    UnboundedCost.
    """
    policy = BoundPolicy(
        services.settings.default_max_output_tokens, services.settings.free_models, services.upstream.suffixes
    )
    name, size = incoming.endpoint.name, len(incoming.body)
    return bound_request(name, parsed.fields, size, models, policy, seconds=parsed.seconds)
