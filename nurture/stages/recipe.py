"""The recipe: what data, what model, which stages in which order, checked before anything runs.

One YAML file is the whole pipeline. Its top is a `RecipeFile`; what is inside `model`, `tokenizer`, `world` and each
stage is checked by the class that owns it; and everything a stage refers to (earlier stages, checkpoints, data files,
shared sources) must exist. All mistakes are reported together, each with file, line and key. Which stages of a checked
recipe have to run is pipeline.py's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel

from nurture import stages
from nurture.chat_template import BUILT_IN, read_template
from nurture.data.sources import DataSpec
from nurture.errors import NurtureError, did_you_mean
from nurture.recipe import Document, KeyPath, Section, apply_overrides, check, read_document
from nurture.stages.context import StageConfig

TOKENIZER = "tokenizer"
"""Name of the first step of a run that starts from nothing. It is not written in the recipe's stages."""

SCRATCH = "scratch"
"""What a stage's `start` says for fresh weights."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_Settings = TypeVar("_Settings", bound=BaseModel)


class RecipeFile(Section):
    """The top of a recipe. What is inside `model`, `tokenizer` and each stage is checked by their own classes."""

    name: str
    """Name of the run: its folder is runs/NAME."""
    seed: int = 0
    """Seed of everything random."""
    base: str | None = None
    """Folder that relative data paths are resolved against; by default the recipe's own folder."""
    world: dict[str, Any] = {}
    """The embedded world's settings."""
    model: dict[str, Any] = {}
    """Shape of a model that starts from nothing: a `preset` and/or single settings."""
    tokenizer: dict[str, Any] = {}
    """How the tokenizer is made."""
    data: dict[str, str] = {}
    """Sources by name, for stages to use in their own `sources` or `data`: as a list of names, or as name -> name."""
    stages: list[dict[str, Any]]
    """What happens, in order: a list of stages, each with a `kind`."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: of the run.
        seed: of everything random.
        base: folder that data paths are relative to.
        folder: folder of the recipe file, which checkpoint paths are relative to.
        world: settings of the embedded world.
        model: shape of a fresh model, without `vocab_size`; None where every stage starts from a checkpoint.
        tokenizer: settings of the tokenizer, as plain data.
        stages: one `Config` of a stage module each.
        starts: stage name -> the earlier stage or the path it starts from, None for fresh weights.
        models: stage name -> written name -> the same, for its further references.
        document: the plain data the recipe was read from, overrides included.
    """

    name: str
    seed: int
    base: Path
    folder: Path
    world: dict[str, Any]
    model: dict[str, Any] | None
    tokenizer: dict[str, Any]
    stages: tuple[StageConfig, ...]
    starts: dict[str, str | Path | None]
    models: dict[str, dict[str, str | Path]]
    document: Document


def builtin_recipes() -> dict[str, Path]:
    """Return the recipes that come with nurture: name -> file."""
    # A checkout has them at its top, where readers look; an installed package has them inside.
    for folder in (
        Path(__file__).resolve().parent.parent.parent / "recipes",
        Path(str(resources.files("nurture"))) / "recipes",
    ):
        if (folder / "tiny.yaml").is_file():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe given by path or by the name of one that comes with nurture.

    Raises:
        NurtureError: there is none; the message names the nearest.
    """
    builtin = builtin_recipes()
    if Path(recipe).exists() or recipe not in builtin:
        if not Path(recipe).exists() and Path(recipe).suffix not in (".yaml", ".yml"):
            hint = did_you_mean(recipe, builtin)
            raise NurtureError(
                f"{recipe}: there is no such recipe file or run, and none of nurture's own recipes is called that"
                f" ({', '.join(builtin)}).{hint}"
            )
        return Path(recipe)
    return builtin[recipe]


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: path of a YAML file, or the name of a recipe that comes with nurture.
        overrides: `stage.key=value` settings that replace what the file says.

    Raises:
        NurtureError: naming every mistake, each with file, line and key.
    """
    path = find_recipe(str(recipe))
    return build_recipe(read_document(path), overrides, folder=path.resolve().parent)


