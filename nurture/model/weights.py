"""Which checkpoint tensors make up which parameter, and filling a model from any store of such tensors.

Hugging Face names are the common language: a safetensors directory speaks it, and the GGUF reader translates into it.
A fused parameter (`qkv`, `gate_up`) is several checkpoint tensors stacked by rows. Tensors are read one at a time, so
loading needs little more memory than the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from nurture.errors import NurtureError, did_you_mean
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer

Head = Literal["lm", "scalar"]
SCORE = "score.weight"
LM_HEAD = "lm_head.weight"


class TensorSource(Protocol):
    """A store of checkpoint tensors under their Hugging Face names."""

    def names(self) -> set[str]:
        """Return the name of every tensor."""
        ...

    def file_of(self, name: str) -> str:
        """Return the file that holds, or should hold, the tensor, for messages."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape without reading the tensor."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Read the tensor."""
        ...


class Piece(NamedTuple):
    """Rows [start, start + shape[0]) of a parameter, as one checkpoint tensor."""

    name: str
    start: int
    shape: tuple[int, ...]


def parameter_pieces(config: ModelConfig, head: Head = "lm") -> dict[str, list[Piece]]:
    """Return parameter name -> the checkpoint tensors it consists of, in order of rows."""
    width, head_width = config.width, config.head_width
    q_rows, kv_rows = config.heads * head_width, config.kv_heads * head_width
    pieces = {"embedding.weight": _stack(("model.embed_tokens.weight", config.vocab_size, width))}
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        pieces[f"{ours}.attention_norm.weight"] = _stack((f"{theirs}.input_layernorm.weight", width))
        pieces[f"{ours}.attention.qkv.weight"] = _stack(
            (f"{theirs}.self_attn.q_proj.weight", q_rows, width),
            (f"{theirs}.self_attn.k_proj.weight", kv_rows, width),
            (f"{theirs}.self_attn.v_proj.weight", kv_rows, width),
        )
        pieces[f"{ours}.attention.out.weight"] = _stack((f"{theirs}.self_attn.o_proj.weight", width, q_rows))
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                pieces[f"{ours}.attention.{norm}.weight"] = _stack(
                    (f"{theirs}.self_attn.{norm}.weight", head_width)
                )
        pieces[f"{ours}.ffn_norm.weight"] = _stack((f"{theirs}.post_attention_layernorm.weight", width))
        pieces[f"{ours}.ffn.gate_up.weight"] = _stack(
            (f"{theirs}.mlp.gate_proj.weight", config.ffn_width, width),
            (f"{theirs}.mlp.up_proj.weight", config.ffn_width, width),
        )
        pieces[f"{ours}.ffn.down.weight"] = _stack(
            (f"{theirs}.mlp.down_proj.weight", width, config.ffn_width)
        )
    pieces["final_norm.weight"] = _stack(("model.norm.weight", width))
    if head == "scalar":
        pieces["output.weight"] = _stack((SCORE, 1, width))
    elif not config.tied_embeddings:
        pieces["output.weight"] = _stack((LM_HEAD, config.vocab_size, width))
    return pieces


def _stack(*tensors: tuple[str | int, ...]) -> list[Piece]:
    """Lay tensors (name, rows, ...) one under the other."""
    pieces, start = [], 0
    for name, *shape in tensors:
        pieces.append(Piece(str(name), start, tuple(int(size) for size in shape)))
        start += int(shape[0])
    return pieces


def empty_model(
    config: ModelConfig, head: Head, dtype: torch.dtype, device: str | torch.device
) -> Transformer:
    """Return a model whose weights are allocated but not drawn; `fill_model` sets every one of them."""
    with torch.device("meta"):
        model = Transformer(config, head)
    model.to(dtype).to_empty(device=device)
    return model


@torch.no_grad()
def fill_model(model: Transformer, source: TensorSource) -> None:
    """Copy a checkpoint into `model`, casting to the model's dtype.

    A scalar head that the checkpoint lacks is drawn fresh; a language-model head is dropped when a scalar one is asked.

    Raises:
        NurtureError: a tensor is missing, unexpected or misshapen; the message names file and tensor.
    """
    pieces = parameter_pieces(model.config, model.head)
    available = source.names()
    fresh_head = model.head == "scalar" and SCORE not in available
    if fresh_head:
        del pieces["output.weight"]
        model.reset_scalar_head()
    _check_names({piece.name for stack in pieces.values() for piece in stack}, available, source)
    parameters = dict(model.named_parameters())
    for name, stack in pieces.items():
        for piece in stack:
            shape = source.shape(piece.name)
            if shape != piece.shape:
                raise NurtureError(
                    f"{source.file_of(piece.name)}: tensor '{piece.name}' has shape {list(shape)}, but the model's"
                    f" configuration asks for {list(piece.shape)}; the weights belong to another configuration"
                )
            rows = parameters[name][piece.start : piece.start + piece.shape[0]]
            rows.copy_(source.tensor(piece.name))


def _check_names(wanted: set[str], available: set[str], source: TensorSource) -> None:
    """Refuse a checkpoint with too few tensors or with tensors that this model would silently ignore."""
    for name in sorted(wanted - available):
        raise NurtureError(
            f"{source.file_of(name)}: tensor '{name}' is missing ({len(wanted - available)} of {len(wanted)} tensors"
            f" are); the checkpoint is incomplete or of another configuration.{did_you_mean(name, available)}"
        )
    # A tied checkpoint may repeat the embedding as lm_head, and old ones carry the rotation frequencies.
    unexpected = sorted(n for n in available - wanted - {LM_HEAD} if not n.endswith("rotary_emb.inv_freq"))
    if SCORE in unexpected:
        raise NurtureError(
            f"{source.file_of(SCORE)}: this is a reward or value model (it has '{SCORE}'): it scores texts and writes"
            " none. Choose a language model, such as the stage it started from; in Python, head='scalar' loads it."
        )
    if unexpected:
        raise NurtureError(
            f"{source.file_of(unexpected[0])}: unexpected tensor '{unexpected[0]}' ({len(unexpected)} in all); the"
            f" model has no such part, so its outputs would be wrong without it"
        )


def checkpoint_tensors(
    config: ModelConfig, head: Head, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for every checkpoint tensor; the tensors are views of `parameters`."""
    for name, stack in parameter_pieces(config, head).items():
        for piece in stack:
            yield piece.name, parameters[name].detach()[piece.start : piece.start + piece.shape[0]]
