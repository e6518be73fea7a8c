"""The superficial-alignment experiment of a run: which models it takes, and how its numbers are laid out.

The terminal and the page show the same tables; the page adds the curves of score against bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurture import files
from nurture.errors import NurtureError
from nurture.report.charts import Line, line_chart
from nurture.report.records import StageRecord, read_run

if TYPE_CHECKING:
    from rich.console import Console

    from nurture.evals.superficial import SuperficialConfig

FILE = "superficial.json"
_BASE_KINDS = ("pretrain", "extend")
_NOT_TALKING = ("tokenizer", "reward")


def run_experiment(
    run_directory: Path, config: SuperficialConfig, world: Any, say: Any = print
) -> dict[str, Any]:
    """Run the experiment on a run's base, its fine-tuned model, and its last model if that is another.

    Args:
        world: the world that the run was trained on.

    Raises:
        NurtureError: the run has no fine-tuned model with its base, or was not trained on the world.
    """
    from nurture.evals.superficial import BASE, TUNED, experiment
    from nurture.model.hugging_face import load_model
    from nurture.tokenizer import Tokenizer

    stages = read_run(run_directory)
    tuned = next((stage for stage in stages if stage.kind == "sft"), None)
    base = tuned.parents.get("start") if tuned else None
    if tuned is None or base is None or base.kind not in _BASE_KINDS:
        raise NurtureError(
            f"{run_directory}: the experiment needs a base model and an sft stage that starts from it, both in it."
        )
    _check_world(run_directory)
    models = {BASE: base, TUNED: tuned}
    talking = [s for s in stages if s.kind not in _NOT_TALKING and (s.folder / "model").is_dir()]
    if talking[-1] is not tuned and talking[-1] is not base:
        models[talking[-1].name] = talking[-1]
    tokenizer = Tokenizer.load(tuned.folder / "model")
    loaded = {name: load_model(stage.folder / "model") for name, stage in models.items()}
    measured = experiment(loaded, tokenizer, world, config, say)
    return {"made_from": {name: _fingerprint(stage) for name, stage in models.items()}, **measured}


def _check_world(run_directory: Path) -> None:
    recipe = run_directory / "run.json"
    if recipe.is_file() and '"world:' not in recipe.read_text(encoding="utf-8"):
        raise NurtureError(
            f"{run_directory}: this run was not trained on the embedded world, whose truth the experiment needs."
        )


def _fingerprint(stage: StageRecord) -> str:
    return str(stage.manifest.get("fingerprint", ""))


# --- layout ---------------------------------------------------------------------------------------------------------


def superficial_section(run_directory: Path) -> dict[str, Any] | None:
    """Return conclusions, charts and tables of a run's experiment, None where `nurture superficial` was not run."""
    path = run_directory / FILE
    return section(files.read_json(path, "Run `nurture superficial` again.")) if path.is_file() else None


def section(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out what `evals.superficial.experiment` measured."""
    return {
        "conclusions": measured["conclusions"],
        "limits": measured["limits"],
        "tables": tables(measured),
        "charts": charts(measured),
    }


def tables(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the experiment's tables: title, columns, rows of text."""
    programs = [
        [p["kind"], p["model"], p["detail"], f"{p['bits']:,.0f}", _share(p["right"]), _share(p["form"])]
        for p in measured["programs"]
    ]
    bits = [
        [
            t["kind"],
            t["model"],
            _bits(t),
            t["program"] or "",
            f"{100 * t['score']:.0f} %",
            f"{100 * t['best']:.0f} %",
        ]
        for t in measured["thresholds"]
    ]
    chances = [[e["kind"], e["model"], str(e["n"]), _share(e["right"])] for e in measured["best_of_n"]]
    facts = [
        [e["people"], _share(e["asked"]), _share(e["cloze"]) if e["cloze"] else ""] for e in measured["facts"]
    ]
    return [
        {
            "title": "Bits of adaptation until the score is reached",
            "columns": ["task", "model", "bits", "shortest program", "score to reach", "best reached"],
            "rows": bits,
        },
        {
            "title": "Facts in pretraining and in fine-tuning",
            "columns": ["people", "asked after fine-tuning", "base completes a sentence (chance 20 %)"],
            "rows": facts,
        },
        {
            "title": "Every program: bits it holds, right replies, replies in form",
            "columns": ["task", "model", "program", "bits", "right", "in form"],
            "rows": programs,
        },
        {
            "title": "A right reply among n sampled ones",
            "columns": ["task", "model", "n", "right"],
            "rows": chances,
        },
    ]


def _share(measure: Mapping[str, Any]) -> str:
    return f"{100 * measure['value']:.1f} % ({100 * measure['low']:.0f} to {100 * measure['high']:.0f})"


def _bits(threshold: Mapping[str, Any]) -> str:
    return f"> {threshold['tried']:,.0f}" if threshold["bits"] is None else f"{threshold['bits']:,.0f}"


def charts(measured: Mapping[str, Any]) -> list[Any]:
    """Return charts of right replies and form against bits, and of best of n, for every kind of task."""
    drawn = []
    for kind in dict.fromkeys(program["kind"] for program in measured["programs"]):
        for score, words in (("right", "right"), ("form", "in form")):
            lines = []
            for colour, model in enumerate(measured["models"]):
                own = [p for p in measured["programs"] if (p["kind"], p["model"]) == (kind, model)]
                own.sort(key=lambda p: p["bits"])
                points = [(p["bits"], p[score]["value"]) for p in own]
                bars = [(p[score]["low"], p[score]["high"]) for p in own]
                lines.append(Line(model, points, colour, colour % 4, bars, marks=True, joined=False))
                lines.append(Line(model, _best_so_far(points), colour, colour % 4))
            title = f"{kind}: {words}, against bits of adaptation"
            drawn.append(line_chart(title, lines, x_label="bits", y_label=words, log_x=True, percent=True))
        lines = []
        for colour, model in enumerate(measured["models"]):
            own = [e for e in measured["best_of_n"] if (e["kind"], e["model"]) == (kind, model)]
            points = [(e["n"], e["right"]["value"]) for e in own]
            bars = [(e["right"]["low"], e["right"]["high"]) for e in own]
            lines.append(Line(model, points, colour, colour % 4, bars, marks=True))
        title = f"{kind}: a right reply among n"
        drawn.append(line_chart(title, lines, x_label="n", y_label="right", percent=True))
    return drawn


def _best_so_far(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, by length, that no shorter program equals: the length-performance curve."""
    return [point for i, point in enumerate(points) if all(point[1] > earlier[1] for earlier in points[:i])]


def print_section(measured: Mapping[str, Any], console: Console) -> None:
    """Print tables, conclusions and limits."""
    from rich.markup import escape
    from rich.table import Table

    for laid_out in tables(measured):
        table = Table(title=laid_out["title"], title_justify="left", title_style="bold", box=None)
        for name in laid_out["columns"]:
            table.add_column(name)
        for row in laid_out["rows"]:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print()
    for text in measured["conclusions"]:
        console.print(text, highlight=False, markup=False)
        console.print()
    for text in measured["limits"]:
        console.print(text, style="dim", highlight=False, markup=False)
