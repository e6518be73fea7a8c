"""What the experiments on a finished run share: which models they take, and how their numbers are laid out.

An experiment (`superficial`, `tay`, `sweep`) leaves one JSON file in the run's folder. Its own module lays that out as
an `Exhibit`; the terminal and the page show the same one, the page with charts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurture.errors import NurtureError
from nurture.report.records import StageRecord, read_run

if TYPE_CHECKING:
    from rich.console import Console

BASE_KINDS = ("pretrain", "extend")
_NOT_TALKING = ("tokenizer", "reward")


@dataclass(frozen=True)
class Exhibit:
    """An experiment laid out.

    Attributes:
        key: the section's anchor.
        title: of the section.
        conclusions: sentences made from the numbers.
        tables: {"title", "columns", "rows"}, rows of text.
        charts: figures as markup.
        limits: what the numbers do not say.
    """

    key: str
    title: str
    conclusions: Sequence[str]
    tables: Sequence[Mapping[str, Any]]
    charts: Sequence[Any] = ()
    limits: Sequence[str] = ()


def talking_stages(run_directory: Path) -> list[StageRecord]:
    """Return the finished stages of a run that made a language model.

    Raises:
        NurtureError: there are none.
    """
    stages = [
        stage
        for stage in read_run(run_directory)
        if stage.kind not in _NOT_TALKING and (stage.folder / "model").is_dir()
    ]
    if not stages:
        raise NurtureError(f"{run_directory}: no finished stage has a language model.")
    return stages


def base_and_tuned(run_directory: Path) -> tuple[StageRecord, StageRecord]:
    """Return a run's first sft stage and the base model it started from, the base first.

    Raises:
        NurtureError: there is no such pair in the run, or it was not trained on the world, whose truth is needed.
    """
    stages = talking_stages(run_directory)
    tuned = next((stage for stage in stages if stage.kind == "sft"), None)
    base = next((stage for stage in tuned.lineage if stage.kind in BASE_KINDS), None) if tuned else None
    if tuned is None or base is None:
        raise NurtureError(
            f"{run_directory}: the experiment needs a base model and an sft stage that starts from it, both in it."
        )
    recipe = run_directory / "run.json"
    if recipe.is_file() and '"world:' not in recipe.read_text(encoding="utf-8"):
        raise NurtureError(
            f"{run_directory}: this run was not trained on the embedded world, whose truth the experiment needs."
        )
    return base, tuned


def fingerprint(stage: StageRecord) -> str:
    """Return what names a stage's result."""
    return str(stage.manifest.get("fingerprint", ""))


def share(measure: Mapping[str, Any] | None) -> str:
    """Write a rate with its interval: `12 % (8 to 19)`."""
    if measure is None:
        return ""
    return f"{100 * measure['value']:.0f} % ({100 * measure['low']:.0f} to {100 * measure['high']:.0f})"


def print_exhibit(exhibit: Exhibit, console: Console) -> None:
    """Print tables, conclusions and limits."""
    from rich.markup import escape
    from rich.table import Table

    for laid_out in exhibit.tables:
        table = Table(title=laid_out["title"], title_justify="left", title_style="bold", box=None)
        for name in laid_out["columns"]:
            table.add_column(name)
        for row in laid_out["rows"]:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print()
    for text in exhibit.conclusions:
        console.print(text, highlight=False, markup=False)
        console.print()
    for text in exhibit.limits:
        console.print(text, style="dim", highlight=False, markup=False)
