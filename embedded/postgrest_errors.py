"""PostgREST's error responses: a status, a code and a message, as version 14 sends them.

Statuses and bodies follow https://docs.postgrest.org/en/v14/references/errors.html. A feature that this
package does not imitate must be refused by name, never answered approximately.
"""

from __future__ import annotations

import asyncpg
import httpx
import orjson

JSON_TYPE = "application/json; charset=utf-8"

# Whole SQLSTATEs first, then their classes (the first two characters). Any other error is a 400.
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


class PostgrestError(Exception):
    """An error response in PostgREST's shape."""

    def __init__(
        self, status: int, code: str, message: str, *, details: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "details": details, "hint": hint, "message": message}

    def response(self, request: httpx.Request) -> httpx.Response:
        """The error as an HTTP response."""
        headers = {"content-type": JSON_TYPE}
        return httpx.Response(self.status, headers=headers, content=orjson.dumps(self.body), request=request)


def not_implemented(feature: str) -> PostgrestError:
    """A feature of PostgREST that is not imitated here."""
    return PostgrestError(501, "PGRST501", f"{feature} is not implemented by the in-process PostgREST")


def bad_request(code: str, message: str, *, details: str | None = None) -> PostgrestError:
    """A request that PostgREST cannot read."""
    return PostgrestError(400, code, message, details=details)


def error_from_postgres(error: asyncpg.PostgresError) -> PostgrestError:
    """The response that PostgREST makes of an error that PostgreSQL raised."""
    code = error.sqlstate or "XX000"
    message = error.message or str(error)
    return PostgrestError(_status(code, message), code, message, details=error.detail, hint=error.hint)


def _status(code: str, message: str) -> int:
    # A function can choose its status itself: raise sqlstate 'PT418'.
    if code.startswith("PT") and code[2:].isdigit():
        return int(code[2:])
    # The extension safeupdate shares its code with "more than one row", which is a 500.
    if code == "21000" and message.endswith("requires a WHERE clause"):
        return 400
    return STATUS_OF_SQLSTATE.get(code) or STATUS_OF_SQLSTATE.get(code[:2], 400)


def range_not_satisfiable(details: str) -> PostgrestError:
    """A page that lies outside the result, or that makes no sense."""
    return PostgrestError(416, "PGRST103", "Requested range not satisfiable", details=details)


def not_a_single_object(rows: int) -> PostgrestError:
    """The client wants exactly one object and the result has none or several."""
    message = "Cannot coerce the result to a single JSON object"
    return PostgrestError(406, "PGRST116", message, details=f"The result contains {rows} rows")