def build_recipe(
    document: Document,
    overrides: Sequence[str] = (),
    *,
    folder: Path,
    roots: Mapping[str, KeyPath] | None = None,
) -> Recipe:
    """Check a document and turn it into a recipe. Same errors as `load_recipe`.

    Args:
        folder: what relative paths are resolved against.
        roots: further first words of overrides and what they stand for (a stage command's own keys).
    """
    written = document.data.get("stages")
    names = [_stage_name(raw) for raw in written] if isinstance(written, list) else []
    stage_roots: dict[str, KeyPath] = {
        name: ("stages", place)
        for place, name in enumerate(names)
        if name and name not in RecipeFile.model_fields
    }
    apply_overrides(document, overrides, {**stage_roots, **(roots or {})}, RecipeFile.model_fields)
    top = check(RecipeFile, document)
    document.raise_problems()
    assert top is not None  # check() noted a problem otherwise
    if not _NAME.fullmatch(top.name):
        document.complain(
            ("name",), f"names a folder: use letters, digits, '-', '_' and '.', got '{top.name}'."
        )
    if not top.stages:
        document.complain(("stages",), "is empty. List at least one stage, for example 'kind: pretrain'.")
    base = folder / top.base if top.base else folder
    starts = _check_starts(document, top.stages, folder)
    world_is_fine = _check_world(document)
    configs = [
        _check_stage(document, place, top, base, world_is_fine=world_is_fine)
        for place in range(len(top.stages))
    ]
    placed = [(place, config) for place, config in enumerate(configs) if config is not None]
    models = {config.name: _check_models(document, place, config, names, folder) for place, config in placed}
    fresh_weights = False
    for place, config in placed:
        if starts[config.name] is None:
            fresh_weights = True
            written_sources = top.stages[place].get("sources")  # wrong ones have been complained about
            if not training_sources(config) and not written_sources:
                document.complain(
                    ("stages", place),
                    "starts from fresh weights but has no text to make a tokenizer from. Give it `sources`,"
                    " or `start` it from an earlier stage or a checkpoint.",
                )
    model = _check_model(document, top) if fresh_weights or top.model else None
    tokenizer = _check_tokenizer(document, folder) if fresh_weights or top.tokenizer else {}
    document.raise_problems()
    return Recipe(
        name=top.name,
        seed=top.seed,
        base=base,
        folder=folder,
        world=top.world,
        model=model,
        tokenizer=tokenizer,
        stages=tuple(config for _, config in placed),
        starts=starts,
        models=models,
        document=document,
    )


def _stage_name(raw: Any) -> str | None:
    return str(raw.get("name") or raw.get("kind") or "") or None if isinstance(raw, dict) else None


def _check_starts(
    document: Document, written: list[dict[str, Any]], folder: Path
) -> dict[str, str | Path | None]:
    """Resolve what each stage starts from; note doubled names and starts that do not exist."""
    starts: dict[str, str | Path | None] = {}
    names = [_stage_name(raw) or f"stage{place}" for place, raw in enumerate(written)]
    previous: str | None = None
    for place, (name, raw) in enumerate(zip(names, written)):
        where: KeyPath = ("stages", place, "name" if "name" in raw else "kind")
        if name in starts:
            first = document.place(("stages", names.index(name))).rsplit(":", 1)[-1]
            document.complain(
                where,
                f"another stage (line {first}) is called '{name}' too. Give one of them its own `name`.",
            )
        if name == TOKENIZER or name in RecipeFile.model_fields or not _NAME.fullmatch(name):
            document.complain(
                where,
                f"'{name}' cannot be the name of a stage. Choose a word of letters, digits, '-', '_' and '.' that is"
                " not a key of the recipe itself.",
            )
        start = raw.get("start")
        starts[name] = previous
        if start == SCRATCH:
            starts[name] = None
        elif start is not None:
            starts[name] = _check_reference(document, (*where[:2], "start"), str(start), names, place, folder)
        kind = stages.STAGES.get(str(raw.get("kind")))
        if kind is None or kind.continues:
            previous = name
    return starts


