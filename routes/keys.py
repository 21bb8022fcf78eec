"""/user/api-keys. Make, list, change, rotate, reveal and revoke them, and see who did what."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

import db_security
from common.errors import BadRequest, Conflict, GatewayError, MissingScope, NotFound
from common.money import credits_from_nanos, nanos_from_credits
from gateway.runtime.instance import Runtime
from models import errors_of
from routes.dependencies import Caller, Declared, Running, get_api_key
from routes.http.export import EXPORTED
from routes.http.json_body import ExactRoute
from routes.http.pagination import PathId
from routes.http.responses import JsonResponse, utc_now
from routes.listings import AnyPart, Events, list_response, own_audit
from routes.schemas.keys import (
    AuditLogs,
    KeyChange,
    KeyChanged,
    KeyMade,
    KeyOrder,
    KeyRevocation,
    KeyRevoked,
    KeyRules,
    Keys,
    KeyView,
    Rotation,
)
from security import DEFAULT_SCOPES, masked, new_key

router = APIRouter(
    prefix="/user/api-keys",
    tags=["keys"],
    route_class=ExactRoute,
    dependencies=Declared,
    responses=errors_of(400, 401, 403, 404, 409, 503),
)

Reader = Annotated[Caller, get_api_key("read", "keys")]
Writer = Annotated[Caller, get_api_key("write", "keys")]


@router.get("", summary="Your keys", response_model=Keys)
async def list_keys(runtime: Running, caller: Reader) -> Response:
    rows = await db_security.list_keys(runtime.client, caller.user_id)
    return JsonResponse(Keys(status="success", total_keys=len(rows), keys=[view(row) for row in rows]))


@router.post("", summary="Make a key", response_model=KeyMade)
async def create_key(runtime: Running, body: KeyOrder, caller: Writer) -> Response:
    key, stored = new_key_of(runtime, body)
    return made(body, key, await db_security.create_key(runtime.client, {**caller.stamp(), "key": stored}))


def new_key_of(runtime: Runtime, body: KeyOrder) -> tuple[str, dict[str, Any]]:
    """A new key for an body, and its columns."""
    environment = body.environment_tag.value
    key = new_key(environment)
    stored = {
        **runtime.keyring.stored(key, environment, body.key_name),
        "scope_permissions": DEFAULT_SCOPES,
        "ip_allowlist": [],
        "domain_referrers": [],
        "encrypted_key": runtime.vault.encrypt(key) if body.revealable else None,
        **_rules(body),
    }
    return key, stored


def made(body: KeyOrder, key: str, result: dict[str, Any]) -> Response:
    """The key as it is shown to whoever asked for it. Raises what a refusal means."""
    raise_key_refusal(result)
    made_key = view(result["key"])
    return JsonResponse(
        KeyMade(
            status="success",
            message="Keep the API key: it is shown this once."
            if not body.revealable
            else "The API key can be shown again.",
            api_key=key,
            key_name=body.key_name,
            environment_tag=body.environment_tag,
            security_features={
                "ip_allowlist": made_key.ip_allowlist,
                "domain_referrers": made_key.domain_referrers,
                "expiration_date": made_key.expiration_date,
                "max_requests": made_key.max_requests,
                "scope_permissions": made_key.scope_permissions,
            },
            key=made_key,
        )
    )


@router.get("/usage", summary="What each key has used")
async def read_usage(runtime: Running, caller: Reader) -> Response:
    rows = await db_security.list_keys(runtime.client, caller.user_id)
    keys = [view(row) for row in rows]
    return JsonResponse(
        {"user_id": caller.user_id, "total_keys": len(keys), "keys": keys, "audit_logging": True}
    )


@router.get(
    "/audit-logs", summary="Who did what with your keys", response_model=AuditLogs, responses=EXPORTED
)
async def list_audit_logs(
    request: Request,
    runtime: Running,
    caller: Annotated[Caller, get_api_key("read", "audit")],
    events: Events,
    part: AnyPart,
) -> Response:
    return await list_response(
        request,
        own_audit(runtime, replace(events, user_id=caller.user_id)),
        part,
        "logs",
        counted="total_logs",
    )


@router.get("/{key_id}", summary="One key", response_model=KeyView)
async def read_key(runtime: Running, key_id: PathId, caller: Reader) -> Response:
    for row in await db_security.list_keys(runtime.client, caller.user_id):
        if row["id"] == key_id:
            return JsonResponse(view(row))
    raise NotFound("There is no such key.", param="key_id")


@router.get("/{key_id}/reveal", summary="Show a revealable key again")
async def reveal_key(runtime: Running, key_id: PathId, caller: Writer) -> Response:
    result = await db_security.reveal_key(runtime.client, {**caller.stamp(), "key_id": key_id})
    raise_key_refusal(result)
    key = runtime.vault.decrypt(result["encrypted_key"])
    if key is None:
        raise NotFound(
            "This key was encrypted with a key that the gateway no longer has (ENCRYPTION_KEYS).",
            param="key_id",
        )
    return JsonResponse({"status": "success", "api_key": key, "key": view(result["key"])})


@router.put("/{key_id}", summary="Change or rotate a key", response_model=KeyChanged)
async def update_key(runtime: Running, key_id: PathId, body: KeyChange, caller: Writer) -> Response:
    if body.action == "rotate":
        return await _rotate(runtime, caller, key_id, body.grace_period)
    if body.action == "bulk_rotate":
        return await _rotate_all(runtime, caller, body)
    changes = _rules(body)
    for name in ("key_name", "is_active"):
        if (value := getattr(body, name)) is not None:
            changes[name] = value
    result = await db_security.update_key(
        runtime.client, {**caller.stamp(), "key_id": key_id, "changes": changes}
    )
    raise_key_refusal(result)
    return JsonResponse(
        KeyChanged(
            status="success",
            message="The key is changed",
            updated_key=view(result["key"]),
            timestamp=utc_now(),
        )
    )


@router.post("/{key_id}/rotate", summary="A new secret for a key", response_model=KeyChanged)
async def rotate_key(
    runtime: Running, key_id: PathId, caller: Writer, body: Rotation | None = None
) -> Response:
    return await _rotate(runtime, caller, key_id, body.grace_period if body else 0)


@router.delete("/{key_id}", summary="Revoke a key, for good", response_model=KeyRevoked)
async def revoke_key(runtime: Running, key_id: PathId, body: KeyRevocation, caller: Writer) -> Response:
    result = await db_security.revoke_key(runtime.client, {**caller.stamp(), "key_id": key_id})
    raise_key_refusal(result)
    return JsonResponse(
        KeyRevoked(
            status="success", message="The key no longer works", deleted_key_id=key_id, timestamp=utc_now()
        )
    )


async def _rotate(runtime: Runtime, caller: Caller, key_id: int, grace: int) -> Response:
    row = await _require_key(runtime, caller, key_id)
    key, stored = _new_secret(runtime, row)
    result = await db_security.rotate_keys(
        runtime.client, {**caller.stamp(), "grace_seconds": grace, "keys": [stored]}
    )
    raise_key_refusal(result)
    changed = view(result["keys"][0])
    return JsonResponse(
        KeyChanged(
            status="success",
            message="The key has a new secret",
            updated_key=changed,
            api_key=key,
            timestamp=utc_now(),
        )
    )


async def _rotate_all(runtime: Runtime, caller: Caller, body: KeyChange) -> Response:
    rows = await db_security.list_keys(runtime.client, caller.user_id)
    wanted = [
        row for row in rows if row["is_active"] and body.environment_tag in (None, row["environment_tag"])
    ]
    secrets = [_new_secret(runtime, row) for row in wanted]
    result = await db_security.rotate_keys(
        runtime.client,
        {**caller.stamp(), "grace_seconds": body.grace_period, "keys": [stored for _, stored in secrets]},
    )
    raise_key_refusal(result)
    new = [
        {"id": row["id"], "key_name": row["key_name"], "api_key": key}
        for row, (key, _) in zip(result["keys"], secrets, strict=True)
    ]
    message = f"{len(new)} keys have new secrets"
    return JsonResponse(
        KeyChanged(
            status="success", message=message, rotated_count=len(new), new_keys=new, timestamp=utc_now()
        )
    )


async def _require_key(runtime: Runtime, caller: Caller, key_id: int) -> dict[str, Any]:
    for row in await db_security.list_keys(runtime.client, caller.user_id):
        if row["id"] == key_id:
            return row
    raise NotFound("There is no such key.", param="key_id")


def _new_secret(runtime: Runtime, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    key = new_key(row["environment_tag"])
    stored = runtime.keyring.stored(key, row["environment_tag"], row["key_name"])
    fields = {name: stored[name] for name in ("key_hash", "hash_secret_id", "last4")}
    return key, {
        "key_id": row["id"],
        **fields,
        "encrypted_key": runtime.vault.encrypt(key) if row["is_revealable"] else None,
    }


def _rules(body: KeyRules) -> dict[str, Any]:
    """The columns that these rules set: what was left out is not among them."""
    named = body.model_fields_set
    columns: dict[str, Any] = {
        name: getattr(body, name)
        for name in ("allowed_models", "max_requests", "cache_ttl_seconds")
        if name in named
    }
    if "scope_permissions" in named and body.scope_permissions is not None:
        columns["scope_permissions"] = body.scope_permissions
    for name in ("ip_allowlist", "domain_referrers"):
        if name in named:
            columns[name] = getattr(body, name) or []
    if "expiration_days" in named:
        days = body.expiration_days
        columns["expiration_date"] = (
            None if days is None else (utc_now() + datetime.timedelta(days=days)).isoformat()
        )
    if "budget" in named:
        columns["budget_nanos"] = None if body.budget is None else nanos_from_credits(body.budget)
        columns["budget_window"] = body.budget_window
    return columns


def view(row: dict[str, Any]) -> KeyView:
    """A key as it may be shown."""
    used, most = row["requests_used"], row["max_requests"]
    budget = row["budget_nanos"]
    fields = {name: row[name] for name in KeyView.model_fields if name in row}
    return KeyView(
        **fields,
        api_key=masked(row["key_prefix"], row["last4"]),
        days_remaining=_days_until(row["expiration_date"]),
        requests_remaining=None if most is None else max(0, most - used),
        usage_percentage=None if most is None else round(100 * used / most, 2),
        budget=None if budget is None else credits_from_nanos(budget),
        budget_spent=credits_from_nanos(row["budget_spent_nanos"]),
    )


def _days_until(moment: str | None) -> int | None:
    return None if moment is None else max(0, (datetime.datetime.fromisoformat(moment) - utc_now()).days)


def raise_key_refusal(result: dict[str, Any]) -> None:
    """The error that a refusal of a key function means, if it is one."""
    refusals: dict[str, GatewayError] = {
        "not_found": NotFound("There is no such key.", param="key_id"),
        "name_taken": Conflict("You have a key of this name already.", param="key_name"),
        "too_many": Conflict(
            "You have 500 keys, the most that are allowed. Delete some that you no longer need."
            if result.get("limit") == 500
            else "You have 50 active keys, the most that are allowed. Revoke one first."
        ),
        "not_revealable": BadRequest(
            "This key was not made revealable: only its HMAC is stored.", param="key_id"
        ),
        "broader": MissingScope(
            f"A key may not give more than it has itself, and this would be broader in `{result.get('field')}`.",
            param=result.get("field"),
        ),
    }
    if result["outcome"] in refusals:
        raise refusals[result["outcome"]]
