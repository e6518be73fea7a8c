"""What must not change a training run: accumulation, interruption, the number of processes; and what must stop it."""

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
from typing import Any

import pytest
import torch
from training_toy import VOCABULARY, toy_batches, toy_fit, toy_model

from nurture import trainer
from nurture.checkpoint import load_state
from nurture.errors import NurtureError
from nurture.losses.language import LanguageLoss
from nurture.model.hugging_face import load_model, save_model
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.runtime import ExecutionConfig, Processes, decide_execution
from nurture.trainer import train_step
from nurture.types import LossResult

TOY = Path(__file__).resolve().parent.parent / "training_toy.py"
REPOSITORY = TOY.parent.parent


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(a: torch.nn.Module, b: torch.nn.Module, **tolerance: float) -> None:
    for name, tensor in weights(a).items():
        if tolerance:
            torch.testing.assert_close(tensor, weights(b)[name], **tolerance)
        else:
            assert torch.equal(tensor, weights(b)[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_does_not_change_the_result(tmp_path: Path, optimizer: str) -> None:
    whole, report = toy_fit(tmp_path / "whole", optimizer=optimizer)
    parts, _ = toy_fit(tmp_path / "parts", optimizer=optimizer, microbatch_tokens=32)
    assert whole is not None
    assert parts is not None
    # Muon's orthogonalisation runs in bfloat16, where a last-bit difference grows.
    limits = {"adamw": 2e-5, "muon": 5e-3}
    assert_same(whole, parts, atol=limits[optimizer], rtol=1e-3)
    assert sum(report.tokens.values()) == 12 * 8 * 32


def test_uneven_microbatches_weigh_tokens_not_microbatches() -> None:
    """A mean of means would give the short microbatch as much weight as the long one."""
    batch = toy_batches(4)(0)
    batch.labels[0, 5:] = -100
    batch.labels[1:3] = -100
    execution = decide_execution(ExecutionConfig(precision="fp32", compile="off"))
    from nurture.losses.language import LanguageLoss

    loss_fn = LanguageLoss(torch.ones(VOCABULARY, dtype=torch.int64))
    norms = []
    for parts in (1, 8):
        model = toy_model()
        optimizer = build_optimizer(model, OptimizerConfig())
        report = train_step(
            model, optimizer, list(batch.split(parts)), loss_fn, clip_norm=1.0, execution=execution
        )
        norms.append(report.grad_norm)
        assert report.metrics["loss"][1] == batch.loss_count
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_update_with_a_nan_is_skipped_and_leaves_no_trace() -> None:
    model = toy_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    execution = decide_execution(ExecutionConfig(precision="fp32", compile="off"))
    before = {name: tensor.clone() for name, tensor in weights(model).items()}

    def broken(model: torch.nn.Module, batch: object) -> LossResult:
        return LossResult(sum(p.sum() for p in model.parameters()) * math.nan)

    report = train_step(model, optimizer, [toy_batches(4)(0)], broken, clip_norm=1.0, execution=execution)
    assert not report.applied
    assert math.isnan(report.grad_norm)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])
    assert not optimizer.parts[0].state


def test_measuring_ends_when_the_main_process_says_so() -> None:
    """A process that went by its own clock would leave the others waiting in an update that it does not do."""
    said = iter([False, False, False, False, True])

    class Led(Processes):
        def agree(self, value: Any) -> Any:
            return next(said) if isinstance(value, bool) else value

    model = toy_model()
    steps: list[int] = []
    speed = trainer.measure_tokens_per_second(
        model,
        build_optimizer(model, OptimizerConfig()),
        lambda step, *place: steps.append(step) or toy_batches(12)(step, *place),  # type: ignore[func-returns-value]
        LanguageLoss(torch.ones(VOCABULARY)),
        execution=replace(
            decide_execution(ExecutionConfig(precision="fp32", compile="off")), processes=Led()
        ),
        microbatch_tokens=4096,
        seconds=0.0,  # over at once by the clock here
    )
    assert steps == [0, 1, 2, 3, 4]
    assert speed > 0


