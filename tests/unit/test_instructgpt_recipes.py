"""InstructGPT's recipe and the reward model on real preferences: their scale, shapes and data, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nurture.data.sources import split_spec
from nurture.model.config import PRESETS
from nurture.model.transformer import Transformer
from nurture.stages.recipe import Recipe, data_specs, load_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe, with a folder that looks like the base model."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return load_recipe("instructgpt", [f"sft.start={folder}"])


def stage(recipe: Recipe, name: str) -> Any:
    return next(config for config in recipe.stages if config.name == name)


def test_what_starts_from_what(recipe: Recipe) -> None:
    assert [config.name for config in recipe.stages] == ["sft", "reward", "ppo"]
    assert (recipe.starts["reward"], recipe.starts["ppo"]) == ("sft", "sft")
    assert recipe.models["ppo"] == {"reward": "reward"}


def test_ten_thousand_a_hundred_thousand_a_hundred_thousand(recipe: Recipe) -> None:
    reward, ppo = stage(recipe, "reward"), stage(recipe, "ppo")
    assert reward.comparisons * len(reward.data) == 100_000
    assert ppo.prompts == 100_000
    assert ppo.steps * ppo.prompts_per_step * ppo.group_size == 256_000
    assert ppo.prompts_per_step // ppo.batch_size == 8


def test_hyperparameters_are_the_papers(recipe: Recipe) -> None:
    sft, reward, ppo = recipe.stages
    assert (sft.optimizer.learning_rate, sft.batch_size, sft.epochs) == (9.65e-6, 32, 16)
    assert (reward.optimizer.learning_rate, reward.epochs, reward.ties) == (9e-6, 1, "drop")
    assert (ppo.kl.coefficient, ppo.discount, ppo.ptx.coefficient) == (0.02, 1.0, 27.8)
    assert (ppo.loss.clip_low, ppo.loss.clip_high, ppo.value_optimizer.learning_rate) == (0.2, 0.2, 9e-6)
    assert ppo.loop.average == 0.992
    for config in (sft, reward):
        assert (config.schedule.kind, config.schedule.final, config.schedule.warmup) == ("cosine", 0.1, 0)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_the_model_is_a_real_one(recipe: Recipe, head: Any) -> None:
    shape = PRESETS["smollm3-3b"]
    with torch.device("meta"):
        model = Transformer(shape, head)
        assert model(torch.zeros(1, 8, dtype=torch.int64)).shape[:2] == (1, 8)
    assert sum(p.numel() for p in model.parameters()) == 3_075_098_624 + (
        shape.width if head == "scalar" else 0
    )
    assert all(config.sequence_length <= shape.max_position for config in recipe.stages)


def test_data_are_hub_sets_by_name(recipe: Recipe) -> None:
    specs = [spec for config in recipe.stages for _, spec in data_specs(config)]
    assert set(recipe.stages[2].ptx.sources.values()) <= set(specs)
    for spec in specs:
        assert all(part.startswith("hf:") and part.count("/") == 1 for part in split_spec(spec))


def test_the_reward_model_on_real_preferences(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tmp_path / "smollm2.gguf"
    model.touch()
    monkeypatch.setenv("NURTURE_DATA", str(shared_data))
    monkeypatch.setenv("NURTURE_SMOLLM2", str(model))
    (config,) = load_recipe("reward-smollm2").stages
    assert list(config.data) == ["hh", "oasst", "pandalm"]
    assert config.lora is not None
    assert config.lora.layers == 8
