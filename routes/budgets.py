"""A user's own upstream key, and the budgets of the user's customers (end users).

A request names its end user in the header `x-end-user`, or else in OpenAI's field `user` (Anthropic's
`metadata.user_id`).
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

import db
import db_security
from common.errors import BadRequest, Conflict, Forbidden, NotFound, UpstreamUnavailable
from common.money import credits_from_nanos, nanos_from_credits
from db_rows.accounts import EndUserBudget
from gateway.runtime.instance import Runtime
from models import errors_of
from routes.dependencies import Caller, Declared, Running, get_api_key
from routes.http.json_body import ExactRoute
from routes.http.outcomes import caller_gone
from routes.http.pagination import Cursor, PageSize, PathId, cursor_of, id_of
from routes.http.responses import JsonResponse, success, utc_now
from routes.schemas.spending import (
    EndUserChange,
    EndUserOrder,
    EndUsers,
    EndUserView,
    ProviderKeyOrder,
    ProviderKeyView,
)

router = APIRouter(
    prefix="/user",
    tags=["spending"],
    route_class=ExactRoute,
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 409, 503),
)

AccountReader = Annotated[Caller, get_api_key("read", "account")]
AccountWriter = Annotated[Caller, get_api_key("write", "account")]
BudgetReader = Annotated[Caller, get_api_key("read", "budgets")]
BudgetWriter = Annotated[Caller, get_api_key("write", "budgets")]
LABEL_START, LABEL_END = 12, 3
NO_PROVIDER_KEY = "You have no upstream key of your own here."
FORGOTTEN = "Your key is forgotten: requests use the gateway's account, and your credits, again."
NO_BUDGET = "There is no such budget."
BUDGET_GONE = "The budget is gone; that of `*` applies, if there is one."
TOO_MANY = "You have 10,000 budgets, the most that are allowed. One for `*` applies to everybody else."


# The user's own upstream key.


@router.get("/provider-key", summary="Your own OpenRouter key, masked", response_model=ProviderKeyView)
async def read_provider_key(runtime: Running, caller: AccountReader) -> Response:
    row = await db_security.get_provider_key(runtime.client, caller.user_id)
    if row is None:
        raise NotFound(NO_PROVIDER_KEY)
    return JsonResponse(ProviderKeyView(status="success", provider_key={**row}))


@router.put(
    "/provider-key", summary="Send your requests with your own OpenRouter key", response_model=ProviderKeyView
)
async def set_provider_key(runtime: Running, body: ProviderKeyOrder, caller: AccountWriter) -> Response:
    """Kept encrypted, shown masked. From then on OpenRouter bills you for your requests; they are metered and
    limited here, not charged.
    """
    forbid_test_key(caller)
    checked = await _check(runtime, body.key)
    label = f"{body.key[:LABEL_START]}...{body.key[-LABEL_END:]}"
    encrypted = runtime.vault.encrypt(body.key)
    result = await db_security.set_provider_key(
        runtime.client, caller.stamp(), encrypted_key=encrypted, label=label
    )
    if result["outcome"] == "not_found":
        raise caller_gone()
    provider_key = {name: value for name, value in result.items() if name != "outcome"}
    return JsonResponse(ProviderKeyView(status="success", provider_key=provider_key, checked=checked))


@router.delete("/provider-key", summary="Forget your own OpenRouter key")
async def delete_provider_key(runtime: Running, caller: AccountWriter) -> Response:
    forbid_test_key(caller)
    result = await db_security.delete_provider_key(runtime.client, caller.stamp())
    if result["outcome"] == "not_found":
        raise NotFound(NO_PROVIDER_KEY)
    return success(message=FORGOTTEN)


async def _check(runtime: Runtime, key: str) -> bool:
    """Whether the upstream was asked about a key. Raises BadRequest for one that it refuses. A key that
    cannot be checked now is stored unchecked.
    """
    if runtime.mode != "live":
        return False  # a key of OpenRouter's means nothing to the sandbox
    try:
        account = await runtime.upstream(None).read_account(api_key=key)
    except UpstreamUnavailable:
        # An outage must not keep anybody from replacing a key. A wrong one shows with the first request.
        return False
    if account is None:
        message = "`key`: OpenRouter does not accept this key."
        raise BadRequest(message, param="key", code="provider_key_refused")
    return True


# Budgets of end users.


@router.get("/end-users", summary="Budgets of your customers, and how they stand", response_model=EndUsers)
async def list_end_users(
    runtime: Running,
    caller: BudgetReader,
    end_user: Annotated[
        str | None, Query(min_length=1, max_length=256, description="Only this one, who may be under `*`")
    ] = None,
    limit: PageSize = 100,
    cursor: Cursor = None,
) -> Response:
    if end_user is not None:
        name, now = _printable(end_user), utc_now().isoformat()
        row = await db.end_user_standing(runtime.client, caller.user_id, name, now=now)
        return _listed([] if row is None else [row], next_cursor=None)
    rows = await db.list_end_user_budgets(runtime.client, caller.user_id, before=id_of(cursor), limit=limit)
    return _listed(rows, next_cursor=cursor_of(str(rows[-1]["budget_id"])) if len(rows) == limit else None)


def _listed(rows: list[EndUserBudget], *, next_cursor: str | None) -> Response:
    views = [_view(row) for row in rows]
    return JsonResponse(EndUsers(status="success", end_users=views, next_cursor=next_cursor))


@router.post(
    "/end-users",
    summary="A budget for one of your customers, or for each (`*`)",
    response_model=EndUserView,
    status_code=201,
)
async def create_end_user(runtime: Running, body: EndUserOrder, caller: BudgetWriter) -> Response:
    forbid_test_key(caller)
    result = await db.create_end_user_budget(
        runtime.client,
        caller.stamp(),
        end_user=body.end_user,
        budget_nanos=nanos_from_credits(body.budget),
        budget_window=body.budget_window,
    )
    if result["outcome"] == "name_taken":
        raise Conflict("This end user has a budget already. Change it with PUT.", param="end_user")
    if result["outcome"] == "too_many":
        raise Conflict(TOO_MANY)
    if result["outcome"] == "not_found":
        raise caller_gone()
    return JsonResponse(_view(result), status_code=201)


@router.put("/end-users/{budget_id}", summary="Change a customer's budget", response_model=EndUserView)
async def update_end_user(
    runtime: Running, budget_id: PathId, body: EndUserChange, caller: BudgetWriter
) -> Response:
    forbid_test_key(caller)
    result = await db.update_end_user_budget(
        runtime.client,
        caller.stamp(),
        budget_id,
        budget_nanos=None if body.budget is None else nanos_from_credits(body.budget),
        budget_window=body.budget_window,
    )
    if result["outcome"] == "not_found":
        raise NotFound(NO_BUDGET, param="budget_id")
    return JsonResponse(_view(result))


@router.delete("/end-users/{budget_id}", summary="Take a customer's budget away")
async def delete_end_user(runtime: Running, budget_id: PathId, caller: BudgetWriter) -> Response:
    forbid_test_key(caller)
    result = await db.delete_end_user_budget(runtime.client, caller.stamp(), budget_id)
    if result["outcome"] == "not_found":
        raise NotFound(NO_BUDGET, param="budget_id")
    return success(message=BUDGET_GONE, deleted_id=budget_id)


def forbid_test_key(caller: Caller) -> None:
    """Raises Forbidden for a test key: one that is handed out for trials must not decide who pays, and who is
    told.
    """
    if caller.environment == "test":
        raise Forbidden("A test key cannot change this. Use a live one.")


def _printable(end_user: str) -> str:
    if not end_user.isprintable():
        raise BadRequest("`end_user`: takes printable characters only.", param="end_user")
    return end_user


def _view(row: EndUserBudget) -> EndUserView:
    budget, spent, held = row["budget_nanos"], row["spent_nanos"], row["held_nanos"]
    return EndUserView(
        id=row["budget_id"],
        end_user=row["end_user"],
        budget_of=row["budget_end_user"],
        budget=credits_from_nanos(budget),
        budget_window=row["budget_window"],
        window_start=row["window_start"],
        spent=credits_from_nanos(spent),
        held=credits_from_nanos(held),
        remaining=credits_from_nanos(max(0, budget - spent - held)),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
