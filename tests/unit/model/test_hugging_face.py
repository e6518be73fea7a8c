"""Round trips and refusals; parity with transformers is tests/parity/test_model_hugging_face.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nurture.errors import NurtureError
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import (
    checkpoint_head,
    config_from_hugging_face,
    load_model,
    read_model_config,
    save_model,
)
from nurture.model.transformer import Transformer


def build(head: str = "lm", **shape) -> Transformer:
    torch.manual_seed(0)
    shape = {"width": 16, "layers": 2, "heads": 2, "ffn_width": 24, **shape}
    return Transformer(ModelConfig(vocab_size=11, **shape), head=head)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(build(), tmp_path / "model", end_token_ids=[2], pad_token_id=3)
    return tmp_path / "model"


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def assert_same_weights(one: Transformer, two: Transformer) -> None:
    for (name, left), (_, right) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    "shape", [{}, {"tied_embeddings": False}, {"family": "smollm3"}, {"family": "qwen3", "head_width": 12}]
)
def test_round_trip(shape: dict, tmp_path: Path) -> None:
    model = build(**shape)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    # The period is not to be told from a list of two layers that both rotate.
    assert again.config == model.config.model_copy(update={"nope_every": None})
    assert_same_weights(model, again)


def test_files(saved: Path) -> None:
    assert {file.name for file in saved.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert json.loads((saved / "generation_config.json").read_text()) == {
        "eos_token_id": [2],
        "pad_token_id": 3,
    }
    assert checkpoint_head(saved) == "lm"


def test_overwriting_leaves_no_stale_shards(tmp_path: Path) -> None:
    save_model(build(), tmp_path, shard_bytes=2000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = build()
    with torch.no_grad():
        model.embedding.weight.add_(1)
    save_model(model, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same_weights(model, load_model(tmp_path))
    save_model(build(), tmp_path, shard_bytes=2000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(build(), load_model(tmp_path))


def test_dtypes(tmp_path: Path) -> None:
    save_model(build(), tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    model = load_model(tmp_path)
    assert model.embedding.weight.dtype == torch.float32
    assert torch.equal(model.embedding.weight, build().embedding.weight.bfloat16().float())
    assert load_model(tmp_path, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def test_compiled_model_is_saved_under_plain_names(tmp_path: Path) -> None:
    save_model(torch.compile(build(), backend="eager"), tmp_path)
    assert_same_weights(build(), load_model(tmp_path))


def test_gathered_state_dict(tmp_path: Path) -> None:
    model = build()
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path, state_dict=gathered)
    assert torch.equal(load_model(tmp_path).embedding.weight, gathered["embedding.weight"])


# ---- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_becomes_a_reward_model_with_a_fresh_head(tied: bool, tmp_path: Path) -> None:
    model = build(tied_embeddings=tied)
    save_model(model, tmp_path)
    torch.manual_seed(7)
    reward_model = load_model(tmp_path, head="scalar")
    assert torch.equal(reward_model.embedding.weight, model.embedding.weight)
    assert reward_model.output_weight.abs().sum() > 0
    torch.manual_seed(7)
    assert torch.equal(load_model(tmp_path, head="scalar").output_weight, reward_model.output_weight)


def test_a_reward_model_keeps_its_head_and_is_no_language_model(tmp_path: Path) -> None:
    save_model(build(head="scalar"), tmp_path)
    assert checkpoint_head(tmp_path) == "scalar"
    assert_same_weights(build(head="scalar"), load_model(tmp_path, head="scalar"))
    with pytest.raises(
        NurtureError, match=r"model.safetensors: this is a reward or value model.*head='scalar'"
    ):
        load_model(tmp_path)


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(NurtureError, match="nowhere: no such model directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(NurtureError, match=r"config.json: missing"):
        load_model(tmp_path)


def test_missing_weights(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(
        NurtureError, match=r"model.safetensors: missing.*pytorch_model.bin is the old pickled"
    ):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, 0.999])
def test_truncated_weights(keep: float, saved: Path) -> None:
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(NurtureError, match=r"model.safetensors: not a whole safetensors file"):
        load_model(saved)


def test_corrupt_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(NurtureError, match=r"model.safetensors: not a whole safetensors file"):
        load_model(saved)


def test_damaged_config(saved: Path) -> None:
    (saved / "config.json").write_text("{ not json")
    with pytest.raises(NurtureError, match=r"config.json:1: not valid JSON"):
        load_model(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(NurtureError, match=r"config.json: expected a JSON object"):
        load_model(saved)


def test_missing_shard(tmp_path: Path) -> None:
    save_model(build(), tmp_path, shard_bytes=2000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        NurtureError, match=rf"{shard.name}: missing, but model.safetensors.index.json lists it"
    ):
        load_model(tmp_path)


def test_index_that_lies(tmp_path: Path) -> None:
    save_model(build(), tmp_path, shard_bytes=2000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(NurtureError, match=r"model-00001.*tensor 'model.norm.weight' cannot be read"):
        load_model(tmp_path)


def test_missing_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(
        NurtureError, match=r"model.safetensors: tensor 'model.layers.1.self_attn.k_proj.weight' is missing"
    ):
        load_model(saved)


def test_unexpected_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}))
    with pytest.raises(NurtureError, match=r"unexpected tensor 'model.layers.0.self_attn.q_proj.bias'"):
        load_model(saved)


def test_harmless_extras(saved: Path) -> None:
    """A tied checkpoint may repeat its embedding; old ones carry rotation frequencies."""
    edit_tensors(
        saved,
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    assert_same_weights(build(), load_model(saved))


def test_misshapen_tensor(saved: Path) -> None:
    edit_config(saved, vocab_size=12)
    with pytest.raises(
        NurtureError, match=r"'model.embed_tokens.weight' has shape \[11, 16\].*asks for \[12, 16\]"
    ):
        load_model(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llma"}, "model_type 'llma' is not supported. Did you mean 'llama'"),
        ({"model_type": ...}, "model_type 'None' is not supported.*Supported: llama, smollm3, qwen3"),
        ({"hidden_size": ...}, "key 'hidden_size' is missing"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.*llama3.*supported types"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "must be a multiple of kv_heads"),
        ({"rope_scaling": "yarn"}, "a value is of the wrong kind"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor: Input should be greater"),
        ({"rope_theta": [1]}, "a value is of the wrong kind"),
        ({"layer_types": 5}, "a value is of the wrong kind"),
        ({"model_type": "smollm3", "num_hidden_layers": "two"}, "a value is of the wrong kind"),
        ({"num_hidden_layers": "two"}, "layers: Input should be a valid integer"),
    ],
)
def test_unsupported_configurations_are_refused(changes: dict, message: str, saved: Path) -> None:
    edit_config(saved, **changes)
    with pytest.raises(NurtureError, match=rf"config.json: .*{message}"):
        load_model(saved)


# ---- config.json in its dialects ----------------------------------------------------------------------------------

SMOLLM3 = {
    "model_type": "smollm3",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}


def test_older_and_newer_rotation_keys() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    older = config_from_hugging_face({**SMOLLM3, "rope_theta": 5e6, "rope_scaling": scaling})
    oldest = config_from_hugging_face(
        {
            **SMOLLM3,
            "rope_theta": 5e6,
            "rope_scaling": {"type": "yarn", **{k: v for k, v in scaling.items() if k != "rope_type"}},
        }
    )
    newer = config_from_hugging_face({**SMOLLM3, "rope_parameters": {**scaling, "rope_theta": 5e6}})
    assert older == oldest == newer
    assert older.rope_theta == 5e6
    assert older.yarn is not None
    assert older.yarn.factor == 2.0


def test_smollm3_defaults() -> None:
    config = config_from_hugging_face(SMOLLM3)
    assert (config.rope_theta, config.nope_every, config.tied_embeddings, config.kv_heads) == (
        2e6,
        4,
        True,
        4,
    )


@pytest.mark.parametrize(
    ("no_rope_layers", "nope_every"), [([1, 1, 1, 0] * 2, 4), ([1, 0] * 4, 2), ([1] * 8, None), ([0] * 8, 1)]
)
def test_polarity_of_no_rope_layers(no_rope_layers: list[int], nope_every: int | None) -> None:
    """An entry of 1 means that the layer has rotation, whatever the list's name says."""
    config = config_from_hugging_face({**SMOLLM3, "no_rope_layers": no_rope_layers})
    assert config.nope_every == nope_every
    assert [int(config.rotates(layer)) for layer in range(8)] == no_rope_layers


def test_irregular_no_rope_layers_are_refused() -> None:
    with pytest.raises(NurtureError, match=r"no_rope_layers.*every n-th"):
        config_from_hugging_face({**SMOLLM3, "no_rope_layers": [1, 0, 0, 1, 1, 1, 1, 1]})


def test_published_smollm3_config(tmp_path: Path) -> None:
    """The keys as HuggingFaceTB/SmolLM3-3B carries them."""
    content = {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = read_model_config(tmp_path)
    assert config.parameter_count() == 3_075_098_624
    assert config.rope_theta == 5e6
    assert config.nope_every == 4
