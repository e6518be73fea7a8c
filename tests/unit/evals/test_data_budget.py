"""The saturating power law: what was planted comes back, and what cannot be known is not claimed."""

from __future__ import annotations

import numpy as np
import pytest

from nurture.evals.data_budget import about, fit_power_law

SIZES = [10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]


def test_a_planted_law_comes_back_within_its_intervals() -> None:
    """ceiling 0.9, exponent 0.5: 95 % of the ceiling at (2 / 0.045)^2 = 1975."""
    shares = [max(0.0, 0.9 - 2.0 * n**-0.5) for n in SIZES]
    law = fit_power_law(SIZES, shares, [2000] * 6)
    assert law.ceiling == pytest.approx(0.9, abs=0.03)
    assert law.exponent == pytest.approx(0.5, abs=0.12)
    for name, truth in (("ceiling", 0.9), ("exponent", 0.5), ("enough", 1975)):
        low, high = law.intervals[name]
        assert low <= truth <= high
    assert law.error < 0.02
    assert law(100.0) == pytest.approx(0.7, abs=0.02)
    text = about("format", "demonstrations", law, SIZES)
    assert "format: rises to" in text
    assert "extrapolation" not in text


def test_few_questions_give_wide_intervals_and_a_straight_line_no_ceiling() -> None:
    rng = np.random.default_rng(0)
    rising = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
    sure, unsure = (fit_power_law(SIZES, rising, [m] * 6) for m in (5000, 30))
    widths = [law.intervals["ceiling"][1] - law.intervals["ceiling"][0] for law in (sure, unsure)]
    assert widths[0] < widths[1]
    assert "extrapolation" in about("facts", "comparisons", unsure, SIZES)
    noise = fit_power_law(SIZES, list(0.5 + 0.001 * rng.standard_normal(6)), [1000] * 6)
    assert noise(10) == pytest.approx(noise(3000), abs=0.05)


def test_two_sizes_are_too_few() -> None:
    with pytest.raises(ValueError, match="three different"):
        fit_power_law([10, 10, 100], [0.1, 0.1, 0.2], [9, 9, 9])
