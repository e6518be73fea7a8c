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
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nurture import files, stages
from nurture.data.sources import DataSpec, split_spec
from nurture.errors import NurtureError, did_you_mean
from nurture.recipe import Document
from nurture.stages.context import StageConfig, StageContext
from nurture.stages.recipe import (
    TOKENIZER,
    Recipe,
    build_recipe,
    change_specs,
    data_specs,
    model_folder,
    template_files,
    training_sources,
)

_INPUTS = "inputs.json"
_RUN = "run.json"
_LOCK = ".lock"
_log = logging.getLogger(__name__)


# --- data and checkpoints, identified without reading them ----------------------------------------------------------


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
    manifest, problem = _manifest(path)
    if manifest is not None:
        return str(manifest.get("fingerprint"))
    if problem:
        _log.warning("%s Whether the stage is whole is not known; its model is used as it is.", problem)
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
        NurtureError: `from_stage` is not in the recipe.
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
        for name, spec in training_sources(config).items()
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
        "settings": _effective_settings(config)
        | {key: files.sha256_file(file) for key, file in template_files(config, recipe.base).items()},
        "seed": recipe.seed,
        "world": recipe.world,
        "data": {
            name: identify_data(spec, recipe.base, recipe.world)
            for name, spec in training_sources(config).items()
        },
        "from": {
            role: parent.fingerprint if isinstance(parent, Step) else _identify_checkpoint(parent)
            for role, parent in (("start", step.start), *step.models.items())
            if parent is not None
        },
    }
    if step.start is None and config.kind != TOKENIZER:
        inputs["model"] = recipe.model
    if further := _further_files(config, recipe):
        inputs["files"] = further
    return inputs


def _further_files(config: StageConfig, recipe: Recipe) -> dict[str, str]:
    """Identify the files of data specs outside `sources` and `data`; what else these name is in the settings."""
    found = {}
    for path, spec in data_specs(config):
        is_file = any(not part.startswith(("world:", "stage:", "hf:")) for part in split_spec(spec))
        if path[0] not in ("sources", "data") and is_file:
            found[".".join(path)] = identify_data(spec, recipe.base, recipe.world)
    return found


def _effective_settings(config: StageConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"name", "kind", "start", "sources", "data"})
    for dotted in config.without_effect:
        *path, key = dotted.split(".")
        section = settings
        for part in path:
            section = section[part]
        del section[key]
    return settings


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
        manifest, problem = _manifest(folder)
        record = manifest or _read_inputs(folder)
        is_this = record is not None and record.get("fingerprint") == step.fingerprint
        if problem and folder in here and (is_this or record is None):
            return "damaged", problem, folder
        if problem or record is None or not is_this:
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


