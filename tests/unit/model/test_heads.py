from __future__ import annotations

import math

import pytest
import torch

from nurture.model.heads import cross_entropy_sum, label_logprobs, lm_logits
from nurture.types import IGNORE_INDEX


def test_label_logprobs_by_hand() -> None:
    """Logits (ln 1, ln 3): p = 1/4, 3/4; at temperature 1/2 the logits double: p = 1/10, 9/10."""
    hidden = torch.tensor([[[1.0], [1.0], [1.0]]])
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    labels = torch.tensor([[0, 1, IGNORE_INDEX]])
    expected = torch.tensor([[math.log(0.25), math.log(0.75), 0.0]])
    torch.testing.assert_close(label_logprobs(hidden, weight, labels), expected)
    expected = torch.tensor([[math.log(0.1), math.log(0.9), 0.0]])
    torch.testing.assert_close(label_logprobs(hidden, weight, labels, temperature=0.5), expected)


def test_cross_entropy_sum_is_a_sum_with_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (2, 5))
    labels[0, 2] = labels[1, 4] = IGNORE_INDEX
    total, token_losses = cross_entropy_sum(hidden, weight, labels)
    assert token_losses.shape == (2, 5)
    assert not token_losses.requires_grad
    assert token_losses[0, 2] == token_losses[1, 4] == 0
    expected = torch.nn.functional.cross_entropy(
        lm_logits(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(token_losses.sum(), expected.detach())
    gradients = torch.autograd.grad(total * 0.5, (hidden, weight))
    for gradient, wanted in zip(
        gradients, torch.autograd.grad(expected * 0.5, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [label_logprobs, lambda *a: cross_entropy_sum(*a)[0]])
def test_nothing_trained_gives_zero_and_a_zero_gradient(function) -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    result = function(hidden, torch.randn(7, 4), torch.full((1, 3), IGNORE_INDEX))
    (gradient,) = torch.autograd.grad(result.sum(), hidden)
    assert result.sum() == 0
    assert (gradient == 0).all()
