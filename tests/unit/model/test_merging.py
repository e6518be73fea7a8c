"""Merging by hand, and checkpoints streamed tensor by tensor: whole, sharded, mismatched, .gguf."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nurture.errors import NurtureError
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model, save_config, save_model
from nurture.model.merging import (
    dare,
    linear,
    merge_checkpoints,
    name_seed,
    slerp,
    ties,
    trimmed,
    write_streamed,
)
from nurture.model.transformer import Transformer

SHAPE = ModelConfig(vocab_size=64, width=16, layers=2, heads=2, kv_heads=1, ffn_width=24, max_position=32)


def save(folder: Path, seed: int, shape: ModelConfig = SHAPE, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(seed)
    save_model(Transformer(shape), folder, dtype=dtype)
    return folder


def test_linear_normalises() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    assert linear([a, b], [3.0, 1.0]).tolist() == [1.5, 3.0]
    assert linear([a, b], [0.75, 0.25]).tolist() == [1.5, 3.0]


def test_slerp_of_unit_vectors_stays_on_the_circle() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([3**0.5 / 2, 0.5]))
    assert slerp(a, b, 0.0).tolist() == pytest.approx([1, 0])
    # One direction, no angle: a line.
    assert slerp(2 * b, b, 0.25).tolist() == [0.0, 1.75]


def test_trimming_keeps_the_largest_and_refuses_to_keep_nothing() -> None:
    assert trimmed(torch.tensor([0.1, -3.0, 2.0, 0.5]), 0.5).tolist() == [0.0, -3.0, 2.0, 0.0]
    with pytest.raises(NurtureError, match=r"density 0\.1 leaves nothing of a tensor of 4"):
        trimmed(torch.ones(4), 0.1)


def test_ties_leaves_out_who_loses_the_vote() -> None:
    base = torch.zeros(3)
    models = [torch.tensor([1.0, 2.0, 1.0]), torch.tensor([3.0, -1.0, -4.0])]
    # Signs by mass: + (both), + (2 against 1), - (4 against 1).
    assert ties(base, models, [1.0, 1.0], density=1.0).tolist() == [2.0, 2.0, -4.0]


def test_dare_draws_every_tensor_by_its_name() -> None:
    model = torch.ones(100)
    drawn = [dare(torch.zeros(100), [model], [1.0], density=0.5, seed=name_seed(0, name)) for name in "ab"]
    assert not torch.equal(*drawn)
    again = dare(torch.zeros(100), [model], [1.0], density=0.5, seed=name_seed(0, "a"))
    assert torch.equal(drawn[0], again)


def test_a_merged_checkpoint_is_what_its_tensors_say_and_loads_in_transformers(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", 1), save(tmp_path / "b", 2)]
    shape, dtype = merge_checkpoints(
        paths, tmp_path / "out", lambda name, tensors: linear(tensors, [0.9, 0.1])
    )
    save_config(shape, "lm", tmp_path / "out", dtype=dtype)
    merged, a, b = (load_model(path) for path in (tmp_path / "out", *paths))
    for ours, first, second in zip(merged.parameters(), a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, 0.9 * first + 0.1 * second)
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(
        load_file(paths[0] / "model.safetensors")
    )
    assert (tmp_path / "out/config.json").read_text() == (paths[0] / "config.json").read_text()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    token_ids = torch.arange(10)[None]
    torch.testing.assert_close(merged(token_ids), theirs(token_ids).logits, atol=1e-5, rtol=1e-4)


def test_shares_of_bfloat16_models_are_computed_in_float32(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", 1, dtype=torch.bfloat16), save(tmp_path / "b", 2)]
    seen = []
    merge_checkpoints(
        paths,
        tmp_path / "out",
        lambda name, tensors: (seen.append({t.dtype for t in tensors}), tensors[0])[1],
    )
    assert all(dtypes == {torch.float32} for dtypes in seen)
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streamed_files_are_read_by_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "x": torch.randn(3, 5).to(dtype),
        "y": torch.randn(7).to(dtype),
        "z": torch.randn(2, 2, 2).to(dtype),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_streamed(tmp_path, shapes, iter(tensors.items()), dtype)
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    # Small shards: two files and an index; the single file is stale and goes.
    write_streamed(tmp_path, shapes, iter(tensors.items()), dtype, shard_bytes=22 * dtype.itemsize)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(index.values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert not (tmp_path / "model.safetensors").exists()
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index[name])[name], tensor)


def test_only_one_tensor_of_each_model_is_held(tmp_path: Path) -> None:
    """Tensors are asked for one by one, in the order they are written."""
    order = []
    shapes = dict.fromkeys("abc", (4,))

    def made():
        for name in "abc":
            order.append(name)
            yield name, torch.zeros(4)

    lazily = made()
    write_streamed(tmp_path, shapes, lazily, torch.float32)
    assert order == list("abc")
    with pytest.raises(ValueError, match="expected tensor 'a'"):
        write_streamed(tmp_path, shapes, iter([("b", torch.zeros(4))]), torch.float32)


def test_models_of_other_shapes_are_refused_and_other_rotations_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = save(tmp_path / "a", 1)
    wide = save(tmp_path / "b", 2, SHAPE.model_copy(update={"ffn_width": 32}))
    with pytest.raises(NurtureError, match=r"b: cannot be merged with .*a: ffn_width is 32 instead of 24"):
        merge_checkpoints([first, wide], tmp_path / "out", lambda name, tensors: tensors[0])
    save_model(Transformer(SHAPE, head="scalar"), tmp_path / "score")
    with pytest.raises(NurtureError, match="score: is a reward or value model"):
        merge_checkpoints([first, tmp_path / "score"], tmp_path / "out", lambda name, tensors: tensors[0])
    turned = save(tmp_path / "c", 3, SHAPE.model_copy(update={"rope_theta": 5e6}))
    shape, _ = merge_checkpoints([first, turned], tmp_path / "out", lambda name, tensors: tensors[0])
    assert "differ in rope_theta" in caplog.text
    assert shape.rope_theta == SHAPE.rope_theta
