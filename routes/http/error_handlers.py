"""Every error, of ours or of the framework, becomes the one envelope here. No traceback reaches a client."""

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
    """Pydantic's first finding as a 400 that names the field."""
    if not isinstance(error, RequestValidationError):
        raise error
    message, param = describe(error.errors()[0])
    return error_reply(BadRequest(message, param=param), request_id_of(request), request.url.path)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths, wrong methods, bodies that it cannot read."""
    if not isinstance(error, HTTPException):
        raise error
    if isinstance(error.__cause__, GatewayError):
        refusal = error.__cause__
    elif (reason := not_offered_reason(request.url.path)) is not None:
        refusal = NotOffered(reason)
    else:
        refusal = _refusal(request, error)
    return error_reply(refusal, request_id_of(request), request.url.path)


def _refusal(request: Request, error: HTTPException) -> GatewayError:
    method, path = request.method, request.url.path
    if error.status_code == 404:
        return NotFound(f"There is no {method} {path} here. GET / lists what there is.")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return MethodNotAllowed(f"{path} does not take {method}.", headers={"allow": allowed})
    return BadRequest(str(error.detail))


async def on_bug(request: Request, error: Exception) -> Response:
    """A bug of ours: the log gets the traceback, the client gets the request id to ask about."""
    request_id = request_id_of(request)
    log.error("unhandled", request_id=request_id, path=request.url.path, exc_info=error)
    return error_reply(GatewayError(), request_id, request.url.path)


HANDLERS: Mapping[Any, Any] = {
    GatewayError: on_gateway_error,
    RequestValidationError: on_invalid,
    HTTPException: on_http_error,
    Exception: on_bug,
}
