"""Reads and writes multipart forms (RFC 7578): text fields, and one file that stays as it is, to the byte.

The file itself must never be parsed: a delimiter cannot occur in it (RFC 2046, 5.1.1), so the body is cut at
the delimiters. Why no library does this: docs/decisions/0011.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser

import orjson

from common.errors import BadRequest
from common.json_types import Json, JsonObject

MAX_PARTS = 64
MAX_HEAD_BYTES = 8 * 1024
# The standard library reads parameters in time that grows with their number times their length.
MAX_PARAMETERS = 64
MAX_FIELD_BYTES = 64 * 1024
MAX_NAME_LENGTH = 128
MAX_CONTAINERS = 100  # in a field that is an object: reading takes more nesting than writing does
FILE = "file"
ANY_TYPE = "application/octet-stream"
OBJECTS = frozenset(("provider",))  # fields that are objects, written as JSON
# OpenAI's lists. No other name may have brackets: some servers would read `models[]` or `provider[order]` as
# a field that nobody has bounded here.
LISTS = frozenset(
    ("timestamp_granularities[]", "include[]", "known_speaker_names[]", "known_speaker_references[]")
)
PLAIN_ENCODINGS = ("", "7bit", "8bit", "binary")
# The same for every form, so that they share the request that the upstream's client builds once; random, so
# that no client can put it into a file.
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

    fields: JsonObject
    file: FormFile


def is_form(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def read_form(raw: bytes, content_type: str) -> Form:
    """The form in a body. Raises BadRequest, which names the field."""
    fields: dict[str, Json] = {}
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


def write_form(fields: JsonObject, file: FormFile) -> bytes:
    """The body of a form under BOUNDARY."""
    parts = [
        (f'name="{_quoted(name)}"', _text(value).encode())
        for name, values in fields.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    of_file = f'name="{FILE}"; filename="{_quoted(file.name)}"\r\nContent-Type: {file.content_type}'
    parts.append((of_file, file.content))
    # Joined at once, so that a file of many megabytes is copied once.
    pieces = [piece for head, content in parts for piece in (_opening(head), content, b"\r\n")]
    return b"".join((*pieces, f"--{BOUNDARY}--\r\n".encode()))


def _opening(parameters: str) -> bytes:
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {parameters}\r\n\r\n".encode()


def _text(value: Json) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def _boundary(content_type: str) -> bytes:
    _check_parameters(content_type.count(";"))
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if not boundary or len(boundary) > 200 or not boundary.isascii():
        raise BadRequest("The Content-Type of a form names its `boundary`.", param="content-type")
    return boundary.encode()


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
    is_field = head.get_content_disposition() == "form-data"
    if not is_field or not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH:
        raise BadRequest(
            "Every field of a form has a `name` in its Content-Disposition.", param="content-disposition"
        )
    if not name.isprintable():
        raise BadRequest("The name of a field is not printable.", param="content-disposition")
    if ("[" in name or "]" in name) and name not in LISTS:
        known = ", ".join(sorted(LISTS))
        message = f"`{name}` is no field here. Lists are {known}; an object is JSON in one field."
        raise BadRequest(message, param=name)
    if str(head.get("content-transfer-encoding", "")).strip().lower() not in PLAIN_ENCODINGS:
        raise BadRequest(f"`{name}` has a Content-Transfer-Encoding, which forms do not have.", param=name)
    return name


def _file(head: Message, content: bytes) -> FormFile:
    if not content:
        raise BadRequest("`file` is empty.", param=FILE)
    name = "".join(c for c in head.get_filename() or FILE if c.isprintable())[-256:]
    content_type = head.get_content_type() if "content-type" in head else ANY_TYPE
    sound = content_type.isascii() and content_type.isprintable()  # else it could end our own header
    return FormFile(name, content_type if sound else ANY_TYPE, content)


def _value(name: str, content: bytes) -> Json:
    if len(content) > MAX_FIELD_BYTES:
        raise BadRequest(f"`{name}` is longer than {MAX_FIELD_BYTES} bytes.", param=name)
    try:
        text = content.decode()
        return _object(name, text) if name in OBJECTS else text
    except UnicodeDecodeError:
        raise BadRequest(f"`{name}` is not UTF-8.", param=name) from None
    except orjson.JSONDecodeError:
        raise BadRequest(f"`{name}` must be a JSON object.", param=name) from None


def _object(name: str, text: str) -> Json:
    if text.count("{") + text.count("[") > MAX_CONTAINERS:
        raise BadRequest(f"`{name}` has too many parts.", param=name)
    value: Json = orjson.loads(text)
    return value


def _add(fields: dict[str, Json], name: str, value: Json) -> None:
    if name in LISTS:
        values = fields.setdefault(name, [])
        assert isinstance(values, list)
        values.append(value)
    elif name in fields:
        raise BadRequest(f"There is more than one `{name}`.", param=name)
    else:
        fields[name] = value


def _quoted(text: str) -> str:
    """A name as browsers write it (https://html.spec.whatwg.org/#multipart-form-data)."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
