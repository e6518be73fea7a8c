"""Losses of a reward model on ranked pairs: Bradley-Terry, and two ways to give ties a probability.

With d = r_i - r_j in log odds, alpha >= 0 the tie threshold, s the logistic function, m a margin:

    Bradley-Terry   P(i > j) = s(d)                                             ties have no probability
    Rao-Kupper      P(i > j) = s(d - alpha)          P(i = j) = s(d + alpha) - s(d - alpha)
    Davidson        P(i > j) = e^(d/2) / Z           P(i = j) = 2 nu / Z        Z = e^(d/2) + e^(-d/2) + 2 nu

The loss of a pair is -log P of what the labeler said, at d - m for an ordered pair. Rao and Kupper's labeler notices
differences above alpha only; Davidson's ties grow with the geometric mean of both strengths, and stay likelier at large
differences. Here 2 nu = e^alpha - 1: equal answers are then tied with the same probability, tanh(alpha / 2), in both,
and alpha = 0 is Bradley-Terry in both. A prompt's K(K-1)/2 pairs are averaged, so every prompt weighs the same.

Main failure mode: adding ties to Bradley-Terry as half a win each pulls rewards together; dropping them loses what they
say. Neither loss fixes the level of the rewards: `centring` does gently, the stage does exactly afterwards.

Sources: Bradley and Terry 1952; Rao and Kupper 1967; Davidson 1970; InstructGPT, arXiv 2203.02155, equation 1; margins:
Llama 2, arXiv 2307.09288, equation 2; centring: Eisenstein et al., arXiv 2312.09244; ties: arXiv 2410.05328.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from nurture.data.comparisons import ComparisonBatch
from nurture.types import LossResult

TieModel = Literal["rao-kupper", "davidson", "drop"]
"""How ties enter the loss; `drop` is Bradley-Terry on the ordered pairs."""

LogProbabilities = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def bradley_terry(difference: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return log P(i > j), and -inf for log P(i = j)."""
    return logsigmoid(difference), torch.full_like(difference, -math.inf)


def rao_kupper(difference: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return (log P(i > j), log P(i = j)), each of the shape of `difference` (log odds); `threshold` is alpha >= 0."""
    win, loss = logsigmoid(difference - threshold), logsigmoid(-difference - threshold)
    # s(d + a) - s(d - a) = (e^2a - 1) s(d - a) s(-d - a), which does not cancel.
    return win, _log_expm1(2 * threshold) + win + loss


def davidson(difference: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return (log P(i > j), log P(i = j)), each of the shape of `difference` (log odds); 2 nu = e^threshold - 1."""
    half = difference / 2
    tie = torch.full_like(half, _log_expm1(threshold))
    normaliser = torch.stack((half, -half, tie)).logsumexp(0)
    return half - normaliser, tie - normaliser


def _log_expm1(threshold: float) -> float:
    """Return log(e^threshold - 1), -inf at 0: labels without a tie are fitted by it, and ties are then impossible."""
    return math.log(math.expm1(threshold)) if threshold > 0 else -math.inf


TIE_MODELS: dict[TieModel, LogProbabilities] = {
    "rao-kupper": rao_kupper,
    "davidson": davidson,
    "drop": bradley_terry,
}


def pair_losses(
    difference: Tensor, tied: Tensor, threshold: float, ties: TieModel, margin: Tensor | float = 0.0
) -> Tensor:
    """Return -log P of what was said about each pair, (P,) float32 nats.

    Args:
        difference: (P,) reward of the first answer minus that of the second, log odds.
        tied: (P,) bool; the first answer is the better one where False.
        threshold: alpha of the module's docstring.
        ties: the model of ties; with `drop` a tied pair has loss inf.
        margin: (P,) or a number, demanded of ordered pairs.
    """
    model = TIE_MODELS[ties]
    win, _ = model(difference - margin, threshold)
    _, tie = model(difference, threshold)
    return -torch.where(tied, tie, win)


def fit_tie_threshold(difference: Tensor, tied: Tensor, ties: TieModel) -> float:
    """Return the alpha that makes these outcomes likeliest at these differences: one number, by golden section.

    Args:
        difference: (P,) log odds, the first answer the better one where not `tied`.
        tied: (P,) bool.

    Returns:
        alpha in [0.001, 5]; 0 for `drop` or where no pair is tied.
    """
    if ties == "drop" or not bool(tied.any()):
        return 0.0
    low, high, golden = 1e-3, 5.0, (math.sqrt(5) - 1) / 2

    def loss(alpha: float) -> float:
        return float(pair_losses(difference.double(), tied, alpha, ties).mean())

    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return (low + high) / 2


def answer_values(values: Tensor, batch: ComparisonBatch) -> Tensor:
    """Take each answer's value at its last token: (B, T) -> (B, R); what stands where there is no answer is noise."""
    return values.gather(1, batch.answer_ends.clamp(min=0))


@dataclass(frozen=True)
class RewardLoss:
    """The loss of a `ComparisonBatch`, summed over its comparisons.

    Attributes:
        ties: how ties enter.
        threshold: alpha.
        margin: log odds demanded a unit of the labeler's ratings.
        centring: weight of (r_i + r_j)^2, which keeps the rewards around 0.
    """

    ties: TieModel = "drop"
    threshold: float = 0.0
    margin: float = 0.0
    centring: float = 0.0

    def __call__(self, model: nn.Module, batch: ComparisonBatch) -> LossResult:
        """Return the loss: every comparison counts once, as the mean over its pairs.

        Metrics: `loss` (nats a comparison) and `pair_accuracy` of the ordered pairs.
        """
        values = model(batch.token_ids, position_ids=batch.position_ids, document_ids=batch.document_ids)
        rewards = answer_values(values, batch)
        first, second = (rewards.gather(1, batch.pairs[..., side]) for side in (0, 1))
        real = batch.weights > 0
        losses = pair_losses(
            first - second, batch.tied, self.threshold, self.ties, self.margin * batch.margins
        )
        if self.centring:
            losses = losses + self.centring * (first + second).square()
        # Padding pairs compare an answer with itself; 0 * inf would not be 0.
        total = (torch.where(real, losses, 0.0) * batch.weights).sum()
        ordered = real & ~batch.tied
        right = ((first > second) & ordered).sum()
        metrics = {
            "loss": (float(total.detach()), float(batch.loss_count)),
            "pair_accuracy": (float(right), float(ordered.sum())),
        }
        return LossResult(total, metrics)
