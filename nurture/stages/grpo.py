"""GRPO and its family: learn from rewards that a program can check, with a prompt's own completions as the baseline.

Input: a model that answers, and something that pays: problems with answers, programs with tests, a game. Output: a
model that is paid more often. Each prompt is answered `group_size` times; what a completion earned beyond the mean of
its group is the credit of all its tokens, and the clipped loss of the configured kind (losses/policy.py) makes good
ones likelier. There is no value model and, without `loss.kl_coefficient`, no reference.

    prompts -> rollout -> score -> advantages -> train_step x epochs

Groups whose rewards are all equal teach nothing. They are counted (`rl/zero_variance`); with `refills` they are
replaced by other prompts' groups before the update (DAPO's dynamic sampling), as long as tries are left. A rollout that
nothing could grade (`rl/ungraded`: the grader failed) is no zero: it enters neither mean nor loss.

Main failure mode: nothing to learn from (`rl/zero_variance` near 1: too hard, too easy, or `rl/entropy` has fallen to
0), and a reward that can be had without the skill: `won` is counted by the games themselves on held-out tasks.

Sources: GRPO arXiv 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476 (clip-higher, dynamic sampling, equation 13 for
length); RLOO 2402.14740; REINFORCE++ 2501.03262; GSPO 2507.18071; the others are listed in losses/policy.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from nurture.advantages import (
    AddUp,
    RewardScale,
    group_advantages,
    leave_one_out,
    overlong_penalty,
    reinforce_plus_plus,
    spread,
    zero_variance_groups,
)
from nurture.data.sources import DataSpec
from nurture.environments.catalog import Make, environment_maker, kind_of, name_of
from nurture.environments.wordle import Wordle, WordleConfig
from nurture.errors import NurtureError
from nurture.evals.measure import Measure, mean, rate
from nurture.evals.wordle import wordle_card
from nurture.losses.policy import KL_ESTIMATORS, KL_IN_REWARD, PolicyLossConfig, row_count
from nurture.model.transformer import Transformer
from nurture.rollout import Rollout, RolloutBatch, Sampler, collate
from nurture.stages.context import StageContext
from nurture.stages.rl import (
    PROMPTS,
    Learner,
    Played,
    PolicyEngine,
    PolicyLoss,
    PromptStream,
    Reference,
    RLConfig,
    Sums,
    correction_mode,
    learn,
    needs_old_logprobs,
    old_logprobs,
    own_tokens,
    plan_rl_steps,
    play_rows,
    read_prompts,
    sampling_precision,
    seed_of,
    share_prompts,
    summed_over,
)
from nurture.stages.training import (
    Session,
    open_session,
    remember,
    save_result_model,
    write_result,
)
from nurture.tokenizer import Tokenizer
from nurture.trainer import MOST_EVALUATIONS
from nurture.world.split import split_of

VERSION = 1


class Config(RLConfig):
    """Settings of GRPO. Give `steps`, or `minutes`: then the held-out tasks are only measured before and after, unless
    `loop.evaluate_every` says otherwise."""

    kind: Literal["grpo"] = "grpo"
    data: dict[str, DataSpec] = {}
    """Source name -> rows with an answer or tests, or what `env` judges. Games that bring their own tasks (wordle,
    openenv:URL) need none."""
    env: str = "auto"
    """What pays: auto (math, code or wordle, by the row), math, code, wordle, openenv:URL, module:NAME or FILE.py:NAME,
    which is a class with reset and step or a function of a reply and its row that returns the reward."""
    environment: dict[str, Any] = {}
    """Settings of the environment, for example {reward: textarena}; with auto by the name of each."""
    heldout_env: str | None = None
    """Where the held-out measurement is played, if not in `env`: a server draws both from the same tasks, so name
    another one here (`nurture env serve NAME --split heldout`), or the same game by name."""
    prompts_per_step: PositiveInt = 16
    group_size: int = Field(default=8, ge=2)
    """Completions of each prompt: each other's baseline."""
    batch_size: PositiveInt = 128
    max_turns: PositiveInt = 16
    loss: PolicyLossConfig = PolicyLossConfig(loss_type="dapo", clip_high=0.28)
    reward_scale: RewardScale = "group"
    """Advantages are divided by the standard deviation of the rewards in the group, in the batch, or not at all (none:
    Dr. GRPO)."""
    refills: NonNegativeInt = 0
    """Most times that groups of equal rewards are replaced by other prompts' before an update (DAPO)."""
    overlong_cushion: NonNegativeInt = 0
    """Tokens before `max_tokens` over which a turn's length costs up to 1 of the reward (DAPO: 4096 of 20480)."""
    drop_truncated: bool = False
    """Leave episodes that did not end by themselves out of the loss, instead of learning from their reward."""
    heldout_temperature: NonNegativeFloat = 0.0
    """Of the held-out measurement; 0 takes the likeliest reply. Wordle is always played at `temperature`."""


