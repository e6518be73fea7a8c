"""From a recipe to a run: what depends on what, what is still fresh, and what has to be made again.

A recipe is an ordered list of stages. Each starts from an earlier stage's model (the one before, unless it says
otherwise), so the stages form a graph whose order is the recipe's. A stage's *fingerprint* is a hash of everything
that decides its result: its settings, the seed, the world, the data files, the tokenizer, the version of its code and
the fingerprints of the stages it starts from. A stage is **fresh** when its folder holds a manifest with that
fingerprint and the files the manifest lists; every other stage runs, and so does whatever depends on it.

On disk (`runs/NAME/NN-stage/`): `inputs.json` is written first and says what the stage was made from, so that an
interrupted stage is resumed exactly when it would be made from the same things. `manifest.json` is written last.
When a stage has to be made again, its folder is set aside as `NN-stage.old` and removed only when the new one is
complete; if the recipe goes back to what the old folder was made from, the old folder comes back.

This file decides and keeps books. It does not train: stages do. Nothing here is heavy to import.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from nurture import files, stages
from nurture.errors import NurtureError, did_you_mean
from nurture.recipe import Document, KeyPath, Section, apply_overrides, check, read_document
from nurture.stages.context import StageConfig, StageContext

TOKENIZER = "tokenizer"
"""Name of the first step of a run that starts from nothing. It is not written in the recipe's stages."""

SCRATCH = "scratch"
"""What a stage's `start` says for fresh weights."""

_INPUTS = "inputs.json"
_RUN = "run.json"
_LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


# --- the recipe -----------------------------------------------------------------------------------------------------


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
    """Sources by name, for stages to list in their own `sources` or `data`."""
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
        Path(__file__).resolve().parent.parent / "recipes",
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
                f"{recipe}: there is no such recipe file, and none of nurture's own recipes is called that"
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
    checked = tuple(config for config in configs if config is not None)
    models = {
        config.name: _check_models(document, place, config, names, folder)
        for place, config in enumerate(checked)
    }
    fresh_weights = False
    for place, config in enumerate(checked):
        if starts[config.name] is None:
            fresh_weights = True
            if not list(_specs(config)):
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
        stages=checked,
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
    return found


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
        for key, name, spec in _specs(config):
            if problem := data_problem(spec, base, top.world if world_is_fine else None):
                # A name from the shared table is mended in the table.
                shared = name in top.data and top.data[name] == spec
                document.complain(("data", name) if shared else (*where, key, name), problem)
    return config


def _use_shared_sources(
    document: Document, where: KeyPath, raw: dict[str, Any], key: str, table: Mapping[str, str]
) -> None:
    """Replace a list of source names by name -> spec from the recipe's `data`; no list at all means all of them."""
    value = raw.get(key)
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


