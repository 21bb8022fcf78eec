"""Reads a request, and writes what goes upstream: every field, except what would cross tenants or reach the
operator's account.

Unknown fields pass. A field that cannot be honoured is refused by its name, before anything is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import orjson

from common.errors import BadRequest
from common.json_types import Json, JsonObject
from gateway.proxy.audio_duration import seconds_of_audio, seconds_of_file
from gateway.proxy.endpoints import Endpoint
from gateway.proxy.multipart import CONTENT_TYPE, FormFile, is_form, read_form, write_form
from security import Credential

MAX_DEPTH = 250
MAX_CONTAINERS, MAX_VALUES = 200_000, 1_000_000
MAX_END_USER_LENGTH = 256
OBJECT = 'a JSON object, such as {"model": "openai/gpt-4o-mini", ...}'

# Fields that would reach across tenants, or show the operator's account in the answer.
NOT_FORWARDED = frozenset(("debug", "trace", "cache"))
# Names that the client chose. The upstream knows one account only, in which two tenants may choose the same.
NAMESPACED = ("session_id", "prompt_cache_key")
# What would be stored in the operator's account, where every tenant could read it.
STORED = "The gateway keeps no conversations: send them whole, in `input`."
NO_JOBS = "The gateway keeps no answers to be fetched later: leave it out, or stream."
REFUSED = {
    "responses": {
        "previous_response_id": STORED,
        "conversation": STORED,
        "background": NO_JOBS,
        "prompt": "The gateway keeps no prompts.",
    },
    "messages": {"container": "The gateway keeps no containers."},
}
# By endpoint: what has the upstream store the answer, and names that Anthropic's API has no field for.
DROPPED = {"responses": frozenset(("store",)), "messages": frozenset(("user", "safety_identifier"))}
JSON_FORMATS = (None, "json", "verbose_json")

Pseudonym = Callable[[str], str]  # makes a name that is the tenant's own out of one of the client's


@dataclass(frozen=True, slots=True)
class IncomingRequest:
    """One request as it arrived: where to, from whom, and its raw body."""

    endpoint: Endpoint
    credential: Credential
    body: bytes
    request_id: str
    content_type: str = ""
    client_request_id: str | None = None
    scenario: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as it was understood. `file` is a form's; `seconds` are the most that a recording in it
    lasts, where that is known.
    """

    fields: dict[str, Json]
    file: FormFile | None = None
    seconds: int | None = None

    @property
    def is_streamed(self) -> bool:
        return self.fields.get("stream") is True


def read_request(endpoint: Endpoint, raw: bytes, content_type: str) -> ParsedRequest:
    """The request in a body. Raises BadRequest."""
    if not is_form(content_type):
        request = _read_json_request(endpoint, raw)
    elif endpoint.takes_forms:
        request = _read_form_request(raw, content_type)
    else:
        raise BadRequest("This endpoint takes JSON, not forms.", param="content-type")
    _refuse_fields(endpoint, request.fields)
    return request


def _read_form_request(raw: bytes, content_type: str) -> ParsedRequest:
    form = read_form(raw, content_type)
    file = form.file
    return ParsedRequest({**form.fields}, file, seconds_of_file(file.content, file.name, file.content_type))


def _read_json_request(endpoint: Endpoint, raw: bytes) -> ParsedRequest:
    fields = read_json(raw)
    audio = fields.get("input_audio") if endpoint.takes_forms else None
    return ParsedRequest(fields, seconds=seconds_of_audio(audio) if isinstance(audio, dict) else None)


def read_json(raw: bytes) -> dict[str, Json]:
    """The parsed body. Raises BadRequest."""
    # Before it is parsed: parsing such a body takes more memory and time than any honest one.
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b",") > MAX_VALUES:
        raise _invalid_json("The request body has too many parts.")
    if not raw:
        raise _invalid_json(f"The request body is missing: send {OBJECT}.")
    try:
        body: Json = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _invalid_json(f"The request body is not valid JSON ({error}). Send {OBJECT}.") from None
    if not isinstance(body, dict):
        raise _invalid_json(f"The request body must be {OBJECT}.")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        _refuse_depth(body)
    return body


