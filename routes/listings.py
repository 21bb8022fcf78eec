"""Which lists are there, and how is a row of them shown? Usage records, credit transactions and the audit log; one's own or everybody's."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import db
import db_security
from db_security import AuditFilter
from models import AdminTransaction, AdminUsageRecord, Transaction, UsageRecord
from models_keys import AuditLog
from money import credits_from_nanos
from routes.exports import Listing
from routes.pages import cursor_of
from runtime import Runtime

PAGE_ROWS = 100


def records(runtime: Runtime, user_id: int, within: db.Range) -> Listing:
    """One user's records."""

    async def fetch(before: tuple[str, str] | None, limit: int) -> list[db.Row]:
        return await db.list_usage_records(runtime.client, user_id, within=within, before=before, limit=limit)

    return Listing("usage-records", UsageRecord, fetch, _moment_and_id, show_record)


def all_records(runtime: Runtime, user_id: int | None, within: db.Range) -> Listing:
    """Everybody's records, or one user's, for an administrator."""

    async def fetch(before: tuple[str, str] | None, limit: int) -> list[db.Row]:
        if user_id is not None:
            return await db.list_usage_records(runtime.client, user_id, within=within, before=before, limit=limit)
        return await db.list_all_usage_records(runtime.client, within=within, before=before, limit=limit)

    return Listing("usage-records", AdminUsageRecord, fetch, _moment_and_id, functools.partial(show_record, kind=AdminUsageRecord))


def transactions(runtime: Runtime, user_id: int, within: db.Range) -> Listing:
    """One user's transactions."""

    async def fetch(before: int | None, limit: int) -> list[db.Row]:
        return await db.list_transactions(runtime.client, user_id, within=within, before=before, limit=limit)

    return Listing("transactions", Transaction, fetch, _id, show_transaction)


def all_transactions(runtime: Runtime, user_id: int | None, within: db.Range) -> Listing:
    """Everybody's transactions, or one user's, for an administrator."""

    async def fetch(before: int | None, limit: int) -> list[db.Row]:
        return await db.list_transactions(runtime.client, user_id, within=within, before=before, limit=limit)

    return Listing("transactions", AdminTransaction, fetch, _id, functools.partial(show_transaction, kind=AdminTransaction))


def own_audit(runtime: Runtime, events: AuditFilter) -> Listing:
    """What happened to one's account; of what others did to it, not from where."""

    async def fetch(before: int | None, limit: int) -> list[db.Row]:
        return await db_security.list_own_audit(runtime.client, events, before=before, limit=limit)

    return Listing("audit-log", AuditLog, fetch, _id, lambda row: AuditLog(**row))


def audit(runtime: Runtime, events: AuditFilter) -> Listing:
    """What happened, for an administrator."""

    async def fetch(before: int | None, limit: int) -> list[db.Row]:
        return await db_security.list_audit_logs(runtime.client, events, before=before, limit=limit)

    return Listing("audit-log", AuditLog, fetch, _id, lambda row: AuditLog(**row))


def _moment_and_id(row: db.Row) -> tuple[str, str]:
    return row["created_at"], row["request_id"]


def _id(row: db.Row) -> int:
    return int(row["id"])


# Where the next page of a list begins.


def record_cursor(rows: Sequence[db.Row], limit: int | None) -> str | None:
    return cursor_of(" ".join(_moment_and_id(rows[-1]))) if len(rows) == (limit or PAGE_ROWS) else None


def id_cursor(rows: Sequence[db.Row], limit: int | None) -> str | None:
    return cursor_of(str(rows[-1]["id"])) if len(rows) == (limit or PAGE_ROWS) else None


# How a row is shown.


def show_record(row: db.Row, kind: type[UsageRecord] = UsageRecord) -> UsageRecord:
    upstream = row["upstream_cost_nanos"]
    amounts = {
        "held": credits_from_nanos(row["hold_nanos"]),
        "upstream_cost": None if upstream is None else credits_from_nanos(upstream),
        "cost": credits_from_nanos(row["cost_nanos"]),
        "overrun": credits_from_nanos(row["overrun_nanos"]),
    }
    return kind.model_validate({name: row[name] for name in kind.model_fields if name in row} | amounts)


def show_transaction(row: db.Row, kind: type[Transaction] = Transaction) -> Transaction:
    amounts = {"amount": credits_from_nanos(row["amount_nanos"]), "balance_after": credits_from_nanos(row["balance_after_nanos"])}
    return kind.model_validate({name: row[name] for name in kind.model_fields if name in row} | amounts)
