"""From hidden states to numbers: vocabulary logits, label logprobs, the summed cross entropy, one scalar.

All results are float32, whatever dtype the blocks ran in. Label logprobs and the loss take the hidden states and the
output matrix rather than logits, and work through the tokens in chunks: tokens x vocabulary never exists at once.
Positions without a label cost nothing. What happens to a chunk's logits between the matrix products is compiled where
the blocks are (`compiled`): read twice and written once, where every operation by itself would read and write them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from nurture.runtime import compile_once
from nurture.types import IGNORE_INDEX

CHUNK = 2048
"""Tokens whose logits exist at once."""


def lm_logits(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """Return (B, T, V) float32 unnormalised log-probabilities of the next token."""
    return torch.nn.functional.linear(hidden_BTD, weight_VD).float()


def scalar_values(hidden_BTD: Tensor, weight_1D: Tensor) -> Tensor:
    """Return (B, T) float32, one number a token (a reward or a value)."""
    return torch.nn.functional.linear(hidden_BTD, weight_1D).squeeze(-1).float()


def by_columns(
    score: Callable[..., Any], hidden: Tensor, weight: Tensor, labels: Tensor | None = None, *rest: Any
) -> Any:
    """Return `score(hidden, weight, labels, *rest)`, also where processes share the columns of `hidden`.

    Under tensor parallelism every process scores its own columns against the whole matrix, which costs as much as a
    matrix cut by vocabulary and needs no arithmetic of its own. All processes get the whole result: what has a column
    for every token is gathered, a sum is added up.
    """
    if not isinstance(hidden, DTensor) or not isinstance(weight, DTensor):
        return score(hidden, weight, *(() if labels is None else (labels, *rest)))
    mesh = hidden.device_mesh
    # Each process adds its columns' part to the gradient of the matrix.
    matrix = weight.full_tensor(grad_placements=[Partial()])
    mine = () if labels is None else (labels.chunk(mesh.size(), 1)[mesh.get_local_rank()], *rest)
    found = score(hidden.to_local(), matrix, *mine)

    def whole(part: Tensor) -> Tensor:
        return DTensor.from_local(part, mesh, [Shard(1) if part.ndim else Partial()]).full_tensor()

    return tuple(map(whole, found)) if isinstance(found, tuple) else whole(found)


def label_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, compiled: bool = False
) -> Tensor:
    """Return log p(label) under softmax(logits / temperature) over the whole vocabulary.

    Args:
        hidden: (..., D).
        weight: (V, D) output matrix.
        labels: (...), aligned with `hidden`: the label of column t is the token after t.
        temperature: above 0; the temperature that the completion was sampled at.
        compiled: whether to compile what happens to logits.

    Returns:
        (...) float32 nats, 0 where the label is `IGNORE_INDEX`.
    """
    rows, trained_labels, trained = _trained_rows(hidden, labels)
    logprobs, _ = _LabelLogprobs.apply(rows, weight, trained_labels, temperature, False, compiled)  # type: ignore[no-untyped-call]
    return _scatter(logprobs, trained, labels)


def label_logprobs_and_entropies(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `label_logprobs` and the entropy of the distribution each label was predicted from.

    Arguments as in `label_logprobs`. Both results have a gradient.

    Returns:
        Two (...) float32 in nats, 0 where the label is `IGNORE_INDEX`.
    """
    rows, trained_labels, trained = _trained_rows(hidden, labels)
    logprobs, entropies = _LabelLogprobs.apply(rows, weight, trained_labels, temperature, True, compiled)  # type: ignore[no-untyped-call]
    return _scatter(logprobs, trained, labels), _scatter(entropies, trained, labels)


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of all trained labels, and each token's loss.

    The gradient of a sum does not depend on what comes after it but for one factor, so it is computed in the forward
    pass while the logits are at hand: one multiplication less than recomputing them.

    Args:
        hidden: (..., D).
        weight: (V, D) output matrix.
        labels: (...), `IGNORE_INDEX` where untrained.
        compiled: whether to compile what happens to logits.

    Returns:
        (() float32 with gradient, (...) float32 nats detached and 0 where untrained).
    """
    rows, trained_labels, trained = _trained_rows(hidden, labels)
    arguments = (rows, weight, trained_labels, torch.is_grad_enabled(), compiled)
    total, losses = _CrossEntropySum.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, _scatter(losses, trained, labels)


def likeliest_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the likeliest token at every position with a label, which is not looked at; arguments as above.

    In float32 also under autocast: rounded logits tie.

    Returns:
        (...) int64, `IGNORE_INDEX` where there is no label.
    """
    asked = labels != IGNORE_INDEX
    with torch.autocast(hidden.device.type, enabled=False):
        found = lm_logits(hidden[asked], weight).argmax(-1)
    return torch.full_like(labels, IGNORE_INDEX).masked_scatter(asked, found)


def _trained_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the hidden states (R, D) in the compute dtype and labels (R,) of trained positions, and their mask."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    rows, flat_labels = hidden.flatten(0, -2), labels.flatten()
    trained = flat_labels != IGNORE_INDEX
    if bool(trained.all()):
        return rows, flat_labels, None
    return rows[trained], flat_labels[trained], trained


