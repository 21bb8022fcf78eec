"""Usage records, credit transactions, corrections, quotes, reports, and our costs beside the upstream's."""

from __future__ import annotations

from typing import Generic, Literal, NotRequired, TypedDict

from db_rows.requests import PriceBasis, SettlementSource, SettlementStatus
from db_rows.shared import Environment, Mode, OutcomeT, Refused


class RequestRow(TypedDict):
    """An admitted request. While it is pending, its costs are 0 or None."""

    request_id: str
    user_id: int
    key_id: int
    mode: Mode
    environment: Environment
    byok: bool
    endpoint: str
    model: str
    model_used: str | None
    provider: str | None
    status: Literal["pending"] | SettlementStatus
    settlement_source: SettlementSource | None
    error_code: str | None
    generation_id: str | None
    hold_nanos: int
    upstream_cost_nanos: int | None
    cost_nanos: int
    overrun_nanos: int
    created_at: str
    settled_at: str | None


class OpenItem(RequestRow):
    expires_at: str


class UsageRecord(RequestRow):
    client_request_id: str | None
    end_user: str | None
    cache_hit: bool
    streamed: bool
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    latency_ms: int | None
    time_to_first_token_ms: int | None
    balance_after_nanos: int | None


class RefundEntry(TypedDict):
    transaction_id: int
    amount_nanos: int
    reason: str
    balance_after_nanos: int
    created_at: str


class ReceiptRow(UsageRecord):
    """`markup` as text: as a JSON number it would be read as a float."""

    output_granted: int
    price_basis: PriceBasis | None
    markup: str
    expires_at: str
    refunds: list[RefundEntry]


class Transaction(TypedDict):
    """A change of credits that is not the charge of a request; negative where credits leave the account."""

    id: int
    user_id: int
    kind: Literal["grant", "purchase", "refund", "adjustment", "expiry"]
    amount_nanos: int
    balance_after_nanos: int
    payment_method: Literal["mastercard", "paca_token"] | None
    request_id: str | None
    actor: str
    reason: str
    created_at: str


class Credits(TypedDict):
    """`granted_nanos`: everything given, less what has expired or was taken back, refunds aside."""

    balance_nanos: int
    granted_nanos: int


# Grants, adjustments and refunds. `repeated`: the idempotency key was used before, for the same change.


class CreditChange(TypedDict, Generic[OutcomeT]):
    outcome: OutcomeT
    user_id: int
    transaction_id: int
    balance_nanos: int


class MoreThanAvailable(TypedDict):
    """What running requests hold cannot be taken."""

    outcome: Literal["too_much"]
    available_nanos: int


class Refunded(CreditChange[Literal["refunded", "repeated"]]):
    amount_nanos: int


class MoreThanRefundable(TypedDict):
    outcome: Literal["too_much"]
    refundable_nanos: int


Grant = CreditChange[Literal["granted", "repeated"]] | Refused[Literal["conflict", "too_large", "not_found"]]
Adjustment = (
    CreditChange[Literal["adjusted", "repeated"]]
    | MoreThanAvailable
    | Refused[Literal["conflict", "too_large", "not_found"]]
)
Refund = Refunded | MoreThanRefundable | Refused[Literal["conflict", "not_settled", "not_found"]]


# Quotes.


class QuoteGranted(TypedDict):
    """`available_nanos` is missing where no money counts: under a test key or the user's own upstream key."""

    outcome: Literal["granted"]
    granted_output: int
    hold_nanos: int
    byok: bool
    free: bool
    available_nanos: NotRequired[int]


class QuoteShort(TypedDict):
    """`granted_output`: what the money covers, 0 for nothing."""

    outcome: Literal["credits", "budget", "end_user_budget"]
    granted_output: int
    available_nanos: int


QuoteRefused = Refused[Literal["MODEL_NOT_ALLOWED", "REQUEST_LIMIT_EXCEEDED", "trial_expired", "not_found"]]
QuoteAnswer = QuoteGranted | QuoteShort | QuoteRefused


# Reports.


class ReportRange(TypedDict):
    """`end` is not part of it; `zone` an IANA name; `limit` in rows."""

    start: str
    end: str
    zone: str
    bucket: Literal["hour", "day", "month", "none"]
    limit: int


class ReportRow(TypedDict):
    bucket: str | None
    group: str | None
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost_nanos: int
    upstream_cost_nanos: int
    overrun_nanos: int
    latency_ms_total: int
    latency_p50_ms: int | None
    latency_p95_ms: int | None
    latency_p99_ms: int | None


class UsageMetrics(TypedDict):
    """Of all time, of today and of this month (UTC)."""

    total_requests: int
    total_tokens: int
    total_cost_nanos: int
    requests_today: int
    tokens_today: int
    cost_today_nanos: int
    requests_this_month: int
    tokens_this_month: int
    cost_this_month_nanos: int
    most_used_model: str | None
    last_request_time: str | None


class TopUser(TypedDict):
    user_id: int
    username: str
    requests: int
    tokens: int
    cost_nanos: int


class RecentRequest(TypedDict):
    request_id: str
    user_id: int
    key_id: int
    endpoint: str
    model: str
    status: Literal["pending"] | SettlementStatus
    cost_nanos: int
    created_at: str


class SystemMetrics(TypedDict):
    total_users: int
    active_users_today: int
    metrics: UsageMetrics
    top_users: list[TopUser]
    recent: list[RecentRequest]


# Reconciliation.


class LiveCosts(TypedDict):
    """What live requests cost since `start`, as far as they are settled."""

    start: str
    requests: int
    upstream_cost_nanos: int
    charged_nanos: int
    overrun_nanos: int


class CostsByWindow(TypedDict):
    """The UTC day, week and month."""

    mode: Mode
    daily: LiveCosts
    weekly: LiveCosts
    monthly: LiveCosts
