"""Where does the next page begin? Opaque cursors over the last row seen."""

from __future__ import annotations

import base64
import binascii
import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Path, Query

from errors import BadRequest

# PostgreSQL keeps no NUL in a text.
NO_NUL = r"^[^\x00]*$"
PathId = Annotated[int, Path(ge=1, le=2**63 - 1)]
QueryId = Annotated[int | None, Query(ge=1, le=2**63 - 1)]
PageSize = Annotated[int, Query(ge=1, le=1000, description="Rows a page")]
Cursor = Annotated[str | None, Query(max_length=200, pattern=NO_NUL, description="`next_cursor` of the page before")]


def cursor_of(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _text_of(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
    except (binascii.Error, ValueError):
        raise _foreign() from None


def _foreign() -> BadRequest:
    return BadRequest("This is no cursor of ours.", param="cursor")


def moment_and_id_of(cursor: str | None) -> tuple[str, str] | None:
    """The (time, request id) that a cursor stands for. Raises BadRequest for what is no cursor of ours."""
    if cursor is None:
        return None
    moment, _, request_id = _text_of(cursor).partition(" ")
    try:
        found = datetime.datetime.fromisoformat(moment)
        if found.tzinfo is None:
            raise _foreign()
        return found.astimezone(datetime.UTC).isoformat(), str(UUID(request_id))
    except (ValueError, OverflowError):
        raise _foreign() from None


def request_id_of(cursor: str | None) -> str | None:
    """The request id that a cursor stands for. Raises BadRequest for what is no cursor of ours."""
    if cursor is None:
        return None
    try:
        return str(UUID(_text_of(cursor)))
    except ValueError:
        raise _foreign() from None


def id_of(cursor: str | None) -> int | None:
    """The row id that a cursor stands for. Raises BadRequest for what is no cursor of ours."""
    if cursor is None:
        return None
    text = _text_of(cursor)
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise _foreign()
    return int(text)
