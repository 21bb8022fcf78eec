"""Multipart forms, the file to the byte. Its text fields are read, its one file stays as it is, to the byte.

RFC 7578. The file itself is never parsed: a delimiter cannot occur in it (RFC 2046, 5.1.1), so the body is
cut at the delimiters.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from typing import Any

import orjson

from common.errors import BadRequest

MAX_PARTS = 64
MAX_HEAD_BYTES = 8 * 1024
# The standard library reads parameters in time that grows with their number times their length.
MAX_PARAMETERS = 64
MAX_FIELD_BYTES = 64 * 1024
MAX_NAME_LENGTH = 128
MAX_CONTAINERS = 100  # in a field that is an object: reading takes more nesting than writing does
FILE = "file"
OBJECTS = frozenset(("provider",))  # fields that are objects, written as JSON
# OpenAI's lists. No other name has brackets: some servers would read `models[]` or `provider[order]` as what
# nobody has bounded here.
LISTS = frozenset(
    ("timestamp_granularities[]", "include[]", "known_speaker_names[]", "known_speaker_references[]")
)
PLAIN_ENCODINGS = ("", "7bit", "8bit", "binary")
# The same for every form, so that they share what the upstream's client builds once; random, so that no file
# can hold it.
BOUNDARY = "gateway-" + secrets.token_hex(16)
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


@dataclass(frozen=True, slots=True)
class FormFile:
    """The file of a form."""

    name: str
    content_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """A form: its text fields (one of LISTS has a list), and its file."""

    fields: Mapping[str, Any]
    file: FormFile


def is_form(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def read_form(raw: bytes, content_type: str) -> Form:
    """The form in a body. Raises BadRequest, which names the field."""
    fields: dict[str, Any] = {}
    file: FormFile | None = None
    for head, content in _parts(raw, _boundary(content_type)):
        name = _name(head)
        if name == FILE:
            if file is not None:
                raise BadRequest("There is more than one `file`.", param=FILE)
            file = _file(head, content)
        elif head.get_filename() is not None:
            raise BadRequest(f"`{name}` is a file. The only file here is `file`.", param=name)
        else:
            _add(fields, name, _value(name, content))
    if file is None:
        raise BadRequest("`file` is missing.", param=FILE)
    return Form(fields, file)


def write_form(fields: Mapping[str, Any], file: FormFile) -> bytes:
    """The body of a form under BOUNDARY."""
    parts = []
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            text = each if isinstance(each, str) else orjson.dumps(each, default=str).decode()
            parts.append(
                f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{_quoted(name)}"\r\n\r\n{text}\r\n'.encode()
            )
    about = f'Content-Disposition: form-data; name="{FILE}"; filename="{_quoted(file.name)}"\r\nContent-Type: {file.content_type}'
    return b"".join(
        (
            *parts,
            f"--{BOUNDARY}\r\n{about}\r\n\r\n".encode(),
            file.content,
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        )
    )


def _boundary(content_type: str) -> bytes:
    _check_parameters(content_type.count(";"))
    header = Message()
    header["content-type"] = content_type
    found = header.get_boundary()
    if not found or len(found) > 200 or not found.isascii():
        raise BadRequest("The Content-Type of a form names its `boundary`.", param="content-type")
    return found.encode()


def _parts(raw: bytes, boundary: bytes) -> list[tuple[Message, bytes]]:
    delimiter = b"\r\n--" + boundary
    whole = b"\r\n" + raw
    if whole.count(delimiter) > MAX_PARTS:
        raise BadRequest(f"The form has more than {MAX_PARTS} fields.", param="fields")
    _, *sections = whole.split(delimiter)
    if not sections or not sections[-1].startswith(b"--"):
        raise BadRequest(
            "The body is no form with the `boundary` that its Content-Type names, or breaks off.",
            param="content-type",
        )
    return [_part(section) for section in sections[:-1]]


def _part(section: bytes) -> tuple[Message, bytes]:
    start, _, rest = section.partition(b"\r\n")
    head, blank, content = rest.partition(b"\r\n\r\n")
    if start.strip(b" \t") or not blank or len(head) > MAX_HEAD_BYTES:
        raise BadRequest(
            "A field of the form does not begin with its headers and a blank line.", param="content-type"
        )
    _check_parameters(head.count(b";"))
    return HeaderParser().parsestr(head.decode("utf-8", "replace")), content


def _check_parameters(semicolons: int) -> None:
    if semicolons > MAX_PARAMETERS:
        raise BadRequest(
            f"A header of the form has more than {MAX_PARAMETERS} semicolons.", param="content-type"
        )


def _name(head: Message) -> str:
    name = head.get_param("name", header="content-disposition")
    if (
        head.get_content_disposition() != "form-data"
        or not isinstance(name, str)
        or not 0 < len(name) <= MAX_NAME_LENGTH
    ):
        raise BadRequest(
            "Every field of a form has a `name` in its Content-Disposition.", param="content-disposition"
        )
    if not name.isprintable():
        raise BadRequest("The name of a field is not printable.", param="content-disposition")
    if ("[" in name or "]" in name) and name not in LISTS:
        raise BadRequest(
            f"`{name}` is no field here. Lists are {', '.join(sorted(LISTS))}; an object is JSON in one field.",
            param=name,
        )
    if str(head.get("content-transfer-encoding", "")).strip().lower() not in PLAIN_ENCODINGS:
        raise BadRequest(f"`{name}` has a Content-Transfer-Encoding, which forms do not have.", param=name)
    return name


def _file(head: Message, content: bytes) -> FormFile:
    if not content:
        raise BadRequest("`file` is empty.", param=FILE)
    named = "".join(c for c in head.get_filename() or FILE if c.isprintable())[-256:]
    kind = head.get_content_type() if "content-type" in head else "application/octet-stream"
    return FormFile(
        named, kind if kind.isascii() and kind.isprintable() else "application/octet-stream", content
    )


def _value(name: str, content: bytes) -> Any:
    if len(content) > MAX_FIELD_BYTES:
        raise BadRequest(f"`{name}` is longer than {MAX_FIELD_BYTES} bytes.", param=name)
    try:
        text = content.decode()
        if name in OBJECTS and text.count("{") + text.count("[") > MAX_CONTAINERS:
            raise BadRequest(f"`{name}` has too many parts.", param=name)
        return orjson.loads(text) if name in OBJECTS else text
    except UnicodeDecodeError:
        raise BadRequest(f"`{name}` is not UTF-8.", param=name) from None
    except orjson.JSONDecodeError:
        raise BadRequest(f"`{name}` must be a JSON object.", param=name) from None


def _add(fields: dict[str, Any], name: str, value: Any) -> None:
    if name in LISTS:
        fields.setdefault(name, []).append(value)
    elif name in fields:
        raise BadRequest(f"There is more than one `{name}`.", param=name)
    else:
        fields[name] = value


def _quoted(text: str) -> str:
    """A name as browsers write it (https://html.spec.whatwg.org/#multipart-form-data)."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
