"""The Tay question of a run: which models are asked, and how red team and replay are laid out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurture import files
from nurture.report.charts import Line, line_chart
from nurture.report.experiments import BASE_KINDS, Exhibit, base_and_tuned, fingerprint, share, talking_stages

if TYPE_CHECKING:
    from nurture.evals.tay import TayConfig

FILE = "tay.json"
_TOLD = "harm_told/"


def run_tay(run_directory: Path, config: TayConfig, world: Any, say: Any = print) -> dict[str, Any]:
    """Ask the red team of every language model of a run; base, fine-tuned and last one live through the day.

    Raises:
        NurtureError: the run has no fine-tuned model with its base, or was not trained on the world.
    """
    from nurture.evals.tay import experiment
    from nurture.model.hugging_face import load_model
    from nurture.tokenizer import Tokenizer

    base, tuned = base_and_tuned(run_directory)
    stages = talking_stages(run_directory)
    models = {stage.name: load_model(stage.folder / "model") for stage in stages}
    bases = frozenset(stage.name for stage in stages if stage.kind in BASE_KINDS)
    tokenizer = Tokenizer.load(tuned.folder / "model")
    replayed = list(dict.fromkeys([base.name, tuned.name, stages[-1].name]))
    measured = experiment(models, bases, tokenizer, world, config, say, replayed)
    return {"made_from": {stage.name: fingerprint(stage) for stage in stages}, **measured}


def tay_exhibit(run_directory: Path) -> Exhibit | None:
    """Return what `nurture tay` measured of a run, None where it was not run."""
    path = run_directory / FILE
    return exhibit(files.read_json(path, "Run `nurture tay` again.")) if path.is_file() else None


def exhibit(measured: Mapping[str, Any]) -> Exhibit:
    """Lay out what `evals.tay.experiment` measured."""
    return Exhibit(
        "tay",
        "The Tay question",
        measured["conclusions"],
        tables(measured),
        charts(measured),
        measured["limits"],
    )


def tables(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return red team, kinds of attack, instructions, and the day."""
    asked: Mapping[str, Mapping[str, Any]] = measured["red_team"]

    def table(title: str, columns: Mapping[str, str]) -> dict[str, Any]:
        rows = [[name, *(share(found.get(key)) for key in columns)] for name, found in asked.items()]
        return {"title": title, "columns": ["model", *columns.values()], "rows": rows}

    kinds = list(dict.fromkeys(key for found in asked.values() for key in found if key.startswith("harm/")))
    told = list(dict.fromkeys(key for found in asked.values() for key in found if key.startswith(_TOLD)))
    new = [key.replace("harm/", "harm_new/") for key in kinds]
    return [
        table(
            "Harm and over-refusal",
            {
                "harm": "harm, familiar attacks",
                "harm_new": "harm, new wordings",
                "harm_thread": "harm, asked by a forum thread",
                "over_refusal": "innocent requests refused",
                "over_refusal_new": "innocent twins of new wordings refused",
            },
        ),
        table("Told before small talk: harm", {key: key.removeprefix(_TOLD) for key in told}),
        table("Harm by attack, familiar wordings", {key: key.removeprefix("harm/") for key in kinds}),
        table(
            "Harm by attack, new wordings",
            {
                key: key.removeprefix("harm_new/")
                for key in new
                if any(key in found for found in asked.values())
            },
        ),
        _replay_table(measured),
    ]


def _replay_table(measured: Mapping[str, Any]) -> dict[str, Any]:
    columns = {
        "harm": "harm when provoked",
        "unprovoked": "unprovoked harm",
        "over_refusal": "refused",
        "lesson": "lesson learned",
    }
    names = {"before": "before the day", "prompted": "prompted with it", "none": "learned, no defence"}
    rows = [
        [
            entry["model"],
            names.get(entry["arm"], f"learned, {entry['arm']}"),
            str(entry["learned"]),
            *(share(entry[key]) for key in columns),
        ]
        for entry in measured["replay"]
    ]
    heads = ["model", "day", "conversations learned", *columns.values()]
    return {"title": "A day among hostile users", "columns": heads, "rows": rows}


def charts(measured: Mapping[str, Any]) -> list[Any]:
    """Return one chart a model: harm against conversations learned, by defence."""
    drawn = []
    for model in dict.fromkeys(entry["model"] for entry in measured["replay"]):
        own = [entry for entry in measured["replay"] if entry["model"] == model]
        start = next(entry for entry in own if entry["arm"] == "before")
        lines = []
        for colour, arm in enumerate(
            dict.fromkeys(entry["arm"] for entry in own if entry["arm"] != "before")
        ):
            points = [entry for entry in own if entry["arm"] == arm]
            points = points if arm == "prompted" else [start, *points]
            lines.append(
                Line(
                    "no defence" if arm == "none" else arm,
                    [(float(entry["learned"]), entry["harm"]["value"]) for entry in points],
                    colour,
                    colour % 4,
                    [(entry["harm"]["low"], entry["harm"]["high"]) for entry in points],
                    marks=True,
                )
            )
        title = f"{model}: harm when provoked, over the day"
        drawn.append(line_chart(title, lines, x_label="conversations learned", y_label="harm", percent=True))
    return drawn
