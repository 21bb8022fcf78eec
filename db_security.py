"""API keys and the audit log in the database: flat functions, one per query or SQL function.

Keys arrive here as HMACs, computed elsewhere: this module never sees one in clear.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from db import Row, _row
from supabase_config import AsyncClient, call, execute

AUDIT_COLUMNS = (
    "id,actor,action,target,user_id,key_id,ip,user_agent,request_id,details,occurrences,created_at"
)


async def list_key_secrets_in_use(client: AsyncClient) -> set[str]:
    """Ids of the HMAC secrets that stored keys still need; dropping one of them would lock its keys out."""
    return set(await call(client, "key_secrets_in_use", {}))


# Keys. `order` holds user_id, the acting key (maker_id) and the stamp of the action.


async def list_keys(client: AsyncClient, user_id: int) -> list[Row]:
    """A user's keys that are not revoked, oldest first."""
    return list(await call(client, "list_keys", {"p_user_id": user_id}))


async def list_primary_keys(client: AsyncClient, user_ids: Sequence[int]) -> dict[int, str]:
    """Users' primary keys, masked, by user id."""
    query = (
        client.table("api_keys_new")
        .select("user_id,key_prefix,last4")
        .in_("user_id", list(user_ids))
        .eq("is_primary", True)
    )
    return (
        {row["user_id"]: f"{row['key_prefix']}...{row['last4']}" for row in await execute(query)}
        if user_ids
        else {}
    )


async def create_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome created, name_taken, too_many, broader or not_found."""
    return Row(await call(client, "create_key", {"p": order}))


async def issue_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """An administrator's key for a user. Outcome created (with key), name_taken, too_many or not_found."""
    return Row(await call(client, "issue_key", {"p": order}))


async def update_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome updated, name_taken, too_many, broader or not_found."""
    return Row(await call(client, "update_key", {"p": order}))


async def rotate_keys(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """All of them or none: outcome rotated, broader or not_found."""
    return Row(await call(client, "rotate_keys", {"p": order}))


async def revoke_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome revoked, broader (a key of a lesser environment asks) or not_found."""
    return Row(await call(client, "revoke_key", {"p": order}))


async def reveal_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome revealed (with the encrypted key), not_revealable, broader or not_found."""
    return Row(await call(client, "reveal_key", {"p": order}))


async def find_keys(
    client: AsyncClient, *, text: str | None, user_id: int | None, before: int | None, limit: int
) -> list[Row]:
    """Keys by prefix and last 4, or name; newest first."""
    return list(
        await call(
            client, "find_keys", {"p_text": text, "p_user_id": user_id, "p_before": before, "p_limit": limit}
        )
    )


async def import_keys(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome imported, or not_found."""
    return Row(await call(client, "import_keys", {"p": order}))


async def note_wrong_secret(client: AsyncClient, attempt: Mapping[str, Any]) -> Row:
    """Outcome counted, or limited (with retry_after, seconds)."""
    return Row(await call(client, "note_wrong_secret", {"p": attempt}))


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
) -> list[Row]:
    """A user's own log, newest first: of what others did to the account it does not show from where."""
    asked = {f"p_{name}": value for name, value in asdict(events).items()}
    times = {name: value.isoformat() for name, value in asked.items() if isinstance(value, datetime.datetime)}
    return list(
        await call(client, "list_own_audit", {**asked, **times, "p_before": before, "p_limit": limit})
    )


async def list_audit_logs(
    client: AsyncClient, events: AuditFilter, *, before: int | None, limit: int
) -> list[Row]:
    """Security events and administrators' actions, newest first; `before` is the id of the last row seen."""
    query = client.table("audit_logs").select(AUDIT_COLUMNS)
    for column, value in (("user_id", events.user_id), ("key_id", events.key_id), ("action", events.action)):
        if value is not None:
            query = query.eq(column, value)
    if events.start is not None:
        query = query.gte("created_at", events.start.isoformat())
    if events.end is not None:
        query = query.lt("created_at", events.end.isoformat())
    if before is not None:
        query = query.lt("id", before)
    return list(await execute(query.order("id", desc=True).limit(limit)))


# A key, an account and a request.


async def read_key(client: AsyncClient, user_id: int, key_id: int) -> Row | None:
    """A key with what it has used in all and in the UTC day, week and month."""
    return _row(await call(client, "read_key", {"p_user_id": user_id, "p_key_id": key_id}))


# Users' own upstream keys.


async def get_provider_key(client: AsyncClient, user_id: int) -> Row | None:
    """What may be shown of it."""
    query = (
        client.table("provider_keys")
        .select("label,is_active,created_at,updated_at")
        .eq("user_id", user_id)
        .limit(1)
    )
    rows = await execute(query)
    return rows[0] if rows else None


async def set_provider_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome set or not_found."""
    return Row(await call(client, "set_provider_key", {"p": order}))


async def delete_provider_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome deleted or not_found."""
    return Row(await call(client, "delete_provider_key", {"p": order}))


async def write_audit(
    client: AsyncClient,
    stamp: Mapping[str, Any],
    *,
    action: str,
    target: str,
    user_id: int | None,
    details: Mapping[str, Any],
) -> None:
    """One entry of the audit log, for an action that is not a single SQL function."""
    await call(
        client,
        "write_audit",
        {
            "p_actor": stamp["actor"],
            "p_action": action,
            "p_target": target,
            "p_user_id": user_id,
            "p_key_id": None,
            "p_address": stamp["address"],
            "p_user_agent": stamp["user_agent"],
            "p_request_id": stamp["request_id"],
            "p_details": dict(details),
        },
    )
