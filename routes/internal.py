"""The sweep that a scheduler calls. It settles or expires the requests that crashed instances left behind."""

from __future__ import annotations

import hmac

from fastapi import APIRouter, Request
from fastapi.responses import Response

from common.errors import InvalidKey, Misconfigured
from gateway.runtime import maintenance
from gateway.runtime.instance import Runtime
from models import Swept, errors_of
from routes.dependencies import Declared, Running, refuse_guesses
from routes.http.responses import success
from security import presented_key

router = APIRouter(
    prefix="/internal",
    tags=["internal"],
    dependencies=Declared,
    responses=errors_of(400, 401, 429, 503),
)


@router.get("/sweep", summary="Resolve expired holds (CRON_SECRET or ADMIN_API_KEY)", response_model=Swept)
@router.post("/sweep", include_in_schema=False)
async def sweep(request: Request, runtime: Running) -> Response:
    await _require_secret(request, runtime)
    swept = await maintenance.sweep(runtime)
    await maintenance.sum_up(runtime)
    return success(**swept)


async def _require_secret(request: Request, runtime: Runtime) -> None:
    key = presented_key(request.headers).encode()
    secret = runtime.settings.cron_secret
    accepted = [runtime.admin_key] if secret is None else [runtime.admin_key, secret.get_secret_value()]
    # In constant time, as for the administrator's key: the sweep may be called from anywhere.
    if not any(hmac.compare_digest(key, each.encode()) for each in accepted):
        await refuse_guesses(request, runtime, "INVALID_SWEEP_SECRET")
        if secret is None:
            raise Misconfigured("CRON_SECRET is not set, and this is not ADMIN_API_KEY.")
        raise InvalidKey("The sweep needs CRON_SECRET.")
