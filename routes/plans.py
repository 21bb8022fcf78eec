"""/plans, /user/plan and /admin/plans: the plans on offer, a user's own plan, and their administration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

import db
from common.errors import BadRequest, Conflict, NotFound
from common.money import in_credits, nanos_from_credits
from db_rows.accounts import Plan as PlanRow
from db_rows.shared import AdminStamp
from gateway.runtime.instance import Runtime
from models import errors_of
from routes.budgets import forbid_test_key
from routes.dependencies import AdminOnly, Caller, Declared, Running, get_api_key, running
from routes.http.json_body import ExactRoute
from routes.http.pagination import NO_NUL, PathId
from routes.http.responses import JsonResponse, success
from routes.schemas.accounts import Plan, PlanChange, PlanOrderNew

router = APIRouter(tags=["plans"], route_class=ExactRoute, responses=errors_of(400, 401, 403, 404, 409, 503))

# Columns in which null means unlimited.
NULLABLE = {
    "daily_request_limit",
    "monthly_request_limit",
    "daily_token_limit",
    "monthly_token_limit",
    "concurrency",
    "allowed_models",
}
BLANK = {"description": "", "price_per_month_nanos": 0, "features": [], "environment_factors": {}}
NO_PLAN = "You have no plan. GET /user/plan/usage shows the limits that apply without one."
PlanReader = Annotated[Caller, get_api_key("read", "plan")]


@router.get("/plans", summary="The plans on offer", response_model=list[Plan])
async def list_plans(runtime: Running) -> Response:
    return JsonResponse([shown_plan(row) for row in await db.list_plans(runtime.client)])


@router.get("/plans/{plan_id}", summary="One plan", response_model=Plan)
async def read_plan(request: Request, plan_id: PathId) -> Response:
    runtime = await running(request)
    row = await db.get_plan(runtime.client, plan_id)
    if row is None or not row["is_active"]:
        raise NotFound("There is no such plan.", param="plan_id")
    return JsonResponse(shown_plan(row))


@router.get("/user/plan", summary="Your plan; 404 without one", dependencies=Declared)
async def read_own_plan(runtime: Running, caller: PlanReader) -> Response:
    in_use = await db.read_limits(runtime.client, caller.user_id, caller.key_id)
    assigned = in_use["assigned"]
    if assigned is None:
        raise NotFound(NO_PLAN, code="no_plan")
    return success(
        plan=shown_plan(in_use["plan"]),
        limits=_limits(in_use["plan"]),
        start_date=assigned["start_date"],
        end_date=assigned["end_date"],
        is_active=assigned["is_active"],
    )


@router.delete("/user/plan", summary="Cancel your plan, from now on", dependencies=Declared)
async def cancel_plan(runtime: Running, caller: Annotated[Caller, get_api_key("write", "plan")]) -> Response:
    forbid_test_key(caller)
    result = await db.cancel_plan(runtime.client, caller.stamp())
    if result["outcome"] == "no_plan":
        raise NotFound("You have no plan.", code="no_plan")
    return success(message="The plan is cancelled", plan_id=result["plan_id"])


@router.get("/user/plan/usage", summary="What you have used of your plan's limits", dependencies=Declared)
async def read_plan_usage(runtime: Running, caller: PlanReader) -> Response:
    in_use = await db.read_limits(runtime.client, caller.user_id, caller.key_id)
    limits, used = _limits(in_use["plan"]), in_use["plan_used"]
    remaining = {name: None if most is None else max(0, most - used[name]) for name, most in limits.items()}
    return success(
        has_plan=in_use["assigned"] is not None,
        plan_name=in_use["plan"]["name"],
        usage=used,
        limits=limits,
        remaining=remaining,
        at_limit={name: left == 0 for name, left in remaining.items()},
    )


@router.get("/user/plan/entitlements", summary="What your plan allows", dependencies=Declared)
async def read_entitlements(
    runtime: Running,
    caller: PlanReader,
    feature: Annotated[str | None, Query(max_length=100, pattern=NO_NUL)] = None,
) -> Response:
    in_use = await db.read_limits(runtime.client, caller.user_id, caller.key_id)
    plan, assigned = in_use["plan"], in_use["assigned"]
    return JsonResponse(
        {
            "has_plan": assigned is not None,
            "plan_name": plan["name"],
            "limits": _limits(plan),
            "features": plan["features"],
            "allowed_models": plan["allowed_models"],
            "can_access_feature": None if feature is None else feature in plan["features"],
            "plan_expires": None if assigned is None else assigned["end_date"],
        }
    )


@router.post(
    "/admin/plans", summary="Make a plan", response_model=Plan, tags=["admin"], dependencies=Declared
)
async def create_plan(runtime: Running, body: PlanOrderNew, admin: AdminOnly) -> Response:
    plan = {**BLANK, **_columns(body), "slug": body.slug}
    result = await db.create_plan(runtime.client, admin.stamp(), plan)
    if result["outcome"] == "slug_taken":
        raise Conflict("There is a plan with this slug already.", param="slug")
    return JsonResponse(shown_plan(result["plan"]))


@router.put(
    "/admin/plans/{plan_id}",
    summary="Change a plan",
    response_model=Plan,
    tags=["admin"],
    dependencies=Declared,
)
async def update_plan(runtime: Running, plan_id: PathId, body: PlanChange, admin: AdminOnly) -> Response:
    return JsonResponse(shown_plan(await _change(runtime, admin.stamp(), plan_id, _columns(body))))


@router.delete(
    "/admin/plans/{plan_id}", summary="Take a plan off the list", tags=["admin"], dependencies=Declared
)
async def withdraw_plan(runtime: Running, plan_id: PathId, admin: AdminOnly) -> Response:
    await _change(runtime, admin.stamp(), plan_id, {"is_active": False})
    return success(message="The plan is no longer offered; those who have it keep it", plan_id=plan_id)


async def _change(
    runtime: Runtime, stamp: AdminStamp, plan_id: int, changes: Mapping[str, object]
) -> PlanRow:
    result = await db.update_plan(runtime.client, stamp, plan_id, changes)
    if result["outcome"] == "not_found":
        raise NotFound("There is no such plan.", param="plan_id")
    if result["outcome"] == "built_in":
        message = "This plan applies to everybody without a plan and cannot be taken off."
        raise BadRequest(message, param="plan_id")
    return result["plan"]


def _columns(body: PlanChange) -> dict[str, Any]:
    """The columns that a body sets. Raises BadRequest for null where it means nothing."""
    columns = body.model_dump(exclude_unset=True, exclude={"slug"})
    for name, value in columns.items():
        if value is None and name not in NULLABLE:
            raise BadRequest(f"`{name}` cannot be null.", param=name)
    if "price_per_month" in columns:
        columns["price_per_month_nanos"] = nanos_from_credits(columns.pop("price_per_month"))
    if (factors := columns.get("environment_factors")) is not None:
        # As texts: a JSON number would reach the database through a float.
        columns["environment_factors"] = {name: str(factor) for name, factor in factors.items()}
    return columns


def _limits(plan: PlanRow) -> dict[str, int | None]:
    return {
        "daily_requests": plan["daily_request_limit"],
        "daily_tokens": plan["daily_token_limit"],
        "monthly_requests": plan["monthly_request_limit"],
        "monthly_tokens": plan["monthly_token_limit"],
    }


def shown_plan(row: PlanRow) -> Plan:
    """A plan as clients see it."""
    return Plan.model_validate(in_credits(row))
