"""Answers are stored whole and sealed against the database, and are found by what decides them and nothing
else.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadRequest
from common.json_types import JsonObject
from gateway.billing.stored_answers import (
    CHARGE_MARK,
    MAX_ANSWER_BYTES,
    AnswerSlot,
    Recording,
    StoredAnswer,
    cache_slot,
    fingerprint,
    idempotency_slot,
    open_answer,
)
from gateway.proxy.dialects.chat import usage_event
from gateway.proxy.sse import with_field
from gateway.proxy.stream import Stream
from security import Vault

ONE, TWO = (base64.urlsafe_b64encode(bytes([n]) * 32).decode().rstrip("=") for n in (1, 2))
VAULT = Vault([ONE])
HEADERS = {"content-type": "application/json", "x-generation-id": "gen-1"}


def recorded(*parts: bytes) -> tuple[bytes, ...] | None:
    recording = Recording()
    for part in parts:
        recording.add(part)
    return recording.pieces()


# Kept as it was.


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=5))
async def test_what_is_sealed_opens_as_it_was(pieces: list[bytes]) -> None:
    answer = StoredAnswer(200, HEADERS, tuple(pieces))
    assert await open_answer(await answer.seal(VAULT), VAULT) == answer


@pytest.mark.parametrize("compressible", [True, False])
async def test_the_largest_answer_that_is_kept_fits_into_its_column(compressible: bool) -> None:
    body = b"a" * MAX_ANSWER_BYTES if compressible else os.urandom(MAX_ANSWER_BYTES)
    pieces = recorded(body[:1000], body[1000:])
    assert pieces == (body,)
    sealed = await StoredAnswer(200, HEADERS, pieces).seal(VAULT)
    assert len(sealed) <= 2_000_000
    stored = await open_answer(sealed, VAULT)
    assert stored is not None and stored.body(b"") == body


def test_one_byte_more_is_not_kept_and_takes_no_memory() -> None:
    recording = Recording()
    for _ in range(3):
        recording.add(b"x" * MAX_ANSWER_BYTES)
    assert recording.is_too_large and recording.pieces() is None and recording._parts == []


async def test_what_is_sealed_shows_nothing() -> None:
    sealed = await StoredAnswer(200, HEADERS, (b"the secret answer",)).seal(VAULT)
    assert sealed.isascii() and "secret" not in sealed and b"secret" not in base64.urlsafe_b64decode(sealed)


async def test_what_none_of_our_keys_sealed_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    sealed = await StoredAnswer(200, HEADERS, (b"text",)).seal(VAULT)
    assert await open_answer(sealed, Vault([TWO])) is None
    assert await open_answer("", VAULT) is None
    assert await open_answer(sealed[:-4], VAULT) is None
    assert await open_answer(sealed, Vault([TWO, ONE])) is not None


# The charge is written anew.


def test_a_json_answer_gets_the_charge_where_it_stood() -> None:
    pieces = recorded(with_field(b'{"id":"gen-1"}', "gateway_usage", CHARGE_MARK))
    assert pieces is not None
    assert (
        StoredAnswer(200, HEADERS, pieces).body(b'{"cost":1}') == b'{"id":"gen-1","gateway_usage":{"cost":1}}'
    )


def test_a_stream_gets_the_charge_where_it_stood() -> None:
    stream = Stream(dict)
    before, end = b'data: {"id":"gen-1"}\n\n', b"data: [DONE]\n\n"
    held = b'data: {"usage":{}}\n\n'
    pieces = recorded(before, usage_event(held, stream, CHARGE_MARK), end)
    assert pieces is not None
    body = StoredAnswer(200, {"content-type": "text/event-stream"}, pieces).body(b'{"cost":1}')
    assert body == before + b'data: {"usage":{},"gateway_usage":{"cost":1}}\n\n' + end


def test_an_answer_without_a_charge_stays_without() -> None:
    assert recorded(b"ID3 audio") == (b"ID3 audio",)
    assert (
        StoredAnswer(200, {"content-type": "audio/mpeg"}, (b"ID3 audio",)).body(b'{"cost":1}') == b"ID3 audio"
    )


# Places.


def test_a_place_is_what_decides_the_answer_and_nothing_else() -> None:
    base: dict[str, Any] = {"mode": "live", "environment": "live", "path": "chat/completions"}
    others: list[dict[str, Any]] = [
        {"mode": "sandbox"},
        {"environment": "staging"},
        {"environment": None},
        {"path": "completions"},
    ]
    keys = [idempotency_slot(**{**base, **change}, key="k", raw=b"{}").place for change in [{}, *others]]
    keys.append(idempotency_slot(**base, key="another", raw=b"{}").place)
    bodies = [cache_slot(**{**base, **change}, body={"a": 1}, vault=VAULT).place for change in [{}, *others]]
    bodies += [
        cache_slot(**base, body={"a": 1, "stream": stream}, vault=VAULT).place for stream in (True, False)
    ]
    bodies.append(cache_slot(**base, body={"a": 1}, vault=VAULT, variant="scenario").place)
    assert len({*keys, *bodies}) == len(keys) + len(bodies)
    assert all(len(place) == 64 for place in (*keys, *bodies))


def test_the_order_of_fields_does_not_matter_to_the_cache_and_the_body_does_to_a_key() -> None:
    one: JsonObject = {"a": 1, "b": {"c": 2, "d": 3}}
    other: JsonObject = {"b": {"d": 3, "c": 2}, "a": 1}
    assert cache_slot("live", None, "p", one, VAULT) == cache_slot("live", None, "p", other, VAULT)
    first, second = (idempotency_slot("live", None, "p", "key", raw) for raw in (b'{"a":1}', b'{"a": 1}'))
    assert first.place == second.place and first.fingerprint != second.fingerprint == fingerprint(b'{"a": 1}')


def test_what_another_key_sealed_is_another_answer() -> None:
    places = [cache_slot("live", None, "p", {}, Vault(keys)) for keys in ([ONE], [TWO, ONE], [ONE, TWO])]
    assert places[0] == places[2] != places[1]
    assert places[0].place == places[1].place
    assert ONE not in places[0].fingerprint


@pytest.mark.parametrize("key", ["", "k" * 256, "a\nb", "\x00"])
def test_an_invalid_key_is_refused_by_name(key: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        idempotency_slot("live", "live", "chat/completions", key, b"{}")
    assert refusal.value.param == "Idempotency-Key"


def test_a_slot_says_no_more_than_it_must() -> None:
    assert AnswerSlot("p", "f").item() == {"place": "p", "fingerprint": "f"}
    assert AnswerSlot("p", "f", 5, True).item() == {
        "place": "p",
        "fingerprint": "f",
        "ttl_seconds": 5,
        "clear": True,
    }
