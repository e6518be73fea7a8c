"""Is the new policy better than the old one? Both answer the same held-out prompts, and the truth decides.

The win rate is the share of prompts on which the new policy's reply has the higher gold reward; equal rewards count
half. Replies are drawn from the policies as they are (temperature 1) unless one asks for the likeliest: that is the
distribution that preference learning and PPO change. Both draw with the same uniform numbers, so where the policies
agree the replies do, and a difference is not luck.

Only the embedded world knows the truth; elsewhere a judge or a reward model stands for it, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch

from nurture.data.sources import read_rows, task_kinds
from nurture.evals.measure import Z_95, Measure, rate
from nurture.evals.replies import Reply, ask
from nurture.evals.world_card import MEASURES
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer
from nurture.world import Grade, Task, World


@dataclass(frozen=True)
class Graded:
    """A reply and what it is worth."""

    task: Task
    reply: Reply
    grade: Grade


def named_kinds(spec: str, world: World) -> tuple[str, ...]:
    """Return the kinds of task that `world:tasks` or `world:tasks:fact,code` names; games are played, not answered.

    Raises:
        NurtureError: the world has no such task.
    """
    next(read_rows(spec, split="heldout", world=world))  # names what is wrong with it
    names = spec.removeprefix("world:")
    kinds = task_kinds(names, world)
    return tuple(kind for kind in kinds if kind != "wordle") if names == "tasks" else kinds


def heldout_tasks(world: World, kinds: Sequence[str], per_kind: int, first: int = 0) -> list[Task]:
    """Return held-out tasks, `per_kind` of each kind from index `first` on."""
    return [world.task(kind, "heldout", first + index) for kind in kinds for index in range(per_kind)]


def graded_replies(
    model: Transformer,
    tokenizer: Tokenizer,
    world: World,
    tasks: Sequence[Task],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **template_kwargs: Any,
) -> list[Graded]:
    """Ask a model every task and grade what it says.

    Args:
        max_tokens: longest reply.
        temperature: 0 for the likeliest reply.
        seed: the same for models that are compared.
        dtype: of the engine's matrices.
        template_kwargs: variables of the chat template.
    """
    prompts = [task.messages for task in tasks]
    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "dtype": dtype}
    replies = ask(model, tokenizer, prompts, **how, **template_kwargs)
    return [
        Graded(task, reply, world.grade(task, reply.text)) for task, reply in zip(tasks, replies, strict=True)
    ]


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> Measure:
    """Return how often ours is larger, ties counted half; Wilson's interval is then too wide, never too narrow."""
    return rate([0.5 * ((a > b) + (a >= b)) for a, b in zip(ours, theirs, strict=True)])


def mean(values: Sequence[float]) -> Measure:
    """Return the mean with its normal 95 % interval."""
    n = len(values)
    if n == 0:
        return Measure(0.0, 0)
    centre = fmean(values)
    half = Z_95 * pstdev(values) / max(n - 1, 1) ** 0.5
    return Measure(centre, n, centre - half, centre + half, outcomes=tuple(values))


def gold_measures(graded: Sequence[Graded]) -> dict[str, Measure]:
    """Return `gold_reward` (mean, -1 to 1), `format`, `stopped`, what is right by kind, `harm` and `over_refusal`."""
    measures = {
        "gold_reward": mean([g.grade.gold for g in graded]),
        "format": rate([g.grade.format and g.reply.stopped for g in graded]),
        "stopped": rate([g.reply.stopped for g in graded]),
    }
    outcomes: dict[str, list[bool]] = {}
    for g in graded:
        if g.task.kind in MEASURES:
            outcomes.setdefault(MEASURES[g.task.kind], []).append(bool(g.grade.correct) and g.reply.stopped)
        elif g.task.kind == "redteam":
            outcomes.setdefault("harm", []).append(g.grade.harmful)
        elif g.task.kind == "benign":
            outcomes.setdefault("over_refusal", []).append(g.grade.refusal)
    return measures | {name: rate(values) for name, values in outcomes.items()}


def gold_samples(graded: Sequence[Graded], first: int = 0) -> list[dict[str, Any]]:
    """Return the replies to the first two tasks of each kind, for `samples.jsonl`; tasks begin at index `first`."""
    return [
        {"kind": g.task.kind, "prompt": g.task.prompt, "reply": g.reply.text, "gold_reward": g.grade.gold}
        for g in graded
        if g.task.index < first + 2
    ]


def gold_win_rate(ours: Sequence[Graded], theirs: Sequence[Graded]) -> Measure:
    """Return the win rate of our replies over theirs, to the same tasks, by gold reward."""
    return win_rate([g.grade.gold for g in ours], [g.grade.gold for g in theirs])
