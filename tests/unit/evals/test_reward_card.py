"""The reward model's report card by hand."""

from __future__ import annotations

import math

import pytest

from nurture.data.comparisons import Comparison
from nurture.evals.reward_card import reward_card

COMPARISONS = [
    Comparison(([1] * 3, [1] * 5), 1, ((0,), (1,)), source="a"),
    Comparison(([1] * 4, [1] * 6), 1, ((1,), (0,)), source="a"),
    Comparison(([1] * 4, [1] * 6, [1] * 5), 1, ((2,), (0, 1)), source="b"),
]
REWARDS = [[1.0, 0.0], [2.0, -1.0], [0.5, 0.4, 3.0]]
GOLDS = [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0, 1.0]]


def test_accuracy_ceiling_ties_and_length() -> None:
    measures = reward_card(COMPARISONS, REWARDS, GOLDS, ties="rao-kupper", tie_threshold=0.5).measures
    said = {name: measure.value for name, measure in measures.items()}
    assert said["pair_accuracy"] == pytest.approx(3 / 4)
    assert said["pair_accuracy/a"] == pytest.approx(1 / 2)
    assert said["pair_accuracy/b"] == 1.0
    assert said["pair_ceiling"] == pytest.approx(3.5 / 4)  # equal golds count half
    assert said["gold_accuracy"] == 1.0
    assert said["tie_accuracy"] == 1.0  # 0.1 apart, and the ordered pairs at least 1
    # Ordered pairs of unequal length: the longer has the higher reward in one of four, by the labels in two.
    assert said["longer_preferred"] == pytest.approx(1 / 4)
    assert said["longer_preferred_labels"] == pytest.approx(2 / 4)


def test_one_source_has_no_parts() -> None:
    card = reward_card(COMPARISONS[:2], REWARDS[:2], ties="drop", tie_threshold=0.0)
    assert not [name for name in card.measures if "/" in name or "ceiling" in name or "tie" in name]


@pytest.mark.parametrize(("odds", "error"), [(3.0, 0.0), (8.0, 8 / 9 - 3 / 4), (1.4, 3 / 4 - 7 / 12)])
def test_calibration_is_what_was_said_against_what_happened(odds: float, error: float) -> None:
    """Six of eight pairs as the model says, at the same odds: right at 3 to 1, too sure at 8 to 1, too meek at 7 to 5."""
    pairs = [Comparison(([1] * 3, [1] * 3), 1, ((0,), (1,)))] * 8
    rewards = [[math.log(odds), 0.0]] * 6 + [[0.0, math.log(odds)]] * 2
    card = reward_card(pairs, rewards, ties="drop", tie_threshold=0.0)
    assert card.measures["calibration_error"].value == pytest.approx(error, abs=1e-9)
    assert sum(row["n"] for row in card.tables["calibration"]) == 8
