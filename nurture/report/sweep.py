"""A sweep laid out: what each size of a data set brought, with the fitted curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nurture import files
from nurture.evals.data_budget import PowerLaw, about, fit_power_law
from nurture.report.charts import Line, line_chart
from nurture.report.experiments import Exhibit, share
from nurture.report.records import is_rate

FILE = "sweep.json"
FOLDER = "sweeps"
"""In a run's folder: where its sweeps lie, one folder a swept setting."""
_TOGETHER = 4
"""Measures in one chart."""


def sweep_exhibits(run_directory: Path) -> list[Exhibit]:
    """Return the sweeps that were made on a run."""
    found = sorted((run_directory / FOLDER).glob(f"*/{FILE}"))
    return [exhibit(files.read_json(path, "Run `nurture sweep` again.")) for path in found]


def exhibit(measured: Mapping[str, Any]) -> Exhibit:
    """Lay out {"key", "stage", "points": [{"value", "seed", "metrics"}]}."""
    key, points = measured["key"], measured["points"]
    names = [name for name in points[0]["metrics"] if all(name in point["metrics"] for point in points)]
    laws = {name: law for name in names if is_rate(name) and (law := _law(name, points)) is not None}
    changing = [name for name, law in laws.items() if _moves(name, points)]
    unit = key.rsplit(".", 1)[-1]
    sizes = [float(point["value"]) for point in points]
    said = [about(name, unit, laws[name], sizes) for name in changing]
    still = [name for name in laws if name not in changing]
    if still:
        said.append(f"Not clearly changed over this range: {', '.join(still)}.")
    return Exhibit(
        f"sweep-{key.replace('.', '-')}",
        f"Data budget: {key}",
        said,
        [_table(key, names, points), *([_fits(laws, changing)] if changing else [])],
        [
            _chart(unit, changing[first : first + _TOGETHER], points, laws)
            for first in range(0, len(changing), _TOGETHER)
        ],
        [
            "Every size is another training from the same start; bars are 95 % intervals over held-out questions. The "
            "curve is a saturating power law fitted to them; its intervals know of questions, and of seeds only where "
            "several were run.",
        ],
    )


def _law(name: str, points: list[Mapping[str, Any]]) -> PowerLaw | None:
    entries = [point["metrics"][name] for point in points]
    sizes = [float(point["value"]) for point in points]
    counts = [int(entry.get("n") or 0) for entry in entries]
    if len(set(sizes)) < 3 or min(counts) < 1:
        return None
    return fit_power_law(sizes, [float(entry["after"]) for entry in entries], counts)


def _moves(name: str, points: list[Mapping[str, Any]]) -> bool:
    """Say whether the intervals of some two points do not touch."""
    bounds = [(p["metrics"][name].get("low", 0.0), p["metrics"][name].get("high", 1.0)) for p in points]
    return max(low for low, _ in bounds) > min(high for _, high in bounds)


def _table(key: str, names: list[str], points: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row for every measure and a column for every size, of which there are fewer."""
    seeds = len({point["seed"] for point in points}) > 1
    sizes = [f"{point['value']:,}" + (f", seed {point['seed']}" if seeds else "") for point in points]
    rows = []
    for name in names:
        cells = []
        for point in points:
            entry = point["metrics"][name]
            value = {"value": entry["after"], "low": entry.get("low"), "high": entry.get("high")}
            cells.append(
                share(value) if is_rate(name) and value["low"] is not None else f"{entry['after']:.3f}"
            )
        rows.append([name, *cells])
    return {"title": f"Measured, by {key}", "columns": ["measure", *sizes], "rows": rows}


def _fits(laws: Mapping[str, PowerLaw], names: list[str]) -> dict[str, Any]:
    rows = []
    for name in names:
        law = laws[name]
        low, high = law.intervals["exponent"]
        bottom, top = law.intervals["ceiling"]
        rows.append(
            [
                name,
                f"{100 * law.ceiling:.0f} % ({100 * bottom:.0f} to {100 * top:.0f})",
                f"{law.exponent:.2f} ({low:.2f} to {high:.2f})",
                f"{100 * law.error:.1f}",
            ]
        )
    columns = ["measure", "ceiling", "exponent", "residual, points"]
    return {"title": "Fitted: ceiling - gap * n^-exponent", "columns": columns, "rows": rows}


def _chart(unit: str, names: list[str], points: list[Mapping[str, Any]], laws: Mapping[str, PowerLaw]) -> Any:
    lines = []
    for colour, name in enumerate(names):
        own = [(float(p["value"]), p["metrics"][name]) for p in points]
        bars = [(e.get("low", e["after"]), e.get("high", e["after"])) for _, e in own]
        dots = [(size, float(e["after"])) for size, e in own]
        lines += [
            Line(name, dots, colour, colour % 4, bars, marks=True, joined=False),
            Line(name, laws[name].curve, colour, colour % 4),
        ]
    title = f"{', '.join(names)} against {unit}"
    return line_chart(title, lines, x_label=unit, y_label="share", log_x=True, percent=True)
