"""API keys and the audit log in the database: one async function per query or SQL function.

Keys arrive here as HMACs, computed elsewhere: this module never sees one in clear.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from db_rows.keys import (
    AuditEntry,
    GuessCount,
    ImportedKey,
    Key,
    KeyChanges,
    KeyCreation,
    KeyImport,
    KeyIssue,
    KeyRevelation,
    KeyRevocation,
    KeyRotation,
    KeyUpdate,
    KeyUsage,
    NewKey,
    NewSecret,
    ProviderKey,
    ProviderKeyChange,
    ProviderKeyDeletion,
    WrongSecret,
)
from db_rows.shared import AdminStamp, CallerStamp, columns_of
from supabase_config import AsyncClient, call, execute

# Keys. One that acts for its user (the stamp's maker_id) makes and changes none that may do more than itself.


async def list_keys(client: AsyncClient, user_id: int) -> list[Key]:
    """A user's keys that are not revoked, oldest first."""
    return cast(list[Key], await call(client, "list_keys", {"p_user_id": user_id}))


async def list_primary_keys(client: AsyncClient, user_ids: Sequence[int]) -> dict[int, str]:
    """Users' primary keys, masked, by user id."""
    if not user_ids:
        return {}
    query = client.table("api_keys_new").select("user_id,key_prefix,last4").in_("user_id", list(user_ids))
    rows = await execute(query.eq("is_primary", True))
    return {row["user_id"]: f"{row['key_prefix']}...{row['last4']}" for row in rows}


async def find_keys(
    client: AsyncClient, *, text: str | None, user_id: int | None, before: int | None, limit: int
) -> list[Key]:
    """Keys by prefix and last 4, or name; newest first."""
    page = {"p_text": text, "p_user_id": user_id, "p_before": before, "p_limit": limit}
    return cast(list[Key], await call(client, "find_keys", page))


async def read_key(client: AsyncClient, user_id: int, key_id: int) -> KeyUsage | None:
    """A key with what it has used in all and in the UTC day, week and month."""
    body = {"p_user_id": user_id, "p_key_id": key_id}
    return cast(KeyUsage | None, await call(client, "read_key", body))


async def create_key(client: AsyncClient, stamp: CallerStamp, key: NewKey) -> KeyCreation:
    return cast(KeyCreation, await call(client, "create_key", {"p": {**stamp, "key": key}}))


async def issue_key(client: AsyncClient, stamp: AdminStamp, *, user_id: int, key: NewKey) -> KeyIssue:
    """An administrator's key for a user: no key stands behind it, so nothing bounds what it may do."""
    return cast(KeyIssue, await call(client, "issue_key", {"p": {**stamp, "user_id": user_id, "key": key}}))


async def update_key(client: AsyncClient, stamp: CallerStamp, key_id: int, changes: KeyChanges) -> KeyUpdate:
    """Changes a key; what is not among the changes stays."""
    body = {**stamp, "key_id": key_id, "changes": changes}
    return cast(KeyUpdate, await call(client, "update_key", {"p": body}))


async def rotate_keys(
    client: AsyncClient, stamp: CallerStamp, keys: Sequence[NewSecret], *, grace_seconds: int
) -> KeyRotation:
    """Gives all of them new secrets, or none of them; the old ones work for `grace_seconds` more."""
    body = {**stamp, "grace_seconds": grace_seconds, "keys": keys}
    return cast(KeyRotation, await call(client, "rotate_keys", {"p": body}))


async def revoke_key(client: AsyncClient, stamp: AdminStamp | CallerStamp, key_id: int) -> KeyRevocation:
    """Ends a key for good: one of the caller's, or anybody's at an administrator's hands."""
    return cast(KeyRevocation, await call(client, "revoke_key", {"p": {**stamp, "key_id": key_id}}))


async def reveal_key(client: AsyncClient, stamp: CallerStamp, key_id: int) -> KeyRevelation:
    """A key as it was encrypted when it was made; every look is in the audit log."""
    return cast(KeyRevelation, await call(client, "reveal_key", {"p": {**stamp, "key_id": key_id}}))


