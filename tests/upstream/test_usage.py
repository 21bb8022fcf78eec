"""Usage objects and generation records, sound or not, become exact numbers or nothing."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.upstream.usage import (
    MAX_COST,
    MAX_TOKENS,
    Usage,
    parse_json,
    read_generation,
    read_text,
    read_usage,
)


def read(text: str) -> Usage:
    usage = read_usage(parse_json(text.encode()))
    assert usage is not None
    return usage


@pytest.mark.parametrize(
    ("written", "nanos"),
    [
        ("0.0823075", "82307500"),
        ("1E-9", "1"),
        ("0.000000000123456789012345678", "0.123456789012345678"),
        ('"0.00002055"', "20550"),
        ("0", "0"),
        ("1e-999999999", "0.000000000000000000001"),
        ("1000000", "1000000000000000"),
    ],
)
def test_a_cost_is_read_to_its_last_digit(written: str, nanos: str) -> None:
    billable = read(f'{{"cost": {written}}}').billable_nanos
    assert billable is not None
    assert Decimal(billable) == Decimal(nanos) and "e" not in billable.lower()


@pytest.mark.parametrize(
    "written",
    [
        "null",
        "-0.1",
        "NaN",
        "Infinity",
        "-Infinity",
        "true",
        "[]",
        "{}",
        '"NaN"',
        '"x"',
        "1e400",
        "1000001",
        "9" * 5000,
    ],
)
def test_what_is_no_cost_is_unknown_and_never_zero(written: str) -> None:
    usage = read(f'{{"cost": {written}, "prompt_tokens": 3}}')
    assert (usage.cost, usage.billable_nanos, usage.prompt_tokens) == (None, None, 3)


def test_the_bill_of_an_own_key_is_added_only_where_one_was_used() -> None:
    details = '"cost_details": {"upstream_inference_cost": 0.035002}'
    assert read(f'{{"cost": 0.001, "is_byok": true, {details}}}').cost == Decimal("0.036002")
    assert read(f'{{"cost": 0.001, "is_byok": false, {details}}}').cost == Decimal("0.001")
    assert read('{"cost": 0.001, "is_byok": true}').cost is None
    assert (
        read(
            '{"cost": 9e999999, "is_byok": true, "cost_details": {"upstream_inference_cost": 9e999999}}'
        ).cost
        is None
    )


def test_the_three_dialects_of_usage_are_read() -> None:
    chat = read('{"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}, '
                '"completion_tokens_details": {"reasoning_tokens": 1}}')  # fmt: skip
    responses = read('{"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 2}, '
                     '"output_tokens_details": {"reasoning_tokens": 1}}')  # fmt: skip
    assert chat == responses == Usage(9, 4, 2, 1)
    assert chat.total_tokens == 13


@pytest.mark.parametrize("written", ["-1", "1.5", "true", '"3"', "1e999999999", str(MAX_TOKENS + 1), "null"])
def test_what_is_no_number_of_tokens_is_unknown(written: str) -> None:
    assert read(f'{{"prompt_tokens": {written}}}').prompt_tokens is None


def test_a_generation_record_prefers_the_native_count() -> None:
    usage = read_generation(
        {"total_cost": Decimal("0.5"), "tokens_prompt": 1, "native_tokens_prompt": 2, "tokens_completion": 3}
    )
    assert usage == Usage(2, 3, None, None, Decimal("0.5"))


def test_text_that_postgresql_refuses_is_cleaned() -> None:
    assert read_text("a\x00b\ud800c\n") == "abc"
    assert read_text("\x00") is None and read_text("") is None and read_text(5) is None
    assert len(read_text("x" * 100_000) or "") == 256


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[" * 100_000, b"\xff\xfe{\x00}\x00", b'{"a": 1} {"b": 2}', b"\x00"]
)
def test_what_is_no_json_is_one_kind_of_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
FIELDS = (
    "cost",
    "is_byok",
    "cost_details",
    "prompt_tokens",
    "completion_tokens",
    "input_tokens",
    "prompt_tokens_details",
    "total_cost",
)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_no_usage_object_breaks_the_reader(value: dict[str, Any]) -> None:
    parsed = parse_json(json.dumps(value).encode())
    assert isinstance(parsed, dict)
    for usage in (read_usage(parsed), read_generation(parsed)):
        assert usage is not None
        assert usage.cost is None or 0 <= usage.cost <= 2 * MAX_COST
        assert 0 <= usage.total_tokens <= 2 * MAX_TOKENS
        assert len(usage.billable_nanos or "") < 80


@given(st.decimals(min_value=0, max_value=1000, places=25))
def test_a_cost_survives_its_notation(cost: Decimal) -> None:
    assert read(f'{{"cost": {cost}}}').cost == cost
