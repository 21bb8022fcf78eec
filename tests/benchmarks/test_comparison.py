"""The comparison of two commits, with given numbers: pairs, median, spread, verdict and limit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.compare import LOADS, OVER_LIMIT, Plan, judge, order_of
from benchmarks.comparison import Comparison, compare_text, half_interquartile_range, over_limit, verdicts


def comparison(
    new: Sequence[float], old: Sequence[float], *, load: str = "json", part: str = "gateway", unit: str = "us"
) -> Comparison:
    return Comparison(load, part, unit, new, old)


def changed_by(*percents: float, part: str = "gateway", unit: str = "us") -> Comparison:
    """A comparison whose rounds changed by so many percent of 1,000."""
    return comparison([1000 + 10 * each for each in percents], [1000] * len(percents), part=part, unit=unit)


def test_each_change_is_of_the_two_values_of_its_round() -> None:
    assert comparison([110, 90, 100], [100, 100, 80]).changes == pytest.approx([10, -10, 25])


def test_the_change_is_the_median_of_the_changes_and_not_that_of_the_medians() -> None:
    slowing_machine = comparison(new=[102, 204, 150], old=[100, 200, 300])
    assert slowing_machine.change == pytest.approx(2)


def test_a_side_that_lacks_a_round_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        _ = comparison([100], [100, 100]).changes


def test_the_spread_is_half_the_distance_between_the_quartiles() -> None:
    assert half_interquartile_range([9, 1, 8, 2, 7, 3, 6, 4, 5]) == 2
    assert changed_by(9, 1, 8, 2, 7, 3, 6, 4, 5).spread == pytest.approx(2)


def test_one_wild_round_moves_neither_median_nor_spread() -> None:
    calm, wild = changed_by(1, 2, 3, 4, 5), changed_by(1, 2, 3, 4, 500)
    assert (wild.change, wild.spread) == pytest.approx((calm.change, calm.spread))


def test_a_single_round_has_no_spread() -> None:
    assert changed_by(4).spread == 0


def test_the_limit_is_exceeded_only_beyond_the_spread() -> None:
    unsteady, steady = changed_by(2, 3, 4, 5, 6), changed_by(4, 4, 4, 4, 4)
    assert (unsteady.change, unsteady.spread) == pytest.approx((4, 1))
    assert not unsteady.exceeds(3.1)
    assert steady.exceeds(3.1)


def test_a_commit_that_costs_less_exceeds_no_limit() -> None:
    assert not changed_by(-9, -8, -7).exceeds(0)


def test_latency_has_no_limit() -> None:
    assert over_limit([changed_by(50, part="p50", unit="ms")], 3) == []
    assert over_limit([changed_by(50)], 3) == ["json: gateway +50.0 % (spread 0.0)"]


def test_the_verdict_of_a_load_is_one_line() -> None:
    lines = verdicts([changed_by(2.6, 0.8, -1.9), changed_by(-0.2, -0.3, -0.04, part="PostgreSQL")])
    assert lines == [
        "json: gateway +0.8 % (rounds -1.9 % .. +2.6 %), PostgreSQL -0.2 % (rounds -0.3 % .. +0.0 %)"
    ]


def test_the_text_holds_medians_every_round_and_the_verdict() -> None:
    text = compare_text(
        [comparison([412, 404], [400, 400]), comparison([2.5, 2], [2, 2], part="p50", unit="ms")]
    )
    assert text.splitlines() == [
        "medians        unit   old  spread   new  spread",
        "json: gateway  us     400    0.00   408    2.00",
        "json: p50      ms    2.00    0.00  2.25    0.12",
        "",
        "new / old by round, %      1     2  median  lowest  highest  spread",
        "json: gateway           +3.0  +1.0    +2.0    +1.0     +3.0     0.5",
        "json: p50              +25.0  +0.0   +12.5    +0.0    +25.0     6.2",
        "",
        "json: gateway +2.0 % (rounds +1.0 % .. +3.0 %), p50 +12.5 % (rounds +0.0 % .. +25.0 %)",
    ]


def test_only_a_limit_makes_the_exit_status_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    dearer = [changed_by(5, 5, 5)]
    assert judge(dearer, None) == 0
    assert judge(dearer, 6) == 0
    assert judge(dearer, 3) == OVER_LIMIT
    assert "More than 3 % and the spread: json: gateway +5.0 %" in capsys.readouterr().err


def test_the_sides_take_turns_in_going_first() -> None:
    assert [order_of(number)[0] for number in range(1, 5)] == ["new", "old", "new", "old"]


def test_nine_rounds_end_within_eight_minutes() -> None:
    assert Plan().rounds == 9
    assert Plan().limit_seconds <= 8 * 60
    assert Plan().limit_seconds > Plan().rounds * 2 * len(LOADS) * Plan().seconds
