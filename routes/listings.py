"""Usage records, credit transactions and the audit log as lists: a user's own, or everybody's."""

from __future__ import annotations

import datetime
import functools
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Query, Request
from fastapi.responses import Response

import db
import db_security
from common.errors import BadRequest
from common.money import credits_from_nanos, in_credits
from db_rows.books import Transaction as TransactionRow
from db_rows.books import UsageRecord as RecordRow
from db_rows.keys import AuditEntry
from db_security import AuditFilter
from gateway.runtime.instance import Runtime
from models import AdminTransaction, AdminUsageRecord, Transaction, UsageRecord
from routes.http.export import Listing, RowT, export
from routes.http.pagination import BY_ID, BY_MOMENT, NO_NUL, Cursor, MarkT, QueryId
from routes.http.responses import success
from routes.schemas.keys import AuditLog, Moment

PAGE_ROWS = 100
Form = Annotated[
    Literal["json", "csv", "jsonl"],
    Query(description="`json` is a page; `csv` and `jsonl` (JSON lines) are all of it, streamed"),
]
Rows = Annotated[
    int | None,
    Query(
        ge=1,
        le=1000,
        description="Rows a page, 100 unless said otherwise; of an export the most, all without",
    ),
]


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a list, and in which form."""

    limit: int | None
    cursor: str | None
    form: str


def _part(limit: Rows = None, cursor: Cursor = None, format: Form = "json") -> Part:
    return Part(limit, cursor, format)


def check_range(
    start: datetime.datetime | None, end: datetime.datetime | None, names: tuple[str, str] = ("start", "end")
) -> db.Range:
    """Both as a range. Raises BadRequest for times in the wrong order."""
    if start is not None and end is not None and start >= end:
        raise BadRequest(f"`{names[1]}` must be after `{names[0]}`.", param=names[1])
    return start, end


def _within(start: Moment | None = None, end: Moment | None = None) -> db.Range:
    return check_range(start, end)


def _events(
    key_id: QueryId = None,
    action: Annotated[str | None, Query(max_length=64, pattern=NO_NUL)] = None,
    start_date: Moment | None = None,
    end_date: Moment | None = None,
) -> AuditFilter:
    start, end = check_range(start_date, end_date, ("start_date", "end_date"))
    return AuditFilter(key_id=key_id, action=action, start=start, end=end)


AnyPart = Annotated[Part, Depends(_part)]
Within = Annotated[db.Range, Depends(_within)]
Events = Annotated[AuditFilter, Depends(_events)]


async def list_response(
    request: Request, listing: Listing[RowT, MarkT], part: Part, field: str, *, counted: str | None = None
) -> Response:
    """A page of a list as `field`, with its number of rows as `counted`; or all of the list as an export.
    Raises BadRequest for the cursor.
    """
    before = listing.order.read(part.cursor)
    if part.form != "json":
        return await export(request, listing, part.form, before=before, most=part.limit)
    limit = part.limit or PAGE_ROWS
    rows = await listing.fetch(before, limit)
    count = {} if counted is None else {counted: len(rows)}
    following = listing.order.following(rows, limit)
    return success(**count, **{field: [listing.show(row) for row in rows]}, next_cursor=following)


def records(runtime: Runtime, user_id: int, within: db.Range) -> Listing[RecordRow, tuple[str, str]]:
    """One user's records."""

    async def fetch(before: tuple[str, str] | None, limit: int) -> list[RecordRow]:
        return await db.list_usage_records(runtime.client, user_id, within=within, before=before, limit=limit)

    return Listing("usage-records", UsageRecord, BY_MOMENT, fetch, show_record)


def all_records(
    runtime: Runtime, user_id: int | None, within: db.Range
) -> Listing[RecordRow, tuple[str, str]]:
    """Everybody's records, or one user's, for an administrator."""

    async def fetch(before: tuple[str, str] | None, limit: int) -> list[RecordRow]:
        client = runtime.client
        if user_id is None:
            return await db.list_all_usage_records(client, within=within, before=before, limit=limit)
        return await db.list_usage_records(client, user_id, within=within, before=before, limit=limit)

    show = functools.partial(show_record, kind=AdminUsageRecord)
    return Listing("usage-records", AdminUsageRecord, BY_MOMENT, fetch, show)


def transactions(runtime: Runtime, user_id: int, within: db.Range) -> Listing[TransactionRow, int]:
    """One user's transactions."""

    async def fetch(before: int | None, limit: int) -> list[TransactionRow]:
        return await db.list_transactions(runtime.client, user_id, within=within, before=before, limit=limit)

    return Listing("transactions", Transaction, BY_ID, fetch, show_transaction)


def all_transactions(runtime: Runtime, user_id: int | None, within: db.Range) -> Listing[TransactionRow, int]:
    """Everybody's transactions, or one user's, for an administrator."""

    async def fetch(before: int | None, limit: int) -> list[TransactionRow]:
        return await db.list_transactions(runtime.client, user_id, within=within, before=before, limit=limit)

    show = functools.partial(show_transaction, kind=AdminTransaction)
    return Listing("transactions", AdminTransaction, BY_ID, fetch, show)


def own_audit(runtime: Runtime, events: AuditFilter) -> Listing[AuditEntry, int]:
    """What happened to a user's own account, without the addresses from which others acted."""

    async def fetch(before: int | None, limit: int) -> list[AuditEntry]:
        return await db_security.list_own_audit(runtime.client, events, before=before, limit=limit)

    return Listing("audit-log", AuditLog, BY_ID, fetch, AuditLog.model_validate)


def audit(runtime: Runtime, events: AuditFilter) -> Listing[AuditEntry, int]:
    """What happened, for an administrator."""

    async def fetch(before: int | None, limit: int) -> list[AuditEntry]:
        return await db_security.list_audit_logs(runtime.client, events, before=before, limit=limit)

    return Listing("audit-log", AuditLog, BY_ID, fetch, AuditLog.model_validate)


def show_record(row: RecordRow, kind: type[UsageRecord] = UsageRecord) -> UsageRecord:
    """A row as clients see it, with its amounts in credits."""
    return kind.model_validate({**in_credits(row), "held": credits_from_nanos(row["hold_nanos"])})


def show_transaction(row: TransactionRow, kind: type[Transaction] = Transaction) -> Transaction:
    """A row as clients see it, with its amounts in credits."""
    return kind.model_validate(in_credits(row))
