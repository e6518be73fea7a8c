"""Rotation frequencies and rotated heads against transformers."""

from __future__ import annotations

import pytest
import torch

from nurture.model.config import ModelConfig, YarnConfig
from nurture.model.rope import head_tables, rotate, rotation_frequencies, rotation_tables

pytest.importorskip("transformers")
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)


def ours(theta: float, head_width: int = 64, yarn: YarnConfig | None = None) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, width=4 * head_width, heads=4, head_width=head_width, rope_theta=theta, yarn=yarn
    )


def theirs(theta: float, head_width: int = 64, **scaling: object) -> LlamaConfig:
    parameters = {"rope_type": "default", "rope_theta": theta, **scaling}
    return LlamaConfig(
        hidden_size=4 * head_width, num_attention_heads=4, head_dim=head_width, rope_parameters=parameters
    )


@pytest.mark.parametrize("theta", [10_000.0, 50_000.0, 1_500_000.0, 5_000_000.0])
@pytest.mark.parametrize("head_width", [16, 64, 128])
def test_frequencies_equal_transformers(theta: float, head_width: int) -> None:
    frequencies, scale = rotation_frequencies(ours(theta, head_width))
    expected = LlamaRotaryEmbedding(theirs(theta, head_width)).inv_freq
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scale == 1.0


@pytest.mark.parametrize(
    ("theta", "head_width", "yarn"),
    [
        (5_000_000.0, 128, YarnConfig(factor=2.0, original_max_position=65_536)),
        (5_000_000.0, 128, YarnConfig(factor=4.0, original_max_position=65_536)),
        (10_000.0, 32, YarnConfig(factor=16.0, original_max_position=256)),
        (10_000.0, 32, YarnConfig(factor=8.0, original_max_position=128, beta_fast=8.0, beta_slow=2.0)),
        (10_000.0, 32, YarnConfig(factor=8.0, original_max_position=128, attention_factor=1.3)),
        (10_000.0, 8, YarnConfig(factor=2.0, original_max_position=4)),
        (100.0, 8, YarnConfig(factor=1.0, original_max_position=100_000)),
    ],
)
def test_yarn_equals_transformers(theta: float, head_width: int, yarn: YarnConfig) -> None:
    config = theirs(
        theta,
        head_width,
        rope_type="yarn",
        factor=yarn.factor,
        original_max_position_embeddings=yarn.original_max_position,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
        attention_factor=yarn.attention_factor,
    )
    expected, expected_scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    frequencies, scale = rotation_frequencies(ours(theta, head_width, yarn))
    torch.testing.assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert scale == pytest.approx(expected_scale, rel=1e-9)


def test_yarn_changes_slow_pairs_only() -> None:
    plain, _ = rotation_frequencies(ours(10_000.0))
    stretched, _ = rotation_frequencies(
        ours(10_000.0, yarn=YarnConfig(factor=8.0, original_max_position=1024))
    )
    torch.testing.assert_close(stretched[0], plain[0])
    torch.testing.assert_close(stretched[-1], plain[-1] / 8)


def test_rotation_equals_transformers() -> None:
    torch.manual_seed(0)
    q_BTNH, k_BTKH = torch.randn(2, 9, 4, 64), torch.randn(2, 9, 2, 64)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [7, 8, 9, 100, 101, 5000, 1, 0, 2]])
    frequencies, scale = rotation_frequencies(ours(10_000.0))
    cos, sin = head_tables(*rotation_tables(position_ids, frequencies, scale))
    their_cos, their_sin = LlamaRotaryEmbedding(theirs(10_000.0))(q_BTNH, position_ids)
    expected_q, expected_k = apply_rotary_pos_emb(q_BTNH, k_BTKH, their_cos, their_sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(q_BTNH, cos, sin), expected_q, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(rotate(k_BTKH, cos, sin), expected_k, rtol=1e-5, atol=2e-6)
