"""Administrators' endpoints for accounts: credits, rate limits, plans, and the users themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response

import db
import db_security
from common.errors import BadRequest, Conflict, GatewayError, NotFound
from common.money import credits_from_nanos, in_credits, nanos_from_credits, plain
from db_rows.accounts import User
from db_rows.books import CreditChange, MoreThanAvailable, Refunded
from db_rows.shared import Refused
from db_rows.shared import Target as TargetItem
from gateway.runtime.instance import Runtime
from models import (
    CreditGrant,
    CreditsGranted,
    LimitOrder,
    LimitsSet,
    PlanAssigned,
    PlanOrder,
    RateLimits,
    Target,
    errors_of,
)
from routes.account import shown_metrics
from routes.dependencies import AdminOnly, Declared, Running
from routes.http.json_body import ExactRoute
from routes.http.outcomes import no_such_target
from routes.http.pagination import BY_ID, NO_NUL, Cursor, PageSize, PathId, id_of
from routes.http.responses import JsonResponse, success
from routes.keys import view
from routes.schemas.accounts import Adjustment, Refund, UserChange

router = APIRouter(
    prefix="/admin",
    route_class=ExactRoute,
    tags=["admin"],
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 409, 429, 503),
)


KEY_USED = "This idempotency_key was used for a different request. Use a new one."
TOO_LARGE = "`credits`: the balance would exceed 9,000,000,000 credits, the most that an account can have."
HELD = "what running requests hold cannot"
NO_REQUEST = "There is no request with this id. It is the `x-request-id` of the request's answer."
STILL_RUNS = "This request still runs, or its cost is not known yet. It can be refunded once it is settled."
PLAY_CREDITS = "This request was paid with play credits of the sandbox, which are not refunded."


Corrected = (
    CreditChange[Literal["granted", "repeated"]] | CreditChange[Literal["adjusted", "repeated"]] | Refunded
)


@router.post("/add_credits", summary="Grant credits", response_model=CreditsGranted)
async def add_credits(runtime: Running, body: CreditGrant, admin: AdminOnly) -> Response:
    result = await db.grant_credits(
        runtime.client,
        admin.stamp(),
        _target(body, runtime),
        amount_nanos=nanos_from_credits(body.credits),
        reason=body.reason,
        idempotency_key=body.idempotency_key,
    )
    if result["outcome"] != "granted" and result["outcome"] != "repeated":
        raise _correction_refusal(result, _target_field(body))
    added = result["outcome"] == "granted"
    message = f"Added {plain(body.credits)} credits" if added else "Was granted before; nothing added"
    return JsonResponse(CreditsGranted(status="success", message=message, **_new_balance(result)))


@router.post("/limit", summary="Set the rate limits of a user or a key", response_model=LimitsSet)
async def set_limits(runtime: Running, body: LimitOrder, admin: AdminOnly) -> Response:
    changes = body.rate_limits.model_dump(exclude_unset=True)
    subject: Literal["user", "key"] = "user" if body.api_key is None else "key"
    result = await db.set_rate_limits(
        runtime.client, admin.stamp(), _target(body, runtime), subject=subject, limits=changes
    )
    if result["outcome"] == "not_found":
        raise no_such_target(_target_field(body))
    current: Mapping[str, object] = result["limits"]
    limits = RateLimits.model_validate({name: current[name] for name in RateLimits.model_fields})
    message, user_id = f"Limits of this {subject} are set", result["user_id"]
    return JsonResponse(LimitsSet(status="success", message=message, user_id=user_id, rate_limits=limits))


@router.post("/assign-plan", summary="Give a user a plan, from now on", response_model=PlanAssigned)
async def assign_plan(runtime: Running, body: PlanOrder, admin: AdminOnly) -> Response:
    result = await db.assign_plan(runtime.client, admin.stamp(), **body.model_dump())
    if result["outcome"] == "plan_not_found":
        raise NotFound("There is no such plan.", param="plan_id")
    if result["outcome"] == "not_found":
        raise no_such_target("user_id")
    message = f"Assigned the plan {result['plan_name']}"
    return JsonResponse(
        PlanAssigned(status="success", message=message, end_date=result["end_date"], **body.model_dump())
    )


@router.post("/adjust_credits", summary="Correct a balance, up or down")
async def adjust_credits(runtime: Running, body: Adjustment, admin: AdminOnly) -> Response:
    result = await db.adjust_credits(
        runtime.client,
        admin.stamp(),
        _target(body, runtime),
        amount_nanos=nanos_from_credits(body.credits),
        reason=body.reason,
        idempotency_key=body.idempotency_key,
    )
    if result["outcome"] != "adjusted" and result["outcome"] != "repeated":
        raise _correction_refusal(result, _target_field(body))
    return success(message=_done(result, "Adjusted"), **_new_balance(result))


@router.post("/refund", summary="Give back what a request cost, or part of it")
async def refund(runtime: Running, body: Refund, admin: AdminOnly) -> Response:
    result = await db.refund_request(
        runtime.client,
        admin.stamp(),
        str(body.request_id),
        amount_nanos=None if body.credits is None else nanos_from_credits(body.credits),
        reason=body.reason,
        idempotency_key=body.idempotency_key,
    )
    if result["outcome"] == "too_much":
        raise await _too_much_to_refund(runtime, body, result["refundable_nanos"])
    if result["outcome"] != "refunded" and result["outcome"] != "repeated":
        raise _refund_refusal(result["outcome"])
    return success(
        message=_done(result, "Refunded"),
        **_new_balance(result),
        refunded=credits_from_nanos(result["amount_nanos"]),
    )


# Whom and what a correction names, and what became of it.


def _target(body: Target, runtime: Runtime) -> TargetItem:
    hashes = [] if body.api_key is None else runtime.keyring.hashes(body.api_key)
    return {"user_id": body.user_id, "hashes": hashes}


def _target_field(body: Target) -> str:
    return "user_id" if body.api_key is None else "api_key"


def _done(result: Corrected, message: str) -> str:
    return "Was done before; nothing changed" if result["outcome"] == "repeated" else message


def _new_balance(result: Corrected) -> dict[str, Any]:
    return {
        "new_balance": credits_from_nanos(result["balance_nanos"]),
        "user_id": result["user_id"],
        "transaction_id": result["transaction_id"],
    }


def _correction_refusal(
    result: MoreThanAvailable | Refused[Literal["conflict", "too_large", "not_found"]], target_field: str
) -> GatewayError:
    match result["outcome"]:
        case "conflict":
            return Conflict(KEY_USED, param="idempotency_key")
        case "too_large":
            return BadRequest(TOO_LARGE, param="credits")
        case "not_found":
            return no_such_target(target_field)
        case "too_much":
            most = plain(credits_from_nanos(result["available_nanos"]))
            message = f"`credits`: at most {most} can be taken from this account; {HELD}."
            return BadRequest(message, param="credits")


def _refund_refusal(outcome: Literal["conflict", "not_settled", "not_found"]) -> GatewayError:
    match outcome:
        case "conflict":
            return Conflict(KEY_USED, param="idempotency_key")
        case "not_settled":
            return Conflict(STILL_RUNS, param="request_id")
        case "not_found":
            return NotFound(NO_REQUEST, param="request_id")


async def _too_much_to_refund(runtime: Runtime, body: Refund, refundable_nanos: int) -> BadRequest:
    # The outcome says how much is left, but not why nothing is: the record does.
    row = await db.get_record(runtime.client, str(body.request_id))
    cost = credits_from_nanos(row["cost_nanos"] if row else 0)
    if refundable_nanos:
        most = plain(credits_from_nanos(refundable_nanos))
        return BadRequest(
            f"`credits`: at most {most} of the {plain(cost)} that this request cost can still be refunded.",
            param="credits",
        )
    if not cost:
        message = "Nothing was charged for this request, so there is nothing to refund."
    elif row and row["mode"] != runtime.mode:
        message = PLAY_CREDITS
    else:
        message = f"All {plain(cost)} credits that this request cost have been refunded already."
    return BadRequest(message, param="request_id")


# Users.


@router.get("/users", summary="Accounts; search by name or email")
async def list_users(
    runtime: Running,
    admin: AdminOnly,
    search: Annotated[str | None, Query(max_length=254, pattern=NO_NUL)] = None,
    limit: PageSize = 100,
    cursor: Cursor = None,
) -> Response:
    rows = await db.list_users(runtime.client, text=search, before=id_of(cursor), limit=limit)
    return success(users=[in_credits(row) for row in rows], next_cursor=BY_ID.following(rows, limit))


@router.get("/users/{user_id}", summary="One account, with its keys and limits")
async def read_user(runtime: Running, user_id: PathId, admin: AdminOnly) -> Response:
    row = await db.get_user(runtime.client, user_id)
    if row is None:
        raise NotFound("There is no such user.", param="user_id")
    keys = [view(key) for key in await db_security.list_keys(runtime.client, user_id)]
    metrics = shown_metrics(await db.usage_metrics(runtime.client, user_id))
    return success(user=in_credits(row), keys=keys, usage_metrics=metrics)


@router.put("/users/{user_id}", summary="Suspend or restore an account, or change its role")
async def set_user(runtime: Running, user_id: PathId, body: UserChange, admin: AdminOnly) -> Response:
    result = await db.set_user(
        runtime.client, admin.stamp(), user_id, is_active=body.is_active, role=body.role
    )
    if result["outcome"] == "not_found":
        raise no_such_target("user_id")
    row = await db.get_user(runtime.client, user_id)
    return success(user=None if row is None else in_credits(row))


@router.get("/balance", summary="Every account's balance")
async def read_balances(
    runtime: Running, admin: AdminOnly, limit: PageSize = 100, cursor: Cursor = None
) -> Response:
    rows = await db.list_users(runtime.client, text=None, before=id_of(cursor), limit=limit)
    keys = await db_security.list_primary_keys(runtime.client, [row["id"] for row in rows])
    users = [_balance(row, keys.get(row["id"])) for row in rows]
    total = await db.count_users(runtime.client)
    return success(total_users=total, users=users, next_cursor=BY_ID.following(rows, limit))


def _balance(row: User, masked_key: str | None) -> dict[str, object]:
    return {
        "user_id": row["id"],
        "username": row["username"],
        "api_key": masked_key,
        "credits": credits_from_nanos(row["credits_nanos"]),
        "held": credits_from_nanos(row["held_nanos"]),
    }
