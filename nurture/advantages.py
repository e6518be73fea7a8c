"""From rewards to credit: how much better each token was than expected.

Pure functions on tensors, no model and no configuration. Two families. *Actor-critic* (PPO): a value model predicts the
return from every token, and generalised advantage estimation turns rewards and predictions into one advantage a token.
*Group-relative* (GRPO and its kin): several completions of one prompt are each other's baseline, and every token of a
completion shares its advantage. Everything is over completion tokens alone: prompts, environment turns and padding
neither receive credit nor enter a mean.

Main failure mode: no signal. A group whose rewards are all equal has advantage 0 everywhere (`zero_variance_groups`
counts them), and whitening tiny differences turns noise into full-size updates.

Sources: GAE arXiv 1506.02438, equations 11 to 16; GRPO arXiv 2402.03300; Dr. GRPO arXiv 2503.20783; RLOO arXiv
2402.14740; REINFORCE++ arXiv 2501.03262; overlong shaping DAPO arXiv 2503.14476, equation 13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

RewardScale = Literal["group", "batch", "none"]
STD_EPSILON = 1e-4
"""Added to a standard deviation of rewards, as TRL does."""

AddUp = Callable[[Tensor], Tensor]
"""Sums a small tensor over the processes that share a batch; the identity for one process."""


def alone(sums: Tensor) -> Tensor:
    """Return `sums`: the `AddUp` of one process."""
    return sums


# --- actor-critic ---------------------------------------------------------------------------------------------------


def token_rewards(
    rewards: Tensor, token_kl: Tensor, completion_mask: Tensor, kl_coefficient: float
) -> Tensor:
    """Return the reward of every token: -kl_coefficient * KL on each, and the rollout's reward on its last.

    Args:
        rewards: (B,) of whole rollouts.
        token_kl: (B, T) nats, KL estimate of each token against the reference.
        completion_mask: (B, T) bool; a row without any completion token gets no reward.
        kl_coefficient: reward a nat costs.

    Returns:
        (B, T) float32, 0 outside the mask. Source: InstructGPT (arXiv 2203.02155), equation 2.
    """
    per_token = -kl_coefficient * token_kl * completion_mask
    has_any = completion_mask.any(1)
    last = _last_column(completion_mask)
    return per_token.scatter_add(1, last[:, None], (rewards * has_any)[:, None].to(per_token.dtype))


def state_values(predicted: Tensor, completion_mask: Tensor) -> Tensor:
    """Align a value model's output with the tokens it is a baseline of.

    The value of the state *before* token t is what the model says in column t - 1, having read t tokens.

    Args:
        predicted: (B, T), one number a column.

    Returns:
        (B, T), aligned with logprobs: column t belongs to token t; 0 outside the mask.
    """
    aligned = torch.cat((torch.zeros_like(predicted[:, :1]), predicted[:, :-1]), dim=1)
    return aligned.masked_fill(~completion_mask, 0.0)


def gae(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, discount: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over each row's completion tokens.

    delta_t = r_t + discount * V_{t'} - V_t and A_t = delta_t + discount * trace * A_{t'}, where t' is the row's NEXT
    completion token: what an environment writes in between is neither an action nor a state of its own.

    Args:
        rewards: (B, T) of tokens.
        values: (B, T) of the states before the tokens (`state_values`).
        completion_mask: (B, T) bool.
        discount: gamma; 1 for a whole reply.
        trace: lambda: 0 trusts the value model alone, 1 the rewards alone.

    Returns:
        (advantages, returns), both (B, T) float32 and 0 outside the mask; returns = advantages + values.
    """
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in range(values.shape[1] - 1, -1, -1):
        acts = completion_mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * trace * next_advantage
        next_advantage = torch.where(acts, advantage, next_advantage)
        next_value = torch.where(acts, values[:, t], next_value)
        advantages[:, t] = torch.where(acts, advantage, 0.0)
    return advantages, (advantages + values).masked_fill(~completion_mask, 0.0)


def whiten(
    values: Tensor, completion_mask: Tensor, *, keep_mean: bool = False, add_up: AddUp = alone
) -> Tensor:
    """Shift and scale to mean 0 (or keep the mean) and variance 1 over completion tokens.

    Args:
        values: (B, T).
        keep_mean: scale only; for rewards, whose mean says whether acting pays.
        add_up: makes the statistics those of the global batch.

    Returns:
        (B, T), 0 outside the mask. Variance is unbiased (n - 1), as TRL's `masked_whiten`.
    """
    mean, variance = _moments(values[completion_mask], add_up)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened + mean if keep_mean else whitened).masked_fill(~completion_mask, 0.0)


