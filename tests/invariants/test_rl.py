"""What must not change reinforcement learning (accumulation, interruption, padding), and that it learns at all."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rl_toy import VOCABULARY, WANTED, toy_config, toy_learn, toy_model, toy_rollouts

from nurture.advantages import group_advantages, spread
from nurture.losses.policy import CorrectionMode, PolicyLossConfig, row_count, sampling_correction
from nurture.model.hugging_face import load_model
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.rollout import RolloutBatch, collate
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.stages.rl import (
    Played,
    PolicyEngine,
    PolicyLoss,
    by_length,
    correction_mode,
    logprobs_and_entropies,
    microbatches,
    minibatches,
    sampling_precision,
    score_rows,
    without_idle_rows,
)
from nurture.trainer import train_step

TOY = Path(__file__).resolve().parent.parent / "rl_toy.py"
REPOSITORY = TOY.parent.parent
EXECUTION = decide_execution(ExecutionConfig(precision="fp32", compile="off"))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(a: torch.nn.Module | None, b: torch.nn.Module | None, **tolerance: float) -> None:
    assert a is not None
    assert b is not None
    for name, tensor in weights(a).items():
        if tolerance:
            torch.testing.assert_close(tensor, weights(b)[name], **tolerance)
        else:
            assert torch.equal(tensor, weights(b)[name]), name


def log_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def a_batch(seed: int = 0) -> tuple[torch.nn.Module, RolloutBatch]:
    policy = toy_model(0)
    batch = collate(toy_rollouts(PolicyEngine(policy, EXECUTION, "fp32"), seed, 10, 4, 1.0))
    batch.extra["advantages"] = spread(group_advantages(batch.rewards, batch.groups), batch.completion_mask)
    return policy, batch


@pytest.mark.parametrize("lora", [False, True])
def test_resuming_repeats_the_run_bit_for_bit(tmp_path: Path, lora: bool) -> None:
    straight, _ = toy_learn(tmp_path / "straight", lora=lora)
    toy_learn(tmp_path / "resumed", lora=lora, loop={"log_every": 1, "save_every": 2, "keep": 9})
    for state in (tmp_path / "resumed/state").glob("step-*"):
        if state.name > "step-00000002":
            shutil.rmtree(state)
    resumed, _ = toy_learn(tmp_path / "resumed", lora=lora)
    assert_same(straight, resumed)
    assert [line["step"] for line in log_of(tmp_path / "resumed")] == [1, 2, 3, 4, 5]
    for a, b in zip(log_of(tmp_path / "straight"), log_of(tmp_path / "resumed"), strict=True):
        timeless = {key for key in a if "seconds" not in key}
        assert {key: a[key] for key in timeless} == {key: b[key] for key in timeless}


def test_averages_are_the_result_and_resume_too(tmp_path: Path) -> None:
    plain, _ = toy_learn(tmp_path / "plain")
    loop = {"log_every": 1, "average": 0.5}
    straight, _ = toy_learn(tmp_path / "straight", loop=loop)
    toy_learn(tmp_path / "resumed", loop=loop | {"save_every": 3, "keep": 9})
    shutil.rmtree(tmp_path / "resumed/state/step-00000005")
    resumed, _ = toy_learn(tmp_path / "resumed", loop=loop)
    assert_same(straight, resumed)
    assert plain is not None
    assert straight is not None
    assert not torch.equal(plain.embedding.weight, straight.embedding.weight)


def start(directory: Path, *settings: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOY), str(directory), "12", "save_every=1", *settings]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(state: Path) -> int:
    return max((int(path.name[5:]) for path in state.glob("step-*")), default=0)


def test_kills_at_random_instants_do_not_change_the_policy(tmp_path: Path) -> None:
    assert start(tmp_path / "straight").wait() == 0
    rng, state, reached = random.Random(4), tmp_path / "killed/state", 0
    for _ in range(4):
        process = start(tmp_path / "killed", "pause=0.05")
        before, deadline = newest(state), time.monotonic() + 60
        while newest(state) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before the kills"
        reached = max(reached, newest(state))
    assert reached >= 3, "the kills came before any progress"
    assert start(tmp_path / "killed").wait() == 0
    assert_same(load_model(tmp_path / "straight/model"), load_model(tmp_path / "killed/model"))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo", "rloo", "cispo", "vespo"])
def test_how_a_batch_is_split_does_not_change_the_update(loss_type: str) -> None:
    results = []
    for microbatch_tokens in (10_000, 40):
        policy, batch = a_batch()
        config = toy_config(
            1, loss=PolicyLossConfig(loss_type=loss_type), execution={"microbatch_tokens": microbatch_tokens}
        )
        batch.row_count = row_count(loss_type, 8)
        parts = microbatches(batch, config, EXECUTION)
        optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1e-2))
        loss = PolicyLoss(config.loss, 1.0)
        report = train_step(policy, optimizer, parts, loss, clip_norm=1e9, execution=EXECUTION)
        results.append((len(parts), report, policy))
    (few, whole, a), (many, split, b) = results
    assert many > few
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    for name in whole.metrics:
        assert split.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-3, abs=1e-5), name
    assert_same(a, b, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "rloo", "cispo", "sapo", "vespo"])
def test_rollouts_without_credit_can_be_left_out(loss_type: str) -> None:
    gradients = []
    for skip in (False, True):
        policy, batch = a_batch()
        config = toy_config(1, loss=PolicyLossConfig(loss_type=loss_type))
        batch.row_count = row_count(loss_type, 8)
        batch.extra["advantages"][batch.groups < 4] = 0.0
        trained = without_idle_rows(batch, config.loss) if skip else batch
        assert trained.loss_count == batch.loss_count
        parts = microbatches(trained, config, EXECUTION)
        optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1e-9))
        loss = PolicyLoss(config.loss, 1.0)
        report = train_step(policy, optimizer, parts, loss, clip_norm=1e9, execution=EXECUTION)
        gradients.append((sum(len(part.token_ids) for part in parts), report.grad_norm))
    (all_rows, whole), (some_rows, partial) = gradients
    assert (all_rows, some_rows) == (40, int((batch.extra["advantages"] != 0).any(1).sum()))
    assert partial == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    "loss_type", ["ppo", "dapo", "grpo", "dr_grpo", "luspo", "rloo", "cispo", "sapo", "vespo"]
)
@pytest.mark.parametrize("masked", [4, 40])
def test_rollouts_of_which_nothing_counts_make_no_nan(loss_type: str, masked: int) -> None:
    """What the grader failed on has an empty mask; alone in a microbatch, or all there is, it must not divide by 0."""
    policy, batch = a_batch()
    batch.completion_mask[:masked] = False
    batch.extra["advantages"] = batch.extra["advantages"] * batch.completion_mask
    batch.extra["old_logprobs"] = batch.logprobs
    batch.row_count = row_count(loss_type, 8)
    parts = [batch.select(rows) for rows in torch.arange(40).split(4)]
    optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1e-9))
    loss = PolicyLoss(PolicyLossConfig(loss_type=loss_type), 1.0)
    report = train_step(policy, optimizer, parts, loss, clip_norm=1e9, execution=EXECUTION)
    assert (report.grad_norm > 0) == (masked < 40)
    assert all(not math.isnan(total) for total, _ in report.metrics.values())
    if masked < 40:
        policy, counted = toy_model(0), batch.select(torch.arange(masked, 40))
        counted.row_count = batch.row_count
        counted.left_out = batch.loss_count - counted.loss_count
        optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1e-9))
        alone = train_step(policy, optimizer, [counted], loss, clip_norm=1e9, execution=EXECUTION)
        assert report.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)


def test_rollouts_without_credit_stay_where_something_else_pulls_on_them() -> None:
    _, batch = a_batch()
    for loss in (PolicyLossConfig(kl_coefficient=0.1), PolicyLossConfig(entropy_coefficient=0.1)):
        assert without_idle_rows(batch, loss) is batch
    batch.extra["advantages"].zero_()
    assert without_idle_rows(batch, PolicyLossConfig()) is batch


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_another_sampler_is_corrected_in_the_update_itself_as_beforehand(mode: CorrectionMode) -> None:
    totals = []
    for beforehand in (True, False):
        policy, batch = a_batch()
        trainer = batch.logprobs.clone()
        noise = torch.randn(trainer.shape, generator=torch.Generator().manual_seed(3))
        batch.logprobs = (trainer + 0.3 * noise) * batch.completion_mask
        if beforehand:
            mask = batch.completion_mask
            batch.extra["correction"] = sampling_correction(trainer, batch.logprobs, mask, mode, highest=1.2)
        PolicyLoss(PolicyLossConfig(), 1.0, mode, 1.2)(policy, batch).total.backward()
        totals.append(policy.embedding.weight.grad)
    torch.testing.assert_close(totals[0], totals[1], atol=1e-5, rtol=1e-3)


def test_every_rollout_is_trained_once_an_epoch_in_another_order() -> None:
    _, batch = a_batch()
    batch.extra["row"] = torch.arange(40)
    orders = []
    for epoch in (0, 1):
        parts = list(minibatches(batch, 16, 5, 0, epoch))
        orders.append([row for part in parts for row in part.extra["row"].tolist()])
        assert [len(part.token_ids) for part in parts] == [20, 20]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] != orders[1]
    assert next(minibatches(batch, 100, 5, 0, 0)) is batch


def test_parts_by_length_hold_every_row_once_within_the_limit() -> None:
    _, batch = a_batch()
    lengths = (batch.document_ids >= 0).sum(1)
    parts = by_length(batch, 60)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(40))
    assert all(len(part) * int(lengths[part].max()) <= 60 for part in parts)


def test_before_the_first_update_ratio_is_one_and_engine_and_trainer_agree(tmp_path: Path) -> None:
    for temperature in (1.0, 0.7):
        seen: list[Played] = []
        toy_learn(
            tmp_path / str(temperature), 2, seen=seen, temperature=temperature, batch_size=1000, epochs=1
        )
        for line in log_of(tmp_path / str(temperature)):
            assert line["rl/clip_fraction"] == 0
            assert abs(line["rl/update_kl"]) < 1e-6
            assert line["rl/sampling_kl"] < 1e-6
            assert line["rl/sampling_difference"] < 1e-4
        assert len(seen) == 2


def test_an_engine_that_keeps_old_weights_shows_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measure above can fail: this is how a stale engine looked (fused kernels that count no version)."""
    from nurture.inference.engine import Engine

    monkeypatch.setattr(Engine, "_follow_weights", lambda self: None)
    toy_learn(tmp_path, 3)
    assert log_of(tmp_path)[-1]["rl/sampling_difference"] > 1e-3


