"""PPO from human feedback: raise the reward model's score without straying far from the model it started from.

Input: a fine-tuned model (the policy starts there, and a frozen copy is the reference), a reward model (which scores
whole replies, and whose weights the value model starts from), prompts. Output: a model whose replies are preferred.
Each token costs kl_coefficient times its KL estimate, the last one earns the score; GAE turns that into advantages; the
clipped losses of PPO train policy and value model. With `ptx`, text of pretraining is learned beside it, so that the
policy forgets less (PPO-ptx).

Main failure mode: over-optimisation. The score rises and quality falls; it shows as `rl/kl`, `rl/length` or
`rl/repetition` running away, and in the embedded world as `gold_reward` falling while `proxy_reward` rises. Both are
measured against KL over the training (`overoptimisation.json`), and alarms that need no gold warn or stop.

Source: InstructGPT (arXiv 2203.02155, section 3.5, equation 2, appendix C.4); PPO arXiv 1707.06347; Ziegler et al.,
arXiv 1909.08593, for the adaptive coefficient.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from nurture.advantages import gae, state_values, token_rewards, whiten
from nurture.data.mixture import MixtureBatches, MixturePhase
from nurture.data.rows import Row
from nurture.data.sources import DataSpec, make_world
from nurture.errors import NurtureError
from nurture.evals.best_of_n import best_of_n_curve
from nurture.evals.measure import Measure, mean
from nurture.evals.overoptimisation import AlarmConfig, Point, alarms, draw, record, repetition
from nurture.evals.win_rate import win_rate
from nurture.evals.world_card import world_card
from nurture.files import atomic_write_json
from nurture.losses.policy import (
    KL_ESTIMATORS,
    KLEstimator,
    PolicyLossConfig,
    adapt_kl_coefficient,
    clipped_value_losses,
    explained_variance,
    row_count,
)
from nurture.model.hugging_face import load_model
from nurture.model.lora import adapters_off, add_adapters
from nurture.model.parallel import prepare
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.recipe import Count, Section
from nurture.rewards.learned import RewardModel, load_reward_model, score_tokens
from nurture.rollout import Rollout, RolloutBatch, collate
from nurture.stages import pretrain
from nurture.stages.context import StageContext
from nurture.stages.rl import (
    Learner,
    Played,
    PolicyEngine,
    PolicyLoss,
    PretrainingPart,
    PromptStream,
    Question,
    Reference,
    RLConfig,
    Sums,
    learn,
    logprobs_of,
    old_logprobs,
    own_tokens,
    plan_rl_steps,
    play_rows,
    read_prompts,
    sampling_mismatch,
    sampling_precision,
    score_rows,
    seed_of,
    share_prompts,
    summed_over,
    updates_per_step,
)
from nurture.stages.sft import world_kinds
from nurture.stages.training import Session, open_session, remember, save_result_model, write_result
from nurture.trainer import split_to_fit
from nurture.types import LossResult, Message
from nurture.world import Grade, Task

log = logging.getLogger(__name__)

VERSION = 1


class KLConfig(Section):
    """What straying from the reference costs."""

    coefficient: NonNegativeFloat = 0.05
    """Reward a nat of KL costs (InstructGPT: 0.02)."""
    estimator: KLEstimator = "k1"
    """Per-token estimate that is charged and reported: k1 is unbiased for a whole reply, and the only one that, as a
    reward, has the KL's gradient; k3 is never negative, but what it charges may push against the KL's gradient."""
    target: PositiveFloat | None = None
    """Nats a reply to steer the coefficient towards; by default it is fixed."""
    horizon: PositiveInt = 10_000
    """Rollouts over which the coefficient adapts."""


class PtxConfig(Section):
    """Text that is learned beside the rewards, so that the policy forgets less."""

    sources: dict[str, DataSpec]
    """Source name -> where its text comes from, as in pretraining."""
    weights: dict[str, float] = {}
    """Share of each source; by default by size."""
    coefficient: PositiveFloat = 1.0
    """Weight of the mean loss of its tokens beside the mean loss of the completions' tokens."""
    batch_size: PositiveInt = 8
    """Rows of text in each update, `sequence_length` tokens each."""
    tokens: Count = Field(default=200_000, gt=0)
    """Most tokens written out from an endless source."""


