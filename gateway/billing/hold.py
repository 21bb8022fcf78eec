"""Hold: what an admitted request may cost, and what it was granted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gateway.billing.stored_answers import StoredAnswer

Answer = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Hold:
    """An admitted request: its record is pending, and this much is held for it.

    `byok`: it goes out under the user's own upstream key, `provider_key` (encrypted), and holds and costs
    nothing. `cache`: where its answer is to be cached, as a settlement item takes it.
    """

    request_id: str
    user_id: int
    key_id: int
    environment: str
    granted_output: int
    hold_nanos: int
    balance_nanos: int
    limits: Mapping[str, Any]
    byok: bool = False
    provider_key: str | None = None
    cache: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StoredReply:
    """An answer that was given before. Nothing is held, nothing may be sent, and there is nothing to settle.

    `request_id` is whose charge is told: of a replay the first request's, of a cached answer this one's own,
    which cost nothing.
    """

    source: Literal["idempotency", "cache"]
    request_id: str
    original_request_id: str
    user_id: int
    key_id: int
    environment: str
    answer: StoredAnswer
    tokens: int
    age_seconds: int
    cost_nanos: int
    balance_nanos: int
    limits: Mapping[str, Any]

    @property
    def charge(self) -> Mapping[str, int]:
        """What a settlement's answer says of it: cost_nanos and balance_nanos."""
        return {"cost_nanos": self.cost_nanos, "balance_nanos": self.balance_nanos}
