"""A whole GRPO update, from rewards to weights, against TRL's loss on the transformers twin of the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.test_policy_losses import trl_loss
from rl_toy import VOCABULARY, toy_config, toy_model, toy_rollouts

from nurture.advantages import alone
from nurture.losses.policy import PolicyLossConfig
from nurture.model.hugging_face import save_model
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.rollout import RolloutBatch, collate
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.stages import grpo
from nurture.stages.rl import PolicyEngine, PolicyLoss, microbatches
from nurture.trainer import train_step

transformers = pytest.importorskip("transformers")
EXECUTION = decide_execution(ExecutionConfig(precision="fp32", compile="off"))
RATE, UPDATES = 1e-2, 3


def rolled_out() -> RolloutBatch:
    rollouts = toy_rollouts(PolicyEngine(toy_model(0), EXECUTION, "fp32"), 1, 2, 2, 1.0)
    for rollout, reward in zip(rollouts, (1.0, 0.0, 0.25, 0.75), strict=True):
        rollout.reward = reward
    return collate(rollouts)


def ours(batch: RolloutBatch, loss: PolicyLossConfig) -> dict[str, torch.Tensor]:
    policy = toy_model(0)
    config = grpo.Config(name="grpo", steps=1, loss=loss, max_tokens=8)
    batch.row_count = grpo.row_count(loss.loss_type, 8)
    batch.extra["old_logprobs"] = batch.logprobs
    zeros = torch.zeros_like(batch.logprobs)
    batch.extra["advantages"] = grpo.advantages(
        config, batch.rewards, batch.groups, zeros, batch.completion_mask, alone
    )
    optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=RATE, weight_decay=0.0))
    settings = toy_config(1, execution={"microbatch_tokens": 20})  # several microbatches: no matter
    for _ in range(UPDATES):
        parts = microbatches(batch, settings, EXECUTION)
        train_step(policy, optimizer, parts, PolicyLoss(loss, 1.0), clip_norm=1.0, execution=EXECUTION)
    return logits(policy, batch)


def theirs(batch: RolloutBatch, loss: PolicyLossConfig, folder: Path) -> dict[str, torch.Tensor]:
    save_model(toy_model(0), folder)
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rewards = batch.rewards.view(2, 2)
    centred = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(UPDATES):
        ahead = policy(batch.token_ids).logits[:, :-1].log_softmax(-1)
        own = ahead.gather(2, batch.token_ids[:, 1:, None])[..., 0]
        case = {
            "mask": batch.completion_mask,
            "old": batch.logprobs,
            "reference": batch.logprobs,
            "sampling": batch.logprobs,
            "entropies": torch.zeros_like(batch.logprobs),
            "advantages": centred.flatten(),
        }
        value, _ = trl_loss(case, torch.cat((torch.zeros(4, 1), own), 1), loss)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return logits(lambda token_ids: policy(token_ids).logits, batch)


@torch.no_grad()
def logits(policy, batch: RolloutBatch) -> torch.Tensor:
    return policy(batch.token_ids)[batch.document_ids >= 0].log_softmax(-1)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo", "cispo"])
def test_three_updates_on_one_batch_leave_the_policy_where_trls_loss_leaves_it(
    tmp_path: Path, loss_type: str
) -> None:
    loss = PolicyLossConfig(loss_type=loss_type)
    batch = rolled_out()
    mine, yours = ours(batch, loss), theirs(batch, loss, tmp_path)
    start = logits(toy_model(0), batch)
    assert mine.shape[1] == VOCABULARY
    assert (mine - start).abs().max() > 0.1
    torch.testing.assert_close(mine, yours, atol=2e-4, rtol=1e-3)
