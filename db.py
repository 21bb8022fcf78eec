"""Users, credits, plans, limits and usage: one async function per query or SQL function.

Nothing is decided here: what must hold is decided in PostgreSQL, and an expected refusal comes back as an
`outcome`. All of them raise DatabaseUnavailable when the database does not answer. Amounts are nano-dollars.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Literal, cast
from uuid import UUID

from db_rows.accounts import (
    BudgetCreation,
    BudgetEvent,
    BudgetUpdate,
    ClaimedDelivery,
    Deletion,
    Delivery,
    DeliveryAttempt,
    DeliveryFinish,
    EndUserBudget,
    LimitChange,
    LimitsInUse,
    ModeChange,
    NewAccount,
    Plan,
    PlanAssignment,
    PlanCancellation,
    PlanCreation,
    PlanUpdate,
    ProfileUpdate,
    Registration,
    User,
    UserUpdate,
    Webhook,
    WebhookCreation,
    WebhookTest,
    WebhookUpdate,
)
from db_rows.books import (
    Adjustment,
    CostsByWindow,
    Credits,
    Grant,
    OpenItem,
    QuoteAnswer,
    ReceiptRow,
    Refund,
    ReportRange,
    ReportRow,
    SystemMetrics,
    Transaction,
    UsageMetrics,
    UsageRecord,
)
from db_rows.requests import (
    AdmissionAnswer,
    AdmissionItem,
    ExpiredHold,
    GenerationNote,
    NoteAnswer,
    QuoteItem,
    RaiseAnswer,
    RaiseItem,
    SettlementAnswer,
    SettlementItem,
    VerificationItem,
)
from db_rows.shared import AdminStamp, CallerStamp, Mode, Role, Target, Window, columns_of
from supabase_config import AsyncClient, MissingFunction, Select, call, execute

Range = tuple[datetime.datetime | None, datetime.datetime | None]

# Clocks of instances, which make the ids, and of the database may differ by this much.
CLOCKS_APART = datetime.timedelta(days=1)


# The database itself.


async def get_schema_version(client: AsyncClient) -> int:
    """The newest migration's number, 0 for a database without our schema."""
    try:
        return int(await call(client, "schema_version", {}))
    except MissingFunction:
        return 0


async def enter_mode(client: AsyncClient, mode: str) -> ModeChange:
    """Takes the database to a mode. One that has been live refuses to be a sandbox again."""
    return cast(ModeChange, await call(client, "enter_mode", {"p_mode": mode}))


async def get_mode(client: AsyncClient) -> Mode:
    """The mode that the database is in."""
    (state,) = await execute(client.table("gateway_state").select("mode"))
    return cast(Mode, state["mode"])


# Requests.


async def admit_requests(
    client: AsyncClient, items: Sequence[VerificationItem | AdmissionItem]
) -> list[AdmissionAnswer]:
    """Verifies keys and admits requests, each once: an item that is sent again with `resent` gets the first
    answer. One answer per item, in any order.
    """
    return cast(list[AdmissionAnswer], await call(client, "admit_requests", {"p_items": items}))


async def raise_holds(client: AsyncClient, items: Sequence[RaiseItem]) -> list[RaiseAnswer]:
    """Raises the holds of running requests, which never fall. One answer per item."""
    return cast(list[RaiseAnswer], await call(client, "raise_holds", {"p_items": items}))


async def note_generations(client: AsyncClient, items: Sequence[GenerationNote]) -> list[NoteAnswer]:
    """Stores the generation ids of requests that are still running."""
    return cast(list[NoteAnswer], await call(client, "note_generations", {"p_items": items}))


async def settle_requests(client: AsyncClient, items: Sequence[SettlementItem]) -> list[SettlementAnswer]:
    """Charges requests that have ended, each once. One answer per item."""
    return cast(list[SettlementAnswer], await call(client, "settle_requests", {"p_items": items}))


async def list_expired_holds(client: AsyncClient, limit: int, skip: int) -> list[ExpiredHold]:
    """Holds whose time is up, oldest first, without the first `skip`."""
    page = {"p_limit": limit, "p_skip": skip}
    return cast(list[ExpiredHold], await call(client, "list_expired_holds", page))


async def delete_expired_answers(client: AsyncClient) -> int:
    """Deletes stored answers whose time is over, at most a thousand; returns how many."""
    return int(await call(client, "delete_expired_answers", {}))


async def quote_request(
    client: AsyncClient, item: QuoteItem, *, user_id: int, key_id: int, end_user: str | None
) -> QuoteAnswer:
    """What admission would say to this request now, rate limits aside. Nothing is counted or held."""
    body = {**item, "user_id": user_id, "key_id": key_id, "end_user": end_user}
    return cast(QuoteAnswer, await call(client, "quote_request", {"p": body}))


