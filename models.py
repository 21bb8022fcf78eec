"""What request and response bodies of the management API share: amounts, enums, the error body.

Amounts are credits (US dollars) as exact decimals, written as plain JSON numbers. Texts are bounded. Proxied
bodies pass through, and have no models.
"""

from __future__ import annotations

import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    EmailStr,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

Credits = Annotated[
    Decimal,
    WithJsonSchema(
        {"type": "number", "description": "Credits; 1 credit = 1 US dollar, exact to nine decimals"}
    ),
]
# Strict, because `true` would be 1.
Limit = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Id = Annotated[int, Field(strict=True, ge=1, le=2**63 - 1)]


class AuthMethod(StrEnum):
    EMAIL = "email"
    WALLET = "wallet"
    GOOGLE = "google"
    GITHUB = "github"


class Environment(StrEnum):
    LIVE = "live"
    TEST = "test"
    STAGING = "staging"
    DEVELOPMENT = "development"


class FieldError(ValueError):
    """What is wrong with one field in view of the others. The message continues a sentence that begins with
    the field's name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class RequestModel(BaseModel):
    """A request body. Unknown fields are refused, so that a misspelt one does not silently have no effect."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every error, everywhere."""

    error: ErrorDetail
    gateway: dict[str, Any] = Field(examples=[{"request_id": "019a9f5e-0000-7000-8000-000000000000"}])


ERROR_SCHEMA = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says about these statuses. By reference: of a model the framework would build five hundred
    validators, one for each status of each route.
    """
    return {status: {"content": {"application/json": ERROR_SCHEMA}} for status in statuses}


def _not_reserved(name: str) -> str:
    if name.lower().startswith("deleted-"):
        raise ValueError("must not begin with deleted-, which is reserved for deleted accounts")
    return name


Username = Annotated[
    str,
    StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$"),
    AfterValidator(_not_reserved),
]
KeyName = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Registration(BaseModel):
    """Who registers. Credits and trial come from the gateway's settings, never from here."""

    model_config = ConfigDict(
        extra="ignore",
        str_strip_whitespace=True,
        json_schema_extra={"examples": [{"username": "ada", "email": "ada@example.com"}]},
    )

    username: Username
    email: Annotated[EmailStr, Field(max_length=254)]
    auth_method: AuthMethod = AuthMethod.EMAIL
    environment_tag: Environment = Environment.LIVE
    key_name: KeyName = "Primary Key"


class Registered(BaseModel):
    """A new account; `api_key` is shown this once."""

    user_id: int
    username: str
    email: str
    api_key: str
    credits: Credits
    environment_tag: Environment
    scope_permissions: dict[str, list[str]]
    auth_method: AuthMethod
    subscription_status: str
    message: str
    timestamp: datetime.datetime


class Balance(BaseModel):
    api_key: str = Field(description="Masked")
    credits: Credits
    held: Credits = Field(description="The part of `credits` that running requests hold")
    available: Credits
    status: str
    user_id: int


class UsageRecord(BaseModel):
    """One admitted request. `cost` is what was charged."""

    request_id: str
    client_request_id: str | None
    key_id: int
    mode: str
    environment: str
    endpoint: str
    model: str
    model_used: str | None
    provider: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    held: Credits
    upstream_cost: Credits | None
    cost: Credits
    overrun: Credits
    status: str
    settlement_source: str | None
    finish_reason: str | None
    error_code: str | None
    streamed: bool
    latency_ms: int | None
    time_to_first_token_ms: int | None
    generation_id: str | None
    created_at: str
    settled_at: str | None
    end_user: str | None
    byok: bool = Field(description="It went out under the account's own OpenRouter key")
    cache_hit: bool = Field(description="It was answered from the response cache")


class AdminUsageRecord(UsageRecord):
    """The same, and whose it was."""

    user_id: int


class AdminUsageRecords(BaseModel):
    status: str
    records: list[AdminUsageRecord]
    next_cursor: str | None


class UsageRecords(BaseModel):
    status: str
    records: list[UsageRecord]
    next_cursor: str | None = Field(description="Pass it as `cursor` for the next page; null on the last one")


class Transaction(BaseModel):
    """A change of credits that is not the charge of a request."""

    id: int
    kind: str
    amount: Credits
    balance_after: Credits
    payment_method: str | None
    request_id: str | None
    reason: str
    created_at: str


class AdminTransaction(Transaction):
    """The same, whose it was, and who made it."""

    user_id: int
    actor: str


class AdminTransactions(BaseModel):
    status: str
    transactions: list[AdminTransaction]
    next_cursor: str | None


class Transactions(BaseModel):
    status: str
    transactions: list[Transaction]
    next_cursor: str | None


class Target(RequestModel):
    """The user that an administrator means, by id or by one of their API keys in full."""

    user_id: Id | None = None
    api_key: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Target:
        if self.user_id is None and self.api_key is None:
            raise FieldError("user_id", "is missing: give user_id or api_key")
        if self.user_id is not None and self.api_key is not None:
            raise FieldError("api_key", "must be left out where user_id is given")
        return self


class CreditGrant(Target):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": 1, "credits": 25, "reason": "invoice 17"}]}
    )

    credits: Annotated[Decimal, Field(gt=0, le=1_000_000_000, decimal_places=9)]
    reason: Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00]*$")] = ""
    idempotency_key: (
        Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00]*$")] | None
    ) = None


class CreditsGranted(BaseModel):
    status: str
    message: str
    new_balance: Credits
    user_id: int
    transaction_id: int


class RateLimits(RequestModel):
    """Limits to set; one that is left out stays as it is, null is unlimited, 0 refuses all."""

    requests_per_minute: Limit | None = None
    requests_per_hour: Limit | None = None
    requests_per_day: Limit | None = None
    tokens_per_minute: Limit | None = None
    tokens_per_hour: Limit | None = None
    tokens_per_day: Limit | None = None
    concurrency: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = None
    burst: Limit | None = Field(default=None, description="Requests within one second")


class LimitOrder(Target):
    """Limits of a user (user_id), or of one key (api_key)."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": 1, "rate_limits": {"requests_per_minute": 600}}]}
    )

    rate_limits: RateLimits

    @model_validator(mode="after")
    def _something_to_set(self) -> LimitOrder:
        if not self.rate_limits.model_fields_set:
            raise FieldError("rate_limits", "names no limit to set")
        return self


class LimitsSet(BaseModel):
    status: str
    message: str
    user_id: int
    rate_limits: RateLimits


class PlanOrder(RequestModel):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": 1, "plan_id": 1, "duration_months": 1}]}
    )

    user_id: Id
    plan_id: Id
    duration_months: Annotated[int, Field(strict=True, ge=1, le=120)] = 1


class PlanAssigned(BaseModel):
    status: str
    message: str
    user_id: int
    plan_id: int
    duration_months: int
    end_date: str


class Health(BaseModel):
    """`status` is healthy, or unhealthy with the `problem` in one sentence."""

    status: Literal["healthy", "unhealthy"]
    database: Literal["connected", "error", "unavailable", "unknown"]
    openrouter: Literal["connected", "error", "unavailable", "unknown"]
    mode: str | None
    user_count: int | None
    problem: str | None
    version: str
    timestamp: datetime.datetime


class Swept(BaseModel):
    status: str
    expired: int
    resolved: int
