"""What is sent upstream for a request, as JSON and as a form, for each endpoint; and what is refused before
anything is held.
"""

from __future__ import annotations

from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadRequest
from gateway.proxy.endpoints import ENDPOINTS, Endpoint, is_anthropic
from gateway.proxy.multipart import MAX_FIELD_BYTES, MAX_PARTS, read_form
from gateway.proxy.not_offered import NOT_OFFERED, not_offered_reason
from gateway.proxy.request import ParsedRequest, read_request, write_request

BY_NAME = {endpoint.name: endpoint for endpoint in ENDPOINTS}
TRANSCRIPTIONS = BY_NAME["audio/transcriptions"]
FORM = "multipart/form-data; boundary=xyz"
AUDIO = b"RIFF\r\n--xy\r\n\x00\xff\r\r\n\n--"


def named(text: str) -> str:
    return f"tenant({text})"


def sent(name: str, caps: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    endpoint = BY_NAME[name]
    body, headers = write_request(
        endpoint, read_request(endpoint, orjson.dumps(fields), "application/json"), caps or {}, named
    )
    assert headers == {}
    return dict(orjson.loads(body))


def refusal(endpoint: Endpoint, raw: bytes, content_type: str = "application/json") -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        read_request(endpoint, raw, content_type)
    return caught.value


# JSON.


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_field_goes_out_but_those_that_cross_tenants(name: str) -> None:
    body = sent(
        name,
        {"model": "capped"},
        model="a/b",
        anything={"deep": [1]},
        debug=1,
        trace={},
        cache=1,
        session_id="s",
        user="alice",
    )
    assert (
        body["anything"] == {"deep": [1]} and body["model"] == "capped" and body["session_id"] == "tenant(s)"
    )
    assert not {"debug", "trace", "cache"} & set(body)
    if name == "messages":
        assert body["metadata"] == {"user_id": "tenant()"} and not {"user", "safety_identifier"} & set(body)
    else:
        assert body["user"] == "tenant(alice)"


def test_a_response_s_user_has_two_names_and_one_pseudonym() -> None:
    body = sent(
        "responses", model="a/b", input="x", safety_identifier="alice", prompt_cache_key="k", store=True
    )
    assert (body["user"], body["safety_identifier"], body["prompt_cache_key"]) == (
        "tenant(alice)",
        "tenant(alice)",
        "tenant(k)",
    )
    assert "store" not in body


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"messages"}))
def test_whoever_is_named_beside_the_user_is_the_tenant_s_own(name: str) -> None:
    body = sent(name, model="a/b", safety_identifier="alice")
    assert (body["user"], body["safety_identifier"]) == ("tenant(alice)", "tenant(alice)")
    assert (
        sent(name, model="a/b", safety_identifier="alice", user="bob")["safety_identifier"] == "tenant(bob)"
    )


def test_a_message_s_user_is_in_its_metadata() -> None:
    body = sent(
        "messages",
        model="a/b",
        messages=[],
        metadata={"user_id": "alice", "more": 1},
        user="raw",
        safety_identifier="raw",
    )
    assert body["metadata"] == {"user_id": "tenant(alice)", "more": 1} and not {
        "user",
        "safety_identifier",
    } & set(body)
    assert sent("messages", model="a/b", metadata="odd")["metadata"] == {"user_id": "tenant()"}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("responses", "previous_response_id"),
        ("responses", "conversation"),
        ("responses", "background"),
        ("responses", "prompt"),
        ("messages", "container"),
    ],
)
def test_what_would_live_in_the_operator_s_account_is_refused_by_name(name: str, field: str) -> None:
    error = refusal(BY_NAME[name], orjson.dumps({"model": "a/b", field: "x"}))
    assert error.param == field and "gateway keeps no" in error.message
    assert read_request(BY_NAME[name], orjson.dumps({"model": "a/b", field: None}), "").fields == {
        "model": "a/b",
        field: None,
    }


@pytest.mark.parametrize(
    "name", sorted(name for name, endpoint in BY_NAME.items() if not endpoint.may_stream)
)
def test_what_does_not_stream_says_so(name: str) -> None:
    assert refusal(BY_NAME[name], b'{"stream":true}').param == "stream"
    assert not read_request(BY_NAME[name], b'{"stream":false}', "").is_streamed


@pytest.mark.parametrize(
    "name", sorted(name for name, endpoint in BY_NAME.items() if not endpoint.takes_forms)
)
def test_a_form_where_json_belongs_is_refused(name: str) -> None:
    assert refusal(BY_NAME[name], b"--xyz--", FORM).param == "content-type"


