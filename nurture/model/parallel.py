"""Activation checkpointing, compilation and sharding, applied to a model from outside, in this one order.

The model knows of none of them: what it computes is the same. Blocks are compiled one by one (they are alike, so one
compilation serves all) and sharded one by one, so that only one block's weights are whole at a time.

Source: FSDP2, `torch.distributed.fsdp.fully_shard`; arXiv 2304.11277.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from nurture.model.lora import merged_weights
from nurture.model.transformer import Transformer
from nurture.model.weights import empty_model
from nurture.runtime import Execution


def prepare(model: Transformer, execution: Execution) -> Transformer:
    """Move `model` to the device and apply what `execution` decided. Returns the same object, ready to train."""
    model.to(execution.device)
    model.checkpoint_activations = execution.checkpoint_activations
    if execution.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    if execution.processes.world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(execution.device.type, (execution.processes.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole_weights(model: Transformer) -> dict[str, Any]:
    """Return the unsharded weights of `model`, adapters merged, in every process. All must call it."""
    weights: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return merged_weights(model, weights)


def whole_model(model: Transformer, execution: Execution) -> Transformer | None:
    """Return an unsharded copy of `model` on the CPU in the main process, None in the others. All must call it.

    Adapters are merged into the weights.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    if not execution.processes.is_main:
        return None
    copy = empty_model(model.config, model.head, torch.float32, "cpu")
    copy.load_state_dict(merged_weights(model, weights))
    return copy.eval()
