"""Intervals against published values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nurture.evals.measure import Measure, before_and_after, difference, over_runs, rate


def test_wilson_interval_of_a_textbook_case() -> None:
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611."""
    measure = rate([True] * 81 + [False] * 182)
    assert (measure.low, measure.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    nothing = rate([False] * 20)
    assert (nothing.low, nothing.high) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert rate([True] * 20).high == 1.0
    assert rate([]) == Measure(0.0, 0, 0.0, 1.0)


def test_table_entries_have_the_agreed_shape() -> None:
    table = before_and_after(
        {"format": rate([False] * 4)}, {"format": rate([True] * 4), "bpb/web": Measure(1.5, 90)}
    )
    assert table["format"]["before"] == 0.0
    assert table["format"]["after"] == 1.0
    assert table["format"]["n"] == 4
    assert table["bpb/web"] == {"after": 1.5, "n": 90}


def test_newcombes_difference_of_a_published_example() -> None:
    """Newcombe 1998, table II: 56/70 against 48/80, method 10: 0.0524 to 0.3339."""
    first, second = rate([1] * 48 + [0] * 32), rate([1] * 56 + [0] * 14)
    found = difference(first, second)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


def test_paired_items_give_the_narrower_interval() -> None:
    """One item in ten was learned and none lost: the spread between items, large in both, cancels."""
    before, after = rate([0] * 100 + [1] * 100), rate([0] * 80 + [1] * 120)
    paired = difference(before, after)
    alone = difference(replace(before, outcomes=None), after)
    assert paired.value == alone.value == pytest.approx(0.1)
    assert (paired.low, paired.high) == (pytest.approx(0.06, abs=0.006), pytest.approx(0.1425, abs=0.006))
    assert alone.low < 0.01
    assert alone.high > 0.19


def test_a_difference_without_spread_keeps_a_width() -> None:
    """Ten of ten after none of ten: resampling would be certain, ten items are not."""
    found = difference(rate([0] * 10), rate([1] * 10))
    assert found.value == 1.0
    assert found.low < 0.7
    assert difference(rate([0] * 10), rate([0] * 10)).high > 0.2


def test_a_difference_of_bare_numbers_has_no_interval() -> None:
    found = difference(Measure(3.0, 10), Measure(0.5, 20))
    assert (found.value, found.low, found.high) == (-2.5, None, None)


def test_the_spread_between_runs() -> None:
    """Mean 2, standard deviation 1, three runs: 2 +- 4.303 / sqrt(3); and t with 30 degrees of freedom is 2.042."""
    found = over_runs([1.0, 2.0, 3.0])
    assert (found.low, found.high) == (
        pytest.approx(2 - 2.4843, abs=1e-3),
        pytest.approx(2 + 2.4843, abs=1e-3),
    )
    shares = over_runs([0.1, 0.2, 0.9], (0, 1))
    assert (shares.low, shares.high) == (0.0, 1.0)  # 0.4 +- 1.08
    assert over_runs([4.0]) == Measure(4.0, 1)
    many = over_runs([0.0, 1.0] * 15 + [0.5])
    half = many.high - many.value
    deviation = (30 * 0.25 / 30) ** 0.5
    assert half == pytest.approx(2.042 * deviation / 31**0.5, rel=2e-3)
