"""Policy losses, token by token in plain Python from the published formulas, and what must hold for all of them."""

from __future__ import annotations

import math

import pytest
import torch

from nurture.losses.policy import (
    KL_ESTIMATORS,
    TOKEN_LOSSES,
    PolicyLossConfig,
    adapt_kl_coefficient,
    clipped_tokens,
    clipped_value_losses,
    explained_variance,
    importance_terms,
    off_policy_mask,
    policy_token_losses,
    row_count,
    sampling_correction,
    token_weights,
    vespo_weight,
)

LONGEST = 6


class Case:
    """Three rollouts of unequal length with a gap; ratios on both sides of every clip."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
        self.old = -torch.rand(3, 6, generator=generator) * 3
        self.logprobs = self.old + torch.randn(3, 6, generator=generator) * 0.4
        self.reference = self.old + torch.randn(3, 6, generator=generator) * 0.3
        self.sampling = self.old + torch.randn(3, 6, generator=generator) * 0.2
        self.rollout_advantages = torch.tensor([1.3, -0.7, 0.4])
        self.advantages = self.rollout_advantages[:, None] * self.mask
        self.logprobs.requires_grad_()

    def loss(self, config: PolicyLossConfig, correction: torch.Tensor | None = None) -> torch.Tensor:
        """The whole average of the published loss."""
        terms = importance_terms(self.logprobs, self.old, self.advantages, self.mask, config, correction)
        losses = policy_token_losses(
            terms, config, sampling_logprobs=self.sampling, reference_logprobs=self.reference
        )
        weights = token_weights(config.loss_type, self.mask)
        count = row_count(config.loss_type, LONGEST)
        total = int(self.mask.sum()) if count is None else count * 3
        return (losses * weights).sum() / total


def slow_loss(case: Case, config: PolicyLossConfig) -> float:
    """The same from one-line formulas over Python numbers."""
    rows, logprobs = [], case.logprobs.detach()
    for row in range(3):
        columns = [t for t in range(6) if case.mask[row, t]]
        log_ratios = [float(logprobs[row, t] - case.old[row, t]) for t in columns]
        a, length = float(case.rollout_advantages[row]), len(columns)
        if config.loss_type == "rloo":
            log_ratios = [sum(log_ratios)] * length
        elif config.level == "sequence":
            log_ratios = [sum(log_ratios) / length] * length
        w = math.exp(sum(float(logprobs[row, t] - case.old[row, t]) for t in columns))
        losses = []
        for t, log_ratio in zip(columns, log_ratios, strict=True):
            rho, logprob = math.exp(log_ratio), float(logprobs[row, t])
            if config.loss_type == "cispo":
                loss = -min(rho, config.cispo_cap) * a * logprob
            elif config.loss_type == "sapo":
                tau = 1.0 if a > 0 else 1.05
                loss = -(4 / tau) / (1 + math.exp(-tau * (rho - 1))) * a
            elif config.loss_type == "vespo":
                k, lam = (2, 3) if a >= 0 else (3, 2)
                loss = -(math.exp(lam) * w**k * math.exp(-lam * w)) * a * logprob
            else:
                clipped = min(max(rho, 1 - config.clip_low), 1 + config.clip_high)
                capped = rho if config.ratio_limit is None else min(rho, config.ratio_limit)
                loss = -min(capped * a, clipped * a)
            if config.kl_coefficient:
                log_q = float(case.reference[row, t]) - logprob
                loss += config.kl_coefficient * (math.exp(log_q) - log_q - 1)
            losses.append(loss)
        rows.append(losses)
    flat = [loss for losses in rows for loss in losses]
    return {
        "grpo": sum(sum(x) / len(x) for x in rows) / 3,
        "sapo": sum(sum(x) / len(x) for x in rows) / 3,
        "rloo": sum(sum(x) / len(x) for x in rows) / 3,
        "luspo": sum(sum(x) for x in rows) / 3,
        "dr_grpo": sum(flat) / (3 * LONGEST),
    }.get(config.loss_type, sum(flat) / len(flat))


VARIANTS = [
    *(PolicyLossConfig(loss_type=name) for name in TOKEN_LOSSES),
    PolicyLossConfig(loss_type="grpo", ratio_level="sequence"),
    PolicyLossConfig(loss_type="luspo", ratio_level="token"),
    PolicyLossConfig(loss_type="dapo", clip_low=0.1, clip_high=0.28, kl_coefficient=0.04),
    PolicyLossConfig(loss_type="grpo", ratio_limit=1.1),
    PolicyLossConfig(loss_type="cispo", cispo_cap=1.05),
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.loss_type}-{c.level}")
@pytest.mark.parametrize("seed", range(3))
def test_each_loss_equals_its_formula(seed: int, config: PolicyLossConfig) -> None:
    case = Case(seed)
    assert case.loss(config).item() == pytest.approx(slow_loss(case, config), rel=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.loss_type}-{c.level}")
def test_on_policy_every_loss_is_reinforce(config: PolicyLossConfig) -> None:
    """At ratio 1 the gradient of each is -A * grad logprob, whatever the shape of its clip."""
    case = Case()
    config = config.model_copy(update={"kl_coefficient": 0.0})
    case.old = case.logprobs.detach().clone()
    (gradient,) = torch.autograd.grad(case.loss(config), case.logprobs)
    weights = token_weights(config.loss_type, case.mask)
    if config.loss_type == "rloo":  # the ratio is of the whole completion: each token moves the whole loss
        weights = case.mask.float()
    count = row_count(config.loss_type, LONGEST)
    expected = -case.advantages * weights / (int(case.mask.sum()) if count is None else count * 3)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss_type", TOKEN_LOSSES)
def test_tokens_outside_the_mask_and_zero_advantages_get_no_gradient(loss_type: str) -> None:
    case = Case()
    (gradient,) = torch.autograd.grad(case.loss(PolicyLossConfig(loss_type=loss_type)), case.logprobs)
    assert not gradient[~case.mask].any()
    case.advantages = torch.zeros_like(case.advantages)
    (gradient,) = torch.autograd.grad(case.loss(PolicyLossConfig(loss_type=loss_type)), case.logprobs)
    assert not gradient.any()


def test_without_old_logprobs_the_ratio_is_one_and_has_a_gradient() -> None:
    case = Case()
    terms = importance_terms(case.logprobs, None, case.advantages, case.mask, PolicyLossConfig())
    assert torch.equal(terms.ratio, torch.ones(3, 6))
    assert terms.ratio.requires_grad


def test_kl_estimators_against_the_exact_divergence() -> None:
    """Drawn from p, the means of k1 and k3 are KL(p || q); k3 and k2 are never negative."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.3, 0.4])
    exact = float((p * (p / q).log()).sum())
    by_token = {name: estimate(p.log(), q.log()) for name, estimate in KL_ESTIMATORS.items()}
    assert float((p * by_token["k1"]).sum()) == pytest.approx(exact, rel=1e-5)
    assert float((p * by_token["k3"]).sum()) == pytest.approx(exact, rel=1e-5)
    assert by_token["k3"].min() >= 0
    assert by_token["k2"].min() >= 0
    assert by_token["k1"].min() < 0