def run(config: Config, context: StageContext) -> None:
    """Train `context.start` on what its environment pays and leave the policy in `context.directory`."""
    start = context.needed_start(config, "GRPO needs a model that answers")
    session = open_session(config, context, tokens=None)
    share_prompts(config, session.execution.processes)
    make = environment_maker(config.env, config.environment)
    stream = PromptStream(tasks_of(config, context, session.tokenizer, make, "train"), session.seed)
    models = open_models(config, session, start)
    make_heldout = environment_maker(config.heldout_env, config.environment) if config.heldout_env else make
    heldout = tasks_of(config, context, session.tokenizer, make_heldout, "heldout")
    exam = Exam(config, session, models.engine, make_heldout, heldout)
    started = time.monotonic()
    before = remember(context.directory, "before", lambda: exam.sit().measures)
    evaluation_seconds = time.monotonic() - started
    memory: dict[str, Any] = {}

    def play(step: int) -> Played:
        kept, all_played = sample(config, session, models.engine.now(), make, stream, step)
        batch = to_batch(config, session.tokenizer, kept)
        sums = credit(config, session, models, batch)
        return Played(all_played, batch, sums | group_sums(kept, all_played))

    latest: dict[int, Sitting] = {}

    def evaluate(done: int) -> dict[str, float]:
        latest.clear()
        latest[done] = exam.sit()
        return {f"eval/{name}": measure.value for name, measure in latest[done].measures.items()}

    # A time budget goes into training: the held-out tasks are then measured before and after, unless the recipe says.
    midway = config.steps is not None or config.loop.evaluate_every is not None
    reserved = evaluation_seconds if midway else evaluation_seconds / (MOST_EVALUATIONS + 1)
    steps = plan_rl_steps(config, context, session, models.learners, play, memory, reserved)
    done = learn(
        config, context, models.learners, session.execution,
        seed=session.seed, steps=steps, play=play, memory=memory, evaluate=evaluate if midway else None,
    )  # fmt: skip
    sitting = latest.get(done) if config.loop.average is None else None
    sitting = sitting or exam.sit()
    policy = session.whole()
    if policy is None:
        return
    save_result_model(policy, session.tokenizer, context.directory, answers=True)
    write_result(
        context.directory,
        tokens=models.learners["policy"].progress.tokens.get("completions", 0),
        before=before,
        after=sitting.measures,
        samples=sitting.samples,
        notes={"steps": done, "epochs": round(stream.epochs(done, config.prompts_per_step), 3)},
    )


# --- what is played -------------------------------------------------------------------------------------------------


def tasks_of(
    config: Config,
    context: StageContext,
    tokenizer: Tokenizer,
    make: Make,
    split: Literal["train", "heldout"],
) -> list[Any]:
    """Return what the environments are reset with: rows, Wordle's secret words, or None where the seed decides.

    Raises:
        NurtureError: there is nothing to play.
    """
    if config.data:
        return list(read_prompts(config, config.data, context, tokenizer, split))
    game = make()
    if isinstance(game, Wordle):
        words = [word for word in game.answers if split_of("wordle", word) == split]
        if not words:
            raise NurtureError(
                f"stage '{config.name}': no {split} word is left of {len(game.answers)} answers."
            )
        return words
    env = config.env if split == "train" else config.heldout_env or config.env
    if ":" in env:  # on a server, or of the user's own: the seed decides
        return [None] * (config.heldout_prompts if split == "heldout" else config.prompts or PROMPTS)
    raise NurtureError(f"stage '{config.name}': env '{env}' needs data: rows with an answer or tests.")


