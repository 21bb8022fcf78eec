"""Upstream failures as GatewayErrors, without the operator's secrets. Statuses and error objects become
GatewayErrors without the operator's secrets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from common.logs import scrub

log = structlog.get_logger("openrouter")

TIMEOUT_STATUSES = (408, 504, 524)
LINK = re.compile(r"https?://\S+|\bopenrouter\.ai/\S+")
OPERATOR = re.compile(r"\b(?:user|org|key|workspace)_[A-Za-z0-9]{8,}\b|\b[0-9a-f]{32,}\b")
ERROR_CODE = re.compile(r"[a-z][a-z0-9_]{2,63}")


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


def sanitised(text: object) -> str:
    """An upstream message without links, keys and ids of the operator's account, at most 500 characters."""
    message = text if isinstance(text, str) and text.strip() else "The model provider gave no reason."
    return scrub(OPERATOR.sub("***", LINK.sub("[link]", message[:4000])))[:500]


def sanitised_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """An `error` object of a stream or body, as clients may see it: message, type, param, code, and the
    upstream's error_type.
    """
    metadata = error.get("metadata")
    kind = metadata.get("error_type") if isinstance(metadata, dict) else error.get("error_type")
    code = error.get("code")
    if _is_of_account(error_status({"error": error}), error) or kind in (
        "authentication",
        "payment_required",
    ):
        return {
            "message": Unavailable.__doc__,
            "type": "api_error",
            "param": None,
            "code": "upstream_unavailable",
        }
    return {
        "message": sanitised(error.get("message")),
        "type": "rate_limit_error" if code == 429 else "api_error",
        "param": None,
        "code": code if _is_code(code) else "upstream_error",
        **(
            {"metadata": {"error_type": kind}} if isinstance(kind, str) and ERROR_CODE.fullmatch(kind) else {}
        ),
    }


def _is_of_account(status: int | None, error: Mapping[str, Any]) -> bool:
    """Whether this is about the key or the credits that the request went out with."""
    return status in (401, 402) or (status == 403 and "key limit" in str(error.get("message")).lower())


def _is_code(code: object) -> bool:
    return (
        ERROR_CODE.fullmatch(code) is not None
        if isinstance(code, str)
        else type(code) is int and 100 <= code <= 999
    )


def error_status(body: object) -> int | None:
    """The status inside an error body (`code`, or `http_status`, as a number or a text of one), None where
    there is none.
    """
    error = body.get("error") if isinstance(body, dict) else None
    for value in (error.get("code"), error.get("http_status")) if isinstance(error, dict) else ():
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value[:4])
        if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
            return value
    return None


def error_from_upstream(
    status: int,
    headers: Mapping[str, str],
    raw: bytes,
    origin: RequestOrigin,
) -> GatewayError:
    """The GatewayError that an upstream's error answer becomes."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        body = {}
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {"message": error}
    message = sanitised(error.get("message"))
    if _is_of_account(status, error):
        if origin.is_byok:
            return ProviderKeyRefused(
                f"OpenRouter refuses the key that you have stored ({status}): {message}"
            )
        if not origin.is_sandbox:
            log.error(
                "upstream_refuses_operator",
                status=status,
                reason=message,
                action="check the OpenRouter account's key and credits",
            )
        return UpstreamUnavailable(
            "The gateway's account at the model provider cannot serve requests now. The operator has been told."
        )
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
        return UpstreamUnavailable(
            "The provider's prices have just changed. Try again.", code="price_changed", retry_after=5
        )
    fallback = "rate_limit_exceeded" if status == 429 else "upstream_refused"
    return UpstreamRefused(
        message,
        status=status,
        code=_code(error, fallback),
        retry_after=retry or (1 if status == 429 else None),
    )


def is_price_change(error: GatewayError) -> bool:
    """Whether the price snapshot that the request was bounded by is out of date."""
    return error.code == "price_changed"


def _is_price_change(status: int, error: Mapping[str, Any]) -> bool:
    availability = error.get("availability") or (
        error.get("metadata") or {} if isinstance(error.get("metadata"), dict) else {}
    ).get("availability")
    excluded = availability.get("excluded_by") if isinstance(availability, dict) else None
    return status == 404 and isinstance(excluded, list) and "max_price" in excluded


def _code(error: Mapping[str, Any], fallback: str) -> str:
    metadata = error.get("metadata")
    kind = (metadata.get("error_type") if isinstance(metadata, dict) else None) or error.get("error_type")
    return kind if isinstance(kind, str) and ERROR_CODE.fullmatch(kind) else fallback


def _retry_after(headers: Mapping[str, str]) -> int | None:
    value = headers.get("retry-after", "")
    return min(max(int(value), 1), 3600) if value.isascii() and value.isdigit() and len(value) < 10 else None