@pytest.mark.parametrize("raw", [b"", b"name=value", b"[1]", b'"x"', b"null"])
def test_a_body_that_is_no_object_is_told_what_would_be_one(raw: bytes) -> None:
    error = refusal(BY_NAME["chat/completions"], raw)
    assert (
        error.code == "invalid_json"
        and 'a JSON object, such as {"model": "openai/gpt-4o-mini"' in error.message
    )


def test_a_transcript_has_a_format_that_the_upstream_writes() -> None:
    for raw, kind in (
        (b'{"response_format":"srt"}', "application/json"),
        (form(field("response_format", b"srt"), FILE), FORM),
    ):
        assert refusal(TRANSCRIPTIONS, raw, kind).param == "response_format"
    assert (
        read_request(TRANSCRIPTIONS, b'{"response_format":"verbose_json"}', "").fields["response_format"]
        == "verbose_json"
    )


# Forms.


def field(name: str, value: bytes, more: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="' + name.encode() + b'"' + more + b"\r\n\r\n" + value


FILE = field("file", AUDIO, b'; filename="a.wav"\r\nContent-Type: audio/wav')
MODEL = field("model", b"openai/whisper-1")


def form(*parts: bytes, boundary: bytes = b"xyz") -> bytes:
    return (
        b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    )


def parsed(raw: bytes, content_type: str) -> list[Message]:
    """The parts of a form, as the standard library reads them."""
    message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + raw)
    return list(message.iter_parts())


def test_a_form_goes_out_with_its_fields_capped_and_its_file_to_the_byte() -> None:
    more = [
        field("timestamp_granularities[]", b"word"),
        field("timestamp_granularities[]", b"segment"),
        field("language", "żółw".encode()),
    ]
    raw = form(MODEL, FILE, *more, field("provider", b'{"order":["a"]}'), field("debug", b"1"))
    request = read_request(TRANSCRIPTIONS, raw, FORM)
    assert request.fields["provider"] == {"order": ["a"]} and request.fields["model"] == "openai/whisper-1"
    body, headers = write_request(
        TRANSCRIPTIONS, request, {"max_tokens": 5, "provider": {"max_price": {"prompt": "1"}}}, named
    )
    assert AUDIO in body and body.count(AUDIO) == 1
    again = read_form(body, headers["Content-Type"])
    assert again.file == request.file and again.file.content == AUDIO
    assert again.fields == {
        "model": "openai/whisper-1",
        "timestamp_granularities[]": ["word", "segment"],
        "language": "żółw",
        "provider": {"max_price": {"prompt": "1"}},
        "max_tokens": "5",
        "user": "tenant()",
    }
    names = [
        part.get_param("name", header="content-disposition") for part in parsed(body, headers["Content-Type"])
    ]
    assert names == [
        "model",
        "timestamp_granularities[]",
        "timestamp_granularities[]",
        "language",
        "provider",
        "max_tokens",
        "user",
        "file",
    ]


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=500), st.text(max_size=30))
def test_any_file_under_any_name_stays_as_it_is(content: bytes, name: str) -> None:
    quoted = (
        name.replace("\\", "").replace('"', "").replace("\r", "").replace("\n", "").encode("utf-8", "replace")
    )
    part = field("file", content, b'; filename="' + quoted + b'"')
    request = read_request(
        TRANSCRIPTIONS, form(part, boundary=b"B" * 60), "multipart/form-data; boundary=" + "B" * 60
    )
    body, headers = write_request(TRANSCRIPTIONS, request, {}, named)
    assert read_form(body, headers["Content-Type"]).file.content == content


def test_quotes_and_line_breaks_end_no_header() -> None:
    part = field("file", b"x", b"; filename*=UTF-8''a%22%0D%0AX-Evil%3A%201.wav")
    request = read_request(TRANSCRIPTIONS, form(part, field('a"b', b"1")), FORM)
    body, _ = write_request(TRANSCRIPTIONS, request, {}, named)
    assert b"\r\nX-Evil" not in body and b'filename="a%22X-Evil: 1.wav"' in body


def test_a_boundary_may_be_quoted_and_have_a_preamble() -> None:
    raw = b"ignored\r\n" + form(MODEL, FILE, boundary=b"a b")[:-2] + b"\r\nepilogue"
    assert read_form(raw, 'Multipart/Form-Data; charset=utf-8; boundary="a b"').fields == {
        "model": "openai/whisper-1"
    }


