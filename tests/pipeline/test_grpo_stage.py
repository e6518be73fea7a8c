"""The GRPO stage from a model that guesses to one that knows: what it learns, keeps, resumes and refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nurture.cli import app
from nurture.data.packing import Conversation, ConversationBatches
from nurture.errors import NurtureError
from nurture.losses.language import LanguageLoss
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.stages import grpo
from nurture.stages.context import StageContext
from nurture.stages.training import save_result_model
from nurture.tokenizer import Tokenizer
from nurture.trainer import train_step
from nurture.types import Message

WORDS = "red green blue black white brown pink gold".split()


def asked(word: str, answer: int) -> list[Message]:
    return [
        {"role": "user", "content": f"Which number has {word}?"},
        {"role": "assistant", "content": f"Answer: {answer}"},
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to answer with some number of eight: right once in eight times."""
    folder = tmp_path_factory.mktemp("start")
    rows = [{"prompt": asked(word, 0)[0]["content"], "answer": "7"} for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [turn["content"] for word in WORDS for n in range(1, 9) for turn in asked(word, n)]
    tokenizer = Tokenizer.train(texts, 320).with_chat_template()
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, max_position=256)
    )
    conversations = [
        Conversation(*map(tuple, tokenizer.encode_conversation(asked(word, n))), "guesses")
        for word in WORDS
        for n in range(1, 9)
    ]
    batches = ConversationBatches(
        conversations, batch_size=8, sequence_length=64, seed=0, pad_token_id=tokenizer.pad_token_id
    )
    execution = decide_execution(ExecutionConfig(precision="fp32", compile="off"))
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-2))
    loss = LanguageLoss(torch.from_numpy(tokenizer.token_byte_lengths))
    for step in range(60):
        train_step(model, optimizer, [batches(step)], loss, clip_norm=1.0, execution=execution)
    save_result_model(model, tokenizer, folder, answers=True)
    shutil.copytree(folder / "model", folder, dirs_exist_ok=True)
    return folder


def settings(**changes: object) -> grpo.Config:
    base = {
        "name": "grpo",
        "data": {"rows": "rows.jsonl"},
        "steps": 4,
        "prompts_per_step": 4,
        "group_size": 8,
        "batch_size": 16,
        "max_tokens": 8,
        "sequence_length": 64,
        "heldout_every": 2,
        "optimizer": {"learning_rate": 3e-3},
    }
    return grpo.Config.model_validate(base | changes)


def train(start: Path, directory: Path, **changes: object) -> dict[str, dict[str, float]]:
    directory.mkdir(exist_ok=True)
    grpo.run(settings(**changes), StageContext(directory=directory, start=start, base=start, seed=1))
    return json.loads((directory / "result.json").read_text())["metrics"]


def log_of(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "rl/reward_mean" in line]


def samples_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def test_it_learns_what_is_right(start: Path, tmp_path: Path) -> None:
    metrics = train(start, tmp_path, steps=15, epochs=2, refills=1)
    lines = log_of(tmp_path)
    assert lines[0]["rl/reward_mean"] < 0.4
    assert lines[-1]["rl/reward_mean"] > 0.9
    assert metrics["math"]["before"] < 0.5 < metrics["math"]["after"]
    assert lines[0]["rl/reward/correct"] == lines[0]["rl/reward_mean"]
    assert max(line["rl/zero_variance"] for line in lines[-3:]) > 0.5  # what is known teaches no more
    assert max(line["rl/sampling_difference"] for line in lines) < 1e-4
    samples = samples_of(tmp_path)
    # Paid alike with a space and without: which of the two wins is up to the last bits.
    replies = {(sample["task"], sample["reply"]) for sample in samples}
    assert replies in ({("math", "Answer: 7")}, {("math", "Answer:7")})


