"""The reward losses against hand-computed values and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from nurture.losses.reward import TIE_MODELS, fit_tie_threshold, pair_losses


def test_bradley_terry_by_hand():
    loss = pair_losses(torch.tensor([math.log(3.0)]), torch.tensor([False]), 0.0, "drop")
    assert loss.item() == pytest.approx(-math.log(0.75))
    shifted = pair_losses(torch.tensor([math.log(3.0)]), torch.tensor([False]), 0.0, "drop", math.log(3.0))
    assert shifted.item() == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("ties", ["rao-kupper", "davidson"])
@pytest.mark.parametrize("difference", [-3.0, 0.0, 0.7])
def test_outcomes_add_up_to_one_and_equal_answers_tie_alike(ties, difference):
    d = torch.tensor([difference], dtype=torch.float64)
    win, tie = TIE_MODELS[ties](d, 0.5)
    loss, _ = TIE_MODELS[ties](-d, 0.5)
    assert (win.exp() + tie.exp() + loss.exp()).item() == pytest.approx(1.0)
    assert TIE_MODELS[ties](torch.zeros(1), 0.5)[1].exp().item() == pytest.approx(math.tanh(0.25), rel=1e-5)


@pytest.mark.parametrize("ties", ["rao-kupper", "davidson"])
def test_labels_without_ties_are_fitted_by_bradley_terry(ties):
    d, tied = torch.tensor([-1.0, 0.0, 2.0]), torch.zeros(3, dtype=torch.bool)
    alpha = fit_tie_threshold(d, tied, ties)
    assert alpha == 0
    win, tie = TIE_MODELS[ties](d, alpha)
    torch.testing.assert_close(win, TIE_MODELS["drop"](d, 0.0)[0])
    assert (tie == -math.inf).all()


def test_fitted_threshold_recovers_the_truth():
    torch.manual_seed(0)
    d = 2 * torch.randn(20_000)
    win, tie = TIE_MODELS["rao-kupper"](d, 0.6)
    drawn = torch.rand(20_000)
    tied = drawn < tie.exp()
    first = (drawn >= tie.exp()) & (drawn < tie.exp() + win.exp())
    oriented = torch.where(tied | first, d, -d)
    assert fit_tie_threshold(oriented, tied, "rao-kupper") == pytest.approx(0.6, abs=0.05)
