"""Amounts in JSON: exact, in plain notation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.money import MAX_NANOS, credits_from_nanos, plain, plain_credits


@given(st.integers(0, MAX_NANOS))
def test_nano_dollars_are_written_as_their_decimal_is(nanos: int) -> None:
    assert plain_credits(nanos) == plain(credits_from_nanos(nanos))
