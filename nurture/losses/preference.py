"""Losses that learn from preferences without a reward model: DPO, IPO, APO-zero, APO-down and KTO.

All start from the implicit reward of a completion, beta * (log pi(y|x) - log pi_ref(y|x)): how much more likely the
policy makes it than the frozen reference does. With h_w and h_l for the log-ratios of chosen and rejected, s the
sigmoid, and d = h_w - h_l:

    dpo       -log s(beta d)                            Rafailov et al., arXiv 2305.18290, equation 7
    ipo       (d' - 1 / (2 beta))^2, d' of log-ratios a token   Azar et al., arXiv 2310.12036, equation 17
    apo_zero  1 - s(beta h_w) + s(beta h_l)             D'Oosterlinck et al., arXiv 2408.06266, equation 7
    apo_down  s(beta h_w) + 1 - s(beta d)               the same, equation 8
    kto       w (1 - s(beta (h - z)))  if desirable, w (1 - s(beta (z - h))) if not
                                                        Ethayarajh et al., arXiv 2402.01306, equation 8

DPO and IPO look at the difference alone, and may lower both (watch `chosen_drift`). APO-zero raises the chosen and
lowers the rejected, for a chosen that is better than what the model writes; APO-down lowers both, for a model that is
better than the chosen. KTO needs no pairs, only a thumb up or down. The functions are pure; `PreferenceLoss` runs the
model. At policy == reference they give log 2, 1 / (4 beta^2), 1, 1 and w / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nurture.data.preference import PreferenceBatch
from nurture.types import IGNORE_INDEX, LossResult

PreferenceKind = Literal["dpo", "ipo", "apo_zero", "apo_down", "kto"]


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid(beta * difference) of log-ratios in nats, elementwise."""
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return the squared distance of the difference from 1 / (2 beta), elementwise.

    Args:
        chosen: log-ratios in nats a token: summed ones would make the target depend on the length of completions.
        rejected: the same.
        beta: the paper's tau.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected) of log-ratios in nats, elementwise."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return sigmoid(beta * chosen) + 1 - sigmoid(beta * difference) of log-ratios in nats, elementwise."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}


def kto(ratios: Tensor, desirable: Tensor, reference_point: Tensor, beta: float) -> Tensor:
    """Return the prospect-theoretic loss of single completions, unweighted, elementwise.

    Args:
        ratios: log-ratios in nats.
        desirable: bool, of the same shape.
        reference_point: () nats, what an average completion is worth: the KL estimate, 0 or more, without gradient.
    """
    gain = torch.where(desirable, ratios - reference_point, reference_point - ratios)
    return torch.sigmoid(-beta * gain)


def sequence_logprobs(model: nn.Module, batch: PreferenceBatch) -> Tensor:
    """Return the summed logprob of every answer's trained tokens, (B, R) float32 nats; 0 where there is no answer."""
    logprobs = model(
        batch.token_ids,
        position_ids=batch.position_ids,
        document_ids=batch.document_ids,
        labels=batch.labels,
    )
    return _by_answer(logprobs, batch)


def _by_answer(values: Tensor, batch: PreferenceBatch) -> Tensor:
    """Add up (B, T) values over the tokens of each answer; padding holds zeros, so it may count anywhere."""
    sums = torch.zeros(batch.answer_ends.shape, dtype=torch.float32, device=values.device)
    return sums.scatter_add(1, batch.document_ids.clamp(min=0), values.float())


