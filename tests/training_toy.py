"""A small training job for the invariant tests; also run as a script, so that it can be killed or started by torchrun.

python training_toy.py DIRECTORY STEPS [key=value ...]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from nurture.data.mixture import MixtureBatches, MixturePhase
from nurture.data.shards import Shard
from nurture.losses.language import LanguageLoss
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.lora import LoraConfig, add_adapters
from nurture.model.parallel import prepare, whole_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, ScheduleConfig, build_optimizer
from nurture.runtime import ExecutionConfig, decide_execution, whole_process
from nurture.trainer import FitReport, LoopConfig, fit
from nurture.types import Batch

VOCABULARY = 64


def toy_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(vocab_size=VOCABULARY, width=32, layers=2, heads=2, max_position=64))


def toy_batches(steps: int, batch_size: int = 8) -> MixtureBatches:
    generator = torch.Generator().manual_seed(3)
    shards = {}
    for name, low in (("a", 1), ("b", 30)):
        documents = [
            [0, *torch.randint(low, low + 20, (int(n),), generator=generator).tolist()]
            for n in torch.randint(5, 60, (40,), generator=generator)
        ]
        shards[name] = Shard.from_documents(name, documents)
    phases = [
        MixturePhase(until=0.5, weights={"a": 0.5, "b": 0.5}),
        MixturePhase(until=1.0, weights={"b": 1}),
    ]
    return MixtureBatches(shards, phases, steps=steps, batch_size=batch_size, sequence_length=32, seed=5)


class Disturbed:
    """Batches that come slowly, or in whose middle the process RANK:STEP is killed at its first start by torchrun."""

    def __init__(self, batches: MixtureBatches, pause: float, dies: str) -> None:
        self.batches, self.pause, self.dies = batches, pause, dies
        self.epochs = batches.epochs

    def __call__(self, step: int, rank: int, world_size: int) -> Batch:
        time.sleep(self.pause)
        if self.dies == f"{rank}:{step}" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.batches(step, rank, world_size)


def toy_fit(
    directory: Path,
    steps: int = 12,
    *,
    optimizer: str = "adamw",
    microbatch_tokens: int = 8192,
    save_every: int | None = None,
    average: float | None = None,
    pause: float = 0.0,
    tensor_parallel: int = 1,
    dies: str = "",
    lora: bool = False,
    keep: int = 2,
) -> tuple[Transformer | None, FitReport]:
    """Train the toy model; returns its unsharded weights in the main process."""
    execution = decide_execution(
        ExecutionConfig(precision="fp32", compile="off", tensor_parallel=tensor_parallel)
    )
    model = toy_model()
    if lora:
        add_adapters(model, LoraConfig(rank=4))
    prepare(model, execution)
    report = fit(
        model,
        build_optimizer(model, OptimizerConfig(kind=optimizer, learning_rate=3e-3)),
        Disturbed(toy_batches(steps), pause, dies) if pause or dies else toy_batches(steps),
        LanguageLoss(torch.ones(VOCABULARY, dtype=torch.int64)),
        steps=steps,
        schedule=ScheduleConfig(),
        clip_norm=1.0,
        config=LoopConfig(log_every=1, save_every=save_every, average=average, keep=keep),
        execution=execution,
        directory=directory,
        microbatch_tokens=microbatch_tokens,
    )
    return whole_model(model, execution), report


if __name__ == "__main__":
    with whole_process():
        target, count, *settings = sys.argv[1:]
        options = dict(setting.split("=") for setting in settings)
        result, _ = toy_fit(
            Path(target),
            int(count),
            optimizer=options.get("optimizer", "adamw"),
            save_every=int(options.get("save_every", 0)) or None,
            pause=float(options.get("pause", 0)),
            tensor_parallel=int(options.get("tensor_parallel", 1)),
            dies=options.get("dies", ""),
            lora="lora" in options,
        )
        if result is not None:
            save_model(result, Path(target) / "model")
