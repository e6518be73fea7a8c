"""Intervals against published values."""

from __future__ import annotations

import pytest

from nurture.evals.measure import Measure, before_and_after, rate


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
