"""Merging: one model out of several with the same shape, by arithmetic on their weights, without training.

Fine-tuned copies of one model lie close to each other, and between them lie models that have some of each one's
abilities: averaging checkpoints of a run makes a better one (a soup), and a tenth of an earlier checkpoint brings back
what later training forgot (SmolLM3 regains its long context so). The methods are functions of one tensor of every
model; `merge_checkpoints` streams tensor by tensor, so that memory holds one tensor of each model, never a model.

    linear   sum w_i x_i / sum w_i; with equal weights a soup       Wortsman et al., arXiv 2203.05482
    slerp    along the arc between two tensors seen as vectors      Shoemake 1985
    ties     base + differences, trimmed to the largest, those whose sign loses the vote left out
                                                                    Yadav et al., arXiv 2306.01708
    dare     base + differences, dropped at random and scaled up    Yu et al., arXiv 2311.03099

Main failure mode: models that do not come from one base (or were trained far from it) average to noise; measure.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nurture.errors import NurtureError
from nurture.files import atomic_write, make_directory
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import (
    SHARD_BYTES,
    checkpoint_head,
    open_checkpoint,
    read_config,
    write_shards,
)
from nurture.model.weights import Head, parameter_pieces

log = logging.getLogger(__name__)

COLINEAR = 0.9995
"""Cosine from which two tensors point in one direction, and the arc between them is a line."""

Method = Callable[[str, Sequence[Tensor]], Tensor]
"""method(tensor's name, the tensor of every model in float32) -> the merged tensor."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean; weights need not sum to 1."""
    total = sum(weights)
    merged = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        merged += tensor * (weight / total)
    return merged


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return the point `share` of the way along the arc from `first` (0) to `second` (1); a line where it is flat."""
    cosine = float(torch.sum(_unit(first) * _unit(second)))
    if abs(cosine) > COLINEAR:
        return first * (1 - share) + second * share
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    along, back = (float(torch.sin(angle * part) / torch.sin(angle)) for part in (share, 1 - share))
    return first * back + second * along


def _unit(tensor: Tensor) -> Tensor:
    norm = float(torch.linalg.vector_norm(tensor))
    return tensor / norm if norm > 1e-8 else tensor


def trimmed(difference: Tensor, density: float) -> Tensor:
    """Return the tensor with all but the `density` share of its entries that are largest in magnitude set to 0.

    Raises:
        NurtureError: nothing would be left.
    """
    if density >= 1:
        return difference
    count = int(density * difference.numel())
    if count < 1:
        raise NurtureError(
            f"density {density} leaves nothing of a tensor of {difference.numel()} numbers; raise it"
        )
    kept = difference.flatten().abs().topk(count).indices
    mask = torch.zeros(difference.numel(), dtype=torch.bool)
    mask[kept] = True
    return difference * mask.view(difference.shape)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Trim each difference from the base, elect a sign by weighted mass, and add the (mean of the) winners.

    Args:
        density: share of each difference that is kept.
        scale: of what is added to the base (the paper's lambda).
        normalize: divide by the weights of the winners, entry by entry.
    """
    differences = [
        trimmed(tensor - base, density) * weight for tensor, weight in zip(tensors, weights, strict=True)
    ]
    return base + scale * _elected(differences, weights, normalize)


def dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    seed: int,
    scale: float = 1.0,
    elect: bool = False,
    normalize: bool = False,
) -> Tensor:
    """Drop entries of each difference at random, scale up the rest, and add them.

    Args:
        density: chance that an entry stays; what stays is divided by it, so that the mean is unchanged.
        seed: of the drawing.
        elect: leave out entries whose sign loses, as `ties` does.
        normalize: divide by the weights (of the winners).
    """
    generator = torch.Generator().manual_seed(seed)
    differences = []
    for tensor, weight in zip(tensors, weights, strict=True):
        difference = tensor - base
        if density < 1:
            difference = difference * (torch.rand(difference.shape, generator=generator) < density) / density
        differences.append(difference * weight)
    if elect:
        return base + scale * _elected(differences, weights, normalize)
    total = sum(weights) if normalize else 1.0
    return base + scale * torch.stack(differences).sum(0) / total


