"""Policy-gradient losses: PPO's two, the GRPO family, and the estimates of KL they report.

Everything is a function of (B, T) tensors that are aligned with the tokens: column t is about token t given those
before it. A loss is a value per token; `token_weights` and `row_count` say how the published loss averages it, so that
the sum over microbatches divided by the count of the global batch is exactly that average, however it was split.

Notation: logprobs are of the policy being trained (with gradient), `old_logprobs` the trainer's own before the first
update on these rollouts, `sampling_logprobs` the engine's; ratio = exp(logprobs - old_logprobs).

Main failure mode: the policy leaves the region where the rollouts say anything (`rl/clip_fraction`, `rl/kl` climb,
`rl/entropy` falls to 0).

Sources: PPO arXiv 1707.06347; GRPO 2402.03300; DAPO 2503.14476; Dr. GRPO 2503.20783; CISPO 2506.13585; GSPO 2507.18071;
SAPO 2511.20347; LUSPO 2602.05261; VESPO 2602.10693; RLOO 2402.14740; REINFORCE++ 2501.03262; two-sided clip 2505.07291;
off-policy mask: DeepSeek-V3.2; KL estimators: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from nurture.recipe import Section

LossType = Literal[
    "ppo", "grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo", "rloo", "reinforce++"
]
KLEstimator = Literal["k1", "k2", "k3"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


KL_IN_REWARD = ("rloo", "reinforce++")
"""Losses whose papers take the KL from the reward; the others add it to the loss."""


class PolicyLossConfig(Section):
    """Which loss, and its constants."""

    chosen_by: ClassVar[str | None] = "loss_type"

    loss_type: LossType = "dapo"
    """ppo, grpo, dr_grpo, bnpo, dapo, cispo, sapo, luspo, vespo, rloo or reinforce++: how a token's loss is formed and
    averaged. GSPO is grpo with ratio_level=sequence."""
    ratio_level: Literal["token", "sequence"] | None = None
    """One importance ratio a token, or the geometric mean over the sequence (GSPO); luspo defaults to sequence."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high; DAPO's clip-higher is 0.28."""
    ratio_limit: PositiveFloat | None = None
    """Two-sided clipping: the unclipped ratio never counts for more than this (TRL's delta)."""
    cispo_cap: PositiveFloat = 5.0
    """cispo: largest weight of a token (TRL's epsilon_high there)."""
    sapo_temperatures: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.05)
    """sapo: steepness of the gate for positive and for other advantages."""
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    """vespo: k and lambda of the weighting for advantages of at least 0."""
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    """vespo: k and lambda for negative advantages."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL to the reference in the loss; 0 needs no reference."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of that KL: in a loss k1 has no useful gradient, k2 and k3 have; rloo and reinforce++ take the KL from
    the reward, where only k1 has the KL's gradient (their default)."""
    kl_importance: bool = False
    """Multiply that KL by the importance ratio, which makes its gradient unbiased off-policy."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Reward in the loss for a nat of entropy a token."""
    off_policy_limit: PositiveFloat | None = None
    """Drop rollouts with negative advantage whose mean KL from the sampling policy exceeds this (DeepSeek-V3.2)."""

    @model_validator(mode="before")
    @classmethod
    def _estimator_by_place(cls, data: Any) -> Any:
        in_reward = isinstance(data, dict) and data.get("loss_type") in KL_IN_REWARD
        return {"kl_estimator": "k1", **data} if in_reward else data

    @property
    def level(self) -> Literal["token", "sequence"]:
        """The ratio level, with the default that belongs to the loss."""
        return self.ratio_level or ("sequence" if self.loss_type == "luspo" else "token")


# --- KL and other measures ------------------------------------------------------------------------------------------


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return log p - log q of each token: unbiased for KL(p || q) when tokens are drawn from p, and often negative."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return half the squared log ratio: never negative, little variance, biased; its gradient is the KL's."""
    return 0.5 * (logprobs - reference_logprobs).square()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return q/p - 1 - log(q/p): unbiased and never negative."""
    log_ratio = reference_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def explained_variance(values: Tensor, returns: Tensor, completion_mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 for a perfect value model, 0 for one that says a constant.

    NaN if all returns are equal.
    """
    wanted, said = returns[completion_mask], values[completion_mask]
    variance = float(wanted.var(correction=0)) if wanted.numel() else 0.0
    return 1.0 - float((wanted - said).var(correction=0)) / variance if variance > 0 else math.nan


