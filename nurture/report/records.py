"""What a run left on disk, read for a report: results, outcomes item by item, curves, samples, lineage.

No model is loaded and nothing is written. What is compared with what: a stage's own measurement of the model it started
from where it made one (the same items, so the difference can be paired), else the last stage before it in its lineage
that has the measure. Of several runs of one recipe, stages are matched by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nurture import files
from nurture.errors import NurtureError
from nurture.evals.measure import Measure, difference, over_runs, wilson
from nurture.report.table import RATES, collect, finished_stages

_REMEDY = "Delete the stage's folder and run again."


@dataclass
class StageRecord:
    """One finished stage.

    Attributes:
        folder: `runs/NAME/NN-stage`.
        result: its result.json.
        parents: the stages it was made from, by role (`start`, `reward_model`, ...).
    """

    folder: Path
    result: dict[str, Any]
    parents: dict[str, StageRecord] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.result.get("name", self.folder.name))

    @property
    def kind(self) -> str:
        return str(self.result.get("kind", ""))

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.result.get("metrics") or {})

    @cached_property
    def manifest(self) -> dict[str, Any]:
        try:
            return files.read_manifest(self.folder) or {}
        except NurtureError:  # damaged: its results can be shown, its lineage is not known
            return {}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that decided the result (inputs.json)."""
        return dict((_optional(self.folder / "inputs.json") or {}).get("inputs") or {})

    @cached_property
    def outcomes(self) -> dict[str, dict[str, list[float]]]:
        """Measure -> {"before", "after"} -> what came of every item."""
        return dict(_optional(self.folder / "outcomes.json") or {})

    @cached_property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Logged name -> (step, value) in order."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for line in _json_lines(self.folder / "metrics.jsonl"):
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    curves.setdefault(name, []).append((float(line.get("step", 0)), float(value)))
        return curves

    @cached_property
    def samples(self) -> dict[str, str]:
        """Prompt -> reply."""
        lines = _json_lines(self.folder / "samples.jsonl")
        return {
            str(line["prompt"]): str(line["reply"]) for line in lines if "prompt" in line and "reply" in line
        }

    @property
    def overoptimisation(self) -> dict[str, Any]:
        """Proxy and gold reward over the training, `{}` where the stage measured none."""
        return dict(_optional(self.folder / "overoptimisation.json") or {})

    @property
    def lineage(self) -> Iterator[StageRecord]:
        """The stages whose weights it goes on from, the nearest first."""
        parent = self.parents.get("start")
        while parent is not None:
            yield parent
            parent = parent.parents.get("start")

    def measure(self, name: str, when: str = "after") -> Measure | None:
        """Return what the stage measured `before` or `after` its training, None where it did not."""
        entry = self.metrics.get(name)
        entry = entry if isinstance(entry, dict) else {"after": entry}
        value = entry.get(when)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        n = int(entry.get("n") or 0)
        low, high = (entry.get("low"), entry.get("high")) if when == "after" else (None, None)
        if low is None and is_rate(name) and n and 0 <= value <= 1:
            low, high = wilson(value, n)
        return Measure(float(value), n, low, high, self.outcomes.get(name, {}).get(when) or None)

    def change(self, name: str) -> Measure | None:
        """Return what the stage changed in a measure, None where nothing was measured before it."""
        after, before = self.measure(name), self.measure(name, "before")
        # A win rate is against what the stage started from, so that two of them have no opponent in common.
        earlier = () if name.endswith("win_rate") else (parent.measure(name) for parent in self.lineage)
        unpaired = (
            Measure(found.value, found.n, found.low, found.high) for found in earlier if found is not None
        )
        before = before or next(unpaired, None)
        return difference(before, after) if before and after else None


def is_rate(name: str) -> bool:
    """Say whether a measure is a share of independent items; tokens of a mixture and pairs of a prompt are not."""
    return name.split("/")[0] in RATES - {"share", "pair_accuracy", "pair_ceiling", "tie_accuracy"}


