"""The next-token loss of pretraining, mid-training and supervised fine-tuning.

One loss serves them all: which tokens count is decided by the batch's labels (every token when pretraining, the
assistant's tokens when fine-tuning). It returns the sum over the counted tokens and leaves the division to
`train_step`, so that packing, accumulation and world size cannot change the gradient.

Source: L = -sum_t log p(token_t | tokens before t); Radford et al. 2018, equation 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nurture.types import IGNORE_INDEX, Batch, LossResult


class LanguageLoss:
    """Summed next-token loss, with each source's share reported in bits per byte."""

    def __init__(self, token_byte_lengths: Tensor) -> None:
        """Keep the tokenizer's (V,) int64 number of bytes each token stands for (0 for special tokens)."""
        self.token_byte_lengths = token_byte_lengths

    def __call__(self, model: nn.Module, batch: Batch) -> LossResult:
        """Return the loss of `batch`: total over trained labels, and (sum, count) metrics.

        `loss` counts tokens (nats a token); `bpb/SOURCE` counts the bytes of the labels (bits a byte).
        """
        total, token_losses = summed_loss(model, batch)
        metrics = {"loss": (float(total.detach()), float(batch.loss_count))}
        bits, byte_counts = bits_and_bytes(token_losses, batch, self.token_byte_lengths)
        for index, source in enumerate(batch.sources):
            if byte_counts[index]:
                metrics[f"bpb/{source}"] = (bits[index], byte_counts[index])
        return LossResult(total, metrics)


def summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run `model` on a packed batch; return (() float32 sum with gradient, (B, T) float32 nats detached)."""
    total, token_losses = model(
        batch.token_ids,
        position_ids=batch.position_ids,
        document_ids=batch.document_ids,
        labels=batch.labels,
        reduction="sum",
    )
    return total, token_losses


def bits_and_bytes(
    token_losses: Tensor, batch: Batch, token_byte_lengths: Tensor
) -> tuple[list[float], list[float]]:
    """Add up each source's loss in bits and the bytes its labels stand for.

    Bits per byte is their ratio: unlike nats per token it can be compared between tokenizers.

    Args:
        token_losses: (B, T) float32 nats, 0 where untrained.
        batch: whose `labels` and `source_ids` belong to the losses.
        token_byte_lengths: (V,) int64.

    Returns:
        Two lists in the order of `batch.sources`.
    """
    sources = len(batch.sources)
    trained = batch.labels != IGNORE_INDEX
    byte_lengths = token_byte_lengths.to(batch.labels.device)[batch.labels.clamp(min=0)] * trained
    source_ids = batch.source_ids.flatten()
    bits = torch.bincount(source_ids, token_losses.flatten().double(), minlength=sources) / math.log(2)
    byte_counts = torch.bincount(source_ids, byte_lengths.flatten().double(), minlength=sources)
    return bits.tolist(), byte_counts.tolist()
