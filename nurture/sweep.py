"""A sweep: one setting of one stage at several values, everything before that stage made once and shared.

The recipe is first run up to the stage before the swept one. Every value then gets a run of its own inside
`RUN/sweeps/STAGE.KEY/`, whose earlier stages are the finished folders of the run (hard links, no copies), so that the
pipeline finds them fresh. A sweep that was interrupted goes on where it stopped: finished values are not run again.

It answers the lecture's question of the data budget (10k demonstrations, 100k comparisons, 100k prompts) for the world.
Main failure mode: more data also means more updates where a stage counts epochs. Fix `steps` to see data alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nurture import files, pipeline
from nurture.errors import NurtureError
from nurture.report.sweep import FILE, FOLDER
from nurture.stages.recipe import TOKENIZER, Recipe, load_recipe


def sweep(
    recipe_name: str,
    overrides: Sequence[str],
    out: Path | None = None,
    *,
    seeds: Sequence[int] = (),
    until: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Any], Path]:
    """Run a recipe at every value of the one override that lists several (`sft.conversations=10,100,1000`).

    Args:
        recipe_name: a recipe's file or name.
        overrides: settings; exactly one names a stage's key and lists values.
        out: folder of the run that all values share.
        seeds: of the swept stage (its `seed`); one training a value if empty.
        until: measure after this stage; by default the swept one.

    Returns:
        {"key", "stage", "points"}, and the file they were written to.

    Raises:
        NurtureError: not exactly one setting lists numbers, or its stage is not in the recipe.
    """
    key, values, fixed = split_overrides(overrides)
    stage = key.split(".")[0]
    base = load_recipe(recipe_name, [*fixed, f"{key}={values[0]}"])
    names = [config.name for config in base.stages]
    if stage not in names or until not in (None, *names):
        raise NurtureError(
            f"{key if stage not in names else until}: the recipe's stages are {', '.join(names)}."
        )
    out = out or pipeline.default_directory(base)
    before = names[: names.index(stage)]
    if before or any(start is None for start in base.starts.values()):
        pipeline.run(base, out, until=before[-1] if before else TOKENIZER, say=say)
    folder = out / FOLDER / key
    points = []
    for value in values:
        for seed in seeds or (None,):
            chosen = [] if seed is None else [f"{stage}.seed={seed}"]
            recipe = load_recipe(recipe_name, [*fixed, *chosen, f"{key}={value}"])
            point = folder / (str(value) if seed is None else f"{value}-seed{seed}")
            say(f"{key}={value}" + ("" if seed is None else f", seed {seed}"))
            _share_finished(base, out, before, point)
            pipeline.run(recipe, point, until=until or stage, say=say)
            result = _result(point, until or stage)
            points.append({"value": value, "seed": recipe.seed if seed is None else seed, **result})
    measured = {"key": key, "stage": until or stage, "points": points}
    files.atomic_write_json(folder / FILE, measured)
    return measured, folder / FILE


def split_overrides(overrides: Sequence[str]) -> tuple[str, list[float], list[str]]:
    """Return the swept key, its values in order, and the other settings.

    Raises:
        NurtureError: none or several settings list numbers.
    """
    swept = [
        setting
        for setting in overrides
        if "," in setting.split("=", 1)[1] and not setting.split("=", 1)[1].startswith(("[", "{"))
    ]
    if len(swept) != 1 or "." not in swept[0].split("=")[0]:
        raise NurtureError(
            "a sweep needs exactly one setting of a stage with several values, such as"
            f" sft.conversations=10,100,1000; got {', '.join(swept) or 'none'}."
        )
    key, listed = swept[0].split("=", 1)
    try:
        values = sorted({float(value) for value in listed.split(",")})
    except ValueError:
        raise NurtureError(f"{swept[0]}: the values of a sweep must be numbers.") from None
    numbers = [int(value) if value == int(value) else value for value in values]
    if numbers[0] <= 0:
        raise NurtureError(f"{swept[0]}: the values of a sweep must be positive.")
    return key, numbers, [setting for setting in overrides if setting is not swept[0]]


def _share_finished(recipe: Recipe, run: Path, before: Sequence[str], point: Path) -> None:
    """Put the run's finished stages into a value's folder by hard links; those that are there stay."""
    for step in pipeline.plan(recipe, run):
        target = point / step.directory.name
        if (step.name in before or step.name == TOKENIZER) and step.status == "fresh" and not target.exists():
            files.make_directory(point)
            temporary = target.with_name(f"{target.name}.linking")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(step.found or step.directory, temporary, copy_function=_link)
            temporary.rename(target)


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no links. Stages replace files and never write into them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _result(point: Path, stage: str) -> dict[str, Any]:
    (folder,) = point.glob(f"[0-9][0-9]-{stage}")
    result = files.read_json(folder / "result.json", f"Delete {folder} and run again.")
    return {"tokens": result.get("tokens"), "seconds": result.get("seconds"), "metrics": result["metrics"]}