def _manifest(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the manifest of a finished folder, None where there is none, and what is wrong with one."""
    try:
        return files.read_manifest(folder) if folder.is_dir() else None, ""
    except NurtureError as error:
        return None, str(error)


def _elsewhere(step: Step) -> tuple[Path, ...]:
    """Folders of the same stage under another number: a stage was put in or taken out before it."""
    return tuple(sorted(step.directory.parent.glob(f"[0-9][0-9]-{glob.escape(step.name)}")))


_ABOUT = (_INPUTS, "stage.yaml", "result.json", "metrics.jsonl", "samples.jsonl", "outcomes.json")


def _made(step: Step) -> dict[str, str]:
    """Identify what a step's parents left by content: the same settings may give another model (other hardware)."""
    made = {}
    for parent in step.parents:
        manifest, _ = _manifest(parent.found or parent.directory)
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
    try:
        value = files.read_json(path)
    except NurtureError:  # damaged: it says nothing of what the folder was made from
        return None
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
        elif key.startswith(("data.", "files.")):
            words.append(f"{label.removeprefix('files.')} changed")
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
    processes = _join_processes()
    with _lock(out) if processes.is_main else nullcontext():
        steps = _agreed_plan(recipe, out, processes, from_stage=from_stage, force=force)
        if until is not None:
            steps = steps[: steps.index(_step_named(steps, until, "--until")) + 1]
        if processes.is_main:
            _remember(recipe, out)
        ran = []
        for step in steps:
            if step.status == "fresh":
                if processes.is_main:
                    _take_place(step)
                say(f"{step.directory.name}: fresh, nothing to do")
            else:
                say(f"{step.directory.name}: {step.reason}")
                _run_step(step, recipe, out, processes)
                ran.append(step.name)
    return Outcome(out, tuple(ran), tuple(step.name for step in steps if step.status == "fresh"))


class _OnlyProcess:
    """What `runtime.Processes` is for a single process, without importing torch."""

    is_main = True

    def agree(self, value: Any) -> Any:
        return value

    def wait(self) -> None:
        pass


def _join_processes() -> Any:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _OnlyProcess()
    from nurture.runtime import join_processes

    return join_processes()


def _release_memory() -> None:
    if "torch" in sys.modules:  # a stage without it had no large blocks
        from nurture.runtime import release_memory

        release_memory()


def _agreed_plan(recipe: Recipe, out: Path, processes: Any, **how: Any) -> list[Step]:
    """Return the plan as the main process sees it: the others must not look at folders that it is changing."""
    steps = plan(recipe, out, **how) if processes.is_main else _steps(recipe, out)
    verdicts = processes.agree([(step.status, step.reason) for step in steps])
    for step, (status, reason) in zip(steps, verdicts):
        step.status, step.reason = status, reason
    return steps


def _run_step(step: Step, recipe: Recipe, out: Path, processes: Any) -> None:
    """Run one stage in its folder and declare the folder complete. All processes train, the main one keeps books."""
    already = 0.0
    if processes.is_main:
        already = _prepare(step)
        files.atomic_write_json(step.directory / _INPUTS, _inputs_record(step, already))
        settings = step.config.model_dump(mode="json")
        files.atomic_write_text(step.directory / "stage.yaml", yaml.safe_dump(settings, sort_keys=False))
    processes.wait()
    started = time.perf_counter()
    try:
        _module(step.config.kind).run(_reading_stages(step), _context(step, recipe, out))
    except BaseException:
        # So that the seconds of a stage count all its attempts; a killed process loses only its own.
        if processes.is_main:
            record = _inputs_record(step, already + time.perf_counter() - started)
            files.atomic_write_json(step.directory / _INPUTS, record)
        raise
    processes.wait()
    if processes.is_main:
        _finish(step, round(already + time.perf_counter() - started, 3))
    processes.wait()
    _release_memory()


def _finish(step: Step, seconds: float) -> None:
    """Declare a stage's folder complete and remove what that makes superfluous."""
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
        cache=(out / "cache").resolve(),
        world=recipe.world,
        models=models,
    )


def _reading_stages(step: Step) -> StageConfig:
    """Return a step's settings with data that an earlier stage wrote (`stage:NAME/FILE`) as paths."""

    def path_of(part: str) -> str:
        name, _, file = part.removeprefix("stage:").partition("/")
        parent = step.models.get(name)
        if not part.startswith("stage:") or not isinstance(parent, Step):
            return part
        return str(parent.directory.resolve() / (file or "rows.jsonl"))

    def resolved(spec: str) -> DataSpec:
        return DataSpec(",".join(path_of(part) for part in split_spec(spec)))

    return change_specs(step.config, resolved)


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


def recall_world(checkpoint: Path) -> dict[str, Any]:
    """Return the world's settings of the run that a checkpoint lies in, `{}` if it lies in none."""
    for folder in checkpoint.resolve().parents[:2]:
        if (folder / _RUN).is_file():
            record = files.read_json(folder / _RUN, "Run `nurture run RECIPE` again to write it anew.")
            return dict(record["data"].get("world") or {})
    return {}


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    The lock is the operating system's, so it goes away with its process however that ends, and a stale lock cannot
    exist. The process id in the file is for the message only.
    """
    files.make_directory(directory)
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