# Accounts.


async def register_user(client: AsyncClient, account: NewAccount) -> Registration:
    """Makes an account with its first key and its signup credits, which an email address gets once."""
    return cast(Registration, await call(client, "register_user", {"p": account}))


async def count_users(client: AsyncClient) -> int:
    """How many accounts there are."""
    return int(await call(client, "count_users", {}))


async def get_user(client: AsyncClient, user_id: int) -> User | None:
    rows = await execute(client.table("users").select(columns_of(User)).eq("id", user_id).limit(1))
    return cast(User, rows[0]) if rows else None


async def list_users(client: AsyncClient, *, text: str | None, before: int | None, limit: int) -> list[User]:
    """Accounts, newest first; with `text`, those whose username or email contains it."""
    query = client.table("users").select(columns_of(User))
    if text:
        literal = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        # Within the quotes of a filter a backslash escapes once more.
        pattern = "%" + literal.replace("\\", "\\\\").replace('"', '\\"') + "%"
        query = query.or_(f'username.ilike."{pattern}",email.ilike."{pattern}"')
    return cast(list[User], await execute(_page_by_id(query, before, limit)))


async def update_profile(
    client: AsyncClient, stamp: CallerStamp, changes: Mapping[str, object]
) -> ProfileUpdate:
    """Changes username, email, preferences or settings; the latter two take 16 kB each."""
    return cast(ProfileUpdate, await call(client, "update_profile", {"p": {**stamp, "changes": changes}}))


async def set_user(
    client: AsyncClient, stamp: AdminStamp, user_id: int, *, is_active: bool | None, role: Role | None
) -> UserUpdate:
    """Suspends or restores an account, or changes its role; None leaves it as it is."""
    changes = _without_none(is_active=is_active, role=role)
    body = {**stamp, "user_id": user_id, "changes": changes}
    return cast(UserUpdate, await call(client, "set_user", {"p": body}))


async def delete_account(client: AsyncClient, stamp: CallerStamp, email_hashes: Sequence[str]) -> Deletion:
    """Deletes an account for good: its keys end, and its credits expire."""
    body = {**stamp, "email_hashes": email_hashes}
    return cast(Deletion, await call(client, "delete_account", {"p": body}))


# Plans and limits.


async def list_plans(client: AsyncClient) -> list[Plan]:
    """The plans on offer, cheapest first."""
    query = client.table("plans").select("*").eq("is_active", True)
    return cast(list[Plan], await execute(query.order("price_per_month_nanos").order("id")))


async def get_plan(client: AsyncClient, plan_id: int) -> Plan | None:
    rows = await execute(client.table("plans").select("*").eq("id", plan_id).limit(1))
    return cast(Plan, rows[0]) if rows else None


async def create_plan(client: AsyncClient, stamp: AdminStamp, plan: Mapping[str, object]) -> PlanCreation:
    """Makes a plan of these columns."""
    return cast(PlanCreation, await call(client, "create_plan", {"p": {**stamp, "plan": plan}}))


async def update_plan(
    client: AsyncClient, stamp: AdminStamp, plan_id: int, changes: Mapping[str, object]
) -> PlanUpdate:
    """Changes these columns of a plan. One that is no longer active is kept by those who have it."""
    body = {**stamp, "plan_id": plan_id, "changes": changes}
    return cast(PlanUpdate, await call(client, "update_plan", {"p": body}))


async def assign_plan(
    client: AsyncClient, stamp: AdminStamp, *, user_id: int, plan_id: int, duration_months: int
) -> PlanAssignment:
    """Gives a user a plan from now on, in place of the one they have."""
    body = {**stamp, "user_id": user_id, "plan_id": plan_id, "duration_months": duration_months}
    return cast(PlanAssignment, await call(client, "assign_plan", {"p": body}))


async def cancel_plan(client: AsyncClient, stamp: CallerStamp) -> PlanCancellation:
    """Ends the user's plan now."""
    return cast(PlanCancellation, await call(client, "cancel_plan", {"p": stamp}))


async def set_rate_limits(
    client: AsyncClient,
    stamp: AdminStamp,
    target: Target,
    *,
    subject: Literal["user", "key"],
    limits: Mapping[str, int | None],
) -> LimitChange:
    """Sets these limits of a user, or of the key that the target names; the others stay."""
    body = {**stamp, **target, "subject": subject, "limits": limits}
    return cast(LimitChange, await call(client, "set_rate_limits", {"p": body}))


