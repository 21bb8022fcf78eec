"""The HTTP responses for rows that were read, changed or returned by a function.

Statuses and Content-Range follow PostgREST 14:
https://docs.postgrest.org/en/v14/references/api/pagination_count.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import asyncpg
import httpx

from .catalog import Function
from .postgrest_errors import JSON_TYPE, bad_request, not_a_single_object, range_not_satisfiable
from .queries import Query


@dataclass(frozen=True)
class Result:
    """What a statement returned: the rows as JSON text, their number, and the total if it was counted."""

    body: str
    rows: int
    total: int | None

    @classmethod
    def from_record(cls, record: asyncpg.Record) -> Result:
        return cls(*record)


def page_response(request: httpx.Request, query: Query, result: Result) -> httpx.Response:
    """The rows of a table or function. Raises PostgrestError for a page beyond the end."""
    _require_single(query, result)
    last = query.offset + result.rows - 1
    headers = {"content-range": content_range(query.offset, last, result.total)}
    return _response(request, page_status(query.offset, last, result.total), result.body, headers)


def call_response(request: httpx.Request, function: Function, query: Query, result: Result) -> httpx.Response:
    """The result of a function; 204 for one that returns nothing."""
    if function.return_type == "void":
        return httpx.Response(204, request=request)
    return page_response(request, query, result)


def change_response(request: httpx.Request, query: Query, result: Result) -> httpx.Response:
    """The rows that were inserted, updated or deleted; only a status where the client does not want them."""
    _require_single(query, result)
    headers = {"content-range": _changed_range(request, query, result)}
    created = request.method == "POST"
    if query.preferences.returns == "minimal":
        return httpx.Response(201 if created else 204, headers=headers, request=request)
    return _response(request, 201 if created else 200, result.body, headers)


def require_few_changes(query: Query, result: Result) -> None:
    """Raises PostgrestError when more rows were changed than `Prefer: max-affected` allows."""
    limit = query.preferences.max_affected
    if limit is not None and result.rows > limit:
        message = "Query result exceeds max-affected preference constraint"
        raise bad_request("PGRST124", message, details=f"The query affects {result.rows} rows")


def content_range(first: int, last: int, total: int | None) -> str:
    """The Content-Range header; `*` stands for no rows and for an unknown total."""
    rows = f"{first}-{last}" if first <= last and total != 0 else "*"
    return f"{rows}/{'*' if total is None else total}"


def page_status(first: int, last: int, total: int | None) -> int:
    """200 for everything there is, 206 for a part of it. Raises PostgrestError for a page beyond the end."""
    if total is None:
        return 200
    if first > total:
        details = f"An offset of {first} was requested, but there are only {total} rows."
        raise range_not_satisfiable(details)
    return 206 if 1 + last - first < total else 200


def _require_single(query: Query, result: Result) -> None:
    if query.is_single and result.rows != 1:
        raise not_a_single_object(result.rows)


def _changed_range(request: httpx.Request, query: Query, result: Result) -> str:
    total = result.total if query.preferences.count else None
    # PostgREST names the rows of an update only; an insert or a delete has `*` in their place.
    return (
        content_range(0, result.rows - 1, total) if request.method == "PATCH" else content_range(1, 0, total)
    )


def _response(request: httpx.Request, status: int, body: str, headers: Mapping[str, str]) -> httpx.Response:
    # A HEAD request runs the same statement, for its headers alone.
    content = b"" if request.method == "HEAD" else body.encode()
    fields = {"content-type": JSON_TYPE, **headers}
    return httpx.Response(status, headers=fields, content=content, request=request)
