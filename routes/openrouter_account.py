"""OpenRouter's /key, /credits and /generation: its shapes, answered from our own books.

What the upstream says of the operator's account is never shown.
"""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from fastapi.responses import Response

import db
import db_security
from common.errors import NotFound
from common.money import credits_from_nanos
from db_rows.books import UsageRecord
from db_rows.keys import KeyUsage
from gateway.runtime.instance import Runtime
from models import errors_of
from routes.dependencies import Caller, Declared, Running, get_api_key
from routes.http.responses import JsonResponse
from routes.schemas.openrouter import (
    CreditsAnswer,
    CreditsData,
    FreeRequests,
    GenerationAnswer,
    GenerationData,
    KeyAnswer,
    KeyData,
    KeyRateLimit,
)
from security import masked

router = APIRouter(
    tags=["account"],
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 503),
)

RESETS: dict[str | None, Literal["daily", "weekly", "monthly"]] = {
    "day": "daily",
    "week": "weekly",
    "month": "monthly",
}
# OpenRouter's own ids, and the sandbox's, name the second in which the generation began:
# gen-1786988078-NGfm..., gen-rerank-178...
TIMED_ID = re.compile(r"gen-(?:[a-z]+-)?(1\d{9})-")
API_TYPES = {
    "embeddings": "embeddings",
    "rerank": "rerank",
    "images": "image",
    "audio/speech": "tts",
    "audio/transcriptions": "stt",
}
NOT_SETTLED = "This request is not settled yet. Ask again in a moment."
# What OpenRouter's keys have and ours have not.
NOT_OURS: dict[str, Any] = {
    "include_byok_in_limit": False,
    "is_management_key": False,
    "is_provisioning_key": False,
    "organization_id": None,
    "workspace_id": None,
    "allowed_data_regions": ["global"],
}
ALL_LIMITS = "GET /user/limit shows all limits of this key."


@router.get("/v1/key", summary="The key that asks, as OpenRouter's clients read it", response_model=KeyAnswer)
@router.get("/api/v1/key", include_in_schema=False)
@router.get("/api/v1/auth/key", include_in_schema=False)  # its older name, which clients still ask for
async def read_key(runtime: Running, caller: Annotated[Caller, get_api_key("read", "usage")]) -> Response:
    row = await db_security.read_key(runtime.client, caller.user_id, caller.key_id)
    if row is None:
        raise NotFound("This key no longer exists.")
    return JsonResponse(KeyAnswer(data=_key(row, free_models=runtime.settings.free_models)))


@router.get("/v1/credits", summary="What the account was given and has used", response_model=CreditsAnswer)
@router.get("/api/v1/credits", include_in_schema=False)
async def read_credits(
    runtime: Running, caller: Annotated[Caller, get_api_key("read", "balance")]
) -> Response:
    row = await db.read_credits(runtime.client, caller.user_id)
    if row is None:
        raise NotFound("This account no longer exists.")
    granted, balance = credits_from_nanos(row["granted_nanos"]), credits_from_nanos(row["balance_nanos"])
    return JsonResponse(CreditsAnswer(data=CreditsData(total_credits=granted, total_usage=granted - balance)))


@router.get(
    "/v1/generation",
    summary="One of your requests, by its generation id or request id",
    response_model=GenerationAnswer,
)
@router.get("/api/v1/generation", include_in_schema=False)
async def read_generation(
    runtime: Running,
    caller: Annotated[Caller, get_api_key("read", "usage")],
    id: Annotated[
        str,
        Query(
            min_length=1,
            max_length=256,
            description="`gen-...`, from the last day where it names no time; or our request id",
        ),
    ],
) -> Response:
    """OpenRouter's ids name their time, and are found however old they are. Like OpenRouter, it answers 404
    until the cost is known.
    """
    row = await _find(runtime, caller.user_id, id)
    if row is None:
        raise NotFound("You have no request with this id.", param="id")
    if row["status"] == "pending":
        raise NotFound(NOT_SETTLED, param="id", code="generation_pending", retry_after=1)
    return JsonResponse(GenerationAnswer(data=_generation(row)))