async def read_limits(client: AsyncClient, user_id: int, key_id: int) -> LimitsInUse:
    """Limits, plan and counters of a user as of now."""
    return cast(LimitsInUse, await call(client, "read_limits", {"p_user_id": user_id, "p_key_id": key_id}))


# Credits.


async def read_credits(client: AsyncClient, user_id: int) -> Credits | None:
    """The balance of an account and what it was given in all, as of one moment."""
    return cast(Credits | None, await call(client, "read_credits", {"p_user_id": user_id}))


async def grant_credits(
    client: AsyncClient,
    stamp: AdminStamp,
    target: Target,
    *,
    amount_nanos: int,
    reason: str,
    idempotency_key: str | None,
) -> Grant:
    """Gives credits, once for each idempotency key."""
    body = {**stamp, **target, "amount_nanos": str(amount_nanos)}
    body |= {"reason": reason, "idempotency_key": idempotency_key}
    return cast(Grant, await call(client, "grant_credits", {"p": body}))


async def adjust_credits(
    client: AsyncClient,
    stamp: AdminStamp,
    target: Target,
    *,
    amount_nanos: int,
    reason: str,
    idempotency_key: str | None,
) -> Adjustment:
    """Adds to a balance, or takes from what of it is not held; once for each idempotency key."""
    body = {**stamp, **target, "amount_nanos": str(amount_nanos)}
    body |= {"reason": reason, "idempotency_key": idempotency_key}
    return cast(Adjustment, await call(client, "adjust_credits", {"p": body}))


async def refund_request(
    client: AsyncClient,
    stamp: AdminStamp,
    request_id: str,
    *,
    amount_nanos: int | None,
    reason: str,
    idempotency_key: str | None,
) -> Refund:
    """Gives back what a request cost, or this much of it; once for each idempotency key."""
    amount = None if amount_nanos is None else str(amount_nanos)
    body = {**stamp, "refunded_request_id": request_id, "amount_nanos": amount}
    body |= {"reason": reason, "idempotency_key": idempotency_key}
    return cast(Refund, await call(client, "refund_request", {"p": body}))


async def list_transactions(
    client: AsyncClient, user_id: int | None, *, within: Range = (None, None), before: int | None, limit: int
) -> list[Transaction]:
    """Credit transactions, a user's or everybody's, newest first; `before` is the id of the last row seen."""
    query = _within(client.table("credit_transactions").select(columns_of(Transaction)), within)
    if user_id is not None:
        query = query.eq("user_id", user_id)
    return cast(list[Transaction], await execute(_page_by_id(query, before, limit)))


# Usage.


async def list_usage_records(
    client: AsyncClient,
    user_id: int,
    *,
    within: Range = (None, None),
    before: tuple[str, str] | None,
    limit: int,
) -> list[UsageRecord]:
    """A user's records, newest first; `before` is the (created_at, request_id) of the last row seen."""
    query = client.table("usage_records").select(columns_of(UsageRecord)).eq("user_id", user_id)
    query = _within(query, within)
    if before is not None:
        moment, request_id = before
        # The first condition is implied by the second, and is the one that an index is used for.
        query = query.lte("created_at", moment)
        query = query.or_(
            f'created_at.lt."{moment}",and(created_at.eq."{moment}",request_id.lt.{request_id})'
        )
    query = query.order("created_at", desc=True).order("request_id", desc=True)
    return cast(list[UsageRecord], await execute(query.limit(limit)))


async def list_all_usage_records(
    client: AsyncClient, *, within: Range, before: tuple[str, str] | None, limit: int
) -> list[UsageRecord]:
    """Everybody's records, newest first, in the order of their ids, which are times (UUIDv7)."""
    query = _within(client.table("usage_records").select(columns_of(UsageRecord)), within)
    start, end = within
    # Implied by the range, and what the primary key is used for: there is no index on created_at alone.
    if start is not None:
        query = query.gte("request_id", _first_id(start - CLOCKS_APART))
    if end is not None:
        query = query.lt("request_id", _first_id(end + CLOCKS_APART))
    if before is not None:
        query = query.lt("request_id", before[1])
    return cast(list[UsageRecord], await execute(query.order("request_id", desc=True).limit(limit)))


async def get_record(client: AsyncClient, request_id: str) -> UsageRecord | None:
    """Anybody's usage record, for an administrator."""
    rows = await execute(client.table("usage_records").select("*").eq("request_id", request_id).limit(1))
    return cast(UsageRecord, rows[0]) if rows else None