# --- group-relative -------------------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor, groups: Tensor, scale: RewardScale = "group", *, add_up: AddUp = alone
) -> Tensor:
    """Return how much better each rollout is than the mean of its group.

    Args:
        rewards: (B,); NaN where nothing could score the rollout: it enters no mean and gets advantage 0.
        groups: (B,) int64, equal for the rollouts of one prompt; groups need not be equal in size or adjacent.
        scale: divide by the standard deviation of the "group" (GRPO), of the "batch", or by nothing ("none", Dr. GRPO:
            dividing favours prompts that are nearly always or nearly never solved).
        add_up: makes the batch's deviation that of the global batch.

    Returns:
        (B,) float32.
    """
    index, counts, sums = _group_sums(rewards, groups)
    centred = rewards - (sums / counts)[index]
    if scale == "group":
        variance = _scatter_sum(centred.square().nan_to_num(0.0), index, len(counts)) / (counts - 1).clamp(
            min=1
        )
        centred = centred / (variance.sqrt()[index] + STD_EPSILON)
    elif scale == "batch":
        _, variance = _moments(rewards[~rewards.isnan()], add_up)
        centred = centred / (variance.sqrt() + STD_EPSILON)
    return centred.nan_to_num(0.0).float()


def leave_one_out(
    rewards: Tensor, groups: Tensor, normalise: bool = False, *, add_up: AddUp = alone
) -> Tensor:
    """RLOO: each rollout against the mean of the OTHERS of its group, which is an unbiased baseline.

    Args:
        rewards: (B,); NaN is left out. For RLOO's KL penalty subtract it before.
        groups: (B,) int64.
        normalise: divide by the batch's standard deviation, after subtracting its mean.
        add_up: makes these statistics those of the global batch.

    Returns:
        (B,) float32; 0 for a rollout that has no others.
    """
    index, counts, sums = _group_sums(rewards, groups)
    others = (counts - 1)[index]
    advantages = rewards - (sums[index] - rewards) / others
    advantages = torch.where(others > 0, advantages, torch.nan)
    if normalise:
        mean, variance = _moments(advantages[~advantages.isnan()], add_up)
        advantages = (advantages - mean) / (variance.sqrt() + STD_EPSILON)
    return advantages.nan_to_num(0.0).float()


def reinforce_plus_plus(
    rewards: Tensor,
    token_kl: Tensor,
    completion_mask: Tensor,
    kl_coefficient: float = 0.0,
    groups: Tensor | None = None,
    *,
    add_up: AddUp = alone,
) -> Tensor:
    """REINFORCE++: no critic; the reward minus the KL still to come, whitened over the whole batch's tokens.

    Args:
        rewards: (B,).
        token_kl: (B, T) nats against the reference; zeros without one.
        completion_mask: (B, T) bool.
        kl_coefficient: reward a nat costs.
        groups: (B,) int64: subtract the group's mean reward first (the paper's "baseline" variant); None: do not.
        add_up: makes the statistics those of the global batch.

    Returns:
        (B, T) float32, 0 outside the mask.
    """
    if groups is not None:
        rewards = group_advantages(rewards, groups, "none")
    per_token = token_rewards(rewards.nan_to_num(0.0), token_kl, completion_mask, kl_coefficient)
    to_come = per_token.flip(1).cumsum(1).flip(1)
    return whiten(to_come, completion_mask, add_up=add_up)


def spread(advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Give every completion token its rollout's advantage: (B,) -> (B, T), 0 outside the mask."""
    return advantages[:, None] * completion_mask


def zero_variance_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Say for each group, in the order of its number, whether its rewards are all equal: it teaches nothing.

    Returns:
        (number of groups,) bool; True as well where fewer than two rollouts could be scored.
    """
    index, counts, _ = _group_sums(rewards, groups)
    high = torch.full(counts.shape, -torch.inf).scatter_reduce(
        0, index, rewards.nan_to_num(-torch.inf), "amax"
    )
    low = torch.full(counts.shape, torch.inf).scatter_reduce(0, index, rewards.nan_to_num(torch.inf), "amin")
    return (counts < 2) | torch.isclose(high, low)


def overlong_penalty(lengths: Tensor, most: int, cushion: int) -> Tensor:
    """DAPO's soft punishment of length: 0 up to `most - cushion` tokens, then linearly down to -1 at `most`.

    Args:
        lengths: (B,) completion tokens.
        most: longest completion.
        cushion: tokens over which the penalty grows.

    Returns:
        (B,) float32 in [-1, 0], to be added to the reward.
    """
    if cushion == 0:
        return -(lengths > most).float()
    return -((lengths - (most - cushion)) / cushion).clamp(0.0, 1.0)


# --- sums -----------------------------------------------------------------------------------------------------------


def _moments(values: Tensor, add_up: AddUp) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of a flat tensor over all processes; 0 and 0 if there is nothing."""
    first = add_up(torch.stack((values.new_tensor(float(values.numel())), values.sum())).double())
    mean = first[1] / first[0].clamp(min=1)
    squares = add_up((values.double() - mean).square().sum()[None])
    return mean.to(values.dtype), (squares[0] / (first[0] - 1).clamp(min=1)).to(values.dtype)


def _group_sums(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each rollout's place among the sorted groups (B,), and scored count and reward sum of each group."""
    numbers, index = groups.unique(return_inverse=True)
    counts = _scatter_sum((~rewards.isnan()).float(), index, len(numbers))
    return index, counts, _scatter_sum(rewards.nan_to_num(0.0), index, len(numbers))


def _scatter_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).scatter_add(0, index, values)


def _last_column(completion_mask: Tensor) -> Tensor:
    """Return (B,) int64: the column of each row's last completion token, 0 if there is none."""
    columns = torch.arange(completion_mask.shape[1], device=completion_mask.device)
    return (columns * completion_mask).amax(1)