def sample(
    config: Config, session: Session, sampler: Sampler, make: Make, stream: PromptStream, step: int
) -> tuple[list[Rollout], list[Rollout]]:
    """Play this process's share of a step's prompts.

    Returns:
        What to train on, and all that was played: with `refills`, groups of equal rewards are in the second alone (but
        where several processes share a batch, some fill up the first, so that all have as many rows).
    """
    processes = session.execution.processes
    played: list[Rollout] = []
    useful: list[list[Rollout]] = []
    useless: list[list[Rollout]] = []
    share = len(range(processes.rank, config.prompts_per_step, processes.world_size))
    for attempt in range(config.refills + 1):
        tasks = stream(step, config.prompts_per_step, attempt)[processes.rank :: processes.world_size]
        seed = seed_of(session.seed, step, 0, attempt)
        chosen, place = tasks[: share - len(useful)], (processes.rank, processes.world_size)
        rollouts = play_rows(config, sampler, session.tokenizer, make, chosen, seed, config.group_size, place)
        pay(config, rollouts)
        for first in range(0, len(rollouts), config.group_size):
            group = rollouts[first : first + config.group_size]
            for rollout in group:
                rollout.group = len(played) // config.group_size
            played += group
            (useless if config.refills and equal_rewards(group) else useful).append(group)
        if len(useful) >= share:
            break
    if processes.world_size > 1 or not useful:
        useful += useless[: max(share - len(useful), 0)]
    return [rollout for group in useful for rollout in group], played


def pay(config: Config, rollouts: Sequence[Rollout]) -> None:
    """Settle rewards: what could not be graded has none (NaN), what is nearly too long has less."""
    for rollout in rollouts:
        if rollout.info.get("grader_error"):
            rollout.reward = math.nan
    if config.overlong_cushion:
        lengths = torch.tensor([len(own_tokens(rollout)) / max(rollout.turns, 1) for rollout in rollouts])
        penalties = overlong_penalty(lengths, config.max_tokens, config.overlong_cushion).tolist()
        for rollout, penalty in zip(rollouts, penalties, strict=True):
            rollout.reward += penalty
            rollout.reward_parts = {**rollout.reward_parts, "overlong": penalty}


def equal_rewards(group: Sequence[Rollout]) -> bool:
    """Return whether a group teaches nothing."""
    rewards = torch.tensor([rollout.reward for rollout in group])
    return bool(zero_variance_groups(rewards, torch.zeros(len(group), dtype=torch.int64))[0])