def clipped_tokens(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return where clipping stops the gradient: the ratio is past its bound in the advantage's direction (bool)."""
    too_low = (ratio < 1 - clip_low) & (advantages < 0)
    return too_low | ((ratio > 1 + clip_high) & (advantages > 0))


# --- a token's loss -------------------------------------------------------------------------------------------------


@dataclass
class Terms:
    """What a token's loss is made of.

    Attributes:
        logprobs: (B, T) with gradient.
        log_ratio: (B, T) logprobs - old_logprobs.
        ratio: exp of the log ratio, (B, T) or, at sequence level, (B, 1).
        advantages: (B, T) or (B, 1).
        completion_mask: (B, T) bool.
        correction: (B, T) or (B, 1) weights for rollouts of another policy (`sampling_correction`), or None.
    """

    logprobs: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    completion_mask: Tensor
    correction: Tensor | None = None


def clipped_surrogate(terms: Terms, config: PolicyLossConfig) -> Tensor:
    """PPO's pessimistic surrogate, -min(ratio A, clip(ratio) A), that most of the family shares."""
    clipped = terms.ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    ratio = terms.ratio if config.ratio_limit is None else terms.ratio.clamp(max=config.ratio_limit)
    return -torch.minimum(ratio * terms.advantages, clipped * terms.advantages)


def cispo(terms: Terms, config: PolicyLossConfig) -> Tensor:
    """CISPO: REINFORCE with a capped importance weight, so that no token's gradient is ever cut off."""
    return -terms.ratio.clamp(max=config.cispo_cap).detach() * terms.advantages * terms.logprobs


def sapo(terms: Terms, config: PolicyLossConfig) -> Tensor:
    """SAPO: a sigmoid of the ratio in place of the hard clip, steeper for tokens to be made less likely."""
    positive, other = config.sapo_temperatures
    temperature = torch.where(terms.advantages > 0, positive, other)
    return -torch.sigmoid(temperature * (terms.ratio - 1)) * 4 / temperature * terms.advantages


def vespo(terms: Terms, config: PolicyLossConfig) -> Tensor:
    """VESPO: REINFORCE weighted by phi(W) = e^lambda W^k e^(-lambda W) of the whole sequence's ratio W."""
    return -vespo_weight(terms, config) * terms.advantages * terms.logprobs


@torch.no_grad()
def vespo_weight(terms: Terms, config: PolicyLossConfig) -> Tensor:
    """Return phi(W), 1 at W = 1 and falling to 0 on both sides; it differs with the advantage's sign, so (B, T)."""
    lowest, highest = math.log(1e-8), 20.0
    log_w = (terms.log_ratio.clamp(-20.0, 20.0) * terms.completion_mask).sum(1, keepdim=True)
    if terms.correction is not None:
        log_w = log_w + terms.correction.log().clamp(lowest, highest).sum(1, keepdim=True)
    log_w = log_w.clamp(lowest, highest)
    good = terms.advantages >= 0
    k = torch.where(good, config.vespo_positive[0], config.vespo_negative[0])
    rate = torch.where(good, config.vespo_positive[1], config.vespo_negative[1])
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(0.0, 0.0, 0.0)


TOKEN_LOSSES: dict[str, Callable[[Terms, PolicyLossConfig], Tensor]] = {
    "ppo": clipped_surrogate,
    "grpo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,
    "bnpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "luspo": clipped_surrogate,
    "rloo": clipped_surrogate,
    "reinforce++": clipped_surrogate,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
}
"""loss_type -> the loss of a token."""


def importance_terms(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    config: PolicyLossConfig,
    correction: Tensor | None = None,
) -> Terms:
    """Form the ratio at the configured level.

    Args:
        logprobs: (B, T) with gradient.
        old_logprobs: (B, T); None on the first update after sampling, where they are the same numbers.
        advantages: (B, T).
        completion_mask: (B, T) bool.
        correction: see `Terms`.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    log_ratio = logprobs - old
    level: Tensor = log_ratio
    if config.loss_type == "rloo":  # the action is the whole completion
        level = (log_ratio * completion_mask).sum(1, keepdim=True)
    elif config.level == "sequence":
        lengths = completion_mask.sum(1, keepdim=True).clamp(min=1)
        level = (log_ratio * completion_mask).sum(1, keepdim=True) / lengths
    return Terms(logprobs, log_ratio, level.exp(), advantages, completion_mask, correction)


def policy_token_losses(
    terms: Terms,
    config: PolicyLossConfig,
    *,
    sampling_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
) -> Tensor:
    """Return every token's loss: the surrogate, corrected, plus KL and entropy terms.

    Args:
        terms: see `importance_terms`.
        sampling_logprobs: (B, T), for `off_policy_limit`.
        reference_logprobs: (B, T), for `kl_coefficient`.
        entropies: (B, T) with gradient, for `entropy_coefficient`.

    Returns:
        (B, T) float32 with gradient; only the tokens in the mask mean anything.
    """
    losses = TOKEN_LOSSES[config.loss_type](terms, config)
    if config.off_policy_limit is not None and sampling_logprobs is not None:
        losses = losses * off_policy_mask(terms, sampling_logprobs, config.off_policy_limit)
    if terms.correction is not None and config.loss_type != "vespo":  # vespo has it in W
        losses = losses * terms.correction
    if config.kl_coefficient > 0 and reference_logprobs is not None:
        kl = KL_ESTIMATORS[config.kl_estimator](terms.logprobs, reference_logprobs)
        losses = losses + config.kl_coefficient * (kl * terms.ratio if config.kl_importance else kl)
    if config.entropy_coefficient > 0 and entropies is not None:
        losses = losses - config.entropy_coefficient * entropies
    return losses.expand_as(terms.logprobs)


# --- averaging ------------------------------------------------------------------------------------------------------

_MEAN_OVER_ROLLOUTS = ("grpo", "sapo", "rloo")


def token_weights(loss_type: str, completion_mask: Tensor) -> Tensor:
    """Return what each token's loss is multiplied by before everything is summed, (B, T) float32."""
    mask = completion_mask.float()
    if loss_type in _MEAN_OVER_ROLLOUTS:  # first the mean over a rollout's tokens
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    return mask


def row_count(loss_type: str, most_tokens: int) -> int | None:
    """Return what a rollout adds to the number the sum is divided by; None: its completion tokens.

    grpo, sapo, rloo: 1 (mean over rollouts). luspo: 1 (its token sum is what weighs a rollout by its length). dr_grpo:
    `most_tokens`, the longest completion allowed, a constant. ppo, dapo, bnpo, cispo, vespo, reinforce++: its tokens.
    (TRL's bnpo divides by the tokens of a microbatch, so that its gradient depends on how the batch is split; ours
    takes those of the whole batch, which for one microbatch is the same.)
    """
    if loss_type in (*_MEAN_OVER_ROLLOUTS, "luspo"):
        return 1
    return most_tokens if loss_type == "dr_grpo" else None


# --- rollouts of another policy -------------------------------------------------------------------------------------


@torch.no_grad()
def sampling_correction(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    completion_mask: Tensor,
    mode: CorrectionMode = "token_truncate",
    lowest: float | None = None,
    highest: float | None = 3.0,
) -> Tensor:
    """Return importance weights p_trainer / p_sampler for rollouts the trainer's own weights would not quite sample.

    The sampler differs in numerics (another backend, bfloat16) or in weights (rollouts of an earlier step).

    Args:
        old_logprobs: (B, T) the trainer's.
        sampling_logprobs: (B, T) the engine's.
        completion_mask: (B, T) bool.
        mode: one weight a token or a sequence; weights beyond the bounds are cut off (truncate) or set to 0 (mask).
        lowest: lower bound, or None.
        highest: upper bound, or None.

    Returns:
        (B, T) for token modes, (B, 1) for sequence modes; 1 where there is nothing to correct.
    """
    log_weight = ((old_logprobs - sampling_logprobs) * completion_mask).nan_to_num(0.0)
    if mode.startswith("sequence"):
        log_weight = log_weight.sum(1, keepdim=True)
    weight = log_weight.exp()
    if mode.endswith("truncate"):
        return weight if lowest is None and highest is None else weight.clamp(lowest, highest)
    outside = (weight < (-math.inf if lowest is None else lowest)) | (
        weight > (math.inf if highest is None else highest)
    )
    return weight.masked_fill(outside, 0.0)


@torch.no_grad()
def off_policy_mask(terms: Terms, sampling_logprobs: Tensor, limit: float) -> Tensor:
    """Return 1.0 to keep and 0.0 to drop, in the shape of the advantages.

    A bad rollout that the policy would hardly sample any more is dropped.
    """
    drift = ((sampling_logprobs - terms.logprobs) * terms.completion_mask).nan_to_num(0.0)
    mean = drift.sum(1, keepdim=True) / terms.completion_mask.sum(1, keepdim=True).clamp(min=1)
    return ((terms.advantages >= 0) | (mean <= limit)).float()


# --- the value model ------------------------------------------------------------------------------------------------


def clipped_value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return half the squared error of every token, the worse of the free and the clipped prediction.

    Args:
        values: (B, T) with gradient.
        old_values: (B, T) before the first update on these rollouts.
        returns: (B, T).
        clip: how far a prediction may move in one step; None: plain squared error.
    """
    free = (values - returns).square()
    if clip is None:
        return 0.5 * free
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(free, (near - returns).square())


# --- the price of KL ------------------------------------------------------------------------------------------------


def adapt_kl_coefficient(
    coefficient: float, kl: float, target: float, rollouts: int, horizon: int = 10_000
) -> float:
    """Return the coefficient that moves the KL a rollout towards `target` (arXiv 1909.08593, section 2.2).

    Args:
        coefficient: so far.
        kl: measured, nats a rollout.
        target: wanted, nats a rollout.
        rollouts: how many it was measured on.
        horizon: rollouts over which a doubled KL raises the coefficient by a factor of about e^0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * rollouts / horizon)
