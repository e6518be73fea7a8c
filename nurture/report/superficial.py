"""The superficial-alignment experiment of a run: which models it takes, and how its numbers are laid out.

The terminal and the page show the same tables; the page adds the curves of score against bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurture import files
from nurture.report.charts import Line, line_chart
from nurture.report.experiments import Exhibit, base_and_tuned, fingerprint, share, talking_stages

if TYPE_CHECKING:
    from nurture.evals.superficial import SuperficialConfig

FILE = "superficial.json"


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

    base, tuned = base_and_tuned(run_directory)
    models = {BASE: base, TUNED: tuned}
    last = talking_stages(run_directory)[-1]
    if last.folder not in (base.folder, tuned.folder):
        models[last.name] = last
    tokenizer = Tokenizer.load(tuned.folder / "model")
    loaded = {name: load_model(stage.folder / "model") for name, stage in models.items()}
    measured = experiment(loaded, tokenizer, world, config, say)
    return {"made_from": {name: fingerprint(stage) for name, stage in models.items()}, **measured}


def superficial_exhibit(run_directory: Path) -> Exhibit | None:
    """Return what `nurture superficial` measured of a run, None where it was not run."""
    path = run_directory / FILE
    return exhibit(files.read_json(path, "Run `nurture superficial` again.")) if path.is_file() else None


def exhibit(measured: Mapping[str, Any]) -> Exhibit:
    """Lay out what `evals.superficial.experiment` measured."""
    title, limits = "Is alignment superficial?", measured["limits"]
    return Exhibit("superficial", title, measured["conclusions"], tables(measured), charts(measured), limits)


def tables(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the experiment's tables: title, columns, rows of text."""
    programs = [
        [p["kind"], p["model"], p["detail"], f"{p['bits']:,.0f}", share(p["right"]), share(p["form"])]
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
    chances = [[e["kind"], e["model"], str(e["n"]), share(e["right"])] for e in measured["best_of_n"]]
    facts = [
        [e["people"], share(e["asked"]), share(e["cloze"]) if e["cloze"] else ""] for e in measured["facts"]
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
        *_shift_tables(measured.get("token_shift", [])),
    ]


def _shift_tables(shifts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how the base ranks the tokens of replies: in all and by kind, by place, and the most shifted ones."""
    rates = ("unshifted", "marginal", "shifted")

    def line(shift: Mapping[str, Any], what: str, row: Mapping[str, Any]) -> list[str]:
        return [
            shift["model"],
            shift["spelling"],
            what,
            f"{row['shifted']['n']:,}",
            *(share(row[r]) for r in rates),
        ]

    rows = [[line(s, "all", s["all"]), *(line(s, row["kind"], row) for row in s["by_kind"])] for s in shifts]
    places = [line(s, row["place"], row) for s in shifts for row in s["by_place"]]
    tokens = [
        [
            s["model"],
            s["spelling"],
            repr(t["token"])[1:-1],
            f"{t['shifted']}",
            f"{t['written']}",
            f"{t['rank']:g}",
        ]
        for s in shifts
        for t in s["tokens"]
    ]
    columns = ["model", "base reads", "", "tokens", "first choice", "second or third", "shifted"]
    return (
        [
            {
                "title": "Tokens of likeliest replies by the base's rank, by kind of prompt (intervals over replies)",
                "columns": [*columns[:2], "prompts", *columns[3:]],
                "rows": [row for of_shift in rows for row in of_shift],
            },
            {
                "title": "The same by place in the reply; `end` is the token that ends it",
                "columns": [*columns[:2], "place", *columns[3:]],
                "rows": places,
            },
            {
                "title": "Tokens shifted most often",
                "columns": ["model", "base reads", "token", "shifted", "written", "median rank when shifted"],
                "rows": tokens,
            },
        ]
        if shifts
        else []
    )


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
    return drawn + _shift_charts(measured.get("token_shift", []))


def _shift_charts(shifts: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return a chart of shifted tokens against the place in the reply, if that was measured."""
    lines = []
    for colour, shift in enumerate(shifts):
        spans = [row for row in shift["by_place"] if row["place"] != "end"]
        points = [(int(row["place"].split("-")[0]), row["shifted"]["value"]) for row in spans]
        bars = [(row["shifted"]["low"], row["shifted"]["high"]) for row in spans]
        name = f"{shift['model']}, read as {shift['spelling']}"
        lines.append(Line(name, points, colour, colour % 4, bars, marks=True))
    title = "Tokens that are not among the base's first three, by place in the reply"
    return (
        [line_chart(title, lines, x_label="place (tokens)", y_label="shifted", log_x=True, percent=True)]
        if lines
        else []
    )


def _best_so_far(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, by length, that no shorter program equals: the length-performance curve."""
    return [point for i, point in enumerate(points) if all(point[1] > earlier[1] for earlier in points[:i])]
