"""Low-rank adapters: train a small correction of each matrix in the blocks, and leave the matrix itself alone.

A matrix W (out, in) becomes W + alpha/rank * B A with A (rank, in) drawn at random and B (out, rank) zero, so that the
model starts as it was. Only A and B are trained: moments and gradients shrink to them, and one copy of the weights
serves as policy (adapters on) and as reference (`adapters_off`). The correction is applied to the weight, not beside
it: whoever reads `linear.weight`, the engine's decoder too, reads the corrected matrix. `merged_weights` writes it out.
The gradient of a whole matrix, a third of the work of training, is never made (`AdaptableLinear`).

Main failure mode: a rank too small for the task; the loss then stays above that of full training.

Source: Hu et al., arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from nurture.model.config import ModelConfig
from nurture.recipe import Section

_ORIGINAL = ".parametrizations.weight.original"


class LoraConfig(Section):
    """Train low-rank adapters instead of the weights."""

    rank: PositiveInt = 16
    """Rank of the correction."""
    alpha: PositiveFloat = 32.0
    """The correction is scaled by alpha / rank, so that a good learning rate does not depend on the rank."""
    targets: tuple[Literal["qkv", "out", "gate_up", "down"], ...] = ("qkv", "out", "gate_up", "down")
    """Matrices of each block that get an adapter."""
    layers: PositiveInt | None = None
    """Only the last so many blocks get adapters, and the gradient stops there; by default all do."""


class Adapter(nn.Module):
    """The correction of one matrix."""

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        """Draw A from torch's global generator."""
        super().__init__()
        rows, columns = weight.shape
        self.scale = config.alpha / config.rank
        self.enabled = True
        self.down = nn.Parameter(torch.empty(config.rank, columns, dtype=weight.dtype, device=weight.device))
        self.up = nn.Parameter(weight.new_zeros(rows, config.rank))
        nn.init.normal_(self.down, std=columns**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the corrected matrix, or `weight` itself while adapters are off."""
        return weight + self.scale * (self.up @ self.down) if self.enabled else weight


class AdaptableLinear(nn.Linear):
    """A matrix without bias that may get an adapter; trained, it makes the adapter's gradients alone."""

    def forward(self, input: Tensor) -> Tensor:
        """Return x W'^T, (..., out), for x (..., in) and the corrected matrix W'."""
        if not (torch.is_grad_enabled() and parametrize.is_parametrized(self, "weight")):
            return super().forward(input)
        corrected = cast(Any, self.parametrizations).weight
        original, adapter = corrected.original, corrected[0]
        if not adapter.enabled or isinstance(original, DTensor):
            return super().forward(input)
        return _CorrectedProduct.apply(input, original, adapter.down, adapter.up, adapter.scale)


class _CorrectedProduct(torch.autograd.Function):
    """x W'^T with W' = W + s B A, the forward pass of the corrected matrix itself.

    For y = x W'^T and a gradient g of y: dx = g W', dB = s g^T (x A^T), dA = s (g B)^T x. What torch derives goes
    through dW' = g^T x, as much work as the forward pass, to reach the same dB = s dW' A^T and dA = s B^T dW'.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, original: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        weight = original + scale * (up @ down)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, down, up = ctx.saved_tensors
        scaled = ctx.scale * gradient.flatten(0, -2)
        rows = x.flatten(0, -2)
        into_down = (scaled @ up.to(scaled.dtype)).T @ rows
        into_up = scaled.T @ (rows @ down.to(rows.dtype).T)
        into_x = gradient @ weight if ctx.needs_input_grad[0] else None
        return into_x, None, into_down.to(down.dtype), into_up.to(up.dtype), None


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze `model` and give its target matrices trainable adapters; a scalar head stays trainable, with an adapter.

    The head's adapter is a full correction (its rank is 1 anyhow), so that `adapters_off` restores it too.
    """
    model.requires_grad_(False)
    blocks = 1 + max(map(_block_of, dict(model.named_modules())))
    first = blocks - min(config.layers or blocks, blocks)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        inside = _block_of(name) >= first and name.rsplit(".", 1)[-1] in config.targets
        if inside or module.out_features == 1:
            parametrize.register_parametrization(module, "weight", Adapter(module.weight, config))


def adapter_count(shape: ModelConfig, config: LoraConfig) -> int:
    """Return the parameters that `add_adapters` adds to a model of `shape`: rank (rows + columns) of each matrix."""
    width, heads = shape.width, shape.heads * shape.head_width
    rows_and_columns = {
        "qkv": heads + 2 * shape.kv_heads * shape.head_width + width,
        "out": width + heads,
        "gate_up": 2 * shape.ffn_width + width,
        "down": width + shape.ffn_width,
    }
    block = sum(rows_and_columns[target] for target in config.targets)
    return config.rank * min(config.layers or shape.layers, shape.layers) * block


def _block_of(name: str) -> int:
    """Return the number of the block that a module of this name is in, -1 where it is in none."""
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def adapters(model: nn.Module) -> list[Adapter]:
    """Return the adapters of `model`; none if it is trained whole."""
    return [module for module in model.modules() if isinstance(module, Adapter)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Yield `model` as it was before its adapters were added.

    Raises:
        ValueError: it has none, so that it would not be a reference but the policy itself.
    """
    switched = adapters(model)
    if not switched:
        raise ValueError("the model has no adapters to switch off")
    for adapter in switched:
        adapter.enabled = False
    try:
        yield model
    finally:
        for adapter in switched:
            adapter.enabled = True


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under the names of a model without adapters, corrections added in.

    Args:
        model: whose adapters know their scale.
        weights: its (whole) state dict.
    """
    scales = {
        name.removesuffix(".0"): module.scale
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    }
    merged = {}
    for name, tensor in weights.items():
        if ".parametrizations." not in name:
            merged[name] = tensor
        elif name.endswith(_ORIGINAL):
            place = name.removesuffix(".original")
            up, down = weights[f"{place}.0.up"], weights[f"{place}.0.down"]
            merged[name.removesuffix(_ORIGINAL) + ".weight"] = tensor + scales[place] * (up @ down)
    return merged
