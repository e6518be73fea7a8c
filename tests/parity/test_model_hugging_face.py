"""The decoder against transformers: same weights, same logits, in both directions and for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nurture.model.config import ModelConfig, YarnConfig
from nurture.model.hugging_face import load_model, save_model
from nurture.model.transformer import Transformer
from nurture.model.weights import checkpoint_tensors
from nurture.types import IGNORE_INDEX

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen3Config,
    SmolLM3Config,
)

V = 61
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE, num_hidden_layers=3),
    "llama tied": lambda: LlamaConfig(**SHAPE, num_hidden_layers=2, tie_word_embeddings=True),
    "llama multi-head": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, num_hidden_layers=2),
    "llama multi-query": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}, num_hidden_layers=2),
    "llama wide heads": lambda: LlamaConfig(**{**SHAPE, "head_dim": 32}, num_hidden_layers=2),
    "llama yarn": lambda: LlamaConfig(**SHAPE, num_hidden_layers=2, rope_parameters=YARN),
    "smollm3": lambda: SmolLM3Config(**SHAPE, num_hidden_layers=9),
    "smollm3 untied": lambda: SmolLM3Config(**SHAPE, num_hidden_layers=4, tie_word_embeddings=False),
    "smollm3 period 2": lambda: SmolLM3Config(
        **SHAPE, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], rope_parameters={"rope_theta": 5000.0}
    ),
    "smollm3 all rotate": lambda: SmolLM3Config(**SHAPE, num_hidden_layers=4, no_rope_layers=[1] * 4),
    "smollm3 yarn": lambda: SmolLM3Config(**SHAPE, num_hidden_layers=4, rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SHAPE, num_hidden_layers=3),
    "qwen3 tied": lambda: Qwen3Config(**SHAPE, num_hidden_layers=2, tie_word_embeddings=True),
    "qwen3 yarn": lambda: Qwen3Config(**SHAPE, num_hidden_layers=2, rope_parameters=YARN),
}
FAMILIES = ("llama", "smollm3", "qwen3")


def theirs(case: str, seed: int = 0) -> Any:
    """A transformers model with random weights, the norms' included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CASES[case]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def both(case: str, tmp_path: Path) -> tuple[Transformer, Any]:
    """The same weights here and in transformers, by way of a checkpoint that transformers saved."""
    peer = theirs(case)
    peer.save_pretrained(tmp_path / "theirs")
    return load_model(tmp_path / "theirs").eval(), peer


