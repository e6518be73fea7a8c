"""The GRPO family against TRL's own code, on the same tensors: losses, gradients, advantages, corrections.

TRL's `_compute_loss` is called unbound, on an object that holds the settings and gives it our logprobs, so that what is
compared is their formula and nothing of a model. TRL has no PPO trainer any more: for PPO, GAE and whitening the peer
is written out from TRL 0.x and CleanRL's published formulas (vectorised over a rectangle, as they have it).
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nurture.advantages import (
    gae,
    group_advantages,
    leave_one_out,
    overlong_penalty,
    token_rewards,
    whiten,
)
from nurture.losses.policy import (
    KL_ESTIMATORS,
    PolicyLossConfig,
    adapt_kl_coefficient,
    clipped_tokens,
    clipped_value_losses,
    explained_variance,
    importance_terms,
    kl_k3,
    off_policy_mask,
    policy_token_losses,
    row_count,
    token_weights,
)

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

PROMPT, LONGEST = 2, 8


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Four rollouts: two prompt tokens, completions of 3 to 8 tokens, one with an environment's tokens inside."""
    generator = torch.Generator().manual_seed(seed)
    width = PROMPT + LONGEST
    mask = torch.zeros(4, width, dtype=torch.bool)
    for row, length in enumerate((8, 3, 5, 6)):
        mask[row, PROMPT : PROMPT + length] = True
    mask[3, PROMPT + 2 : PROMPT + 4] = False
    old = -torch.rand(4, width, generator=generator) * 3
    return {
        "mask": mask,
        "old": old,
        "logprobs": old + torch.randn(4, width, generator=generator) * 0.4,
        "reference": old + torch.randn(4, width, generator=generator) * 0.3,
        "sampling": old + torch.randn(4, width, generator=generator) * 0.3,
        "entropies": torch.rand(4, width, generator=generator) * 2,
        "advantages": torch.randn(4, generator=generator),
    }


def trl_loss(
    case: dict[str, torch.Tensor], logprobs: torch.Tensor, config: PolicyLossConfig, **extra: object
):
    """Return what TRL computes with the same settings."""
    trainer_class = grpo_trainer.GRPOTrainer
    positive, negative = config.vespo_positive, config.vespo_negative
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs[:, PROMPT:], case["entropies"][:, PROMPT:], None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=config.off_policy_limit,
        get_off_policy_mask=trainer_class.get_off_policy_mask,
        get_gamma_weights=trainer_class.get_gamma_weights,
        importance_sampling_level=config.level,
        beta=config.kl_coefficient,
        epsilon_low=config.clip_low,
        epsilon_high=config.cispo_cap if config.loss_type == "cispo" else config.clip_high,
        loss_type=config.loss_type,
        use_vllm="importance_sampling_ratio" in extra,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        _entropy_bonus_enabled=config.entropy_coefficient > 0,
        entropy_coef=config.entropy_coefficient,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            delta=config.ratio_limit,
            use_bias_correction_kl=config.kl_importance,
            sapo_temperature_pos=config.sapo_temperatures[0],
            sapo_temperature_neg=config.sapo_temperatures[1],
            vespo_k_pos=positive[0], vespo_lambda_pos=positive[1], vespo_k_neg=negative[0], vespo_lambda_neg=negative[1],
            steps_per_generation=1,
        ),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(4, PROMPT, dtype=torch.int64),
        "prompt_mask": torch.ones(4, PROMPT, dtype=torch.int64),
        "completion_ids": torch.zeros(4, LONGEST, dtype=torch.int64),
        "completion_mask": case["mask"][:, PROMPT:].long(),
        "advantages": case["advantages"],
        "old_per_token_logps": case["old"][:, PROMPT:],
        "ref_per_token_logps": case["reference"][:, PROMPT:],
        "sampling_per_token_logps": case["sampling"][:, PROMPT:],
        "num_items_in_batch": case["mask"].sum(),
        **extra,
    }
    return trainer_class._compute_loss(fake, None, inputs), fake._metrics["train"]


def our_loss(case, logprobs, config: PolicyLossConfig, correction=None) -> torch.Tensor:
    advantages = case["advantages"][:, None] * case["mask"]
    terms = importance_terms(logprobs, case["old"], advantages, case["mask"], config, correction)
    losses = policy_token_losses(
        terms,
        config,
        sampling_logprobs=case["sampling"],
        reference_logprobs=case["reference"],
        entropies=case["entropies"],
    )
    count = row_count(config.loss_type, LONGEST)
    total = int(case["mask"].sum()) if count is None else 4 * count
    return (losses * token_weights(config.loss_type, case["mask"])).sum() / total


def assert_equal_with_gradient(ours, theirs, ours_logprobs, theirs_logprobs) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    (a,) = torch.autograd.grad(ours, ours_logprobs)
    (b,) = torch.autograd.grad(theirs, theirs_logprobs)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