async def read_receipt(client: AsyncClient, user_id: int, request_id: str) -> ReceiptRow | None:
    """A usage record of this user, with its refunds."""
    body = {"p_user_id": user_id, "p_request_id": request_id}
    return cast(ReceiptRow | None, await call(client, "read_receipt", body))


async def find_generation(
    client: AsyncClient, user_id: int, generation_id: str, *, around: str | None
) -> UsageRecord | None:
    """This user's newest usage record with this generation id, looked for `around` a time, or in the last
    day.
    """
    body = {"p_user_id": user_id, "p_generation_id": generation_id, "p_around": around}
    return cast(UsageRecord | None, await call(client, "find_generation", body))


# Reports.


async def report_usage(
    client: AsyncClient, *, user_id: int | None, report: ReportRange, group: str
) -> list[ReportRow]:
    """Settled requests by time and group."""
    body = {"p_user_id": user_id, **_as_parameters(report), "p_group": group}
    return cast(list[ReportRow], await call(client, "report_usage", body))


async def report_end_users(client: AsyncClient, *, user_id: int, report: ReportRange) -> list[ReportRow]:
    """The same for one user, by their end users."""
    body = {"p_user_id": user_id, **_as_parameters(report)}
    return cast(list[ReportRow], await call(client, "report_end_users", body))


async def sum_up_usage(client: AsyncClient) -> bool:
    """Sums up what is closed, at most a day of it; returns whether there is more."""
    return bool(await call(client, "sum_up_usage", {}))


async def usage_metrics(client: AsyncClient, user_id: int) -> UsageMetrics:
    return cast(UsageMetrics, await call(client, "usage_metrics", {"p_user_id": user_id}))


async def system_metrics(client: AsyncClient) -> SystemMetrics:
    return cast(SystemMetrics, await call(client, "system_metrics", {}))


# Budgets.


async def list_end_user_budgets(
    client: AsyncClient, user_id: int, *, before: int | None, limit: int
) -> list[EndUserBudget]:
    """A user's budgets for their customers, newest first, each with what is used of it."""
    page = {"p_user_id": user_id, "p_before": before, "p_limit": limit}
    return cast(list[EndUserBudget], await call(client, "list_end_user_budgets", page))


async def end_user_standing(
    client: AsyncClient, user_id: int, end_user: str, *, now: str
) -> EndUserBudget | None:
    """The budget that applies to an end user, their own or that of `*`, and what is used of it; None where
    none does.
    """
    body = {"p_user_id": user_id, "p_end_user": end_user, "p_now": now}
    return cast(EndUserBudget | None, await call(client, "end_user_standing", body))


async def create_end_user_budget(
    client: AsyncClient, stamp: CallerStamp, *, end_user: str, budget_nanos: int, budget_window: Window
) -> BudgetCreation:
    body = {**stamp, "end_user": end_user, "budget_nanos": str(budget_nanos), "budget_window": budget_window}
    return cast(BudgetCreation, await call(client, "create_end_user_budget", {"p": body}))


async def update_end_user_budget(
    client: AsyncClient,
    stamp: CallerStamp,
    budget_id: int,
    *,
    budget_nanos: int | None,
    budget_window: Window | None,
) -> BudgetUpdate:
    """Changes a budget; None leaves it as it is."""
    amount = None if budget_nanos is None else str(budget_nanos)
    changes = _without_none(budget_nanos=amount, budget_window=budget_window)
    body = {**stamp, "budget_id": budget_id, "changes": changes}
    return cast(BudgetUpdate, await call(client, "update_end_user_budget", {"p": body}))


async def delete_end_user_budget(client: AsyncClient, stamp: CallerStamp, budget_id: int) -> Deletion:
    body = {**stamp, "budget_id": budget_id}
    return cast(Deletion, await call(client, "delete_end_user_budget", {"p": body}))


async def list_budget_events(
    client: AsyncClient, user_id: int, *, before: int | None, limit: int
) -> list[BudgetEvent]:
    """The levels that budgets of a user's keys and end users have reached, newest first."""
    query = client.table("budget_events").select(columns_of(BudgetEvent)).eq("user_id", user_id)
    return cast(list[BudgetEvent], await execute(_page_by_id(query, before, limit)))


# Webhooks.


async def list_webhooks(client: AsyncClient, user_id: int) -> list[Webhook]:
    """A user's webhooks, oldest first, without their secrets."""
    query = client.table("webhooks").select(columns_of(Webhook)).eq("user_id", user_id)
    return cast(list[Webhook], await execute(query.order("id")))


