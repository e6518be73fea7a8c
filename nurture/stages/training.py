"""What the gradient stages share around `fit`: opening the model, planning the steps, writing the result.

Not a stage and not a trainer: a stage is still readable from top to bottom in its own file, and calls these.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from nurture.errors import NurtureError
from nurture.evals.measure import Measure, before_and_after
from nurture.files import atomic_write_json, atomic_write_text, json_lines, make_directory, read_json
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model, load_tokenizer, save_model
from nurture.model.lora import LoraConfig, add_adapters
from nurture.model.parallel import prepare, whole_model
from nurture.model.transformer import Transformer
from nurture.model.weights import Head
from nurture.optim import Optimizer, OptimizerConfig, ScheduleConfig, build_optimizer
from nurture.recipe import Minutes
from nurture.runtime import (
    Execution,
    ExecutionConfig,
    Processes,
    decide_execution,
    join_processes,
    seed_everything,
)
from nurture.stages.context import StageConfig, StageContext
from nurture.tokenizer import Tokenizer
from nurture.trainer import (
    MOST_EVALUATIONS,
    MOST_TIMED,
    FitReport,
    LoopConfig,
    fit,
    measure_tokens_per_second,
)
from nurture.types import BatchSource, LossFunction

log = logging.getLogger(__name__)

CPU_FLOPS_GUESS = 1.5e11
"""Floating-point operations a second that a small machine reaches: decides only whether compiling can pay."""
EVALUATION_SHARE = 0.1
"""Most of a time budget that evaluations may take."""
BUDGET_MARGIN = 0.97
"""Share of a time budget that is planned; the rest is for saving."""


class TrainingConfig(StageConfig):
    """Settings that every gradient stage has."""

    without_effect: ClassVar[tuple[str, ...]] = (
        "loop.log_every",
        "loop.save_every",
        "loop.save_minutes",
        "loop.keep",
        "loop.tracker",
    )

    steps: PositiveInt | None = None
    """Updates to do; or give `minutes`."""
    minutes: Minutes | None = Field(default=None, gt=0)
    """Time budget of the stage: throughput is measured first, and the schedule ends on time."""
    batch_size: PositiveInt = 32
    """Rows in the global batch of one update."""
    sequence_length: PositiveInt = 256
    """Tokens in a row."""
    seed: NonNegativeInt | None = None
    """Order of the data; by default the run's seed."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its constants."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the stage."""
    loop: LoopConfig = LoopConfig()
    """Logging, evaluation, checkpoints."""
    execution: ExecutionConfig = ExecutionConfig()
    """Precision, compilation, memory."""
    lora: LoraConfig | None = None
    """Train low-rank adapters, which are merged into the weights at the end; by default all weights are trained."""