def _check_models(
    document: Document, place: int, config: StageConfig, names: Sequence[str | None], folder: Path
) -> dict[str, str | Path]:
    """Resolve the further references of a stage."""
    found: dict[str, str | Path] = {}
    for key in config.references:
        value = getattr(config, key)
        for name in [value] if isinstance(value, str) else list(value or []):
            reference = _check_reference(document, ("stages", place, key), name, names, place, folder)
            if reference is not None:
                found[name] = reference
    for path, spec in data_specs(config):
        for name in stages_read(spec):
            if name in names[:place]:
                found[name] = name
            else:
                hint = did_you_mean(name, filter(None, names[:place])) or " Only earlier stages can be read."
                document.complain(
                    ("stages", place, *path), f"'stage:{name}': no earlier stage is called that.{hint}"
                )
    return found


def stages_read(spec: str) -> list[str]:
    """Return the names of the earlier stages whose files a data spec reads (`stage:NAME` or `stage:NAME/FILE`)."""
    parts = (part.strip() for part in spec.split(","))
    return [part.removeprefix("stage:").split("/")[0] for part in parts if part.startswith("stage:")]


def _check_reference(
    document: Document, where: KeyPath, reference: str, names: Sequence[str | None], place: int, folder: Path
) -> str | Path | None:
    """Return the earlier stage or the existing checkpoint that `reference` names, else note what is wrong."""
    if reference in names[:place]:
        return reference
    if reference in names:
        relation = "this stage itself" if names[place] == reference else "a later stage"
        document.complain(where, f"'{reference}' is {relation}. A stage can only use earlier ones.")
        return None
    here = (folder / reference).exists() or Path(reference).exists()
    if not here and (_HUB_NAME.fullmatch(reference) or reference == "smollm2"):
        return _fetched(document, where, reference)
    path = Path(reference).expanduser()
    path = path if path.is_absolute() or (path.exists() and not (folder / path).exists()) else folder / path
    problem = checkpoint_problem(path)
    if problem is None:
        return path
    if path.exists() or "/" in reference or path.suffix == ".gguf":
        document.complain(where, problem)
    else:
        earlier = (
            f" Earlier stages: {', '.join(filter(None, names[:place]))}."
            if place
            else " There is no earlier stage."
        )
        hint = did_you_mean(reference, filter(None, names[:place])) or earlier
        document.complain(where, f"'{reference}' is neither an earlier stage nor a checkpoint folder.{hint}")
    return None


def _fetched(document: Document, where: KeyPath, name: str) -> Path | None:
    """Return where a hub model was fetched to, or the installed model that `smollm2` names."""
    from nurture.inference.chat import SMOLLM2, packaged_smollm2
    from nurture.model.hugging_face import local_checkpoint

    try:
        return packaged_smollm2() if name == SMOLLM2 else local_checkpoint(name)
    except NurtureError as error:
        document.complain(where, str(error))
        return None


def checkpoint_problem(path: Path) -> str | None:
    """Say why `path` is not a checkpoint to start from, or return None if it looks like one.

    A checkpoint is a .gguf file, a Hugging Face folder (config.json and weights), or a finished stage of a run.
    """
    if path.suffix == ".gguf":
        return None if path.is_file() else f"{path}: there is no such file"
    if not path.exists():
        return f"{path}: there is no such checkpoint folder"
    if not path.is_dir():
        return f"{path}: is a file, expected a checkpoint folder (config.json and model.safetensors) or a .gguf file"
    folder = model_folder(path)
    if not (folder / "config.json").is_file():
        stages_inside = sorted(child.parent.name for child in path.glob("[0-9][0-9]-*/model"))
        hint = (
            f" It is a whole run: choose one of its stages ({', '.join(stages_inside)})."
            if stages_inside
            else ""
        )
        return f"{path}: is not a checkpoint, there is no config.json in it.{hint}"
    if not any(folder.glob("*.safetensors")):
        return f"{folder}: is not a checkpoint, there is a config.json but no *.safetensors weights beside it"
    return None


