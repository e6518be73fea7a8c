"""From hidden states to numbers: vocabulary logits, label logprobs, the summed cross entropy, one scalar.

All results are float32, whatever dtype the blocks ran in. Label logprobs and the loss take the hidden states and the
output matrix rather than logits, so that a faster version need not hold tokens x vocabulary in memory at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nurture.types import IGNORE_INDEX


def lm_logits(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """Return (B, T, V) float32 unnormalised log-probabilities of the next token."""
    return torch.nn.functional.linear(hidden_BTD, weight_VD).float()


def scalar_values(hidden_BTD: Tensor, weight_1D: Tensor) -> Tensor:
    """Return (B, T) float32, one number a token (a reward or a value)."""
    return torch.nn.functional.linear(hidden_BTD, weight_1D).squeeze(-1).float()


def label_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log p(label) under softmax(logits / temperature) over the whole vocabulary.

    Args:
        hidden: (..., D).
        weight: (V, D) output matrix.
        labels: (...), aligned with `hidden`: the label of column t is the token after t.
        temperature: above 0; the temperature that the completion was sampled at.

    Returns:
        (...) float32 nats, 0 where the label is `IGNORE_INDEX`.
    """
    logits = lm_logits(hidden, weight)
    if temperature != 1.0:
        logits = logits / temperature
    trained = labels != IGNORE_INDEX
    chosen = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(trained, chosen - logits.logsumexp(-1), 0.0)


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of all trained labels, and each token's loss.

    Args:
        hidden: (..., D).
        weight: (V, D) output matrix.
        labels: (...), `IGNORE_INDEX` where untrained.

    Returns:
        (() float32 with gradient, (...) float32 nats detached and 0 where untrained).
    """
    token_losses = -label_logprobs(hidden, weight, labels)
    return token_losses.sum(), token_losses.detach()
