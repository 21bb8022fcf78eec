"""Accounts, plans, limits, budgets of end users, and webhooks with their deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, TypedDict

from common.json_types import Json
from db_rows.keys import NewKey
from db_rows.shared import Done, Mode, OutcomeT, Refused, Role, Window

ModeChange = Done[Literal["entered"]] | Refused[Literal["refused"]]
SubscriptionStatus = Literal["trial", "active", "expired", "cancelled"]


# Accounts.


class User(TypedDict):
    id: int
    username: str
    email: str
    auth_method: str
    role: Role
    credits_nanos: int
    held_nanos: int
    is_active: bool
    subscription_status: SubscriptionStatus
    trial_expires_at: str | None
    preferences: dict[str, Json]
    settings: dict[str, Json]
    registration_date: str
    created_at: str
    updated_at: str


class NewAccount(TypedDict):
    """`address_subject`: whose registrations are counted, None for an administrator's. `actor`: None where
    the user registers. `email_hashes`: under each HMAC secret, the current first.
    """

    username: str
    email: str
    email_hashes: Sequence[str]
    auth_method: str
    signup_nanos: str
    mode: Mode
    trial_days: int
    address: str
    address_subject: str | None
    user_agent: str | None
    request_id: str
    actor: str | None
    key: NewKey


class Registered(TypedDict):
    outcome: Literal["registered"]
    user_id: int
    key_id: int
    credits_nanos: int
    subscription_status: SubscriptionStatus
    trial_expires_at: str | None


Registration = Registered | Refused[Literal["username_taken", "email_taken", "address_limit", "wrong_mode"]]
ProfileUpdate = (
    Done[Literal["updated"]] | Refused[Literal["username_taken", "email_taken", "too_large", "not_found"]]
)
Deletion = Done[Literal["deleted"]] | Refused[Literal["not_found"]]
UserUpdate = Done[Literal["set"]] | Refused[Literal["not_found"]]


# Rate limits and plans. None is unlimited, 0 refuses all.


class RateLimits(TypedDict):
    requests_per_minute: int | None
    requests_per_hour: int | None
    requests_per_day: int | None
    tokens_per_minute: int | None
    tokens_per_hour: int | None
    tokens_per_day: int | None
    concurrency: int | None
    burst: int | None


class LimitsSet(TypedDict):
    outcome: Literal["set"]
    user_id: int
    limits: RateLimits


class Plan(TypedDict):
    id: int
    slug: str
    name: str
    description: str
    price_per_month_nanos: int
    daily_request_limit: int | None
    monthly_request_limit: int | None
    daily_token_limit: int | None
    monthly_token_limit: int | None
    concurrency: int | None
    features: list[str]
    allowed_models: list[str] | None
    environment_factors: dict[str, float]
    is_active: bool


class UserPlan(TypedDict):
    plan_id: int
    start_date: str
    end_date: str
    is_active: bool


class LimitsInUse(TypedDict):
    """What a user may use and has used. `plan` applies, whether it was `assigned` or is the built-in one."""

    limits: RateLimits
    key_limits: RateLimits | None
    used: dict[str, int]
    plan: Plan
    assigned: UserPlan | None
    plan_used: dict[str, int]


class PlanAssigned(TypedDict):
    outcome: Literal["assigned"]
    user_id: int
    plan_name: str
    end_date: str


class PlanCancelled(TypedDict):
    outcome: Literal["cancelled"]
    plan_id: int


class PlanStored(TypedDict, Generic[OutcomeT]):
    outcome: OutcomeT
    plan: Plan


LimitChange = LimitsSet | Refused[Literal["not_found"]]
PlanAssignment = PlanAssigned | Refused[Literal["plan_not_found", "not_found"]]
PlanCancellation = PlanCancelled | Refused[Literal["no_plan"]]
PlanCreation = PlanStored[Literal["created"]] | Refused[Literal["slug_taken"]]
PlanUpdate = PlanStored[Literal["updated"]] | Refused[Literal["built_in", "not_found"]]


# Budgets of end users.


class EndUserBudget(TypedDict):
    """A budget and what is used of it in the present window; `budget_end_user` is `*` where the default
    applies.
    """

    end_user: str
    budget_id: int
    budget_end_user: str
    budget_nanos: int
    budget_window: Window
    window_start: str | None
    spent_nanos: int
    held_nanos: int
    created_at: str
    updated_at: str


class BudgetStored(EndUserBudget, Generic[OutcomeT]):
    outcome: OutcomeT


BudgetCreation = BudgetStored[Literal["created"]] | Refused[Literal["name_taken", "too_many", "not_found"]]
BudgetUpdate = BudgetStored[Literal["updated"]] | Refused[Literal["not_found"]]


class BudgetEvent(TypedDict):
    """A key or an end user has spent `level` percent of its budget. `window_start` may be `-infinity`."""

    id: int
    key_id: int | None
    end_user: str | None
    level: int
    budget_nanos: int
    spent_nanos: int
    budget_window: Window
    window_start: str
    request_id: str
    created_at: str


# Webhooks.


class Webhook(TypedDict):
    id: int
    url: str
    is_active: bool
    disabled_reason: str | None
    previous_valid_until: str | None
    created_at: str
    updated_at: str


class WebhookStored(Webhook, Generic[OutcomeT]):
    outcome: OutcomeT


class WebhookTestQueued(TypedDict):
    outcome: Literal["queued"]
    delivery_id: int


class WebhookTestTooSoon(TypedDict):
    outcome: Literal["too_soon"]
    retry_after: int


WebhookCreation = WebhookStored[Literal["created"]] | Refused[Literal["too_many", "not_found"]]
WebhookUpdate = WebhookStored[Literal["updated"]] | Refused[Literal["not_found"]]
WebhookTest = WebhookTestQueued | WebhookTestTooSoon | Refused[Literal["inactive", "not_found"]]


class Delivery(TypedDict):
    """`event_id` is None for a test."""

    id: int
    event_id: int | None
    webhook_id: int
    attempts: int
    next_attempt_at: str
    delivered_at: str | None
    failed_at: str | None
    last_status: int | None
    last_error: str | None
    created_at: str


class ClaimedDelivery(TypedDict):
    """A delivery that its claimer may send until the lease ends; secrets are encrypted."""

    id: int
    attempts: int
    created_at: str
    webhook_id: int
    url: str
    encrypted_secret: str
    previous_encrypted_secret: str | None
    event: BudgetEvent | None


class DeliveryAttempt(TypedDict):
    """What became of it. `gone`: the receiver wants no more, and the webhook is switched off;
    `retry_seconds`: None after the last attempt.
    """

    id: int
    attempt: int
    status: int | None
    error: str | None
    delivered: bool
    gone: bool
    retry_seconds: int | None


DeliveryFinish = Done[Literal["finished"]] | Refused[Literal["stale"]]
