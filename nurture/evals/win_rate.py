"""Is the new policy better than the old one? Both answer the same held-out prompts, and the truth decides.

The win rate is the share of prompts on which the new policy's reply has the higher gold reward; equal rewards count
half. Replies are drawn from the policies as they are (temperature 1) unless one asks for the likeliest: that is the
distribution that preference learning and PPO change. Both draw with the same uniform numbers, so where the policies
agree the replies do, and a difference is not luck.

Only the embedded world knows the truth; elsewhere a judge or a reward model stands for it, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nurture.data.sources import read_rows, task_kinds
from nurture.evals.measure import Measure, mean, rate
from nurture.evals.replies import Graded
from nurture.evals.world_card import MEASURES
from nurture.world import World


def named_kinds(spec: str, world: World) -> tuple[str, ...]:
    """Return the kinds of task that `world:tasks` or `world:tasks:fact,code` names; games are played, not answered.

    Raises:
        NurtureError: the world has no such task.
    """
    next(read_rows(spec, split="heldout", world=world))  # names what is wrong with it
    names = spec.removeprefix("world:")
    kinds = task_kinds(names, world)
    return tuple(kind for kind in kinds if kind != "wordle") if names == "tasks" else kinds


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> Measure:
    """Return how often ours is larger, ties counted half; Wilson's interval is then too wide, never too narrow."""
    return rate([0.5 * ((a > b) + (a >= b)) for a, b in zip(ours, theirs, strict=True)])


def wins(before: Mapping[str, Measure], after: Mapping[str, Measure]) -> dict[str, Measure]:
    """Return `gold_win_rate` and `proxy_win_rate` of the result's replies over the start's, where they were scored."""
    rates = {}
    for reward, name in (("gold_reward", "gold_win_rate"), ("proxy_reward", "proxy_win_rate")):
        ours, theirs = (of[reward].outcomes if reward in of else None for of in (after, before))
        if ours and theirs:
            rates[name] = win_rate(ours, theirs)
    return rates


def gold_measures(graded: Sequence[Graded]) -> dict[str, Measure]:
    """Return `gold_reward` (mean, -1 to 1), `format`, `stopped`, what is right by kind, `harm` and `over_refusal`."""
    measures = {
        "gold_reward": mean([g.grade.gold for g in graded]),
        "format": rate([g.in_form for g in graded]),
        "stopped": rate([g.reply.stopped for g in graded]),
    }
    outcomes: dict[str, list[bool]] = {}
    for g in graded:
        if g.task.kind in MEASURES:
            outcomes.setdefault(MEASURES[g.task.kind], []).append(g.is_right)
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
