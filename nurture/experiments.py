"""The commands that experiment on a run, `superficial`, `tay` and `sweep`: settings in, numbers to a file, tables out.

Like cli.py, which gives them their names, this is light to import; everything heavy is imported inside.
"""

from __future__ import annotations

import json as json_module  # commands have an option of this name
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nurture.errors import NurtureError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def world_of(path: Path) -> Any:
    """Return the world of the run that a checkpoint belongs to, the default world if it belongs to none."""
    from nurture.data.sources import make_world
    from nurture.pipeline import recall_world

    return make_world(recall_world(path))


def superficial(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run with a base model and an sft stage.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Size of the experiment: questions, examples, shots ..."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the numbers [dim](default: RUN/superficial.json)[/dim].")
    ] = None,
    json: Json = False,
) -> None:
    """Is alignment superficial? Score against bits of adaptation, best of n, new facts, and shifted tokens."""
    from nurture.evals.superficial import SuperficialConfig
    from nurture.report.superficial import FILE, exhibit, run_experiment

    config = _checked(SuperficialConfig, "nurture superficial", settings)
    _show_experiment(run_directory, run_experiment, exhibit, config, out or run_directory / FILE, json)


def tay(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run with a base model and an sft stage.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Size of red team and day: per_attack, hostile ..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the numbers [dim](default: RUN/tay.json)[/dim].")
    ] = None,
    json: Json = False,
) -> None:
    """The Tay question: a red team, then a day of learning from hostile users, with and without defences."""
    from nurture.evals.tay import TayConfig
    from nurture.report.tay import FILE, exhibit, run_tay

    config = _checked(TayConfig, "nurture tay", settings)
    _show_experiment(run_directory, run_tay, exhibit, config, out or run_directory / FILE, json)


def sweep(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE STAGE.KEY=V1,V2,...", help="A recipe and the setting that is swept."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run [dim](default: runs/NAME)[/dim].")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the swept stage. May be repeated.")] = None,
    until: Annotated[
        str | None, typer.Option(help="Measure after this stage [dim](default: the swept)[/dim].")
    ] = None,
) -> None:
    """Data budget: run one stage with more and more data, and fit what that brings. Earlier stages run once."""
    from rich.console import Console

    from nurture.report.experiments import print_exhibit
    from nurture.report.sweep import exhibit
    from nurture.sweep import sweep as run_sweep

    recipe = next((word for word in arguments if "=" not in word), "tiny")
    settings = [word for word in arguments if word != recipe]
    measured, path = run_sweep(recipe, settings, out, seeds=seed or (), until=until)
    print_exhibit(exhibit(measured), Console())
    print(f"wrote {path}")


def _checked(section: Any, name: str, settings: list[str] | None) -> Any:
    """Return a section made of `key=value` settings, or name what is wrong with them."""
    from nurture.recipe import Document, apply_overrides, check

    document = Document(name)
    apply_overrides(document, settings or [], roots={}, known=tuple(section.model_fields))
    config = check(section, document)
    document.raise_problems()
    return config


def _show_experiment(
    run_directory: Path, experiment: Any, exhibit: Any, config: Any, out: Path, json: bool
) -> None:
    """Make an experiment on a run, keep its numbers in `out`, and print them."""
    from rich.console import Console

    from nurture.files import atomic_write_json, make_directory
    from nurture.report.experiments import print_exhibit

    # Before the experiment, which takes minutes: its numbers must have somewhere to go.
    if out.is_dir():
        raise NurtureError(
            f"--out {out}: this is a folder. Give the name of a file, such as {out / 'numbers.json'}."
        )
    if run_directory.is_dir():
        make_directory(out.parent)
    world = world_of(run_directory / "model")  # any place inside the run
    measured = experiment(run_directory, config, world, say=lambda line: print(line, file=sys.stderr))
    atomic_write_json(out, measured)
    if json:
        print_json(measured)
    else:
        print_exhibit(exhibit(measured), Console())


def print_json(value: Any) -> None:
    """Print `value` for scripts."""
    print(json_module.dumps(value, indent=2))


COMMANDS: dict[Any, tuple[str, ...]] = {
    superficial: (
        "nurture superficial runs/tiny",
        "nurture superficial runs/tiny questions=200 examples=[10,100] --out trial.json",
    ),
    tay: ("nurture tay runs/tiny", "nurture tay runs/tiny hostile=0.2 anchor=2 --out trial.json"),
    sweep: (
        "nurture sweep tiny sft.conversations=10,100,1000 sft.steps=150",
        "nurture sweep my.yaml reward.comparisons=100,300,1000 --seed 0 --seed 1",
    ),
}
"""Command -> examples for its help."""