def model_folder(path: Path) -> Path:
    """Return the model inside a stage's folder, or `path` itself when it is a checkpoint already."""
    return path / "model" if (path / "model" / "config.json").is_file() else path


def _check_stage(
    document: Document, place: int, top: RecipeFile, base: Path, *, world_is_fine: bool
) -> StageConfig | None:
    """Build the `Config` of a stage; note what is wrong with it, missing data files included."""
    where: KeyPath = ("stages", place)
    raw = dict(top.stages[place])
    kind = raw.get("kind")
    if kind is None:
        known = ", ".join(stages.STAGES)
        document.complain(
            (*where, "kind"), f"is required and missing: what the stage does. Known kinds: {known}."
        )
        return None
    if kind not in stages.STAGES:
        hint = did_you_mean(str(kind), stages.STAGES) or f" Known kinds: {', '.join(stages.STAGES)}."
        document.complain((*where, "kind"), f"there is no stage kind '{kind}'.{hint}")
        return None
    raw.setdefault("name", kind)
    config_class: type[StageConfig] = stages.stage_module(str(kind)).Config
    for key in ("sources", "data"):
        if key in config_class.model_fields:
            _use_shared_sources(document, (*where, key), raw, key, top.data)
    config = check(config_class, document, where, data=raw)
    if config is not None:
        for key, file in template_files(config, base).items():
            try:
                read_template(file)
            except NurtureError as error:
                document.complain((*where, key), str(error))
        for path, spec in data_specs(config):
            if problem := data_problem(spec, base, top.world if world_is_fine else None):
                # A name from the shared table is mended in the table.
                shared = path[0] in ("sources", "data") and top.data.get(path[-1]) == spec
                document.complain(("data", path[-1]) if shared else (*where, *path), problem)
    return config


def _use_shared_sources(
    document: Document, where: KeyPath, raw: dict[str, Any], key: str, table: Mapping[str, str]
) -> None:
    """Replace names of the recipe's `data` by their specs, in a list or as values; none at all means all of them."""
    value = raw.get(key)
    if isinstance(value, Mapping):
        raw[key] = {
            name: table.get(spec, spec) if isinstance(spec, str) else spec for name, spec in value.items()
        }
    if value is None and table and key == "sources":
        raw[key] = dict(table)
    if not isinstance(value, list):
        return
    raw[key] = {}
    for index, name in enumerate(value):
        if name in table:
            raw[key][name] = table[name]
        else:
            hint = did_you_mean(str(name), table) or f" Known: {', '.join(table) or 'none, `data` is empty'}."
            document.complain((*where, index), f"there is no source '{name}' in the recipe's `data`.{hint}")


def data_specs(config: BaseModel) -> Iterator[tuple[tuple[str, ...], DataSpec]]:
    """Yield (path of keys, spec) for every setting of a stage whose type is `DataSpec`, those in sections too."""
    for key, info in type(config).model_fields.items():
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            yield from (((key, *path), spec) for path, spec in data_specs(value))
        elif value is None or not _is_of_specs(info.annotation):
            continue
        elif isinstance(value, Mapping):
            yield from (((key, name), spec) for name, spec in value.items())
        else:
            yield (key,), value


def training_sources(config: StageConfig) -> dict[str, DataSpec]:
    """Return the sources a stage is about, by name: those in its `sources` or `data`."""
    return {path[-1]: spec for path, spec in data_specs(config) if path[0] in ("sources", "data")}


