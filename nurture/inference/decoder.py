"""The transformer as the engine runs it: the same function as `model.Transformer`, prepared for decoding.

Decoding one token a row is many tiny operations, so what can be done once is done once, here: norm weights are
multiplied into the matrices that follow them, the pairs of numbers that a rotation turns are made neighbours (one
complex multiplication then rotates queries and keys), and the matrices are cast to the engine's dtype. The residual
stream, the norms and the rotations stay float32 in every dtype. A prefill keeps only each row's last token after the
last layer's keys and values, and returns the logits of that token alone.

No gradient, no sampling. `refresh` must follow a change of the weights; the engine sees to it. Parity with the
model's own forward pass is tested to 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nurture.model.kv_cache import KVCache
from nurture.model.rope import rotation_tables
from nurture.model.transformer import Attention, Block, Transformer


@dataclass
class _Layer:
    """One block's matrices, with the norm before each multiplied in."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    qk_norm: Tensor | None
    """(N + K, H) float32 weights of the query and key norms, or None."""
    rotates: bool


class Decoder:
    """The model's weights, prepared for decoding in `dtype`."""

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights as they are now."""
        model, width = self.model, self.config.width
        self.device = model.embedding.weight.device
        self.embedding = model.embedding.weight.detach()
        self.layers = [self._prepare(cast(Block, block)) for block in model.blocks]
        self.output = self._fold(model.output_weight, model.final_norm.weight)
        self._residual_norm = _NormConstant(width, self.config.norm_epsilon, self.device)
        self._head_norm = _NormConstant(self.config.head_width, self.config.norm_epsilon, self.device)
        self._rotations = torch.empty(0, 1, self.config.head_width // 2, dtype=torch.complex64)

    def _prepare(self, block: Block) -> _Layer:
        part: Attention = block.attention
        turned = part.heads + part.kv_heads
        qkv = self._fold(part.qkv.weight, block.attention_norm.weight)
        order = torch.arange(part.head_width, device=self.device).view(2, -1).t().flatten()
        heads = qkv.view(-1, part.head_width, qkv.shape[-1])
        qkv = torch.cat((heads[:turned, order], heads[turned:])).flatten(0, 1)
        qk_norm = None
        if part.q_norm is not None and part.k_norm is not None:
            q_weight, k_weight = part.q_norm.weight[order], part.k_norm.weight[order]
            qk_norm = torch.stack([q_weight] * part.heads + [k_weight] * part.kv_heads).float()
            qk_norm *= part.head_width**0.5
        return _Layer(
            qkv=qkv,
            out=part.out.weight.detach().to(self.dtype),
            gate_up=self._fold(block.ffn.gate_up.weight, block.ffn_norm.weight),
            down=block.ffn.down.weight.detach().to(self.dtype),
            qk_norm=qk_norm,
            rotates=part.rotates,
        )

    def _fold(self, weight: Tensor, norm_weight: Tensor) -> Tensor:
        """Multiply a norm's weight, and the sqrt(D) that `_normalise` leaves out, into the matrix that follows it."""
        return (weight.float() * (norm_weight.float() * weight.shape[-1] ** 0.5)).to(self.dtype)

    def new_cache(self, max_rows: int, rows: int | None = None) -> KVCache:
        """Make a cache that fits, in the engine's dtype."""
        return KVCache(self.config, max_rows, rows=rows, dtype=self.dtype, device=self.device)

    def forward(self, token_ids: Tensor, cache: KVCache, counts: Sequence[int] | None = None) -> Tensor:
        """Append tokens to the cache's rows and predict the token after each row's last.

        Args:
            token_ids: (B, T), right-padded.
            cache: B rows.
            counts: real tokens of each row among the T; default: all.

        Returns:
            Logits (B, V) in the engine's dtype.
        """
        rows, tokens = token_ids.shape
        position_ids = cache.begin(tokens, counts)
        rotation = self._rotation(position_ids, cache.columns)
        x_BTD = F.embedding(token_ids, self.embedding).float()
        last = None
        if tokens > 1:
            ends = [tokens] * rows if counts is None else counts
            last = (torch.arange(rows, device=self.device), torch.tensor(ends, device=self.device) - 1)
        for index, layer in enumerate(self.layers):
            is_final = index == len(self.layers) - 1
            x_BTD = self._block(index, layer, x_BTD, rotation, cache, last if is_final else None)
        return F.linear(self._normalise(x_BTD[:, -1]), self.output)

    def feed(self, rows: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Append tokens of any number to each row of a cache; return the logits (B, V) after each row's last."""
        counts = [len(row) for row in rows]
        padded = torch.zeros(len(rows), max(counts), dtype=torch.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = torch.tensor(row)
        return self.forward(padded.to(self.device), cache, counts)

    def _block(
        self,
        index: int,
        layer: _Layer,
        x_BTD: Tensor,
        rotation: Tensor,
        cache: KVCache,
        last: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Run one layer in place; with `last` (rows, columns), only those tokens go on after its keys and values."""
        config = self.config
        turned = config.heads + config.kv_heads
        heads = F.linear(self._normalise(x_BTD), layer.qkv).unflatten(-1, (-1, config.head_width))
        qk = heads[:, :, :turned].float()
        if layer.qk_norm is not None:
            qk = qk / self._head_norm(qk) * layer.qk_norm
        if layer.rotates:
            pairs = torch.view_as_complex(qk.unflatten(-1, (-1, 2)))
            qk = torch.view_as_real(pairs * rotation).flatten(-2)
        q_BTNH, k_BTKH = qk[:, :, : config.heads], qk[:, :, config.heads :]
        if last is not None:
            q_BTNH, x_BTD = q_BTNH[last][:, None], x_BTD[last][:, None]
        attended_BTNH = cache.attend(index, q_BTNH, k_BTKH, heads[:, :, turned:])
        x_BTD.add_(F.linear(attended_BTNH.flatten(2), layer.out))
        gate, up = F.linear(self._normalise(x_BTD), layer.gate_up).chunk(2, dim=-1)
        return x_BTD.add_(F.linear(F.silu(gate) * up, layer.down))

    def _normalise(self, x: Tensor) -> Tensor:
        """RMSNorm without its weight and without sqrt(D), which the next matrix holds."""
        return (x / self._residual_norm(x)).to(self.dtype)

    def _rotation(self, position_ids: Tensor, columns: int) -> Tensor:
        """Return exp(i angle) for positions (B or 1, T) below `columns`: (B or 1, T, 1, H/2) complex64."""
        if len(self._rotations) < columns:
            positions = torch.arange(max(1024, 2 * columns), device=self.device)
            cos, sin = rotation_tables(positions, self.model.frequencies, self.model.rotation_scale)
            self._rotations = torch.complex(cos, sin)[:, None]
        return self._rotations[position_ids]


class _NormConstant:
    """sqrt(|x|^2 + D epsilon): the root mean square that RMSNorm divides by, times sqrt(D), in two operations."""

    def __init__(self, width: int, epsilon: float, device: torch.device) -> None:
        self.constant = torch.tensor((width * epsilon) ** 0.5, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.constant)