CASES: dict[str, tuple[bytes, str, str]] = {
    "no file": (form(MODEL), FORM, "file"),
    "no fields at all": (form(), FORM, "file"),
    "two files": (form(MODEL, FILE, FILE), FORM, "file"),
    "an empty file": (form(MODEL, field("file", b"", b'; filename="a.wav"')), FORM, "file"),
    "a file of another name": (form(MODEL, FILE, field("mask", b"x", b'; filename="a.png"')), FORM, "mask"),
    "a huge field": (form(FILE, field("prompt", b"x" * (MAX_FIELD_BYTES + 1))), FORM, "prompt"),
    "a field twice": (form(MODEL, MODEL, FILE), FORM, "model"),
    "too many fields": (form(*[field(f"x{n}", b"") for n in range(MAX_PARTS)], FILE), FORM, "fields"),
    "a field with parameters without end": (
        form(FILE, b'Content-Disposition: form-data; name="x"; a="' + b";" * 8000 + b"\r\n\r\n"),
        FORM,
        "content-type",
    ),
    "a boundary behind parameters without end": (
        form(MODEL, FILE),
        FORM + '; a="' + ";" * 60_000,
        "content-type",
    ),
    "a field that is no text": (form(FILE, field("model", b"\xff")), FORM, "model"),
    "a provider that is no object": (form(FILE, field("provider", b"{")), FORM, "provider"),
    "another boundary": (form(MODEL, FILE, boundary=b"abc"), FORM, "content-type"),
    "no boundary": (form(MODEL, FILE), "multipart/form-data", "content-type"),
    "an empty boundary": (form(MODEL, FILE), 'multipart/form-data; boundary=""', "content-type"),
    "a form that breaks off": (form(MODEL, FILE)[:-6], FORM, "content-type"),
    "no form": (b'{"model":"a/b"}', FORM, "content-type"),
    "nothing": (b"", FORM, "content-type"),
    "a field without a name": (
        form(FILE, b"Content-Disposition: form-data\r\n\r\nx"),
        FORM,
        "content-disposition",
    ),
    "a field without headers": (form(FILE, b"\r\nx"), FORM, "content-type"),
    "a field without an end of its headers": (
        form(FILE, b"Content-Disposition: form-data"),
        FORM,
        "content-type",
    ),
    "headers without end": (
        form(FILE, field("a", b"x", b"\r\nX-More: " + b"y" * 10_000)),
        FORM,
        "content-type",
    ),
    "a file in base64": (
        form(MODEL, field("file", b"eA==", b"\r\nContent-Transfer-Encoding: base64")),
        FORM,
        "file",
    ),
    "a list of models": (form(MODEL, FILE, field("models[]", b"dear/model")), FORM, "models[]"),
    "an object in pieces": (
        form(MODEL, FILE, field("provider[order][]", b"dear")),
        FORM,
        "provider[order][]",
    ),
    "a stream": (form(MODEL, FILE, field("stream", b"true")), FORM, "stream"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_form_that_is_wrong_is_refused_by_the_name_of_the_field(case: str) -> None:
    raw, content_type, param = CASES[case]
    error = refusal(TRANSCRIPTIONS, raw, content_type)
    assert (error.status, error.param) == (400, param)


@settings(deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=10))
def test_any_bytes_for_a_form_are_read_or_refused(raw: bytes, boundary: bytes) -> None:
    for body in (raw, form(raw), form(FILE, raw)):
        for kind in (FORM, "multipart/form-data; boundary=" + boundary.decode("latin-1")):
            try:
                parsed: ParsedRequest | None = read_request(TRANSCRIPTIONS, body, kind)
            except BadRequest:
                parsed = None
            assert parsed is None or parsed.file is not None


# Paths.


def test_what_is_not_offered_is_named_under_both_prefixes_and_below() -> None:
    for name in NOT_OFFERED:
        plain = name.rstrip("/")
        for path in (f"/v1/{plain}", f"/api/v1/{plain}", f"/v1/{plain}/abc", f"/api/v1/{plain}/abc/def"):
            if name.endswith("/") and path.endswith(plain):
                continue
            assert f"`{plain}`" in (not_offered_reason(path) or ""), path
    for path in (
        "/v1/nothing",
        "/files",
        "/v1/filesystem",
        "/",
        "/v2/files",
        "/v1/responses",
        "/v1/chat/completions",
        "/v1/generation",
    ):
        assert not_offered_reason(path) is None


def test_no_served_path_is_refused_and_messages_alone_speak_as_anthropic() -> None:
    for endpoint in ENDPOINTS:
        for path in endpoint.all_paths:
            assert not_offered_reason(path) is None
            assert is_anthropic(path) == (endpoint.name == "messages")
    assert is_anthropic("/v1/messages/count_tokens") and not is_anthropic("/v1/messages2")