def change_specs(config: _Settings, change: Callable[[DataSpec], DataSpec]) -> _Settings:
    """Return the settings with every data spec changed."""
    changed: dict[str, Any] = {}
    for key, info in type(config).model_fields.items():
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            changed[key] = change_specs(value, change)
        elif value is not None and _is_of_specs(info.annotation):
            mapping = isinstance(value, Mapping)
            changed[key] = {n: change(s) for n, s in value.items()} if mapping else change(value)
    return config.model_copy(update=changed)


def _is_of_specs(annotation: Any) -> bool:
    return annotation is DataSpec or any(map(_is_of_specs, get_args(annotation)))


def template_files(config: StageConfig, base: Path) -> dict[str, Path]:
    """Return field -> file of every chat template of a stage that is not a built-in one."""
    named = {key: getattr(config, key) for key in config.templates}
    return {
        key: base / Path(value).expanduser()
        for key, value in named.items()
        if value and value not in BUILT_IN
    }


# Small shapes for machines without an accelerator; parameter counts with a vocabulary of 2,048.
_SMALL_MODELS: dict[str, dict[str, Any]] = {
    "1m": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_width": 384},
    "3m": {"width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_width": 640},
    "10m": {"width": 384, "layers": 6, "heads": 6, "kv_heads": 2, "ffn_width": 1024},
    "30m": {"width": 512, "layers": 10, "heads": 8, "kv_heads": 4, "ffn_width": 1408},
}


def _check_model(document: Document, top: RecipeFile) -> dict[str, Any]:
    """Resolve the preset and check the model's shape; the vocabulary is the tokenizer's to decide."""
    from nurture.model.config import PRESETS, ModelConfig

    settings = dict(top.model)
    preset = settings.pop("preset", None)
    if preset is not None:
        shapes = {
            **_SMALL_MODELS,
            **{name: shape.model_dump(exclude_unset=True) for name, shape in PRESETS.items()},
        }
        if str(preset).lower() not in shapes:
            hint = did_you_mean(str(preset), shapes) or f" Known: {', '.join(shapes)}."
            document.complain(("model", "preset"), f"there is no preset '{preset}'.{hint}")
            return {}
        settings = {**shapes[str(preset).lower()], **settings}
    if "vocab_size" in top.model:
        document.complain(
            ("model", "vocab_size"), "the tokenizer decides this. Set tokenizer.vocab_size instead."
        )
    settings["vocab_size"] = 1
    model = check(ModelConfig, document, ("model",), data=settings)
    return model.model_dump(exclude={"vocab_size"}) if model else {}


def _check_tokenizer(document: Document, folder: Path) -> dict[str, Any]:
    from nurture.tokenizer import TokenizerConfig

    settings = check(TokenizerConfig, document, ("tokenizer",))
    if settings is None:
        return {}
    resolved = settings.model_dump()
    if settings.path is not None:
        path = model_folder(folder / Path(settings.path).expanduser())
        if path.suffix != ".gguf" and not (path / "tokenizer.json").is_file():
            document.complain(("tokenizer", "path"), f"{path}: there is no tokenizer.json in it")
        resolved["path"] = str(path)
    return resolved


def _check_world(document: Document) -> bool:
    """Check the world's settings by its own class; return whether they are fine."""
    if not document.data.get("world"):
        return True
    from nurture.world import WorldConfig

    return check(WorldConfig, document, ("world",)) is not None


def data_problem(spec: str, base: Path, world: Mapping[str, Any] | None = None) -> str | None:
    """Say why a data spec stands for nothing, or return None. Hub names are not looked up."""
    from nurture.data.sources import find_files, read_rows, split_spec

    try:
        for part in split_spec(spec):
            if part.startswith("world:"):
                next(read_rows(part, world=world))
            elif not part.startswith(("hf:", "stage:")):
                find_files(part, base)
    except NurtureError as error:
        return str(error)
    return None