def test_scoring_in_parts_is_scoring_the_whole() -> None:
    policy, batch = a_batch()
    score = lambda part: logprobs_and_entropies(policy, part, 1.0)  # noqa: E731
    few = score_rows(batch, toy_config(1, execution={"microbatch_tokens": 40}), EXECUTION, score)
    whole = score(batch)
    for a, b in zip(few, whole, strict=True):
        torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(few[0], batch.logprobs, atol=1e-4, rtol=1e-4)
    assert not few[0][~batch.completion_mask].any()


def test_equal_rewards_without_kl_give_no_gradient_at_all() -> None:
    policy, batch = a_batch()
    batch.extra["advantages"] = spread(group_advantages(torch.ones(40), batch.groups), batch.completion_mask)
    PolicyLoss(PolicyLossConfig(), 1.0)(policy, batch).total.backward()
    assert all(not parameter.grad.any() for parameter in policy.parameters() if parameter.grad is not None)


def test_rollouts_of_an_older_policy_are_corrected_without_bias() -> None:
    """Weighted by the ratio, samples of one policy have the expected gradient of another: by counting, over one token."""
    old, new = toy_model(0), toy_model(0)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    prompt = [3, 4, 5]
    rows = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[:, 3] = True
    reward = (rows[:, 3] == WANTED).float()

    def logprobs(model: torch.nn.Module) -> torch.Tensor:
        batch = RolloutBatch(
            rows, mask, torch.zeros(mask.shape), reward, torch.zeros(16).long(), torch.zeros_like(rows)
        )
        return logprobs_and_entropies(model, batch, 1.0)[0][:, 3]

    p_old, p_new = logprobs(old).detach().exp(), logprobs(new)
    exact = torch.autograd.grad((p_new.exp() * reward).sum(), new.embedding.weight)[0]
    batch = RolloutBatch(
        rows, mask, torch.zeros(mask.shape), reward, torch.zeros(16).long(), torch.zeros_like(rows)
    )
    batch.logprobs[:, 3] = batch_old = p_old.log()
    # Every token once, weighted by how often the old policy draws it.
    batch.extra = {"advantages": mask * (reward * p_old * 16)[:, None], "old_logprobs": batch.logprobs}
    config = PolicyLossConfig(clip_low=0.99, clip_high=100.0)
    loss = PolicyLoss(config, 1.0)(new, batch).total / 16
    ours = torch.autograd.grad(-loss, new.embedding.weight)[0]
    torch.testing.assert_close(ours, exact, atol=1e-6, rtol=1e-4)
    assert (p_new.detach() - batch_old).abs().max() > 0.05


