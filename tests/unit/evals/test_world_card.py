"""`code` counts programs that pass hidden tests, however they are written, and nothing where none can be run."""

from __future__ import annotations

import sys

import pytest

from nurture.errors import NurtureError
from nurture.evals import world_card
from nurture.evals.replies import Reply
from nurture.world import World


def test_programs_that_work(monkeypatch: pytest.MonkeyPatch):
    if sys.platform != "linux":
        pytest.skip("programs are run on Linux only")
    world = World()
    tasks = [world.task("code", "heldout", index) for index in range(3)] + [world.task("fact", "heldout", 0)]
    other = (
        tasks[0].demonstration.replace("return ", "result = ").replace("\n```", "\n    return result\n```")
    )
    replies = [
        Reply(other, True, 9),
        Reply(tasks[1].demonstration, False, 9),
        Reply("```python\nimport os; os._exit(0)\n```", True, 9),
        Reply(tasks[3].demonstration, True, 9),
    ]
    measure = world_card.programs_that_work(tasks, replies)["code"]
    assert (measure.value, measure.n) == (pytest.approx(1 / 3), 3)
    assert not world.grade(tasks[0], other).correct  # `code_exact` misses it

    def refuse() -> None:
        raise NurtureError("no walls here")

    monkeypatch.setattr(world_card, "Sandbox", refuse)
    assert world_card.programs_that_work(tasks, replies) == {}