def test_measuring_a_small_model_ends_after_so_many_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast machine does a thousand in the seconds, and the stage that is measured with has no more."""
    monkeypatch.setattr(trainer, "MOST_TIMED", 6)
    model, steps = toy_model(), list[int]()
    speed = trainer.measure_tokens_per_second(
        model,
        build_optimizer(model, OptimizerConfig()),
        lambda step, *place: steps.append(step) or toy_batches(12)(step, *place),  # type: ignore[func-returns-value]
        LanguageLoss(torch.ones(VOCABULARY)),
        execution=decide_execution(ExecutionConfig(precision="fp32", compile="off")),
        microbatch_tokens=4096,
        seconds=1e9,
    )
    assert steps == [0, 1, 2, 3, 4, 5]
    assert speed > 0


def test_a_stage_whose_loss_stays_nan_stops_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nurture.losses import language

    original = language.LanguageLoss.__call__

    def poisoned(self: language.LanguageLoss, model: torch.nn.Module, batch: object) -> LossResult:
        result = original(self, model, batch)
        return LossResult(result.total * math.inf, result.metrics)

    monkeypatch.setattr(language.LanguageLoss, "__call__", poisoned)
    with pytest.raises(NurtureError, match=r"NaN or infinite for 21 updates.*learning_rate"):
        toy_fit(tmp_path, steps=30)


@pytest.mark.parametrize("average", [None, 0.9])
def test_resuming_repeats_the_run_bit_for_bit(
    tmp_path: Path, average: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved now and then; the last states are removed, as if the run had been killed after the first of them."""
    straight, report = toy_fit(tmp_path / "straight", average=average)
    toy_fit(tmp_path / "resumed", save_every=5, average=average, keep=9)
    for state in (tmp_path / "resumed/state").glob("step-*"):
        if state.name > "step-00000005":
            shutil.rmtree(state)
    assert [state.name for state in (tmp_path / "resumed/state").glob("step-*")] == ["step-00000005"]
    done: list[int] = []
    monkeypatch.setattr(trainer, "train_step", lambda *a, **how: done.append(1) or train_step(*a, **how))
    resumed, again = toy_fit(tmp_path / "resumed", average=average)
    assert len(done) == 12 - 5  # neither all of them once more, nor none
    assert straight is not None
    assert resumed is not None
    assert_same(straight, resumed)
    assert again.tokens == report.tokens
    assert again.steps == 12
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "resumed/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) == list(range(1, 13))


def test_a_damaged_state_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight, _ = toy_fit(tmp_path / "straight")
    toy_fit(tmp_path / "run", save_every=4)
    newest = max((tmp_path / "run/state").glob("step-*"))
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF
    victim.write_bytes(content)
    resumed, _ = toy_fit(tmp_path / "run")
    assert "is damaged and is passed over" in caplog.text
    assert victim.name in caplog.text
    assert straight is not None
    assert resumed is not None
    assert_same(straight, resumed)


def test_a_full_disk_is_one_clear_message_and_old_states_stay(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # a limit on the size of files stands for the disk
    toy_fit(tmp_path / "run", save_every=4)
    kept = sorted(path.name for path in (tmp_path / "run/state").iterdir())

    for state in (tmp_path / "run/state").glob("step-*"):
        if state.name > "step-00000008":
            shutil.rmtree(state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(NurtureError, match="disk is full"):
            toy_fit(tmp_path / "run", save_every=1)
        with pytest.raises(NurtureError, match=r"model\.safetensors: the disk is full"):
            save_model(toy_model(), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [name for name in kept if name <= "step-00000008"] == sorted(
        path.name for path in (tmp_path / "run/state").iterdir()
    )
    model = toy_model()
    loaded = load_state(
        tmp_path / "run/state", model, build_optimizer(model, OptimizerConfig()), {}, Processes()
    )
    assert loaded is not None
    assert loaded["step"] == 8


def _start(directory: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(TOY), str(directory), "40", "save_every=1", *settings]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_twenty_kills_at_random_instants(tmp_path: Path) -> None:
    """kill -9 twenty times, at whatever the run is doing (most often writing a checkpoint), then let it finish."""
    assert _start(tmp_path / "straight").wait() == 0
    rng = random.Random(11)
    kills = reached = 0
    state = tmp_path / "killed/state"
    while kills < 20:
        process = _start(tmp_path / "killed", "pause=0.05")
        newest = _newest(state)
        deadline = time.monotonic() + 60
        while _newest(state) == newest and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.06)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before twenty kills"
        kills += 1
        reached = max(reached, _newest(state))
    assert reached >= 15, "the kills came before any progress"
    assert _start(tmp_path / "killed").wait() == 0
    assert_same(load_model(tmp_path / "straight/model"), load_model(tmp_path / "killed/model"))


def _newest(state: Path) -> int:
    return max((int(path.name[5:]) for path in state.glob("step-*")), default=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_give_the_curve_of_one(tmp_path: Path, optimizer: str) -> None:
    toy, _ = toy_fit(tmp_path / "one", optimizer=optimizer)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(TOY)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "two"), "12", f"optimizer={optimizer}", "save_every=6"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["train/loss"] for line in lines]

    assert losses("two") == pytest.approx(losses("one"), rel=2e-4 if optimizer == "adamw" else 5e-3)
    # The state two processes wrote resumes in one.
    for state in (tmp_path / "two/state").glob("step-*"):
        if state.name > "step-00000006":
            shutil.rmtree(state)
    resumed, _ = toy_fit(tmp_path / "two", optimizer=optimizer)
    assert toy is not None
    assert resumed is not None
    assert_same(toy, resumed, atol=1e-4 if optimizer == "adamw" else 1e-2, rtol=1e-2)
