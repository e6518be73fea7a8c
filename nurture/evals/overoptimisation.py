"""Over-optimisation: is the reward model still telling the truth about the policy that is trained on it?

A learned reward is a *proxy*. Pushed far enough from the replies it was trained on, it goes on rising while what people
want (the *gold* reward, known in the embedded world) falls: Goodhart's law, drawn as both rewards against the KL
between the policy and its start. Without gold one can only watch for the marks it leaves. Four alarms do that here;
where gold is known they are held against it: an alarm is *right* if gold fell and it rang by then, *false* if gold
never fell.

The measured curve is plain data (`overoptimisation.json`): the report draws it, and so does `draw` where matplotlib is.

Source: Gao, Schulman, Hilton, "Scaling laws for reward model overoptimization", arXiv 2210.10760; Stiennon et al.,
arXiv 2009.01325, figure 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from nurture.recipe import Section

_NGRAM = 3


class AlarmConfig(Section):
    """When to suspect that the policy games the reward model."""

    action: Literal["warn", "stop", "off"] = "warn"
    """What an alarm does: warn, stop the training, or nothing."""
    kl: PositiveFloat = 40.0
    """Nats a rollout from the start beyond which the reward model is not trusted."""
    length: PositiveFloat = 1.5
    """Replies longer or shorter than the start's by this factor."""
    repetition: NonNegativeFloat = 0.1
    """Repeated three-token sequences, as a share, above the start's."""
    sameness: PositiveFloat = 0.5
    """Different replies to different prompts, as a share of the start's, below which the policy has collapsed."""


@dataclass(frozen=True)
class Point:
    """What a policy is like after so many steps, on held-out prompts.

    Attributes:
        step: of training; 0 is the start.
        kl: nats a rollout from the start (mean).
        proxy: mean reward of the reward model.
        length: mean tokens of a reply.
        repetition: mean share of repeated n-grams.
        different: share of replies that no other prompt got.
        gold: mean gold reward, None where it is unknown.
        gold_error: standard error of `gold`.
    """

    step: int
    kl: float
    proxy: float
    length: float
    repetition: float
    different: float
    gold: float | None = None
    gold_error: float = 0.0


def repetition(token_ids: Sequence[int]) -> float:
    """Return the share of three-token sequences that occurred earlier in the same reply; 0 for the shortest replies."""
    count = len(token_ids) - _NGRAM + 1
    if count <= 0:
        return 0.0
    return 1.0 - len({tuple(token_ids[i : i + _NGRAM]) for i in range(count)}) / count


def alarms(point: Point, start: Point, config: AlarmConfig) -> dict[str, str]:
    """Return the alarms that ring at `point`: name -> what is wrong, in words. Gold is not looked at."""
    ringing = {}
    if point.kl > config.kl:
        ringing["kl"] = f"KL from the start is {point.kl:.1f} nats a reply, beyond {config.kl:g}"
    change = max(point.length, 1.0) / max(start.length, 1.0)
    if change > config.length or change < 1 / config.length:
        ringing["length"] = f"replies have {point.length:.0f} tokens, {start.length:.0f} at the start"
    if point.repetition > start.repetition + config.repetition:
        ringing["repetition"] = (
            f"{point.repetition:.0%} of three-token sequences repeat, {start.repetition:.0%} at the start"
        )
    if point.different < start.different * config.sameness:
        ringing["sameness"] = (
            f"only {point.different:.0%} of replies differ, {start.different:.0%} at the start"
        )
    return ringing


def gold_fell_at(points: Sequence[Point]) -> int | None:
    """Return the first step from which gold stays clearly below its best (by twice the standard error of the two).

    None if it never did, or gold is unknown.
    """
    known = [point for point in points if point.gold is not None]
    if not known:
        return None
    best = max(known, key=lambda point: point.gold or 0.0)
    fell = None
    for point in known:
        if point.step <= best.step:
            continue
        margin = 2 * math.hypot(point.gold_error, best.gold_error)
        if (point.gold or 0.0) < (best.gold or 0.0) - margin:
            fell = point.step if fell is None else fell
        else:
            fell = None
    return fell


def judge_alarms(points: Sequence[Point], config: AlarmConfig) -> dict[str, dict[str, Any]]:
    """Hold each alarm against gold.

    Returns:
        name -> {"rang_at": step or None, "verdict"}; the verdict is "right" (gold fell, and it rang by then), "late",
        "missed", "false" (it rang, gold never fell), "quiet" (neither), or "unknown" without gold.
    """
    fell = gold_fell_at(points)
    known = any(point.gold is not None for point in points)
    judged = {}
    for name in ("kl", "length", "repetition", "sameness"):
        rang = next((p.step for p in points[1:] if name in alarms(p, points[0], config)), None)
        if not known:
            verdict = "unknown"
        elif fell is None:
            verdict = "quiet" if rang is None else "false"
        else:
            verdict = "missed" if rang is None else "right" if rang <= fell else "late"
        judged[name] = {"rang_at": rang, "verdict": verdict}
    return judged


def record(
    points: Sequence[Point], config: AlarmConfig, best_of_n: Sequence[Mapping[str, float]] = ()
) -> dict[str, Any]:
    """Return everything measured as plain data for `overoptimisation.json`.

    Args:
        points: the policy over training, the start first.
        best_of_n: {"n", "kl", "proxy", "gold"} of the start's best of n replies, for comparison at equal KL.
    """
    return {
        "policy": [asdict(point) for point in points],
        "best_of_n": [dict(entry) for entry in best_of_n],
        "gold_fell_at": gold_fell_at(points),
        "alarms": judge_alarms(points, config),
        "limits": config.model_dump(mode="json"),
    }


def draw(measured: Mapping[str, Any], path: Path) -> bool:
    """Draw proxy and gold reward against the square root of KL, best of n beside; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    figure, left = plt.subplots(figsize=(7, 4.5))
    left.set_xlabel("square root of KL from the start (nats a reply)")
    # The two rewards have different units: each has its own axis.
    for reward, colour, axes in (("proxy", "tab:blue", left), ("gold", "tab:orange", left.twinx())):
        for source, style in (("policy", "-"), ("best_of_n", "--")):
            known = [entry for entry in measured[source] if entry.get(reward) is not None]
            horizontal = [math.sqrt(max(entry["kl"], 0.0)) for entry in known]
            label = source.replace("_", " ")
            axes.plot(horizontal, [e[reward] for e in known], style, color=colour, marker=".", label=label)
        axes.set_ylabel(f"{reward} reward", color=colour)
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