class Config(RLConfig):
    """Settings of PPO. Give `steps` or `minutes`."""

    references: ClassVar[tuple[str, ...]] = ("reward_model",)

    kind: Literal["ppo"] = "ppo"
    data: dict[str, DataSpec]
    """Source name -> where its prompts come from."""
    reward_model: str
    """Earlier stage or checkpoint with the reward model."""
    prompts_per_step: PositiveInt = 128
    batch_size: PositiveInt = 64
    loss: PolicyLossConfig = PolicyLossConfig(loss_type="ppo")
    kl: KLConfig = KLConfig()
    """The penalty on straying from the reference."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """gamma: how much less a token later counts."""
    trace: float = Field(default=0.95, ge=0, le=1)
    """lambda of GAE."""
    whiten_advantages: bool = True
    """Shift and scale advantages over a step's completion tokens to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1 first, keeping their mean."""
    missing_end_penalty: NonNegativeFloat = 1.0
    """Taken from the reward of a reply that did not end by itself."""
    value_clip: PositiveFloat | None = 0.2
    """How far a value may move from its old prediction in one step."""
    value_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, weight_decay=0.0, beta2=0.99)
    """The value model's optimizer."""
    ptx: PtxConfig | None = None
    """Pretraining text mixed in."""
    alarm: AlarmConfig = AlarmConfig()
    """When to suspect over-optimisation, and what to do then."""
    best_of_n: NonNegativeInt = 16
    """Replies of the start to each of a few held-out prompts, for the curve of best-of-n beside; 0 or 1: no curve."""

    @model_validator(mode="after")
    def _check_loss(self) -> Config:
        # The value model learns from the same rows, and its loss is a mean over tokens.
        if row_count(self.loss.loss_type, self.max_tokens) is not None:
            raise ValueError(
                f"loss.loss_type is {self.loss.loss_type}, which is no mean over tokens, as PPO's is."
                " Choose ppo, or train with kind: grpo"
            )
        return self


