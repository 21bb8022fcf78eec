"""/user/api-keys: users make, list, change, rotate, reveal and revoke their keys, and see who did what.

A key is shown when it is made. After that it is masked, unless it was made revealable.
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Annotated, Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

import db_security
from common.errors import BadRequest, Conflict, GatewayError, MissingScope, NotFound
from common.money import in_credits, nanos_from_credits
from db_rows.keys import Key, KeyChanges, KeyCreation, KeyRefusal, NewKey, NewSecret
from db_rows.keys import KeyRules as RuleColumns
from gateway.runtime.instance import Runtime
from models import errors_of
from routes.dependencies import Caller, Declared, Running, get_api_key
from routes.http.export import EXPORTED
from routes.http.json_body import ExactRoute
from routes.http.pagination import PathId
from routes.http.responses import JsonResponse, success, utc_now
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
# The fields of a body that set columns of other names.
FIELD_OF = {"expiration_date": "expiration_days", "budget_nanos": "budget", "budget_window": "budget"}
FEATURES = ("ip_allowlist", "domain_referrers", "expiration_date", "max_requests", "scope_permissions")
SHOWN_ONCE = "Keep the API key: it is shown this once."
TOO_MANY = "You have 500 keys, the most that are allowed. Delete some that you no longer need."
TOO_MANY_ACTIVE = "You have 50 active keys, the most that are allowed. Revoke one first."
NO_LONGER_READABLE = "This key was encrypted with a key that the gateway no longer has (ENCRYPTION_KEYS)."


@router.get("", summary="Your keys", response_model=Keys)
async def list_keys(runtime: Running, caller: Reader) -> Response:
    rows = await db_security.list_keys(runtime.client, caller.user_id)
    return JsonResponse(Keys(status="success", total_keys=len(rows), keys=[view(row) for row in rows]))


@router.post("", summary="Make a key", response_model=KeyMade)
async def create_key(runtime: Running, body: KeyOrder, caller: Writer) -> Response:
    key, columns = new_key_of(runtime, body)
    return made(body, key, await db_security.create_key(runtime.client, caller.stamp(), columns))


def new_key_of(runtime: Runtime, body: KeyOrder) -> tuple[str, NewKey]:
    """A new key as the body describes it, and its columns."""
    environment = body.environment_tag.value
    key = new_key(environment)
    columns: NewKey = {
        **runtime.keyring.stored(key, environment, body.key_name),
        "scope_permissions": DEFAULT_SCOPES,
        "ip_allowlist": [],
        "domain_referrers": [],
        "encrypted_key": runtime.vault.encrypt(key) if body.revealable else None,
        **_rules(body),
    }
    return key, columns


def made(body: KeyOrder, key: str, result: KeyCreation) -> Response:
    """The answer with the key in clear. Raises what a refusal means."""
    if result["outcome"] != "created":
        raise key_refusal(result)
    made_key = view(result["key"])
    return JsonResponse(
        KeyMade(
            status="success",
            message="The API key can be shown again." if body.revealable else SHOWN_ONCE,
            api_key=key,
            key_name=body.key_name,
            environment_tag=body.environment_tag,
            security_features={name: getattr(made_key, name) for name in FEATURES},
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
    listing = own_audit(runtime, replace(events, user_id=caller.user_id))
    return await list_response(request, listing, part, "logs", counted="total_logs")


@router.get("/{key_id}", summary="One key", response_model=KeyView)
async def read_key(runtime: Running, key_id: PathId, caller: Reader) -> Response:
    return JsonResponse(view(await _require_key(runtime, caller, key_id)))


@router.get("/{key_id}/reveal", summary="Show a revealable key again")
async def reveal_key(runtime: Running, key_id: PathId, caller: Writer) -> Response:
    result = await db_security.reveal_key(runtime.client, caller.stamp(), key_id)
    if result["outcome"] != "revealed":
        raise key_refusal(result)
    key = runtime.vault.decrypt(result["encrypted_key"])
    if key is None:
        raise NotFound(NO_LONGER_READABLE, param="key_id")
    return success(api_key=key, key=view(result["key"]))


@router.put("/{key_id}", summary="Change or rotate a key", response_model=KeyChanged)
async def update_key(runtime: Running, key_id: PathId, body: KeyChange, caller: Writer) -> Response:
    if body.action == "rotate":
        return await _rotate(runtime, caller, key_id, body.grace_period)
    if body.action == "bulk_rotate":
        return await _rotate_all(runtime, caller, body)
    result = await db_security.update_key(runtime.client, caller.stamp(), key_id, _changes(body))
    if result["outcome"] != "updated":
        raise key_refusal(result)
    return _changed("The key is changed", updated_key=view(result["key"]))


@router.post("/{key_id}/rotate", summary="A new secret for a key", response_model=KeyChanged)
async def rotate_key(
    runtime: Running, key_id: PathId, caller: Writer, body: Rotation | None = None
) -> Response:
    return await _rotate(runtime, caller, key_id, body.grace_period if body else 0)


@router.delete("/{key_id}", summary="Revoke a key, for good", response_model=KeyRevoked)
async def revoke_key(runtime: Running, key_id: PathId, body: KeyRevocation, caller: Writer) -> Response:
    result = await db_security.revoke_key(runtime.client, caller.stamp(), key_id)
    if result["outcome"] != "revoked":
        raise key_refusal(result)
    return JsonResponse(
        KeyRevoked(
            status="success", message="The key no longer works", deleted_key_id=key_id, timestamp=utc_now()
        )
    )


def _changed(message: str, **fields: Any) -> Response:
    return JsonResponse(KeyChanged(status="success", message=message, timestamp=utc_now(), **fields))


async def _rotate(runtime: Runtime, caller: Caller, key_id: int, grace_seconds: int) -> Response:
    key, secret = _new_secret(runtime, await _require_key(runtime, caller, key_id))
    (row,) = await _store_secrets(runtime, caller, [secret], grace_seconds)
    return _changed("The key has a new secret", updated_key=view(row), api_key=key)


async def _rotate_all(runtime: Runtime, caller: Caller, body: KeyChange) -> Response:
    rows = await db_security.list_keys(runtime.client, caller.user_id)
    rotated = [
        row for row in rows if row["is_active"] and body.environment_tag in (None, row["environment_tag"])
    ]
    secrets = [_new_secret(runtime, row) for row in rotated]
    rows = await _store_secrets(runtime, caller, [secret for _, secret in secrets], body.grace_period)
    new_keys = [
        {"id": row["id"], "key_name": row["key_name"], "api_key": key}
        for row, (key, _) in zip(rows, secrets, strict=True)
    ]
    return _changed(f"{len(new_keys)} keys have new secrets", rotated_count=len(new_keys), new_keys=new_keys)


async def _store_secrets(
    runtime: Runtime, caller: Caller, secrets: list[NewSecret], grace_seconds: int
) -> list[Key]:
    """The rows of the keys, in the order of their secrets. Raises what a refusal means."""
    result = await db_security.rotate_keys(
        runtime.client, caller.stamp(), secrets, grace_seconds=grace_seconds
    )
    if result["outcome"] != "rotated":
        raise key_refusal(result)
    return result["keys"]


async def _require_key(runtime: Runtime, caller: Caller, key_id: int) -> Key:
    for row in await db_security.list_keys(runtime.client, caller.user_id):
        if row["id"] == key_id:
            return row
    raise NotFound("There is no such key.", param="key_id")


def _new_secret(runtime: Runtime, row: Key) -> tuple[str, NewSecret]:
    """A new key in clear, and the columns in which it replaces the old one."""
    key = new_key(row["environment_tag"])
    stored = runtime.keyring.stored(key, row["environment_tag"], row["key_name"])
    return key, {
        "key_id": row["id"],
        "key_hash": stored["key_hash"],
        "hash_secret_id": stored["hash_secret_id"],
        "last4": stored["last4"],
        # A key that cannot be shown again stays one when it is rotated.
        "encrypted_key": runtime.vault.encrypt(key) if row["is_revealable"] else None,
    }


def _changes(body: KeyChange) -> KeyChanges:
    """The columns that a change sets. A name and a switch are never taken away: null leaves them alone."""
    changes = cast(KeyChanges, _rules(body))
    if body.key_name is not None:
        changes["key_name"] = body.key_name
    if body.is_active is not None:
        changes["is_active"] = body.is_active
    return changes


def _rules(body: KeyRules) -> RuleColumns:
    """The columns that these rules set. What was left out is not among them: it stays as it is."""
    every: RuleColumns = {
        "allowed_models": body.allowed_models,
        "max_requests": body.max_requests,
        "cache_ttl_seconds": body.cache_ttl_seconds,
        "ip_allowlist": body.ip_allowlist or [],
        "domain_referrers": body.domain_referrers or [],
        "expiration_date": _in_days(body.expiration_days),
        "budget_nanos": None if body.budget is None else nanos_from_credits(body.budget),
        "budget_window": body.budget_window,
    }
    sent = body.model_fields_set
    columns = {name: value for name, value in every.items() if FIELD_OF.get(name, name) in sent}
    if body.scope_permissions is not None:
        columns["scope_permissions"] = body.scope_permissions
    return cast(RuleColumns, columns)


def _in_days(days: int | None) -> str | None:
    return None if days is None else (utc_now() + datetime.timedelta(days=days)).isoformat()


def view(row: Key) -> KeyView:
    """A key as it may be shown."""
    used, most = row["requests_used"], row["max_requests"]
    return KeyView.model_validate(
        {
            **in_credits(row),
            "api_key": masked(row["key_prefix"], row["last4"]),
            "days_remaining": _days_until(row["expiration_date"]),
            "requests_remaining": None if most is None else max(0, most - used),
            "usage_percentage": None if most is None else round(100 * used / most, 2),
        }
    )


def _days_until(moment: str | None) -> int | None:
    return None if moment is None else max(0, (datetime.datetime.fromisoformat(moment) - utc_now()).days)


def key_refusal(result: KeyRefusal) -> GatewayError:
    """The error that a refusal of a key function means."""
    match result["outcome"]:
        case "not_found":
            return NotFound("There is no such key.", param="key_id")
        case "name_taken":
            return Conflict("You have a key of this name already.", param="key_name")
        case "too_many":
            return Conflict(TOO_MANY if result.get("limit") == 500 else TOO_MANY_ACTIVE)
        case "not_revealable":
            return BadRequest("This key was not made revealable: only its HMAC is stored.", param="key_id")
        case "broader":
            field = result["field"]
            return MissingScope(
                f"A key may not give more than it has itself: this would be broader in `{field}`.",
                param=field,
            )
