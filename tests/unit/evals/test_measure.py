"""Intervals against published values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nurture.evals.measure import Measure, before_and_after, difference, over_runs, rate, rate_of_groups


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


def test_outcomes_in_groups_tell_less_than_as_many_apart() -> None:
    groups = [[1.0] * 10 if place % 2 else [0.0] * 10 for place in range(20)]
    clustered, apart = rate_of_groups(groups), rate([x for group in groups for x in group])
    assert (clustered.value, clustered.n) == (apart.value, apart.n) == (0.5, 200)
    # Groups all of a kind are worth one outcome each, but for the lost degree of freedom.
    twenty = rate([1.0] * 10 + [0.0] * 10)
    assert clustered.low == pytest.approx(twenty.low, abs=0.01)
    assert clustered.low < apart.low
    # Outcomes that are alone in their groups are independent.
    alone = rate_of_groups([[x] for x in [1.0] * 30 + [0.0] * 170])
    assert alone.low == pytest.approx(rate([1.0] * 30 + [0.0] * 170).low, abs=1e-3)
    # All alike: the groups vouch for their number, not for their outcomes.
    assert rate_of_groups([[1.0] * 50] * 4).low == rate([1.0] * 4).low
    assert rate_of_groups([]) == Measure(0.0, 0, 0.0, 1.0)


def test_the_interval_of_groups_covers_the_truth() -> None:
    """Groups of unequal size whose own shares scatter around 0.3: 95 % intervals hold it in about 95 of 100 samples."""
    draw = np.random.default_rng(1)
    inside = {"groups": 0, "apart": 0}
    for _ in range(400):
        shares, sizes = draw.beta(1.5, 3.5, 60), draw.integers(1, 30, 60)
        groups = [(draw.random(n) < p).astype(float).tolist() for p, n in zip(shares, sizes, strict=True)]
        for name, found in (
            ("groups", rate_of_groups(groups)),
            ("apart", rate([x for g in groups for x in g])),
        ):
            inside[name] += found.low <= 0.3 <= found.high
    assert 0.91 <= inside["groups"] / 400 <= 0.985
    assert inside["apart"] / 400 < 0.8
