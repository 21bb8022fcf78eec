"""Users, credits, plans, limits and usage: flat functions, one per query or SQL function.

They decide nothing: what must hold is decided in PostgreSQL, and an expected refusal comes back as an
`outcome`. All of them raise DatabaseUnavailable when the database does not answer. Amounts are nano-dollars.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, cast
from uuid import UUID

from db_rows.requests import (
    AdmissionAnswer,
    AdmissionItem,
    ExpiredHold,
    GenerationNote,
    NoteAnswer,
    RaiseAnswer,
    RaiseItem,
    SettlementAnswer,
    SettlementItem,
    VerificationItem,
)
from supabase_config import AsyncClient, MissingFunction, call, execute

Row = dict[str, Any]
USER_COLUMNS = (
    "id,username,email,auth_method,role,credits_nanos,held_nanos,is_active,subscription_status,trial_expires_at,preferences,settings,"
    "registration_date,created_at,updated_at"
)
RECORD_COLUMNS = (
    "request_id,client_request_id,user_id,key_id,mode,environment,endpoint,model,model_used,provider,prompt_tokens,completion_tokens,"
    "cached_tokens,reasoning_tokens,hold_nanos,upstream_cost_nanos,cost_nanos,overrun_nanos,status,settlement_source,finish_reason,"
    "error_code,streamed,latency_ms,time_to_first_token_ms,generation_id,created_at,settled_at,end_user,byok,cache_hit,balance_after_nanos"
)
TRANSACTION_COLUMNS = (
    "id,user_id,kind,amount_nanos,balance_after_nanos,payment_method,request_id,actor,reason,created_at"
)
CLOCKS_APART = datetime.timedelta(days=1)


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


async def get_mode(client: AsyncClient) -> str:
    """The mode that the database is in: sandbox or live."""
    (state,) = await execute(client.table("gateway_state").select("mode"))
    return str(state["mode"])


async def count_users(client: AsyncClient) -> int:
    """How many accounts there are."""
    return int(await call(client, "count_users", {}))


# Requests.


async def admit_requests(
    client: AsyncClient, items: Sequence[VerificationItem | AdmissionItem]
) -> list[AdmissionAnswer]:
    """Verifies keys and admits requests, each once: an item that is sent again with `resent` gets the first
    answer. Answers come in any order, one per item.
    """
    return cast(list[AdmissionAnswer], await call(client, "admit_requests", {"p_items": items}))


async def settle_requests(client: AsyncClient, items: Sequence[SettlementItem]) -> list[SettlementAnswer]:
    """Charges requests that have ended, each once; one answer per item."""
    return cast(list[SettlementAnswer], await call(client, "settle_requests", {"p_items": items}))


async def raise_holds(client: AsyncClient, items: Sequence[RaiseItem]) -> list[RaiseAnswer]:
    """Raises the holds of running requests, which never fall; one answer per item."""
    return cast(list[RaiseAnswer], await call(client, "raise_holds", {"p_items": items}))


async def note_generations(client: AsyncClient, items: Sequence[GenerationNote]) -> list[NoteAnswer]:
    """Stores the generation ids of requests that are still running."""
    return cast(list[NoteAnswer], await call(client, "note_generations", {"p_items": items}))


async def list_expired_holds(client: AsyncClient, limit: int, skip: int) -> list[ExpiredHold]:
    """Holds whose time is up, oldest first and past the first `skip`."""
    return cast(
        list[ExpiredHold], await call(client, "list_expired_holds", {"p_limit": limit, "p_skip": skip})
    )


async def delete_expired_answers(client: AsyncClient) -> int:
    """Deletes stored answers whose time is over, at most a thousand; how many it deleted."""
    return int(await call(client, "delete_expired_answers", {}))


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


Range = tuple[datetime.datetime | None, datetime.datetime | None]


async def list_usage_records(
    client: AsyncClient,
    user_id: int,
    *,
    within: Range = (None, None),
    before: tuple[str, str] | None,
    limit: int,
) -> list[Row]:
    """A user's records, newest first; `before` is the (created_at, request_id) of the last row seen."""
    query = _within(client.table("usage_records").select(RECORD_COLUMNS).eq("user_id", user_id), within)
    if before is not None:
        moment, request_id = before
        # The first condition is implied by the second, and is the one that an index is used for.
        query = query.lte("created_at", moment)
        query = query.or_(
            f'created_at.lt."{moment}",and(created_at.eq."{moment}",request_id.lt.{request_id})'
        )
    return list(
        await execute(query.order("created_at", desc=True).order("request_id", desc=True).limit(limit))
    )


