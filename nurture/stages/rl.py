"""What PPO and GRPO share: one loop, and the pieces it is made of.

    prompts -> rollout -> score -> advantages -> train_step x epochs

A *step* is one turn of that loop: rollouts by the current policy, then one update a minibatch. A stage gives `learn` a
function `play(step)` that returns rollouts with their advantages, and the models to train on them. Rollouts are a pure
function of (seed, step) and the weights, minibatches of (seed, step, epoch), so a run killed at any instant goes on bit
for bit: the state is weights, moments, the step and a few numbers (`memory`).

Every step logs what shows trouble: `rl/kl`, `rl/entropy`, `rl/clip_fraction`, `rl/length`, `rl/repetition`, and
`rl/sampling_kl`, how far the engine's logprobs are from the trainer's for the same tokens.

Source: the loop of InstructGPT (arXiv 2203.02155) and GRPO (arXiv 2402.03300); sampler mismatch: huggingface/trl#4159.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from nurture.advantages import alone
from nurture.checkpoint import load_state, save_state
from nurture.data.rows import Row
from nurture.data.sources import DataSpec, is_endless
from nurture.environments.protocol import Environment, Observation, StepResult
from nurture.errors import NurtureError
from nurture.evals.overoptimisation import repetition
from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.inference.vllm import VllmEngine
from nurture.losses.language import summed_loss
from nurture.losses.policy import (
    CorrectionMode,
    PolicyLossConfig,
    clipped_tokens,
    importance_terms,
    kl_k3,
    policy_token_losses,
    sampling_correction,
    token_weights,
)
from nurture.model.hugging_face import load_model
from nurture.model.lora import adapters_off
from nurture.model.parallel import prepare, whole_weights
from nurture.model.transformer import Transformer
from nurture.model.weights import empty_model
from nurture.optim import Optimizer, OptimizerConfig, ScheduleConfig, learning_rate_factor
from nurture.recipe import Count
from nurture.rollout import Rollout, RolloutBatch, Sampler, collect, token_logprobs
from nurture.runtime import Execution, ExecutionConfig, Processes, add_up
from nurture.stages.context import StageContext
from nurture.stages.training import BUDGET_MARGIN, Session, TrainingConfig, kept
from nurture.tokenizer import Tokenizer
from nurture.trainer import (
    MOST_EVALUATIONS,
    LoopConfig,
    Progress,
    StepReport,
    largest_norm_of,
    move_averages,
    note_update,
    run_steps,
    train_step,
    use_averages,
)
from nurture.types import Batch, LossFunction, LossResult

log = logging.getLogger(__name__)

PROMPTS = 4000
"""Taken from an endless source where the recipe does not say."""
FIRST_TASK = 20_000
"""Where the world's tasks are read from: earlier ones were demonstrated or compared in the stages before."""

Sums = dict[str, tuple[float, float]]
"""name -> (sum, count), added up over processes before the division."""


class RLLoopConfig(LoopConfig):
    """The loop of stages whose steps take seconds: every one of them is worth a line."""

    log_every: PositiveInt = 1