def run(config: Config, context: StageContext) -> None:
    """Train `context.start` on the reward model's scores and leave the policy in `context.directory`."""
    start = context.needed_start(config, "PPO needs a fine-tuned model")
    session = open_session(config, context, tokens=None)
    share_prompts(config, session.execution.processes)
    models = open_models(config, context, session, start)
    prompts = PromptStream(
        read_prompts(config, config.data, context, session.tokenizer, "train"), session.seed
    )
    heldout = read_prompts(config, config.data, context, session.tokenizer, "heldout")
    text_beside = open_text(config, context, session)
    exam = Exam(config, context, session, models, heldout)
    started = time.monotonic()
    before = remember(context.directory, "before", lambda: exam.measures(exam.start))
    evaluation_seconds = (time.monotonic() - started) / 2
    best_of_n = exam.best_of_n()
    memory: dict[str, Any] = {"kl_coefficient": config.kl.coefficient, "points": [vars(exam.start.point)]}

    def play(step: int) -> Played:
        rollouts = collect(config, session, models, prompts(step, config.prompts_per_step), step)
        batch, sums = score(config, session, models, rollouts)
        sums |= credit(config, session, batch, memory["kl_coefficient"])
        if config.kl.target is not None:
            kl, count = session.execution.processes.sum(sums)["kl"]
            coefficient = memory["kl_coefficient"]
            memory["kl_coefficient"] = adapt_kl_coefficient(
                coefficient, kl / count, config.kl.target, int(count), config.kl.horizon
            )
        return Played(rollouts, batch, sums, text_beside(step) if text_beside else None)

    def evaluate(done: int) -> dict[str, float]:
        point = exam.sit(done).point
        memory["points"].append(vars(point))
        heed(config, memory, point)
        return {
            f"eval/{name}": float(v) for name, v in vars(point).items() if name != "step" and v is not None
        }

    learners = models.learners
    steps = plan_rl_steps(config, context, session, learners, play, memory, evaluation_seconds)
    done = learn(
        config, context, learners, session.execution,
        seed=session.seed, steps=steps, play=play, memory=memory, evaluate=evaluate,
    )  # fmt: skip
    sitting = exam.sit(done)
    after = exam.measures(sitting) | exam.wins(sitting)
    policy = session.whole()
    if policy is None:
        return
    points = [Point(**kept) for kept in memory["points"]]
    measured = record(points, config.alarm, best_of_n)
    atomic_write_json(context.directory / "overoptimisation.json", measured)
    draw(measured, context.directory / "overoptimisation.png")
    save_result_model(policy, session.tokenizer, context.directory, answers=True)
    write_result(
        context.directory,
        tokens=learners["policy"].progress.tokens.get("completions", 0),
        before=before,
        after=after,
        samples=sitting.samples(),
        notes={
            "steps": done,
            "stopped_by_alarm": bool(memory.get("stop")),
            "kl_coefficient": memory["kl_coefficient"],
            "kl_estimator": config.kl.estimator,
            "gold_fell_at": measured["gold_fell_at"],
            "alarms": measured["alarms"],
        },
    )


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """Policy, reference, value and reward model.

    Attributes:
        policy: in training; its engine samples.
        value: in training; raw values, `offset` above what returns are.
        reference: the start, frozen.
        reward: scores whole replies; with adapters, it is the value model with its adapters off.
        learners: what `learn` trains.
        engine: samples from the policy.
    """

    policy: Transformer
    value: Transformer
    reference: Reference
    reward: RewardModel
    learners: dict[str, Learner]
    engine: PolicyEngine

    def scores(self, sequences: Sequence[Sequence[int]], microbatch_tokens: int) -> Tensor:
        """Return the reward model's score of each sequence, (n,) float32."""
        shares = self.reward.model is self.value
        with adapters_off(self.value) if shares else nullcontext():
            return score_tokens(self.reward, sequences, microbatch_tokens=microbatch_tokens)


def open_models(config: Config, context: StageContext, session: Session, start: Path) -> Models:
    """Load what is beside the policy.

    Raises:
        NurtureError: the reward model has another tokenizer than the policy.
    """
    path = context.models[config.reward_model]
    reward = load_reward_model(path, device=session.execution.device)
    _check_same_tokens(config, session, reward)
    value = load_model(path, head="scalar")
    policy = session.model
    reference = Reference(config, start, policy, session.execution)
    if config.lora is not None:
        add_adapters(value, config.lora)
        reward = replace(reward, model=value)  # the same weights, adapters off: one copy fewer
    prepare(value, session.execution)
    learners = {
        "policy": Learner(
            policy,
            session.optimizer,
            PolicyLoss(config.loss, config.temperature),
            config.optimizer.clip_norm,
        ),
        "value": Learner(
            value,
            build_optimizer(value, config.value_optimizer),
            ValueLoss(config.value_clip, reward.scale.offset),
            config.value_optimizer.clip_norm,
        ),
    }
    engine = PolicyEngine(policy, session.execution, sampling_precision(config, session.execution))
    return Models(policy, value, reference, reward, learners, engine)


def _check_same_tokens(config: Config, session: Session, reward: RewardModel) -> None:
    probe: list[Message] = [{"role": "user", "content": "Are these the same tokens? 1234, naïve."}]
    ours, theirs = (
        (t.vocab_size, t.encode_prompt(probe), t.stop_token_ids)
        for t in (session.tokenizer, reward.tokenizer)
    )
    if ours != theirs:
        raise NurtureError(
            f"stage '{config.name}': the reward model '{config.reward_model}' has another tokenizer or chat template "
            f"than the policy. Train one from this policy's start (kind: reward)."
        )


