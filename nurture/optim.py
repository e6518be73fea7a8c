"""Optimizers, their parameter groups, and learning-rate schedules.

AdamW (arXiv 1711.05101) on everything, or Muon (arXiv 2502.16982) on the matrices inside the blocks and AdamW on the
rest: the usual split. Weight decay acts on the blocks' matrices and an untied output matrix, never on
embeddings or norms. A schedule is a pure function from the step to a factor on every learning rate, so a resumed
run needs nothing but its step.

Muon here is torch's but for its products: matrices of one shape go through Newton-Schulz together, in bfloat16 only
where the processor multiplies that natively. torch's own always takes bfloat16, which made a small model's whole step
ten times slower on a processor without it.

Schedules: warmup-stable-decay (MiniCPM, arXiv 2404.06395), cosine (arXiv 1608.03983), linear, constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nurture.recipe import Section
from nurture.runtime import has_fast_bf16


class OptimizerConfig(Section):
    """Which optimizer, and its constants."""

    chosen_by: ClassVar[str | None] = "kind"

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon on the blocks' matrices with adamw on everything else."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of AdamW's groups."""
    muon_learning_rate: PositiveFloat = 5e-3
    """Peak learning rate of Muon's matrices, scaled per matrix as AdamW updates are (arXiv 2502.16982)."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; embeddings and norms have none."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of Muon."""
    clip_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""


class ScheduleConfig(Section):
    """How the learning rate moves over the steps of a stage."""

    chosen_by: ClassVar[str | None] = "kind"
    same_in_other_words: ClassVar[tuple[str, ...]] = ("warmup", "warmup_steps")

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """warmup-stable-decay, cosine, linear or constant; all after the warmup."""
    warmup: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps that rise linearly from 0 to the peak."""
    warmup_steps: PositiveInt | None = None
    """The same in steps; wins over `warmup`."""
    decay: float = Field(default=0.1106, ge=0, le=1)
    """wsd: share of the steps, at the end, that fall (SmolLM3: 522,000 of 4,720,000)."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """wsd: fall linearly, or as 1 - sqrt (arXiv 2405.18392)."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Factor that the decay ends at."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup ({self.warmup}) and decay ({self.decay}) together exceed the whole stage (1)"
            )
        return self


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate of update `step` (0 <= step < steps).

    The warmup of W updates uses 1/W, 2/W ... 1: no update is wasted at 0. The decay of N updates starts at 1 and would
    reach `final` at update `steps`, the one after the last, so the last update is not wasted either.
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup * steps)
    warmup = min(warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    decay = round(config.decay * steps) if config.kind == "wsd" else steps - warmup
    start = max(steps - decay, warmup)
    if step < start:
        return 1.0
    progress = (step - start) / (steps - start)
    if config.kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.kind == "wsd" and config.decay_shape == "sqrt":
        shape = 1 - math.sqrt(progress)
    else:
        shape = 1 - progress
    return config.final + (1 - config.final) * shape


class Optimizer:
    """One or two torch optimizers that step together and share a schedule."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        """Remember every group's peak learning rate."""
        self.parts = parts
        for group in self.groups():
            group.setdefault("peak", float(group["lr"]))

    def groups(self) -> Iterable[dict[str, Any]]:
        """Yield the parameter groups of all parts."""
        for part in self.parts:
            yield from part.param_groups

    def set_factor(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self.groups():
            rate = group["peak"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self) -> None:
        """Update all parameters from their gradients."""
        for part in self.parts:
            part.step()
        # torch's fused kernels write without counting it, and whoever keeps a copy (the engine) would not notice.
        torch.autograd.graph.increment_version(self.parameters)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, of all parts."""
        return [parameter for group in self.groups() for parameter in group["params"]]


class Muon(torch.optim.Muon):
    """torch's Muon (arXiv 2502.16982; the same states and settings), with few and large products."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        """Take the matrices. A step has the root mean square of AdamW's, so AdamW's learning rates serve."""
        super().__init__(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices from their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            rate, momentum = float(group["lr"]), group["momentum"]
            updates: list[Tensor] = []
            for gradient, kept in zip(gradients, momenta, strict=True):
                kept.lerp_(gradient, 1 - momentum)
                updates.append(gradient.lerp(kept, momentum) if group["nesterov"] else kept)
            for chosen in alike(parameters):
                shape = parameters[chosen[0]].shape
                directions = self._orthogonalise([updates[index] for index in chosen], group)
                step_size = rate * 0.2 * math.sqrt(max(shape))  # equation 4: as large as AdamW's
                for index, direction in zip(chosen, directions, strict=True):
                    parameters[index].mul_(1 - rate * group["weight_decay"])
                    parameters[index].add_(direction, alpha=-step_size)
        return loss

    @staticmethod
    def _orthogonalise(updates: list[Tensor], group: dict[str, Any]) -> Iterable[Tensor]:
        x = torch.stack(updates) if len(updates) > 1 else updates[0]
        dtype = torch.bfloat16 if has_fast_bf16(x.device) else torch.float32
        x = orthogonalise(x.to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
        return x.unbind() if len(updates) > 1 else (x,)


_MOST_TOGETHER = 2**22
"""Numbers in matrices that are stacked: beyond that, products are large enough, and the copies are not."""


def alike(matrices: list[Tensor]) -> list[list[int]]:
    """Return the places of matrices that can be stacked: of one shape, on one device, few numbers in all.

    Sharded ones stay by themselves: their products are sums over processes.
    """
    found: dict[Any, list[list[int]]] = {}
    for place, matrix in enumerate(matrices):
        sharded = isinstance(matrix, DTensor)
        most = 1 if sharded else max(1, _MOST_TOGETHER // matrix.numel())
        stacks = found.setdefault((matrix.shape, matrix.device, sharded), [[]])
        if len(stacks[-1]) == most:
            stacks.append([])
        stacks[-1].append(place)
    return [stack for stacks in found.values() for stack in stacks]


def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """Return nearly the orthogonal factor of every matrix: singular values come out at 0.7 to 1.2 (Newton-Schulz).

    Args:
        x: (..., M, N), of the type to compute in.
        coefficients: a, b, c of the step X <- aX + (bA + cA^2)X with A = XX^T (Jordan's Muon, of 2024).
        steps: how many.
        epsilon: least norm that is divided by.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.mT
        if x.ndim == 3:  # the sums are melted into the products
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Sort the model's trainable parameters into groups and build the optimizer for them."""
    matrices, others, undecayed = parameter_groups(model)
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "fused": True,
    }
    decayed = others if config.kind == "muon" else [*matrices, *others]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW([g for g in groups if g["params"]], **adam)]
    if config.kind == "muon" and matrices:
        muon = Muon(matrices, config.muon_learning_rate, config.muon_momentum, config.weight_decay)
        parts.append(muon)
    return Optimizer(parts)


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable (matrices inside blocks, other decayed matrices, parameters without decay)."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices, others, undecayed = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            undecayed.append(parameter)
        elif "blocks." in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return matrices, others, undecayed