class RLConfig(TrainingConfig):
    """Settings that PPO and GRPO share."""

    steps: PositiveInt | None = None
    """Turns of the loop: rollouts, then the updates on them; or give `minutes`."""
    prompts: Count | None = Field(default=None, gt=0)
    """Most prompts taken from each source; by default 4,000 of an endless one, and all of any other."""
    prompts_per_step: PositiveInt = 32
    """Prompts whose completions make one step."""
    group_size: PositiveInt = 1
    """Completions of each prompt."""
    batch_size: PositiveInt = 256
    """Rollouts in one update (a minibatch); a step that has no more does one update."""
    epochs: PositiveInt = 1
    """Times each step's rollouts are trained on."""
    sequence_length: PositiveInt = 256
    """Longest episode in tokens, prompt included; prompts that leave no room for a reply are left out."""
    max_tokens: PositiveInt = 100
    """Longest reply (of one turn), in tokens."""
    max_turns: PositiveInt = 1
    """Most turns of the policy in an episode."""
    template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, for example {enable_thinking: false}; rows may bring others (tools)."""
    temperature: PositiveFloat = 1.0
    """Of the sampling; the policy that is trained is the one at this temperature."""
    rollout_precision: Literal["auto", "fp32", "bf16", "vllm"] = "auto"
    """Of the matrices while sampling; auto is the training's. bf16 does not quite sample the policy: see `correction`.
    vllm samples with vLLM in bf16, which needs a GPU."""
    correction: CorrectionMode | Literal["auto", "off"] = "auto"
    """Weights for rollouts that the trainer's own policy would not quite sample: token_truncate, token_mask,
    sequence_truncate, sequence_mask, off; auto: token_truncate unless engine and trainer compute in fp32."""
    correction_limit: PositiveFloat = 3.0
    """Largest such weight."""
    heldout_prompts: PositiveInt = 200
    """Held-out prompts that are measured on."""
    heldout_every: int = Field(default=50, ge=2)
    """One row in so many is held out, chosen by a hash of what it asks."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """The policy's loss."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, weight_decay=0.0, beta2=0.99)
    schedule: ScheduleConfig = ScheduleConfig(kind="constant", warmup_steps=5)
    loop: RLLoopConfig = RLLoopConfig()
    execution: ExecutionConfig = ExecutionConfig(precision="fp32", compile="off")
    """Precision, compilation, memory. Rollouts differ in shape, so compiling rarely pays here."""


def share_prompts(config: RLConfig, processes: Processes) -> None:
    """Check that every process gets as many prompts of a step: with fewer updates than others it would wait for ever.

    Raises:
        NurtureError: they cannot be shared equally.
    """
    if config.prompts_per_step % processes.world_size:
        raise NurtureError(
            f"stage '{config.name}': prompts_per_step is {config.prompts_per_step}, which {processes.world_size} "
            f"processes cannot share equally. Choose a multiple of {processes.world_size}."
        )


# --- prompts --------------------------------------------------------------------------------------------------------


class PromptStream:
    """Rows to play, in an order that is a pure function of (seed, position): every epoch is another permutation."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        """Keep the rows."""
        self.rows, self.seed = list(rows), seed

    def __call__(self, step: int, count: int, attempt: int = 0) -> list[Row]:
        """Return the rows of a step; `attempt` > 0 gives others (dynamic sampling asks again)."""
        return [self._at(step * count + index, attempt) for index in range(count)]

    def _at(self, position: int, attempt: int) -> Row:
        epoch, index = divmod(position, len(self.rows))
        return self.rows[int(shuffled(len(self.rows), self.seed, epoch, attempt)[index])]

    def epochs(self, steps: int, count: int) -> float:
        """Return how many times every row has been played once `steps` steps are done."""
        return steps * count / len(self.rows)


def shuffled(count: int, *address: int) -> Tensor:
    """Return a permutation of `count` numbers, (count,) int64, a pure function of `address`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*address)))