@pytest.mark.parametrize("with_value", [True, False], ids=["ppo", "grpo"])
def test_the_policy_learns_what_is_rewarded(tmp_path: Path, with_value: bool) -> None:
    settings = {} if with_value else {"loss": PolicyLossConfig(loss_type="dapo")}
    toy_learn(tmp_path, 12, with_value=with_value, **settings)
    rewards = [line["rl/reward_mean"] for line in log_of(tmp_path)]
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.4


def test_two_processes_learn_too(tmp_path: Path) -> None:
    """Sharded weights, an engine of their own, statistics of the whole batch; another split of the prompts, so another run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(TOY)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path), "14"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = log_of(tmp_path)
    rewards = [line["rl/reward_mean"] for line in lines]
    # Means of steps: one step's reward swings by a tenth.
    assert sum(rewards[-4:]) / 4 > sum(rewards[:2]) / 2 + 0.1, rewards
    assert max(line["rl/sampling_difference"] for line in lines) < 1e-4


@pytest.mark.parametrize(
    ("rollout_precision", "training", "samples_in", "corrected"),
    [
        ("auto", "fp32", "fp32", None),
        ("auto", "bf16", "bf16", "token_truncate"),
        ("bf16", "fp32", "bf16", "token_truncate"),
        ("fp32", "bf16", "fp32", "token_truncate"),
    ],
)
def test_sampling_follows_the_training_and_is_corrected_unless_both_are_exact(
    rollout_precision: str, training: str, samples_in: str, corrected: str | None
) -> None:
    execution = replace(EXECUTION, precision=training)  # type: ignore[arg-type]
    config = toy_config(1, rollout_precision=rollout_precision)
    assert sampling_precision(config, execution) == samples_in
    assert correction_mode(config, execution) == corrected
