"""Context parallelism: several processes share every row, each with a part of its columns.

Everything but attention works on tokens alone, so a process computes its columns as if they were a row. In attention
its queries meet the keys and values of the whole row, which all processes gather (grouped-query attention makes them
the small part); the gradients of keys and values flow back the same way. Of 2W pieces of a row, process r of W has
pieces r and 2W - 1 - r: early columns meet few keys and late ones many, so all have the same work. Activations are
1 / W of what one process would hold; only the keys and values of one layer are whole at a time.

The model does not know: a `SharedRow` stands where the cache of decoding stands, which is given keys and values too.

Source: all-gathered keys and values with balanced pieces as in Llama 3 (arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nurture.errors import NurtureError
from nurture.model.attention import attention, document_starts
from nurture.runtime import never_compiled
from nurture.types import Batch, BatchSource, LossFunction, LossResult


@dataclass
class RowPart(Batch):
    """A process's columns of a batch.

    Attributes:
        row_document_ids: (B, S) int64, the ids of the whole rows.
    """

    row_document_ids: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Sharing:
    """Which processes share rows: `size` neighbours, of which this one is number `place`."""

    place: int
    size: int
    group: dist.ProcessGroup | None

    def pieces(self, columns: int) -> list[tuple[int, int]]:
        """Return (first, end) of this process's two pieces of a row."""
        width, rest = divmod(columns, 2 * self.size)
        if rest:
            raise NurtureError(
                f"sequence_length is {columns}, which {self.size} processes cannot share evenly (context_parallel). "
                f"Choose a multiple of {2 * self.size}."
            )
        numbers = (self.place, 2 * self.size - 1 - self.place)
        return [(number * width, (number + 1) * width) for number in numbers]


def share_rows(size: int) -> Sharing:
    """Divide the process group into groups of `size` neighbours. All processes must call it.

    Raises:
        NurtureError: the processes do not divide.
    """
    everyone = dist.get_world_size() if dist.is_initialized() else 1
    if everyone % size:
        raise NurtureError(
            f"context_parallel is {size}, which does not divide the {everyone} processes; start a multiple of {size} "
            f"with `torchrun --nproc-per-node=N -m nurture ...`."
        )
    group, _ = dist.new_subgroups(group_size=size)
    return Sharing(dist.get_rank() % size, size, group)


def spread_columns(batches: BatchSource, sharing: Sharing) -> BatchSource:
    """Return `batches` such that neighbours get the same rows, each its columns of them."""
    return _Spread(batches, sharing)


@dataclass(frozen=True)
class _Spread:
    batches: BatchSource
    sharing: Sharing

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> RowPart:
        size = self.sharing.size
        whole = self.batches(step, rank // size, world_size // size)
        pieces = self.sharing.pieces(whole.token_ids.shape[1])
        columns = torch.cat([torch.arange(first, end) for first, end in pieces])
        parts: dict[str, Any] = {name: tensor[:, columns] for name, tensor in whole._tensors().items()}
        return RowPart(**parts, sources=whole.sources, row_document_ids=whole.document_ids)

    def epochs(self, step: int) -> dict[str, float]:
        return self.batches.epochs(step)


def shared_loss(loss_fn: LossFunction, sharing: Sharing) -> LossFunction:
    """Return `loss_fn` of the batches of `spread_columns`: each process's sum over its own columns."""

    def loss(model: Callable[..., Any], batch: RowPart) -> LossResult:
        row = SharedRow(batch.position_ids, batch.row_document_ids, sharing)
        return loss_fn(partial(model, cache=row), batch)  # type: ignore[arg-type]

    return loss


class SharedRow:
    """Attention of one process's columns over rows that it shares; see `transformer.Cache`."""

    def __init__(self, position_ids: Tensor, row_document_ids: Tensor, sharing: Sharing) -> None:
        """Keep the (B, T) positions of this process's columns and the (B, S) document ids of the whole rows."""
        self._position_ids, self._sharing = position_ids, sharing
        self._row_starts = document_starts(row_document_ids)

    def begin(self, tokens: int) -> Tensor:
        """Return the positions of the columns, (B, T)."""
        return self._position_ids

    @never_compiled
    def attend(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Return attention of the columns over the whole row, (B, T, N, H)."""
        row_BSKH = gather_columns(torch.cat((k_BTKH, v_BTKH), dim=2), self._sharing)
        k_BSKH, v_BSKH = row_BSKH.split(k_BTKH.shape[2], dim=2)
        outs = []
        pieces = self._sharing.pieces(row_BSKH.shape[1])
        for (first, end), queries in zip(pieces, q_BTNH.chunk(2, dim=1), strict=True):
            starts = self._row_starts[:, :end]
            outs.append(attention(queries, k_BSKH[:, :end], v_BSKH[:, :end], starts, first))
        return torch.cat(outs, dim=1)


def gather_columns(part_BTKH: Tensor, sharing: Sharing) -> Tensor:
    """Return the whole row (B, S, K, H) from every process's columns, in order; gradients go back to their owners."""
    whole: Tensor = _Gather.apply(part_BTKH, sharing)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, sharing: Sharing) -> Tensor:
        ctx.sharing = sharing
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(sharing.size)]
        dist.all_gather(parts, part.contiguous(), group=sharing.group)
        early, late = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
        return torch.cat((*early, *reversed(late)), dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # Every process has a part of the gradient of the whole row; a sum, then each takes its own columns.
        whole = gradients[0].contiguous()
        dist.all_reduce(whole, group=ctx.sharing.group)
        pieces = ctx.sharing.pieces(whole.shape[1])
        return torch.cat([whole[:, first:end] for first, end in pieces], dim=1), None
