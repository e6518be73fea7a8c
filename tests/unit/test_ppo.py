"""PPO between rollouts and update: one KL, charged and reported; and what is said when it cannot be one."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nurture.evals.overoptimisation import Point
from nurture.losses.policy import KL_ESTIMATORS
from nurture.rollout import RolloutBatch
from nurture.runtime import Processes
from nurture.stages import ppo


def config(**settings: Any) -> ppo.Config:
    defaults = {"name": "ppo", "steps": 1, "data": {"x": "x.jsonl"}, "reward_model": "reward"}
    return ppo.Config.model_validate({**defaults, **settings})


def session() -> Any:
    return SimpleNamespace(execution=SimpleNamespace(processes=Processes()))


def a_batch(shift: float, spread: float, rows: int = 64, seed: int = 0) -> RolloutBatch:
    """Replies of 2 to 6 tokens behind prompts of 2; the reference gives a token `shift` nats less, give or take."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, 8, dtype=torch.bool)
    for row in range(rows):
        mask[row, 2 : 4 + row % 5] = True
    ours = -torch.rand(mask.shape, generator=generator) * mask
    noise = torch.randn(mask.shape, generator=generator) * spread
    batch = RolloutBatch(
        torch.zeros_like(mask).long(), mask, ours, torch.rand(rows, generator=generator),
        torch.arange(rows), torch.zeros_like(mask).long(),
    )  # fmt: skip
    # Outside the mask stands what must not count: prompts and padding were the first cause of a negative KL.
    theirs = torch.where(mask, ours - shift - noise, torch.tensor(50.0))
    batch.extra = {"old_logprobs": ours, "reference_logprobs": theirs, "values": torch.zeros(mask.shape)}
    return batch


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_that_is_reported_is_the_one_that_is_charged(estimator: Any) -> None:
    """What is left of the rewards, with nothing discounted and no value model, is the score minus the reported KL."""
    batch = a_batch(0.3, 0.2)
    settings = config(kl={"coefficient": 0.1, "estimator": estimator}, trace=1.0, whiten_advantages=False)
    sums = ppo.credit(settings, session(), batch, kl_coefficient=0.25)  # as steered, not the recipe's
    reported, replies = sums["kl"]
    assert replies == len(batch.rewards)
    first = batch.completion_mask.int().argmax(1, keepdim=True)
    whole = batch.extra["returns"].gather(1, first).sum()
    assert float(whole) == pytest.approx(float(batch.rewards.sum()) - 0.25 * reported, rel=1e-5)
    assert sums["kl_coefficient"] == (0.25, 1.0)
    exact = KL_ESTIMATORS[estimator](batch.extra["old_logprobs"], batch.extra["reference_logprobs"])
    assert reported == pytest.approx(float(exact[batch.completion_mask].sum()), rel=1e-5)
    assert not batch.extra["advantages"][~batch.completion_mask].any()


def test_a_negative_kl_is_warned_of_with_its_cause_and_noise_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for shift, spread in ((0.1, 0.3), (0.0, 0.3), (0.0, 0.0)):
        for seed in range(20):
            ppo.credit(config(), session(), a_batch(shift, spread, seed=seed), 0.05)
    assert not caplog.records
    # Replies drawn at another temperature, say: the policy likes them less than the reference does.
    batch = a_batch(-0.2, 0.3)
    batch.logprobs = batch.logprobs - 0.125 * batch.completion_mask
    ppo.credit(config(), session(), batch, 0.05)
    (record,) = caplog.records
    said = record.getMessage()
    assert "below 0 by more than its noise" in said
    assert "differ by 0.1250 nats a token" in said
    assert "check temperature" in said


def test_kinds_of_kl_that_cannot_be_negative_are_not() -> None:
    for estimator in ("k2", "k3"):
        batch = a_batch(-0.5, 0.3)
        kl = ppo.credit(config(kl={"estimator": estimator}), session(), batch, 0.05)["kl"][0]
        assert kl > 0
        assert math.isfinite(kl)


@pytest.mark.parametrize("action", ["off", "warn", "stop"])
def test_the_same_reply_to_every_prompt_is_noticed_while_the_reward_rises(
    action: str, caplog: pytest.LogCaptureFixture
) -> None:
    start = Point(0, 0.0, proxy=0.0, length=20.0, repetition=0.05, different=0.9)
    memory: dict[str, Any] = {"points": [vars(start)]}
    for step in (1, 2):
        collapsed = replace(start, step=step, proxy=3.0 + step, different=0.1)
        ppo.heed(config(alarm={"action": action}), memory, collapsed)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (action != "off")  # once
    assert all("of replies differ" in text and "may no longer be telling the truth" in text for text in said)
    assert bool(memory.get("stop")) == (action == "stop")