async def list_all_usage_records(
    client: AsyncClient, *, within: Range, before: tuple[str, str] | None, limit: int
) -> list[Row]:
    """Everybody's records, newest first, in the order of their ids, which are times (UUIDv7)."""
    query = _within(client.table("usage_records").select(RECORD_COLUMNS), within)
    start, end = within
    if start is not None:
        query = query.gte("request_id", _first_id(start - CLOCKS_APART))
    if end is not None:
        query = query.lt("request_id", _first_id(end + CLOCKS_APART))
    if before is not None:
        query = query.lt("request_id", before[1])
    return list(await execute(query.order("request_id", desc=True).limit(limit)))


def _within(query: Any, within: Range) -> Any:
    start, end = within
    query = query if start is None else query.gte("created_at", start.isoformat())
    return query if end is None else query.lt("created_at", end.isoformat())


def _first_id(moment: datetime.datetime) -> str:
    """The smallest UUIDv7 of a moment: ids are made by instances, times by the database, and their clocks may
    differ.
    """
    return str(UUID(int=max(0, int(moment.timestamp() * 1000)) << 80))


async def list_transactions(
    client: AsyncClient, user_id: int | None, *, within: Range = (None, None), before: int | None, limit: int
) -> list[Row]:
    """Credit transactions, a user's or everybody's, newest first; `before` is the id of the last row seen."""
    query = _within(client.table("credit_transactions").select(TRANSACTION_COLUMNS), within)
    if user_id is not None:
        query = query.eq("user_id", user_id)
    if before is not None:
        query = query.lt("id", before)
    return list(await execute(query.order("id", desc=True).limit(limit)))


# Profiles and accounts.


