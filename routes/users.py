"""What may a user see of their own account? Balance, usage and transactions."""

from __future__ import annotations

import base64
import binascii
import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

import db
from errors import BadRequest, NotFound
from models import Balance, ErrorBody, Transaction, Transactions, UsageRecord, UsageRecords
from money import credits_from_nanos
from replies import Reply
from runtime import Runtime
from security import Caller, Declared, may

router = APIRouter(
    prefix="/user",
    tags=["account"],
    dependencies=Declared,
    responses={code: {"model": ErrorBody} for code in (400, 401, 403, 503)},
)

PageSize = Annotated[int, Query(ge=1, le=1000, description="Rows a page")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before")]


@router.get("/balance", summary="What is left", response_model=Balance)
async def read_balance(request: Request, caller: Annotated[Caller, may("read", "balance")]) -> Response:
    runtime: Runtime = await request.app.state.runtime.ready()
    user = await db.get_user(runtime.client, caller.user_id)
    if user is None:
        raise NotFound("This account no longer exists.")
    credits, held = credits_from_nanos(user["credits_nanos"]), credits_from_nanos(user["held_nanos"])
    return Reply(
        Balance(
            api_key=caller.masked_key,
            credits=credits,
            held=held,
            available=credits - held,
            status="active" if user["is_active"] else "suspended",
            user_id=caller.user_id,
        )
    )


@router.get("/usage/records", summary="Each request, and what it cost", response_model=UsageRecords)
async def list_usage_records(
    request: Request, caller: Annotated[Caller, may("read", "usage")], limit: PageSize = 100, cursor: Cursor = None
) -> Response:
    runtime: Runtime = await request.app.state.runtime.ready()
    before = _read_record_cursor(cursor) if cursor else None
    rows = await db.list_usage_records(runtime.client, caller.user_id, before=before, limit=limit)
    following = _cursor(f"{rows[-1]['created_at']} {rows[-1]['request_id']}") if len(rows) == limit else None
    return Reply(UsageRecords(status="success", records=[_record(row) for row in rows], next_cursor=following))


@router.get("/transactions", summary="Grants, purchases, refunds and expiries", response_model=Transactions)
async def list_transactions(
    request: Request, caller: Annotated[Caller, may("read", "transactions")], limit: PageSize = 100, cursor: Cursor = None
) -> Response:
    runtime: Runtime = await request.app.state.runtime.ready()
    before = _read_id_cursor(cursor) if cursor else None
    rows = await db.list_transactions(runtime.client, caller.user_id, before=before, limit=limit)
    following = _cursor(str(rows[-1]["id"])) if len(rows) == limit else None
    return Reply(Transactions(status="success", transactions=[_transaction(row) for row in rows], next_cursor=following))


def _record(row: db.Row) -> UsageRecord:
    upstream = row.pop("upstream_cost_nanos")
    return UsageRecord(
        held=credits_from_nanos(row.pop("hold_nanos")),
        upstream_cost=None if upstream is None else credits_from_nanos(upstream),
        cost=credits_from_nanos(row.pop("cost_nanos")),
        overrun=credits_from_nanos(row.pop("overrun_nanos")),
        **row,
    )


def _transaction(row: db.Row) -> Transaction:
    return Transaction(
        amount=credits_from_nanos(row.pop("amount_nanos")),
        balance_after=credits_from_nanos(row.pop("balance_after_nanos")),
        **row,
    )


def _cursor(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _text_of(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
    except (binascii.Error, ValueError):
        raise BadRequest("This is no cursor of ours.", param="cursor") from None


def _read_record_cursor(cursor: str) -> tuple[str, str]:
    moment, _, request_id = _text_of(cursor).partition(" ")
    try:
        return datetime.datetime.fromisoformat(moment).isoformat(), str(UUID(request_id))
    except ValueError:
        raise BadRequest("This is no cursor of ours.", param="cursor") from None


def _read_id_cursor(cursor: str) -> int:
    text = _text_of(cursor)
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadRequest("This is no cursor of ours.", param="cursor")
    return int(text)
