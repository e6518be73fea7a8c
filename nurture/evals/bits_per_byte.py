"""How well a model predicts held-out text, in bits per byte and by source.

bits per byte = sum of -log2 p(token) / bytes the tokens stand for. Unlike the loss in nats a token it does not depend
on the tokenizer. Documents are packed as in training, attention stays inside them, and every byte is predicted once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nurture.evals.measure import Measure
from nurture.losses.language import bits_and_bytes, summed_loss
from nurture.progress import tracked
from nurture.runtime import Execution, add_up, eager_blocks
from nurture.types import Batch


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, batches: Iterable[Batch], token_byte_lengths: Tensor, execution: Execution
) -> dict[str, Measure]:
    """Return source -> bits per byte (n = bytes) over `batches`.

    With several processes each takes every world_size-th batch; all return the same result.

    Args:
        batches: see `data.mixture.heldout_batches`; only labelled tokens count.
        token_byte_lengths: (V,) int64.
    """
    totals: dict[str, tuple[float, float]] = {}
    processes = execution.processes
    batches = list(batches)
    was_training = model.training
    model.eval()
    # Sharded models must be called by all processes together: those without a batch left repeat one, uncounted.
    rounds = -(-len(batches) // processes.world_size)
    for turn in tracked(range(rounds), "held-out text", show=processes.is_main, stays=False):
        index = turn * processes.world_size + processes.rank
        batch = batches[min(index, len(batches) - 1)].to(execution.device)
        with execution.autocast(), eager_blocks():
            _, token_losses = summed_loss(model, batch)
        if index >= len(batches):
            continue
        pairs = zip(*bits_and_bytes(token_losses, batch, token_byte_lengths), strict=True)
        add_up(totals, dict(zip(batch.sources, pairs, strict=True)))
    model.train(was_training)
    totals = processes.sum(totals)
    return {source: Measure(bits / count, int(count)) for source, (bits, count) in totals.items() if count}
