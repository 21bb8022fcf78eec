"""Bodies about API keys, their scopes and restrictions, and the audit log. Only `api_key` may hold a key."""

from __future__ import annotations

import datetime
import ipaddress
import re
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from models import Credits, Environment, FieldError, Id, KeyName, RequestModel

# Far enough from the calendar's ends that adding days stays within it.
EARLIEST, LATEST = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (1970, 9999))
ISO = "must be a time in ISO 8601, such as 2026-01-31T12:00:00Z"
# What a key may read or write: the endpoints that cost money, and the parts of an account.
Resource = Literal[
    "*", "account", "audio", "audit", "balance", "budgets", "chat", "completions", "embeddings", "images",
    "keys", "messages", "plan", "profile", "rerank", "responses", "transactions", "usage", "webhooks",
]  # fmt: skip
Verb = Literal["read", "write", "admin"]
Scopes = dict[Verb, Annotated[list[Resource], Field(max_length=64)]]
# Imported keys may have another system's names. Those permit nothing here.
ScopeName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^(\*|[a-z][a-z0-9_-]*)$")]
ImportedScopes = dict[Verb, Annotated[list[ScopeName], Field(max_length=64)]]
ModelPattern = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x20*]*\*?$")]
Domain = Annotated[
    str,
    StringConstraints(
        min_length=1,
        max_length=253,
        to_lower=True,
        pattern=r"^(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9-]{1,63}$",
    ),
]


def _network(text: str) -> str:
    """An address or network in its usual notation. Host bits that are set are a mistake worth a sentence."""
    try:
        # A zone (fe80::1%eth0) means something on one host only.
        network = ipaddress.ip_network(text if "%" not in text else "")
    except ValueError as error:
        hint = " (bits beyond the prefix are set)" if "host bits" in str(error) else ""
        raise ValueError(f"must be an address or a network such as 203.0.113.0/24{hint}") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped and network.prefixlen >= 96:
        return str(ipaddress.ip_network((mapped, network.prefixlen - 96)))
    return str(network)


NetworkText = Annotated[str, StringConstraints(max_length=64), AfterValidator(_network)]


def _iso(value: object) -> object:
    """Texts only, and no bare numbers: pydantic would read them as seconds since 1970."""
    if not isinstance(value, str) or not re.match(r"\d{4}-", value):
        raise ValueError(ISO)
    return value


def _utc(moment: datetime.datetime) -> datetime.datetime:
    """The moment in UTC, since PostgreSQL takes no offset of 16 hours or more. A moment before or after all
    records becomes the earliest or the latest.
    """
    try:
        return min(max(moment.astimezone(datetime.UTC), EARLIEST), LATEST)
    except OverflowError:
        return EARLIEST if moment.year < EARLIEST.year else LATEST


Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_iso),
    AfterValidator(_utc),
    Field(description="ISO 8601, with a time zone"),
]


class KeyRules(RequestModel):
    """What a key may do, and for how long."""

    scope_permissions: Scopes | None = None
    ip_allowlist: Annotated[list[NetworkText], Field(max_length=100)] | None = None
    domain_referrers: Annotated[list[Domain], Field(max_length=100)] | None = None
    allowed_models: Annotated[list[ModelPattern], Field(max_length=200)] | None = Field(
        default=None, description="Exact ids, or prefixes that end with *; null allows all"
    )
    expiration_days: Annotated[int, Field(strict=True, gt=0, le=36500)] | None = None
    max_requests: Annotated[int, Field(strict=True, gt=0, le=2**53)] | None = None
    budget: Annotated[Decimal, Field(ge=0, le=1_000_000_000, decimal_places=9)] | None = Field(
        default=None, description="Credits a window"
    )
    budget_window: Literal["day", "week", "month", "lifetime"] | None = None
    cache_ttl_seconds: Annotated[int, Field(strict=True, ge=1, le=86_400)] | None = Field(
        default=None,
        description="Seconds for which its requests use the response cache, unless they say otherwise; null: "
        "only those that ask use it",
    )

    @model_validator(mode="after")
    def _budget_has_window(self) -> Self:
        if (self.budget is None) != (self.budget_window is None):
            missing = "budget" if self.budget is None else "budget_window"
            raise FieldError(missing, "is missing: budget and budget_window belong together")
        return self


