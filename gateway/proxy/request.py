"""Reads a request and writes what goes upstream. Everything the client said, but for what would cross tenants
or reach the operator's account.

Fields that we do not know pass. What cannot be honoured is refused by its name, before anything is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from common.errors import BadRequest
from gateway.proxy.audio_duration import seconds_of_audio, seconds_of_file
from gateway.proxy.endpoints import Endpoint
from gateway.proxy.multipart import CONTENT_TYPE, FormFile, is_form, read_form, write_form
from security import Credential

MAX_DEPTH = 250
MAX_CONTAINERS, MAX_VALUES = 200_000, 1_000_000
MAX_END_USER_LENGTH = 256


# Fields that would reach across tenants or show the operator's account, in requests and in answers.
NOT_FORWARDED = frozenset(("debug", "trace", "cache"))
NAMESPACED = ("session_id", "prompt_cache_key")


# What would be kept in the operator's account, for every tenant to read.
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
DROPPED = {"responses": frozenset(("store",)), "messages": frozenset(("user", "safety_identifier"))}
OBJECT = 'a JSON object, such as {"model": "openai/gpt-4o-mini", ...}'
JSON_FORMATS = (None, "json", "verbose_json")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as it was understood: its fields, the file of a form, and the most seconds of sound in it
    where that is known.
    """

    fields: dict[str, Any]
    file: FormFile | None = None
    seconds: int | None = None

    @property
    def is_streamed(self) -> bool:
        return self.fields.get("stream") is True


def read_request(endpoint: Endpoint, raw: bytes, content_type: str) -> ParsedRequest:
    """The request in a body. Raises BadRequest."""
    if endpoint.takes_forms and is_form(content_type):
        form = read_form(raw, content_type)
        file = form.file
        found = ParsedRequest(
            dict(form.fields), file, seconds_of_file(file.content, file.name, file.content_type)
        )
    elif is_form(content_type):
        raise BadRequest("This endpoint takes JSON, not forms.", param="content-type")
    else:
        fields = read_json(raw)
        audio = fields.get("input_audio") if endpoint.takes_forms else None
        found = ParsedRequest(fields, seconds=seconds_of_audio(audio) if isinstance(audio, dict) else None)
    _refuse(endpoint, found.fields)
    return found


def read_json(raw: bytes) -> dict[str, Any]:
    """The parsed body. Raises BadRequest; before parsing where that would take more memory and time than any
    honest body.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b",") > MAX_VALUES:
        raise BadRequest("The request body has too many parts.", code="invalid_json")
    if not raw:
        raise BadRequest(f"The request body is missing: send {OBJECT}.", code="invalid_json")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(
            f"The request body is not valid JSON ({error}). Send {OBJECT}.", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise BadRequest(f"The request body must be {OBJECT}.", code="invalid_json")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        try:
            orjson.dumps(body)  # which takes less nesting than reading does
        except orjson.JSONEncodeError as error:
            raise BadRequest(
                f"The request body is nested too deeply: {error}.", code="invalid_json"
            ) from None
    return body


def _refuse(endpoint: Endpoint, fields: Mapping[str, Any]) -> None:
    for name, why in REFUSED.get(endpoint.name, {}).items():
        if fields.get(name):
            raise BadRequest(f"`{name}`: {why}", param=name)
    if not endpoint.may_stream and fields.get("stream") not in (None, False, "false"):
        raise BadRequest("This endpoint does not stream.", param="stream")
    if endpoint.takes_forms and fields.get("response_format") not in JSON_FORMATS:
        raise BadRequest(
            "`response_format` is `json` or `verbose_json`: the upstream writes no others.",
            param="response_format",
        )


def write_request(
    endpoint: Endpoint, request: ParsedRequest, caps: Mapping[str, Any], pseudonym: Callable[[str], str]
) -> tuple[bytes, Mapping[str, str]]:
    """Body and headers for the upstream: capped to what was granted, and with nothing in it that crosses
    tenants.

    `pseudonym` makes a name that is the tenant's own out of one of the client's.
    """
    fields = request.fields
    unsent = NOT_FORWARDED | DROPPED.get(endpoint.name, frozenset())
    sent = {name: value for name, value in fields.items() if name not in unsent}
    sent.update(caps)
    for name in NAMESPACED:
        if sent.get(name) is not None:
            sent[name] = pseudonym(str(sent[name]))
    sent.update(_identity(endpoint, fields, pseudonym))
    if request.file is not None:
        return write_form(sent, request.file), {"Content-Type": CONTENT_TYPE}
    return orjson.dumps(sent), {}


def end_user_of(endpoint: Endpoint, fields: Mapping[str, Any], header: str | None) -> str | None:
    """The customer of our user that a request is for: `x-end-user`, else what each API names them by. Raises
    BadRequest.
    """
    if header is not None:
        return _end_user(_header_text(header), "x-end-user")
    about = fields.get("metadata") if endpoint.name == "messages" else fields
    param = "user_id" if endpoint.name == "messages" else "user"
    named = about.get(param) if isinstance(about, Mapping) else None
    if named is not None and not isinstance(named, str):
        raise BadRequest(f"`{param}` is a string.", param=param)
    return _end_user(named, param) if named else None


def _end_user(name: str, param: str) -> str:
    if not (1 <= len(name) <= MAX_END_USER_LENGTH and name.isprintable()):
        raise BadRequest(
            f"`{param}`: an end user is named by 1 to {MAX_END_USER_LENGTH} printable characters.",
            param=param,
        )
    return name


def _header_text(value: str) -> str:
    """A header as its sender meant it: HTTP knows no characters beyond Latin-1, and most who need them send
    UTF-8.
    """
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _identity(
    endpoint: Endpoint, fields: Mapping[str, Any], pseudonym: Callable[[str], str]
) -> dict[str, Any]:
    """Who asks, where each API wants to be told: never the client's own words for it."""
    if endpoint.name == "messages":
        given = fields.get("metadata")
        about = given if isinstance(given, dict) else {}
        return {"metadata": {**about, "user_id": pseudonym(str(about.get("user_id") or ""))}}
    user = pseudonym(str(fields.get("user") or fields.get("safety_identifier") or ""))
    has_two = endpoint.name == "responses" or "safety_identifier" in fields
    return {"user": user, "safety_identifier": user} if has_two else {"user": user}


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
