"""Pages of lists: opaque cursors that stand for the last row of the page before."""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, TypedDict, TypeVar
from uuid import UUID

from fastapi import Path, Query

from common.errors import BadRequest

# PostgreSQL cannot store NUL in a text.
NO_NUL = r"^[^\x00]*$"
PathId = Annotated[int, Path(ge=1, le=2**63 - 1)]
QueryId = Annotated[int | None, Query(ge=1, le=2**63 - 1)]
PageSize = Annotated[int, Query(ge=1, le=1000, description="Rows a page")]
Cursor = Annotated[
    str | None, Query(max_length=200, pattern=NO_NUL, description="`next_cursor` of the page before")
]


def cursor_of(text: str) -> str:
    """A cursor for what marks the last row; opaque, so that no client builds on what is in it."""
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _text_of(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
    except (binascii.Error, ValueError):
        raise _foreign() from None


def _foreign() -> BadRequest:
    return BadRequest("This is no cursor of ours.", param="cursor")


def moment_and_id_of(cursor: str | None) -> tuple[str, str] | None:
    """The (time, request id) that a cursor stands for. Raises BadRequest for one that is not ours."""
    if cursor is None:
        return None
    moment, _, request_id = _text_of(cursor).partition(" ")
    try:
        time = datetime.datetime.fromisoformat(moment)
        if time.tzinfo is None:
            raise _foreign()
        return time.astimezone(datetime.UTC).isoformat(), str(UUID(request_id))
    except (ValueError, OverflowError):
        raise _foreign() from None


def request_id_of(cursor: str | None) -> str | None:
    """The request id that a cursor stands for. Raises BadRequest for one that is not ours."""
    if cursor is None:
        return None
    try:
        return str(UUID(_text_of(cursor)))
    except ValueError:
        raise _foreign() from None


def id_of(cursor: str | None) -> int | None:
    """The row id that a cursor stands for. Raises BadRequest for one that is not ours."""
    if cursor is None:
        return None
    text = _text_of(cursor)
    # 18 digits always fit a bigint; PostgreSQL would fail at a number that does not.
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise _foreign()
    return int(text)


class WithId(TypedDict):
    id: int


class WithMoment(TypedDict):
    created_at: str
    request_id: str


RowT_contra = TypeVar("RowT_contra", contravariant=True)
MarkT = TypeVar("MarkT")


@dataclass(frozen=True, slots=True)
class Order(Generic[RowT_contra, MarkT]):
    """A keyset order: the mark by which a row is found in it again, and the mark as a cursor."""

    mark: Callable[[RowT_contra], MarkT]
    read: Callable[[str | None], MarkT | None]
    write: Callable[[MarkT], str]

    def following(self, rows: Sequence[RowT_contra], limit: int) -> str | None:
        """The cursor of the page after these rows, where there may be one."""
        return self.write(self.mark(rows[-1])) if len(rows) == limit else None


BY_ID: Order[WithId, int] = Order(lambda row: row["id"], id_of, lambda mark: cursor_of(str(mark)))
BY_MOMENT: Order[WithMoment, tuple[str, str]] = Order(
    lambda row: (row["created_at"], row["request_id"]),
    moment_and_id_of,
    lambda mark: cursor_of(" ".join(mark)),
)