def _scatter(values: Tensor, trained: Tensor | None, labels: Tensor) -> Tensor:
    """Lay the values of trained positions out in the shape of `labels`, 0 elsewhere."""
    if trained is None:
        return values.view(labels.shape)
    full = torch.zeros(trained.shape, dtype=values.dtype, device=values.device)
    return full.masked_scatter(trained, values).view(labels.shape)


class _CrossEntropySum(torch.autograd.Function):
    """Sum of -log p(label), its gradient computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, needs_gradient: bool, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        matrix = weight.to(rows.dtype)
        losses = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        if needs_gradient:
            rows_gradient = torch.empty_like(rows)
            weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        score = compile_once(_score, dynamic=True) if compiled else _score
        for start in range(0, rows.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            logprobs, error = score(rows[part] @ matrix.T, labels[part, None], needs_gradient)
            losses[part] = -logprobs.squeeze(1)
            if error is not None:
                # The softmax minus one at the label; there exact: the rest has been rounded.
                error.scatter_(1, labels[part, None], logprobs.expm1().to(error.dtype))
                torch.mm(error, matrix, out=rows_gradient[part])
                weight_gradient += error.T @ rows[part]
        if needs_gradient:
            ctx.save_for_backward(rows_gradient, weight_gradient.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        rows_gradient, weight_gradient = ctx.saved_tensors
        return (
            rows_gradient * total_gradient.to(rows_gradient.dtype),
            weight_gradient * total_gradient.to(weight_gradient.dtype),
            None,
            None,
            None,
        )


class _LabelLogprobs(torch.autograd.Function):
    """log p(label) of every row, and the entropy if asked; the backward pass computes the logits again, by chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        with_entropy: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.compiled = temperature, compiled
        ctx.set_materialize_grads(False)
        matrix = weight.to(rows.dtype)
        out = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        entropies = torch.zeros_like(out) if with_entropy else out.new_empty(0)
        measure = compile_once(_measure, dynamic=True) if compiled else _measure
        for start in range(0, rows.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            found = measure(rows[part] @ matrix.T, labels[part, None], temperature, with_entropy)
            out[part] = found[0].squeeze(1)
            if found[1] is not None:
                entropies[part] = found[1]
        ctx.save_for_backward(rows, weight, labels, out, entropies)
        return out, entropies

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor | None, entropy_gradient: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows, weight, labels, logprobs, entropies = ctx.saved_tensors
        matrix = weight.to(rows.dtype)
        rows_gradient = torch.empty_like(rows)
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        pull = compile_once(_pull, dynamic=True) if ctx.compiled else _pull
        towards = _scaled(gradient, logprobs, ctx.temperature)
        spread = None if entropy_gradient is None else _scaled(entropy_gradient, logprobs, ctx.temperature)
        # At the label what is left over is exact, and rounded once.
        at_label = -logprobs.expm1()[:, None] * towards
        if spread is not None:
            at_label -= logprobs.exp()[:, None] * (logprobs + entropies)[:, None] * spread
        for start in range(0, rows.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            entropy_part = None if spread is None else (spread[part], entropies[part, None])
            error = pull(rows[part] @ matrix.T, ctx.temperature, towards[part], entropy_part)
            error.scatter_(1, labels[part, None], at_label[part].to(error.dtype))
            torch.mm(error, matrix, out=rows_gradient[part])
            weight_gradient += error.T @ rows[part]
        return rows_gradient, weight_gradient.to(weight.dtype), None, None, None, None


def _score(logits: Tensor, labels: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the labels' logprobs (R, 1) and, if wanted, the softmax (R, V) in the dtype of the logits."""
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = logprobs.gather(1, labels)
    return chosen, logprobs.exp_().to(logits.dtype) if needs_gradient else None


def _measure(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the labels' logprobs (R, 1) and, if wanted, the entropies (R,)."""
    logprobs = _log_softmax(logits, temperature)
    return logprobs.gather(1, labels), -(logprobs.exp() * logprobs).sum(1) if with_entropy else None


def _pull(
    logits: Tensor, temperature: float, towards: Tensor, entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return the gradient (R, V) of the logits, in their dtype, but for the one at the label.

    d log p(label) / d logit = [it is the label's] - p, and d H / d logit = -p (log p + H), by the temperature.

    Args:
        logits: (R, V).
        temperature: divides them.
        towards: (R, 1) gradient of log p(label) by the temperature.
        entropy: (R, 1) gradient of H by the temperature, and (R, 1) H.
    """
    logprobs = _log_softmax(logits, temperature)
    factor = -towards
    if entropy is not None:
        spread, entropies = entropy
        factor = factor - spread * (logprobs + entropies)
    return logprobs.exp_().mul_(factor).to(logits.dtype)


def _scaled(gradient: Tensor | None, like: Tensor, temperature: float) -> Tensor:
    """Return (R, 1) `gradient` by the temperature, zeros if there is none."""
    return torch.zeros_like(like)[:, None] if gradient is None else (gradient / temperature)[:, None]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits = logits.float() / temperature
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)
