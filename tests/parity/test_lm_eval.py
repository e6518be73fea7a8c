"""Our class in lm-evaluation-harness against its `hf` backend, on local files: choices, pairs, last words, generation."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from bench.lm_eval_parity import compare, evaluate, write_tasks
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer

TASKS = ("local_blimp", "local_arc_easy", "local_lambada", "local_gsm8k")


def test_the_same_scores_as_the_hf_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from lm_eval.models.huggingface import HFLM

    from nurture.evals.lm_eval_model import NurtureLM

    words = ["the sky is blue", "a dog sleeps", "rain falls on the town", "two and three are five"]
    rows = {
        "blimp/adjunct_island": [{"sentence_good": f"{w}.", "sentence_bad": f"{w[::-1]}."} for w in words],
        "core-eval/arc_easy": [
            {"query": f"Q: {w}? ", "choices": ["yes", "no more"], "gold": 0} for w in words
        ],
        "core-eval/piqa": [{"query": "x", "choices": ["a", "b"], "gold": 0}],
        "core-eval/lambada": [{"context": w, "continuation": "again"} for w in words],
        "gsm8k/train": [{"question": w, "answer": "#### 5"} for w in words],
    }
    for name, records in rows.items():
        path = (
            tmp_path / "data" / f"{name}.jsonl.gz"
        )  # json lines; the library looks at the content, not the name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    tokenizer = Tokenizer.train(words * 5, 300).with_chat_template()
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, max_position=256)
    folder = tmp_path / "model"
    folder.mkdir()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.document_token_id}
    save_model(Transformer(config), folder, end_token_ids=tokenizer.stop_token_ids, **ids)
    tokenizer.save(folder)
    write_tasks(tmp_path, tmp_path / "data")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    ours = evaluate(NurtureLM(path=str(folder)), tmp_path, TASKS, 4)
    theirs = evaluate(HFLM(pretrained=str(folder), dtype="float32", device="cpu"), tmp_path, TASKS, 4)
    table = compare(ours, theirs)
    assert set(table) == set(TASKS)
    for task, line in table.items():
        assert line["n"] == line["equal"] == 4, task
        assert line["furthest"] < 1e-3, task
        for name, (mine, peer) in line["metrics"].items():
            assert math.isclose(mine, peer, rel_tol=1e-4), (task, name)