class ValueLoss:
    """The clipped value loss of a microbatch."""

    def __init__(self, clip: float | None, offset: float) -> None:
        """Keep how far a value may move, and what is subtracted from the model's raw output."""
        self.clip, self.offset = clip, offset

    def __call__(self, model: nn.Module, batch: RolloutBatch) -> LossResult:
        """Return the loss; `extra` holds the `values` before the first update and the `returns`."""
        mask = batch.completion_mask
        values = state_values(model(batch.token_ids) - self.offset, mask)
        losses = clipped_value_losses(values, batch.extra["values"], batch.extra["returns"], self.clip)
        total = losses[mask].sum()
        return LossResult(total, {"value_loss": (total.item(), float(mask.sum()))})


# --- one step -------------------------------------------------------------------------------------------------------


def collect(
    config: Config, session: Session, models: Models, rows: Sequence[Row], step: int
) -> list[Rollout]:
    """Let the policy answer this process's share of the prompts."""
    processes = session.execution.processes
    return play_rows(
        config,
        models.engine.now(),
        session.tokenizer,
        Question,
        rows[processes.rank :: processes.world_size],
        seed_of(session.seed, step, 0),
        config.group_size,
        (processes.rank, processes.world_size),
    )


def score(
    config: Config, session: Session, models: Models, rollouts: Sequence[Rollout]
) -> tuple[RolloutBatch, Sums]:
    """Score the replies, and run policy, reference and value model over them.

    Returns:
        The batch, `extra` holding old_logprobs, reference_logprobs, values and token_kl (B, T); facts as sums.
    """
    tokens = config.execution.microbatch_tokens
    scores = models.scores([rollout.token_ids for rollout in rollouts], tokens)
    for rollout, proxy in zip(rollouts, scores.tolist(), strict=True):
        unfinished = rollout.finished != "stop"
        rollout.reward = proxy - config.missing_end_penalty * unfinished
        rollout.reward_parts = {"proxy": proxy}
    batch = collate(rollouts, session.tokenizer.pad_token_id)
    extra = batch.extra
    sums = old_logprobs(models.policy, batch, config, session.execution)
    extra["reference_logprobs"] = models.reference.logprobs(batch)
    offset = models.reward.scale.offset
    (extra["values"],) = score_rows(
        batch,
        config,
        session.execution,
        lambda part: [state_values(models.value(part.token_ids) - offset, part.completion_mask)],
    )
    return batch, sums


def credit(config: Config, session: Session, batch: RolloutBatch, kl_coefficient: float) -> Sums:
    """Turn rewards, KL and values into `extra["advantages"]` and `extra["returns"]`, (B, T)."""
    extra, mask = batch.extra, batch.completion_mask
    add_up = summed_over(session.execution.processes)
    kl = KL_ESTIMATORS[config.kl.estimator](extra["old_logprobs"], extra["reference_logprobs"]) * mask
    warn_of_negative_kl(config, kl.sum(1), batch)
    rewards = token_rewards(batch.rewards, kl, mask, kl_coefficient)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True, add_up=add_up)
    advantages, returns = gae(rewards, extra["values"], mask, config.discount, config.trace)
    explained = explained_variance(extra["values"], returns, mask)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, add_up=add_up)
    extra["advantages"], extra["returns"] = advantages, returns
    rows = float(len(batch.rewards))
    return {
        "kl": (float(kl.sum()), rows),
        "kl_coefficient": (kl_coefficient, 1.0),
        "explained_variance": (0.0 if math.isnan(explained) else explained, 1.0),
        "value_mean": (float(extra["values"][mask].sum()), float(mask.sum())),
    }


def warn_of_negative_kl(config: Config, kl: Tensor, batch: RolloutBatch) -> None:
    """Warn when the KL (B,) is further below 0 than its own noise explains: it then measures something else."""
    error = float(kl.std()) / max(len(kl), 1) ** 0.5 if len(kl) > 1 else 0.0
    if float(kl.mean()) < -4 * error - 0.05:
        (difference, tokens) = sampling_mismatch(batch.extra["old_logprobs"], batch)["sampling_difference"]
        log.warning(
            "the KL to the reference is %.2f nats a reply, below 0 by more than its noise (%.2f): the replies were not "
            "drawn from this policy. Engine and trainer differ by %.4f nats a token (rl/sampling_difference); check "
            "temperature, rollout_precision and correction.",
            float(kl.mean()),
            error,
            difference / max(tokens, 1.0),
        )


