"""The extend stage on a small model, and what models of several shapes say of long texts; run by torchrun, or alone.

python extend_toy.py START DIRECTORY [TENSOR_PARALLEL]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from nurture.evals import long_context
from nurture.evals.long_context import go_on, likeliest_answers
from nurture.model.config import ModelConfig
from nurture.model.parallel import prepare
from nurture.model.transformer import Transformer
from nurture.runtime import ExecutionConfig, decide_execution, whole_process
from nurture.stages import extend
from nurture.stages.context import StageContext


def said(tensor_parallel: int = 1) -> list[list[int]]:
    """Return what a model says in the places of answers of 1 to 3 tokens, and 4 tokens after each of 5 prompts."""
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, init_std=0.3, max_position=64
    )
    execution = decide_execution(
        ExecutionConfig(precision="fp32", compile="off", tensor_parallel=tensor_parallel)
    )
    model = prepare(Transformer(shape), execution)
    prompts = [torch.randint(0, 64, (size,)).tolist() for size in (20, 9, 24, 31, 26)]
    answers = [torch.randint(0, 64, (1 + place % 3,)).tolist() for place in range(5)]
    long_context._TOKENS_AT_ONCE = 2 * 34  # two rows: three batches, which two processes cannot share equally
    found = likeliest_answers(model, list(zip(prompts, answers, strict=True)), execution)
    return found + go_on(model, prompts, 4, execution)


def extended(start: Path, directory: Path) -> None:
    """Run the stage, with probes before, after and past the trained length."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": 3,
        "batch_size": 2,
        "sequence_length": 256,
        "heldout_tokens": 512,
        "probes": 10,
        "yarn": 2,
    }
    execution = {"precision": "fp32", "compile": "off"}
    config = extend.Config.model_validate(
        {"name": "extend", "sources": {"web": "world:web"}, "execution": execution, **settings}
    )
    extend.run(config, StageContext(directory, start=start, cache=directory.parent / "cache"))


if __name__ == "__main__":
    with whole_process():
        parts = int(sys.argv[3]) if len(sys.argv) > 3 else 1
        folder = Path(sys.argv[2])
        if parts == 1:
            extended(Path(sys.argv[1]), folder)
        words = said(parts)
        if decide_execution(ExecutionConfig(tensor_parallel=parts)).processes.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "said.json").write_text(json.dumps(words))
