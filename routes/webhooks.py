"""/user/webhooks and /user/budget-events: who is told when a budget is spent, and what they were sent."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.responses import Response

import db
from common.errors import Conflict, GatewayError, NotFound, RateLimited
from common.money import in_credits
from db_rows.accounts import BudgetEvent as BudgetEventRow
from db_rows.accounts import Delivery, Webhook, WebhookTestTooSoon
from db_rows.shared import Refused
from gateway.webhooks.signature import new_secret
from models import errors_of
from routes.budgets import forbid_test_key
from routes.dependencies import Caller, Declared, Running, get_api_key
from routes.http.json_body import ExactRoute
from routes.http.outcomes import caller_gone
from routes.http.pagination import BY_ID, Cursor, PageSize, PathId, id_of
from routes.http.responses import JsonResponse, success
from routes.schemas.webhooks import (
    BudgetEvent,
    BudgetEvents,
    Deliveries,
    DeliveryTested,
    DeliveryView,
    WebhookChange,
    WebhookKept,
    WebhookOrder,
    Webhooks,
    WebhookView,
)

router = APIRouter(
    prefix="/user",
    tags=["spending"],
    route_class=ExactRoute,
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 409, 429, 503),
)

WebhookReader = Annotated[Caller, get_api_key("read", "webhooks")]
WebhookWriter = Annotated[Caller, get_api_key("write", "webhooks")]
MISSING = "There is no such webhook."
TOO_MANY = "You have five webhooks, the most that are allowed. Delete one first."
ARRIVED = "The test has arrived"
NOT_YET = "The test has not arrived yet; `last_error` says why"
SHOWN_ONCE = "Keep the secret: it is shown this once."
NEW_SHOWN_ONCE = "Keep the new secret: it is shown this once."


@router.get("/webhooks", summary="Your webhooks", response_model=Webhooks)
async def list_webhooks(runtime: Running, caller: WebhookReader) -> Response:
    rows = await db.list_webhooks(runtime.client, caller.user_id)
    return JsonResponse(
        Webhooks(status="success", webhooks=[WebhookView.model_validate(row) for row in rows])
    )


@router.post(
    "/webhooks",
    summary="Be told when a budget is half, four fifths or all spent",
    response_model=WebhookKept,
    status_code=201,
)
async def create_webhook(runtime: Running, body: WebhookOrder, caller: WebhookWriter) -> Response:
    """Deliveries are POSTs signed by the Standard Webhooks specification (`webhook-id`, `webhook-timestamp`,
    `webhook-signature`).
    """
    forbid_test_key(caller)
    secret = new_secret()
    encrypted = runtime.vault.encrypt(secret)
    result = await db.create_webhook(runtime.client, caller.stamp(), url=body.url, encrypted_secret=encrypted)
    if result["outcome"] == "too_many":
        raise Conflict(TOO_MANY)
    if result["outcome"] == "not_found":
        raise caller_gone()
    return _kept(result, SHOWN_ONCE, secret, status_code=201)


def _kept(row: Webhook, message: str, secret: str | None, *, status_code: int = 200) -> Response:
    webhook = WebhookView.model_validate(row)
    body = WebhookKept(status="success", message=message, webhook=webhook, secret=secret)
    return JsonResponse(body, status_code=status_code)


@router.get(
    "/webhooks/deliveries", summary="What was sent, and how it was received", response_model=Deliveries
)
async def list_deliveries(
    runtime: Running, caller: WebhookReader, limit: PageSize = 100, cursor: Cursor = None
) -> Response:
    rows = await db.list_deliveries(runtime.client, caller.user_id, before=id_of(cursor), limit=limit)
    following = BY_ID.following(rows, limit)
    return JsonResponse(
        Deliveries(status="success", deliveries=[_delivery(row) for row in rows], next_cursor=following)
    )


@router.put("/webhooks/{webhook_id}", summary="Change a webhook, or its secret", response_model=WebhookKept)
async def update_webhook(
    runtime: Running, webhook_id: PathId, body: WebhookChange, caller: WebhookWriter
) -> Response:
    forbid_test_key(caller)
    secret = new_secret() if body.rotate_secret else None
    result = await db.update_webhook(
        runtime.client,
        caller.stamp(),
        webhook_id,
        url=body.url,
        is_active=body.is_active,
        encrypted_secret=None if secret is None else runtime.vault.encrypt(secret),
        grace_seconds=body.grace_period,
    )
    if result["outcome"] == "not_found":
        raise NotFound(MISSING, param="webhook_id")
    return _kept(result, "The webhook is changed" if secret is None else NEW_SHOWN_ONCE, secret)


@router.delete("/webhooks/{webhook_id}", summary="Delete a webhook, and what is still to be sent to it")
async def delete_webhook(runtime: Running, webhook_id: PathId, caller: WebhookWriter) -> Response:
    forbid_test_key(caller)
    result = await db.delete_webhook(runtime.client, caller.stamp(), webhook_id)
    if result["outcome"] == "not_found":
        raise NotFound(MISSING, param="webhook_id")
    return success(message="The webhook is deleted", deleted_id=webhook_id)


@router.post(
    "/webhooks/{webhook_id}/test",
    summary="Send a test, and see how it is received",
    response_model=DeliveryTested,
)
async def test_webhook(runtime: Running, webhook_id: PathId, caller: WebhookWriter) -> Response:
    """One a minute for each webhook. A test that does not arrive is repeated like any delivery."""
    forbid_test_key(caller)
    result = await db.queue_webhook_test(runtime.client, caller.stamp(), webhook_id)
    if result["outcome"] != "queued":
        raise _test_refusal(result)
    await runtime.deliveries.deliver_due(delivery_id=result["delivery_id"])
    row = await db.get_delivery(runtime.client, caller.user_id, result["delivery_id"])
    if row is None:
        raise NotFound(MISSING, param="webhook_id")
    delivery = _delivery(row)
    message = ARRIVED if delivery.status == "delivered" else NOT_YET
    return JsonResponse(DeliveryTested(status="success", message=message, delivery=delivery))


def _test_refusal(result: WebhookTestTooSoon | Refused[Literal["inactive", "not_found"]]) -> GatewayError:
    match result["outcome"]:
        case "not_found":
            return NotFound(MISSING, param="webhook_id")
        case "inactive":
            return Conflict("This webhook is switched off.", param="webhook_id")
        case "too_soon":
            return RateLimited("One test a minute for each webhook.", retry_after=result["retry_after"])


@router.get(
    "/budget-events", summary="Which budgets are half, four fifths or all spent", response_model=BudgetEvents
)
async def list_budget_events(
    runtime: Running,
    caller: Annotated[Caller, get_api_key("read", "budgets")],
    limit: PageSize = 100,
    cursor: Cursor = None,
) -> Response:
    rows = await db.list_budget_events(runtime.client, caller.user_id, before=id_of(cursor), limit=limit)
    following = BY_ID.following(rows, limit)
    return JsonResponse(
        BudgetEvents(status="success", events=[_event(row) for row in rows], next_cursor=following)
    )


def _delivery(row: Delivery) -> DeliveryView:
    status = "delivered" if row["delivered_at"] else "failed" if row["failed_at"] else "pending"
    following = row["next_attempt_at"] if status == "pending" else None
    return DeliveryView.model_validate({**row, "next_attempt_at": following, "status": status})


def _event(row: BudgetEventRow) -> BudgetEvent:
    start = None if row["window_start"] == "-infinity" else row["window_start"]
    return BudgetEvent.model_validate({**in_credits(row), "window_start": start})