FAMILY = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo")
VARIANTS = [
    *(PolicyLossConfig(loss_type=name) for name in FAMILY),
    *(
        PolicyLossConfig(loss_type=name, ratio_level="sequence")
        for name in ("grpo", "dapo", "dr_grpo", "sapo")
    ),
    PolicyLossConfig(loss_type="luspo", ratio_level="token"),
    PolicyLossConfig(loss_type="grpo", kl_coefficient=0.04),
    PolicyLossConfig(loss_type="dapo", kl_coefficient=0.04, kl_importance=True),
    PolicyLossConfig(loss_type="dapo", clip_low=0.1, clip_high=0.28, ratio_limit=1.5),
    PolicyLossConfig(loss_type="dapo", entropy_coefficient=0.01),
    PolicyLossConfig(loss_type="dapo", off_policy_limit=0.05),
    PolicyLossConfig(loss_type="cispo", cispo_cap=1.1, kl_coefficient=0.1),
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.loss_type}-{c.level}")
@pytest.mark.parametrize("seed", range(2))
def test_losses_equal_trl(seed: int, config: PolicyLossConfig) -> None:
    case = tensors(seed)
    mine, yours = (case["logprobs"].clone().requires_grad_() for _ in range(2))
    theirs, _ = trl_loss(case, yours, config)
    assert_equal_with_gradient(our_loss(case, mine, config), theirs, mine, yours)


@pytest.mark.parametrize("loss_type", FAMILY)
def test_corrections_for_another_sampler_enter_as_in_trl(loss_type: str) -> None:
    case, config = tensors(3), PolicyLossConfig(loss_type=loss_type)
    weights = (case["old"] - case["sampling"]).exp().clamp(max=2.0) * case["mask"] + 1.0 * ~case["mask"]
    mine, yours = (case["logprobs"].clone().requires_grad_() for _ in range(2))
    theirs, _ = trl_loss(case, yours, config, importance_sampling_ratio=weights[:, PROMPT:])
    assert_equal_with_gradient(our_loss(case, mine, config, weights), theirs, mine, yours)


def test_rloo_equals_trl() -> None:
    rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")
    case, config = tensors(1), PolicyLossConfig(loss_type="rloo")
    case["logprobs"] = case["old"] + 0.3 * (
        case["logprobs"] - case["old"]
    )  # a whole sequence's ratio is far from 1
    mine, yours = (case["logprobs"].clone().requires_grad_() for _ in range(2))
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (yours, case["entropies"], None),
        aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2, model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
    )  # fmt: skip
    empty = torch.zeros(4, 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(case["mask"], dtype=torch.int64),
        "completion_mask": case["mask"].long(),
        "old_logps": (case["old"] * case["mask"]).sum(1),
        "advantages": case["advantages"],
    }
    theirs = rloo_trainer.RLOOTrainer._compute_loss(fake, None, inputs)
    assert_equal_with_gradient(our_loss(case, mine, config), theirs, mine, yours)