def read_prompts(
    config: RLConfig,
    data: Mapping[str, DataSpec],
    context: StageContext,
    tokenizer: Tokenizer,
    split: Literal["train", "heldout"],
) -> list[Row]:
    """Return the prompts of all sources that leave room for a reply, source by source in turn.

    Raises:
        NurtureError: no row has a prompt, or none leaves room.
    """
    found: list[list[Row]] = []
    dropped = 0
    for spec in data.values():
        most = config.prompts or (PROMPTS if is_endless(spec) else None)
        if split == "heldout":
            most = max(1, config.heldout_prompts // max(1, len(data)))
        rows: list[Row] = []
        first = FIRST_TASK if split == "train" else 0
        for row in context.rows(spec, split, config.heldout_every, first):
            if not row.prompt:
                continue
            variables = {**row.template_kwargs, **config.template_kwargs}
            prompt = tokenizer.encode_prompt(row.prompt, **variables)  # as it will be played
            if len(prompt) + config.max_tokens > config.sequence_length:
                dropped += 1
                if dropped > 1000 and not rows:  # an endless source none of whose prompts fits
                    break
                continue
            rows.append(row)
            if len(rows) == most:
                break
        found.append(rows)
    if dropped:
        log.warning(
            "%d prompts are left out: with a reply of max_tokens=%d they exceed sequence_length=%d tokens",
            dropped,
            config.max_tokens,
            config.sequence_length,
        )
    longest = max((len(rows) for rows in found), default=0)
    merged = [rows[index] for index in range(longest) for rows in found if index < len(rows)]
    if not merged:
        remedy = "Rows need a prompt (messages, or keys such as prompt or instruction)"
        if dropped:
            remedy = "prompt + max_tokens must not exceed sequence_length"
        elif split == "heldout":
            remedy += f"; one in heldout_every={config.heldout_every} is held out: give more rows, or lower the number"
        raise NurtureError(f"stage '{config.name}': data has no {split} prompt that fits. {remedy}.")
    return merged


# --- the batch ------------------------------------------------------------------------------------------------------


def minibatches(batch: RolloutBatch, size: int, seed: int, step: int, epoch: int) -> Iterator[RolloutBatch]:
    """Yield the rollouts in random parts of about `size` rows; as they are, if there are no more."""
    rows = len(batch.token_ids)
    if size >= rows:
        yield batch
        return
    order = shuffled(rows, seed, step, epoch)
    for part in order.tensor_split(max(1, round(rows / size))):
        yield batch.select(part)


def by_length(batch: RolloutBatch, most_tokens: int, processes: Processes | None = None) -> list[Tensor]:
    """Return row numbers in parts of similar length: little padding, and at most `most_tokens` tokens a part.

    With several processes (all must call it) the parts are as many in each: a power of two that fits the widest row
    everywhere.
    """
    lengths = (batch.document_ids >= 0).sum(1)
    order = lengths.argsort(stable=True)
    if processes is not None and processes.world_size > 1:
        rows, width = batch.token_ids.shape
        parts = 1
        while parts < rows and -(-rows // parts) * width > most_tokens:
            parts *= 2
        parts = int(processes.largest(parts))  # another number elsewhere, and the processes wait for ever
        return list(order.tensor_split(parts))
    parts_found: list[list[int]] = []
    shortest = 0
    for row in order.tolist():
        length = int(lengths[row])
        here = parts_found[-1] if parts_found else []
        if not here or length > 1.4 * shortest + 16 or (len(here) + 1) * length > most_tokens:
            parts_found.append([])
            shortest = length
        parts_found[-1].append(row)
    return [torch.tensor(part) for part in parts_found]


def microbatches(batch: RolloutBatch, config: RLConfig, execution: Execution) -> list[RolloutBatch]:
    """Split a minibatch for `train_step`; the split cannot change the gradient."""
    rows = by_length(batch, config.execution.microbatch_tokens, execution.processes)
    parts = [batch.select(part).to(execution.device) for part in rows]
    parts[0].left_out = batch.left_out
    return parts


def without_idle_rows(batch: RolloutBatch, loss: PolicyLossConfig) -> RolloutBatch:
    """Return the rows that have a gradient; the others still count in the loss's divisor.

    Every loss of the family is a product with the advantage: a rollout whose advantages are all 0 (its group was paid
    alike) moves nothing but through a KL or an entropy in the loss. If no row has a gradient, all are returned.
    """
    rows = (batch.extra["advantages"] * batch.completion_mask).any(1).nonzero().flatten()
    if loss.kl_coefficient > 0 or loss.entropy_coefficient > 0 or len(rows) in (0, len(batch.token_ids)):
        return batch
    chosen = batch.select(rows)
    chosen.left_out = batch.loss_count - chosen.loss_count
    return chosen


@torch.no_grad()
def score_rows(
    batch: RolloutBatch,
    config: RLConfig,
    execution: Execution,
    score: Callable[[RolloutBatch], Sequence[Tensor]],
) -> list[Tensor]:
    """Run `score` over the batch in microbatches and lay its (b, t) results out as (B, T) float32 on the CPU."""
    results: list[Tensor] = []
    for rows in by_length(batch, config.execution.microbatch_tokens, execution.processes):
        with execution.autocast():
            parts = score(batch.select(rows).to(execution.device))
        if not results:
            results = [torch.zeros(batch.token_ids.shape) for _ in parts]
        for result, part in zip(results, parts, strict=True):
            result[rows, : part.shape[1]] = part.float().cpu()
    return results


def logprobs_of(model: nn.Module, batch: RolloutBatch, config: RLConfig, execution: Execution) -> Tensor:
    """Return a model's logprob of every completion token, (B, T) float32 on the CPU, without gradients."""
    (logprobs,) = score_rows(
        batch, config, execution, lambda part: [token_logprobs(model, part, config.temperature)]
    )
    return logprobs


class Reference:
    """The start, frozen, which the policy's KL is measured from: a model of its own, or a policy less its adapters."""

    def __init__(self, config: RLConfig, start: Path, policy: Transformer, execution: Execution) -> None:
        """Load it where it is a model of its own."""
        self._config, self._execution, self._policy = config, execution, policy
        self._own = None
        if config.lora is None:
            self._own = prepare(load_model(start), execution).requires_grad_(False).eval()

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Return its logprob of every completion token, as `logprobs_of` does."""
        with adapters_off(self._policy) if self._own is None else nullcontext(self._own) as model:
            return logprobs_of(model, batch, self._config, self._execution)


def logprobs_and_entropies(
    model: nn.Module, batch: RolloutBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the model's logprob of every completion token and the entropy it was drawn from.

    Returns:
        Two (B, T) float32 in nats, aligned with the tokens, 0 outside the mask; gradients flow.
    """
    ahead = model(batch.token_ids, labels=batch.labels, reduction="entropy", temperature=temperature)
    return tuple(torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1) for x in ahead)  # type: ignore[return-value]


# --- losses ---------------------------------------------------------------------------------------------------------


@dataclass
class PretrainingPart:
    """A microbatch of text whose loss is added to the policy's (PPO-ptx).

    Attributes:
        batch: packed rows.
        weight: of each label's loss; it holds the coefficient and both counts, because `loss_count` is 0.
    """

    batch: Batch
    weight: float
    loss_count: int = 0


class PolicyLoss:
    """The policy's loss on a microbatch of rollouts (or of text), with what is reported about it."""

    def __init__(
        self,
        config: PolicyLossConfig,
        temperature: float,
        correction: CorrectionMode | None = None,
        correction_limit: float = 3.0,
    ) -> None:
        """Keep the settings. `correction` is used where the batch brings no weights of its own."""
        self.config, self.temperature = config, temperature
        self.correction: CorrectionMode | None = correction
        self.correction_limit = correction_limit

    def __call__(self, model: nn.Module, batch: RolloutBatch | PretrainingPart) -> LossResult:
        """Return the loss; the batch's `extra` holds advantages and, where they are needed, old, reference logprobs."""
        if isinstance(batch, PretrainingPart):
            total, _ = summed_loss(model, batch.batch)
            return LossResult(
                total * batch.weight, {"ptx_loss": (total.item(), float(batch.batch.loss_count))}
            )
        config, mask, extra = self.config, batch.completion_mask, batch.extra
        logprobs, entropies = logprobs_and_entropies(model, batch, self.temperature)
        old, correction = extra.get("old_logprobs"), extra.get("correction")
        if correction is None and self.correction is not None:
            correction = sampling_correction(
                logprobs.detach(), batch.logprobs, mask, self.correction, highest=self.correction_limit
            )
        terms = importance_terms(logprobs, old, extra["advantages"], mask, config, correction)
        losses = policy_token_losses(
            terms,
            config,
            sampling_logprobs=batch.logprobs,
            reference_logprobs=extra.get("reference_logprobs"),
            entropies=entropies,
        )
        total = (losses * token_weights(config.loss_type, mask))[mask].sum()
        clipped = clipped_tokens(terms.ratio.detach(), terms.advantages, config.clip_low, config.clip_high)
        tokens = float(mask.sum())
        metrics = {
            "policy_loss": (total.item(), float(batch.loss_count)),
            "clip_fraction": (float(clipped[mask].sum()), tokens),
            "entropy": (float(entropies.detach()[mask].sum()), tokens),
        }
        if old is not None:
            metrics["update_kl"] = (float(kl_k3(old, logprobs.detach())[mask].sum()), tokens)
        return LossResult(total, metrics | sampling_mismatch(logprobs.detach(), batch))


def sampling_mismatch(old_logprobs: Tensor, batch: RolloutBatch) -> Sums:
    """Say how far the engine's logprobs are from the trainer's for the same tokens and weights.

    `sampling_kl` is the KL from the sampler to the trainer in nats a token (k3), `sampling_difference` the mean
    absolute difference of the logprobs.
    """
    mask = batch.completion_mask
    engine, trainer = batch.logprobs[mask], old_logprobs[mask]
    tokens = float(mask.sum())
    return {
        "sampling_kl": (float(kl_k3(engine, trainer).sum()), tokens),
        "sampling_difference": (float((engine - trainer).abs().sum()), tokens),
    }


def correction_mode(config: RLConfig, execution: Execution) -> CorrectionMode | None:
    """Return how rollouts are corrected for the engine's differences, None if they are not."""
    if config.correction == "auto":
        alike = sampling_precision(config, execution) == execution.precision == "fp32"
        return None if alike else "token_truncate"
    return None if config.correction == "off" else config.correction


def sampling_precision(config: RLConfig, execution: Execution) -> Literal["fp32", "bf16", "vllm"]:
    """Return what the engine computes in."""
    return execution.precision if config.rollout_precision == "auto" else config.rollout_precision


def needs_old_logprobs(config: RLConfig) -> bool:
    """Return whether the update must be told what the policy said before it: not if each rollout is trained on once."""
    return updates_per_step(config) > 1 or config.loss.kl_coefficient > 0


def old_logprobs(policy: Transformer, batch: RolloutBatch, config: RLConfig, execution: Execution) -> Sums:
    """Fill `extra["old_logprobs"]` and, where the engine is not quite the trainer, `extra["correction"]`.

    Returns:
        How far the two are apart, where it had to be computed; otherwise the engine's logprobs are the trainer's, and
        that they are is measured in the first update.
    """
    mode = correction_mode(config, execution)
    if mode is None:
        batch.extra["old_logprobs"] = batch.logprobs
        return {}
    batch.extra["old_logprobs"] = old = logprobs_of(policy, batch, config, execution)
    batch.extra["correction"] = sampling_correction(
        old, batch.logprobs, batch.completion_mask, mode, highest=config.correction_limit
    )
    return sampling_mismatch(old, batch)


# --- the loop -------------------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """A model in training: the policy, or PPO's value model."""

    model: Transformer
    optimizer: Optimizer
    loss_fn: LossFunction
    clip_norm: float
    progress: Progress = field(default_factory=Progress)


@dataclass
class Played:
    """What a step has to learn from.

    Attributes:
        rollouts: of this process, for facts and samples.
        batch: the same as tensors, with `extra["advantages"]`; its `row_count` is set for the loss.
        sums: facts as (sum, count), logged as `rl/NAME`.
        beside: microbatches added to every update of the policy, by the number of the update.
    """

    rollouts: list[Rollout]
    batch: RolloutBatch
    sums: Sums = field(default_factory=dict)
    beside: Callable[[int, float], list[Any]] | None = None


Play = Callable[[int], Played]


def learn(
    config: RLConfig,
    context: StageContext,
    learners: dict[str, Learner],
    execution: Execution,
    *,
    seed: int,
    steps: int,
    play: Play,
    memory: dict[str, Any],
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> int:
    """Run the loop from wherever `state/` says it is, and return the steps done.

    Args:
        learners: name -> model; "policy" is one of them.
        play: prompts -> rollout -> score -> advantages, for a step; a pure function of the step and the weights.
        memory: what else a resume must know, as JSON data; stages change it in place. `memory["stop"]` ends the loop.
        evaluate: returns held-out metrics after so many steps.

    Raises:
        NurtureError: a loss stays NaN, or the disk is full.
    """
    processes, state = execution.processes, context.directory / "state"
    together = nn.ModuleDict({name: learner.model for name, learner in learners.items()})
    optimizers = Optimizer([part for learner in learners.values() for part in learner.optimizer.parts])
    policy = learners["policy"].model
    averages = (
        {name: p.detach().clone() for name, p in policy.named_parameters()} if config.loop.average else {}
    )
    loaded = load_state(state, together, optimizers, averages, processes) or {"step": 0}
    first = int(loaded["step"])
    memory.update(loaded.get("memory", {}))
    for name, progress in loaded.get("progress", {}).items():
        learners[name].progress = Progress(**progress)
    latest: dict[str, float] = {}

    def do_step(step: int) -> None:
        started = time.monotonic()
        factor = learning_rate_factor(config.schedule, step, steps)
        for learner in learners.values():
            learner.optimizer.set_factor(factor)
        played = play(step)
        seconds = {"play": time.monotonic() - started}
        learned = update(config, learners, played, execution, seed, step, context)
        sums = learned | rollout_sums(played.rollouts) | played.sums
        move_averages(averages, policy, config.loop.average)
        seconds["step"] = time.monotonic() - started
        latest.clear()
        for name, (total, count) in processes.sum(sums).items():
            latest[f"rl/{name}"] = total / max(count, 1e-9)
        latest.update({f"rl/seconds_{name}": value for name, value in seconds.items()})
        latest["train/learning_rate_factor"] = factor

    def facts(done: int) -> tuple[dict[str, float], str]:
        return latest, f"reward {latest.get('rl/reward_mean', math.nan):.3f}"

    def save(done: int) -> None:
        progress = {name: vars(learner.progress) for name, learner in learners.items()}
        facts_to_keep = {"memory": memory, "progress": progress}
        save_state(state, done, together, optimizers, averages, facts_to_keep, processes, config.loop.keep)

    done = run_steps(
        do_step, facts, save, evaluate,
        first=first, steps=steps, config=config.loop, execution=execution, directory=context.directory,
        label=config.name, stopped=lambda: bool(memory.get("stop")),
    )  # fmt: skip
    if averages:
        use_averages(averages, policy)
    return done


def update(
    config: RLConfig,
    learners: dict[str, Learner],
    played: Played,
    execution: Execution,
    seed: int,
    step: int,
    context: StageContext,
) -> Sums:
    """Train every learner on the step's rollouts, `epochs` times in minibatches; return what is to be logged."""
    sums: Sums = {}
    number = 0
    for epoch in range(config.epochs):
        size = max(1, config.batch_size // execution.processes.world_size)
        for minibatch in minibatches(played.batch, size, seed, step, epoch):
            # A value model learns from every row; shared batches keep them, so that all processes do as much.
            only_policy = set(learners) == {"policy"} and execution.processes.world_size == 1
            trained = without_idle_rows(minibatch, config.loss) if only_policy else minibatch
            parts: list[Any] = list(microbatches(trained, config, execution))
            for name, learner in learners.items():
                beside = []
                if name == "policy" and played.beside is not None:
                    count = execution.processes.sum_number(float(minibatch.loss_count))
                    beside = played.beside(number, count)
                learner.model.train()
                report = train_step(
                    learner.model,
                    learner.optimizer,
                    [*parts, *beside],
                    learner.loss_fn,
                    clip_norm=learner.clip_norm,
                    execution=execution,
                    largest_norm=largest_norm_of(learner.progress, config.loop),
                )
                learner.model.eval()
                tokens = execution.processes.sum_number(float(minibatch.completion_mask.sum()))
                note(learner, report, int(tokens), config, step, context)
                # Only before the first update are engine and trainer the same policy.
                late = [key for key in report.metrics if key.startswith("sampling_")] if number else []
                add_up(sums, {key: value for key, value in report.metrics.items() if key not in late})
                prefix = "" if name == "policy" else f"{name}_"
                add_up(sums, {f"{prefix}grad_norm": (report.grad_norm, 1.0)})
            number += 1
    return sums


def note(
    learner: Learner,
    report: StepReport,
    tokens: int,
    config: RLConfig,
    step: int,
    context: StageContext,
) -> None:
    """Keep the ledger of trained tokens, of all processes; stop when a loss stays broken (nothing to learn is fine)."""
    ledger = learner.progress.tokens
    ledger["completions"] = ledger.get("completions", 0) + tokens
    if report.metrics:
        note_update(learner.progress, report, config.loop, step, context.directory)


def rollout_sums(rollouts: Sequence[Rollout]) -> Sums:
    """Return what can be said of any rollouts: reward, length, how they ended, how much they repeat themselves."""
    count = float(len(rollouts))
    rewards = [rollout.reward for rollout in rollouts if not math.isnan(rollout.reward)]
    written = [own_tokens(rollout) for rollout in rollouts]
    sums: Sums = {
        "reward_mean": (sum(rewards), float(len(rewards))),
        "length": (float(sum(map(len, written))), count),
        "turns": (float(sum(rollout.turns for rollout in rollouts)), count),
        "stopped": (float(sum(rollout.finished == "stop" for rollout in rollouts)), count),
        "repetition": (sum(repetition(tokens) for tokens in written), count),
        "different": (float(len({tuple(tokens) for tokens in written})), count),
        "ungraded": (count - len(rewards), count),
    }
    for rollout in rollouts:
        add_up(sums, {f"reward/{name}": (value, 1.0) for name, value in rollout.reward_parts.items()})
    return sums


def plan_rl_steps(
    config: RLConfig,
    context: StageContext,
    session: Session,
    learners: dict[str, Learner],
    play: Play,
    memory: dict[str, Any],
    evaluation_seconds: float,
) -> int:
    """Return how many steps the stage does: `steps`, or what fits into `minutes`, measured and kept in state/plan.json.

    Raises:
        NurtureError: neither is given, or the budget is too short for a step.
    """
    if config.steps is not None:
        return config.steps
    if config.minutes is None:
        raise NurtureError(f"stage '{config.name}': say how long to train with steps or minutes.")
    processes, budget = session.execution.processes, config.minutes * 60

    def measured() -> dict[str, float]:
        times, untouched = [], dict(memory)
        for learner in learners.values():
            learner.optimizer.set_factor(0.0)  # real updates that change nothing
        for step in range(2):
            started = time.monotonic()
            update(config, learners, play(step), session.execution, session.seed, step, context)
            times.append(time.monotonic() - started)
        for learner in learners.values():
            learner.progress = Progress()
            for part in learner.optimizer.parts:
                part.state.clear()
        memory.clear()
        memory.update(untouched)
        spent = time.monotonic() - session.opened + (MOST_EVALUATIONS + 1) * evaluation_seconds
        steps = int(processes.agree(int((budget * BUDGET_MARGIN - spent) / times[-1])))
        if steps < 1:
            raise NurtureError(
                f"stage '{config.name}': {config.minutes} minutes are too short; a step takes {times[-1]:.1f} s, and "
                f"{spent:.0f} s go to opening and evaluating. Give it more minutes, or fewer prompts_per_step."
            )
        return {"steps": steps, "seconds_per_step": round(times[-1], 3)}

    return int(kept(context.directory, "plan", measured, processes)["steps"])


def updates_per_step(config: RLConfig) -> int:
    """Return how many updates of the policy a step does."""
    rows = config.prompts_per_step * config.group_size
    return config.epochs * max(1, round(rows / config.batch_size))


def summed_over(processes: Processes) -> Callable[[Tensor], Tensor]:
    """Return a function that adds up a small tensor over all processes."""
    if processes.world_size == 1:
        return alone
    return lambda sums: torch.tensor([processes.sum_number(float(value)) for value in sums], dtype=sums.dtype)


# --- sampling -------------------------------------------------------------------------------------------------------


class PolicyEngine:
    """An engine that samples from the policy as it is now, also where the policy is sharded over processes."""

    def __init__(
        self, policy: Transformer, execution: Execution, precision: str, max_batch: int = 256
    ) -> None:
        """Prepare an engine; with several processes, a whole copy of the policy for it."""
        self._policy, self._execution = policy, execution
        self._copy = None
        if execution.processes.mesh is not None:
            self._copy = empty_model(policy.config, "lm", torch.float32, execution.device)
        dtype = torch.bfloat16 if precision == "bf16" else None
        self._engine: Engine | VllmEngine
        if precision == "vllm":
            self._engine = VllmEngine(self._copy or policy, max_batch=max_batch)
        else:
            self._engine = Engine(self._copy or policy, max_batch=max_batch, dtype=dtype)

    def now(self) -> Engine | VllmEngine:
        """Return the engine with the policy's present weights. All processes must call it together."""
        if self._copy is not None:
            self._copy.load_state_dict(whole_weights(self._policy))
        return self._engine


def play_rows(
    config: RLConfig,
    sampler: Sampler,
    tokenizer: Tokenizer,
    make_environment: Callable[[], Environment],
    rows: Sequence[Any],
    seed: int,
    group_size: int = 1,
    share: tuple[int, int] = (0, 1),
    temperature: float | None = None,
) -> list[Rollout]:
    """Let the policy play every row `group_size` times, by default as the stage is set up. `share`: see `collect`."""
    temperature = config.temperature if temperature is None else temperature
    return collect(
        sampler,
        tokenizer,
        make_environment,
        rows,
        params=SamplingParams(max_tokens=config.max_tokens, temperature=temperature),
        group_size=group_size,
        max_turns=config.max_turns,
        max_length=config.sequence_length,
        seed=seed,
        share=share,
        template_kwargs=config.template_kwargs,
    )


class Question:
    """The environment of a prompt that is answered once and scored later, by a reward model."""

    def reset(self, task: Row, seed: int) -> Observation:
        """Ask the row's prompt."""
        return Observation(tuple(task.prompt or ()))

    def step(self, action: str) -> StepResult:
        """Take the answer; it earns nothing here."""
        return StepResult(Observation(()), 0.0, done=True)


def own_tokens(rollout: Rollout) -> list[int]:
    """Return the tokens that the policy wrote."""
    return [token for token, own in zip(rollout.token_ids, rollout.completion_mask, strict=True) if own]


def seed_of(*address: int) -> int:
    """Return a 63-bit seed, a pure function of the address (run seed, step, attempt, rank)."""
    seed = 0
    for part in address:
        seed = sequence_seeds(seed + part, 1)[0]
    return seed % 2**63
