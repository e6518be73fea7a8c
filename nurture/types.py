"""The words every chapter shares: shape letters, the batch, and what a loss returns.

Shape letters, one legend for the whole book:
B batch (rows), T tokens in a row, D model width, N query heads, K key/value heads, H head width,
F feed-forward width, V vocabulary, G group (completions of one prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

IGNORE_INDEX = -100
"""Label of a position that is not trained on (PyTorch's own convention)."""


class Message(TypedDict, total=False):
    """One turn of a conversation. `role` and `content` are always present."""

    role: str
    content: str
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


@dataclass
class Batch:
    """Packed token rows, the input of every gradient stage.

    Attributes:
        token_ids: (B, T) int64.
        labels: (B, T) int64, `token_ids` shifted left by one, `IGNORE_INDEX` where the next token is not trained.
        position_ids: (B, T) int64, restarting at 0 in every document of a row.
        document_ids: (B, T) int64, equal exactly inside one document of a row; -1 on padding.
        source_ids: (B, T) int64, index into `sources` of the source that the *label* comes from.
        sources: names of the sources, for the per-source ledger and losses.
    """

    token_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor
    source_ids: Tensor
    sources: tuple[str, ...] = ("text",)

    @property
    def loss_count(self) -> int:
        """Number of trained labels: what a token-mean loss divides by, summed over the global batch."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def token_count(self) -> int:
        """Number of tokens that are not padding."""
        return int((self.document_ids >= 0).sum())

    def split(self, parts: int) -> Iterator[Self]:
        """Yield `parts` microbatches of consecutive rows. The parts need not be equal in size."""
        pieces = {name: torch.tensor_split(tensor, parts) for name, tensor in self._tensors().items()}
        for index in range(parts):
            part: dict[str, Any] = {name: piece[index] for name, piece in pieces.items()}
            if part["token_ids"].shape[0]:
                yield replace(self, **part)

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with every tensor on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        """Return what has one entry a row, by name; kinds of batches that hold more inherit this."""
        held = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}


class BatchSource(Protocol):
    """Where a stage's batches come from: a pure function of (step, rank, world_size), so resuming is replaying."""

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return rank's share of the global batch of `step` (the first step is 0)."""
        ...

    def epochs(self, step: int) -> dict[str, float]:
        """Return how many times each source has been read in full once `step` steps are done."""
        ...


@dataclass
class LossResult:
    """A loss as a sum and what to report about it; never a mean.

    Attributes:
        total: () float32, the sum over all counted items. `train_step` divides by the count of the whole global
            batch, so accumulation, packing and world size cannot change the gradient.
        metrics: name -> (sum, count), reduced over microbatches and ranks before the division.
    """

    total: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


LossFunction = Callable[[nn.Module, Any], LossResult]
"""loss_fn(model, batch) -> LossResult; the batch says how many items it counts in `batch.loss_count`."""
