"""GGUF files written here, tiny; the real model is tests/parity/test_gguf.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from nurture.errors import NurtureError
from nurture.model.config import ModelConfig
from nurture.model.gguf import load_gguf, unpermute
from nurture.model.hugging_face import load_model, load_tokenizer
from nurture.model.transformer import Transformer
from nurture.model.weights import checkpoint_tensors

gguf = pytest.importorskip("gguf")

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "he", "hel"]
MERGES = ["h e", "he l"]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def build(tied: bool = True) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(TOKENS),
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn_width=96,
        norm_epsilon=1e-5,
        rope_theta=5000.0,
        max_position=64,
        tied_embeddings=tied,
    )
    return Transformer(config)


def write(path: Path, model: Transformer, *, quantise: bool = False, drop: str = "", **metadata: Any) -> Path:
    """Write `model` as llama.cpp's converter does: rows of q and k in neighbouring pairs."""
    config = model.config
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(metadata.pop("heads", config.heads))
    writer.add_head_count_kv(config.kv_heads)
    writer.add_context_length(config.max_position)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_tokenizer_model(metadata.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(metadata.pop("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    if metadata.pop("scaled", False):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint_tensors(config, "lm", parameters):
        stored = _stored_name(name)
        if stored == drop:
            continue
        for part, heads in (("attn_q", config.heads), ("attn_k", config.kv_heads)):
            if part in stored:
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        array = np.ascontiguousarray(tensor.numpy())
        if quantise and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(part)]}.{kind}"


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_weights_come_back_exactly(tied: bool, tmp_path: Path) -> None:
    model = build(tied)
    again, _ = load_gguf(write(tmp_path / "model.gguf", model))
    assert again.config == model.config
    for (name, left), (_, right) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(left, right), name
    token_ids = torch.randint(len(TOKENS), (2, 20))
    torch.testing.assert_close(again(token_ids), model(token_ids))


def test_quantised_weights_are_close(tmp_path: Path) -> None:
    model = build()
    again, _ = load_gguf(write(tmp_path / "model.gguf", model, quantise=True), dtype=torch.bfloat16)
    expected, weight = model.blocks[0].attention.qkv.weight, again.blocks[0].attention.qkv.weight
    assert weight.dtype == torch.bfloat16
    assert 0 < (weight.float() - expected).norm() / expected.norm() < 0.02


def test_load_model_takes_the_file_and_a_scalar_head(tmp_path: Path) -> None:
    reward_model = load_model(write(tmp_path / "model.gguf", build()), head="scalar")
    assert reward_model.output_weight.shape == (1, 64)
    assert torch.equal(reward_model.embedding.weight, build().embedding.weight)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_tokenizer(pre: str, tmp_path: Path) -> None:
    _, tokenizer = load_gguf(write(tmp_path / "model.gguf", build(), pre=pre))
    assert load_tokenizer(tmp_path / "model.gguf").fingerprint == tokenizer.fingerprint
    text = "hello <|im_end|> wörld 123\n"
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert token_ids[0] == TOKENS.index("hel")
    assert min(token_ids) > 2, "control tokens are not forged by text"
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "he"}])
    assert prompt == [1, TOKENS.index("he"), 2]
    assert 2 in tokenizer.stop_token_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba' is not supported as GGUF"),
        ({"scaled": True}, "scales its rotations"),
        ({"tokenizer": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported"),
        ({"drop": "blk.1.ffn_up.weight"}, "tensor 'model.layers.1.mlp.up_proj.weight' is missing"),
        ({"drop": "token_embd.weight"}, "tensor 'token_embd.weight' is missing"),
        ({"heads": [4, 4]}, "describe no model"),
        ({"heads": 2}, r"'model.layers.0.self_attn.k_proj.weight' has shape \[32, 64\]"),
    ],
)
def test_unsupported_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(NurtureError, match=rf"model\.gguf.*{message}"):
        load_gguf(write(tmp_path / "model.gguf", build(), **changes))


def test_unpermute_by_hand() -> None:
    """Neighbours (0, 1), (2, 3) become halves: the firsts of all pairs, then the seconds; head by head."""
    stored = torch.arange(8.0)[:, None]
    assert unpermute(stored, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NurtureError, match=r"model.gguf: no such file"):
        load_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_damaged_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(NurtureError, match=r"model.gguf: not a whole GGUF file"):
        load_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_truncated_file(share: float, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", build())
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(NurtureError, match=r"model.gguf: not a whole GGUF file"):
        load_gguf(file)
