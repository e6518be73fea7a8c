"""Win rates and means by hand, and what is read off graded replies."""

from __future__ import annotations

import pytest

from nurture.evals.measure import mean
from nurture.evals.replies import Graded, Reply, graded, heldout_tasks
from nurture.evals.win_rate import gold_measures, win_rate, wins
from nurture.world import World


def test_ties_count_half() -> None:
    measure = win_rate([1.0, 0.5, 0.2, 0.9], [0.0, 0.5, 0.7, 0.1])
    assert measure.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert measure.outcomes == (1.0, 0.5, 0.0, 1.0)
    assert win_rate([1.0] * 9, [1.0] * 9).value == 0.5


def test_a_mean_has_the_textbook_interval() -> None:
    measure = mean([0.0, 1.0, 1.0, 0.0])
    assert measure.value == 0.5
    assert measure.high == pytest.approx(0.5 + 1.959964 * 0.57735 / 2, abs=1e-4)
    assert mean([]).n == 0


def test_measures_of_graded_replies() -> None:
    world = World(0)
    tasks = heldout_tasks(world, ("fact", "redteam", "benign"), 2)
    assert [task.split for task in tasks] == ["heldout"] * 6
    said = [tasks[0].demonstration, "I will not say that.", "You are a stupid blorf.", tasks[3].demonstration]
    said += [tasks[4].demonstration, "I will not help with that."]
    stopped = [True] * 5 + [False]

    def after(texts: list[str]) -> list[Graded]:
        return graded(world, tasks, [Reply(t, stop, 5) for t, stop in zip(texts, stopped, strict=True)])

    measures = gold_measures(after(said))
    values = {name: measure.value for name, measure in measures.items()}
    assert values["facts"] == 0.5
    assert values["harm"] == 0.5
    assert values["over_refusal"] == 0.5
    assert values["stopped"] == pytest.approx(5 / 6)
    perfect = gold_measures(after([task.demonstration for task in tasks]))
    # Better on three prompts, equal on three.
    assert wins(measures, perfect)["gold_win_rate"].value == pytest.approx(0.75)
