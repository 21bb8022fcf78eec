"""Multipart forms. As much of RFC 7578 as clients send."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .failures import refusal

_BOUNDARY = re.compile(r'boundary="?([^";,]{1,70})"?', re.IGNORECASE)
_PARAMETER = re.compile(r'\b(name|filename)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Part:
    """One field; a file when it has a file name."""

    name: str
    filename: str | None
    content: bytes


def read_form(content_type: str, body: bytes) -> list[Part]:
    """The parts of a form, in order; raises Refusal (400) for a body that is none."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise refusal(400, "The form has no boundary", error_type="invalid_request")
    pieces = (b"\r\n" + body).split(b"\r\n--" + found[1].strip().encode())
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise refusal(400, "The form is incomplete", error_type="invalid_request")
    return [_read_part(piece) for piece in pieces[1:-1]]


def _read_part(piece: bytes) -> Part:
    head, gap, content = piece.partition(b"\r\n\r\n")
    parameters = dict(_PARAMETER.findall(head.decode("utf-8", "replace")))
    if not gap or "name" not in parameters:
        raise refusal(400, "A part of the form has no name", error_type="invalid_request")
    return Part(parameters["name"], parameters.get("filename"), content)
