"""The reward stage from ranked rows to a reward model: what it learns, its zero, and that a kill does not show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nurture.losses.reward import RewardLoss
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model
from nurture.model.transformer import Transformer
from nurture.rewards.learned import load_reward_model, score_replies
from nurture.stages import reward
from nurture.stages.context import StageContext
from nurture.stages.training import save_result_model
from nurture.tokenizer import Tokenizer

COLOURS = "red green blue black white grey brown pink".split()
QUESTIONS = [(a, b) for a in COLOURS for b in COLOURS]


def pairs() -> list[dict]:
    """Whatever is asked, "Yes" is better than "No"; the longer answer is the worse one half of the time."""
    return [
        {
            "prompt": f"Is {a} like {b}?",
            "chosen": f"Yes, {a} it is.",
            "rejected": f"No, {b} it is not at all." if a < b else "No.",
        }
        for a, b in QUESTIONS
    ]


def rankings() -> list[dict]:
    """Two that say yes are equally good."""
    return [
        {
            "prompt": f"Hello there, hello, hello! Are {a} and {b} colours?",
            "responses": ["No, they are not.", f"Yes, {a} is.", "Yes, both are."],
            "ranking": "B = C > A",
        }
        for a, b in QUESTIONS
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    texts = []
    for name, rows in (("pairs", pairs()), ("rankings", rankings())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts += [str(value) for row in rows for value in row.values()]
    tokenizer = Tokenizer.train(texts, 320)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, kv_heads=1, max_position=256
    )
    save_result_model(Transformer(shape), tokenizer, folder, answers=True)
    return folder


def train(start: Path, directory: Path, **changes: object) -> dict:
    settings = {
        "name": "reward",
        "data": {"pairs": "pairs.jsonl", "rankings": "rankings.jsonl"},
        "steps": 25,
        "batch_size": 4,
        "sequence_length": 128,
        "heldout_every": 5,
        "prompt_tokens": 8,
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
        "loop": {"log_every": 1, "save_every": 2, "evaluate_every": 100},
        "execution": {"precision": "fp32", "compile": "off"},
    }
    directory.mkdir(parents=True, exist_ok=True)
    context = StageContext(directory, start=start / "model", base=start, cache=directory.parent / "cache")
    reward.run(reward.Config.model_validate({**settings, **changes}), context)
    return json.loads((directory / "result.json").read_text())


@pytest.mark.parametrize("lora", [None, {"rank": 4, "layers": 1}])
def test_a_planted_preference_is_learned(start: Path, tmp_path: Path, lora: dict | None) -> None:
    rate = {"learning_rate": 1e-2 if lora else 3e-3, "weight_decay": 0.0}
    metrics = train(start, tmp_path / "stage", lora=lora, optimizer=rate, steps=40)["metrics"]
    for name in ("pair_accuracy", "pair_accuracy/pairs", "pair_accuracy/rankings"):
        assert metrics[name]["before"] == 0.5  # a fresh head is indifferent
        assert metrics[name]["after"] >= 0.95
    assert metrics["tie_accuracy"]["after"] >= 0.9
    model = load_reward_model(tmp_path / "stage/model")
    asked = [[{"role": "user", "content": f"Is {a} like {b}?"}] for a, b in QUESTIONS]
    good = score_replies(model, asked, [f"Yes, {a} it is." for a, _ in QUESTIONS])
    bad = score_replies(model, asked, ["No."] * len(asked))
    assert (good > bad).float().mean() >= 0.95
    assert good.mean().abs() < 0.5 * (good - bad).mean()  # demonstrations, on average, earn nothing


def test_pairs_without_a_single_tie_need_no_model_of_ties(start: Path, tmp_path: Path) -> None:
    """Most preference data is like this: chosen and rejected, nothing else."""
    result = train(start, tmp_path / "stage", data={"pairs": "pairs.jsonl"}, steps=2)
    assert result["reward_scale"]["tie_threshold"] == 0
    assert 0 <= result["metrics"]["calibration_error"]["after"] <= 1


def test_a_killed_stage_ends_with_the_same_weights(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(start, tmp_path / "whole", steps=6)
    calls, compute = [0], RewardLoss.__call__

    def killed(self, model, batch):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return compute(self, model, batch)

    monkeypatch.setattr(RewardLoss, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        train(start, tmp_path / "killed", steps=6)
    train(start, tmp_path / "killed", steps=6)
    assert calls[0] == 4 + 4  # killed in the fourth update, saved after the second
    lines = [json.loads(line) for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 7))
    expected = dict(load_model(tmp_path / "whole/model", head="scalar").named_parameters())
    for name, tensor in load_model(tmp_path / "killed/model", head="scalar").named_parameters():
        assert torch.equal(tensor, expected[name]), name
