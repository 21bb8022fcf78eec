"""Users, credits, plans, limits and usage: flat functions, one per query or SQL function.

They decide nothing: what must hold is decided in PostgreSQL, and an expected refusal comes back as an `outcome`. All of them raise
DatabaseUnavailable when the database does not answer. Amounts are nano-dollars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from supabase_config import AsyncClient, MissingFunction, call, execute

Row = dict[str, Any]

USER_COLUMNS = (
    "id,username,email,auth_method,role,credits_nanos,held_nanos,is_active,subscription_status,trial_expires_at,registration_date"
)
RECORD_COLUMNS = (
    "request_id,client_request_id,key_id,mode,environment,endpoint,model,model_used,provider,prompt_tokens,completion_tokens,"
    "cached_tokens,reasoning_tokens,hold_nanos,upstream_cost_nanos,cost_nanos,overrun_nanos,status,settlement_source,finish_reason,"
    "error_code,streamed,latency_ms,time_to_first_token_ms,generation_id,created_at,settled_at"
)
TRANSACTION_COLUMNS = "id,kind,amount_nanos,balance_after_nanos,payment_method,request_id,reason,created_at"


# The database itself.


async def get_schema_version(client: AsyncClient) -> int:
    """The newest migration's number, 0 for a database without our schema."""
    try:
        return int(await call(client, "schema_version", {}))
    except MissingFunction:
        return 0


async def enter_mode(client: AsyncClient, mode: str) -> Row:
    """Outcome entered, or refused by a database that has been live."""
    return Row(await call(client, "enter_mode", {"p_mode": mode}))


async def count_users(client: AsyncClient) -> int:
    """How many accounts there are."""
    return int(await call(client, "count_users", {}))


# Requests.


async def admit_requests(client: AsyncClient, items: Sequence[Row]) -> list[Row]:
    """One answer per item (admission_item): admitted, verified, busy, wrong_mode, failed, or a refusal's code."""
    return list(await call(client, "admit_requests", {"p_items": items}))


async def settle_requests(client: AsyncClient, items: Sequence[Row]) -> list[Row]:
    """One answer per item (settlement_item): settled, repeated, unknown, busy or failed."""
    return list(await call(client, "settle_requests", {"p_items": items}))


async def note_generations(client: AsyncClient, items: Sequence[Row]) -> list[Row]:
    """Stores the generation ids of requests that are still running."""
    return list(await call(client, "note_generations", {"p_items": items}))


async def list_expired_holds(client: AsyncClient, limit: int) -> list[Row]:
    """Holds whose time is up, oldest first: request_id, generation_id, mode, environment."""
    return list(await call(client, "list_expired_holds", {"p_limit": limit}))


async def audit_ledger(client: AsyncClient) -> list[Row]:
    """Accounts whose books do not add up. Empty, always."""
    return list(await call(client, "audit_ledger", {}))


# Accounts.


async def register_user(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome registered, username_taken, email_taken or address_limit."""
    return Row(await call(client, "register_user", {"p": order}))


async def get_user(client: AsyncClient, user_id: int) -> Row | None:
    """One account, or None."""
    rows = await execute(client.table("users").select(USER_COLUMNS).eq("id", user_id).limit(1))
    return rows[0] if rows else None


async def grant_credits(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome granted, repeated, conflict, too_large or not_found."""
    return Row(await call(client, "grant_credits", {"p": order}))


async def set_rate_limits(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome set or not_found."""
    return Row(await call(client, "set_rate_limits", {"p": order}))


async def assign_plan(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome assigned, plan_not_found or not_found."""
    return Row(await call(client, "assign_plan", {"p": order}))


# Books.


async def list_usage_records(client: AsyncClient, user_id: int, *, before: tuple[str, str] | None, limit: int) -> list[Row]:
    """A user's records, newest first; `before` is the (created_at, request_id) of the last row seen."""
    query = client.table("usage_records").select(RECORD_COLUMNS).eq("user_id", user_id)
    if before is not None:
        moment, request_id = before
        query = query.or_(f'created_at.lt."{moment}",and(created_at.eq."{moment}",request_id.lt.{request_id})')
    return list(await execute(query.order("created_at", desc=True).order("request_id", desc=True).limit(limit)))


async def list_transactions(client: AsyncClient, user_id: int, *, before: int | None, limit: int) -> list[Row]:
    """A user's credit transactions, newest first; `before` is the id of the last row seen."""
    query = client.table("credit_transactions").select(TRANSACTION_COLUMNS).eq("user_id", user_id)
    if before is not None:
        query = query.lt("id", before)
    return list(await execute(query.order("id", desc=True).limit(limit)))
