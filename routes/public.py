"""/, /health, /models and /auth/register: what anybody may see, and how to get an account."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response

import db
from common.errors import GatewayError, Misconfigured, RateLimited, RegistrationClosed
from common.money import credits_from_nanos, nanos_from_credits
from common.version import VERSION
from db_rows.accounts import NewAccount
from db_rows.accounts import Registered as NewUser
from db_rows.keys import KeyRules, NewKey
from gateway.pricing.catalog import upstream_json
from gateway.runtime.instance import Runtime
from gateway.runtime.service import Service
from models import Health, Registered, Registration, errors_of
from routes.dependencies import Admin, MaybeAdmin, Running, model_index, running
from routes.http.client_address import address_of, user_agent_of
from routes.http.json_body import ExactRoute
from routes.http.outcomes import taken
from routes.http.responses import JsonResponse, utc_now
from security import DEFAULT_SCOPES, address_subject, new_key
from supabase_config import AsyncClient

router = APIRouter(tags=["public"], route_class=ExactRoute, responses=errors_of(503))

JSON = "application/json"
WRONG_MODE = "The database and this instance disagree on live or sandbox mode; restart the instance."
TOO_MANY = "Five registrations an hour may be tried from one network address. Try again later."
COUNT_SECONDS = 10.0
DESCRIPTION = "Hundreds of models for OpenAI's, OpenRouter's and Anthropic's clients, on prepaid credits."
FEATURES = [
    "chat, responses, messages, text completions, embeddings, images, speech, transcriptions and rerank, "
    "plain and streamed",
    "the same under /v1 and /api/v1, for OpenAI's, Anthropic's and OpenRouter's clients as they are",
    "prepaid credits without overdraft: an upper bound is held before, the upstream's exact cost "
    "charged after",
    "receipts for every request, quotes before it, usage reports and exports",
    "API keys with scopes, expiry, network and domain restrictions, models, budgets, rate limits and "
    "rotation",
    "plans, limits of rate and concurrency by key and user",
    "idempotency keys that pay once, and a response cache",
    "own OpenRouter keys, budgets for your customers, webhooks when they are spent",
    "administration: accounts, credits, refunds, audit log, reconciliation with the upstream",
    "a sandbox that answers for free to every gw_test_ key",
]


NO_MODEL_LIST = (
    "OpenRouter's list of models cannot be fetched, and without it no request can be priced. "
    "Check OPENROUTER_BASE_URL."
)


@router.head("/", include_in_schema=False)
@router.get("/", summary="What this is")
async def read_root(request: Request) -> Response:
    service: Service = request.app.state.service
    schema = await asyncio.to_thread(request.app.openapi)  # made once; streams must not wait for it
    return JsonResponse(
        {
            "name": "AI Gateway",
            "version": VERSION,
            "description": DESCRIPTION,
            "status": "running" if service.runtime else "not serving",
            "mode": service.settings.mode,
            "endpoints": _by_area(schema),
            "features": FEATURES,
            "documentation": "/docs",
        }
    )


def _by_area(schema: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Every documented endpoint and what it is for, by area."""
    areas: dict[str, dict[str, str]] = {}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            areas.setdefault(operation["tags"][0], {})[f"{method.upper()} {path}"] = operation["summary"]
    return areas


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Whether it can serve, and if not why", response_model=Health)
async def read_health(request: Request) -> Response:
    health = await _health(request.app.state.service, request.app.state.user_count)
    return JsonResponse(health, status_code=200 if health.status == "healthy" else 503)


@router.get("/health/live", summary="Whether the process runs")
async def read_live() -> Response:
    return JsonResponse({"status": "alive"})


@router.get("/health/ready", summary="Whether its database is there, and in its mode")
async def read_ready(runtime: Running) -> Response:
    await runtime.check()
    return JsonResponse({"status": "ready"})


class UserCount:
    """How many accounts there are, counted every ten seconds at most: a health check must not count a large
    table each time.
    """

    def __init__(self) -> None:
        self._count, self._counted_at, self._counting = 0, float("-inf"), asyncio.Lock()

    async def read(self, client: AsyncClient) -> int:
        async with self._counting:
            if time.monotonic() - self._counted_at >= COUNT_SECONDS:
                self._count = await db.count_users(client)
                self._counted_at = time.monotonic()
        return self._count


async def _health(service: Service, user_count: UserCount) -> Health:
    health = Health(
        status="healthy",
        database="unknown",
        openrouter="unknown",
        mode=service.settings.mode,
        user_count=None,
        problem=None,
        version=VERSION,
        timestamp=utc_now(),
    )
    try:
        await _examine(service, user_count, health)
    except GatewayError as problem:
        health.problem = problem.message
    if health.problem is not None:
        health.status = "unhealthy"
    return health


async def _examine(service: Service, user_count: UserCount, health: Health) -> None:
    """Fills in what it finds out. Raises GatewayError at the first part that does not work."""
    runtime = await service.ready()
    health.database = "unavailable"
    await runtime.check()
    health.user_count = await user_count.read(runtime.client)
    health.database = "connected"
    health.openrouter = _catalog_health(runtime)
    if health.openrouter == "unavailable":
        health.problem = NO_MODEL_LIST


