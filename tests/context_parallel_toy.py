"""The toy job of training_toy.py with every row shared by all processes; run by torchrun.

python context_parallel_toy.py DIRECTORY [checkpoint]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from training_toy import VOCABULARY, toy_batches, toy_model

from nurture.losses.language import LanguageLoss
from nurture.model.context_parallel import share_rows, shared_loss, spread_columns
from nurture.model.hugging_face import save_model
from nurture.model.parallel import prepare, whole_model
from nurture.optim import OptimizerConfig, ScheduleConfig, build_optimizer
from nurture.runtime import ExecutionConfig, decide_execution, whole_process
from nurture.trainer import LoopConfig, fit

STEPS = 8

if __name__ == "__main__":
    with whole_process():
        directory, *words = sys.argv[1:]
        execution = decide_execution(
            ExecutionConfig(precision="fp32", compile="off", checkpoint_activations="checkpoint" in words)
        )
        sharing = share_rows(execution.processes.world_size)
        model = prepare(toy_model(), execution)
        fit(
            model,
            build_optimizer(model, OptimizerConfig(learning_rate=3e-3)),
            spread_columns(toy_batches(STEPS), sharing),
            shared_loss(LanguageLoss(torch.ones(VOCABULARY, dtype=torch.int64)), sharing),
            steps=STEPS,
            schedule=ScheduleConfig(),
            clip_norm=1.0,
            config=LoopConfig(log_every=1),
            execution=execution,
            directory=Path(directory),
            microbatch_tokens=64,
        )
        whole = whole_model(model, execution)
        if whole is not None:
            save_model(whole, Path(directory) / "model")
