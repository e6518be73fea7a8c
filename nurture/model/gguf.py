"""Models from GGUF files (llama.cpp's format): Llama-family weights, dequantised, and the tokenizer beside them.

A GGUF file is one checkpoint in one file, usually quantised to a few bits a weight: what PyPI and laptops have where
there is no hub. Weights become float32; nothing is written in this format.

The trap: llama.cpp rotates neighbouring pairs (2i, 2i + 1) where Hugging Face rotates (i, i + H/2), so its files hold
the rows of the query and key matrices in another order. `unpermute` restores it. Forgetting it gives a model that
still writes plausible text, so the test compares logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from nurture.errors import NurtureError, did_you_mean
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.model.weights import Head, TensorSource, empty_model, fill_model
from nurture.tokenizer import Tokenizer

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL, _USER_DEFINED = 3, 4  # token types of the format


def load_gguf(
    path: str | Path,
    *,
    head: Head = "lm",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Transformer, Tokenizer]:
    """Load a Llama-family GGUF file.

    Returns:
        (the model with dequantised weights, its tokenizer with the file's chat template).

    Raises:
        NurtureError: the `gguf` package is missing, or the file is missing, damaged, or of another architecture.
    """
    file = _GgufFile(Path(path))
    try:
        config = _model_config(file)
    except (TypeError, ValueError) as error:  # values no Llama has, such as one head count a layer
        raise NurtureError(f"{path}: the metadata describe no model that can be loaded ({error})") from error
    model = empty_model(config, head, dtype, device)
    fill_model(model, _GgufTensors(file, config))
    return model, _tokenizer(file)


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file with the file's chat template. Errors as in `load_gguf`."""
    return _tokenizer(_GgufFile(Path(path)))


def read_gguf_config(path: str | Path) -> ModelConfig:
    """Read the shape of a GGUF file's model. Errors as in `load_gguf`."""
    return _model_config(_GgufFile(Path(path)))


def open_gguf(path: str | Path) -> TensorSource:
    """Open a GGUF file's tensors, dequantised when they are read. Errors as in `load_gguf`."""
    file = _GgufFile(Path(path))
    return _GgufTensors(file, _model_config(file))


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows (heads * H, D) of a query or key matrix from neighbouring pairs to half-split pairs."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


class _GgufFile:
    """Metadata and tensors of a file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise NurtureError(f"{path}: reading GGUF files needs `pip install 'nurture[gguf]'`") from error
        if not path.is_file():
            raise NurtureError(f"{path}: no such file")
        self.path = path
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader fails on damaged files in whatever way the bytes suggest
            raise NurtureError(
                f"{path}: not a whole GGUF file ({type(error).__name__}: {error}); download it again"
            ) from error
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, or `default` where the key is absent."""
        field = self.fields.get(key)
        value = default if field is None else field.contents()
        # Stored as float32: give 1e-05 back as 1e-05, not as 9.99999975e-06.
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """Return a metadata value that must be there."""
        if key not in self.fields:
            raise NurtureError(
                f"{self.path}: metadata key '{key}' is missing{did_you_mean(key, self.fields)}"
            )
        return self.get(key)

    def dequantized(self, name: str) -> Tensor:
        """Return a tensor as float32, (out, in)."""
        stored = self.tensors[name]
        try:
            return torch.from_numpy(self._dequantize(stored.data, stored.tensor_type).copy())
        except Exception as error:
            kind = stored.tensor_type.name
            raise NurtureError(
                f"{self.path}: tensor '{name}' of type {kind} cannot be read ({error})"
            ) from error


class _GgufTensors:
    """A file's tensors under their Hugging Face names, in Hugging Face's order of rows."""

    def __init__(self, file: _GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
        self._ours = {_hugging_face_name(name): name for name in file.tensors}

    def names(self) -> set[str]:
        return set(self._ours)

    def file_of(self, name: str) -> str:
        return str(self._file.path)

    def shape(self, name: str) -> tuple[int, ...]:
        # The format lists the fastest dimension first.
        return tuple(int(size) for size in reversed(self._file.tensors[self._ours[name]].shape))

    def tensor(self, name: str) -> Tensor:
        stored = self._ours[name]
        weight = self._file.dequantized(stored)
        part = stored.split(".")[-2]
        return unpermute(weight, self._heads[part]) if part in self._heads else weight


def _hugging_face_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    block, layer, *rest = name.split(".")
    if block == "blk" and len(rest) == 2 and rest[0] in _NAMES:
        return f"model.layers.{layer}.{_NAMES[rest[0]]}.{rest[1]}"
    return name  # `fill_model` refuses what it does not know


def _model_config(file: _GgufFile) -> ModelConfig:
    architecture = file.need("general.architecture")
    if architecture != "llama":
        raise NurtureError(
            f"{file.path}: architecture '{architecture}' is not supported as GGUF. Supported: llama"
        )
    if file.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.tensors:
        raise NurtureError(f"{file.path}: this file scales its rotations, which is not supported as GGUF")
    if "token_embd.weight" not in file.tensors:
        raise NurtureError(f"{file.path}: tensor 'token_embd.weight' is missing; the file is incomplete")
    heads = file.need("llama.attention.head_count")
    width = file.need("llama.embedding_length")
    return ModelConfig(
        vocab_size=int(file.tensors["token_embd.weight"].shape[-1]),
        width=width,
        layers=file.need("llama.block_count"),
        heads=heads,
        kv_heads=file.get("llama.attention.head_count_kv", heads),
        head_width=file.get("llama.attention.key_length", width // heads),
        ffn_width=file.need("llama.feed_forward_length"),
        max_position=file.need("llama.context_length"),
        rope_theta=file.get("llama.rope.freq_base", 10_000.0),
        norm_epsilon=file.need("llama.attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in file.tensors,
    )


# ---- tokenizer --------------------------------------------------------------------------------------------------

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(kind: str, path: Path) -> pre_tokenizers.PreTokenizer:
    """Return how a tokenizer named `kind` in the file cuts text into words."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if kind in ("gpt-2", "default"):
        return byte_level
    digits = {"llama-bpe": r"\p{N}{1,3}", "llama3": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
    if kind not in digits:
        known = ("smollm", "gpt-2", *digits)
        raise NurtureError(
            f"{path}: tokenizer.ggml.pre '{kind}' is not supported. Supported: {', '.join(known)}"
        )
    words = Regex(_WORDS.replace("DIGITS", digits[kind]))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _tokenizer(file: _GgufFile) -> Tokenizer:
    kind = file.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise NurtureError(
            f"{file.path}: tokenizer.ggml.model '{kind}' is not supported. Supported: gpt2 (byte-level)"
        )
    tokens: list[str] = file.need("tokenizer.ggml.tokens")
    types: list[int] = file.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ")) for merge in file.need("tokenizer.ggml.merges")]
    words = file.get("tokenizer.ggml.pre", "default")
    backend = Backend(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            # Llama 3's words that are tokens already are not built up by merges.
            ignore_merges=words in ("llama-bpe", "llama3"),
        )
    )
    backend.pre_tokenizer = _pre_tokenizer(words, file.path)
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])

    def named(key: str) -> str | None:
        index = file.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if index is not None and index < len(tokens) else None

    return Tokenizer.from_parts(
        backend,
        chat_template=file.get("tokenizer.chat_template"),
        bos_token=named("bos"),
        eos_token=named("eos"),
        pad_token=named("padding"),
    )