def _catalog_health(runtime: Runtime) -> Literal["connected", "error", "unavailable", "unknown"]:
    """What the last fetch of the model list came to; a health check is no reason to ask the upstream."""
    catalog = runtime.catalog(None)
    has_data = catalog.status().has_data
    if catalog.last_error is not None:
        return "error" if has_data else "unavailable"
    return "connected" if has_data else "unknown"


@router.get("/models", summary="OpenRouter's list of models")
async def list_models(request: Request, runtime: Running) -> Response:
    index = await model_index(request, runtime)
    head = _model_fields({"total_models": len(index.raw)})
    return Response(head[:-1] + b',"models":' + index.listed + b"}", media_type=JSON)


@router.get("/models/providers", summary="Who makes the models")
async def list_providers(request: Request, runtime: Running) -> Response:
    index = await model_index(request, runtime)
    return Response(_model_fields({"provider_statistics": provider_statistics(index.raw)}), media_type=JSON)


def _model_fields(fields: dict[str, Any]) -> bytes:
    return upstream_json({"status": "success", **fields, "timestamp": f"{utc_now():%Y-%m-%dT%H:%M:%S.%fZ}"})


def provider_statistics(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Models by the author that their ids begin with; the newest three of each are suggested."""
    by_author: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        by_author.setdefault(str(model.get("id", "")).split("/")[0], []).append(model)
    providers = {author: _provider(author, entries) for author, entries in sorted(by_author.items())}
    return {
        "total_providers": len(providers),
        "total_models": len(models),
        "suggested_models": sum(len(provider["suggested_models"]) for provider in providers.values()),
        "pricing_available": sum(1 for model in models if model.get("pricing")),
        "providers": providers,
    }


def _provider(author: str, models: list[dict[str, Any]]) -> dict[str, Any]:
    newest = sorted(models, key=_created, reverse=True)[:3]
    return {
        "name": str(models[0].get("name", author)).split(":")[0],
        "model_count": len(models),
        "suggested_models": [model["id"] for model in newest],
    }


def _created(model: dict[str, Any]) -> float:
    created = model.get("created")
    return created if isinstance(created, int | float) else 0


@router.post(
    "/auth/register",
    summary="A new account and its first key",
    tags=["accounts"],
    response_model=Registered,
    responses=errors_of(400, 401, 403, 409, 429),
)
async def register(request: Request, body: Registration, admin: MaybeAdmin) -> Response:
    runtime = await running(request)
    if admin is None and not runtime.settings.registration_open:
        raise RegistrationClosed()
    key = new_key(body.environment_tag.value)
    # One statement makes the account and its key: neither is ever there without the other.
    account = _new_account(request, runtime, body, admin, _first_key(runtime, body, key))
    result = await db.register_user(runtime.client, account)
    if result["outcome"] != "registered":
        raise _refusal(result["outcome"])
    return JsonResponse(_registered(body, key, result))


def _new_account(
    request: Request, runtime: Runtime, body: Registration, admin: Admin | None, key: NewKey
) -> NewAccount:
    address = address_of(request, runtime)
    return {
        "username": body.username,
        "email": body.email,
        "email_hashes": runtime.keyring.email_hashes(body.email),
        "auth_method": body.auth_method,
        "signup_nanos": str(nanos_from_credits(runtime.settings.credits_at_signup)),
        "mode": runtime.mode,
        "trial_days": runtime.settings.trial_days,
        "address": address,
        # Without a subject no limit counts: an administrator may register many users from one address.
        "address_subject": address_subject(address) if admin is None else None,
        "user_agent": user_agent_of(request),
        "request_id": request.state.request_id,
        "actor": None if admin is None else admin.actor,
        "key": key,
    }


def _first_key(runtime: Runtime, body: Registration, key: str) -> NewKey:
    stored = runtime.keyring.stored(key, body.environment_tag.value, body.key_name)
    return {**stored, **KeyRules(scope_permissions=DEFAULT_SCOPES), "encrypted_key": None}


def _registered(body: Registration, key: str, result: NewUser) -> Registered:
    return Registered(
        user_id=result["user_id"],
        username=body.username,
        email=body.email,
        api_key=key,
        credits=credits_from_nanos(result["credits_nanos"]),
        environment_tag=body.environment_tag,
        scope_permissions=DEFAULT_SCOPES,
        auth_method=body.auth_method,
        subscription_status=result["subscription_status"],
        message="Keep the API key: it is shown this once.",
        timestamp=utc_now(),
    )


def _refusal(
    outcome: Literal["username_taken", "email_taken", "address_limit", "wrong_mode"],
) -> GatewayError:
    if outcome == "wrong_mode":
        return Misconfigured(WRONG_MODE)
    if outcome == "address_limit":
        return RateLimited(TOO_MANY, retry_after=3600)
    return taken(outcome, name_field="username")
