"""What may an administrator change? Credits, limits and plans."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

import db
from errors import BadRequest, Conflict, NotFound
from models import CreditGrant, CreditsGranted, ErrorBody, LimitOrder, LimitsSet, PlanAssigned, PlanOrder, RateLimits, Target
from money import credits_from_nanos, nanos_from_credits, plain
from replies import Reply
from routes.exact import ExactRoute
from runtime import Runtime
from security import AdminOnly, Declared

router = APIRouter(
    prefix="/admin",
    route_class=ExactRoute,
    tags=["admin"],
    dependencies=Declared,
    responses={code: {"model": ErrorBody} for code in (400, 401, 403, 404, 409, 503)},
)


def _whom(target: Target, runtime: Runtime) -> dict[str, Any]:
    hashes = [] if target.api_key is None else runtime.keyring.hashes(target.api_key)
    return {"user_id": target.user_id, "hashes": hashes}


@router.post("/add_credits", summary="Grant credits", response_model=CreditsGranted)
async def add_credits(request: Request, order: CreditGrant, admin: AdminOnly) -> Response:
    runtime: Runtime = await request.app.state.runtime.ready()
    found = await db.grant_credits(
        runtime.client,
        {
            **admin.stamp(),
            **_whom(order, runtime),
            "amount_nanos": str(nanos_from_credits(order.credits)),
            "reason": order.reason,
            "idempotency_key": order.idempotency_key,
        },
    )
    if found["outcome"] == "too_large":
        raise BadRequest("`credits`: the balance would exceed what can be stored.", param="credits")
    if found["outcome"] == "conflict":
        raise Conflict("This idempotency_key belongs to another order.", param="idempotency_key")
    _require_found(found["outcome"])
    return Reply(
        CreditsGranted(
            status="success",
            message=f"Added {plain(order.credits)} credits" if found["outcome"] == "granted" else "Was granted before; nothing added",
            new_balance=credits_from_nanos(found["balance_nanos"]),
            user_id=found["user_id"],
            transaction_id=found["transaction_id"],
        )
    )


@router.post("/limit", summary="Set the rate limits of a user or a key", response_model=LimitsSet)
async def set_limits(request: Request, order: LimitOrder, admin: AdminOnly) -> Response:
    runtime: Runtime = await request.app.state.runtime.ready()
    limits = order.rate_limits.model_dump(exclude_unset=True)
    subject = "user" if order.api_key is None else "key"
    found = await db.set_rate_limits(runtime.client, {**admin.stamp(), **_whom(order, runtime), "subject": subject, "limits": limits})
    _require_found(found["outcome"])
    current = {name: found["limits"][name] for name in RateLimits.model_fields}
    message = f"Limits of this {subject} are set"
    return Reply(LimitsSet(status="success", message=message, user_id=found["user_id"], rate_limits=RateLimits(**current)))


@router.post("/assign-plan", summary="Give a user a plan, from now on", response_model=PlanAssigned)
async def assign_plan(request: Request, order: PlanOrder, admin: AdminOnly) -> Response:
    runtime: Runtime = await request.app.state.runtime.ready()
    found = await db.assign_plan(runtime.client, {**admin.stamp(), **order.model_dump()})
    if found["outcome"] == "plan_not_found":
        raise NotFound("There is no such plan.", param="plan_id")
    _require_found(found["outcome"])
    return Reply(
        PlanAssigned(
            status="success",
            message=f"Assigned the plan {found['plan_name']}",
            end_date=found["end_date"],
            **order.model_dump(),
        )
    )


def _require_found(outcome: str) -> None:
    if outcome == "not_found":
        raise NotFound("There is no such user or key.", code="user_not_found")
