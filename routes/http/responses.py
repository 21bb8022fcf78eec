"""JSON answers whose amounts are exact: Decimals become plain numbers, never floats or texts."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from common.money import plain


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


class JsonResponse(Response):
    """A JSON answer made of a model or of plain values."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def success(**fields: object) -> JsonResponse:
    """The management API's usual answer: `status` is success, and then these fields."""
    return JsonResponse({"status": "success", **fields})


def utc_now() -> datetime.datetime:
    """The time for answers' `timestamp` fields."""
    return datetime.datetime.now(datetime.UTC)
