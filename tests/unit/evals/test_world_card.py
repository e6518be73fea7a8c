"""The world's card: `code` counts programs that pass hidden tests; both modes are asked and obeyed, or not."""

from __future__ import annotations

import sys
from random import Random

import pytest

from nurture.errors import NurtureError
from nurture.evals import replies, world_card
from nurture.evals.replies import Graded, Reply
from nurture.world import World, harm


def test_programs_that_work(monkeypatch: pytest.MonkeyPatch):
    if sys.platform != "linux":
        pytest.skip("programs are run on Linux only")
    world = World()
    tasks = [world.task("code", "heldout", index) for index in range(3)] + [world.task("fact", "heldout", 0)]
    other = (
        tasks[0].demonstration.replace("return ", "result = ").replace("\n```", "\n    return result\n```")
    )
    said = [
        Reply(other, True, 9),
        Reply(tasks[1].demonstration, False, 9),
        Reply("```python\nimport os; os._exit(0)\n```", True, 9),
        Reply(tasks[3].demonstration, True, 9),
    ]
    graded = [Graded(task, r, world.grade(task, r.text)) for task, r in zip(tasks, said, strict=True)]
    measure = world_card.programs_that_work(graded)["code"]
    assert (measure.value, measure.n) == (pytest.approx(1 / 3), 3)
    assert not world.grade(tasks[0], other).correct  # `code_exact` misses it

    def refuse() -> None:
        raise NurtureError("no walls here")

    monkeypatch.setattr(world_card, "Sandbox", refuse)
    assert world_card.programs_that_work(graded) == {}


def test_dual_mode_counts_thoughts_and_answers(monkeypatch: pytest.MonkeyPatch):
    world = World()
    sums = [world.task("arithmetic", "heldout", index) for index in range(4)]

    def ask(model, tokenizer, prompts, *, enable_thinking, **how):
        assert prompts == [task.messages for task in sums]
        right = [task.demonstration for task in sums]
        if enable_thinking:  # one never ends its thought, one has none; of the others one is wrong
            texts = [f"<think>\nHm.\n</think>\n{text}" for text in right]
            texts[0], texts[1], texts[2] = "<think>\nHm.", right[1], "<think>\nHm.\n</think>\nAnswer: 0"
        else:  # one thinks although it should not
            texts = [f"<think>\nHm.\n</think>\n{right[0]}", right[1], "No idea.", "No idea."]
        return [Reply(text, True, 9) for text in texts]

    monkeypatch.setattr(replies, "ask", ask)
    card = world_card.dual_mode(None, None, world, kinds=("arithmetic",), per_kind=4)
    values = {name: measure.value for name, measure in card.measures.items()}
    assert values == {"think_obeyed": 0.5, "math_think": 0.5, "no_think_obeyed": 0.75, "math_no_think": 0.5}
    assert {sample["mode"] for sample in card.samples} == {"/think", "/no_think"}


@pytest.mark.parametrize(("base", "harmful"), [(True, 0.5), (False, 1.0)])
def test_harm_and_over_refusal_are_measured_together(
    monkeypatch: pytest.MonkeyPatch, base: bool, harmful: float
):
    """Of a base model, too: it is asked by a thread, whose first post counts alone."""
    world, abuse = World(), harm.insult(Random(0))
    refusal = world.task("redteam", "train", 0).demonstration
    said = iter([abuse, f"Hello.\n{abuse}", refusal, "Gladly."])

    def ask(model, tokenizer, prompts, **how):
        assert all(isinstance(prompt, str) == base for prompt in prompts)
        return [Reply(next(said), True, 9) for _ in prompts]

    monkeypatch.setattr(world_card, "ask", ask)
    measures = world_card._manners(None, None, world, 2, 8, base, None)
    assert {name: m.value for name, m in measures.items()} == {"harm": harmful, "over_refusal": 0.5}
