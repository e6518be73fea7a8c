"""The table in the terminal: what it compares, and what a narrow terminal leaves of it."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from nurture.report.table import before_after_table


def printed(metrics: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    stage = {"name": "sft", "kind": "sft", "seconds": 3.0, "tokens": 0, "metrics": metrics}
    console.print(before_after_table({"run": "trial", "seconds": 3.0, "stages": [stage]}))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_was_measured_once_has_no_before() -> None:
    text = printed({"format": {"after": 0.9, "low": 0.8, "high": 0.95, "n": 10}})
    assert "before" not in text
    assert "after" not in text
    assert text.splitlines()[-2].split() == ["format", "90.0", "%", "80.0", "%", "-", "95.0", "%", "10"]
    text = printed({"format": {"before": 0.0, "after": 0.9}, "stopped": {"after": 0.9}})
    assert "trial: before and after, 3.0 s" in text
    assert "0.0 %" in text


def test_a_narrow_terminal_folds_names_and_loses_no_number() -> None:
    name = "passkey_yarn/4096"
    metric = {"before": 0.1, "after": 1.0, "low": 0.9, "high": 1.0, "n": 29909}
    text = printed({name: metric, "cloze": metric}, width=60)
    assert text.count("90.0 % - 100.0 %") == text.count("29,909") == 2
    assert "".join(line[:10].strip() for line in text.splitlines()[4:6]) == name
    wide = printed({name: metric, "cloze": metric}).splitlines()
    assert wide[3].startswith(f" {'measure':<{len(name)}}")
    assert any(line.startswith(f" {name} ") for line in wide)
