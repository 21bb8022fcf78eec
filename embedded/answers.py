"""Statuses, error bodies, Content-Range.

The facts are PostgREST 14's: https://docs.postgrest.org/en/v14/references/errors.html
"""

from __future__ import annotations

import asyncpg
import httpx
import orjson

JSON_TYPE = "application/json; charset=utf-8"

# Whole codes first, then classes by their longest prefix; everything else is 400.
STATUS_OF_SQLSTATE = {
    "23503": 409,
    "23505": 409,
    "25006": 405,
    "42883": 404,
    "42P01": 404,
    "42P17": 500,
    "42501": 403,
    "53400": 500,
    "57P01": 503,
    "P0001": 400,
    "21000": 500,
    "PGRST": 501,
    "08": 503,
    "09": 500,
    "0L": 403,
    "0P": 403,
    "25": 500,
    "28": 403,
    "2D": 500,
    "38": 500,
    "39": 500,
    "3B": 500,
    "40": 500,
    "53": 503,
    "54": 500,
    "55": 500,
    "57": 500,
    "58": 500,
    "F0": 500,
    "HV": 500,
    "P0": 500,
    "XX": 500,
}


class Refusal(Exception):
    """An answer that is an error, in PostgREST's shape."""

    def __init__(
        self, status: int, code: str, message: str, *, details: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "details": details, "hint": hint, "message": message}

    def response(self, request: httpx.Request) -> httpx.Response:
        """The refusal as an HTTP response."""
        headers = {"content-type": JSON_TYPE}
        return httpx.Response(self.status, headers=headers, content=orjson.dumps(self.body), request=request)


def not_implemented(feature: str) -> Refusal:
    """What is not imitated here is refused by name, never answered nearly."""
    return Refusal(501, "PGRST501", f"{feature} is not implemented by the in-process PostgREST")


def bad_request(code: str, message: str, *, details: str | None = None) -> Refusal:
    """A request that PostgREST cannot read."""
    return Refusal(400, code, message, details=details)


def refusal_of(error: asyncpg.PostgresError) -> Refusal:
    """What PostgREST answers to an error that PostgreSQL raised."""
    code = error.sqlstate or "XX000"
    message = error.message or str(error)
    return Refusal(_status(code, message), code, message, details=error.detail, hint=error.hint)


def _status(code: str, message: str) -> int:
    if code.startswith("PT") and code[2:].isdigit():
        return int(code[2:])
    if code == "21000" and message.endswith("requires a WHERE clause"):
        return 400
    return STATUS_OF_SQLSTATE.get(code) or STATUS_OF_SQLSTATE.get(code[:2], 400)


def content_range(first: int, last: int, total: int | None) -> str:
    """The Content-Range header; `*` stands for no rows and for an unknown total."""
    rows = f"{first}-{last}" if first <= last and total != 0 else "*"
    return f"{rows}/{'*' if total is None else total}"


def page_status(first: int, last: int, total: int | None) -> int:
    """200 for everything there is, 206 for a part of it. Raises Refusal for a page beyond the end."""
    if total is None:
        return 200
    if first > total:
        raise Refusal(
            416,
            "PGRST103",
            "Requested range not satisfiable",
            details=f"An offset of {first} was requested, but there are only {total} rows.",
        )
    return 206 if 1 + last - first < total else 200


def not_a_single_object(rows: int) -> Refusal:
    """One object was asked for and the result is none or several."""
    return Refusal(
        406,
        "PGRST116",
        "Cannot coerce the result to a single JSON object",
        details=f"The result contains {rows} rows",
    )
