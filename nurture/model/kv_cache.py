"""Keys and values of the tokens already seen, so that the next token costs one position of work, not all.

Memory is allocated for all rows at once and grows in blocks of columns. Rows are LEFT-aligned: token t of a row sits
in column t whatever its neighbours hold, so ragged prompts are padded on the right, where the causal mask hides the
padding from every real token and the row's next tokens overwrite it. Padding therefore cannot change a result, and a
prefill needs no mask at all; decoding masks the columns at or past each row's length.

Decoding attends with two batched matmuls per layer, the query heads that share a key/value head being the rows of
one small matrix, so keys and values are never expanded (the library's attention with a mask is far slower for one
query). They run over all allocated columns: matrices that lie gap-free in memory go about twice as fast as part of
larger ones, and a few round lengths spare the library from setting up a kernel for each. Finished rows are dropped by
moving the last rows into their places.

It holds no tokens and knows no sampling; `inference/engine.py` does that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nurture.model.attention import QUERY_BLOCK, attention
from nurture.model.config import ModelConfig

_BLOCK = 32
"""Columns the cache grows by."""


class KVCache:
    """Keys and values of every layer for a number of sequences.

    Attributes:
        rows: rows in use, the first ones (B).
        lengths: tokens held by each row in use.
        keys, values: one tensor a layer, (max_rows, K, columns, H).
    """

    def __init__(
        self,
        config: ModelConfig,
        max_rows: int,
        *,
        rows: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make an empty cache.

        Args:
            config: the model's shape.
            max_rows: rows to keep room for.
            rows: rows in use from the start, each of length 0; default: all.
            dtype: of keys and values.
            device: where they are.
        """
        self.rows = max_rows if rows is None else rows
        self.lengths = [0] * self.rows
        shape = (max_rows, config.kv_heads, 0, config.head_width)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self._starts: list[int] = []
        self._write_rows: Tensor | None = None
        self._bias: Tensor
        self._positions: Tensor

    @property
    def columns(self) -> int:
        """Columns allocated."""
        return self.keys[0].shape[2]

    def reserve(self, columns: int) -> None:
        """Make room for rows of `columns` tokens, in whole blocks."""
        if columns <= self.columns:
            return
        columns = -(-columns // _BLOCK) * _BLOCK
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_empty(*old.shape[:2], columns, old.shape[3])
                new[: self.rows, :, : old.shape[2]] = old[: self.rows]
                # Zeros, not garbage: a hidden column has weight 0, and 0 times a stray NaN is NaN.
                new[: self.rows, :, old.shape[2] :] = 0
                tensors[layer] = new

    def _reserve_rows(self, max_rows: int) -> None:
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty(max_rows, *old.shape[1:])
                tensors[layer][: self.rows] = old[: self.rows]

    def begin(self, tokens: int, counts: Sequence[int] | None = None) -> Tensor:
        """Start a forward pass over `tokens` new columns; each layer then calls `attend` once.

        Args:
            tokens: columns of the pass (T).
            counts: real tokens of each row among them, the first ones; default: all T.

        Returns:
            Positions (B, T) or, when all rows are equally long, (1, T) int64.
        """
        device = self.keys[0].device
        self._starts = self.lengths
        added = [tokens] * self.rows if counts is None else counts
        self.lengths = [start + count for start, count in zip(self._starts, added, strict=True)]
        self.reserve(max(self._starts) + tokens)
        even_starts = min(self._starts) == max(self._starts)
        starts = torch.tensor(self._starts[:1] if even_starts else self._starts, device=device)[:, None]
        self._write_rows = None
        if not even_starts and tokens == 1:
            heads = torch.arange(self.rows * self.keys[0].shape[1], device=device).view(self.rows, -1)
            self._write_rows = (heads * self.columns + starts).flatten()
        # Added to the scores: minus infinity on columns that hold no token of the row.
        even_ends = min(self.lengths) == max(self.lengths)
        ends = torch.tensor(self.lengths[:1] if even_ends else self.lengths, device=device)[
            :, None, None, None, None
        ]
        hidden = torch.arange(self.columns, device=device) >= ends
        self._bias = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=device)
        self._bias.masked_fill_(hidden, -torch.inf)
        self._positions = starts if tokens == 1 else starts + torch.arange(tokens, device=device)
        return self._positions

    def attend(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Store a layer's new keys and values and attend to all that the rows hold.

        Args:
            layer: which layer.
            q_BTNH: queries of the new columns; or (B, 1, N, H), those of each row's last real token alone.
            k_BTKH: keys of the new columns, rotated already.
            v_BTKH: values of the new columns.

        Returns:
            Shape of the queries, dtype of the values given.
        """
        self._write(layer, k_BTKH, v_BTKH)
        if q_BTNH.shape[1] == 1:
            return self._attend_held(layer, q_BTNH, self._bias).to(v_BTKH.dtype)
        if max(self._starts) == 0:
            return attention(q_BTNH.to(v_BTKH.dtype), k_BTKH.to(v_BTKH.dtype), v_BTKH)
        blocks = []
        for queries, positions in zip(
            q_BTNH.split(QUERY_BLOCK, 1), self._positions.split(QUERY_BLOCK, 1), strict=True
        ):
            hidden = torch.arange(self.columns, device=queries.device) > positions[:, None, None, :, None]
            bias = torch.zeros(hidden.shape, dtype=self._bias.dtype, device=hidden.device)
            blocks.append(self._attend_held(layer, queries, bias.masked_fill_(hidden, -torch.inf)))
        return torch.cat(blocks, 1).to(v_BTKH.dtype)

    def _write(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> None:
        tokens = k_BTKH.shape[1]
        for store, new_BTKH in ((self.keys[layer], k_BTKH), (self.values[layer], v_BTKH)):
            if self._write_rows is not None:
                rows_H = new_BTKH.reshape(-1, new_BTKH.shape[-1]).to(store.dtype)
                store.view(-1, store.shape[-1]).index_copy_(0, self._write_rows, rows_H)
            elif min(self._starts) == max(self._starts):
                start = self._starts[0]
                store[: self.rows, :, start : start + tokens].copy_(new_BTKH.transpose(1, 2))
            else:
                for row, start in enumerate(self._starts):
                    store[row, :, start : start + tokens].copy_(new_BTKH[row].transpose(0, 1))

    def _attend_held(self, layer: int, q_BTNH: Tensor, bias: Tensor) -> Tensor:
        """Attend to everything the rows hold.

        Args:
            layer: which layer.
            q_BTNH: queries.
            bias: (B or 1, 1, 1, T or 1, columns), minus infinity where a query must not look.
        """
        rows, tokens, heads, head_width = q_BTNH.shape
        keys = self.keys[layer][:rows].flatten(0, 1)
        values = self.values[layer][:rows].flatten(0, 1)
        kv_heads = self.keys[layer].shape[1]
        q_BKGTH = (q_BTNH * head_width**-0.5).to(keys.dtype)
        q_BKGTH = q_BKGTH.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        scores = torch.bmm(q_BKGTH.reshape(rows * kv_heads, -1, head_width), keys.transpose(1, 2))
        scores.view(rows, kv_heads, -1, tokens, self.columns).add_(bias)
        out = torch.bmm(scores.softmax(-1), values).view(rows, kv_heads, -1, tokens, head_width)
        return out.permute(0, 3, 1, 2, 4).reshape(rows, tokens, heads, head_width)

    def append(self, other: KVCache, source_rows: Sequence[int]) -> None:
        """Add rows copied from another cache; a source row may be given several times (a shared prompt).

        Beyond `max_rows` the memory is doubled.
        """
        if not source_rows:
            return
        lengths = [other.lengths[row] for row in source_rows]
        held, first, last = max(lengths), self.rows, self.rows + len(source_rows)
        self.reserve(held + 1)
        if last > self.keys[0].shape[0]:
            self._reserve_rows(max(last, 2 * self.keys[0].shape[0]))
        index = torch.tensor(source_rows, device=self.keys[0].device)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for store, source in zip(mine, theirs, strict=True):
                store[first:last, :, :held] = source[:, :, :held].index_select(0, index)
                store[first:last, :, held:] = 0
        self.rows = last
        self.lengths = self.lengths + lengths

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Remove rows; the last rows move into their places.

        Returns:
            For every row now in use, the number it had before.
        """
        gone = set(finished)
        kept = self.rows - len(gone)
        order = list(range(kept))
        spare = [row for row in range(kept, self.rows) if row not in gone]
        for hole, row in zip((hole for hole in range(kept) if hole in gone), spare, strict=True):
            order[hole] = row
            held = self.lengths[row]
            for tensors in (self.keys, self.values):
                for store in tensors:
                    store[hole, :, :held] = store[row, :, :held]
        self.lengths = [self.lengths[row] for row in order]
        self.rows = kept
        return order

    def truncate(self, length: int) -> None:
        """Forget every token past the first `length` of each row."""
        self.lengths = [min(held, length) for held in self.lengths]

    def rewind(self, row: int, length: int) -> None:
        """Forget the tokens of one row past its first `length`; the next ones overwrite them."""
        self.lengths[row] = min(self.lengths[row], length)