def _elected(differences: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Return the sum of what agrees with the sign of the sum; normalised: divided by the weights that took part."""
    stacked = torch.stack(list(differences))
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    wins = stacked.sign() == sign
    merged = (stacked * wins).sum(0)
    if normalize:
        shape = (-1, *[1] * merged.dim())
        divisor = (wins * torch.tensor(list(weights), dtype=merged.dtype).view(shape)).sum(0)
        merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return merged


def name_seed(seed: int, name: str) -> int:
    """Return a seed that depends on the tensor's name, so that no two tensors are dropped alike."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


# ---- checkpoints ------------------------------------------------------------------------------------------------


def merge_checkpoints(
    paths: Sequence[Path], target: Path, method: Method, *, head: Head = "lm"
) -> tuple[ModelConfig, torch.dtype]:
    """Write the weights of the merged model into `target`, reading one tensor of every model at a time.

    Args:
        paths: checkpoint folders or .gguf files of one shape; the first decides dtype and configuration.
        target: gets `model.safetensors` (or shards and an index); `save_config` writes the rest.
        method: merges one tensor; called with the tensor's Hugging Face name.

    Returns:
        The shape and the dtype of the result.

    Raises:
        NurtureError: the models differ in shape or parts; the message names both files.
    """
    for path in paths:
        if (found := checkpoint_head(path)) != head:
            kinds = {"lm": "a language model", "scalar": "a reward or value model"}
            raise NurtureError(
                f"{path}: is {kinds[found]}, and {kinds[head]} is to be merged. Models of one kind can."
            )
    configs = [read_config(path) for path in paths]
    for path, config in zip(paths[1:], configs[1:], strict=True):
        _check_same_shape(paths[0], configs[0].model_dump(), path, config.model_dump())
    pieces = [piece for stack in parameter_pieces(configs[0], head).values() for piece in stack]
    with ExitStack() as stack:
        sources = [stack.enter_context(open_checkpoint(path)) for path in paths]
        for path, source in zip(paths, sources, strict=True):
            for piece in pieces:
                if piece.name not in source.names():
                    raise NurtureError(f"{path}: tensor '{piece.name}' is missing, which {paths[0]} has")
        dtype = sources[0].tensor(pieces[-1].name).dtype

        def merged() -> Iterator[tuple[str, Tensor]]:
            for piece in pieces:
                tensors = [source.tensor(piece.name).float() for source in sources]
                yield piece.name, method(piece.name, tensors).to(dtype)

        write_streamed(target, {piece.name: piece.shape for piece in pieces}, merged(), dtype)
    return configs[0], dtype


_MAY_DIFFER = ("max_position", "rope_theta", "yarn", "init_std", "norm_epsilon")


def _check_same_shape(
    first: Path, expected: Mapping[str, object], other: Path, found: Mapping[str, object]
) -> None:
    differing = [key for key, value in expected.items() if found.get(key) != value]
    if fatal := [key for key in differing if key not in _MAY_DIFFER]:
        facts = ", ".join(f"{key} is {found.get(key)} instead of {expected[key]}" for key in fatal)
        raise NurtureError(f"{other}: cannot be merged with {first}: {facts}. Models of one shape can.")
    if differing:
        log.warning(
            "%s and %s differ in %s; the result has what %s has", first, other, ", ".join(differing), first
        )


_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_streamed(
    target: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as safetensors while they are made: the header needs their shapes only.

    Args:
        shapes: every tensor's, in the order they come.
        tensors: (name, tensor), in that order.
        shard_bytes: largest size of one file.

    Raises:
        NurtureError: the disk is full or not writable.
    """
    make_directory(target)
    sizes = {name: dtype.itemsize * int(torch.Size(shape).numel()) for name, shape in shapes.items()}

    def write(file: Path, names: Sequence[str]) -> None:
        atomic_write(file, partial(_write_file, names, shapes, sizes, tensors, dtype))

    write_shards(target, sizes, shard_bytes, write)


def _write_file(
    names: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    path: Path,
) -> None:
    """Write one file: the header's length (8 bytes), the header (JSON), the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        offsets = [start, start + sizes[name]]
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": offsets}
        start += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected in names:
            name, tensor = next(tensors)
            if name != expected or tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(
                    f"expected tensor '{expected}' {list(shapes[expected])}, got '{name}' {list(tensor.shape)}"
                )
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