async def update_profile(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome updated, username_taken, email_taken or not_found."""
    return Row(await call(client, "update_profile", {"p": order}))


async def delete_account(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome deleted or not_found."""
    return Row(await call(client, "delete_account", {"p": order}))


async def set_user(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Suspends, restores, or changes the role: outcome set or not_found."""
    return Row(await call(client, "set_user", {"p": order}))


async def list_users(client: AsyncClient, *, text: str | None, before: int | None, limit: int) -> list[Row]:
    """Accounts by username or email, newest first, each with its keys (masked by whoever shows them)."""
    query = client.table("users").select(USER_COLUMNS)
    if text:
        literal = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        # Within the quotes of a filter a backslash escapes once more.
        pattern = "%" + literal.replace("\\", "\\\\").replace('"', '\\"') + "%"
        query = query.or_(f'username.ilike."{pattern}",email.ilike."{pattern}"')
    if before is not None:
        query = query.lt("id", before)
    return list(await execute(query.order("id", desc=True).limit(limit)))


# Plans and limits.


async def list_plans(client: AsyncClient) -> list[Row]:
    """The plans on offer, cheapest first."""
    return list(
        await execute(
            client.table("plans").select("*").eq("is_active", True).order("price_per_month_nanos").order("id")
        )
    )


async def get_plan(client: AsyncClient, plan_id: int) -> Row | None:
    rows = await execute(client.table("plans").select("*").eq("id", plan_id).limit(1))
    return rows[0] if rows else None


async def create_plan(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome created or slug_taken."""
    return Row(await call(client, "create_plan", {"p": order}))


async def update_plan(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome updated, built_in or not_found."""
    return Row(await call(client, "update_plan", {"p": order}))


async def cancel_plan(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome cancelled or no_plan."""
    return Row(await call(client, "cancel_plan", {"p": order}))


async def read_limits(client: AsyncClient, user_id: int, key_id: int) -> Row:
    """Limits, plan and counters of a user as of now."""
    return Row(await call(client, "read_limits", {"p_user_id": user_id, "p_key_id": key_id}))


# Corrections.


async def refund_request(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome refunded, repeated, conflict, not_settled, too_much or not_found."""
    return Row(await call(client, "refund_request", {"p": order}))


async def adjust_credits(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome adjusted, repeated, conflict, too_much, too_large or not_found."""
    return Row(await call(client, "adjust_credits", {"p": order}))


# Analytics.


async def report_usage(client: AsyncClient, *, user_id: int | None, report: Mapping[str, Any]) -> list[Row]:
    """Settled requests by time and group; `report` holds start, end, zone, bucket, group and limit."""
    return list(
        await call(
            client,
            "report_usage",
            {"p_user_id": user_id, **{f"p_{name}": value for name, value in report.items()}},
        )
    )


async def report_end_users(client: AsyncClient, *, user_id: int, report: Mapping[str, Any]) -> list[Row]:
    """The same of one user, by their end users; `report` without group."""
    return list(
        await call(
            client,
            "report_end_users",
            {"p_user_id": user_id, **{f"p_{name}": value for name, value in report.items()}},
        )
    )


async def sum_up_usage(client: AsyncClient) -> bool:
    """Sums up what is closed, at most a day of it; whether there is more."""
    return bool(await call(client, "sum_up_usage", {}))


async def usage_metrics(client: AsyncClient, user_id: int) -> Row:
    return Row(await call(client, "usage_metrics", {"p_user_id": user_id}))


async def system_metrics(client: AsyncClient) -> Row:
    return Row(await call(client, "system_metrics", {}))


WEBHOOK_COLUMNS = "id,url,is_active,disabled_reason,previous_valid_until,created_at,updated_at"
DELIVERY_COLUMNS = (
    "id,event_id,webhook_id,attempts,next_attempt_at,delivered_at,failed_at,last_status,last_error,created_at"
)
EVENT_COLUMNS = (
    "id,key_id,end_user,level,budget_nanos,spent_nanos,budget_window,window_start,request_id,created_at"
)


async def read_credits(client: AsyncClient, user_id: int) -> Row | None:
    """Everything an account was given (refunds are no gift), and its balance, of one moment."""
    return _row(await call(client, "read_credits", {"p_user_id": user_id}))


async def read_receipt(client: AsyncClient, user_id: int, request_id: str) -> Row | None:
    """A usage record of this user, with the refunds of it."""
    return _row(await call(client, "read_receipt", {"p_user_id": user_id, "p_request_id": request_id}))


async def find_generation(
    client: AsyncClient, user_id: int, generation_id: str, *, around: str | None
) -> Row | None:
    """This user's newest usage record with this generation id, looked for `around` a time, or in the last
    day.
    """
    return _row(
        await call(
            client,
            "find_generation",
            {"p_user_id": user_id, "p_generation_id": generation_id, "p_around": around},
        )
    )


async def quote_request(client: AsyncClient, order: Mapping[str, Any]) -> Row:
    """Outcome granted, credits, budget, end_user_budget, MODEL_NOT_ALLOWED, REQUEST_LIMIT_EXCEEDED,
    trial_expired or not_found.
    """
    return Row(await call(client, "quote_request", {"p": order}))


# Budgets of end users.


async def list_end_user_budgets(
    client: AsyncClient, user_id: int, *, before: int | None, limit: int
) -> list[Row]:
    """A user's budgets for their customers, newest first, each with how it stands."""
    return list(
        await call(
            client, "list_end_user_budgets", {"p_user_id": user_id, "p_before": before, "p_limit": limit}
        )
    )


async def end_user_standing(client: AsyncClient, user_id: int, end_user: str, *, now: str) -> Row | None:
    """The budget that applies to an end user, their own or that of `*`, and what is used of it; None where
    none does.
    """
    return _row(
        await call(client, "end_user_standing", {"p_user_id": user_id, "p_end_user": end_user, "p_now": now})
    )


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
    return list(
        await execute(client.table("webhooks").select(WEBHOOK_COLUMNS).eq("user_id", user_id).order("id"))
    )


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
    query = (
        client.table("webhook_deliveries")
        .select(DELIVERY_COLUMNS)
        .eq("user_id", user_id)
        .eq("id", delivery_id)
        .limit(1)
    )
    rows = await execute(query)
    return rows[0] if rows else None


async def list_deliveries(client: AsyncClient, user_id: int, *, before: int | None, limit: int) -> list[Row]:
    """A user's deliveries, newest first; `before` is the id of the last row seen."""
    return await _newest(client, "webhook_deliveries", DELIVERY_COLUMNS, user_id, before, limit)


async def list_budget_events(
    client: AsyncClient, user_id: int, *, before: int | None, limit: int
) -> list[Row]:
    """What levels of budgets a user's keys and end users have reached, newest first."""
    return await _newest(client, "budget_events", EVENT_COLUMNS, user_id, before, limit)


async def claim_deliveries(
    client: AsyncClient, *, limit: int, lease_seconds: int, delivery_id: int | None
) -> list[Row]:
    """Deliveries that are due, for nobody but the caller until the lease ends; just one of them where
    `delivery_id` names it.
    """
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
    """Requests that are `expired`, `unknown` in their cost, or an `overrun`; newest first, `before` is the id
    of the last one seen.
    """
    return list(await call(client, "list_open_items", {"p_kind": kind, "p_before": before, "p_limit": limit}))


async def get_record(client: AsyncClient, request_id: str) -> Row | None:
    """Anybody's usage record, for an administrator."""
    rows = await execute(client.table("usage_records").select("*").eq("request_id", request_id).limit(1))
    return rows[0] if rows else None


async def _newest(
    client: AsyncClient, table: str, columns: str, user_id: int, before: int | None, limit: int
) -> list[Row]:
    query = client.table(table).select(columns).eq("user_id", user_id)
    if before is not None:
        query = query.lt("id", before)
    return list(await execute(query.order("id", desc=True).limit(limit)))


def _row(answer: Any) -> Row | None:
    return None if answer is None else Row(answer)