class PreferenceLoss:
    """Summed preference loss over the pairs (for KTO: the completions) of a batch."""

    def __init__(
        self,
        kind: PreferenceKind,
        beta: float,
        *,
        nll_weight: float = 0.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        """Choose the loss.

        Args:
            kind: one of the losses above.
            beta: how strongly the policy is held to the reference; larger holds it closer.
            nll_weight: weight of the chosen's negative log-likelihood in nats a token, beside a pair loss: it holds the
                chosen up where a difference alone lets it sink (Pang et al., arXiv 2404.19733, equation 1).
            desirable_weight: KTO: weight of completions that are wanted.
            undesirable_weight: KTO: weight of completions that are not.
        """
        self.kind, self.beta, self.nll_weight = kind, beta, nll_weight
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def __call__(self, model: nn.Module, batch: PreferenceBatch) -> LossResult:
        """Return the loss of `batch`.

        Metrics, each a mean once divided: `loss`; `pair_accuracy`, how often the chosen has the larger implicit reward
        (a tie counts half); `margin`, the difference of implicit rewards; `chosen_drift` and `rejected_drift`, the
        log-ratios in nats a completion; `chosen_logprob` and `rejected_logprob`, likewise.
        """
        logprobs = sequence_logprobs(model, batch)
        ratios = logprobs - batch.reference_logprobs
        if self.kind == "kto":
            return self._single(logprobs, ratios, batch)
        first, second = batch.pairs.unbind(-1)
        chosen, rejected = ratios.gather(1, first), ratios.gather(1, second)
        chosen_logprobs = logprobs.gather(1, first)
        tokens = _by_answer(batch.labels != IGNORE_INDEX, batch).clamp(min=1)
        if self.kind == "ipo":
            losses = ipo(chosen / tokens.gather(1, first), rejected / tokens.gather(1, second), self.beta)
        else:
            losses = PAIR_LOSSES[self.kind](chosen, rejected, self.beta)
        if self.nll_weight:
            losses = losses - self.nll_weight * chosen_logprobs / tokens.gather(1, first)
        total = (losses * batch.weights).sum()
        with torch.no_grad():
            margins = self.beta * (chosen - rejected)
            values = {
                "loss": losses,
                "pair_accuracy": (margins > 0).float() + 0.5 * (margins == 0),
                "margin": margins,
                "chosen_drift": chosen,
                "rejected_drift": rejected,
                "chosen_logprob": chosen_logprobs,
                "rejected_logprob": logprobs.gather(1, second),
            }
            metrics = {name: _weighted(value, batch.weights) for name, value in values.items()}
        return LossResult(total, metrics)

    def _single(self, logprobs: Tensor, ratios: Tensor, batch: PreferenceBatch) -> LossResult:
        """KTO: of each pair the first place in the row is the completion, the other one of an unrelated prompt."""
        own, unrelated = batch.pairs.amin(-1), batch.pairs.amax(-1)
        desirable = batch.pairs[..., 0] < batch.pairs[..., 1]
        counted = batch.weights > 0
        # Estimated on the microbatch, as in the paper: over the whole batch it would take a second pass.
        kl = ratios.detach().gather(1, unrelated)[counted]
        reference_point = kl.mean().clamp(min=0) if len(kl) else ratios.new_zeros(())
        value = ratios.gather(1, own)
        losses = kto(value, desirable, reference_point, self.beta)
        losses = losses * torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        total = (losses * batch.weights).sum()
        with torch.no_grad():
            own_logprobs = logprobs.gather(1, own)
            better, worse = batch.weights * desirable, batch.weights * ~desirable
            gain = torch.where(desirable, value - reference_point, reference_point - value)
            right = (gain > 0).float() + 0.5 * (gain == 0)
            metrics = {
                "loss": _weighted(losses, batch.weights),
                "label_accuracy": _weighted(right, batch.weights),
                "chosen_drift": _weighted(value, better),
                "rejected_drift": _weighted(value, worse),
                "chosen_logprob": _weighted(own_logprobs, better),
                "rejected_logprob": _weighted(own_logprobs, worse),
                "reference_point": (float(reference_point), 1.0),
            }
        return LossResult(total, metrics)


def _weighted(values: Tensor, weights: Tensor) -> tuple[float, float]:
    return float((values.detach() * weights).sum()), float(weights.sum())
