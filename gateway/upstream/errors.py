"""Upstream failures as GatewayErrors. Nothing of the operator's account must reach a client: no key, no id,
no link.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import orjson
import structlog

from common.errors import (
    GatewayError,
    ProviderKeyRefused,
    Unavailable,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from common.json_types import Json, JsonObject
from common.logs import scrub

log = structlog.get_logger("openrouter")

TIMEOUT_STATUSES = (408, 504, 524)  # what timed out may still be running, and be billed
LINK = re.compile(r"https?://\S+|\bopenrouter\.ai/\S+")
OPERATOR = re.compile(r"\b(?:user|org|key|workspace)_[A-Za-z0-9]{8,}\b|\b[0-9a-f]{32,}\b")
ERROR_CODE = re.compile(r"[a-z][a-z0-9_]{2,63}")
ACCOUNT_TROUBLES = ("authentication", "payment_required")


@dataclass(frozen=True, slots=True)
class RequestOrigin:
    """What a failed request was sent with, which decides whose trouble its failure is.

    `is_sandbox`: the sandbox answered, so nobody is alarmed. `is_byok`: it went out under the user's own key,
    whose troubles are the user's. `client_caps_price`: the client had set a price cap below what is held, so
    a refusal for the price says nothing new of prices.
    """

    is_sandbox: bool = False
    is_byok: bool = False
    client_caps_price: bool = False


def sanitised(text: Json) -> str:
    """An upstream message without links, keys and ids of the operator's account, at most 500 characters."""
    message = text if isinstance(text, str) and text.strip() else "The model provider gave no reason."
    return scrub(OPERATOR.sub("***", LINK.sub("[link]", message[:4000])))[:500]


def sanitised_error(error: JsonObject) -> dict[str, Json]:
    """An `error` object of a stream or body, as clients may see it: message, type, param, code, and the
    upstream's error_type.
    """
    kind, code = _error_type(error), error.get("code")
    if _is_of_account(error_status(error), error) or kind in ACCOUNT_TROUBLES:
        message, code = Unavailable.__doc__, "upstream_unavailable"
        return {"message": message, "type": "api_error", "param": None, "code": code}
    is_known = isinstance(kind, str) and ERROR_CODE.fullmatch(kind) is not None
    return {
        "message": sanitised(error.get("message")),
        "type": "rate_limit_error" if code == 429 else "api_error",
        "param": None,
        "code": code if _is_code(code) else "upstream_error",
        **({"metadata": {"error_type": kind}} if is_known else {}),
    }


def _error_type(error: JsonObject) -> Json:
    metadata = error.get("metadata")
    return metadata.get("error_type") if isinstance(metadata, dict) else error.get("error_type")


def _is_of_account(status: int | None, error: JsonObject) -> bool:
    """Whether this is about the key or the credits that the request went out with."""
    return status in (401, 402) or (status == 403 and "key limit" in str(error.get("message")).lower())


def _is_code(code: Json) -> bool:
    if isinstance(code, str):
        return ERROR_CODE.fullmatch(code) is not None
    return type(code) is int and 100 <= code <= 999


def error_status(error: JsonObject) -> int | None:
    """The status in an `error` object (`code`, or `http_status`, as a number or a text of one), None without
    one.
    """
    for value in (error.get("code"), error.get("http_status")):
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value[:4])
        if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
            return value
    return None


def error_from_upstream(
    status: int, headers: Mapping[str, str], raw: bytes, origin: RequestOrigin
) -> GatewayError:
    """The GatewayError that an upstream's error response becomes."""
    error = _error_object(raw)
    message = sanitised(error.get("message"))
    if _is_of_account(status, error):
        return _account_error(status, message, origin)
    if not 400 <= status < 600:
        return UpstreamError(f"The model provider answered with the unexpected status {status}.")
    if status in TIMEOUT_STATUSES:
        return UpstreamTimeout(message, code=_code(error, "upstream_timeout"))
    retry = _retry_after(headers)
    if status in (503, 529):
        return UpstreamUnavailable(message, code=_code(error, "upstream_unavailable"), retry_after=retry)
    if status >= 500:
        return UpstreamError(message, code=_code(error, "upstream_error"), retry_after=retry)
    if _is_price_change(status, error) and not origin.client_caps_price:
        # By then the model list may be read anew for a changed price (repricing.REFRESH_SECONDS).
        message = "The provider's prices have just changed. Try again."
        return UpstreamUnavailable(message, code="price_changed", retry_after=5)
    if status == 429:
        code = _code(error, "rate_limit_exceeded")
        return UpstreamRefused(message, status=status, code=code, retry_after=retry or 1)
    code = _code(error, "upstream_refused")
    return UpstreamRefused(message, status=status, code=code, retry_after=retry)


def _error_object(raw: bytes) -> JsonObject:
    """The `error` object of a body; a message where it is something else."""
    try:
        body: Json = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {"message": error}


def _account_error(status: int, message: str, origin: RequestOrigin) -> GatewayError:
    """The key or the credits are refused: the user's own, or the operator's, who is told in the log."""
    if origin.is_byok:
        return ProviderKeyRefused(f"OpenRouter refuses the key that you have stored ({status}): {message}")
    if not origin.is_sandbox:
        log.error(
            "upstream_refuses_operator",
            status=status,
            reason=message,
            action="check the OpenRouter account's key and credits",
        )
    message = (
        "The gateway's account at the model provider cannot serve requests now. The operator has been told."
    )
    return UpstreamUnavailable(message)


def is_price_change(error: GatewayError) -> bool:
    """Whether the price snapshot that the request was bounded by is out of date."""
    return error.code == "price_changed"


def _is_price_change(status: int, error: JsonObject) -> bool:
    """Whether `provider.max_price` left no provider: a 404 whose `availability` names it."""
    metadata = error.get("metadata")
    availability = error.get("availability") or (
        metadata.get("availability") if isinstance(metadata, dict) else None
    )
    excluded = availability.get("excluded_by") if isinstance(availability, dict) else None
    return status == 404 and isinstance(excluded, list) and "max_price" in excluded


def _code(error: JsonObject, fallback: str) -> str:
    metadata = error.get("metadata")
    kind = (metadata.get("error_type") if isinstance(metadata, dict) else None) or error.get("error_type")
    return kind if isinstance(kind, str) and ERROR_CODE.fullmatch(kind) else fallback


def _retry_after(headers: Mapping[str, str]) -> int | None:
    """Whole seconds up to an hour; other forms of the header count as none."""
    value = headers.get("retry-after", "")
    return min(max(int(value), 1), 3600) if value.isascii() and value.isdigit() and len(value) < 10 else None