def group_sums(kept: Sequence[Rollout], played: Sequence[Rollout]) -> Sums:
    """Return how many groups taught nothing, how many of these were won by all, how many are trained on, and wins."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in played:
        groups.setdefault(rollout.group, []).append(rollout)
    equal = [group for group in groups.values() if equal_rewards(group)]
    solved = [group for group in equal if all(rollout.info.get("won") for rollout in group)]
    count = float(len(groups))
    return {
        "zero_variance": (float(len(equal)), count),
        "solved": (float(len(solved)), count),
        "kept": (float(len({rollout.group for rollout in kept})), count),
        "won": (float(sum(bool(r.info.get("won")) for r in played)), float(len(played))),
    }


# --- one step -------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """The policy in training, its engine, and the reference (None without KL)."""

    policy: Transformer
    engine: PolicyEngine
    learners: dict[str, Learner]
    reference: Reference | None = None


def open_models(config: Config, session: Session, start: Path) -> Models:
    """Put together what is trained, and load the reference where a KL to it is wanted."""
    engine = PolicyEngine(session.model, session.execution, sampling_precision(config, session.execution))
    correction = correction_mode(config, session.execution)
    loss = PolicyLoss(config.loss, config.temperature, correction, config.correction_limit)
    learner = Learner(session.model, session.optimizer, loss, config.optimizer.clip_norm)
    reference = None
    if config.loss.kl_coefficient > 0:
        reference = Reference(config, start, session.model, session.execution)
    return Models(session.model, engine, {"policy": learner}, reference)


def to_batch(config: Config, tokenizer: Tokenizer, rollouts: Sequence[Rollout]) -> RolloutBatch:
    """Lay the rollouts out, without the tokens that are not to be learned from, and say how the loss averages them."""
    batch = collate(rollouts, tokenizer.pad_token_id)
    batch.row_count = row_count(config.loss.loss_type, config.max_tokens)
    left_out = batch.rewards.isnan()
    if config.drop_truncated:
        left_out |= torch.tensor([rollout.finished != "stop" for rollout in rollouts])
    batch.completion_mask[left_out] = False
    return batch


def credit(config: Config, session: Session, models: Models, batch: RolloutBatch) -> Sums:
    """Fill `batch.extra`: advantages (B, T), and the old and reference logprobs that the loss needs."""
    sums: Sums = {}
    if needs_old_logprobs(config):
        sums = old_logprobs(models.policy, batch, config, session.execution)
    mask, extra, loss = batch.completion_mask, batch.extra, config.loss
    token_kl = torch.zeros_like(batch.logprobs)
    if models.reference is not None:
        reference_logprobs = models.reference.logprobs(batch)
        token_kl = KL_ESTIMATORS[loss.kl_estimator](extra["old_logprobs"], reference_logprobs) * mask
        sums["kl"] = (float(token_kl.sum()), float(len(batch.rewards)))
        if loss.loss_type not in KL_IN_REWARD:
            extra["reference_logprobs"] = reference_logprobs
    add_up = summed_over(session.execution.processes)
    extra["advantages"] = advantages(config, batch.rewards, batch.groups, token_kl, mask, add_up)
    return sums


def advantages(
    config: Config, rewards: Tensor, groups: Tensor, token_kl: Tensor, completion_mask: Tensor, add_up: AddUp
) -> Tensor:
    """Return the credit of every token, (B, T), in the way that belongs to the loss.

    Args:
        rewards: (B,), NaN where nothing could grade the rollout.
        groups: (B,) int64.
        token_kl: (B, T) nats against the reference; zeros without one.
    """
    coefficient = config.loss.kl_coefficient
    if config.loss.loss_type == "reinforce++":
        return reinforce_plus_plus(rewards, token_kl, completion_mask, coefficient, groups, add_up=add_up)
    if config.loss.loss_type == "rloo":
        return spread(leave_one_out(rewards - coefficient * token_kl.sum(1), groups), completion_mask)
    return spread(group_advantages(rewards, groups, config.reward_scale, add_up=add_up), completion_mask)


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Sitting:
    """What the held-out tasks gave."""

    measures: dict[str, Measure] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Exam:
    """The held-out tasks, always with the same seeds, so that two sittings differ by the policy alone."""

    def __init__(
        self, config: Config, session: Session, engine: PolicyEngine, make: Make, tasks: Sequence[Any]
    ) -> None:
        """Sort the tasks by what they measure: math, code, wordle, or the environment's own reward."""
        self.config, self.session, self.engine, self.make = config, session, engine, make
        self.tasks: dict[str, list[Any]] = {}
        env = config.heldout_env or config.env
        for task in tasks:
            name = kind_of(task) if env == "auto" else name_of(env)
            self.tasks.setdefault(name, []).append(task)

    def sit(self) -> Sitting:
        """Play them all with the policy as it is."""
        sampler, sitting = self.engine.now(), Sitting()
        for name, tasks in self.tasks.items():
            measures, rollouts = (
                self._wordle(sampler, tasks) if name == "wordle" else self._tasks(sampler, name, tasks)
            )
            sitting.measures |= measures
            sitting.samples += [
                {
                    "task": name,
                    "prompt": _asked(rollout),
                    "reply": rollout.text,
                    "reward": None if math.isnan(rollout.reward) else round(rollout.reward, 4),
                    "finished": rollout.finished,
                }
                | ({"messages": rollout.messages} if rollout.turns > 1 else {})  # the studio replays games
                for rollout in rollouts[:12]
            ]
        return sitting

    def _tasks(
        self, sampler: Sampler, name: str, tasks: Sequence[Any]
    ) -> tuple[dict[str, Measure], list[Rollout]]:
        config = self.config
        rollouts = play_rows(
            config,
            sampler,
            self.session.tokenizer,
            self.make,
            tasks,
            seed=0,
            temperature=config.heldout_temperature,
        )
        graded = [rollout for rollout in rollouts if not rollout.info.get("grader_error")]
        won = rate([bool(rollout.info.get("won")) for rollout in graded])
        if name in ("math", "code"):
            return {name: won}, rollouts
        measures = {f"{name}_reward": mean([rollout.reward for rollout in graded])}
        if any("won" in rollout.info for rollout in graded):  # servers of others may know no winning
            measures[f"{name}_win"] = won
        return measures, rollouts

    def _wordle(self, sampler: Sampler, tasks: Sequence[Any]) -> tuple[dict[str, Measure], list[Rollout]]:
        config = self.config
        settings = config.environment if config.env == "wordle" else config.environment.get("wordle", {})
        words = dict.fromkeys(task if isinstance(task, str) else task.answer for task in tasks)
        return wordle_card(
            sampler,
            self.session.tokenizer,
            config=WordleConfig(**settings),
            words=tuple(words),
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            max_length=config.sequence_length,
        )


def _asked(rollout: Rollout) -> str:
    """Return the last turn before the policy's first."""
    before = takewhile(lambda turn: turn.get("role") != "assistant", rollout.messages)
    return [turn.get("content", "") for turn in before][-1]