def test_k2_has_the_gradient_of_the_divergence() -> None:
    logits = torch.tensor([0.2, -0.4, 0.9], requires_grad=True)
    q = torch.tensor([0.3, 0.3, 0.4]).log()
    p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    weights = p.exp().detach()
    (estimated,) = torch.autograd.grad((weights * KL_ESTIMATORS["k2"](p, q)).sum(), logits)
    torch.testing.assert_close(estimated, exact, atol=1e-6, rtol=1e-5)


def test_clipped_value_losses_by_hand() -> None:
    values, old, returns = (
        torch.tensor([1.0, 1.0, 0.0]),
        torch.tensor([0.0, 0.9, 0.0]),
        torch.tensor([1.0, 3.0, 2.0]),
    )
    # The first moved by 1 but may move by 0.2: the clipped prediction 0.2 is off by 0.8, although the free one is right.
    assert clipped_value_losses(values, old, returns, 0.2).tolist() == pytest.approx([0.32, 2.0, 2.0])
    assert clipped_value_losses(values, old, returns, None).tolist() == pytest.approx([0.0, 2.0, 2.0])


def test_explained_variance() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    assert explained_variance(returns.clone(), returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.full((1, 4), 5.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(1 - 4)
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask))


def test_clipping_stops_only_the_direction_the_advantage_pushes() -> None:
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert clipped_tokens(ratio, advantages, 0.2, 0.2).tolist() == [True, False, False, True, False]
    assert not clipped_tokens(ratio, advantages, 0.4, 0.4).any()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[0.0, 2.0, 0.5, 1.0], [0.0, 1.0, 1.0, 1.0]]),
        ("token_mask", [[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]),
        ("sequence_truncate", [[1.0], [1.0]]),
        ("sequence_mask", [[1.0], [1.0]]),
    ],
)
def test_sampling_correction_by_hand(mode: str, expected: list[list[float]]) -> None:
    mask = torch.tensor([[False, True, True, True], [False, True, True, False]])
    old = torch.tensor([[9.0, math.log(4), math.log(0.25), 0.0], [5.0, 0.0, 0.0, 3.0]])
    got = sampling_correction(old, torch.zeros(2, 4), mask, mode, 0.5, 2.0)
    kept = mask if got.shape[1] == 4 else torch.ones(2, 1, dtype=torch.bool)
    assert (got[kept]).tolist() == pytest.approx(torch.tensor(expected)[kept].tolist())


