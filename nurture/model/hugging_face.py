"""Checkpoints as Hugging Face lays them out: in and out, with the same logits on both sides.

A directory of `config.json`, `model.safetensors` (several files and an index above 5 GB) and `generation_config.json`.
What a saved model computes in transformers is what it computes here, to float32 rounding. A configuration that asks
for something this decoder does not do (biases, sliding windows, other rotations) is refused by name rather than
loaded into a model that computes something else. Nothing here imports transformers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nurture.errors import NurtureError, did_you_mean
from nurture.files import atomic_write, atomic_write_json, make_directory, read_json
from nurture.model.config import Family, ModelConfig, YarnConfig
from nurture.model.gguf import load_gguf, load_gguf_tokenizer, open_gguf, read_gguf_config
from nurture.model.transformer import Transformer
from nurture.model.weights import Head, TensorSource, checkpoint_tensors, empty_model, fill_model
from nurture.tokenizer import Tokenizer

WEIGHTS, INDEX, CONFIG, GENERATION = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
)
SHARD_BYTES = 5_000_000_000

_CLASSES: dict[Family, str] = {"llama": "Llama", "smollm3": "SmolLM3", "qwen3": "Qwen3"}
# What a family's checkpoints leave out of config.json when it has this value.
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
    "smollm3": {
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
    },
    "qwen3": {
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}


# ---- reading ----------------------------------------------------------------------------------------------------


def load_model(
    path: str | Path,
    *,
    head: Head = "lm",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Transformer:
    """Load a checkpoint of the Llama, SmolLM3 or Qwen3 family.

    Args:
        path: a Hugging Face directory, a `.gguf` file, or a hub name `organisation/model` (downloaded).
        head: "scalar" keeps a checkpoint's scalar head, or draws a fresh one if it has none.
        dtype: of the weights in memory, whatever the checkpoint's.

    Raises:
        NurtureError: no such checkpoint, an unsupported one, or a damaged one; the message names file and tensor.
    """
    path = local_checkpoint(path)
    if path.suffix == ".gguf":
        return load_gguf(path, head=head, dtype=dtype, device=device)[0]
    config = read_model_config(path)
    model = empty_model(config, head, dtype, device)
    with _SafetensorsDirectory(path) as source:
        fill_model(model, source)
    return model


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint directory or a `.gguf` file. Errors name the file."""
    return load_gguf_tokenizer(path) if Path(path).suffix == ".gguf" else Tokenizer.load(path)


def local_checkpoint(path: str | Path) -> Path:
    """Return where a checkpoint lies on this machine, fetching a hub name `organisation/model` first.

    Raises:
        NurtureError: nothing is there, and the hub does not have it or cannot be reached.
    """
    local = Path(path)
    if local.exists():
        return local
    name = str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or local.suffix == ".gguf" or name.startswith("."):
        raise NurtureError(f"{path}: no such model directory or .gguf file")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NurtureError(
            f"{path}: no such directory here, and the hub did not provide a model of that name ({reason})"
        ) from error


def read_config(path: str | Path) -> ModelConfig:
    """Read the shape of a checkpoint: a Hugging Face directory or a `.gguf` file."""
    return read_gguf_config(path) if Path(path).suffix == ".gguf" else read_model_config(path)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[TensorSource]:
    """Open a checkpoint's tensors under their Hugging Face names, to be read one by one.

    Raises:
        NurtureError: it is damaged or incomplete; the message names the file.
    """
    if Path(path).suffix == ".gguf":
        yield open_gguf(path)
        return
    with _SafetensorsDirectory(Path(path)) as source:
        yield source


def checkpoint_head(path: str | Path) -> Head:
    """Say which head a checkpoint directory was saved with."""
    if Path(path).suffix == ".gguf":
        return "lm"
    classes = _read_config_json(Path(path)).get("architectures") or []
    return "scalar" if any("SequenceClassification" in name for name in classes) else "lm"


def read_model_config(path: str | Path) -> ModelConfig:
    """Read the shape of a checkpoint directory's model from its config.json.

    Raises:
        NurtureError: the file is missing or not JSON, or asks for something this decoder does not do.
    """
    file = Path(path) / CONFIG
    return config_from_hugging_face(_read_config_json(Path(path)), str(file))