@pytest.mark.parametrize(
    "changes",
    [
        {"refills": 1, "epochs": 2},
        {"lora": {"rank": 4}, "loss": {"loss_type": "grpo", "kl_coefficient": 0.1}},
    ],
    ids=["dapo", "lora with kl"],
)
def test_resuming_repeats_the_run_bit_for_bit(
    start: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    train(start, tmp_path / "straight", **changes)
    loop = {"log_every": 1, "save_every": 1, "keep": 9}
    train(start, tmp_path / "resumed", loop=loop, **changes)
    for state in (tmp_path / "resumed/state").glob("step-*"):
        if state.name > "step-00000002":
            shutil.rmtree(state)
    train(start, tmp_path / "resumed", loop=loop, **changes)
    a, b = (load_model(tmp_path / name / "model") for name in ("straight", "resumed"))
    before = load_model(start)
    for (name, one), other, first in zip(
        a.named_parameters(), b.parameters(), before.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
        assert "qkv" not in name or not torch.equal(one, first), name
    for one, other in zip(log_of(tmp_path / "straight"), log_of(tmp_path / "resumed"), strict=True):
        timeless = {key for key in one if "seconds" not in key}
        assert {key: one[key] for key in timeless} == {key: other[key] for key in timeless}
    if "lora" in changes:
        kl = [line["rl/kl"] for line in log_of(tmp_path / "straight")]
        assert kl[0] == pytest.approx(0.0, abs=1e-4)
        assert kl[-1] > 1e-4


def test_rollouts_in_another_precision_are_corrected(start: Path, tmp_path: Path) -> None:
    train(start, tmp_path, steps=2, rollout_precision="bf16")
    assert all(1e-5 < line["rl/sampling_difference"] < 0.1 for line in log_of(tmp_path))


def test_a_time_budget_goes_into_training(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "plan_rl_steps", lambda *_: 2)
    metrics = train(start, tmp_path, steps=None, minutes=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]  # no held-out measurement in between
    assert set(metrics["math"]) == {"before", "after", "low", "high", "n"}


def test_a_game_of_several_turns_trains_through_the_stage(start: Path, tmp_path: Path) -> None:
    metrics = train(
        start, tmp_path, data={}, env="wordle", environment={"reward": {"correct": 1, "format": 0.5}},
        steps=1, prompts_per_step=2, group_size=2, sequence_length=128, max_tokens=8,
    )  # fmt: skip
    assert metrics["wordle_win"]["after"] == 0
    assert metrics["wordle_solver"]["after"] >= metrics["wordle_random"]["after"] > 0.9
    assert {"rl/reward/correct", "rl/reward/greens", "rl/reward/format"} <= set(log_of(tmp_path)[0])


@contextmanager
def served(*words: str) -> Iterator[str]:
    """Serve an environment by the command line, in a process of its own, and yield its address."""
    call = [sys.executable, "-m", "nurture", "env", "serve", *words, "--port", "0"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        try:
            yield re.search(r"http://[\d.:]+", said)[0]  # type: ignore[index]
        finally:
            server.terminate()


def test_the_command_trains_on_problems_that_a_server_puts(start: Path, tmp_path: Path) -> None:
    """The model is right once in eight times: what is paid, won and asked comes from the server's own rows."""
    pytest.importorskip("starlette", reason="the server needs the extra `openenv`")
    with served("math", "--data", str(start / "rows.jsonl"), "--split", "all") as address:
        metrics = remotely(address, start, tmp_path)
    (line,) = log_of(tmp_path / "01-grpo")
    assert 0 < line["rl/reward_mean"] == line["rl/won"] == line["rl/reward/correct"] < 1
    assert line["rl/grad_norm"] > 0
    assert metrics["openenv_reward"]["after"] == metrics["openenv_win"]["after"]
    assert {sample["prompt"] for sample in samples_of(tmp_path / "01-grpo")} <= {
        asked(word, 0)[0]["content"] for word in WORDS
    }


def test_the_command_trains_on_a_game_that_a_server_plays(start: Path, tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="the server needs the extra `openenv`")
    with served("wordle", "reward={correct: 1, format: 0.5, repeats: 0.1}") as address:
        metrics = remotely(address, start, tmp_path, "heldout_env=wordle")
    (line,) = log_of(tmp_path / "01-grpo")
    assert {"rl/reward/greens", "rl/reward/format"} <= set(line)
    assert line["rl/turns"] > 1  # a second invalid word in a row ends the game
    assert metrics["wordle_win"]["after"] == 0  # measured at home, on secrets that the server does not put


def remotely(address: str, start: Path, out: Path, *more: str) -> dict[str, dict[str, float]]:
    """Take one step through the command line and return what was measured."""
    words = ["grpo", "--model", str(start), "--env", f"openenv:{address}", "--out", str(out), "steps=1"]
    sizes = "prompts_per_step=4 group_size=8 heldout_prompts=8 max_tokens=8 sequence_length=256".split()
    done = CliRunner().invoke(app, [*words, *sizes, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads((out / "01-grpo/result.json").read_text())["metrics"]


def test_it_says_what_is_missing(start: Path, tmp_path: Path) -> None:
    with pytest.raises(NurtureError, match="env 'auto' needs data"):
        train(start, tmp_path, data={})
    with pytest.raises(NurtureError, match="GRPO needs a model"):
        grpo.run(settings(), StageContext(directory=tmp_path))
