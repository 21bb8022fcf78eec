"""Amounts in JSON: exact, in plain notation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.money import MAX_NANOS, credits_from_nanos, in_credits, plain, plain_credits


@given(st.integers(0, MAX_NANOS))
def test_nano_dollars_are_written_as_their_decimal_is(nanos: int) -> None:
    assert plain_credits(nanos) == plain(credits_from_nanos(nanos))


@pytest.mark.parametrize("amount", [1.5, "10", True, [1]])
def test_an_amount_that_is_no_integer_is_never_shown_as_it_is(amount: object) -> None:
    with pytest.raises(TypeError):
        in_credits({"cost_nanos": amount})


def test_the_amounts_of_a_row_are_shown_in_credits() -> None:
    row = {"id": 1, "cost_nanos": 1_500_000_000, "upstream_cost_nanos": None, "model": "a/one"}
    cost = credits_from_nanos(1_500_000_000)
    assert in_credits(row) == {"id": 1, "cost": cost, "upstream_cost": None, "model": "a/one"}
