"""API keys, users' own upstream keys, and the audit log. No key is ever in them in clear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, NotRequired, TypedDict

from common.json_types import Json
from db_rows.shared import Done, Environment, OutcomeT, Refused, Scopes, Window

# API keys, as they are written.


class KeyRules(TypedDict, total=False):
    """What a key may do, and for how long; None takes a restriction away."""

    scope_permissions: Scopes
    ip_allowlist: Sequence[str]
    domain_referrers: Sequence[str]
    allowed_models: Sequence[str] | None
    expiration_date: str | None
    max_requests: int | None
    budget_nanos: int | None
    budget_window: Window | None
    cache_ttl_seconds: int | None


class KeyChanges(KeyRules, total=False):
    key_name: str
    is_active: bool


class NewKey(KeyRules):
    """`encrypted_key`: of a key that can be shown again."""

    key_name: str
    key_prefix: str
    last4: str
    key_hash: str
    hash_secret_id: str
    environment_tag: str
    encrypted_key: NotRequired[str | None]


class NewSecret(TypedDict):
    key_id: int
    key_hash: str
    hash_secret_id: str
    last4: str
    encrypted_key: str | None


class ImportedKey(TypedDict):
    """A key of an older system, by the SHA-256 that this system stored."""

    user_id: int
    key_sha256: str
    key_name: str
    key_prefix: str
    last4: str
    environment_tag: Environment
    scope_permissions: Scopes
    expiration_date: str | None
    max_requests: int | None
    is_active: bool


# API keys, as they are read.


class Key(TypedDict):
    """A key and what it has used; `budget_spent_nanos` in the present window of its budget."""

    id: int
    user_id: int
    key_name: str
    key_prefix: str
    last4: str
    environment_tag: Environment
    scope_permissions: Scopes
    ip_allowlist: list[str]
    domain_referrers: list[str]
    allowed_models: list[str] | None
    expiration_date: str | None
    max_requests: int | None
    budget_nanos: int | None
    budget_window: Window | None
    cache_ttl_seconds: int | None
    is_primary: bool
    is_active: bool
    is_revealable: bool
    requests_used: int
    budget_spent_nanos: int
    last_used_at: str | None
    revoked_at: str | None
    created_at: str
    updated_at: str


class KeyUsage(Key):
    """A key with its charges in all and in the UTC day, week and month, and what requests under the user's
    own upstream key (byok) cost there.
    """

    usage_nanos: int
    usage_daily_nanos: int
    usage_weekly_nanos: int
    usage_monthly_nanos: int
    byok_usage_nanos: int
    byok_usage_daily_nanos: int
    byok_usage_weekly_nanos: int
    byok_usage_monthly_nanos: int
    budget_held_nanos: int
    requests_per_minute: int | None
    is_free_tier: bool


class KeyStored(TypedDict, Generic[OutcomeT]):
    outcome: OutcomeT
    key: Key


class TooManyKeys(TypedDict):
    """`limit`: 50 active keys or 500 in all; without it the former."""

    outcome: Literal["too_many"]
    limit: NotRequired[int]


class Broader(TypedDict):
    """The key that acts may not do in `field` what the other one may."""

    outcome: Literal["broader"]
    field: str


class KeysRotated(TypedDict):
    outcome: Literal["rotated"]
    keys: list[Key]


class KeyRevoked(TypedDict):
    outcome: Literal["revoked"]
    user_id: int


class KeyRevealed(KeyStored[Literal["revealed"]]):
    encrypted_key: str


class KeysImported(TypedDict):
    outcome: Literal["imported"]
    imported: int
    known: int


class ImportRefused(TypedDict):
    """The account of this id does not exist: nothing is imported."""

    outcome: Literal["not_found"]
    user_id: int


class TooManyGuesses(TypedDict):
    outcome: Literal["limited"]
    retry_after: int


KeyIssue = KeyStored[Literal["created"]] | TooManyKeys | Refused[Literal["name_taken", "not_found"]]
KeyCreation = KeyIssue | Broader
KeyUpdate = (
    KeyStored[Literal["updated"]] | TooManyKeys | Broader | Refused[Literal["name_taken", "not_found"]]
)
KeyRotation = KeysRotated | Broader | Refused[Literal["not_found"]]
KeyRevocation = KeyRevoked | Broader | Refused[Literal["not_found"]]
KeyRevelation = KeyRevealed | Broader | Refused[Literal["not_revealable", "not_found"]]
KeyRefusal = (
    TooManyKeys
    | Broader
    | Refused[Literal["name_taken", "not_found"]]
    | Refused[Literal["not_revealable", "not_found"]]
    | Refused[Literal["not_found"]]
)
KeyImport = KeysImported | ImportRefused
GuessCount = Done[Literal["counted"]] | TooManyGuesses


class WrongSecret(TypedDict):
    """A secret that was presented and is wrong; `limit` of them a minute, for each `address_subject`."""

    action: str
    address: str
    address_subject: str
    user_agent: str | None
    request_id: str
    limit: int


# Users' own upstream keys.


class ProviderKey(TypedDict):
    label: str
    is_active: bool
    created_at: str
    updated_at: str


class ProviderKeySet(ProviderKey):
    outcome: Literal["set"]


ProviderKeyChange = ProviderKeySet | Refused[Literal["not_found"]]
ProviderKeyDeletion = Done[Literal["deleted"]] | Refused[Literal["not_found"]]


# The audit log.


class AuditEntry(TypedDict):
    id: int
    actor: str
    action: str
    target: str | None
    user_id: int | None
    key_id: int | None
    ip: str | None
    user_agent: str | None
    request_id: str | None
    details: dict[str, Json]
    occurrences: int
    created_at: str
