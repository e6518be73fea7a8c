"""SmolLM3's route on the world, shrunk to seconds: every stage reads what the ones before it wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from nurture.data.rows import Row
from nurture.pipeline import run
from nurture.stages import synthesize
from nurture.stages.recipe import load_recipe
from nurture.stages.synthesize import Draft

SMALL = [
    "model.width=32", "model.heads=2", "model.kv_heads=1", "model.ffn_width=64", "model.layers=2",
    "tokenizer.vocab_size=400", "tokenizer.sample_bytes=50000",
    "pretrain.steps=2", "pretrain.sequence_length=64", "pretrain.heldout_tokens=256",
    "extend-512.steps=1", "extend-512.heldout_tokens=512", "extend-512.probes=0",
    "extend-1024.steps=1", "extend-1024.heldout_tokens=1024", "extend-1024.probes=0",
    "reason.steps=1", "reason.batch_size=2", "reason.conversations=8", "reason.heldout_conversations=1",
    "traces.rows=6", "pairs.rows=4",
    "sft.steps=1", "sft.batch_size=2", "sft.conversations=4", "sft.heldout_conversations=1", "sft.reply_tokens=4",
    "apo.steps=1", "apo.prompt_count=1", "apo.reply_tokens=4",
    "merge.prompt_count=1", "merge.reply_tokens=4", "merge.sweep=[0.9]", "merge.lengths=[40]",
    "merge.score=[passkey/40]",
]  # fmt: skip


@pytest.mark.slow
def test_every_stage_of_the_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_author(config, context, role, *, thinking):
        def author(rows: Sequence[Row], seeds: Sequence[int]) -> list[Draft]:
            if role == "weak":
                return [Draft(None, "I do not know.", True, 4) for _ in rows]
            return [Draft("Hm.", row.messages[-1]["content"], True, 4) for row in rows]

        return author

    monkeypatch.setattr(synthesize, "make_author", make_author)
    out = tmp_path / "run"
    run(load_recipe("smollm3-tiny", SMALL), out)
    results = {path.parent.name[3:]: json.loads(path.read_text()) for path in out.glob("*/result.json")}
    assert {"think_obeyed", "no_think_obeyed", "math_think", "math_no_think"} <= set(
        results["reason"]["metrics"]
    )
    assert {"think_obeyed", "format", "bpb/think", "bpb/no-think"} <= set(results["sft"]["metrics"])
    assert (
        results["traces"]["yield"]["arithmetic"]["kept"]
        == results["answers"]["yield"]["arithmetic"]["kept"]
        == 6
    )
    assert [line["kept"] for line in results["pairs"]["yield"].values()] == [4, 4]
    assert "gold_win_rate" in results["apo"]["metrics"]
    assert [line["model"] for line in results["merge"]["table"]] == ["sft", "start", "merged"]
    assert {line["share"] for line in results["merge"]["sweep"]} == {0.9, 1.0}