def test_off_policy_mask_equals_trl() -> None:
    case = tensors(2)
    advantages = case["advantages"][:, None] * case["mask"]
    terms = importance_terms(case["logprobs"], case["old"], advantages, case["mask"], PolicyLossConfig())
    theirs = grpo_trainer.GRPOTrainer.get_off_policy_mask(
        case["advantages"][:, None], case["logprobs"], case["sampling"], case["mask"].float(), 0.02
    )
    assert 0 < theirs.sum() < 4
    ours = off_policy_mask(terms, case["sampling"], 0.02)
    assert torch.equal(ours[case["mask"]], theirs.expand_as(ours)[case["mask"]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_equal_trl(scale: str) -> None:
    """TRL's lines (GRPO) with G = 4, a reward missing in the second group."""
    from trl.trainer.utils import nanstd

    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    rewards[5] = torch.nan
    grouped = rewards.view(3, 4)
    theirs = rewards - torch.nanmean(grouped, 1).repeat_interleave(4)
    if scale == "group":
        theirs = theirs / (nanstd(grouped, dim=1).repeat_interleave(4) + 1e-4)
    elif scale == "batch":
        theirs = theirs / (nanstd(rewards) + 1e-4)
    ours = group_advantages(rewards, torch.arange(3).repeat_interleave(4), scale)
    torch.testing.assert_close(ours, theirs.nan_to_num(0.0))


def test_leave_one_out_equals_trl() -> None:
    from trl.trainer.utils import nanstd

    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    rewards[5] = torch.nan
    grouped = rewards.view(3, 4)
    scored = (~grouped.isnan()).sum(1, keepdim=True)
    theirs = (grouped - (torch.nansum(grouped, 1, keepdim=True) - grouped) / (scored - 1)).view(-1)
    groups = torch.arange(3).repeat_interleave(4)
    torch.testing.assert_close(leave_one_out(rewards, groups), theirs.nan_to_num(0.0))
    theirs = (theirs - theirs.nanmean()) / (nanstd(theirs) + 1e-4)
    torch.testing.assert_close(leave_one_out(rewards, groups, normalise=True), theirs.nan_to_num(0.0))


def test_overlong_penalty_equals_trl() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = [0, 79, 80, 81, 99, 100, 101, 500]
    theirs = get_soft_overlong_punishment(100, 20)([[0] * n for n in lengths])
    assert overlong_penalty(torch.tensor(lengths), 100, 20).tolist() == pytest.approx(theirs)


def test_ppo_equals_the_published_formulas() -> None:
    """CleanRL's ppo.py and TRL 0.x's PPOTrainer: whiten, clipped surrogate, clipped value loss, masked means."""
    case, config = tensors(4), PolicyLossConfig(loss_type="ppo")
    mask, generator = case["mask"], torch.Generator().manual_seed(9)
    raw = torch.randn(mask.shape, generator=generator)

    def masked_mean(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum() / mask.sum()

    mean = masked_mean(raw)
    variance = masked_mean((raw - mean) ** 2) * mask.sum() / (mask.sum() - 1)
    theirs_whitened = (raw - mean) * torch.rsqrt(variance + 1e-8) * mask
    torch.testing.assert_close(whiten(raw, mask), theirs_whitened)

    ratio = (case["logprobs"] - case["old"]).exp()
    losses = torch.max(-theirs_whitened * ratio, -theirs_whitened * ratio.clamp(0.8, 1.2))
    terms = importance_terms(case["logprobs"], case["old"], theirs_whitened, mask, config)
    ours = (policy_token_losses(terms, config) * token_weights("ppo", mask)).sum() / mask.sum()
    torch.testing.assert_close(ours, masked_mean(losses))

    values, old_values, returns = (torch.randn(mask.shape, generator=generator) for _ in range(3))
    clipped = torch.clamp(values, old_values - 0.2, old_values + 0.2)
    theirs = 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2))
    torch.testing.assert_close(masked_mean(clipped_value_losses(values, old_values, returns, 0.2)), theirs)


def test_gae_equals_the_published_loop() -> None:
    """CleanRL's loop over `reversed(range(num_steps))` on a rectangle without gaps, ended by a terminal state."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(3, 7, generator=generator), torch.randn(3, 7, generator=generator)
    gamma, lam = 0.98, 0.9
    theirs, last = torch.zeros(3, 7), torch.zeros(3)
    for t in reversed(range(7)):
        following = values[:, t + 1] if t < 6 else torch.zeros(3)
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        theirs[:, t] = last
    ours, returns = gae(rewards, values, torch.ones(3, 7, dtype=torch.bool), gamma, lam)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(returns, theirs + values)


def test_token_rewards_equal_the_published_ones() -> None:
    """TRL 0.x's PPOTrainer: k1 or k3 on every token, the score on the last, a penalty where no end token was written."""
    case, mask = tensors(6), tensors(6)["mask"]
    scores, ended = torch.tensor([0.7, -0.2, 1.5, 0.0]), torch.tensor([True, False, True, True])
    log_ratio = case["reference"] - case["old"]
    for estimator, kl in {"k1": -log_ratio, "k3": (log_ratio.exp() - 1) - log_ratio}.items():
        theirs = -0.05 * kl * mask
        for row in range(4):
            last = max(t for t in range(mask.shape[1]) if mask[row, t])
            theirs[row, last] += scores[row] - 1.0 * (not ended[row])
        rewards = scores - 1.0 * ~ended
        ours = token_rewards(
            rewards, KL_ESTIMATORS[estimator](case["old"], case["reference"]) * mask, mask, 0.05
        )
        torch.testing.assert_close(ours, theirs)


def test_adaptive_kl_equals_the_published_controller() -> None:
    """Ziegler et al. and TRL 0.x's AdaptiveKLController."""
    ours = theirs = 0.2
    for kl in (0.5, 3.0, 6.0, 7.0, 40.0):
        theirs *= 1 + float(np.clip(kl / 6.0 - 1, -0.2, 0.2)) * 256 / 10_000
        ours = adapt_kl_coefficient(ours, kl, 6.0, 256, 10_000)
        assert ours == pytest.approx(theirs)


def test_what_ppo_reports_equals_cleanrl() -> None:
    """CleanRL's explained variance, clip fraction and approximate KL, over the tokens of the mask."""
    case, mask = tensors(7), tensors(7)["mask"]
    values, returns = case["entropies"], case["reference"]
    flat, wanted = values[mask].numpy(), returns[mask].numpy()
    theirs = 1 - np.var(wanted - flat) / np.var(wanted)
    assert explained_variance(values, returns, mask) == pytest.approx(float(theirs), rel=1e-4)
    log_ratio = (case["logprobs"] - case["old"])[mask]
    approximate = ((log_ratio.exp() - 1) - log_ratio).mean()
    # Their ratio is new over old; ours of KL(old || new), which is what tokens drawn from the old policy estimate.
    torch.testing.assert_close(kl_k3(case["old"], case["logprobs"])[mask].mean(), approximate)
    ratio, advantages = (
        log_ratio.exp(),
        torch.randn(len(log_ratio), generator=torch.Generator().manual_seed(0)),
    )
    outside = (ratio - 1).abs() > 0.2
    binding = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    clipped = clipped_tokens(ratio, advantages, 0.2, 0.2)
    assert torch.equal(clipped, binding)  # CleanRL counts every token outside; only these have no gradient
    assert not (clipped & ~outside).any()