class KeyOrder(KeyRules):
    """A key to make. Its scopes and restrictions may be no broader than those of the key that makes it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"key_name": "ci", "environment_tag": "test", "expiration_days": 30, "max_requests": 1000}
            ]
        }
    )

    action: Literal["create"] = "create"
    key_name: KeyName
    environment_tag: Environment = Environment.LIVE
    revealable: bool = Field(default=False, description="Keep it encrypted, so that it can be shown again")


class KeyIssue(KeyOrder):
    """A key for a user, whose scopes and restrictions are the administrator's to choose."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": 1, "key_name": "operations", "scope_permissions": {"read": ["*"], "admin": ["*"]}}
            ]
        }
    )

    user_id: Id


class KeyChange(KeyRules):
    """A change of a key. Fields that are left out stay as they are; null takes a restriction away."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"action": "update", "ip_allowlist": ["203.0.113.0/24"]}]}
    )

    action: Literal["update", "rotate", "bulk_rotate"] = "update"
    key_name: KeyName | None = None
    is_active: bool | None = None
    environment_tag: Environment | None = Field(
        default=None, description="With bulk_rotate: only keys of this environment"
    )
    grace_period: Annotated[int, Field(strict=True, ge=0, le=30 * 86400)] = Field(
        default=0, description="Seconds that the old secret still works"
    )

    @model_validator(mode="after")
    def _something_to_change(self) -> Self:
        if self.action == "update":
            if not self.model_fields_set - {"action"}:
                raise ValueError("names nothing to change")
            if self.environment_tag is not None:
                raise FieldError("environment_tag", "of a key never changes; make a new key")
        return self


class Rotation(RequestModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"grace_period": 3600}]})

    grace_period: Annotated[int, Field(strict=True, ge=0, le=30 * 86400)] = Field(
        default=0, description="Seconds that the old secret still works"
    )


class KeyRevocation(RequestModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"confirmation": "DELETE_KEY"}]})

    confirmation: Literal["DELETE_KEY"]


class KeyView(BaseModel):
    """A key as it is shown: masked."""

    id: int
    api_key: str = Field(description="Masked")
    key_name: str
    environment_tag: Environment
    scope_permissions: dict[str, list[str]]
    is_active: bool
    is_primary: bool
    is_revealable: bool
    expiration_date: str | None
    days_remaining: int | None
    max_requests: int | None
    requests_used: int
    requests_remaining: int | None
    usage_percentage: float | None
    ip_allowlist: list[str]
    domain_referrers: list[str]
    allowed_models: list[str] | None
    budget: Credits | None
    budget_window: str | None
    budget_spent: Credits
    cache_ttl_seconds: int | None
    created_at: str
    updated_at: str
    last_used_at: str | None


class Keys(BaseModel):
    status: str
    total_keys: int
    keys: list[KeyView]


class KeyMade(BaseModel):
    """A new key; `api_key` is shown this once, unless it is revealable."""

    status: str
    message: str
    api_key: str
    key_name: str
    environment_tag: Environment
    security_features: dict[str, Any]
    key: KeyView


class KeyChanged(BaseModel):
    status: str
    message: str
    updated_key: KeyView | None = None
    api_key: str | None = Field(default=None, description="The new secret, after a rotation")
    rotated_count: int | None = None
    new_keys: list[dict[str, Any]] | None = None
    timestamp: datetime.datetime


class KeyRevoked(BaseModel):
    status: str
    message: str
    deleted_key_id: int
    timestamp: datetime.datetime


class AuditLog(BaseModel):
    id: int
    actor: str
    action: str
    target: str | None
    user_id: int | None
    key_id: int | None
    ip: str | None
    user_agent: str | None
    request_id: str | None
    details: dict[str, Any]
    occurrences: int
    created_at: str


class AuditLogs(BaseModel):
    status: str
    total_logs: int = Field(description="Rows on this page")
    logs: list[AuditLog]
    next_cursor: str | None