async def _find(runtime: Runtime, user_id: int, wanted: str) -> UsageRecord | None:
    if not wanted.isprintable():
        return None
    request_id = _uuid_of(wanted)
    if request_id is not None:
        return await db.read_receipt(runtime.client, user_id, request_id)
    # The time in an id says where to look; without one only the last day is searched.
    return await db.find_generation(runtime.client, user_id, wanted, around=_moment_in(wanted))


def _uuid_of(text: str) -> str | None:
    """Our own request ids are UUIDs; the upstream's ids are not."""
    try:
        return str(UUID(text))
    except ValueError:
        return None


def _moment_in(generation_id: str) -> str | None:
    """When this generation began, where its id says so."""
    match = TIMED_ID.match(generation_id)
    if match is None:
        return None
    return datetime.datetime.fromtimestamp(int(match.group(1)), datetime.UTC).isoformat()


def _key(row: KeyUsage, *, free_models: bool) -> KeyData:
    budget, per_minute = row["budget_nanos"], row["requests_per_minute"]
    free = -1 if free_models else 0
    return KeyData(
        label=masked(row["key_prefix"], row["last4"]),
        limit=_credits(budget),
        limit_remaining=_credits(None if budget is None else max(0, budget - row["budget_spent_nanos"])),
        limit_reset=RESETS.get(row["budget_window"]),
        is_free_tier=row["is_free_tier"],
        expires_at=row["expiration_date"],
        creator_user_id=str(row["user_id"]),
        free_model_daily_requests=FreeRequests(limit=free, remaining=free, used=0),
        rate_limit=KeyRateLimit(
            requests=-1 if per_minute is None else per_minute, interval="1m", note=ALL_LIMITS
        ),
        usage=credits_from_nanos(row["usage_nanos"]),
        usage_daily=credits_from_nanos(row["usage_daily_nanos"]),
        usage_weekly=credits_from_nanos(row["usage_weekly_nanos"]),
        usage_monthly=credits_from_nanos(row["usage_monthly_nanos"]),
        byok_usage=credits_from_nanos(row["byok_usage_nanos"]),
        byok_usage_daily=credits_from_nanos(row["byok_usage_daily_nanos"]),
        byok_usage_weekly=credits_from_nanos(row["byok_usage_weekly_nanos"]),
        byok_usage_monthly=credits_from_nanos(row["byok_usage_monthly_nanos"]),
        **NOT_OURS,
    )


def _credits(nanos: int | None) -> Decimal | None:
    return None if nanos is None else credits_from_nanos(nanos)


def _generation(row: UsageRecord) -> GenerationData:
    cost, upstream = credits_from_nanos(row["cost_nanos"]), row["upstream_cost_nanos"]
    first, whole = row["time_to_first_token_ms"], row["latency_ms"]
    prompt, completion = row["prompt_tokens"], row["completion_tokens"]
    return GenerationData(
        id=row["generation_id"] or row["request_id"],
        request_id=row["request_id"],
        model=row["model_used"] or row["model"],
        provider_name=row["provider"],
        api_type=API_TYPES.get(row["endpoint"], "completions"),
        created_at=row["created_at"],
        streamed=row["streamed"],
        cancelled=row["status"] == "cancelled",
        finish_reason=row["finish_reason"],
        total_cost=cost,
        usage=cost,
        upstream_inference_cost=credits_from_nanos(upstream or 0) if row["byok"] else None,
        is_byok=row["byok"],
        tokens_prompt=prompt,
        tokens_completion=completion,
        native_tokens_prompt=prompt,
        native_tokens_completion=completion,
        native_tokens_reasoning=row["reasoning_tokens"],
        native_tokens_cached=row["cached_tokens"],
        latency=whole if first is None else first,
        generation_time=None if first is None or whole is None else max(0, whole - first),
        external_user=row["end_user"],
    )
