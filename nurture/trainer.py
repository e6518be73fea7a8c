"""The one training loop.

`train_step` is the only place that accumulates, reduces, clips and steps; every gradient stage and every RL stage calls
it. `fit` is the supervised loop around it: schedule, logging, evaluation, checkpoints, resume. There are no trainer
classes and no callbacks; a stage gives `fit` its batches and its loss.

Losses are sums. `train_step` counts what the whole global batch counts before the first forward pass and divides by
that, so neither accumulation nor packing nor the number of processes changes the gradient.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from nurture.checkpoint import load_state, save_state
from nurture.errors import NurtureError
from nurture.optim import Optimizer, ScheduleConfig, learning_rate_factor
from nurture.progress import progress_bar
from nurture.recipe import Section
from nurture.runtime import Execution, MetricsLog, Processes, add_up, eager_blocks
from nurture.types import IGNORE_INDEX, Batch, BatchSource, LossFunction

log = logging.getLogger(__name__)

SPIKE_WINDOW = 64
"""Gradient norms whose median a spike is compared with."""


class Countable(Protocol):
    """Any microbatch: it knows how many items its loss counts."""

    @property
    def loss_count(self) -> int:
        """Number of items the loss is summed over."""
        ...


MOST_EVALUATIONS = 5
"""Evaluations over a stage, where there is time for so many."""


class LoopConfig(Section):
    """What happens around the updates; none of it changes the weights, except skipping bad updates and averaging."""

    log_every: PositiveInt = 10
    """Updates between lines of metrics.jsonl."""
    evaluate_every: PositiveInt | None = None
    """Updates between evaluations on held-out data; by default a fifth of the stage."""
    save_every: PositiveInt | None = None
    """Updates between checkpoints, besides those by time."""
    save_minutes: PositiveFloat = 2.0
    """Minutes between checkpoints."""
    keep: PositiveInt = 2
    """Checkpoints kept."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential average of the weights, which then is the stage's result (InstructGPT: 0.992)."""
    skip_spikes: PositiveFloat | None = None
    """Skip an update whose gradient norm exceeds this many times the recent median."""
    bad_steps: NonNegativeInt = 20
    """Updates in a row that may be skipped for a NaN or infinite gradient before the stage gives up."""
    tracker: str | None = None
    """Mirror metrics to tensorboard, trackio or wandb."""


@dataclass
class StepReport:
    """What one update did.

    Attributes:
        metrics: name -> (sum, count) of this process's microbatches; not yet added up over processes.
        grad_norm: global norm of the gradient before clipping.
        applied: False if the update was skipped for a NaN, infinite or spiking gradient.
    """

    metrics: dict[str, tuple[float, float]]
    grad_norm: float
    applied: bool


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    microbatches: Sequence[Countable],
    loss_fn: LossFunction,
    *,
    clip_norm: float,
    execution: Execution,
    largest_norm: float = math.inf,
) -> StepReport:
    """Do one update from this process's microbatches of a global batch.

    Args:
        model: prepared by `model.parallel.prepare`.
        microbatches: what is accumulated; the same number in every process.
        loss_fn: returns sums, see `LossResult`.
        clip_norm: the gradient is scaled down to this norm.
        largest_norm: above this norm the update is skipped, as it is for a NaN.

    Returns:
        What was done. After a skipped update the weights and the optimizer are as before.
    """
    processes = execution.processes
    count = processes.sum_number(float(sum(microbatch.loss_count for microbatch in microbatches)))
    if count == 0:
        return StepReport({}, 0.0, False)
    metrics: dict[str, tuple[float, float]] = {}
    for index, microbatch in enumerate(microbatches):
        if processes.mesh is not None:
            model.set_requires_gradient_sync(index == len(microbatches) - 1)  # type: ignore[operator]
        with execution.autocast():
            result = loss_fn(model, microbatch)
        # Sharded gradients are averaged over the processes, so each contributes world_size times its part of the sum.
        (result.total * (processes.world_size / count)).backward()
        add_up(metrics, result.metrics)
    grad_norm = clip_gradients(optimizer.parameters, clip_norm)
    applied = math.isfinite(grad_norm) and grad_norm <= largest_norm
    if applied:
        optimizer.step()
    optimizer.zero_grad()
    return StepReport(metrics, grad_norm, applied)


