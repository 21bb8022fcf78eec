"""Prices are exact, taken at the dearest reading, and never zero because they were not understood."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pricing.prices import (
    ZERO,
    Price,
    caps_of,
    dearest,
    markups,
    max_price,
    parse_price,
    search_nanos,
)

BASE = {"prompt": "0.0000025", "completion": "0.00001"}

amounts = st.decimals(min_value=0, max_value=10, places=12).map(lambda amount: format(amount, "f"))


def price_of(**changes: Any) -> Price:
    price = parse_price({**BASE, **changes})
    assert price is not None
    return price


def test_decimal_strings_become_exact_nanodollars() -> None:
    assert (price_of().base.prompt, price_of().base.completion) == (Decimal(2500), Decimal(10000))


def test_a_tenth_of_a_nanodollar_survives() -> None:
    assert price_of(prompt="0.0000000001").base.prompt == Decimal("0.1")


def test_what_lies_beyond_the_resolution_is_rounded_up() -> None:
    assert price_of(prompt="1e-400").base.prompt == Decimal("1e-9")


def test_whole_amounts_print_without_an_exponent() -> None:
    assert str(price_of(request="0.5").base.request) == "500000000"


@pytest.mark.parametrize(
    "value", ["-1", "-0.0000001", "NaN", "Infinity", "sNaN", "", "free", None, True, [], {}, 1e9, "1e9"]
)
@pytest.mark.parametrize("component", ["prompt", "completion"])
def test_an_invalid_token_price_leaves_the_model_unpriced(component: str, value: Any) -> None:
    assert parse_price({**BASE, component: value}) is None


@pytest.mark.parametrize("component", ["request", "image", "web_search", "input_cache_write", "audio_output"])
def test_a_negative_price_of_anything_leaves_the_model_unpriced(component: str) -> None:
    assert parse_price({**BASE, component: "-1"}) is None


@pytest.mark.parametrize("pricing", [None, [], "free", 0, {}, {"prompt": "0"}, {"completion": "0"}])
def test_pricing_without_both_token_prices_is_no_price(pricing: Any) -> None:
    assert parse_price(pricing) is None


def test_a_price_of_null_is_one_that_is_not_named() -> None:
    assert price_of(audio=None).base.audio is None


@pytest.mark.parametrize("component", ["input_cache_write", "input_cache_write_1h", "input_cache_read"])
def test_input_costs_the_dearest_of_prompt_and_cache(component: str) -> None:
    assert price_of(**{component: "0.000005"}).base.input == Decimal(5000)


def test_a_cheap_cache_does_not_make_input_cheaper() -> None:
    assert price_of(input_cache_read="0.0000001").base.input == Decimal(2500)


def test_the_price_cap_is_the_prompt_price_and_not_the_cache_write_price() -> None:
    assert price_of(input_cache_write="0.000005").base.prompt == Decimal(2500)


def test_output_costs_the_dearer_of_completion_and_reasoning() -> None:
    assert price_of(internal_reasoning="0.00002").base.output == Decimal(20000)


def test_a_discount_is_not_counted_on() -> None:
    assert price_of(discount=Decimal("0.5")) == price_of()


def test_a_negative_discount_makes_everything_dearer() -> None:
    assert price_of(discount=Decimal("-0.1")).base.prompt == Decimal(2750)


def test_an_absurd_surcharge_leaves_the_model_unpriced() -> None:
    assert parse_price({**BASE, "discount": Decimal("-1e20")}) is None


@pytest.mark.parametrize("discount", ["half", True, [], Decimal("NaN"), 0.5])
def test_an_invalid_discount_leaves_the_model_unpriced(discount: Any) -> None:
    assert parse_price({**BASE, "discount": discount}) is None


def test_a_tier_applies_strictly_above_its_threshold() -> None:
    price = price_of(overrides=[{"min_prompt_tokens": 200_000, "prompt": "0.000005"}])
    assert [price.rates_for(tokens).prompt for tokens in (200_000, 200_001)] == [Decimal(2500), Decimal(5000)]


def test_a_tier_keeps_base_prices_that_it_does_not_name() -> None:
    price = price_of(overrides=[{"min_prompt_tokens": 1, "prompt": "0.000005"}])
    assert price.rates_for(2).completion == Decimal(10000)


def test_tiers_may_come_in_any_order() -> None:
    tiers = [{"min_prompt_tokens": 200, "prompt": "0.00002"}, {"min_prompt_tokens": 100, "prompt": "0.00001"}]
    price = price_of(overrides=tiers)
    assert [price.rates_for(tokens).prompt for tokens in (100, 150, 201)] == [
        Decimal(2500),
        Decimal(10000),
        Decimal(20000),
    ]


def test_a_cheaper_tier_never_lowers_the_bound() -> None:
    assert price_of(overrides=[{"min_prompt_tokens": 10, "prompt": "0"}]).rates_for(11).prompt == Decimal(
        2500
    )


@pytest.mark.parametrize(
    "condition",
    [
        {"utc_start": 1630, "utc_end": 30},
        {"utc_days": ["monday"]},
        {"moon": "full"},
        {"min_prompt_tokens": "many"},
        {},
    ],
)
def test_conditions_of_time_and_unknown_ones_count_always(condition: dict[str, Any]) -> None:
    assert price_of(overrides=[{**condition, "prompt": "0.000009"}]).base.prompt == Decimal(9000)


@pytest.mark.parametrize(
    "overrides", ["none", [1], {}, [{"prompt": "-1"}], [{"utc_start": 0, "completion": "NaN"}]]
)
def test_overrides_that_cannot_be_read_leave_the_model_unpriced(overrides: Any) -> None:
    assert parse_price({**BASE, "overrides": overrides}) is None


def test_an_unknown_input_rate_joins_the_dearest_input() -> None:
    assert price_of(input_cache_write_1d="0.00001").base.input == Decimal(10000)


def test_an_unknown_output_rate_joins_the_dearest_output() -> None:
    assert price_of(deep_reasoning="0.0001").base.output == Decimal(100000)


def test_an_unknown_price_of_a_medium_is_remembered_and_changes_nothing_for_text() -> None:
    price = price_of(video_second="0.01")
    assert (price.unknown_features, price.base) == (True, price_of().base)


def test_an_unknown_price_of_anything_else_leaves_the_model_unpriced() -> None:
    assert parse_price({**BASE, "session": "0.01"}) is None


@pytest.mark.parametrize("value", ["0", "0.000", None, False, "USD"])
def test_unknown_entries_that_cost_nothing_are_ignored(value: Any) -> None:
    assert parse_price({**BASE, "session": value}) == price_of()


@pytest.mark.parametrize("value", ["-1", "NaN", [{"from": 1}], {"a": 1}])
def test_unknown_entries_that_may_be_prices_leave_the_model_unpriced(value: Any) -> None:
    assert parse_price({**BASE, "session": value}) is None


def test_the_dearest_of_two_is_taken_component_by_component() -> None:
    first, second = price_of(request="0.1").base, price_of(prompt="0.1", audio="0.2").base
    both = dearest(first, second)
    assert (both.request, both.prompt, both.audio) == (first.request, second.prompt, second.audio)


@pytest.mark.parametrize(("results", "nanos"), [(1, 15_000_000), (5, 20_000_000), (25, 100_000_000)])
def test_a_search_is_held_at_the_dearest_documented_price(results: int, nanos: int) -> None:
    assert search_nanos(price_of().base, results) == nanos


def test_a_listed_search_price_counts_for_every_result() -> None:
    assert search_nanos(price_of(web_search="0.01").base, 5) == 50_000_000


def test_price_caps_are_in_the_units_of_the_upstream() -> None:
    caps = max_price(
        caps_of(price_of(request="0.5", image="0.001", audio="0.00003").base, images=True, audio=True), {}
    )
    assert caps == {
        "prompt": "2.5",
        "completion": "10",
        "request": "0.5",
        "image": "0.001",
        "audio": "0.00003",
    }


def test_price_caps_name_media_only_where_they_are_used() -> None:
    caps = caps_of(price_of(image="0.001", audio="0.00003").base, images=False, audio=False)
    assert caps.keys() == {"prompt", "completion", "request"}


def test_an_audio_price_that_is_not_named_is_no_cap() -> None:
    assert "audio" not in caps_of(price_of().base, images=False, audio=True)


def test_price_caps_keep_what_the_client_set_lower() -> None:
    held = caps_of(price_of().base, images=False, audio=False)
    caps = max_price(held, {"prompt": Decimal(1), "completion": Decimal(99)})
    assert caps == {"prompt": "1", "completion": "10", "request": "0"}


def test_price_caps_of_other_components_pass() -> None:
    assert (
        max_price(caps_of(price_of().base, images=False, audio=False), {"audio": Decimal(7)})["audio"] == "7"
    )


def test_markups_are_the_largest_over_all_models() -> None:
    tiered = price_of(overrides=[{"min_prompt_tokens": 9, "prompt": "0.000005", "completion": "0.00003"}])
    factors = markups(
        [price_of(), tiered, price_of(input_cache_write_1h="0.00001", internal_reasoning="0.00002")]
    )
    assert (factors.input, factors.output) == (Decimal(4), Decimal(3))


def test_a_markup_never_lowers_a_price() -> None:
    rates = markups([]).rates(prompt=Decimal(5), completion=Decimal(7), request=ZERO, image=ZERO)
    assert (rates.input, rates.output, rates.image_token) == (Decimal(5), Decimal(7), Decimal(5))


def test_what_costs_nothing_by_its_listed_price_is_marked_up_by_what_it_bills() -> None:
    factors = markups(
        [price_of(prompt="0", input_cache_write="0.000004", completion="0", internal_reasoning="0.000001")]
    )
    rates = factors.rates(prompt=ZERO, completion=ZERO, request=ZERO, image=ZERO)
    assert (rates.input, rates.output) == (Decimal(4_000), Decimal(1_000))


@given(prompt=amounts, billed=amounts, cap=st.integers(0, 10**6))
def test_a_price_below_a_cap_is_never_billed_above_its_markup(prompt: str, billed: str, cap: int) -> None:
    price = price_of(prompt=prompt, input_cache_write=billed)
    limit = max(price.base.prompt, Decimal(cap))
    rates = markups([price]).rates(prompt=limit, completion=ZERO, request=ZERO, image=ZERO)
    assert rates.input >= price.base.input


@given(prompt=amounts, completion=amounts, write=amounts, tier=amounts, threshold=st.integers(0, 10**6))
def test_longer_prompts_never_become_cheaper(
    prompt: str, completion: str, write: str, tier: str, threshold: int
) -> None:
    price = price_of(
        prompt=prompt,
        completion=completion,
        input_cache_write=write,
        overrides=[{"min_prompt_tokens": threshold, "prompt": tier, "completion": tier}],
    )
    short, long = price.rates_for(threshold), price.rates_for(threshold + 1)
    assert short.input <= long.input and short.output <= long.output


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.decimals()
    | st.text(alphabet="aZ0.-é漢\ud800", max_size=8)
    | amounts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet="aZ_é", max_size=12), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(
    ["prompt", "completion", "overrides", "discount", "request", "image", "min_prompt_tokens", "x"]
)


@given(pricing=st.dictionaries(names, json_values, max_size=6))
def test_no_pricing_object_breaks_the_parser(pricing: dict[str, Any]) -> None:
    price = parse_price(pricing)
    assert price is None or price.base.input >= price.base.prompt >= 0


@given(prompt=amounts)
def test_prices_are_what_the_text_says(prompt: str) -> None:
    read = json.loads(json.dumps({**BASE, "prompt": prompt}), parse_float=Decimal)
    price = parse_price(read)
    assert price is not None and price.base.prompt == Decimal(prompt) * 10**9