def test_a_token_the_sampler_could_not_score_is_not_corrected() -> None:
    sampling = torch.tensor([[math.nan, 0.0]])
    got = sampling_correction(torch.zeros(1, 2), sampling, torch.ones(1, 2, dtype=torch.bool))
    assert got.tolist() == [[1.0, 1.0]]


def test_off_policy_mask_drops_only_bad_rollouts_that_are_far_away() -> None:
    case, config = Case(), PolicyLossConfig()
    terms = importance_terms(case.logprobs, case.old, case.advantages, case.mask, config)
    far = case.logprobs.detach() + 1.0
    assert off_policy_mask(terms, far, 0.5)[case.mask].tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert off_policy_mask(terms, far, 2.0).all()


def test_vespo_weighs_least_what_is_far_from_the_sampling_policy() -> None:
    mask = torch.ones(3, 1, dtype=torch.bool)
    logprobs = torch.tensor([[0.0], [2.0], [-2.0]])
    terms = importance_terms(
        logprobs, torch.zeros(3, 1), torch.ones(3, 1), mask, PolicyLossConfig(loss_type="vespo")
    )
    weight = vespo_weight(terms, PolicyLossConfig()).flatten().tolist()
    assert weight[0] == pytest.approx(1.0)
    assert max(weight[1:]) < 0.4


def test_the_kl_coefficient_moves_towards_the_target() -> None:
    assert adapt_kl_coefficient(0.1, 6.0, 6.0, 256) == pytest.approx(0.1)
    assert adapt_kl_coefficient(0.1, 60.0, 6.0, 500, 10_000) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coefficient(0.1, 0.0, 6.0, 500, 10_000) == pytest.approx(0.1 * 0.99)


@pytest.mark.parametrize("loss_type", ["rloo", "reinforce++"])
def test_a_kl_in_the_reward_is_estimated_by_what_has_its_gradient_there(loss_type: str) -> None:
    """REINFORCE on k1 follows the gradient of the KL; on k3 it may go against it."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    logprobs, reference = logits.log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (wanted,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    estimator = PolicyLossConfig(loss_type=loss_type, kl_coefficient=0.1).kl_estimator
    paid = KL_ESTIMATORS[estimator](logprobs, reference).detach()
    (found,) = torch.autograd.grad((logprobs.exp().detach() * paid * logprobs).sum(), logits)
    torch.testing.assert_close(found, wanted)
    assert PolicyLossConfig(loss_type=loss_type, kl_estimator="k3").kl_estimator == "k3"  # what is asked for
    assert PolicyLossConfig(loss_type="grpo").kl_estimator == "k3"
