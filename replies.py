"""How do answers become JSON? Exact amounts as plain numbers, and every error in the one envelope."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import orjson
import structlog
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from endpoints import is_anthropic, is_openrouter, refusal_of
from errors import BadRequest, GatewayError, MethodNotAllowed, NotFound, NotOffered
from money import plain, plain_credits
from sentences import explain

log = structlog.get_logger("errors")


def to_json(content: Any) -> bytes:
    """JSON with Decimals as plain numbers (pydantic would write `"1E-9"`, and floats are not exact)."""
    return orjson.dumps(content, default=_encode, option=orjson.OPT_UTC_Z)


def _encode(value: object) -> Any:
    if isinstance(value, Decimal):
        return orjson.Fragment(plain(value))
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, frozenset | set | tuple):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def gateway_usage(request_id: str, tokens: int, settled: Mapping[str, Any] | None) -> bytes:
    """The JSON object that every completion carries; `settled` is the database's answer, None while the charge is open."""
    cost, balance = (plain_credits(settled[name]) if settled else "null" for name in ("cost_nanos", "balance_nanos"))
    pending = "" if settled else ',"settlement":"pending"'
    return f'{{"request_id":"{request_id}","tokens_charged":{tokens},"cost":{cost},"user_balance_after":{balance}{pending}}}'.encode()


def charge_headers(settled: Mapping[str, Any] | None) -> dict[str, str]:
    """The same for the headers of an answer that is sent after its settlement."""
    if settled is None:
        return {"x-gateway-settlement": "pending"}
    return {
        "x-gateway-cost": plain_credits(settled["cost_nanos"]),
        "x-gateway-balance": plain_credits(settled["balance_nanos"]),
    }


class Reply(Response):
    """A JSON answer from a model or plain values."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def utc_now() -> datetime.datetime:
    """The time for answers' `timestamp` fields."""
    return datetime.datetime.now(datetime.UTC)


def error_reply(error: GatewayError, request_id: str, path: str = "") -> Reply:
    """The answer that an error becomes, in the form that clients of this path expect."""
    if is_anthropic(path):
        body = error.anthropic_body(request_id)
    elif is_openrouter(path):
        body = error.openrouter_body(request_id)
    else:
        body = error.body(request_id)
    return Reply(body, status_code=error.status, headers=error.headers())


def _request_id(request: Request) -> str:
    return str(getattr(request.state, "request_id", ""))


async def on_gateway_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, GatewayError):
        raise error
    return error_reply(error, _request_id(request), request.url.path)


async def on_invalid(request: Request, error: Exception) -> Response:
    """Pydantic's findings as a 400 that names the first field that is wrong."""
    if not isinstance(error, RequestValidationError):
        raise error
    message, param = explain(error.errors()[0])
    return error_reply(BadRequest(message, param=param), _request_id(request), request.url.path)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths, wrong methods, bodies it cannot read."""
    if not isinstance(error, HTTPException):
        raise error
    if isinstance(error.__cause__, GatewayError):
        return error_reply(error.__cause__, _request_id(request), request.url.path)
    not_offered = refusal_of(request.url.path)
    if not_offered is not None:
        refusal: GatewayError = NotOffered(not_offered)
    elif error.status_code == 404:
        refusal = NotFound(f"There is no {request.method} {request.url.path} here. GET / lists what there is.")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        refusal = MethodNotAllowed(f"{request.url.path} does not take {request.method}.", headers={"allow": allowed})
    else:
        refusal = BadRequest(str(error.detail))
    return error_reply(refusal, _request_id(request), request.url.path)


async def on_bug(request: Request, error: Exception) -> Response:
    """A fault of ours: the log gets the traceback, the client the request id to ask about."""
    request_id = _request_id(request)
    log.error("unhandled", request_id=request_id, path=request.url.path, exc_info=error)
    return error_reply(GatewayError(), request_id, request.url.path)


HANDLERS: Mapping[Any, Any] = {
    GatewayError: on_gateway_error,
    RequestValidationError: on_invalid,
    HTTPException: on_http_error,
    Exception: on_bug,
}
