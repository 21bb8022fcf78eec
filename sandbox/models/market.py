"""Today's prices, as tests set them. The listed ones, times what tests set for all models and what
`price-rise` did to single ones.
"""

from __future__ import annotations

import time
from decimal import Decimal

from .pricing import ONE

MOST_RISE = Decimal(10)
RISE_SECONDS = 300.0
"""How long a risen price stays: others share this market."""


class Market:
    """The prices of one instance; they hold for the catalog and for the bill alike."""

    def __init__(self) -> None:
        self.factor = ONE
        """Multiplies every price, from now on."""
        self._rises: dict[str, tuple[Decimal, float]] = {}

    def rise(self, model_id: str, factor: Decimal) -> None:
        """The model gets dearer, for a while; it does so once, however often that is asked for meanwhile."""
        if model_id not in self._rises or self._rises[model_id][1] <= time.monotonic():
            self._rises[model_id] = (min(factor, MOST_RISE), time.monotonic() + RISE_SECONDS)

    def calm(self) -> None:
        """Take back what has risen."""
        self._rises.clear()

    def factor_of(self, model_id: str) -> Decimal:
        """What the model's listed prices are multiplied with now."""
        factor, until = self._rises.get(model_id, (ONE, 0.0))
        return self.factor * factor if until > time.monotonic() else self.factor
