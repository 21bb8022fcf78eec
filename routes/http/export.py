"""Lists as CSV or JSON lines, streamed page by page from the database, however long they are.

Only one page is in memory: the next is fetched when the client has taken the last, and never after the client
has left. An export that breaks off must not look complete: CSV ends with a line that says so, JSON lines end
with an error and a connection that is cut.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Generic, TypeVar

import structlog
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Send

from common.errors import GatewayError
from common.money import plain
from routes.http.pagination import MarkT, Order
from routes.http.responses import to_json, utc_now

log = structlog.get_logger("exports")

PAGE = 250

CSV, JSON_LINES = "text/csv; charset=utf-8", "application/x-ndjson"
# What OpenAPI says about a list that can be exported.
TEXT = {"schema": {"type": "string"}}
EXPORTED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": TEXT, JSON_LINES: TEXT}}}
TABULATED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": TEXT}}}

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class Listing(Generic[RowT, MarkT]):
    """A list in keyset order: how a page of it is fetched, and how a row becomes what clients see."""

    name: str
    model: type[BaseModel]
    order: Order[RowT, MarkT]
    fetch: Callable[[MarkT | None, int], Awaitable[list[RowT]]]
    show: Callable[[RowT], BaseModel]


async def export(
    request: Request, listing: Listing[RowT, MarkT], form: str, *, before: MarkT | None, most: int | None
) -> StreamingResponse:
    """The whole list. Raises what the first page raises; a later error can only go into the stream."""
    pages = _pages(listing, before, most)
    # Before the status is sent: an error now is an answer of its own, later it can only end the stream.
    first: list[RowT] = await anext(pages, [])
    return Export(listing, form, first, pages, request.state.request_id)


async def _pages(
    listing: Listing[RowT, MarkT], before: MarkT | None, most: int | None
) -> AsyncIterator[list[RowT]]:
    """Pages until an empty one: a hosted database may return smaller pages than were asked for."""
    missing = most
    while missing is None or missing > 0:
        rows = await listing.fetch(before, PAGE if missing is None else min(PAGE, missing))
        if not rows:
            return
        before = listing.order.mark(rows[-1])
        missing = None if missing is None else missing - len(rows)
        yield rows


class Export(StreamingResponse, Generic[RowT, MarkT]):
    """A streamed list that cannot be taken for complete when it is not."""

    def __init__(
        self,
        listing: Listing[RowT, MarkT],
        form: str,
        first: list[RowT],
        rest: AsyncIterator[list[RowT]],
        request_id: str,
    ) -> None:
        self._listing, self._form, self._request_id = listing, form, request_id
        name = f"{listing.name}-{utc_now():%Y-%m-%d}.{form}"
        super().__init__(
            self._chunks(first, rest),
            media_type=CSV if form == "csv" else JSON_LINES,
            headers={"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"},
        )

    async def _chunks(self, first: list[RowT], rest: AsyncIterator[list[RowT]]) -> AsyncIterator[bytes]:
        columns = list(self._listing.model.model_fields)
        if self._form == "csv":
            yield csv_lines([columns])
        yield self._written(first, columns)
        async for page in rest:
            yield self._written(page, columns)

    def _written(self, page: list[RowT], columns: Sequence[str]) -> bytes:
        views = [self._listing.show(row) for row in page]
        if self._form == "csv":
            return csv_lines([cell(getattr(view, name)) for name in columns] for view in views)
        return b"".join(to_json(view) + b"\n" for view in views)

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self.body_iterator:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except GatewayError as error:
            log.warning(
                "export_broken", list=self._listing.name, request_id=self._request_id, reason=error.code
            )
            words = self._last_words(error)
            # A body without an end makes the server cut the connection, which every client notices. A
            # spreadsheet would lose the whole file, so CSV ends regularly, with a line that says so.
            await send({"type": "http.response.body", "body": words, "more_body": self._form != "csv"})
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _last_words(self, error: GatewayError) -> bytes:
        if self._form == "csv":
            return csv_lines(
                [[f"INCOMPLETE: this export broke off here. {error.message} (request {self._request_id})"]]
            )
        return to_json(error.body(self._request_id)) + b"\n"


def csv_answer(columns: Iterable[str], rows: Iterable[Mapping[str, Any]], filename: str) -> StreamingResponse:
    """Rows that are in memory, as CSV, line by line."""
    names = list(columns)

    async def lines() -> AsyncIterator[bytes]:
        yield csv_lines([names])
        for row in rows:
            yield csv_lines([[cell(row.get(name)) for name in names]])

    headers = {"content-disposition": f'attachment; filename="{filename}"', "cache-control": "no-store"}
    return StreamingResponse(lines(), media_type=CSV, headers=headers)


# What a spreadsheet would run: a formula's first character, also in full width or after blanks.
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def cell(value: Any) -> str:
    """A value as a spreadsheet reads it. Text that it would run as a formula gets a leading ' (OWASP, "CSV
    Injection").
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, dict | list):
        return to_json(value).decode()
    text = str(value)
    return f"'{text}" if isinstance(value, str) and FORMULA.match(text) else text


def csv_lines(rows: Iterable[Sequence[str]]) -> bytes:
    """Lines of CSV (RFC 4180) in UTF-8."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerows(rows)
    return buffer.getvalue().encode()
