"""The shape of a model, and how many parameters that shape has.

Every stage after pretraining reads its shape from a checkpoint (`hugging_face.py`); a recipe states it once. The
shape says nothing about training. Presets hold the published models.

Source: SmolLM2 and SmolLM3 model configurations; Llama (arXiv 2302.13971); Qwen3 (arXiv 2505.09388).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nurture.recipe import Section

Family = Literal["llama", "smollm3", "qwen3"]

# Not validated: `_fill_in` replaces it, and where it cannot, an earlier field is reported already.
_FILLED_IN: Any = Field(default=None, validate_default=False)


class YarnConfig(Section):
    """YaRN: reach past the trained length by slowing the slow rotations (arXiv 2309.00071)."""

    factor: float = Field(ge=1.0)
    """How many times `original_max_position` the model shall reach."""
    original_max_position: PositiveInt
    """Trained length in tokens."""
    beta_fast: PositiveFloat = 32.0
    """Dimensions that turn at least this often within the trained length are left alone."""
    beta_slow: PositiveFloat = 1.0
    """Dimensions that turn at most this often are slowed by the whole `factor`."""
    attention_factor: float | None = None
    """Scale on cos and sin; by default 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _check(self) -> YarnConfig:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"yarn.beta_fast ({self.beta_fast}) must be above yarn.beta_slow ({self.beta_slow})"
            )
        return self


class ModelConfig(Section):
    """The shape of a decoder."""

    family: Family = "llama"
    """Checkpoint layout, and what the layers may contain."""
    vocab_size: PositiveInt
    """Number of tokens in the tokenizer (V)."""
    width: PositiveInt = 256
    """Model width (D)."""
    layers: PositiveInt = 6
    """Number of blocks."""
    heads: PositiveInt = 4
    """Query heads (N)."""
    kv_heads: PositiveInt = _FILLED_IN
    """Key/value heads (K), a divisor of `heads`; default: as many as `heads`."""
    head_width: PositiveInt = _FILLED_IN
    """Width of one head (H), even; default: width / heads."""
    ffn_width: PositiveInt = _FILLED_IN
    """Width inside the feed-forward (F); default: 8/3 of the width, rounded up to a multiple of 64."""
    max_position: PositiveInt = 2048
    """Longest sequence the model is meant for, in tokens."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotation frequencies."""
    yarn: YarnConfig | None = None
    """Stretched rotations for sequences past the trained length."""
    nope_every: PositiveInt | None = None
    """Layer i has no rotation where (i + 1) % nope_every == 0 (smollm3 only, there 4 by default)."""
    qk_norm: bool = False
    """Normalise each query and key head (exactly in qwen3)."""
    tied_embeddings: bool = True
    """Use the embedding matrix as the output matrix as well."""
    norm_epsilon: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of fresh matrices; those that write to the residual stream have it / sqrt(2 layers)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Set what follows from other fields: by the width and heads, and by what the family fixes."""
        if not isinstance(data, dict):
            return data
        filled = {"width": 256, "heads": 4, **data}
        width, heads = filled["width"], filled["heads"]
        if isinstance(heads, int):
            filled.setdefault("kv_heads", heads)
        if isinstance(width, int):
            filled.setdefault("ffn_width", -(-width * 8 // (3 * 64)) * 64)
        if isinstance(width, int) and isinstance(heads, int) and heads > 0 and "head_width" not in filled:
            if width % heads:
                raise ValueError(f"width ({width}) must be a multiple of heads ({heads}), or give head_width")
            filled["head_width"] = width // heads
        if filled.get("family") == "smollm3":
            filled.setdefault("nope_every", 4)
        if filled.get("family") == "qwen3":
            filled.setdefault("qk_norm", True)
        return filled

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_width % 2:
            raise ValueError(
                f"head_width ({self.head_width}) must be even: a rotation turns pairs of numbers"
            )
        if self.nope_every is not None and self.family != "smollm3":
            raise ValueError(f"nope_every needs family 'smollm3', got family '{self.family}'")
        if self.qk_norm != (self.family == "qwen3"):
            raise ValueError(
                f"qk_norm is {self.qk_norm}, but family '{self.family}' fixes it: qwen3 has it, others not"
            )
        return self

    def rotates(self, layer: int) -> bool:
        """Say whether block `layer` (from 0) rotates its queries and keys."""
        return self.nope_every is None or (layer + 1) % self.nope_every != 0

    def parameter_count(self) -> int:
        """Return the exact number of parameters of the language model; a tied matrix counts once."""
        attention = self.width * self.head_width * 2 * (self.heads + self.kv_heads)
        norms = 2 * self.width + (2 * self.head_width if self.qk_norm else 0)
        block = attention + 3 * self.width * self.ffn_width + norms
        embeddings = self.vocab_size * self.width * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * block + self.width


_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "rope_theta": 100_000.0,
    "max_position": 8192,
    "norm_epsilon": 1e-5,
}

PRESETS: dict[str, ModelConfig] = {
    "smollm2-135m": ModelConfig(
        **_SMOLLM2, width=576, layers=30, heads=9, kv_heads=3, ffn_width=1536, init_std=0.041666666666666664
    ),
    "smollm2-360m": ModelConfig(**_SMOLLM2, width=960, layers=32, heads=15, kv_heads=5, ffn_width=2560),
    "smollm3-3b": ModelConfig(
        family="smollm3",
        vocab_size=128_256,
        width=2048,
        layers=36,
        heads=16,
        kv_heads=4,
        ffn_width=11_008,
        max_position=65_536,
        rope_theta=5_000_000.0,
    ),
    "qwen3-0.6b": ModelConfig(
        family="qwen3",
        vocab_size=151_936,
        width=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        head_width=128,
        ffn_width=3072,
        max_position=40_960,
        rope_theta=1_000_000.0,
    ),
}
