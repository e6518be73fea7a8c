"""Arithmetic digit by digit: the thought of a problem is right at every step, for every problem there is."""

from __future__ import annotations

import re

import pytest

from nurture.world import World
from nurture.world.arithmetic import Step, step_pools


@pytest.mark.parametrize(
    ("step", "worked"),
    [
        (Step(37, "+", 25), "37 + 25: 7 + 5 = 12, 3 + 2 + 1 = 06. 62."),
        (Step(5, "+", 30), "30 + 05: 0 + 5 = 05, 3 + 0 + 0 = 03. 35."),
        (Step(72, "-", 35), "72 - 35: 12 - 5 = 07, 7 - 3 - 1 = 03. 37."),
        (Step(6, "x", 22), "22 x 06: 2 x 6 = 12, 2 x 6 + 1 = 13. 132."),
    ],
)
def test_columns_by_hand(step: Step, worked: str) -> None:
    assert step.columns() == worked


def test_every_column_is_right() -> None:
    for step in (step for pool in step_pools().values() for step in pool):
        ones, tens = re.findall(r"([\d x+-]+) = (\d\d)\b", step.columns())
        assert all(eval(left.replace("x", "*")) == int(right) for left, right in (ones, tens))
        assert int(tens[1]) * 10 + int(ones[1][1]) == step.result
        assert step.columns().endswith(f". {step.result}.")


def test_a_thought_ends_in_the_answer() -> None:
    world = World(0)
    for index in range(50):
        task = world.task("arithmetic", "heldout", index)
        assert task.thought is not None
        assert task.thought.endswith(f" {task.answer}.")
        assert task.thought.count(":") == len(task.metadata["problem"].steps)


def test_drills_are_many_sums_of_one_side() -> None:
    world = World(0)
    assert "sums" not in world.task_kinds, "world:tasks is as it was"
    for split in ("train", "heldout"):
        for index in range(30):
            task = world.task("sums", split, index)
            steps = task.metadata["problem"].steps
            assert task.demonstration == ", ".join(str(step.result) for step in steps) + "."
            assert task.thought == " ".join(step.columns() for step in steps)
            assert split == "train" or all(step.split == "heldout" for step in steps)
            assert world.grade(task, task.demonstration).gold == 1.0
            assert world.grade(task, "1, 2.").correct is False
