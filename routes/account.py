"""/user: a user's own profile, balance, limits, usage and transactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypedDict

from fastapi import APIRouter, Request
from fastapi.responses import Response

import db
import db_security
from common.errors import BadRequest, Forbidden, NotFound
from common.money import credits_from_nanos, in_credits
from db_rows.accounts import User
from db_rows.books import UsageMetrics
from db_rows.keys import Key
from gateway.runtime.instance import Runtime
from models import Balance, Transactions, UsageRecords, errors_of
from routes.budgets import forbid_test_key
from routes.dependencies import Caller, Declared, Running, get_api_key
from routes.http.export import EXPORTED, TABULATED
from routes.http.json_body import ExactRoute
from routes.http.outcomes import taken
from routes.http.responses import JsonResponse, success, utc_now
from routes.listings import AnyPart, Within, list_response, records, transactions
from routes.reports import ABOUT_LATENCY, Bucket, Format, Group, Zone, usage_report
from routes.schemas.accounts import AccountDeletion, Profile, ProfileChange
from routes.schemas.keys import Moment

router = APIRouter(
    prefix="/user",
    tags=["account"],
    route_class=ExactRoute,
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 409, 503),
)

LIMITS = (
    "requests_per_minute",
    "requests_per_hour",
    "requests_per_day",
    "tokens_per_minute",
    "tokens_per_hour",
    "tokens_per_day",
)
ALL_LIMITS = (*LIMITS, "concurrency", "burst")
DELETED = "The account is deleted: its keys no longer work, and what was left of its credits has expired."
# Places free bucket by bucket; after this many seconds of silence everything is free again.
RESET_SECONDS = {"minute": 70, "hour": 3900, "day": 90000}
ProfileReader = Annotated[Caller, get_api_key("read", "profile")]
UsageReader = Annotated[Caller, get_api_key("read", "usage")]


@router.get("/balance", summary="What is left", response_model=Balance)
async def read_balance(
    runtime: Running, caller: Annotated[Caller, get_api_key("read", "balance")]
) -> Response:
    user = await _require_user(runtime, caller)
    credits, held = credits_from_nanos(user["credits_nanos"]), credits_from_nanos(user["held_nanos"])
    return JsonResponse(
        Balance(
            api_key=caller.masked_key,
            credits=credits,
            held=held,
            available=credits - held,
            status="active" if user["is_active"] else "suspended",
            user_id=caller.user_id,
        )
    )


@router.get("/profile", summary="Your account", response_model=Profile)
async def read_profile(runtime: Running, caller: ProfileReader) -> Response:
    return JsonResponse(await _profile(runtime, caller))


@router.put("/profile", summary="Change name, email, preferences or settings", response_model=Profile)
async def update_profile(
    runtime: Running, body: ProfileChange, caller: Annotated[Caller, get_api_key("write", "profile")]
) -> Response:
    forbid_test_key(caller)
    fields = body.model_dump(exclude_none=True)
    changes = {("username" if name == "name" else name): value for name, value in fields.items()}
    result = await db.update_profile(runtime.client, caller.stamp(), changes)
    if result["outcome"] == "too_large":
        raise BadRequest("`preferences` and `settings` take at most 16 kB each.", param="preferences")
    if result["outcome"] == "username_taken" or result["outcome"] == "email_taken":
        raise taken(result["outcome"], name_field="name")
    return JsonResponse(await _profile(runtime, caller))


@router.delete("/account", summary="Delete your account, for good")
async def delete_account(
    runtime: Running, body: AccountDeletion, caller: Annotated[Caller, get_api_key("write", "account")]
) -> Response:
    if caller.environment == "test":
        raise Forbidden("A test key cannot delete the account. Use a live one.")
    user = await _require_user(runtime, caller)
    # The hashes stay, so that nobody collects sign-up credits by deleting an account and registering again.
    email_hashes = runtime.keyring.email_hashes(user["email"])
    await db.delete_account(runtime.client, caller.stamp(), email_hashes)
    return success(message=DELETED, user_id=caller.user_id, timestamp=utc_now())


@router.get("/monitor", summary="What you have used, and your limits")
async def read_monitor(runtime: Running, caller: UsageReader) -> Response:
    user = await _require_user(runtime, caller)
    metrics = await db.usage_metrics(runtime.client, caller.user_id)
    in_use = await db.read_limits(runtime.client, caller.user_id, caller.key_id)
    return success(
        timestamp=utc_now(),
        user_id=caller.user_id,
        api_key=caller.masked_key,
        current_credits=credits_from_nanos(user["credits_nanos"]),
        usage_metrics=shown_metrics(metrics),
        rate_limits=_select(in_use["limits"], LIMITS),
    )


@router.get("/limit", summary="Your rate limits, and what is used of them")
async def read_limit(runtime: Running, caller: UsageReader) -> Response:
    in_use = await db.read_limits(runtime.client, caller.user_id, caller.key_id)
    return success(
        api_key=caller.masked_key,
        current_limits=_select(in_use["limits"], ALL_LIMITS),
        key_limits=None if in_use["key_limits"] is None else _select(in_use["key_limits"], ALL_LIMITS),
        current_usage=in_use["used"],
        reset_times=RESET_SECONDS,
    )


def _select(limits: Mapping[str, object], names: Sequence[str]) -> dict[str, object]:
    return {name: limits[name] for name in names}


class EnvironmentUsage(TypedDict):
    """Of all keys of an environment; `total_max_requests` is None where none of them has a limit."""

    total_requests: int
    total_max_requests: int | None
    key_count: int


@router.get("/environment-usage", summary="Requests by environment of your keys")
async def read_environment_usage(runtime: Running, caller: UsageReader) -> Response:
    environments: dict[str, EnvironmentUsage] = {}
    for row in await db_security.list_keys(runtime.client, caller.user_id):
        nothing: EnvironmentUsage = {"total_requests": 0, "total_max_requests": None, "key_count": 0}
        _add_key(environments.setdefault(row["environment_tag"], nothing), row)
    return success(environment_usage=environments)


def _add_key(usage: EnvironmentUsage, key: Key) -> None:
    usage["total_requests"] += key["requests_used"]
    usage["key_count"] += 1
    if key["max_requests"] is not None:
        usage["total_max_requests"] = (usage["total_max_requests"] or 0) + key["max_requests"]


@router.get(
    "/usage", summary="What you have used, by time and group", description=ABOUT_LATENCY, responses=TABULATED
)
async def read_usage(
    runtime: Running,
    caller: UsageReader,
    start: Moment | None = None,
    end: Moment | None = None,
    timezone: Zone = "UTC",
    bucket: Bucket = "day",
    group_by: Group = "model",
    format: Format = "json",
) -> Response:
    return await usage_report(
        runtime,
        user_id=caller.user_id,
        start=start,
        end=end,
        zone=timezone,
        bucket=bucket,
        group=group_by,
        form=format,
    )


@router.get(
    "/usage/records",
    summary="Each request, and what it cost",
    response_model=UsageRecords,
    responses=EXPORTED,
)
async def list_usage_records(
    request: Request, runtime: Running, caller: UsageReader, within: Within, part: AnyPart
) -> Response:
    return await list_response(request, records(runtime, caller.user_id, within), part, "records")


@router.get(
    "/transactions",
    summary="Grants, purchases, refunds and expiries",
    response_model=Transactions,
    responses=EXPORTED,
)
async def list_transactions(
    request: Request,
    runtime: Running,
    caller: Annotated[Caller, get_api_key("read", "transactions")],
    within: Within,
    part: AnyPart,
) -> Response:
    return await list_response(request, transactions(runtime, caller.user_id, within), part, "transactions")


async def _require_user(runtime: Runtime, caller: Caller) -> User:
    user = await db.get_user(runtime.client, caller.user_id)
    if user is None:
        raise NotFound("This account no longer exists.")
    return user


async def _profile(runtime: Runtime, caller: Caller) -> Profile:
    user = await _require_user(runtime, caller)
    caller_fields = {"user_id": caller.user_id, "api_key": caller.masked_key}
    return Profile.model_validate({**in_credits(user), **caller_fields})


def shown_metrics(metrics: UsageMetrics) -> dict[str, object]:
    """Metrics as clients see them: amounts in credits, and the average of tokens per request."""
    total = metrics["total_requests"]
    average = round(metrics["total_tokens"] / total, 2) if total else 0
    return {**in_credits(metrics), "average_tokens_per_request": average}
