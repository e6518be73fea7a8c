"""Any number of processes, however they divide the work and whatever becomes of them, train the model that one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rl_toy import toy_learn
from training_toy import toy_fit

TESTS = Path(__file__).resolve().parent.parent


def torchrun(script: str, *words: str, processes: int, restarts: int = 0) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(TESTS / script), *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def curve(directory: Path, key: str = "train/loss") -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines]


@pytest.mark.slow
def test_reinforcement_learning_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    """Prompts are shared over the ranks and sampled as one process would; policy and value model resume in two, in one."""
    settings = {"batch_size": 48, "loop": {"log_every": 1}}
    toy_learn(tmp_path / "one", 5, **settings)
    many = tmp_path / "many"
    torchrun("rl_toy.py", str(many), "5", "save_every=2", "batch_size=48", processes=4)
    forget_after(many, 4)
    torchrun("rl_toy.py", str(many), "5", "save_every=1", "batch_size=48", processes=2)
    forget_after(many, 4)
    toy_learn(many, 5, **settings)
    for key in ("rl/reward_mean", "rl/length", "rl/policy_loss", "rl/value_loss", "rl/grad_norm"):
        assert curve(many, key) == pytest.approx(curve(tmp_path / "one", key), rel=2e-3, abs=2e-5), key
    assert rl_ledger(many, 5) == rl_ledger(tmp_path / "one", 5)


def rl_ledger(directory: Path, step: int) -> list[dict[str, int]]:
    progress = json.loads((directory / f"state/step-{step:08d}/progress.json").read_text())["progress"]
    return [progress[model]["tokens"] for model in ("policy", "value")]


def forget_after(directory: Path, step: int) -> None:
    for state in (directory / "state").glob("step-*"):
        if state.name > f"step-{step:08d}":
            shutil.rmtree(state)


@pytest.mark.slow
def test_four_lose_one_and_start_again_then_two_go_on_then_one(tmp_path: Path) -> None:
    """A rank of four is killed before its sixth update; torchrun starts all of them again from the third."""
    one, report = toy_fit(tmp_path / "one", 12)
    many = tmp_path / "many"
    out = torchrun("training_toy.py", str(many), "12", "save_every=3", "dies=2:5", processes=4, restarts=1)
    assert "exitcode: -9" in out
    assert curve(many) == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    forget_after(many, 9)
    assert (many / "state/step-00000009").exists()
    torchrun("training_toy.py", str(many), "12", "save_every=1", processes=2)
    assert curve(many) == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    forget_after(many, 11)
    again, last = toy_fit(many, 12)
    assert curve(many) == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    assert last.tokens == report.tokens  # the ledger: the same data, once
    assert one is not None
    assert again is not None
    for (name, mine), theirs in zip(again.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-2, msg=name)


@pytest.mark.parametrize(("processes", "parts"), [(2, 2), (4, 2)])
def test_a_model_cut_over_processes_is_the_model(processes: int, parts: int) -> None:
    """Loss, logprobs, entropies, logits and all gradients; grouped queries, QK norm, an untied and a scalar head."""
    assert "equal" in torchrun("tensor_parallel_toy.py", str(parts), processes=processes)


def test_tensor_parallel_training_gives_the_curve_of_one(tmp_path: Path) -> None:
    one, _ = toy_fit(tmp_path / "one", 8)
    words = (str(tmp_path / "cut"), "8", "tensor_parallel=2", "save_every=4")
    torchrun("training_toy.py", *words, processes=4)
    forget_after(tmp_path / "cut", 4)
    torchrun("training_toy.py", *words, processes=2)  # resumes with as many parts, but half the rows at once
    assert curve(tmp_path / "cut") == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    from nurture.model.hugging_face import load_model

    assert one is not None
    cut = load_model(tmp_path / "cut/model")
    for (name, mine), theirs in zip(cut.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-2, msg=name)
