"""The merge stage: what it writes, which share it picks, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from nurture.errors import NurtureError
from nurture.evals.measure import Measure
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model
from nurture.model.transformer import Transformer
from nurture.stages import merge
from nurture.stages.context import StageContext
from nurture.stages.training import save_result_model
from nurture.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train(["the fox lives in the forest and eats mice"] * 3, 280)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, max_position=256
    )
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        save_result_model(Transformer(shape), tokenizer, folder / name, answers=True)
    return {name: folder / name / "model" for name in "abc"} | {"folder": folder}


def run(paths: dict[str, Path], directory: Path, **settings: object) -> dict:
    directory.mkdir()
    others = {name: path for name, path in paths.items() if name != "folder"}
    context = StageContext(
        directory, start=paths["a"], base=paths["folder"], cache=directory.parent / "cache", models=others
    )
    config = merge.Config.model_validate({"name": "merge", "models": ["b"], **settings})
    merge.run(config, context)
    return json.loads((directory / "result.json").read_text())


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"share": 0.75}, [0.75, 0.25]),
        ({"models": ["b", "c"], "weights": [1, 1, 2]}, [1, 1, 2]),
    ],
)
def test_the_result_is_the_weighted_mean(
    models, tmp_path: Path, settings: dict, weights: list[float]
) -> None:
    result = run(models, tmp_path / "stage", **settings)
    assert list(result["weights"].values()) == weights
    merged = load_model(tmp_path / "stage/model")
    parts = [load_model(models[name]) for name in "abc"[: len(weights)]]
    for parameters in zip(merged.parameters(), *(m.parameters() for m in parts), strict=True):
        mean = sum(w * p for w, p in zip(weights, parameters[1:], strict=True)) / sum(weights)
        torch.testing.assert_close(parameters[0], mean)
    assert Tokenizer.load(tmp_path / "stage/model").chat_template is not None


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_methods_with_a_base_give_the_base_back_where_nothing_changed(
    models, tmp_path: Path, method: str
) -> None:
    settings = {"method": method, "base": "a", "weights": [1.0, 0.0], "density": 0.5}
    run(models, tmp_path / "stage", **settings)
    for ours, base in zip(
        load_model(tmp_path / "stage/model").parameters(), load_model(models["a"]).parameters(), strict=True
    ):
        torch.testing.assert_close(ours, base)


def test_what_training_cost_stands_beside_what_merging_gave_back(models, tmp_path: Path) -> None:
    result = run(models, tmp_path / "stage", compare=["c"], lengths=[40, 80], share=1.0)
    assert {"passkey/40", "passkey/80"} <= set(result["metrics"])
    assert [line["model"] for line in result["table"]] == ["c", "start", "merged"]
    assert result["table"][1]["passkey/40"] == result["table"][2]["passkey/40"]


def test_everything_is_measured_before_and_after(models, tmp_path: Path) -> None:
    result = run(
        models,
        tmp_path / "stage",
        prompts="world:tasks:fact,redteam",
        prompt_count=3,
        reply_tokens=6,
        data={"t": "world:web"},
        heldout_tokens=600,
    )
    metrics = result["metrics"]
    assert {"gold_reward", "gold_win_rate", "facts", "harm", "cloze", "bpb/t", "stopped"} <= set(metrics)
    assert metrics["bpb/t"]["before"] > 0
    assert metrics["gold_win_rate"]["n"] == 6


def test_a_sweep_takes_the_best_share_and_keeps_the_table(
    models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measures(self, model: Transformer, first: int = 0) -> dict[str, Measure]:
        asked.append(first)
        # Best where the first weight is that of 0.6 a + 0.4 b.
        a, b, c = (
            m.embedding.weight[0, 0].item() for m in (load_model(models["a"]), load_model(models["b"]), model)
        )
        share = (c - b) / (a - b)
        return {"gold_reward": Measure(-abs(share - 0.6), 10)}

    monkeypatch.setattr(merge._Exam, "measures", measures)
    result = run(models, tmp_path / "stage", sweep=[0.2, 0.6, 0.8], prompts="world:tasks:fact")
    assert result["weights"] == {"start": 0.6, "b": pytest.approx(0.4)}
    assert [line["share"] for line in result["sweep"]] == [1.0, 0.8, 0.6, 0.2]
    assert [line["score"] for line in result["sweep"]] == pytest.approx([-0.4, -0.2, 0.0, -0.4], abs=1e-3)
    # Chosen on other prompts than it is measured on.
    assert asked == [0, 5000, 5000, 5000, 5000, 0]


def test_a_score_that_is_not_measured_is_named(models, tmp_path: Path) -> None:
    settings = {"sweep": [0.5], "score": ["passkey/8x"], "prompts": "world:tasks:fact", "prompt_count": 1}
    with pytest.raises(NurtureError, match=r"score names 'passkey/8x'.*gold_reward"):
        run(models, tmp_path / "stage", reply_tokens=4, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ["b", "c"], "method": "slerp"}, "slerp merges the start with one model"),
        ({"method": "ties"}, "base is needed"),
        ({"base": "c"}, "base is needed by ties and dare"),
        ({"weights": [1]}, "1 numbers for 2 models"),
        ({"sweep": [0.5]}, "needs something to be scored on"),
        ({"share": 1.5}, "less than or equal to 1"),
    ],
)
def test_mistakes_in_the_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        merge.Config.model_validate({"name": "merge", "models": ["b"], **settings})