async def create_webhook(
    client: AsyncClient, stamp: CallerStamp, *, url: str, encrypted_secret: str
) -> WebhookCreation:
    body = {**stamp, "url": url, "encrypted_secret": encrypted_secret}
    return cast(WebhookCreation, await call(client, "create_webhook", {"p": body}))


async def update_webhook(
    client: AsyncClient,
    stamp: CallerStamp,
    webhook_id: int,
    *,
    url: str | None,
    is_active: bool | None,
    encrypted_secret: str | None,
    grace_seconds: int,
) -> WebhookUpdate:
    """Changes a webhook; None leaves it as it is. A replaced secret signs for `grace_seconds` more."""
    changes = _without_none(url=url, is_active=is_active, encrypted_secret=encrypted_secret)
    body = {**stamp, "webhook_id": webhook_id, "changes": changes, "grace_seconds": grace_seconds}
    return cast(WebhookUpdate, await call(client, "update_webhook", {"p": body}))


async def delete_webhook(client: AsyncClient, stamp: CallerStamp, webhook_id: int) -> Deletion:
    return cast(Deletion, await call(client, "delete_webhook", {"p": {**stamp, "webhook_id": webhook_id}}))


async def queue_webhook_test(client: AsyncClient, stamp: CallerStamp, webhook_id: int) -> WebhookTest:
    """Queues a delivery without an event, one a minute for each webhook."""
    body = {**stamp, "webhook_id": webhook_id}
    return cast(WebhookTest, await call(client, "queue_webhook_test", {"p": body}))


async def get_delivery(client: AsyncClient, user_id: int, delivery_id: int) -> Delivery | None:
    query = client.table("webhook_deliveries").select(columns_of(Delivery)).eq("user_id", user_id)
    rows = await execute(query.eq("id", delivery_id).limit(1))
    return cast(Delivery, rows[0]) if rows else None


async def list_deliveries(
    client: AsyncClient, user_id: int, *, before: int | None, limit: int
) -> list[Delivery]:
    """A user's deliveries, newest first; `before` is the id of the last row seen."""
    query = client.table("webhook_deliveries").select(columns_of(Delivery)).eq("user_id", user_id)
    return cast(list[Delivery], await execute(_page_by_id(query, before, limit)))


async def claim_deliveries(
    client: AsyncClient, *, limit: int, lease_seconds: int, delivery_id: int | None
) -> list[ClaimedDelivery]:
    """Deliveries that are due, or just the one that `delivery_id` names. Until the lease ends nobody else
    gets them.
    """
    body = {"p_limit": limit, "p_lease_seconds": lease_seconds, "p_delivery_id": delivery_id}
    return cast(list[ClaimedDelivery], await call(client, "claim_deliveries", body))


async def finish_delivery(client: AsyncClient, attempt: DeliveryAttempt) -> DeliveryFinish:
    """Notes what became of an attempt. `stale`: the lease had ended."""
    return cast(DeliveryFinish, await call(client, "finish_delivery", {"p": attempt}))


# Reconciliation.


async def reconcile_costs(client: AsyncClient) -> CostsByWindow:
    """The mode, and what live requests cost in the UTC day, week and month."""
    return cast(CostsByWindow, await call(client, "reconcile_costs", {}))


async def note_open_items(client: AsyncClient) -> None:
    """Notes what is open in the part of the journal that has been closed since the last time."""
    await call(client, "note_open_items", {})


async def list_open_items(
    client: AsyncClient, kind: str, *, before: str | None, limit: int
) -> list[OpenItem]:
    """Requests that are `expired`, `unknown` in their cost, or an `overrun`, newest first; `before` is the id
    of the last one seen.
    """
    page = {"p_kind": kind, "p_before": before, "p_limit": limit}
    return cast(list[OpenItem], await call(client, "list_open_items", page))


# What several of them need.


def _page_by_id(query: Select, before: int | None, limit: int) -> Select:
    query = query if before is None else query.lt("id", before)
    return query.order("id", desc=True).limit(limit)


def _within(query: Select, within: Range) -> Select:
    start, end = within
    query = query if start is None else query.gte("created_at", start.isoformat())
    return query if end is None else query.lt("created_at", end.isoformat())


def _first_id(moment: datetime.datetime) -> str:
    """The smallest UUIDv7 of a moment."""
    return str(UUID(int=max(0, int(moment.timestamp() * 1000)) << 80))


def _as_parameters(report: ReportRange) -> dict[str, object]:
    return {f"p_{name}": value for name, value in report.items()}


def _without_none(**changes: object) -> dict[str, object]:
    """The changes that were asked for."""
    return {name: value for name, value in changes.items() if value is not None}