def read_run(directory: Path) -> list[StageRecord]:
    """Return the finished stages of a run with their lineage.

    Raises:
        NurtureError: there is no run, nothing in it has finished, or a file is damaged.
    """
    results = collect(directory)["stages"]
    stages = [StageRecord(*pair) for pair in zip(finished_stages(directory), results, strict=True)]
    made = {stage.manifest.get("fingerprint"): stage for stage in stages}
    for stage in stages:
        roles = stage.inputs.get("from") or {}
        stage.parents = {role: made[mark] for role, mark in roles.items() if mark in made}
    return stages


@dataclass(frozen=True)
class Row:
    """One stage of one or several runs: what the table shows of it.

    Attributes:
        records: the stage in every run.
        values: measure -> after the stage; over several runs the mean with the interval between runs.
        changes: measure -> what the stage changed, likewise.
    """

    records: Sequence[StageRecord]
    values: dict[str, Measure]
    changes: dict[str, Measure]

    @property
    def name(self) -> str:
        return self.records[0].name

    @property
    def kind(self) -> str:
        return self.records[0].kind

    def mean(self, key: str) -> float:
        """Return the mean of a number of result.json (seconds, tokens)."""
        return sum(float(record.result.get(key) or 0) for record in self.records) / len(self.records)


def read_rows(directories: Sequence[Path]) -> list[Row]:
    """Return a row per stage that every run has.

    Raises:
        NurtureError: a run cannot be read, or the runs share no stage.
    """
    runs = [read_run(directory) for directory in directories]
    rows = []
    for first in runs[0]:
        records = [
            first,
            *(s for run in runs[1:] for s in run if (s.name, s.kind) == (first.name, first.kind)),
        ]
        if len(records) == len(runs):
            rows.append(_row(records))
    if not rows:
        raise NurtureError(f"{', '.join(map(str, directories))}: these runs have no stage in common.")
    return rows


_ANY = (-math.inf, math.inf)


def _row(records: Sequence[StageRecord]) -> Row:
    names = [name for name in records[0].metrics if all(name in record.metrics for record in records)]
    values: dict[str, Measure] = {}
    changes: dict[str, Measure] = {}
    for name in names:
        whole, change = ((0.0, 1.0), (-1.0, 1.0)) if name.split("/")[0] in RATES else (_ANY, _ANY)
        for table, found, bounds in (
            (values, [record.measure(name) for record in records], whole),
            (changes, [record.change(name) for record in records], change),
        ):
            known = [measure for measure in found if measure is not None]
            if len(known) == len(records):
                table[name] = known[0] if len(known) == 1 else over_runs([m.value for m in known], bounds)
    return Row(records, values, changes)


def merged(rows: Sequence[Row], directories: Sequence[Path]) -> dict[str, Any]:
    """Return several runs in the flat shape of one (DESIGN.md): means, intervals between runs, n = runs."""
    stages = []
    for row in rows:
        metrics = {}
        for name, value in row.values.items():
            entry: dict[str, Any] = {"after": round(value.value, 6), "n": value.n}
            if value.low is not None and value.high is not None:
                entry |= {"low": round(value.low, 6), "high": round(value.high, 6)}
            if name in row.changes:
                entry = {"before": round(value.value - row.changes[name].value, 6), **entry}
            entry["runs"] = [measure.value for record in row.records if (measure := record.measure(name))]
            metrics[name] = entry
        facts = {"name": row.name, "kind": row.kind, "seconds": round(row.mean("seconds"), 3)}
        stages.append({**facts, "tokens": round(row.mean("tokens")), "metrics": metrics})
    names = ", ".join(directory.resolve().name for directory in directories)
    seconds = sum(round(row.mean("seconds"), 3) for row in rows)
    return {"run": names, "seconds": round(seconds, 3), "stages": stages}


def _optional(path: Path) -> Any:
    return files.read_json(path, _REMEDY) if path.is_file() else None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a .jsonl file; half a line, which a killed process leaves, is dropped."""
    lines = []
    if path.is_file():
        # Not splitlines(): a model's reply may hold characters that Python takes for ends of lines and JSON does not.
        for line in re.split(r"\r?\n", path.read_text(encoding="utf-8", errors="replace")):
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                lines.append(value)
    return lines