def clip_gradients(parameters: Sequence[Tensor], clip_norm: float) -> float:
    """Scale all gradients down to global norm `clip_norm` if they exceed it; return the norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    full_tensor = getattr(norm, "full_tensor", None)  # sharded: a DTensor holding this process's part
    return float(full_tensor() if full_tensor is not None else norm)


def split_to_fit(batch: Batch, microbatch_tokens: int) -> list[Batch]:
    """Split a batch into the fewest equal parts of at most `microbatch_tokens` tokens each (at least a row)."""
    rows, tokens = batch.token_ids.shape
    most_rows = max(1, microbatch_tokens // tokens)
    parts = next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most_rows)
    return list(batch.split(parts))


@dataclass
class Progress:
    """Everything `fit` must remember besides weights, optimizer and step, as plain JSON data."""

    tokens: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    bad_in_a_row: int = 0
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FitReport:
    """What a finished `fit` did.

    Attributes:
        steps: updates in all, those before a resume included.
        tokens: tokens trained on, by source (the ledger): labels that counted.
        skipped: updates skipped.
        last: the last evaluation.
    """

    steps: int
    tokens: dict[str, int]
    skipped: int
    last: dict[str, float]


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    batches: BatchSource,
    loss_fn: LossFunction,
    *,
    steps: int,
    schedule: ScheduleConfig,
    clip_norm: float,
    config: LoopConfig,
    execution: Execution,
    directory: Path,
    microbatch_tokens: int,
    evaluate: Callable[[], dict[str, float]] | None = None,
    label: str = "train",
) -> FitReport:
    """Train for `steps` updates, resuming from `directory/state` if a state is there.

    Args:
        batches: gives the global batch of every step; a pure function of the step.
        loss_fn: returns sums.
        evaluate: returns held-out metrics; called now and then and at the end, with the model in eval mode.
        directory: the stage's folder: `metrics.jsonl` and `state/` are written here.
        microbatch_tokens: tokens of one forward pass.
        label: what the progress bar says.

    Raises:
        NurtureError: the loss stayed NaN or infinite, or the disk is full.
    """
    processes = execution.processes
    averages = {name: p.detach().clone() for name, p in model.named_parameters()} if config.average else {}
    loaded = load_state(directory / "state", model, optimizer, averages, processes)
    first = int(loaded.pop("step")) if loaded else 0
    progress = Progress(**loaded) if loaded else Progress()
    if processes.rank:  # one process goes on with the ledger of all, however many they are now
        progress.tokens = {}
    window, last = _Window(), dict[str, float]()

    def do_step(step: int) -> None:
        started = time.monotonic()
        optimizer.set_factor(learning_rate_factor(schedule, step, steps))
        batch = batches(step, processes.rank, processes.world_size)
        model.train()
        report = train_step(
            model,
            optimizer,
            [part.to(execution.device) for part in split_to_fit(batch, microbatch_tokens)],
            loss_fn,
            clip_norm=clip_norm,
            execution=execution,
            largest_norm=largest_norm_of(progress, config),
        )
        _keep_ledger(progress, batch)
        note_update(progress, report, config, step, directory)
        if report.applied:
            move_averages(averages, model, config.average)
        window.add(report, batch.token_count, time.monotonic() - started)

    def facts(done: int) -> tuple[dict[str, float], str]:
        found = window.close(processes)
        found["train/learning_rate_factor"] = learning_rate_factor(schedule, done - 1, steps)
        found |= {f"tokens/{k}": float(n) for k, n in _trained_tokens(progress, processes).items()}
        found |= {f"epoch/{name}": epoch for name, epoch in batches.epochs(done).items()}
        speed, loss = found["train/tokens_per_second"], found.get("train/loss", math.nan)
        return found, f"loss {loss:.3f}  {speed:,.0f} tok/s"

    def measure(done: int) -> dict[str, float]:
        assert evaluate is not None
        model.eval()
        last.clear()
        last.update(evaluate())
        return last

    def save(done: int) -> None:
        kept = vars(progress) | {"tokens": _trained_tokens(progress, processes)}
        save_state(directory / "state", done, model, optimizer, averages, kept, processes, config.keep)

    run_steps(
        do_step, facts, save, measure if evaluate is not None else None,
        first=first, steps=steps, config=config, execution=execution, directory=directory, label=label,
    )  # fmt: skip
    if averages:
        use_averages(averages, model)
    return FitReport(steps, _trained_tokens(progress, processes), progress.skipped, last)


def run_steps(
    do_step: Callable[[int], None],
    facts: Callable[[int], tuple[dict[str, float], str]],
    save: Callable[[int], None],
    evaluate: Callable[[int], dict[str, float]] | None,
    *,
    first: int,
    steps: int,
    config: LoopConfig,
    execution: Execution,
    directory: Path,
    label: str,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Go from step `first` to `steps`: the loop of everything that learns, whatever a step is.

    Args:
        do_step: does a step.
        facts: returns, after so many steps, metrics since it was last called and what the progress bar shows of them.
        save: writes the state, from which `first` is known.
        evaluate: returns held-out metrics after so many steps; called without gradients.
        directory: of the stage; `metrics.jsonl` is written here.
        label: what the progress bar says.
        stopped: whether to end early, asked between two steps.

    Returns:
        The steps done.
    """
    processes, done = execution.processes, first
    evaluate_every = config.evaluate_every or -(-steps // MOST_EVALUATIONS)
    save_due = SaveTimer(config, processes)
    with (
        open_metrics_log(directory, config, first, processes) as write,
        progress_bar(label, steps, show=processes.is_main) as bar,
    ):
        bar.advance_to(first)
        for step in range(first, steps):
            if stopped():
                break
            done = step + 1
            do_step(step)
            if done % config.log_every == 0 or done == steps:
                measured, shown = facts(done)
                write(done, measured)
                bar.advance_to(done, shown)
            if evaluate is not None and (done % evaluate_every == 0 or done == steps):
                with torch.no_grad(), eager_blocks():
                    write(done, evaluate(done))
            # Also at the end: what comes after training may be interrupted too.
            if done == steps or stopped() or save_due(done):
                save(done)
    return done


@dataclass
class _Window:
    """What happened since the last line of metrics: sums, tokens, training seconds (evaluation and saving aside)."""

    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    grad_norm: float = 0.0

    def add(self, report: StepReport, tokens: int, seconds: float) -> None:
        """Take in one update."""
        add_up(self.metrics, report.metrics)
        self.tokens += tokens
        self.seconds += seconds
        self.skipped += not report.applied
        self.grad_norm = report.grad_norm

    def close(self, processes: Processes) -> dict[str, float]:
        """Return the means over all processes and start anew."""
        totals = processes.sum(self.metrics)
        facts = {f"train/{key}": amount / max(count, 1.0) for key, (amount, count) in totals.items()}
        facts["train/grad_norm"] = self.grad_norm
        facts["train/skipped"] = float(self.skipped)
        facts["train/tokens_per_second"] = self.tokens * processes.world_size / max(self.seconds, 1e-9)
        self.metrics, self.tokens, self.seconds, self.skipped = {}, 0, 0.0, 0
        return facts


class SaveTimer:
    """Says when a checkpoint is due: by updates, and by minutes as the main process counts them."""

    def __init__(self, config: LoopConfig, processes: Processes) -> None:
        self._config, self._processes = config, processes
        self._saved = time.monotonic()

    def __call__(self, done: int) -> bool:
        every = self._config.save_every
        late = time.monotonic() - self._saved >= self._config.save_minutes * 60
        due = bool(self._processes.agree(late or (every is not None and done % every == 0)))
        if due:
            self._saved = time.monotonic()
        return due


@contextmanager
def open_metrics_log(
    directory: Path, config: LoopConfig, first: int, processes: Processes
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yield a function that writes metrics; in processes that are not the main one it does nothing."""
    if not processes.is_main:
        yield lambda step, metrics: None
        return
    metrics_log = MetricsLog(directory / "metrics.jsonl", config.tracker, first)
    try:
        yield metrics_log.write
    finally:
        metrics_log.close()


def _trained_tokens(progress: Progress, processes: Processes) -> dict[str, int]:
    """Return the ledger: labels trained on by source, over all processes."""
    totals = processes.sum({name: (float(count), 1.0) for name, count in progress.tokens.items()})
    return {name: int(amount) for name, (amount, _) in totals.items()}


def largest_norm_of(progress: Progress, config: LoopConfig) -> float:
    """Return the norm above which an update is a spike; infinite until enough norms are known."""
    if config.skip_spikes is None or len(progress.norms) < SPIKE_WINDOW // 4:
        return math.inf
    return config.skip_spikes * median(progress.norms)


def _keep_ledger(progress: Progress, batch: Batch) -> None:
    """Count the trained tokens of each source."""
    counted = batch.source_ids[batch.labels != IGNORE_INDEX]
    for index, amount in enumerate(torch.bincount(counted, minlength=len(batch.sources)).tolist()):
        if amount:
            name = batch.sources[index]
            progress.tokens[name] = progress.tokens.get(name, 0) + amount


def note_update(
    progress: Progress, report: StepReport, config: LoopConfig, step: int, directory: Path
) -> None:
    """Remember whether the update was applied, and its norm.

    Raises:
        NurtureError: the loss stays broken.
    """
    if report.applied:
        progress.bad_in_a_row = 0
        progress.norms = [*progress.norms, report.grad_norm][-SPIKE_WINDOW:]
        return
    progress.skipped += 1
    if math.isfinite(report.grad_norm):
        return
    progress.bad_in_a_row += 1
    log.warning("step %d: the gradient is %s; the update is skipped", step, report.grad_norm)
    if progress.bad_in_a_row > config.bad_steps:
        raise NurtureError(
            f"{directory}: the loss has been NaN or infinite for {progress.bad_in_a_row} updates in a row, the last "
            f"one step {step}. The weights were not touched by them. Lower optimizer.learning_rate or clip_norm, "
            f"or set execution.precision=fp32, and run again; it resumes from the last checkpoint."
        )


@torch.no_grad()
def move_averages(averages: dict[str, Tensor], model: nn.Module, decay: float | None) -> None:
    """Move every average (1 - decay) of the way to the weights."""
    if decay is not None:
        for name, parameter in model.named_parameters():
            averages[name].lerp_(parameter.detach(), 1 - decay)


@torch.no_grad()
def use_averages(averages: dict[str, Tensor], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(averages[name])


MOST_TIMED = 1000
"""Updates that are timed at most, which a small model does within the seconds."""


def measure_tokens_per_second(
    model: nn.Module,
    optimizer: Optimizer,
    batches: BatchSource,
    loss_fn: LossFunction,
    *,
    execution: Execution,
    microbatch_tokens: int,
    seconds: float = 5.0,
) -> float:
    """Time real updates at learning rate 0, and forget the moments: weights and optimizer are as before.

    Args:
        batches: of a stage of at least `MOST_TIMED` steps.
        seconds: how long to time.

    Returns:
        Tokens of the global batch a second, once warm, agreed on by all processes.
    """
    rates = [group["lr"] for group in optimizer.groups()]
    optimizer.set_factor(0.0)
    processes = execution.processes
    started, times = time.monotonic(), list[float]()
    enough = False
    while not enough:  # as the main process's clock says: by its own a process would leave the others waiting
        step_started = time.monotonic()
        batch = batches(len(times), processes.rank, processes.world_size)
        parts = [part.to(execution.device) for part in split_to_fit(batch, microbatch_tokens)]
        model.train()
        train_step(model, optimizer, parts, loss_fn, clip_norm=1.0, execution=execution)
        times.append(time.monotonic() - step_started)
        timed = len(times) >= 3 and time.monotonic() - started >= seconds
        enough = processes.agree(timed or len(times) == MOST_TIMED)
    for part in optimizer.parts:
        part.state.clear()
    for group, rate in zip(optimizer.groups(), rates, strict=True):
        group["lr"] = rate
    # The first steps compile and warm up; the median of the rest is what the run will see.
    typical = median(times[1:])
    return float(processes.agree(batch.token_count * processes.world_size / typical))