def _specs(config: BaseModel) -> Iterator[tuple[str, str, str]]:
    """Yield (field, source name, spec) for every data source of a stage."""
    for key in ("sources", "data"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            yield key, "", value
        elif isinstance(value, Mapping):
            for name, spec in value.items():
                if isinstance(spec, str):
                    yield key, name, spec


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


# --- data and checkpoints, identified without reading them ----------------------------------------------------------


def data_problem(spec: str, base: Path, world: Mapping[str, Any] | None = None) -> str | None:
    """Say why a data spec stands for nothing, or return None. Hub names are not looked up."""
    from nurture.data.sources import find_files, read_rows, split_spec

    try:
        for part in split_spec(spec):
            if part.startswith("world:"):
                next(read_rows(part, world=world))
            elif not part.startswith("hf:"):
                find_files(part, base)
    except NurtureError as error:
        return str(error)
    return None


def identify_data(spec: str, base: Path, world: Mapping[str, Any] | None = None) -> str:
    """Return a hash that changes when what a data spec stands for may have (file names, sizes, times)."""
    from nurture.data.sources import source_identity

    return _hash(source_identity(spec, split="all", base=base, world=world))


def _identify_files(paths: Sequence[Path]) -> str:
    digest, total = hashlib.sha256(), 0
    for path in paths:
        facts = path.stat()
        digest.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        total += facts.st_size
    return f"{len(paths)} files, {total} bytes, {digest.hexdigest()[:12]}"


def _identify_checkpoint(path: Path) -> str:
    folder = model_folder(path)
    manifest = files.read_manifest(path) if path.is_dir() else None
    if manifest is not None:
        return str(manifest.get("fingerprint"))
    return _identify_files(
        [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.is_file())
    )


# --- steps and their fingerprints -----------------------------------------------------------------------------------


@dataclass
class Step:
    """One stage of a run, with where it is and what it is made from.

    Attributes:
        config: the stage's settings.
        directory: `runs/NAME/NN-stage`.
        start: the step or the path whose model it goes on from, None for fresh weights.
        models: written name -> step or path, for the stage's further references.
        inputs: everything that decides the result, as plain data.
        fingerprint: hash of `inputs`.
        status: "fresh", "new", "unfinished" (resumes), "stale", "damaged" or "forced".
        reason: why it is not fresh, for people.
        found: its folder as it is on disk now, which may carry another number.
    """

    config: StageConfig
    directory: Path
    start: Step | Path | None
    models: dict[str, Step | Path]
    inputs: dict[str, Any]
    fingerprint: str = ""
    status: str = "new"
    reason: str = ""
    found: Path | None = None

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def parents(self) -> list[Step]:
        """The steps of this run whose output it uses."""
        return [parent for parent in (self.start, *self.models.values()) if isinstance(parent, Step)]


def plan(
    recipe: Recipe, out: Path, *, from_stage: str | None = None, force: bool = False, checksums: bool = False
) -> list[Step]:
    """Lay out the steps of a run and say for each whether it is fresh. Changes nothing on disk.

    Args:
        from_stage: this stage and all that depends on it shall run again.
        force: all shall run again.
        checksums: read every file of finished stages and compare it with the manifest.

    Raises:
        NurtureError: `from_stage` is not in the recipe, or a manifest is unreadable.
    """
    steps = _steps(recipe, out)
    if from_stage is not None:
        _step_named(steps, from_stage, "--from")
    running: set[str] = set()
    for step in steps:
        parents_running = [parent.name for parent in step.parents if parent.name in running]
        step.status, step.reason, step.found = _judge(step, checksums)
        if force or step.name == from_stage:
            step.status, step.reason = "forced", "asked for"
        elif step.status in ("fresh", "unfinished") and parents_running:
            step.status, step.reason = "stale", f"{', '.join(parents_running)} runs again"
        if step.status != "fresh":
            running.add(step.name)
    return steps


def _steps(recipe: Recipe, out: Path) -> list[Step]:
    steps: dict[str, Step] = {}
    if any(start is None for start in recipe.starts.values()):
        steps[TOKENIZER] = _tokenizer_step(recipe, out)
    for number, config in enumerate(recipe.stages, start=1):
        start = recipe.starts[config.name]
        step = Step(
            config=config,
            directory=out / f"{number:02d}-{config.name}",
            start=_lookup(start, steps),
            models={name: _lookup(ref, steps) for name, ref in recipe.models[config.name].items()},
            inputs={},
        )
        if step.start is None:
            step.models[TOKENIZER] = steps[TOKENIZER]
        step.inputs = _inputs(step, recipe)
        step.fingerprint = _hash(step.inputs)
        steps[config.name] = step
    return list(steps.values())


def _lookup(reference: str | Path | None, steps: Mapping[str, Step]) -> Any:
    return steps[reference] if isinstance(reference, str) else reference


def _tokenizer_step(recipe: Recipe, out: Path) -> Step:
    """The step before the first stage: its text is the text of the stages that start from nothing."""
    sources = {
        name: spec
        for config in recipe.stages
        if recipe.starts[config.name] is None
        for _, name, spec in _specs(config)
    }
    from nurture.stages import tokenizer

    config = tokenizer.Config(name=TOKENIZER, kind=TOKENIZER, sources=sources, **recipe.tokenizer)
    step = Step(config, out / f"00-{TOKENIZER}", None, {}, {})
    step.inputs = _inputs(step, recipe)
    if config.path is not None:
        step.inputs = {"kind": TOKENIZER, "path": _identify_checkpoint(Path(config.path))}
    step.fingerprint = _hash(step.inputs)
    return step


def _inputs(step: Step, recipe: Recipe) -> dict[str, Any]:
    """Everything that decides what a stage makes."""
    config = step.config
    inputs: dict[str, Any] = {
        "kind": config.kind,
        "version": getattr(_module(config.kind), "VERSION", 1),
        # Names and starts are not here: renaming a stage changes nothing, and parents count by fingerprint.
        "settings": config.model_dump(mode="json", exclude={"name", "kind", "start", "sources", "data"}),
        "seed": recipe.seed,
        "world": recipe.world,
        "data": {name: identify_data(spec, recipe.base, recipe.world) for _, name, spec in _specs(config)},
        "from": {
            role: parent.fingerprint if isinstance(parent, Step) else _identify_checkpoint(parent)
            for role, parent in (("start", step.start), *step.models.items())
            if parent is not None
        },
    }
    if step.start is None and config.kind != TOKENIZER:
        inputs["model"] = recipe.model
    return inputs


def _module(kind: str) -> Any:
    if kind == TOKENIZER:
        from nurture.stages import tokenizer

        return tokenizer
    return stages.stage_module(kind)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _judge(step: Step, checksums: bool) -> tuple[str, str, Path | None]:
    """Return status, reason and the folder of a step as it is found on disk."""
    here = (step.directory,) if step.directory.exists() else _elsewhere(step)
    for folder in (*here, _old(step.directory)):
        manifest = files.read_manifest(folder)
        record = manifest or _read_inputs(folder)
        if record is None or record.get("fingerprint") != step.fingerprint:
            continue
        remade = [
            name for name, made in record.get("parents", {}).items() if made != _made(step).get(name, made)
        ]
        if remade:
            return (
                "stale",
                f"{', '.join(remade)} was made again",
                folder if folder in here else step.directory,
            )
        if manifest is None:
            return "unfinished", "was interrupted, goes on", folder
        problems = files.manifest_problems(folder, manifest, checksums=checksums)
        if not problems:
            return "fresh", "", folder
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        return "damaged", problems[0] + more, folder
    if here:
        return "stale", _difference(_read_inputs(here[0]), step), here[0]
    return "new", "has not run yet", None


def _elsewhere(step: Step) -> tuple[Path, ...]:
    """Folders of the same stage under another number: a stage was put in or taken out before it."""
    return tuple(sorted(step.directory.parent.glob(f"[0-9][0-9]-{glob.escape(step.name)}")))


_ABOUT = (_INPUTS, "stage.yaml", "result.json", "metrics.jsonl", "samples.jsonl")


def _made(step: Step) -> dict[str, str]:
    """Identify what a step's parents left by content: the same settings may give another model (other hardware)."""
    made = {}
    for parent in step.parents:
        manifest = files.read_manifest(parent.found or parent.directory)
        if manifest is not None:
            # The files about the stage hold times; they say nothing about what it made.
            outputs = {
                name: facts["sha256"] for name, facts in manifest["files"].items() if name not in _ABOUT
            }
            made[parent.name] = _hash(outputs)
    return made


def _read_inputs(folder: Path) -> dict[str, Any] | None:
    path = folder / _INPUTS
    if not path.is_file():
        return None
    value = files.read_json(path, f"Delete {folder} to have this stage made again.")
    return value if isinstance(value, dict) else None


def _difference(written: dict[str, Any] | None, step: Step) -> str:
    """Say what changed since a folder was made."""
    if not written or "inputs" not in written:
        return "was made from something else"
    before, after = _flat(written["inputs"]), _flat(step.inputs)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    words = []
    for key in changed:
        label = key.removeprefix("settings.")
        if key.startswith("from."):
            role = key.removeprefix("from.")
            words.append(
                f"{step.start.name if role == 'start' and isinstance(step.start, Step) else role} changed"
            )
        elif key.startswith("data."):
            words.append(f"{label} changed")
        else:
            words.append(f"{label} {before.get(key)} -> {after.get(key)}")
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _step_named(steps: Sequence[Step], name: str, option: str) -> Step:
    for step in steps:
        if step.name == name:
            return step
    names = [step.name for step in steps]
    hint = did_you_mean(name, names) or f" Stages: {', '.join(names)}."
    raise NurtureError(f"{option} {name}: the recipe has no stage '{name}'.{hint}")


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a call of `run` did.

    Attributes:
        directory: the run.
        ran: names of the stages that ran, in order.
        fresh: names of the stages that were fresh already.
    """

    directory: Path
    ran: tuple[str, ...] = ()
    fresh: tuple[str, ...] = field(default=())


def default_directory(recipe: Recipe) -> Path:
    """Return where a run goes when nothing else is said: runs/NAME."""
    return Path("runs") / recipe.name


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    until: str | None = None,
    from_stage: str | None = None,
    force: bool = False,
    say: Any = print,
) -> Outcome:
    """Run the stages of a recipe that are not fresh.

    Args:
        out: folder of the run, `runs/NAME` if not given.
        until: the last stage to run.
        from_stage: run this stage and what depends on it again, fresh or not.
        force: run every stage again.
        say: called with one line of progress at a time.

    Raises:
        NurtureError: another process runs in this folder, or a stage met a mistake of the user's.
    """
    out = default_directory(recipe) if out is None else out
    files.make_directory(out)
    with _lock(out):
        steps = plan(recipe, out, from_stage=from_stage, force=force)
        if until is not None:
            steps = steps[: steps.index(_step_named(steps, until, "--until")) + 1]
        _remember(recipe, out)
        ran = []
        for step in steps:
            if step.status == "fresh":
                _take_place(step)
                say(f"{step.directory.name}: fresh, nothing to do")
                continue
            say(f"{step.directory.name}: {step.reason or 'runs'}")
            _run_step(step, recipe, out)
            ran.append(step.name)
    return Outcome(out, tuple(ran), tuple(step.name for step in steps if step.status == "fresh"))


def _run_step(step: Step, recipe: Recipe, out: Path) -> None:
    """Run one stage in its folder and declare the folder complete."""
    already = _prepare(step)
    files.atomic_write_json(step.directory / _INPUTS, _inputs_record(step, already))
    settings = step.config.model_dump(mode="json")
    files.atomic_write_text(step.directory / "stage.yaml", yaml.safe_dump(settings, sort_keys=False))
    started = time.perf_counter()
    try:
        _module(step.config.kind).run(step.config, _context(step, recipe, out))
    except BaseException:
        # So that the seconds of a stage count all its attempts; a killed process loses only its own.
        record = _inputs_record(step, already + time.perf_counter() - started)
        files.atomic_write_json(step.directory / _INPUTS, record)
        raise
    seconds = round(already + time.perf_counter() - started, 3)
    _complete_result(step, seconds)
    files.write_manifest(
        step.directory,
        name=step.name,
        kind=step.config.kind,
        fingerprint=step.fingerprint,
        parents=_made(step),
        seconds=seconds,
    )
    step.found = step.directory
    # Only now is there something to take the place of what was set aside.
    shutil.rmtree(step.directory / "state", ignore_errors=True)
    shutil.rmtree(_old(step.directory), ignore_errors=True)


def _inputs_record(step: Step, seconds: float) -> dict[str, Any]:
    return {
        "fingerprint": step.fingerprint,
        "parents": _made(step),
        "seconds": round(seconds, 3),
        "inputs": step.inputs,
    }


def _complete_result(step: Step, seconds: float) -> None:
    """Add name, kind and seconds to the result the stage wrote."""
    path = step.directory / "result.json"
    result = files.read_json(path, "This is a bug in the stage.") if path.exists() else {}
    tokens, metrics = result.pop("tokens", 0), result.pop("metrics", {})
    facts = {
        "name": step.name,
        "kind": step.config.kind,
        "seconds": seconds,
        "tokens": tokens,
        "metrics": metrics,
    }
    files.atomic_write_json(
        path, {**facts, **{key: value for key, value in result.items() if key not in facts}}
    )


def _context(step: Step, recipe: Recipe, out: Path) -> StageContext:
    models = {name: _model_of(parent) for name, parent in step.models.items() if name != TOKENIZER}
    start = None if step.start is None else _model_of(step.start)
    return StageContext(
        directory=step.directory.resolve(),
        start=start,
        tokenizer=start if start is not None else _tokenizer_of(step),
        model=recipe.model if start is None else None,
        seed=recipe.seed,
        base=recipe.base,
        cache=Path(os.environ.get("NURTURE_CACHE") or out / "cache").resolve(),
        world=recipe.world,
        models=models,
    )


def _model_of(parent: Step | Path) -> Path:
    return (parent.directory / "model" if isinstance(parent, Step) else model_folder(parent)).resolve()


def _tokenizer_of(step: Step) -> Path | None:
    made = step.models.get(TOKENIZER)
    return made.directory.resolve() if isinstance(made, Step) else None


# Folders: set aside, taken back, resumed.


def _old(directory: Path) -> Path:
    return directory.with_name(directory.name + ".old")


def _prepare(step: Step) -> float:
    """Make the folder of a step ready to run in; return the seconds already spent on it.

    The same fingerprint and no manifest: the folder is kept and the stage resumes. Anything else is set aside.
    """
    _take_place(step)
    directory, old = step.directory, _old(step.directory)
    if directory.exists():
        written = _read_inputs(directory) or {}
        finished = (directory / files.MANIFEST).exists()
        if not finished and step.status == "unfinished":
            return float(written.get("seconds", 0.0))
        if finished or not (old / files.MANIFEST).exists():
            # What is complete is never given up for what is not.
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        else:
            shutil.rmtree(directory)
    files.make_directory(directory)
    return 0.0


def _take_place(step: Step) -> None:
    """Move a folder found under another number, or set aside, to where it belongs now."""
    if step.found is None or step.found == step.directory:
        return
    aside = step.directory.with_name(step.directory.name + ".swap")
    if step.directory.exists():
        # The recipe went back to what the old folder was made from: the two change places.
        shutil.rmtree(aside, ignore_errors=True)
        step.directory.rename(aside)
    step.found.rename(step.directory)
    if aside.exists():
        aside.rename(step.found)
    step.found = step.directory


def _remember(recipe: Recipe, out: Path) -> None:
    """Keep what the run was made from, for `nurture status RUN`."""
    record = {
        "recipe": recipe.document.name,
        "folder": str(recipe.folder),
        "data": {**recipe.document.data, "base": str(recipe.base)},
    }
    files.atomic_write_json(out / _RUN, record)


def recall(run_directory: Path) -> Recipe:
    """Return the recipe that a run's folder was last run with.

    Raises:
        NurtureError: the folder is not a run.
    """
    path = run_directory / _RUN
    if not path.is_file():
        raise NurtureError(
            f"{run_directory}: is not a run (no {_RUN} in it). Runs are made by `nurture run`."
        )
    record = files.read_json(path, "Run `nurture run RECIPE` again to write it anew.")
    document = Document(str(path), record["data"], {(): str(path)})
    return build_recipe(document, folder=Path(record["folder"]))


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    The lock is the operating system's, so it goes away with its process however that ends, and a stale lock cannot
    exist. The process id in the file is for the message only.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no such locks, and nothing to replace them with that dies with its process
        yield
        return
    path = directory / _LOCK
    with files.clear_disk_errors(path), open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise NurtureError(
                f"{directory}: {holder} is running here already. Wait for it, or choose another folder with --out."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
        file.truncate(0)
