"""The reward model's report card by hand."""

from __future__ import annotations

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
