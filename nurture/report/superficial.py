"""The superficial-alignment experiment, laid out for the terminal and the page: the same tables, and two charts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nurture import files
from nurture.report.charts import Line, line_chart

FILE = "superficial.json"


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