def _refuse_depth(body: JsonObject) -> None:
    """Writing takes less nesting than reading does. A body that cannot be sent must not get a hold."""
    try:
        orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise _invalid_json(f"The request body is nested too deeply: {error}.") from None


def _invalid_json(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_json")


def _refuse_fields(endpoint: Endpoint, fields: JsonObject) -> None:
    for name, reason in REFUSED.get(endpoint.name, {}).items():
        if fields.get(name):
            raise BadRequest(f"`{name}`: {reason}", param=name)
    # Fields of forms are text.
    if not endpoint.may_stream and fields.get("stream") not in (None, False, "false"):
        raise BadRequest("This endpoint does not stream.", param="stream")
    if endpoint.takes_forms and fields.get("response_format") not in JSON_FORMATS:
        raise BadRequest(
            "`response_format` is `json` or `verbose_json`: the upstream writes no others.",
            param="response_format",
        )


def write_request(
    endpoint: Endpoint, request: ParsedRequest, caps: JsonObject, pseudonym: Pseudonym
) -> tuple[bytes, Mapping[str, str]]:
    """Body and headers for the upstream, with the caps that keep the cost within the hold, and nothing that
    crosses tenants.
    """
    left_out = NOT_FORWARDED | DROPPED.get(endpoint.name, frozenset())
    fields = {name: value for name, value in request.fields.items() if name not in left_out}
    fields.update(caps)
    for name in NAMESPACED:
        if fields.get(name) is not None:
            fields[name] = pseudonym(str(fields[name]))
    fields.update(_identity(endpoint, request.fields, pseudonym))
    if request.file is not None:
        return write_form(fields, request.file), {"Content-Type": CONTENT_TYPE}
    return orjson.dumps(fields), {}


def _identity(endpoint: Endpoint, fields: JsonObject, pseudonym: Pseudonym) -> dict[str, Json]:
    """The fields that tell the upstream who asks: a pseudonym, never the client's own name.

    Where the client names nobody, it stands for the account: the upstream can tell tenants apart even then.
    """
    if endpoint.name == "messages":
        metadata = fields.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        return {"metadata": {**metadata, "user_id": pseudonym(str(metadata.get("user_id") or ""))}}
    user = pseudonym(str(fields.get("user") or fields.get("safety_identifier") or ""))
    has_two = endpoint.name == "responses" or "safety_identifier" in fields
    return {"user": user, "safety_identifier": user} if has_two else {"user": user}


def end_user_of(endpoint: Endpoint, fields: JsonObject, header: str | None) -> str | None:
    """The customer of our user that a request is for: the header `x-end-user`, else the field that each API
    has for it. Raises BadRequest.
    """
    if header is not None:
        return _checked_end_user(_header_text(header), "x-end-user")
    is_message = endpoint.name == "messages"
    holder, param = (fields.get("metadata"), "user_id") if is_message else (fields, "user")
    name = holder.get(param) if isinstance(holder, Mapping) else None
    if name is not None and not isinstance(name, str):
        raise BadRequest(f"`{param}` is a string.", param=param)
    return _checked_end_user(name, param) if name else None


def _checked_end_user(name: str, param: str) -> str:
    if not (1 <= len(name) <= MAX_END_USER_LENGTH and name.isprintable()):
        raise BadRequest(
            f"`{param}`: an end user is named by 1 to {MAX_END_USER_LENGTH} printable characters.",
            param=param,
        )
    return name


def _header_text(value: str) -> str:
    """A header as its sender meant it: HTTP has no characters beyond Latin-1, and most who need them send
    UTF-8.
    """
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value
