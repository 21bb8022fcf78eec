"""The current prices: the listed ones, times a factor for all models, and one for models whose price rose.

Tests set the first factor, and the scenario `price-rise` the second.
"""

from __future__ import annotations

import time
from decimal import Decimal

from .pricing import ONE

MAX_RISE = Decimal(10)
RISE_SECONDS = 300.0
"""How long a risen price lasts. Others use this market, too, so it must not last for ever."""


class Market:
    """The prices of one instance, for its catalog and its bill alike."""

    def __init__(self) -> None:
        self.factor = ONE
        """Multiplies every price from now on."""
        self._rises: dict[str, tuple[Decimal, float]] = {}

    def rise(self, model_id: str, factor: Decimal) -> None:
        """Makes the model dearer for a while."""
        # A client repeats the refused request: the price must not rise again each time.
        if model_id not in self._rises or self._rises[model_id][1] <= time.monotonic():
            self._rises[model_id] = (min(factor, MAX_RISE), time.monotonic() + RISE_SECONDS)

    def calm(self) -> None:
        """Takes back all rises."""
        self._rises.clear()

    def factor_of(self, model_id: str) -> Decimal:
        """The factor by which the model's listed prices are multiplied now."""
        factor, until = self._rises.get(model_id, (ONE, 0.0))
        return self.factor * factor if until > time.monotonic() else self.factor
