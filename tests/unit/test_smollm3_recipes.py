"""The published recipe: its numbers, its mixtures, and a model of the right size, without downloading anything."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.stages.recipe import Recipe, load_recipe

CATEGORIES = {
    "web": r"fineweb-edu|dclm|pes2o|wikipedia|cosmopedia",
    "multilingual": r"fw2-\w+|multilingual-wiki",
    "code": r"(sv2|edu)-.*|pull-requests|kaggle|jupyter|issues",
    "math": r"(infiweb|fine)math(-4plus)?|megamath-.*|openmathinstruct|tiny-gsm-.*|dolmino-.*",
    "stackexchange": "stackexchange",
}
"""SmolLM3's table of its mixtures; what is named nowhere here is reasoning and instructions."""
PUBLISHED = [  # web, multilingual, code, math, stackexchange, reasoning
    (0.724, 0.120, 0.125, 0.027, 0.004, 0.0),
    (0.647, 0.117, 0.14325, 0.0908, 0.002, 0.0),
    (0.5062, 0.13205, 0.2333, 0.1266, 0.001, 0.0065),
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("smollm3-3b")


def stage(recipe: Recipe, name: str) -> Any:
    return next(config for config in recipe.stages if config.name == name)


def sums(weights: dict[str, float]) -> dict[str, float]:
    found = dict.fromkeys((*CATEGORIES, "reasoning"), 0.0)
    for source, weight in weights.items():
        place = [name for name, pattern in CATEGORIES.items() if re.fullmatch(pattern, source)]
        found[place[0] if place else "reasoning"] += weight
    return found


def test_the_model_is_the_published_one(recipe: Recipe) -> None:
    shape = ModelConfig.model_validate({**(recipe.model or {}), "vocab_size": recipe.tokenizer["vocab_size"]})
    with torch.device("meta"):
        model = Transformer(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_075_098_624
    assert (shape.max_position, shape.rope_theta) == (4096, 50_000)


def test_eleven_trillion_tokens_in_three_stages(recipe: Recipe) -> None:
    pretrain = stage(recipe, "pretrain")
    assert pretrain.steps * pretrain.batch_size * pretrain.sequence_length == pytest.approx(
        11.14e12, rel=1e-3
    )
    bounds = [round(phase.until * pretrain.steps) for phase in pretrain.phases]
    assert bounds == pytest.approx([3_450_000, 4_198_000, 4_720_000], abs=5)
    assert pretrain.schedule.decay * pretrain.steps == pytest.approx(522_000, rel=1e-3)
    assert (pretrain.schedule.kind, pretrain.schedule.warmup_steps) == ("wsd", 2000)
    assert (pretrain.schedule.decay_shape, pretrain.schedule.final) == ("linear", 0.0)
    assert {source for phase in pretrain.phases for source in phase.weights} == set(pretrain.sources)


@pytest.mark.parametrize("phase", range(3))
def test_mixtures_add_up_as_published(recipe: Recipe, phase: int) -> None:
    found = sums(stage(recipe, "pretrain").phases[phase].weights)
    assert list(found.values()) == pytest.approx(PUBLISHED[phase], abs=1e-6)


@pytest.mark.parametrize(("name", "rate"), [("pretrain", 2e-4), ("extend-32k", 2e-5), ("extend-64k", 2e-5)])
def test_the_optimizer_of_pretraining_and_extending(recipe: Recipe, name: str, rate: float) -> None:
    adam = stage(recipe, name).optimizer
    assert (adam.kind, adam.learning_rate, adam.beta1, adam.beta2) == ("adamw", rate, 0.9, 0.95)
    assert (adam.epsilon, adam.weight_decay, adam.clip_norm) == (1e-8, 0.1, 1.0)


def test_context_is_extended_twice(recipe: Recipe) -> None:
    for name, length, theta, steps in (
        ("extend-32k", 32_768, 2e6, 20_000),
        ("extend-64k", 65_536, 5e6, 22_000),
    ):
        config = stage(recipe, name)
        assert (config.sequence_length, config.rope_theta, config.steps) == (length, theta, steps)
        assert config.batch_size * length == 2_359_296
        rate = config.schedule
        assert (rate.kind, rate.warmup_steps, rate.final) == ("cosine", 1000, 0.0)
        (phase,) = config.phases
        assert sum(phase.weights.values()) == pytest.approx(1.0, abs=1e-6)
        assert set(phase.weights) == set(config.sources)
        assert config.yarn is None  # for the finished model: mid-training, SFT and APO are without


def test_post_training_is_as_published(recipe: Recipe) -> None:
    reason, sft, apo, merge = (stage(recipe, name) for name in ("reason", "sft", "apo", "merge"))
    assert (reason.loss_on, reason.sequence_length) == ("all", 32_768)
    assert (sft.loss_on, sft.sequence_length, len(sft.data)) == ("assistant", 65_536, 25)
    assert sft.chat_template == "chatml_think"
    assert sum(spec.endswith("_think") and not spec.endswith("no_think") for spec in sft.data.values()) == 10
    assert sft.shares["openthoughts3-1-2m-think"] == 0.02
    for config in (reason, sft):
        assert config.optimizer.learning_rate == 2e-5
        assert (config.batch_size, config.epochs, config.seed) == (128, 5, 42)
        assert config.schedule.warmup == 0.03
    for config in (reason, sft, apo):
        assert (config.schedule.kind, config.schedule.final) == ("cosine", 0.1)
        rest = config.optimizer
        assert (rest.beta1, rest.beta2, rest.weight_decay, rest.clip_norm) == (0.9, 0.999, 0.0, 0.2)
    assert (apo.loss, apo.beta, apo.optimizer.learning_rate) == ("apo_zero", 0.05, 1e-6)
    assert apo.shares == {"tulu": 0.5, "qwen": 0.25}
    assert (apo.answer_tokens, apo.sequence_length, apo.epochs) == (24_576, 2 * 24_576, 1)
    assert apo.schedule.warmup == 0.1
    assert (merge.models, merge.share) == (["reason"], 0.9)
    assert recipe.starts["merge"] == "apo"
    # What was lost and what came back is measured as far as the base was trained.
    assert merge.lengths == [stage(recipe, name).sequence_length for name in ("extend-32k", "extend-64k")]
    assert merge.compare == ["extend-64k", "sft"]