def random_tokens(rows: int, tokens: int) -> Tensor:
    return torch.randint(1, V, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_in_both_directions(case: str, tmp_path: Path) -> None:
    model, peer = both(case, tmp_path)
    token_ids = random_tokens(2, 40)
    expected = peer(token_ids).logits
    assert expected.std() > 0.1, "the comparison is only worth something with logits of some size"
    torch.testing.assert_close(model(token_ids), expected, rtol=0, atol=1e-4)
    assert (
        model.config.parameter_count() == sum(p.numel() for p in model.parameters()) == peer.num_parameters()
    )

    save_model(model, tmp_path / "ours", end_token_ids=[2, 5])
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    torch.testing.assert_close(again(token_ids).logits, expected, rtol=0, atol=1e-5)
    assert again.generation_config.eos_token_id == [2, 5]
    assert load_model(tmp_path / "ours").config == model.config


@torch.no_grad()
def test_nope_layers_have_no_rotation(tmp_path: Path) -> None:
    """With the opposite polarity (rotation only where (i + 1) % 4 == 0) the logits differ, so parity can tell."""
    model, peer = both("smollm3", tmp_path)
    assert [block.attention.rotates for block in model.blocks] == [True, True, True, False] * 2 + [True]
    for block in model.blocks:
        block.attention.rotates = not block.attention.rotates
    token_ids = random_tokens(2, 40)
    assert (model(token_ids) - peer(token_ids).logits).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_irrelevant(family: str, side: str, tmp_path: Path) -> None:
    model, peer = both(family, tmp_path)
    token_ids = random_tokens(3, 20)
    real = torch.ones(3, 20, dtype=torch.bool)
    for row, padding in enumerate((0, 5, 13)):
        columns = slice(0, padding) if side == "left" else slice(20 - padding, 20)
        real[row, columns] = False
    token_ids[~real] = 0
    position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
    document_ids = torch.where(real, 0, -1)
    logits = model(token_ids, position_ids=position_ids, document_ids=document_ids)
    expected = peer(token_ids, attention_mask=real.long(), position_ids=position_ids).logits
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-4)
    for row in range(3):
        alone = model(token_ids[row][real[row]][None])[0]
        torch.testing.assert_close(logits[row][real[row]], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_documents_equal_separate_passes(family: str, tmp_path: Path) -> None:
    model, peer = both(family, tmp_path)
    token_ids = random_tokens(2, 30)
    lengths = [[7, 1, 22], [15, 10, 5]]
    document_ids = torch.tensor([[n for n, size in enumerate(row) for _ in range(size)] for row in lengths])
    position_ids = torch.tensor([[t for size in row for t in range(size)] for row in lengths])
    packed = model(token_ids, position_ids=position_ids, document_ids=document_ids)
    torch.testing.assert_close(model(token_ids, document_ids=document_ids), packed)  # positions by default
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            document = slice(start, start + size)
            expected = peer(token_ids[row : row + 1, document]).logits[0]
            torch.testing.assert_close(packed[row, document], expected, rtol=0, atol=1e-4)
            start += size


@torch.no_grad()
def test_hidden_states_are_the_last_normalised_ones(tmp_path: Path) -> None:
    model, peer = both("qwen3", tmp_path)
    token_ids = random_tokens(2, 12)
    expected = peer.model(token_ids).last_hidden_state
    torch.testing.assert_close(model.hidden_states(token_ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["llama tied", "smollm3", "qwen3"])
def test_loss_and_gradients_equal(case: str, tmp_path: Path) -> None:
    model, peer = both(case, tmp_path)
    token_ids = random_tokens(2, 24)
    labels = torch.cat((token_ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)), dim=1)
    labels[0, 3:9] = IGNORE_INDEX
    total, token_losses = model(token_ids, labels=labels, reduction="sum")
    total.backward()
    expected_losses = torch.nn.functional.cross_entropy(
        peer(token_ids).logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
    )
    expected_losses.sum().backward()
    torch.testing.assert_close(token_losses, expected_losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, token_losses.sum())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, gradient in checkpoint_tensors(model.config, "lm", gradients):
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= 1e-4 * scale, name


@torch.no_grad()
def test_label_logprobs_equal(tmp_path: Path) -> None:
    model, peer = both("llama", tmp_path)
    token_ids = random_tokens(2, 24)
    labels = token_ids.roll(-1, 1)
    labels[:, -1] = IGNORE_INDEX
    expected = (peer(token_ids).logits / 0.7).log_softmax(-1)[:, :-1].gather(-1, labels[:, :-1, None])[..., 0]
    logprobs = model(token_ids, labels=labels, temperature=0.7)
    torch.testing.assert_close(logprobs[:, :-1], expected, rtol=0, atol=1e-4)
    assert (logprobs[:, -1] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scalar_head_equals_sequence_classification(family: str, tmp_path: Path) -> None:
    extra = {"qwen3": {"head_width": 12}}.get(family, {})
    torch.manual_seed(0)
    config = ModelConfig(
        family=family,
        vocab_size=V,
        width=48,
        layers=4,
        heads=4,
        kv_heads=2,
        ffn_width=64,
        init_std=0.2,
        **extra,
    )
    model = Transformer(config, head="scalar").eval()
    save_model(model, tmp_path / "reward", pad_token_id=0)
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()
    token_ids = random_tokens(2, 16)
    token_ids[1, 11:] = 0  # right padding: transformers reads the last token that is not padding
    values = model(token_ids)
    assert values.shape == (2, 16)
    assert values.dtype == torch.float32
    expected = peer(token_ids, attention_mask=(token_ids != 0).long()).logits[:, 0]
    torch.testing.assert_close(values[[0, 1], [15, 10]], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(load_model(tmp_path / "reward", head="scalar")(token_ids), values)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_autocast_is_close(family: str, tmp_path: Path) -> None:
    """As close to float32 as transformers is under the same autocast, within a quarter."""
    model, peer = both(family, tmp_path)
    token_ids = random_tokens(2, 40)
    expected = model(token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits, peer_logits = model(token_ids), peer(token_ids).logits
    assert logits.dtype == torch.float32
    error, peer_error = ((x - expected).norm() / expected.norm() for x in (logits, peer_logits.float()))
    assert 0 < error < 0.05
    assert error < 1.25 * peer_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint's dtype never stops loading; what we save in half precision transformers loads."""
    theirs("llama").to(dtype).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.embedding.weight.dtype == torch.float32
    # Loaded as float32: a model cast in place would keep rotation frequencies rounded to half precision.
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    token_ids = random_tokens(2, 20)
    expected = peer(token_ids).logits
    torch.testing.assert_close(model(token_ids), expected, rtol=0, atol=1e-4)
    save_model(model, tmp_path / "ours", dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").dtype == dtype
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(again(token_ids).logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_sharded_checkpoints(tmp_path: Path) -> None:
    peer = theirs("qwen3")
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    model = load_model(tmp_path / "theirs")
    token_ids = random_tokens(2, 20)
    expected = peer(token_ids).logits
    torch.testing.assert_close(model(token_ids), expected, rtol=0, atol=1e-4)
    save_model(model, tmp_path / "ours", shard_bytes=40_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(again(token_ids).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(load_model(tmp_path / "ours")(token_ids), model(token_ids))


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@torch.no_grad()
def test_yarn_is_exported_and_read_in_both_forms(form: str, tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=V,
        width=48,
        layers=2,
        heads=4,
        init_std=0.2,
        yarn=YarnConfig(factor=4.0, original_max_position=16),
    )
    torch.manual_seed(0)
    model = Transformer(config)
    save_model(model, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    if form == "rope_parameters":
        content["rope_parameters"] = {**content.pop("rope_scaling"), "rope_theta": content.pop("rope_theta")}
        (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_model(tmp_path).config == config
    token_ids = random_tokens(2, 60)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(model(token_ids), peer(token_ids).logits, rtol=0, atol=1e-4)
