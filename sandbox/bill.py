"""What the simulated operator was charged. It must agree with `/generation` to the last digit."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from sandbox.models.pricing import ZERO

from .wire import plain

MAX_CHARGES = 10_000
CREDITS_BOUGHT = Decimal(1_000_000)
_WINDOWS = ("_daily", "_weekly", "_monthly")
_KEY_FIELDS: Mapping[str, object] = {
    "label": "sk-or-v1-san...box",
    "limit": None,
    "limit_remaining": None,
    "limit_reset": None,
    "include_byok_in_limit": False,
    "is_free_tier": False,
    "is_management_key": False,
    "is_provisioning_key": False,
    "expires_at": None,
    "creator_user_id": None,
    "rate_limit": {
        "requests": -1,
        "interval": "10s",
        "note": "This field is deprecated and safe to ignore.",
    },
}


@dataclass(frozen=True, slots=True)
class Charge:
    """One generation, with the cost that `/generation` reports."""

    id: str
    cost: Decimal
    endpoint: str
    status: str
    """completed | failed | cancelled"""

    def render(self) -> dict[str, object]:
        return {"id": self.id, "cost": plain(self.cost), "endpoint": self.endpoint, "status": self.status}


class Bill:
    """The sum of all charges, in total and by UTC day, and the latest charges one by one."""

    def __init__(self, total: Decimal = ZERO) -> None:
        self.total = total
        self.charges: deque[Charge] = deque(maxlen=MAX_CHARGES)
        self.count = 0
        self._days: dict[datetime, tuple[Decimal, Decimal]] = {}
        self._own_keys = ZERO

    def add(self, charge: Charge, own_key: Decimal, now: datetime) -> None:
        """Adds a charge. `own_key` is what the provider charged to the operator's own key (BYOK)."""
        self.total += charge.cost
        self._own_keys += own_key
        # The list is bounded and the total is not, so both are kept.
        self.charges.append(charge)
        self.count += 1
        day = _midnight(now)
        billed, own = self._days.get(day, (ZERO, ZERO))
        self._days[day] = (billed + charge.cost, own + own_key)

    def render(self, in_flight: int) -> dict[str, object]:
        """The body of `/sandbox/bill`. Amounts are decimal strings."""
        return {
            "total": plain(self.total),
            "count": self.count,
            "in_flight": in_flight,
            "generations": [charge.render() for charge in self.charges],
        }

    def render_key(self, now: datetime) -> dict[str, object]:
        """`data` of `/key`: a key without a limit that has used what was billed.

        https://openrouter.ai/docs/api-reference/limits. Days are UTC, and weeks begin on Monday.
        """
        today = _midnight(now)
        starts = (today, today - timedelta(days=today.weekday()), today.replace(day=1))
        used = dict(zip(_WINDOWS, (self._since(start) for start in starts), strict=True))
        return {
            **_KEY_FIELDS,
            "usage": self.total,
            **{f"usage{window}": billed for window, (billed, _) in used.items()},
            "byok_usage": self._own_keys,
            **{f"byok_usage{window}": own for window, (_, own) in used.items()},
        }

    def render_credits(self) -> dict[str, object]:
        """`data` of `/credits`."""
        return {"total_credits": CREDITS_BOUGHT, "total_usage": self.total}

    def _since(self, start: datetime) -> tuple[Decimal, Decimal]:
        """What was billed from this day on, and what was charged to the operator's own key."""
        days = [amounts for day, amounts in self._days.items() if day >= start]
        return sum((billed for billed, _ in days), ZERO), sum((own for _, own in days), ZERO)


def _midnight(now: datetime) -> datetime:
    return now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