async def import_keys(client: AsyncClient, stamp: AdminStamp, keys: Sequence[ImportedKey]) -> KeyImport:
    """Takes in keys of an older system, all of them or none; those it knows are left as they are."""
    return cast(KeyImport, await call(client, "import_keys", {"p": {**stamp, "keys": keys}}))


async def list_key_secrets_in_use(client: AsyncClient) -> set[str]:
    """Ids of the HMAC secrets that stored keys still need; dropping one of them would lock its keys out."""
    return set(await call(client, "key_secrets_in_use", {}))


async def note_wrong_secret(client: AsyncClient, attempt: WrongSecret) -> GuessCount:
    """Audits a wrong secret, and counts it for its address. `retry_after` in seconds."""
    return cast(GuessCount, await call(client, "note_wrong_secret", {"p": attempt}))


# Users' own upstream keys.


async def get_provider_key(client: AsyncClient, user_id: int) -> ProviderKey | None:
    """The parts of it that may be shown."""
    query = client.table("provider_keys").select(columns_of(ProviderKey)).eq("user_id", user_id)
    rows = await execute(query.limit(1))
    return cast(ProviderKey, rows[0]) if rows else None


async def set_provider_key(
    client: AsyncClient, stamp: CallerStamp, *, encrypted_key: str, label: str
) -> ProviderKeyChange:
    body = {**stamp, "encrypted_key": encrypted_key, "label": label}
    return cast(ProviderKeyChange, await call(client, "set_provider_key", {"p": body}))


async def delete_provider_key(client: AsyncClient, stamp: CallerStamp) -> ProviderKeyDeletion:
    return cast(ProviderKeyDeletion, await call(client, "delete_provider_key", {"p": stamp}))


# The audit log.


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which events are meant."""

    user_id: int | None = None
    key_id: int | None = None
    action: str | None = None
    start: datetime.datetime | None = None
    end: datetime.datetime | None = None


async def list_own_audit(
    client: AsyncClient, events: AuditFilter, *, before: int | None, limit: int
) -> list[AuditEntry]:
    """A user's own log, newest first. Where somebody else acted it does not show who, nor from where."""
    fields = {f"p_{name}": value for name, value in asdict(events).items()}
    times = {name: time.isoformat() for name, time in fields.items() if isinstance(time, datetime.datetime)}
    page = {**fields, **times, "p_before": before, "p_limit": limit}
    return cast(list[AuditEntry], await call(client, "list_own_audit", page))


async def list_audit_logs(
    client: AsyncClient, events: AuditFilter, *, before: int | None, limit: int
) -> list[AuditEntry]:
    """Security events and administrators' actions, newest first; `before` is the id of the last row seen."""
    query = client.table("audit_logs").select(columns_of(AuditEntry))
    for column, value in (("user_id", events.user_id), ("key_id", events.key_id), ("action", events.action)):
        if value is not None:
            query = query.eq(column, value)
    if events.start is not None:
        query = query.gte("created_at", events.start.isoformat())
    if events.end is not None:
        query = query.lt("created_at", events.end.isoformat())
    if before is not None:
        query = query.lt("id", before)
    return cast(list[AuditEntry], await execute(query.order("id", desc=True).limit(limit)))


async def write_audit(
    client: AsyncClient,
    stamp: AdminStamp,
    *,
    action: str,
    target: str,
    user_id: int | None,
    details: Mapping[str, object],
) -> None:
    """Writes one entry of the audit log, for an action that is not a single SQL function."""
    entry = {"p_action": action, "p_target": target, "p_user_id": user_id, "p_key_id": None}
    origin = {"p_actor": stamp["actor"], "p_address": stamp["address"], "p_user_agent": stamp["user_agent"]}
    details = {"p_request_id": stamp["request_id"], "p_details": dict(details)}
    await call(client, "write_audit", {**entry, **origin, **details})
