"""Bodies about accounts, plans and corrections. Amounts are exact; texts are bounded, and have no NUL."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal, Self
from uuid import UUID

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    EmailStr,
    Field,
    StringConstraints,
    model_validator,
)

from models import AuthMethod, Credits, FieldError, Id, KeyName, RequestModel, Target, Username
from routes.schemas.keys import ImportedScopes, ModelPattern, Moment


def _small(value: dict[str, Any]) -> dict[str, Any]:
    """As PostgreSQL can store it: bounded, without NUL and half surrogates, and with plain numbers."""
    try:
        text = orjson.dumps(value, default=float)
    except TypeError as error:
        raise ValueError(f"cannot be kept: {error}") from None
    if len(text) > 8192 or b"\\u0000" in text:
        raise ValueError("takes at most 8 kB, and no NUL")
    stored: dict[str, Any] = orjson.loads(text)
    if _has_huge_number(stored):
        raise ValueError("takes no numbers beyond 64 bits")
    return stored


def _has_huge_number(value: object) -> bool:
    """PostgreSQL writes 1e300 out as an integer, which no strict encoder takes: every later response with it
    would fail.
    """
    if isinstance(value, dict | list):
        return any(map(_has_huge_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and abs(value) >= 2**63


SmallObject = Annotated[dict[str, Any], AfterValidator(_small)]


class ProfileChange(RequestModel):
    """At least one of them."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "Ada", "preferences": {"theme": "dark"}}]}
    )

    name: Username | None = None
    email: Annotated[EmailStr, Field(max_length=254)] | None = None
    preferences: SmallObject | None = None
    settings: SmallObject | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set or all(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("names nothing to change")
        return self


class AccountDeletion(RequestModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"confirmation": "DELETE_ACCOUNT"}]})

    confirmation: Literal["DELETE_ACCOUNT"]


class Profile(BaseModel):
    user_id: int
    api_key: str
    credits: Credits
    username: str
    email: str
    auth_method: AuthMethod
    subscription_status: str
    trial_expires_at: str | None
    is_active: bool
    role: str
    preferences: dict[str, Any]
    settings: dict[str, Any]
    registration_date: str
    created_at: str
    updated_at: str


# Plans.

PlanLimit = Annotated[int, Field(strict=True, ge=0, le=2**53)]
PlanText = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
Factor = Annotated[Decimal, Field(ge=0, le=1000)]


class PlanChange(RequestModel):
    """Fields of a plan; null is unlimited, 0 refuses all."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"daily_request_limit": 20000, "allowed_models": ["openai/*"]}]}
    )

    name: PlanText | None = None
    description: Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^\x00]*$")] | None = None
    price_per_month: Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=9)] | None = None
    daily_request_limit: PlanLimit | None = None
    monthly_request_limit: PlanLimit | None = None
    daily_token_limit: PlanLimit | None = None
    monthly_token_limit: PlanLimit | None = None
    concurrency: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = None
    features: Annotated[list[PlanText], Field(max_length=100)] | None = None
    allowed_models: Annotated[list[ModelPattern], Field(max_length=200)] | None = None
    environment_factors: dict[Literal["staging", "development"], Factor] | None = None
    is_active: bool | None = None


class PlanOrderNew(PlanChange):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"slug": "team", "name": "Team", "daily_request_limit": 10000}]}
    )

    slug: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    name: PlanText


class Plan(BaseModel):
    id: int
    slug: str
    name: str
    description: str
    price_per_month: Credits
    daily_request_limit: int | None
    monthly_request_limit: int | None
    daily_token_limit: int | None
    monthly_token_limit: int | None
    concurrency: int | None
    features: list[str]
    allowed_models: list[str] | None
    environment_factors: dict[str, Credits]
    is_active: bool


class UserChange(RequestModel):
    """Suspend or restore an account, or change its role."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"is_active": False}]})

    is_active: bool | None = None
    role: Literal["user", "admin"] | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.is_active is None and self.role is None:
            raise ValueError("names nothing to change")
        return self


class Refund(RequestModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": "0199f0a0-0000-7000-8000-000000000000",
                    "credits": 0.01,
                    "reason": "a broken answer",
                }
            ]
        }
    )

    request_id: UUID
    credits: Annotated[Decimal, Field(gt=0, le=1_000_000_000, decimal_places=9)] | None = Field(
        default=None, description="null: all of it"
    )
    reason: Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00]*$")] = ""
    idempotency_key: (
        Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00]*$")] | None
    ) = None


class Adjustment(Target):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": 1, "credits": -2.5, "reason": "granted twice"}]}
    )

    credits: Annotated[Decimal, Field(ge=-1_000_000_000, le=1_000_000_000, decimal_places=9)]
    reason: Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\x00]*$")]
    idempotency_key: (
        Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00]*$")] | None
    ) = None

    @model_validator(mode="after")
    def _not_nothing(self) -> Self:
        if self.credits == 0:
            raise FieldError("credits", "must not be 0")
        return self


class LegacyKey(RequestModel):
    user_id: Id
    api_key: Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{16,256}$")]
    key_name: KeyName = "Imported key"
    environment_tag: Literal["live", "staging", "development"] = "live"
    scope_permissions: ImportedScopes | None = None
    expiration_date: Moment | None = None
    max_requests: Annotated[int, Field(strict=True, gt=0, le=2**53)] | None = None
    is_active: bool = True


class LegacyImport(RequestModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"keys": [{"user_id": 1, "api_key": "a-key-of-the-old-system", "key_name": "Imported key"}]}
            ]
        }
    )

    keys: Annotated[list[LegacyKey], Field(min_length=1, max_length=1000)]
