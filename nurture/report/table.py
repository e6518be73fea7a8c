"""The before/after table of a run, in the terminal and as JSON.

Reads the `result.json` each finished stage left behind and nothing else, so a report can be made of any run, finished
or not, without loading a model. The JSON shape is flat on purpose: scripts read it (DESIGN.md, "Runs on disk").
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from nurture import files
from nurture.errors import NurtureError

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

_log = logging.getLogger(__name__)

RATES = frozenset(
    "facts arithmetic translation cloze format stopped share pair_accuracy pair_ceiling tie_accuracy gold_win_rate "
    "harm over_refusal think_obeyed no_think_obeyed math math_think math_no_think code code_exact wordle_win "
    "wordle_solver wordle_random passkey multikey variables passkey_yarn multikey_yarn variables_yarn".split()
)
"""Measures between 0 and 1 that read better as percentages."""


def collect(run_directory: Path) -> dict[str, Any]:
    """Return the results of a run's finished stages in the shape of DESIGN.md.

    Raises:
        NurtureError: the folder is not a run, or no result of it can be read.
    """
    if not run_directory.is_dir():
        raise NurtureError(f"{run_directory}: there is no such run. `nurture run` makes one.")
    stages = []
    for folder in _with_result(run_directory):
        result, problem = _result(folder)
        if result is not None:
            stages.append(result)
        else:
            _log.warning("%s The stage is left out of the report; delete its folder and run again.", problem)
    if not stages:
        is_run = (run_directory / "run.json").is_file()
        remedy = (
            f"`nurture status {run_directory}` shows what is missing." if is_run else _no_run(run_directory)
        )
        raise NurtureError(f"{run_directory}: no stage has finished here. {remedy}")
    seconds = round(sum(stage.get("seconds", 0.0) for stage in stages), 3)
    return {"run": run_directory.resolve().name, "seconds": seconds, "stages": stages}


def _no_run(folder: Path) -> str:
    """Say what a folder is that is not a run's, and which runs are near."""
    if (folder.parent / "run.json").is_file():
        return f"It is in the run {folder.parent}: report that."
    runs = ", ".join(str(inside.parent) for inside in sorted(folder.glob("*/run.json")))
    return f"It is not a run's folder; in it are {runs}." if runs else "It is not a run's folder."


def finished_stages(run_directory: Path) -> list[Path]:
    """Return the folders of the finished stages of a run whose results can be read, in order."""
    return [folder for folder in _with_result(run_directory) if _result(folder)[0] is not None]


def _with_result(run_directory: Path) -> list[Path]:
    folders = sorted(run_directory.glob("[0-9][0-9]-*"))
    return [
        folder
        for folder in folders
        if folder.suffix not in (".old", ".swap")
        and (folder / files.MANIFEST).is_file()
        and (folder / "result.json").is_file()
    ]


