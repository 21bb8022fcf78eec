"""Receipts of requests that were sent, and quotes of requests before they are sent."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Path
from fastapi.responses import Response

import db
from common.errors import NotFound
from common.money import credits_from_nanos, in_credits
from db_rows.books import ReceiptRow
from gateway.pricing.catalog import ModelIndex
from gateway.pricing.upper_bound import BoundPolicy
from gateway.proxy import quotes
from gateway.proxy.endpoints import endpoint_of
from gateway.proxy.request import end_user_of
from gateway.runtime.instance import Runtime
from models import errors_of
from routes.dependencies import Caller, Declared, Running, get_api_key
from routes.http.json_body import ExactRoute
from routes.http.responses import JsonResponse
from routes.schemas.spending import (
    Quote,
    QuoteOrder,
    Receipt,
    ReceiptCharge,
    ReceiptEnding,
    ReceiptHold,
    ReceiptRefund,
    ReceiptTimings,
    ReceiptTokens,
)

router = APIRouter(
    tags=["spending"],
    route_class=ExactRoute,
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 503),
)

MESSAGES = {
    "pending": "This request is not settled: its hold stays until its cost is known.",
    "none": "Nobody could say what this request cost: nothing was charged.",
    "byok": "Sent with your own upstream key: the provider bills you, the gateway charged nothing.",
    "cache": "Answered from the response cache: nothing was charged.",
    "test": "A test key's request: nothing was charged.",
    "settled": "Settled.",
}


@router.get(
    "/v1/receipts/{request_id}",
    summary="All that is known of one request, to the nano-dollar",
    response_model=Receipt,
)
@router.get("/api/v1/receipts/{request_id}", include_in_schema=False)
async def read_receipt(
    runtime: Running,
    request_id: Annotated[UUID, Path(description="`x-request-id` of the answer")],
    caller: Annotated[Caller, get_api_key("read", "usage")],
) -> Response:
    row = await db.read_receipt(runtime.client, caller.user_id, str(request_id))
    if row is None:
        raise NotFound("You have no request with this id.", param="request_id")
    return JsonResponse(_receipt(row))


@router.post("/v1/quote", summary="What a request would hold and roughly cost", response_model=Quote)
@router.post("/api/v1/quote", include_in_schema=False)
async def quote(
    runtime: Running,
    body: QuoteOrder,
    caller: Annotated[Caller, get_api_key("write", "chat")],
    x_end_user: Annotated[
        str | None, Header(max_length=256, description="Your customer, before what the body names them")
    ] = None,
) -> Response:
    """Nothing is sent, held or counted. A body that the proxy would refuse is refused in the same words."""
    endpoint = endpoint_of(body.endpoint)
    bound = quotes.bound_of(endpoint, body.body, *await _prices(runtime, caller))
    markup = runtime.settings.price_markup
    answer = await db.quote_request(
        runtime.client,
        quotes.quote_item(bound, markup=markup),
        user_id=caller.user_id,
        key_id=caller.key_id,
        end_user=end_user_of(endpoint, body.body, x_end_user),
    )
    is_test, output_tokens = caller.environment == "test", body.output_tokens
    fields = quotes.quote_fields(bound, answer, is_test=is_test, markup=markup, output_tokens=output_tokens)
    return JsonResponse(Quote.model_validate(fields))


async def _prices(runtime: Runtime, caller: Caller) -> tuple[ModelIndex, BoundPolicy]:
    """The models with their prices, and how bounds are made: as for a request with this key."""
    settings = runtime.settings
    suffixes = runtime.upstream(caller.environment).suffixes
    policy = BoundPolicy(settings.default_max_output_tokens, settings.free_models, suffixes)
    return await runtime.catalog(caller.environment).models(), policy


def _receipt(row: ReceiptRow) -> Receipt:
    refunds = [ReceiptRefund.model_validate(in_credits(refund)) for refund in row["refunds"]]
    settled = row["status"] != "pending"
    parts = {
        "refunds": refunds,
        "message": MESSAGES[_kind(row)],
        "hold": _hold(row),
        "tokens": _tokens(row) if settled else None,
        "charge": _charge(row, refunds) if settled else None,
        "timings": ReceiptTimings.model_validate(row),
        "ending": ReceiptEnding.model_validate(row) if settled else None,
    }
    return Receipt.model_validate({**row, **parts})


def _hold(row: ReceiptRow) -> ReceiptHold:
    return ReceiptHold(
        amount=credits_from_nanos(row["hold_nanos"]),
        granted_output_tokens=row["output_granted"],
        price_basis=None if row["price_basis"] is None else {**row["price_basis"]},
        expires_at=row["expires_at"],
    )


def _tokens(row: ReceiptRow) -> ReceiptTokens:
    return ReceiptTokens(
        prompt=row["prompt_tokens"],
        completion=row["completion_tokens"],
        cached=row["cached_tokens"],
        reasoning=row["reasoning_tokens"],
    )


def _kind(row: ReceiptRow) -> str:
    # The first that applies: a test key's request is free even where the cache answered it.
    if row["status"] == "pending" or row["settlement_source"] == "none":
        return "pending" if row["status"] == "pending" else "none"
    if row["environment"] == "test":
        return "test"
    return "byok" if row["byok"] else "cache" if row["cache_hit"] else "settled"


def _charge(row: ReceiptRow, refunds: list[ReceiptRefund]) -> ReceiptCharge:
    upstream, after = row["upstream_cost_nanos"], row["balance_after_nanos"]
    known = None if upstream is None else credits_from_nanos(upstream)
    charged = credits_from_nanos(row["cost_nanos"])
    overrun = credits_from_nanos(row["overrun_nanos"])
    # With the user's own key the provider bills them: there is no markup on what we did not charge.
    pays = not row["byok"] and known is not None
    return ReceiptCharge(
        upstream_cost=known,
        markup=Decimal(row["markup"]),
        charged=charged,
        markup_amount=charged + overrun - known if pays and known is not None else None,
        overrun=overrun,
        refunded=sum((refund.amount for refund in refunds), credits_from_nanos(0)),
        balance_after=None if after is None else credits_from_nanos(after),
    )
