"""The decoder: embedding, blocks of attention and feed-forward, a head.

Pre-norm residual blocks with RMSNorm, grouped-query attention with rotary position, SwiGLU. What differs between the
Llama, SmolLM3 and Qwen3 families is a field of `ModelConfig`, not a class. The matrices that read the same input are
one parameter (`qkv`, `gate_up`): fewer, larger multiplications; `hugging_face.py` splits them for checkpoints. dtype,
compilation and sharding are applied from outside; float32 without autocast is the reference.

Source: Llama (arXiv 2302.13971), GQA (arXiv 2305.13245), SwiGLU (arXiv 2002.05202), RMSNorm (arXiv 1910.07467),
NoPE (arXiv 2501.18795).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nurture.model.attention import attention, document_mask, document_starts
from nurture.model.config import ModelConfig
from nurture.model.heads import (
    by_columns,
    cross_entropy_sum,
    label_logprobs,
    label_logprobs_and_entropies,
    likeliest_tokens,
    lm_logits,
    scalar_values,
)
from nurture.model.lora import AdaptableLinear
from nurture.model.rope import head_tables, rotate, rotation_frequencies, rotation_tables

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Documents: TypeAlias = "Tensor | BlockMask | None"
"""What a block is given of documents: where they start or, on a GPU, the mask made of them (`document_mask`)."""


class Cache(Protocol):
    """What cached decoding needs of `kv_cache.KVCache`: the keys and values of the tokens already seen."""

    def begin(self, tokens: int) -> Tensor:
        """Start a pass over T new tokens a row; return their positions, (B or 1, T)."""
        ...

    def attend(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Store a layer's new keys and values; return attention over all that the rows hold, (B, T, N, H)."""
        ...


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension, in float32, then scale by a learned weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalised, same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Self-attention of one block: project, normalise (qk_norm), rotate, attend, project back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.rotates = config.rotates(layer)
        # Rows: all query heads, then key heads, then value heads.
        self.qkv = AdaptableLinear(
            config.width, (config.heads + 2 * config.kv_heads) * config.head_width, bias=False
        )
        self.out = AdaptableLinear(config.heads * config.head_width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_width, config.norm_epsilon) if config.qk_norm else None

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, documents: Documents, cache: Cache | None
    ) -> Tensor:
        """Return what attention adds to the residual stream, (B, T, D)."""
        heads = self.qkv(x_BTD).unflatten(-1, (-1, self.head_width))
        qk, v_BTKH = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = qk.split((self.heads, self.kv_heads), dim=2)
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
            if self.rotates:
                q_BTNH, k_BTKH = rotate(q_BTNH, cos, sin), rotate(k_BTKH, cos, sin)
        else:
            if self.rotates:
                qk = rotate(qk, cos, sin)
            q_BTNH, k_BTKH = qk.split((self.heads, self.kv_heads), dim=2)
        if cache is None:
            attended_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, documents)
        else:
            attended_BTNH = cache.attend(self.layer, q_BTNH, k_BTKH, v_BTKH)
        return self.out(attended_BTNH.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: a gate decides how much of each feature passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Rows: gate, then up.
        self.gate_up = AdaptableLinear(config.width, 2 * config.ffn_width, bias=False)
        self.down = AdaptableLinear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return what the feed-forward adds to the residual stream, (B, T, D)."""
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.width, config.norm_epsilon)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer, (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos, sin, documents, cache)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Transformer(nn.Module):
    """A decoder with one head.

    Attributes:
        config: the shape.
        head: "lm" predicts the next token; "scalar" gives one number a token (reward, value).
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
        compiled: the blocks are compiled, and what the head does to logits is to be.
    """

    def __init__(self, config: ModelConfig, head: Literal["lm", "scalar"] = "lm") -> None:
        """Build with fresh weights drawn from torch's global generator."""
        super().__init__()
        self.config = config
        self.head = head
        self.checkpoint_activations = False
        self.compiled = False
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = RMSNorm(config.width, config.norm_epsilon)
        self.output: nn.Linear | None = None
        if head == "scalar":
            self.output = nn.Linear(config.width, 1, bias=False)
        elif not config.tied_embeddings:
            self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset_rotation()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator."""
        if self.embedding.weight.is_meta:
            return
        std, residual_std = self.config.init_std, self.config.init_std / (2 * self.config.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                writes_residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
                parameter.normal_(std=residual_std if writes_residual else std)
        if self.head == "scalar" and self.output is not None:
            self.reset_scalar_head()

    @torch.no_grad()
    def reset_scalar_head(self) -> None:
        """Draw a fresh scalar head, std 1 / sqrt(D + 1) (Stiennon et al., arXiv 2009.01325, appendix B)."""
        if self.output is not None:
            self.output.weight.normal_(std=(self.config.width + 1) ** -0.5)

    def reset_rotation(self) -> None:
        """Recompute the rotation frequencies, which are no part of a checkpoint."""
        frequencies, self.rotation_scale = rotation_frequencies(self.config)
        self.frequencies = frequencies.to(self.embedding.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        """Move or cast the weights; the frequencies follow to the device but stay float32, also off the meta device."""
        super()._apply(fn, recurse)
        self.reset_rotation()
        return self

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head: (V, D), or (1, D) for a scalar head."""
        return self.embedding.weight if self.output is None else self.output.weight

    def hidden_states(
        self,
        token_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the normalised residual stream after the last block, (B, T, D). Arguments as in `forward`."""
        if cache is not None:
            position_ids = cache.begin(token_ids.shape[1])
        elif position_ids is None:
            position_ids = default_position_ids(token_ids, document_ids)
        cos, sin = head_tables(*rotation_tables(position_ids, self.frequencies, self.rotation_scale))
        documents = document_mask(document_ids) if cache is None else None  # a cache knows its own
        x_BTD = self.embedding(token_ids)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, cos, sin, documents, cache, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, cos, sin, documents, cache)
        return self.final_norm(x_BTD)

    def forward(
        self,
        token_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        reduction: Literal["none", "entropy", "sum", "likeliest"] = "none",
        temperature: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the model; with `labels`, score them here so that the head's weight is used inside `forward`.

        Args:
            token_ids: (B, T) int64.
            position_ids: (B, T) or (1, T); default: 0, 1, 2 ... restarting in every document.
            document_ids: (B, T); attention stays inside equal ids. Padding has an id of its own (-1).
            cache: keys and values of earlier tokens; `token_ids` then follow them, and their positions too. No
                gradient, no documents: the engine's way in is `inference/decoder.py`. Or (with both) a row shared by
                processes: `context_parallel.py`.
            labels: (B, T) `token_ids` shifted left by one, `IGNORE_INDEX` where untrained.
            reduction: with labels: "none" for logprobs, "entropy" for entropies as well, "sum" for the summed loss,
                "likeliest" for what the model would say in their place.
            temperature: divides the logits before the softmax of the logprobs.

        Returns:
            No labels: logits (B, T, V) float32; with a scalar head (B, T) float32.
            Labels, "none": logprobs of the labels (B, T) float32 nats, 0 where `IGNORE_INDEX`.
            Labels, "entropy": (these logprobs, (B, T) float32 entropies of the distributions they are from).
            Labels, "sum": (() float32 sum of -logprob with gradient, (B, T) float32 detached).
            Labels, "likeliest": (B, T) int64 likeliest tokens, `IGNORE_INDEX` where the label is.
        """
        hidden_BTD = self.hidden_states(
            token_ids, position_ids=position_ids, document_ids=document_ids, cache=cache
        )
        if self.head == "scalar":
            if labels is not None:
                raise ValueError("labels were given to a model with a scalar head")
            return by_columns(scalar_values, hidden_BTD, self.output_weight)
        if labels is None:
            return by_columns(lm_logits, hidden_BTD, self.output_weight)
        if reduction == "sum":
            if temperature != 1.0:
                raise ValueError(f"reduction 'sum' has no temperature, got {temperature}")
            return by_columns(cross_entropy_sum, hidden_BTD, self.output_weight, labels, self.compiled)
        if reduction == "likeliest":
            return by_columns(likeliest_tokens, hidden_BTD, self.output_weight, labels)
        score = label_logprobs_and_entropies if reduction == "entropy" else label_logprobs
        return by_columns(score, hidden_BTD, self.output_weight, labels, temperature, self.compiled)


def default_position_ids(token_ids: Tensor, document_ids: Tensor | None) -> Tensor:
    """Return positions counted from the start of each document, (B, T), or from the row's start, (1, T)."""
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    if document_ids is None:
        return columns
    return columns - document_starts(document_ids)
