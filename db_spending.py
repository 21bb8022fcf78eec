"""Spending as its owners see it: keys, receipts, quotes, budgets of end users, webhooks, reconciliation. Flat functions, one per query.

The same rules as in `db`: nothing is decided here, expected refusals are an `outcome`, amounts are nano-dollars. Orders hold user_id, the
acting key (maker_id) and the stamp of the action.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supabase_config import AsyncClient, call, execute

Row = dict[str, Any]

WEBHOOK_COLUMNS = "id,url,is_active,disabled_reason,previous_valid_until,created_at,updated_at"
DELIVERY_COLUMNS = "id,event_id,webhook_id,attempts,next_attempt_at,delivered_at,failed_at,last_status,last_error,created_at"
EVENT_COLUMNS = "id,key_id,end_user,level,budget_nanos,spent_nanos,budget_window,window_start,request_id,created_at"


# A key, an account and a request.


async def read_key(client: AsyncClient, user_id: int, key_id: int) -> Row | None:
    """A key with what it has used in all and in the UTC day, week and month."""
    return _row(await call(client, "read_key", {"p_user_id": user_id, "p_key_id": key_id}))


async def read_credits(client: AsyncClient, user_id: int) -> Row | None:
    """Everything an account was given (refunds are no gift), and its balance, of one moment."""
    return _row(await call(client, "read_credits", {"p_user_id": user_id}))


async def read_receipt(client: AsyncClient, user_id: int, request_id: str) -> Row | None:
    """A usage record of this user, with the refunds of it."""
    return _row(await call(client, "read_receipt", {"p_user_id": user_id, "p_request_id": request_id}))


async def find_generation(client: AsyncClient, user_id: int, generation_id: str, *, around: str | None) -> Row | None:
    """This user's newest usage record with this generation id, looked for `around` a time, or in the last day."""
    return _row(await call(client, "find_generation", {"p_user_id": user_id, "p_generation_id": generation_id, "p_around": around}))


async def quote_request(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome granted, credits, budget, end_user_budget, MODEL_NOT_ALLOWED, REQUEST_LIMIT_EXCEEDED, trial_expired or not_found."""
    return Row(await call(client, "quote_request", {"p": order}))


# Users' own upstream keys.


async def get_provider_key(client: AsyncClient, user_id: int) -> Row | None:
    """What may be shown of it."""
    query = client.table("provider_keys").select("label,is_active,created_at,updated_at").eq("user_id", user_id).limit(1)
    rows = await execute(query)
    return rows[0] if rows else None


async def set_provider_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome set or not_found."""
    return Row(await call(client, "set_provider_key", {"p": order}))


async def delete_provider_key(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome deleted or not_found."""
    return Row(await call(client, "delete_provider_key", {"p": order}))


# Budgets of end users.


async def list_end_user_budgets(client: AsyncClient, user_id: int, *, before: int | None, limit: int) -> list[Row]:
    """A user's budgets for their customers, newest first, each with how it stands."""
    return list(await call(client, "list_end_user_budgets", {"p_user_id": user_id, "p_before": before, "p_limit": limit}))


async def end_user_standing(client: AsyncClient, user_id: int, end_user: str, *, now: str) -> Row | None:
    """The budget that applies to an end user, their own or that of `*`, and what is used of it; None where none does."""
    return _row(await call(client, "end_user_standing", {"p_user_id": user_id, "p_end_user": end_user, "p_now": now}))


async def create_end_user_budget(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome created, name_taken, too_many or not_found."""
    return Row(await call(client, "create_end_user_budget", {"p": order}))


async def update_end_user_budget(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome updated or not_found."""
    return Row(await call(client, "update_end_user_budget", {"p": order}))


async def delete_end_user_budget(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome deleted or not_found."""
    return Row(await call(client, "delete_end_user_budget", {"p": order}))


# Webhooks.


async def list_webhooks(client: AsyncClient, user_id: int) -> list[Row]:
    """A user's webhooks, oldest first, without their secrets."""
    return list(await execute(client.table("webhooks").select(WEBHOOK_COLUMNS).eq("user_id", user_id).order("id")))


async def create_webhook(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome created, too_many or not_found."""
    return Row(await call(client, "create_webhook", {"p": order}))


async def update_webhook(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome updated or not_found."""
    return Row(await call(client, "update_webhook", {"p": order}))


async def delete_webhook(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome deleted or not_found."""
    return Row(await call(client, "delete_webhook", {"p": order}))


async def queue_webhook_test(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome queued, too_soon, inactive or not_found."""
    return Row(await call(client, "queue_webhook_test", {"p": order}))


async def get_delivery(client: AsyncClient, user_id: int, delivery_id: int) -> Row | None:
    query = client.table("webhook_deliveries").select(DELIVERY_COLUMNS).eq("user_id", user_id).eq("id", delivery_id).limit(1)
    rows = await execute(query)
    return rows[0] if rows else None


async def list_deliveries(client: AsyncClient, user_id: int, *, before: int | None, limit: int) -> list[Row]:
    """A user's deliveries, newest first; `before` is the id of the last row seen."""
    return await _newest(client, "webhook_deliveries", DELIVERY_COLUMNS, user_id, before, limit)


async def list_budget_events(client: AsyncClient, user_id: int, *, before: int | None, limit: int) -> list[Row]:
    """What levels of budgets a user's keys and end users have reached, newest first."""
    return await _newest(client, "budget_events", EVENT_COLUMNS, user_id, before, limit)


async def claim_deliveries(client: AsyncClient, *, limit: int, lease_seconds: int, delivery_id: int | None) -> list[Row]:
    """Deliveries that are due, for nobody but the caller until the lease ends; just one of them where `delivery_id` names it."""
    asked = {"p_limit": limit, "p_lease_seconds": lease_seconds, "p_delivery_id": delivery_id}
    return list(await call(client, "claim_deliveries", asked))


async def finish_delivery(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome finished, or stale: the lease had ended."""
    return Row(await call(client, "finish_delivery", {"p": order}))


# Reconciliation.


async def reconcile_costs(client: AsyncClient) -> Row:
    """The mode, and what live requests cost in the UTC day, week and month (`daily`, `weekly`, `monthly`)."""
    return Row(await call(client, "reconcile_costs", {}))


async def note_open_items(client: AsyncClient) -> None:
    """Notes what the part of the journal that has been closed since the last time leaves open."""
    await call(client, "note_open_items", {})


async def list_open_items(client: AsyncClient, kind: str, *, before: str | None, limit: int) -> list[Row]:
    """Requests that are `expired`, `unknown` in their cost, or an `overrun`; newest first, `before` is the id of the last one seen."""
    return list(await call(client, "list_open_items", {"p_kind": kind, "p_before": before, "p_limit": limit}))


async def get_record(client: AsyncClient, request_id: str) -> Row | None:
    """Anybody's usage record, for an administrator."""
    rows = await execute(client.table("usage_records").select("*").eq("request_id", request_id).limit(1))
    return rows[0] if rows else None


async def write_audit(
    client: AsyncClient, stamp: Mapping[str, Any], *, action: str, target: str, user_id: int | None, details: Mapping[str, Any]
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


async def _newest(client: AsyncClient, table: str, columns: str, user_id: int, before: int | None, limit: int) -> list[Row]:
    query = client.table(table).select(columns).eq("user_id", user_id)
    if before is not None:
        query = query.lt("id", before)
    return list(await execute(query.order("id", desc=True).limit(limit)))


def _row(answer: Any) -> Row | None:
    return None if answer is None else Row(answer)