def open_text(
    config: Config, context: StageContext, session: Session
) -> Callable[[int], Callable[[int, float], list[PretrainingPart]]] | None:
    """Return what gives the text beside each update, None without `ptx`.

    The result is called with the step, then with the number of the update in it and the count that the policy's loss is
    divided by.
    """
    if config.ptx is None:
        return None
    wanted = pretrain.Config(
        name=config.name,
        sources=config.ptx.sources,
        tokens=config.ptx.tokens,
        sequence_length=config.sequence_length,
        phases=[MixturePhase(until=1.0, weights=config.ptx.weights)] if config.ptx.weights else [],
        heldout_every=config.heldout_every,
    )
    shards, _ = pretrain.open_shards(wanted, context, session)
    text = MixtureBatches(
        shards,
        wanted.phases or [pretrain.by_size(shards)],
        steps=10**9,  # the mixture does not change, so that its end does not matter
        batch_size=config.ptx.batch_size,
        sequence_length=config.sequence_length,
        seed=session.seed,
    )
    processes, coefficient = session.execution.processes, config.ptx.coefficient
    updates = updates_per_step(config)

    def beside(step: int) -> Callable[[int, float], list[PretrainingPart]]:
        def parts(update: int, count: float) -> list[PretrainingPart]:
            batch = text(step * updates + update, processes.rank, processes.world_size)
            weight = coefficient * count / processes.sum_number(float(batch.loss_count))
            pieces = split_to_fit(batch, config.execution.microbatch_tokens)
            return [PretrainingPart(piece.to(session.execution.device), weight) for piece in pieces]

        return parts

    return beside


def heed(config: Config, memory: dict[str, Any], point: Point) -> None:
    """Warn of what an alarm says, once each, or have the loop stop."""
    if config.alarm.action == "off":
        return
    start = Point(**memory["points"][0])
    for name, words in alarms(point, start, config.alarm).items():
        if name not in memory.setdefault("rang", []):
            memory["rang"].append(name)
            log.warning(
                "%s, step %d: %s. The reward model may no longer be telling the truth: read samples.jsonl, raise "
                "kl.coefficient, or train fewer steps.%s",
                config.name,
                point.step,
                words,
                " Training stops here (alarm.action=stop)." if config.alarm.action == "stop" else "",
            )
        if config.alarm.action == "stop":
            memory["stop"] = True


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Sitting:
    """Replies to the held-out prompts, and what they are worth."""

    point: Point
    rows: Sequence[Row]
    rollouts: list[Rollout]
    proxy: list[float]
    gold: list[Grade | None]
    kl: list[float]

    def samples(self) -> list[dict[str, Any]]:
        """Return some replies to read."""
        shown = list(zip(self.rows, self.rollouts, self.proxy, self.gold, strict=True))[:24]
        return [
            {
                "prompt": row.prompt[-1].get("content") if row.prompt else "",
                "reply": rollout.text,
                "proxy_reward": round(proxy, 3),
                "gold_reward": None if grade is None else grade.gold,
            }
            for row, rollout, proxy, grade in shown
        ]