def _read_config_json(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise NurtureError(
            f"{file}: missing; {path} is not a model directory (it needs {CONFIG} and {WEIGHTS})"
        )
    content = read_json(file, "Copy it again from the checkpoint.")
    if not isinstance(content, dict):
        raise NurtureError(f"{file}: expected a JSON object. Copy it again from the checkpoint.")
    return content


def config_from_hugging_face(content: Mapping[str, Any], where: str = CONFIG) -> ModelConfig:
    """Translate the content of a config.json; `where` names the file in messages.

    Raises:
        NurtureError: a missing key, an unsupported family, or a feature this decoder lacks.
    """
    family = _family(content, where)
    values = {**_DEFAULTS[family], **{key: value for key, value in content.items() if value is not None}}
    for key in _REQUIRED:
        if key not in values:
            raise NurtureError(f"{where}: key '{key}' is missing")
    try:
        _refuse_unsupported(values, where)
        theta, yarn = _rotation(values, where)
        shape: dict[str, Any] = {ours: values[theirs] for theirs, ours in _FIELDS.items() if theirs in values}
        return ModelConfig(
            family=family,
            rope_theta=theta,
            yarn=yarn,
            nope_every=_nope_every(values, where) if family == "smollm3" else None,
            tied_embeddings=values["tie_word_embeddings"],
            **shape,
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise NurtureError(f"{where}: {f'{key}: ' if key else ''}{first['msg']}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise NurtureError(f"{where}: a value is of the wrong kind ({error})") from error


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "max_position_embeddings": "max_position",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
}


def _family(content: Mapping[str, Any], where: str) -> Family:
    named = content.get("model_type")
    for family in _CLASSES:
        if named == family:
            return family
    raise NurtureError(
        f"{where}: model_type '{named}' is not supported.{did_you_mean(str(named), _CLASSES)}"
        f" Supported: {', '.join(_CLASSES)}"
    )


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    sliding = values.get("use_sliding_window", "sliding_window" in values)
    reasons = {
        "attention_bias": values.get("attention_bias"),
        "mlp_bias": values.get("mlp_bias"),
        "sliding_window": sliding or "sliding_attention" in values.get("layer_types", ()),
        "quantization_config": "quantization_config" in values,
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for key, refused in reasons.items():
        if refused:
            raise NurtureError(
                f"{where}: {key} {json.dumps(values.get(key))} is not supported by this decoder"
            )


def _rotation(values: Mapping[str, Any], where: str) -> tuple[float, YarnConfig | None]:
    """Read rope_theta and YaRN from the older top-level keys or from transformers 5's `rope_parameters`."""
    scaling = {**values.get("rope_scaling", {}), **values.get("rope_parameters", {})}
    theta = float(scaling.get("rope_theta", values["rope_theta"]))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    extras = sorted({"mscale", "mscale_all_dim"} & {key for key, value in scaling.items() if value})
    if kind != "yarn" or extras or scaling.get("truncate", True) is not True:
        raise NurtureError(
            f"{where}: rope_scaling {json.dumps(scaling)} is not supported (supported types: default, yarn without"
            f" mscale or truncate)"
        )
    original = scaling.get("original_max_position_embeddings") or values["max_position_embeddings"]
    yarn = YarnConfig(
        factor=scaling.get("factor") or values["max_position_embeddings"] / original,
        original_max_position=original,
        beta_fast=scaling.get("beta_fast") or 32.0,
        beta_slow=scaling.get("beta_slow") or 1.0,
        attention_factor=scaling.get("attention_factor"),
    )
    return theta, yarn


def _nope_every(values: Mapping[str, Any], where: str) -> int | None:
    """Find the period of the layers without rotation. In `no_rope_layers`, against its name, 1 means HAS rotation."""
    layers = int(values["num_hidden_layers"])
    rotates = [bool(entry) for entry in values.get("no_rope_layers", ())][:layers]
    if not rotates:
        return int(values["no_rope_layer_interval"])
    if all(rotates):
        return None
    period = rotates.index(False) + 1
    if rotates != [(layer + 1) % period != 0 for layer in range(layers)]:
        raise NurtureError(
            f"{where}: no_rope_layers {values['no_rope_layers']} is not supported: the layers without rotation must"
            f" be every n-th of all {layers} layers"
        )
    return period


class _SafetensorsDirectory:
    """The tensors of `model.safetensors`, or of the files an index names, opened lazily and read one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open_files: dict[str, Any] = {}
        self._exit = ExitStack()
        index = path / INDEX
        self._files: dict[str, str] = {}
        if (path / WEIGHTS).is_file():
            self._files = dict.fromkeys(self._file(WEIGHTS).keys(), WEIGHTS)
        elif index.is_file():
            content = read_json(index, "Copy it again from the checkpoint.")
            if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
                raise NurtureError(f"{index}: no 'weight_map' in it. Copy it again from the checkpoint.")
            self._files = content["weight_map"]
        else:
            old = sorted(file.name for file in path.glob("*.bin"))
            hint = f"; {old[0]} is the old pickled format: convert it to safetensors" if old else ""
            raise NurtureError(f"{path / WEIGHTS}: missing, and there is no {INDEX} either{hint}")

    def __enter__(self) -> _SafetensorsDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def names(self) -> set[str]:
        return set(self._files)

    def file_of(self, name: str) -> str:
        default = WEIGHTS if (self._path / WEIGHTS).is_file() else INDEX
        return str(self._path / self._files.get(name, default))

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(self._file(self._files[name]).get_slice(name).get_shape())
        except SafetensorError as error:
            raise NurtureError(f"{self.file_of(name)}: tensor '{name}' cannot be read ({error})") from error

    def tensor(self, name: str) -> Tensor:
        try:
            return self._file(self._files[name]).get_tensor(name)
        except SafetensorError as error:
            raise NurtureError(f"{self.file_of(name)}: tensor '{name}' cannot be read ({error})") from error

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open_files:
            file = self._path / file_name
            if not file.is_file():
                raise NurtureError(f"{file}: missing, but {INDEX} lists it; the checkpoint is incomplete")
            try:
                self._open_files[file_name] = self._exit.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise NurtureError(
                    f"{file}: not a whole safetensors file ({error}); copy or download it again"
                ) from error
        return self._open_files[file_name]


# ---- writing ----------------------------------------------------------------------------------------------------


def save_model(
    model: torch.nn.Module,
    path: str | Path,
    *,
    end_token_ids: Sequence[int] = (),
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Save `model` so that transformers loads it; every file is whole or absent, config.json is written last.

    Args:
        model: a `Transformer`, compiled or not.
        end_token_ids: tokens that end a reply, for generation_config.json (the tokenizer's `stop_token_ids`).
        pad_token_id: needed by transformers to run a reward model on padded batches.
        dtype: of the weights on disk; default: the model's.
        state_dict: whole tensors under the model's own names, where the model itself holds shards (FSDP).
        shard_bytes: largest size of one safetensors file.

    Raises:
        NurtureError: the disk is full or not writable.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, Transformer):
        raise TypeError(f"expected a Transformer, got {type(model).__name__}")
    path = make_directory(Path(path))
    parameters = state_dict if state_dict is not None else dict(model.named_parameters())
    dtype = dtype or parameters["embedding.weight"].dtype
    tensors = dict(checkpoint_tensors(model.config, model.head, parameters))

    def write(file: Path, names: Sequence[str]) -> None:
        _save_file({name: tensors[name] for name in names}, file, dtype)

    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()}
    write_shards(path, sizes, shard_bytes, write)
    save_config(
        model.config,
        model.head,
        path,
        end_token_ids=end_token_ids,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        dtype=dtype,
    )


def save_config(
    config: ModelConfig,
    head: Head,
    path: Path,
    *,
    end_token_ids: Sequence[int] = (),
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json and generation_config.json beside weights. Arguments as in `save_model`."""
    special = {
        "bos_token_id": bos_token_id,
        "eos_token_id": list(end_token_ids) or None,
        "pad_token_id": pad_token_id,
    }
    atomic_write_json(path / GENERATION, {key: value for key, value in special.items() if value is not None})
    content = config_to_hugging_face(config, head)
    # A chat model ends a reply at several tokens; config.json has room for them, and null overrides family defaults.
    atomic_write_json(path / CONFIG, {**content, **special, "dtype": str(dtype).removeprefix("torch.")})


def write_shards(
    path: Path, sizes: Mapping[str, int], shard_bytes: int, write: Callable[[Path, Sequence[str]], None]
) -> None:
    """Have tensors of these sizes (bytes) written in one file, or in several and an index; remove what was there.

    Args:
        write: writes the tensors with these names into a file; called in the order of `sizes`.
    """
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[held] for held in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = {WEIGHTS: shards[0]}
    if len(shards) > 1:
        files = {
            f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)
        }
    for file, names in files.items():
        write(path / file, names)
    written = set(files)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        atomic_write_json(path / INDEX, index)
        written.add(INDEX)
    for stale in path.glob("model*.safetensors*"):
        if stale.name not in written:
            stale.unlink()


def _save_file(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype) -> None:
    ready = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            # The library hides the system's error in its text; a full disk must be told as one.
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
            raise

    atomic_write(file, write)


def config_to_hugging_face(config: ModelConfig, head: Head = "lm") -> dict[str, Any]:
    """Translate a shape into the content of a config.json that older and newer transformers read alike."""
    kind = "ForSequenceClassification" if head == "scalar" else "ForCausalLM"
    content: dict[str, Any] = {
        "architectures": [_CLASSES[config.family] + kind],
        "model_type": config.family,
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope_theta,
        "use_cache": True,
    }
    if config.family != "qwen3":
        content["mlp_bias"] = False
    if config.family != "llama":
        content |= {"use_sliding_window": False, "sliding_window": None}
    if config.family == "smollm3":
        content["no_rope_layers"] = [int(config.rotates(layer)) for layer in range(config.layers)]
        content["no_rope_layer_interval"] = config.nope_every or config.layers + 1
    if config.yarn is not None:
        scaling: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
        }
        if config.yarn.attention_factor is not None:
            scaling["attention_factor"] = config.yarn.attention_factor
        content["rope_scaling"] = scaling
    if head == "scalar":
        content |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return content