@dataclass
class Session:
    """A model opened for training, with what belongs to it."""

    model: Transformer
    tokenizer: Tokenizer
    optimizer: Optimizer
    execution: Execution
    seed: int
    opened: float
    """time.monotonic() when the stage began."""
    trained_position: int
    """`max_position` of the start."""
    evaluations: int = MOST_EVALUATIONS
    """How many evaluations there are over the stage, where the recipe does not say."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.execution.processes.is_main

    @property
    def byte_lengths(self) -> torch.Tensor:
        """(V,) int64 bytes each token stands for."""
        return torch.from_numpy(self.tokenizer.token_byte_lengths)

    def whole(self) -> Transformer | None:
        """Return the model unsharded and uncompiled on the CPU for generation, None but in the main process."""
        return whole_model(self.model, self.execution)


def open_session(
    config: TrainingConfig,
    context: StageContext,
    *,
    tokens: int | None,
    head: Head = "lm",
    longest: int = 0,
    shared_by: int = 1,
) -> Session:
    """Load the start checkpoint or build fresh weights, and prepare model and optimizer for training.

    Args:
        tokens: how many will be trained on, if that is known already (it decides whether compiling pays).
        head: "scalar" for a reward or value model; a language model gets a fresh one.
        longest: raise the model's `max_position` to this, where it is below.
        shared_by: processes that share every row.

    Raises:
        NurtureError: there is no tokenizer, the checkpoint is damaged, or rows are longer than the model's context.
    """
    opened = time.monotonic()
    processes = join_processes(config.execution.tensor_parallel)
    seed = context.seed if config.seed is None else config.seed
    seed_everything(seed)
    tokenizer_path = context.start or context.tokenizer
    if tokenizer_path is None:
        raise NurtureError(f"stage '{config.name}': there is no tokenizer to start with.")
    tokenizer = load_tokenizer(tokenizer_path)
    if context.start is not None:
        model = load_model(context.start, head=head)
    else:
        shape = {**(context.model or {}), "vocab_size": tokenizer.vocab_size}
        model = Transformer(ModelConfig.model_validate(shape), head)
    trained_position = model.config.max_position
    if longest > trained_position:
        model.config = model.config.model_copy(update={"max_position": longest})
    if config.sequence_length > model.config.max_position:
        raise NurtureError(
            f"stage '{config.name}': sequence_length is {config.sequence_length}, but the model's context is "
            f"{model.config.max_position} (max_position). Shorten the rows, or extend the model."
        )
    sharers = max(1, processes.world_size // shared_by)
    if config.batch_size % sharers:
        raise NurtureError(
            f"stage '{config.name}': batch_size is {config.batch_size}, which {sharers} processes cannot share "
            f"equally. Choose a multiple of {sharers}."
        )
    flops = 6.0 * model.config.parameter_count() * tokens if tokens else 0.0
    if config.minutes:
        flops = config.minutes * 60 * CPU_FLOPS_GUESS
    execution = decide_execution(config.execution, flops)
    if config.lora is not None:
        add_adapters(model, config.lora)
    prepare(model, execution)
    optimizer = build_optimizer(model, config.optimizer)
    return Session(model, tokenizer, optimizer, execution, seed, opened, trained_position)


def plan_steps(
    config: TrainingConfig,
    context: StageContext,
    session: Session,
    batches: Callable[[int], BatchSource],
    loss_fn: LossFunction,
    default_steps: int | None,
    evaluation_seconds: float,
) -> int:
    """Return how many updates the stage does, the same on every resume.

    Args:
        batches: gives the batches of a stage of so many steps, to measure with.
        default_steps: what the data asks for when the recipe gives neither `steps` nor `minutes`; with `minutes`, the
            most there can be.
        evaluation_seconds: how long one evaluation takes.

    Raises:
        NurtureError: nothing says how long to train, or the budget is too short for a single update.
    """
    if config.steps is not None:
        return config.steps
    if config.minutes is None:
        if default_steps is None:
            raise NurtureError(f"stage '{config.name}': say how long to train with tokens, steps or minutes.")
        return default_steps
    processes, budget = session.execution.processes, config.minutes * 60

    def measured() -> dict[str, float]:
        speed = measure_tokens_per_second(
            session.model,
            session.optimizer,
            batches(MOST_TIMED),
            loss_fn,
            execution=session.execution,
            microbatch_tokens=config.execution.microbatch_tokens,
        )
        affordable = int(EVALUATION_SHARE * budget / max(evaluation_seconds, 1e-3))
        evaluations = int(processes.agree(min(max(affordable, 1), MOST_EVALUATIONS)))
        # One more evaluation comes after the training.
        spent = time.monotonic() - session.opened + (evaluations + 1) * evaluation_seconds
        left = budget * BUDGET_MARGIN - spent
        steps = int(left * speed / (config.batch_size * config.sequence_length))
        if default_steps is not None:
            steps = min(steps, default_steps)
        steps = int(processes.agree(steps))
        if steps < 1:
            before = (context.directory / "state" / "before.json").exists()
            again = " Started again as it is, it need not measure the start once more." if before else ""
            raise NurtureError(
                f"stage '{config.name}': {config.minutes} minutes are too short; reading the data and measuring take "
                f"{spent:.0f} s of them. Give it more minutes, less to measure, or a smaller model.{again}"
            )
        return {"steps": steps, "evaluations": evaluations, "tokens_per_second": round(speed, 1)}

    plan = kept(context.directory, "plan", measured, processes)
    session.evaluations = int(plan["evaluations"])
    return int(plan["steps"])


def train(
    config: TrainingConfig,
    context: StageContext,
    session: Session,
    batches: Callable[[int], BatchSource],
    loss_fn: LossFunction,
    measures: Callable[[], Mapping[str, Measure]],
    *,
    default_steps: int | None,
    evaluation_seconds: float,
) -> FitReport:
    """Plan the steps and call `fit` with the settings of a stage; arguments and errors as of `plan_steps`.

    Args:
        measures: of held-out data, now and then and at the end; logged as `eval/NAME`.
    """
    seconds = evaluation_seconds
    steps = plan_steps(config, context, session, batches, loss_fn, default_steps, seconds)
    return train_planned(config, context, session, batches(steps), loss_fn, measures, steps)


def train_planned(
    config: TrainingConfig,
    context: StageContext,
    session: Session,
    batches: BatchSource,
    loss_fn: LossFunction,
    measures: Callable[[], Mapping[str, Measure]],
    steps: int,
) -> FitReport:
    """Call `fit` with the settings of a stage for so many steps as `plan_steps` said; `measures` as of `train`."""
    every = config.loop.evaluate_every or -(-steps // session.evaluations)
    return fit(
        session.model,
        session.optimizer,
        batches,
        loss_fn,
        steps=steps,
        schedule=config.schedule,
        clip_norm=config.optimizer.clip_norm,
        config=config.loop.model_copy(update={"evaluate_every": every}),
        execution=session.execution,
        directory=context.directory,
        microbatch_tokens=config.execution.microbatch_tokens,
        evaluate=lambda: {f"eval/{name}": measure.value for name, measure in measures().items()},
        label=config.name,
    )


def save_result_model(model: Transformer, tokenizer: Tokenizer, directory: Path, *, answers: bool) -> None:
    """Write `directory/model` in Hugging Face's layout.

    Args:
        answers: the model has learned the chat format: its template and end tokens are saved with it. A base model gets
            neither, so that whoever loads it continues text instead of pretending to chat.
    """
    target = directory / "model"
    make_directory(target)
    ends = tokenizer.stop_token_ids if answers else ()
    save_model(
        model,
        target,
        end_token_ids=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.document_token_id,
    )
    tokenizer.save(target)
    if not answers:
        (target / "chat_template.jinja").unlink(missing_ok=True)


def write_result(
    directory: Path,
    *,
    tokens: int,
    before: Mapping[str, Measure],
    after: Mapping[str, Measure],
    samples: Sequence[Mapping[str, Any]],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write `samples.jsonl`, `outcomes.json` (item by item, for paired comparisons) and `result.json` of a stage."""
    atomic_write_text(directory / "samples.jsonl", json_lines(samples))
    outcomes = {
        name: {
            when: list(of[name].outcomes or ())
            for when, of in (("before", before), ("after", after))
            if name in of
        }
        for name, measure in after.items()
        if measure.outcomes
    }
    atomic_write_text(directory / "outcomes.json", json.dumps(outcomes) + "\n")
    result = {"tokens": tokens, "metrics": before_and_after(before, after), **(notes or {})}
    atomic_write_json(directory / "result.json", result)


def remember(directory: Path, name: str, measures: Callable[[], dict[str, Measure]]) -> dict[str, Measure]:
    """Return `measures()`, from `state/NAME.json` if an earlier, interrupted try measured them already.

    All processes must call it; all return what the main one measured.
    """

    def plain() -> dict[str, Any]:
        return {key: vars(measure) for key, measure in measures().items()}

    saved = kept(directory, name, plain, join_processes())
    return {key: Measure(**facts) for key, facts in saved.items()}


def kept(directory: Path, name: str, make: Callable[[], Any], processes: Processes) -> Any:
    """Return `make()` as JSON data, from `state/NAME.json` if it was made before; in all processes the main one's."""
    file = directory / "state" / f"{name}.json"
    known = processes.agree(file.exists())
    made = None if known else make()
    if not known and processes.is_main:
        make_directory(file.parent)
        atomic_write_json(file, made)
    processes.wait()
    return read_json(file, f"Delete {file} to measure again.")
