"""Rotary position: turn pairs of query and key numbers by an angle proportional to the position.

The attention score of two tokens then depends on their distance alone. Number h of a head is paired with number
h + H/2 (the half-split convention of Hugging Face checkpoints; llama.cpp pairs neighbours, see `gguf.py`). Angles are
always float32: in bfloat16 positions above 256 would collide.

Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nurture.model.config import ModelConfig, YarnConfig


def rotation_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return the angle per position of every pair, and the scale of cos and sin.

    Returns:
        ((H/2,) float32 on the CPU in radians per position, fastest first; scale, 1.0 without YaRN).
    """
    pair_indices = torch.arange(0, config.head_width, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (pair_indices / config.head_width)
    if config.yarn is None:
        return frequencies, 1.0
    scale = config.yarn.attention_factor
    if scale is None:
        scale = 0.1 * math.log(config.yarn.factor) + 1.0
    return _stretch(frequencies, config.yarn, config.rope_theta, config.head_width), scale


def _stretch(frequencies: Tensor, yarn: YarnConfig, theta: float, head_width: int) -> Tensor:
    """Slow the pairs that never finish a turn in the trained length; blend linearly up to those that turn often."""

    def pair_turning(turns: float) -> float:
        """Index (real-valued) of the pair that makes `turns` turns within the trained length."""
        return (
            head_width * math.log(yarn.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), head_width - 1)
    indices = torch.arange(head_width // 2, dtype=torch.float32, device="cpu")
    span = high - low or 1e-3  # never 0; transformers' own value, so that exported models compute the same
    slowed_share = ((indices - low) / span).clamp(0, 1)
    return frequencies / yarn.factor * slowed_share + frequencies * (1 - slowed_share)


def rotation_tables(position_ids: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position's angles.

    Args:
        position_ids: (..., T) integers.
        frequencies: (H/2,) float32.
        scale: factor on both tables (YaRN's attention factor).

    Returns:
        Two tensors (..., T, H/2) float32.
    """
    angles = position_ids[..., None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def head_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Lay tables (B or 1, T, H/2) out for `rotate`: (cos, cos) and (-sin, sin), each (B or 1, T, 1, H)."""
    return torch.cat((cos, cos), dim=-1).unsqueeze(-2), torch.cat((-sin, sin), dim=-1).unsqueeze(-2)


def rotate(heads_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head of `heads_BTNH` by the angles of the `head_tables`. Keeps the dtype."""
    cos, sin = cos.to(heads_BTNH.dtype), sin.to(heads_BTNH.dtype)
    # The partner of every number is half a head away. A roll would do, but compiled its gradient is read by single
    # numbers, and by whole registers from halves.
    low, high = heads_BTNH.chunk(2, dim=-1)
    partners = torch.cat((high, low), dim=-1)
    return torch.addcmul(heads_BTNH * cos, partners, sin)
