from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from nurture.model.config import PRESETS, ModelConfig, YarnConfig
from nurture.model.transformer import Transformer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm3-3b", 3_075_098_624),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    assert PRESETS[name].parameter_count() == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_the_models(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].parameter_count()


def test_smollm3_has_nine_layers_without_rotation() -> None:
    config = PRESETS["smollm3-3b"]
    assert [i for i in range(36) if not config.rotates(i)] == list(range(3, 36, 4))


def test_derived_fields() -> None:
    config = ModelConfig(vocab_size=100, width=96, heads=6)
    assert (config.kv_heads, config.head_width, config.ffn_width) == (6, 16, 256)
    assert ModelConfig(family="qwen3", vocab_size=100).qk_norm
    assert ModelConfig(family="smollm3", vocab_size=100).nope_every == 4
    assert ModelConfig(family="smollm3", vocab_size=100, nope_every=None).nope_every is None
    assert ModelConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"width": 10, "heads": 3}, r"width \(10\) must be a multiple of heads \(3\)"),
        ({"width": 12, "heads": 4}, r"head_width \(3\) must be even"),
        ({"nope_every": 4}, "nope_every needs family 'smollm3'"),
        ({"family": "qwen3", "qk_norm": False}, "qk_norm is False"),
        ({"family": "gpt2"}, "'llama', 'smollm3' or 'qwen3'"),
        ({"layers": 0}, "greater than 0"),
        ({"widht": 3}, "Extra inputs"),
    ],
)
def test_impossible_shapes_are_refused(shape: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(vocab_size=100, **shape)


def test_yarn_bounds_are_checked() -> None:
    with pytest.raises(ValidationError, match="beta_fast"):
        YarnConfig(factor=2.0, original_max_position=64, beta_fast=1.0, beta_slow=2.0)
