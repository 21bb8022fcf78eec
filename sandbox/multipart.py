"""Reads multipart forms: as much of RFC 7578 as clients use."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .failures import invalid_request

_BOUNDARY = re.compile(r'boundary="?([^";,]{1,70})"?', re.IGNORECASE)
_PARAMETER = re.compile(r'\b(name|filename)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Part:
    """One field; a file when it has a file name."""

    name: str
    filename: str | None
    content: bytes


def read_form(content_type: str, body: bytes) -> list[Part]:
    """The parts of a form, in order; raises Refusal (400) for a body that is not a form."""
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise invalid_request("The form has no boundary")
    # Every boundary begins on a new line, and the first one on the first line.
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary[1].strip().encode())
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise invalid_request("The form is incomplete")
    return [_read_part(piece) for piece in pieces[1:-1]]


def _read_part(piece: bytes) -> Part:
    head, gap, content = piece.partition(b"\r\n\r\n")
    parameters = dict(_PARAMETER.findall(head.decode("utf-8", "replace")))
    if not gap or "name" not in parameters:
        raise invalid_request("A part of the form has no name")
    return Part(parameters["name"], parameters.get("filename"), content)
