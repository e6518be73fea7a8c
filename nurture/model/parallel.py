"""Tensor parallelism, activation checkpointing, compilation and sharding: applied from outside, in this order.

What the model computes is the same. Blocks are compiled one by one (they are alike, so one compilation serves all) and
sharded one by one, so that only one block's weights are whole at a time.

Tensor parallelism cuts `qkv` and `gate_up` by columns and `out` and `down` by rows (Megatron-LM, arXiv 1909.08053), so
a process has some heads and some features; norms and the residual stream are cut by tokens between them, and so is the
head (sequence parallelism, arXiv 2205.05198). The embedding is cut by vocabulary. FSDP2 then shards each part over the
processes with other rows: a two-dimensional mesh.

Source: FSDP2, `torch.distributed.fsdp.fully_shard`; arXiv 2304.11277.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from nurture.errors import NurtureError
from nurture.model.lora import adapters, merged_weights
from nurture.model.transformer import Block, Transformer
from nurture.model.weights import empty_model
from nurture.runtime import Execution
from nurture.types import IGNORE_INDEX


def prepare(model: Transformer, execution: Execution) -> Transformer:
    """Move `model` to the device and apply what `execution` decided. Returns the same object, ready to train."""
    model.to(execution.device)
    mesh = execution.processes.mesh
    if mesh is not None and execution.processes.tensor_parallel > 1:
        _cut_matrices(model, mesh["tensor"])
    model.checkpoint_activations = execution.checkpoint_activations
    model.compiled = execution.compile
    if execution.compile:
        # On a CPU one compilation serves any number of rows of a length; on a GPU every shape has its own. Beyond
        # torch's limit of 8 a new shape would run uncompiled, but not in a resumed run, which met fewer: other bits.
        # Nor may it matter which shape came first: sizes that were equal then are not taken for one and the same.
        torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
        torch.fx.experimental._config.use_duck_shape = False  # type: ignore[attr-defined]
        for block in model.blocks:
            block.compile(dynamic=execution.device.type == "cpu")
    if mesh is not None:
        # It warns of outputs that are views, which would be dangerous to change in place: nothing here does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        for block in model.blocks:
            fully_shard(block, mesh=mesh["rows"])
        fully_shard(model, mesh=mesh["rows"])
    return model


def _cut_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Give each process of `mesh` its part of every matrix.

    Raises:
        NurtureError: something does not divide by the processes, or the model has adapters.
    """
    parts, config = mesh.size(), model.config
    for field in ("heads", "kv_heads", "ffn_width", "vocab_size"):
        if getattr(config, field) % parts:
            raise NurtureError(
                f"execution.tensor_parallel is {parts}, which does not divide the model's {field}, "
                f"{getattr(config, field)}. Choose a number that divides heads, kv_heads, ffn_width and vocab_size."
            )
    if adapters(model):
        raise NurtureError("execution.tensor_parallel and lora do not go together: leave one of them out.")
    for name, parameter in model.named_parameters():
        order = row_order(model, name, parts)
        if order is not None:
            parameter.data = parameter.data[order.to(parameter.device)]
    columns, whole = Shard(1), Replicate()
    inside: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(columns, None, None, None, None),
            desired_input_layouts=(whole, None, None, None, None),
        ),
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=columns),
        "ffn_norm": SequenceParallel(),
        "ffn": PrepareModuleInput(input_layouts=(columns,), desired_input_layouts=(whole,)),
        "ffn.gate_up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=columns),
    }
    if config.qk_norm:
        inside["attention.q_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        inside["attention.k_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.heads //= parts
        block.attention.kv_heads //= parts
        parallelize_module(block, mesh, inside)
    outside: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=columns),
        "final_norm": SequenceParallel(),
    }
    parallelize_module(model, mesh, outside)
    if model.output is not None:
        placement = whole if model.head == "scalar" else Shard(0)
        model.output.weight = nn.Parameter(distribute_tensor(model.output.weight.data, mesh, [placement]))
    model.forward = _in_equal_columns(model.forward, parts)  # type: ignore[method-assign]


def _in_equal_columns(forward: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Pad rows at their end so that each process has as many columns, and cut the padding off what comes back."""
    fillers = {"document_ids": -1, "labels": IGNORE_INDEX, "position_ids": 0}

    def padded(token_ids: Tensor, **options: Any) -> Any:
        tokens = token_ids.shape[1]
        extra = -tokens % parts
        for name in fillers:
            if options.get(name) is not None:
                options[name] = F.pad(options[name], (0, extra), value=fillers[name])
        found = forward(F.pad(token_ids, (0, extra)), **options)
        whole = tuple(
            x[:, :tokens] if x.ndim else x for x in (found if isinstance(found, tuple) else (found,))
        )
        return whole if isinstance(found, tuple) else whole[0]

    return padded


def row_order(model: Transformer, name: str, parts: int) -> Tensor | None:
    """Return how the rows of a fused matrix are laid out for `parts` processes, None where they stay as they are.

    A process gets the queries, keys and values of its heads in one piece of `qkv`, gate and up of its features in one
    of `gate_up`.
    """
    config = model.config
    if name.endswith("attention.qkv.weight"):
        sizes = [config.heads, config.kv_heads, config.kv_heads]
        pieces = torch.arange(sum(sizes) * config.head_width).split([n * config.head_width for n in sizes])
    elif name.endswith("ffn.gate_up.weight"):
        pieces = torch.arange(2 * config.ffn_width).split(config.ffn_width)
    else:
        return None
    return torch.cat(
        [torch.cat(mine) for mine in zip(*(piece.chunk(parts) for piece in pieces), strict=True)]
    )


def _tensor_parts(model: Transformer) -> int:
    """Return how many processes share the heads of `model`."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    return model.config.heads // block.attention.heads


def whole_weights(model: Transformer, *, on_cpu: bool = False) -> dict[str, Any]:
    """Return the unsharded weights of `model`, adapters merged, in every process. All must call it.

    With `on_cpu` only the main process gets any.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=on_cpu)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    for name, weight in weights.items():
        order = row_order(model, name, _tensor_parts(model))
        if order is not None:
            weights[name] = weight[order.argsort().to(weight.device)]
    return merged_weights(model, weights) if weights else {}


def whole_model(model: Transformer, execution: Execution) -> Transformer | None:
    """Return an unsharded copy of `model` on the CPU in the main process, None in the others. All must call it.

    Adapters are merged into the weights.
    """
    weights = whole_weights(model, on_cpu=True)
    if not execution.processes.is_main:
        return None
    copy = empty_model(model.config, model.head, torch.float32, "cpu")
    copy.load_state_dict(weights)
    return copy.eval()
