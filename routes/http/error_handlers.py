"""Every error in the one envelope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from common.errors import BadRequest, GatewayError, MethodNotAllowed, NotFound, NotOffered
from common.validation_messages import describe
from gateway.proxy.not_offered import not_offered_reason
from routes.http.error_shapes import error_reply, request_id_of

log = structlog.get_logger("errors")


async def on_gateway_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, GatewayError):
        raise error
    return error_reply(error, request_id_of(request), request.url.path)


async def on_invalid(request: Request, error: Exception) -> Response:
    """Pydantic's findings as a 400 that names the first field that is wrong."""
    if not isinstance(error, RequestValidationError):
        raise error
    message, param = describe(error.errors()[0])
    return error_reply(BadRequest(message, param=param), request_id_of(request), request.url.path)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths, wrong methods, bodies it cannot read."""
    if not isinstance(error, HTTPException):
        raise error
    if isinstance(error.__cause__, GatewayError):
        return error_reply(error.__cause__, request_id_of(request), request.url.path)
    not_offered = not_offered_reason(request.url.path)
    if not_offered is not None:
        refusal: GatewayError = NotOffered(not_offered)
    elif error.status_code == 404:
        refusal = NotFound(
            f"There is no {request.method} {request.url.path} here. GET / lists what there is."
        )
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        refusal = MethodNotAllowed(
            f"{request.url.path} does not take {request.method}.", headers={"allow": allowed}
        )
    else:
        refusal = BadRequest(str(error.detail))
    return error_reply(refusal, request_id_of(request), request.url.path)


async def on_bug(request: Request, error: Exception) -> Response:
    """A fault of ours: the log gets the traceback, the client the request id to ask about."""
    request_id = request_id_of(request)
    log.error("unhandled", request_id=request_id, path=request.url.path, exc_info=error)
    return error_reply(GatewayError(), request_id, request.url.path)


HANDLERS: Mapping[Any, Any] = {
    GatewayError: on_gateway_error,
    RequestValidationError: on_invalid,
    HTTPException: on_http_error,
    Exception: on_bug,
}
