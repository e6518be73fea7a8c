"""A sweep shares what comes before the swept stage, resumes, and lays out what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nurture.errors import NurtureError
from nurture.report.sweep import exhibit, sweep_exhibits
from nurture.sweep import split_overrides, sweep

RECIPE = """
name: swept
model: {width: 16, layers: 1, heads: 2, max_position: 256}
tokenizer: {vocab_size: 400, sample_bytes: 30000}
data: {forum: "world:forum"}
stages:
  - {kind: pretrain, sources: [forum], steps: 2, batch_size: 2, sequence_length: 64, heldout_tokens: 256}
  - {kind: sft, data: {talk: "world:chat"}, conversations: 8, steps: 2, batch_size: 2, sequence_length: 128,
     heldout_conversations: 2, reply_tokens: 4}
"""


def test_earlier_stages_run_once_and_a_second_call_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "swept.yaml").write_text(RECIPE)
    said: list[str] = []
    call = (str(tmp_path / "swept.yaml"), ["sft.conversations=4,8,16"], tmp_path / "run")
    measured, path = sweep(*call, say=said.append)
    assert [point["value"] for point in measured["points"]] == [4, 8, 16]
    assert sum("01-pretrain: has not run yet" in line for line in said) == 1
    assert sum("01-pretrain: fresh" in line for line in said) == 3
    folder = path.parent
    one, other = (folder / value / "01-pretrain" / "model" / "model.safetensors" for value in ("4", "16"))
    assert one.samefile(other)
    assert json.loads(path.read_text()) == measured
    said.clear()
    again, _ = sweep(*call, say=said.append)
    assert again == measured
    assert not any("has not run yet" in line for line in said)
    (shown,) = sweep_exhibits(tmp_path / "run")
    assert shown.title == "Data budget: sft.conversations"
    for table in shown.tables:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_what_a_sweep_asks_for(tmp_path: Path) -> None:
    assert split_overrides(["a.b=100,10", "seed=1", "a.c=[1,2]"]) == (
        "a.b",
        [10, 100],
        ["seed=1", "a.c=[1,2]"],
    )
    for settings in (["a.b=1"], ["a.b=1,2", "c.d=3,4"], ["seed=1,2"]):
        with pytest.raises(NurtureError, match="exactly one setting"):
            split_overrides(settings)
    for settings, message in ((["a.b=x,y"], "must be numbers"), (["a.b=0,4"], "must be positive")):
        with pytest.raises(NurtureError, match=message):
            split_overrides(settings)
    (tmp_path / "swept.yaml").write_text(RECIPE)
    with pytest.raises(NurtureError, match="the recipe's stages are pretrain, sft"):
        sweep(str(tmp_path / "swept.yaml"), ["sft.steps=1,2"], tmp_path / "run", until="rewrd")


def test_a_curve_is_fitted_where_something_moves() -> None:
    def point(value: int, share: float) -> dict[str, object]:
        low, high = max(0.0, share - 0.05), min(1.0, share + 0.05)
        metrics = {"format": {"after": share, "low": low, "high": high, "n": 400},
                   "harm": {"after": 0.5, "low": 0.45, "high": 0.55, "n": 400}, "bpb/talk": {"after": 1.0, "n": 9}}  # fmt: skip
        return {"value": value, "seed": 0, "metrics": metrics}

    points = [point(n, s) for n, s in ((10, 0.1), (100, 0.6), (1000, 0.9), (10000, 0.95))]
    shown = exhibit({"key": "sft.conversations", "stage": "sft", "points": points})
    assert shown.conclusions[0].startswith("format: rises to")
    assert shown.conclusions[1] == "Not clearly changed over this range: harm."
    assert len(shown.charts) == 1