def _result(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the results of a stage, or None and what is wrong with the file."""
    path = folder / "result.json"
    try:
        result = files.read_json(path)
    except NurtureError as error:
        return None, str(error)
    return (result, "") if isinstance(result, dict) else (None, f"{path}: no results (not a mapping).")


def collect_all(run_directories: Sequence[Path]) -> dict[str, Any]:
    """Return one run's results, or those of several runs merged: means, and intervals of the spread between runs."""
    if len(run_directories) == 1:
        return collect(run_directories[0])
    from nurture.report.records import merged, read_rows

    return merged(read_rows(run_directories), run_directories)


def report_json(run_directories: Sequence[Path]) -> str:
    """Return the report as JSON text."""
    return json.dumps(collect_all(run_directories), indent=2, ensure_ascii=False)


def print_report(run_directories: Sequence[Path], console: Console) -> None:
    """Print the before/after table and what to run next."""
    from rich.markup import escape

    console.print(before_after_table(collect_all(run_directories)))
    console.print("[bold]Next[/bold]")
    for command, purpose in next_steps(run_directories[0]):
        shown = f"  [cyan]{escape(command)}[/cyan]  [dim]{purpose}[/dim]"
        console.print(shown, highlight=False, soft_wrap=True)


def before_after_table(report: dict[str, Any]) -> Group:
    """Lay out a report: a table a stage, columns in line with each other."""
    from rich.console import Group
    from rich.text import Text

    metrics = [pair for stage in report["stages"] for pair in stage.get("metrics", {}).items()]
    width = max([len("measure"), *(len(name) for name, _ in metrics)])
    # A checkpoint that is only measured has no before.
    compares = any(isinstance(metric, dict) and metric.get("before") is not None for _, metric in metrics)
    what = "before and after, " if compares else ""
    title = Text(f"{report['run']}: {what}{clock(report['seconds'])}\n", style="bold")
    return Group(title, *(_stage_table(stage, width, compares=compares) for stage in report["stages"]))


def titled_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False
) -> Table:
    """Return a table whose texts are shown as they are, markup in them included; other cells are rich's own.

    Args:
        numbers: the columns after the first hold numbers.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
    for place, name in enumerate(columns):
        table.add_column(escape(name), overflow="fold", justify="right" if numbers and place else "left")
    for row in rows:
        table.add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _stage_table(stage: dict[str, Any], measure_width: int, *, compares: bool) -> Table:
    from rich.table import Table

    facts = f"{clock(stage.get('seconds', 0))}{_tokens(stage)}"
    table = Table(
        title=f"[bold]{stage['name']}[/bold]  [dim]{facts}[/dim]",
        title_justify="left",
        title_style="",
        box=None,
    )
    # Filled up with spaces, for columns in line with other stages'; in a narrow terminal its names are folded.
    table.add_column("measure".ljust(measure_width), min_width=8, overflow="fold")
    columns = {"before": 8} if compares else {}
    columns |= {"after" if compares else "value": 8, "95 % interval": 16, "n": 9}
    for name, width in columns.items():
        table.add_column(name, min_width=width, justify="right", no_wrap=True)
    for name, metric in stage.get("metrics", {}).items():
        table.add_row(name, *list(_cells(name, metric))[not compares :])
    if not stage.get("metrics"):
        table.add_row("[dim]nothing measured[/dim]")
    table.add_row()
    return table


def _cells(name: str, metric: Any) -> Iterator[str]:
    values = metric if isinstance(metric, dict) else {"after": metric}
    before, after = values.get("before"), values.get("after")
    yield _number(name, before)
    yield (
        f"[bold]{_number(name, after)}[/bold]"
        if before is not None and before != after
        else _number(name, after)
    )
    low, high = values.get("low"), values.get("high")
    yield "" if low is None or high is None else f"{_number(name, low)} - {_number(name, high)}"
    yield "" if values.get("n") is None else f"{values['n']:,}"


def _number(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if name.split("/")[0] in RATES:
        return f"{100 * value:.1f} %"
    whole = isinstance(value, int) or (value.is_integer() and value >= 1000)  # a mean of counts is a float
    return f"{value:,.0f}" if whole else f"{value:.3f}"


def _tokens(stage: dict[str, Any]) -> str:
    tokens = stage.get("tokens") or 0
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f", {tokens / size:.1f}{letter} tokens"
    return f", {tokens} tokens" if tokens else ""


def clock(seconds: float) -> str:
    """Return a duration for people: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def next_steps(run_directory: Path) -> list[tuple[str, str]]:
    """Return commands worth running now, as a shell reads them, each with what it does."""
    with_model = [
        folder
        for folder in finished_stages(run_directory)
        if (folder / "model").is_dir() and stage_kind(folder) != "reward"  # it scores, and does not talk
    ]
    run, steps = quote(str(run_directory)), []
    if with_model:
        kind = stage_kind(with_model[-1])
        first, last = (quote(str(with_model[place])) for place in (0, -1))
        what = "see how it continues a text" if kind in ("pretrain", "extend") else "talk to the model"
        steps.append((f"nurture chat {last}", what))
        if len(with_model) > 1:
            steps.append(
                (f"nurture chat {first} {last}", "the same questions to the first and the last model")
            )
        rewards = [folder for folder in finished_stages(run_directory) if stage_kind(folder) == "reward"]
        if rewards:
            reward_model = quote(f"reward_model={rewards[-1]}")
            steps.append(
                (
                    f"nurture ppo --model {last} --data world:tasks {reward_model} steps=25",
                    "train it on the reward model's scores",
                )
            )
        if kind in ("pretrain", "extend"):
            steps.append((f"nurture sft --model {last} --data CHATS.jsonl", "teach it to answer"))
    steps.append((f"nurture report {run} --html report.html", "a page with plots and replies"))
    steps.append((f"nurture report {run} --json", "the numbers for a script"))
    return steps


def stage_kind(folder: Path) -> str:
    """Return the kind of a finished stage."""
    return str(files.read_json(folder / "result.json", f"Delete {folder} and run again.").get("kind", ""))