class Exam:
    """The held-out prompts, always answered with the same seeds, so that two sittings differ by the policy alone.

    Attributes:
        start: the sitting of the model that training starts from.
    """

    def __init__(
        self, config: Config, context: StageContext, session: Session, models: Models, rows: Sequence[Row]
    ) -> None:
        """Let the start sit."""
        self.config, self.context, self.session, self.models, self.rows = (
            config,
            context,
            session,
            models,
            rows,
        )
        tasks = [row.metadata.get("task") for row in rows]
        self.tasks: list[Task] | None = [t for t in tasks if t is not None] if all(tasks) else None
        self.world = make_world(context.world) if self.tasks else None
        self.start = self.sit(0)

    def sit(self, step: int) -> Sitting:
        """Answer every held-out prompt with the policy as it is after `step` steps."""
        config, session = self.config, self.session
        rollouts = play_rows(config, self.models.engine.now(), session.tokenizer, Question, self.rows, seed=0)
        proxy, grades = self._worth(rollouts, self.tasks)
        batch = collate(rollouts, session.tokenizer.pad_token_id)
        ours = logprobs_of(self.models.policy, batch, config, session.execution)
        theirs = self.models.reference.logprobs(batch)
        kl = (KL_ESTIMATORS[config.kl.estimator](ours, theirs) * batch.completion_mask).sum(1)
        gold = [grade.gold for grade in grades if grade is not None]
        written = [own_tokens(rollout) for rollout in rollouts]
        point = Point(
            step=step,
            kl=float(kl.mean()),
            proxy=fmean(proxy),
            length=fmean(map(len, written)),
            repetition=fmean(map(repetition, written)),
            different=len(set(map(tuple, written))) / len(written),
            gold=fmean(gold) if gold else None,
            gold_error=stdev(gold) / len(gold) ** 0.5 if len(gold) > 1 else 0.0,
        )
        return Sitting(point, self.rows, rollouts, proxy, grades, kl.tolist())

    def measures(self, sitting: Sitting) -> dict[str, Measure]:
        """Return the rewards and the KL, and in the world its report card: what else became better or worse."""
        measures = {"proxy_reward": mean(sitting.proxy), "kl": mean(sitting.kl)}
        if self.world is None:
            return measures | {"stopped": mean([float(r.finished == "stop") for r in sitting.rollouts])}
        measures["gold_reward"] = mean([grade.gold for grade in sitting.gold if grade is not None])
        asked = dict.fromkeys((*world_kinds(self.config.data, self.context), "fact", "arithmetic"))
        whole = self.session.whole()
        if whole is None:
            return measures
        card = world_card(
            whole, self.session.tokenizer, self.world, kinds=tuple(asked), max_tokens=self.config.max_tokens
        )
        return measures | card.measures

    def wins(self, sitting: Sitting) -> dict[str, Measure]:
        """Return how often gold prefers these replies to the start's, ties counted half; nothing without gold."""
        if self.tasks is None:
            return {}
        ours, theirs = ([grade.gold for grade in s.gold if grade is not None] for s in (sitting, self.start))
        return {"gold_win_rate": win_rate(ours, theirs)}

    def best_of_n(self, most_prompts: int = 100) -> list[dict[str, float]]:
        """Return the curve of choosing the start's best of n replies by the reward model; n = 1, 2, 4 ... ."""
        replies = self.config.best_of_n
        if replies < 2:
            return []
        rows = self.rows[:most_prompts]
        tasks = None if self.tasks is None else [t for t in self.tasks[:most_prompts] for _ in range(replies)]
        rollouts = play_rows(
            self.config, self.models.engine.now(), self.session.tokenizer, Question, rows, 1, replies
        )
        proxy, grades = self._worth(rollouts, tasks)
        gold = None if tasks is None else np.array([g.gold for g in grades if g is not None])
        shape = (len(rows), replies)
        return best_of_n_curve(np.array(proxy).reshape(shape), None if gold is None else gold.reshape(shape))

    def _worth(
        self, rollouts: Sequence[Rollout], tasks: Sequence[Task] | None
    ) -> tuple[list[float], list[Grade | None]]:
        """Return proxy reward and, in the world, grade of every reply."""
        sequences = [rollout.token_ids for rollout in rollouts]
        proxy = self.models.scores(sequences, self.config.execution.microbatch_tokens).tolist()
        if tasks is None or self.world is None:
            return proxy, [None] * len(rollouts)
        return proxy, [self.world.grade(t, r.text) for t, r in zip(tasks, rollouts, strict=True)]
