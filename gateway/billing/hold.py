"""What admission grants: a hold on credits, or an answer that was given before. Nothing here asks the
database.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from db_rows.requests import LimitsLeft, SlotItem
from db_rows.shared import Environment
from gateway.billing.stored_answers import StoredAnswer


class Charge(TypedDict):
    """What a request was charged, and the credits that its account had then."""

    cost_nanos: int
    balance_nanos: int


@dataclass(frozen=True, slots=True)
class Hold:
    """An admitted request: its record is pending, and this much is held for it.

    `byok`: it is sent under the user's own upstream key, `provider_key` (encrypted), and holds and costs
    nothing. `cache`: where its answer is to be cached, as a settlement item takes it.
    """

    request_id: str
    user_id: int
    key_id: int
    environment: Environment
    granted_output: int
    hold_nanos: int
    balance_nanos: int
    limits: LimitsLeft
    # Under the user's own key nothing is held: the provider bills the user.
    byok: bool = False
    provider_key: str | None = None
    cache: SlotItem | None = None


@dataclass(frozen=True, slots=True)
class StoredReply:
    """An answer that was given before. Nothing is held, nothing may be sent, and there is nothing to settle.

    `request_id` is the one whose charge is shown: a replay shows the first request's, a cached answer its
    own, and a cached answer costs nothing.
    """

    source: Literal["idempotency", "cache"]
    request_id: str
    original_request_id: str
    user_id: int
    key_id: int
    environment: Environment
    answer: StoredAnswer
    tokens: int
    age_seconds: int
    cost_nanos: int
    balance_nanos: int
    limits: LimitsLeft

    @property
    def charge(self) -> Charge:
        return {"cost_nanos": self.cost_nanos, "balance_nanos": self.balance_nanos}
