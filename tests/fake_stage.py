"""A stage that trains nothing: it counts steps, keeps a resumable state and writes the files a stage leaves.

`FAKE_STOP=NAME:STEP` makes the stage NAME die at STEP as if the machine had: by `raise` or, with `FAKE_STOP_HOW=kill`,
by SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal

from nurture.data.sources import DataSpec
from nurture.recipe import Section
from nurture.stages.context import StageConfig, StageContext

VERSION = 1


class Schedule(Section):
    decay: float = 0.1
    """Share of the steps."""


class Beside(Section):
    texts: dict[str, DataSpec] = {}
    """More sources."""


class Config(StageConfig):
    references = ("judge",)
    without_effect = ("log_every",)

    learning_rate: float = 0.1
    """Step size."""
    steps: int = 3
    """How many."""
    data: dict[str, DataSpec] = {}
    """Sources."""
    beside: Beside | None = None
    prompts: DataSpec | None = None
    """What is asked."""
    schedule: Schedule = Schedule()
    log_every: int = 1
    """How talkative."""
    judge: str | None = None
    """Another model."""


def run(config: Config, context: StageContext) -> None:
    state = context.directory / "state"
    state.mkdir(exist_ok=True)
    counter = state / "step"
    first = int(counter.read_text()) if counter.exists() else 0
    with open(context.directory / "metrics.jsonl", "a") as log:
        for step in range(first, config.steps):
            _maybe_die(config.name, step)
            log.write(json.dumps({"step": step, "learning_rate": config.learning_rate}) + "\n")
            log.flush()
            counter.write_text(str(step + 1))
    model = context.directory / "model"
    model.mkdir(exist_ok=True)
    parent = (context.start / "model.safetensors").read_bytes() if context.start else b"fresh"
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(parent + f"+{config.name}".encode())
    result = {"tokens": 1000 * config.steps, "metrics": {"format": {"before": 0.1, "after": 0.9, "n": 10}}}
    (context.directory / "result.json").write_text(json.dumps(result))


def _maybe_die(name: str, step: int) -> None:
    if os.environ.get("FAKE_STOP") == f"{name}:{step}":
        if os.environ.get("FAKE_STOP_HOW") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt
