"""Administrators' endpoints for everybody's usage, keys and audit log, and for the cached model list."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

import db
import db_security
from common.errors import NotFound
from common.money import in_credits
from db_rows.keys import ImportedKey, Key
from db_rows.shared import Scopes
from models import AdminTransactions, AdminUsageRecords, errors_of
from routes.account import shown_metrics
from routes.dependencies import AdminOnly, Declared, Running
from routes.http.export import EXPORTED, TABULATED
from routes.http.json_body import ExactRoute
from routes.http.outcomes import no_such_target
from routes.http.pagination import BY_ID, NO_NUL, Cursor, PageSize, PathId, QueryId, id_of
from routes.http.responses import success, utc_now
from routes.keys import key_refusal, made, new_key_of, view
from routes.listings import AnyPart, Events, Within, all_records, all_transactions, audit, list_response
from routes.reports import ABOUT_LATENCY, AdminGroup, Bucket, Format, Zone, usage_report
from routes.schemas.accounts import LegacyImport, LegacyKey
from routes.schemas.keys import AuditLogs, KeyIssue, KeyMade, Moment
from security import DEFAULT_SCOPES

router = APIRouter(
    prefix="/admin",
    tags=["admin"],
    route_class=ExactRoute,
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 409, 429, 503),
)


TODAY = ("requests_today", "tokens_today", "cost_today")


@router.get("/monitor", summary="The whole installation at a glance")
async def read_monitor(runtime: Running, admin: AdminOnly) -> Response:
    totals = await db.system_metrics(runtime.client)
    latest = totals["recent"][0]["created_at"] if totals["recent"] else None
    metrics = {**shown_metrics(totals["metrics"]), "last_request_time": latest}
    return success(
        timestamp=utc_now(),
        total_users=totals["total_users"],
        active_users_today=totals["active_users_today"],
        **{name: metrics[name] for name in TODAY},
        system_usage_metrics=metrics,
        top_users_by_usage=[in_credits(row) for row in totals["top_users"]],
        recent_activity=[in_credits(row) for row in totals["recent"]],
    )


@router.get(
    "/usage",
    summary="What everybody has used, by time and group",
    description=ABOUT_LATENCY,
    responses=TABULATED,
)
async def read_usage(
    runtime: Running,
    admin: AdminOnly,
    user_id: QueryId = None,
    start: Moment | None = None,
    end: Moment | None = None,
    timezone: Zone = "UTC",
    bucket: Bucket = "day",
    group_by: AdminGroup = "model",
    format: Format = "json",
) -> Response:
    return await usage_report(
        runtime,
        user_id=user_id,
        start=start,
        end=end,
        zone=timezone,
        bucket=bucket,
        group=group_by,
        form=format,
    )


@router.get(
    "/usage/records",
    summary="Everybody's requests, and what they cost",
    response_model=AdminUsageRecords,
    responses=EXPORTED,
)
async def list_usage_records(
    request: Request,
    runtime: Running,
    admin: AdminOnly,
    within: Within,
    part: AnyPart,
    user_id: QueryId = None,
) -> Response:
    return await list_response(request, all_records(runtime, user_id, within), part, "records")


@router.get(
    "/transactions",
    summary="Everybody's grants, purchases, refunds and expiries",
    response_model=AdminTransactions,
    responses=EXPORTED,
)
async def list_transactions(
    request: Request,
    runtime: Running,
    admin: AdminOnly,
    within: Within,
    part: AnyPart,
    user_id: QueryId = None,
) -> Response:
    return await list_response(request, all_transactions(runtime, user_id, within), part, "transactions")


@router.get(
    "/audit-logs",
    summary="Security events and administrators' actions",
    response_model=AuditLogs,
    responses=EXPORTED,
)
async def list_audit_logs(
    request: Request,
    runtime: Running,
    admin: AdminOnly,
    events: Events,
    part: AnyPart,
    user_id: QueryId = None,
) -> Response:
    listing = audit(runtime, replace(events, user_id=user_id))
    return await list_response(request, listing, part, "logs", counted="total_logs")


@router.get("/keys", summary="Find keys by what is shown of them, or by name")
async def find_keys(
    runtime: Running,
    admin: AdminOnly,
    search: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=256,
            pattern=NO_NUL,
            description="A masked or whole key, its last 4, or a name",
        ),
    ] = None,
    user_id: QueryId = None,
    limit: PageSize = 100,
    cursor: Cursor = None,
) -> Response:
    rows = await db_security.find_keys(
        runtime.client, text=search, user_id=user_id, before=id_of(cursor), limit=limit
    )
    return success(keys=[_key(row) for row in rows], next_cursor=BY_ID.following(rows, limit))


def _key(row: Key) -> dict[str, Any]:
    return {**view(row).model_dump(), "user_id": row["user_id"], "revoked_at": row["revoked_at"]}


@router.post(
    "/keys",
    summary="Give a user a key: to replace a lost one, or with the scope `admin`",
    response_model=KeyMade,
)
async def issue_key(runtime: Running, body: KeyIssue, admin: AdminOnly) -> Response:
    key, columns = new_key_of(runtime, body)
    result = await db_security.issue_key(runtime.client, admin.stamp(), user_id=body.user_id, key=columns)
    if result["outcome"] == "not_found":
        raise no_such_target("user_id")
    return made(body, key, result)


@router.delete("/keys/{key_id}", summary="Revoke anybody's key, for good")
async def revoke_key(runtime: Running, key_id: PathId, admin: AdminOnly) -> Response:
    result = await db_security.revoke_key(runtime.client, admin.stamp(), key_id)
    if result["outcome"] != "revoked":
        raise key_refusal(result)
    return success(message="The key no longer works", user_id=result["user_id"], deleted_key_id=key_id)


@router.post("/keys/import", summary="Bring in keys of an older system (LEGACY_KEYS)")
async def import_keys(runtime: Running, body: LegacyImport, admin: AdminOnly) -> Response:
    keys = [_legacy(key) for key in body.keys]
    result = await db_security.import_keys(runtime.client, admin.stamp(), keys)
    if result["outcome"] == "not_found":
        user_id = result["user_id"]
        index = next(n for n, key in enumerate(body.keys) if key.user_id == user_id)
        message = f"There is no user {user_id}; nothing was imported."
        raise NotFound(message, param=f"keys.{index}.user_id")
    return success(imported=result["imported"], known_before=result["known"])


@router.post("/refresh-models", summary="Fetch the model list now")
async def refresh_models(runtime: Running, admin: AdminOnly) -> Response:
    index = await runtime.catalog(None).refresh()
    return success(message="The model list is fresh", total_models=len(index.raw), timestamp=utc_now())


@router.get("/cache-status", summary="How old the model list is")
async def read_cache_status(runtime: Running, admin: AdminOnly) -> Response:
    return success(cache_info=asdict(runtime.catalog(None).status()), timestamp=utc_now())


def _legacy(key: LegacyKey) -> ImportedKey:
    scopes: Scopes = {str(verb): names for verb, names in (key.scope_permissions or {}).items()}
    return {
        "user_id": key.user_id,
        "key_sha256": hashlib.sha256(key.api_key.encode()).hexdigest(),
        "key_name": key.key_name,
        "key_prefix": key.api_key[:4],
        "last4": key.api_key[-4:],
        "environment_tag": key.environment_tag,
        "scope_permissions": scopes or DEFAULT_SCOPES,
        "expiration_date": key.expiration_date.isoformat() if key.expiration_date else None,
        "max_requests": key.max_requests,
        "is_active": key.is_active,
    }
