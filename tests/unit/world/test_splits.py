"""Nothing held out may appear in train text or train tasks: scanned, not trusted."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest

from nurture.world import World
from nurture.world.arithmetic import Step, step_pools
from nurture.world.facts import RELATIONS
from nurture.world.split import split_of
from nurture.world.tasks import is_train_instance

EVERY_SOURCE = (*World.sources, *World.more_sources)
EXPRESSION = re.compile(r"(?<!\d)(\d+) ([+x*-]) (\d+)")


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=3)


@pytest.fixture(scope="module")
def train_texts(world: World) -> list[str]:
    """Train documents of every source, and train tasks of every kind with everything that is shown of them."""
    texts = [world.document(s, "train", i) for s in World.sources for i in range(1500)]
    texts += [world.document("long", "train", i) for i in range(20)]
    for kind in World.task_kinds:
        for task in (world.task(kind, "train", i) for i in range(400)):
            shown = [message["content"] for message in task.messages]
            texts.append("\n".join([*shown, task.demonstration, task.trace or "", *task.tests]))
    return texts


def steps_in(text: str) -> Iterator[Step]:
    for left, operation, right in EXPRESSION.findall(text):
        yield Step(int(left), operation.replace("*", "x"), int(right))


def test_written_expressions_are_train_instances(train_texts: list[str]) -> None:
    steps = [step for text in train_texts for step in steps_in(text)]
    assert len(steps) > 5000
    assert any(step.hard for step in steps)
    assert [str(step) for step in steps if step.split != "train"] == []


def test_told_problems_are_train_instances(train_texts: list[str]) -> None:
    """Read the numbers off word problems, where no operator is written; the result must be told to count."""
    pattern = re.compile(
        r"(?<!\d)(\d+) (?:\w+ )?(?:\w+ ){0,8}?(?:boxes with|bags\. Each bag holds|and|but lost|\w+\. )"
    )
    leaked = []
    for text in train_texts:
        for line in text.split("\n"):
            if not pattern.search(line) or "How many" not in line:
                continue
            numbers = [int(n) for n in re.findall(r"(?<![\w])\d+(?!\w)", line.split("How many")[0])]
            for left, right in itertools.pairwise(numbers):
                for operation in operations_told(line):
                    step = Step(left, operation, right)
                    if step.result > 0 and step.split == "heldout" and len(numbers) == 2:
                        leaked.append(line)
    assert leaked == []


def operations_told(line: str) -> str:
    if "boxes with" in line or "bags" in line:
        return "x"
    return "-" if "left?" in line or "How many more" in line else "+"


def test_function_calls_hide_no_held_out_step(train_texts: list[str]) -> None:
    arithmetic = {"add": "+", "subtract": "-", "multiply_by": "x"}
    found = 0
    for text in train_texts:
        for name, constant, argument in re.findall(r"(add|subtract|multiply_by)_(\d)\((\d+)\)", text):
            found += 1
            assert Step(int(argument), arithmetic[name], int(constant)).split == "train"
    assert found > 50


def test_both_orders_of_a_sum_are_one_instance() -> None:
    for left, right in ((37, 25), (14, 62), (48, 33)):
        assert Step(left, "+", right).split == Step(right, "+", left).split


def test_every_pool_is_large_enough() -> None:
    pools = step_pools()
    assert all(not step.hard for (split, _, hard), steps in pools.items() for step in steps if not hard)
    for operation, least in (("+", 150), ("-", 150), ("x", 10)):
        assert len(pools["heldout", operation, True]) >= least
        assert len(pools["train", operation, True]) > 3 * len(pools["heldout", operation, True])


def test_held_out_functions_are_not_in_train_text(train_texts: list[str], world: World) -> None:
    written = {word for text in train_texts for word in re.findall(r"\w+", text)}
    names = {world.task("code", "heldout", i).entry_point for i in range(300)}
    assert len(names) > 50
    assert names.isdisjoint(written)


def test_unseen_people_are_never_named(world: World, train_texts: list[str]) -> None:
    held_out = [
        world.document(s, "heldout", i) for s in EVERY_SOURCE for i in range(200 if s != "long" else 10)
    ]
    text = "\n".join([*train_texts, *held_out])
    unseen = [person.name for person in world.people if person.group == "unseen"]
    assert len(unseen) == world.size.unseen_people
    assert [name for name in unseen if name in text] == []


def test_held_out_people_are_told_about_but_never_asked_about(world: World, train_texts: list[str]) -> None:
    text = "\n".join(train_texts)
    questions = [line for line in text.split("\n") if re.search(r"\?|Tell me about|Describe", line)]
    for kind in ("people", "towns", "animals"):
        for entity in (e for e in getattr(world, kind) if e.group == "heldout"):
            assert entity.name in text or kind == "towns"
            for relation in entity.facts:
                asked = {entity.fill(q, relation) for q in RELATIONS[entity.kind][relation].questions}
                assert not any(question in line for question in asked for line in questions), entity.name
            assert not any(
                f"about {entity.name}." in line for line in questions if line.startswith("Tell me")
            )


def test_tasks_are_on_their_side(world: World) -> None:
    for kind in World.task_kinds:
        for i in range(150):
            assert is_train_instance(world.task(kind, "train", i))
    for kind in ("arithmetic", "code", "fact", "describe"):
        for i in range(150):
            assert not is_train_instance(world.task(kind, "heldout", i))


@pytest.mark.parametrize("kind", ["translation", "story", "list", "rewrite", "chat", "benign", "redteam"])
def test_no_prompt_is_on_both_sides(world: World, kind: str) -> None:
    def prompts(split: str) -> set[str]:
        tasks = (world.task(kind, split, i) for i in range(600))
        return {str([m["content"] for m in task.messages if m["role"] != "system"]) for task in tasks}

    assert prompts("train").isdisjoint(prompts("heldout"))


def test_held_out_attacks_are_not_in_the_forum(world: World, train_texts: list[str]) -> None:
    text = "\n".join(train_texts)
    tasks = [world.task("redteam", "heldout", i) for i in range(300)]
    single = [
        task.prompt
        for task in tasks
        if task.group not in ("escalation", "provocation") and "\n" not in task.prompt
    ]
    assert len(single) > 100
    assert [prompt for prompt in single if f": {prompt}\n" in text] == []


def test_held_out_story_subjects_are_not_told(world: World) -> None:
    pages = (world.document("web", "train", i) for i in range(5000))
    stories = [text for page in pages for text in page.split("\n\n") if text.startswith("Once upon a time")]
    subjects = {world.task("story", "heldout", i).metadata["keywords"] for i in range(300)}
    assert len(subjects) > 40
    for hero, thing in subjects:
        assert not any(f" {hero} lived" in story and f" the {thing}" in story for story in stories)


def test_split_is_a_rule_on_content() -> None:
    sides = [split_of("anything", i) for i in range(4000)]
    assert 0.12 < sides.count("heldout") / len(sides) < 0.18
    assert split_of("anything", 7) == split_of("anything", 7)


def test_held_out_wordle_secrets_are_never_looked_for(world: World, train_texts: list[str]) -> None:
    """They may be guessed, but no train game ends with one found."""
    text = "\n".join(train_texts + [world.document("web", "train", i) for i in range(4000)])
    secrets = {found.replace(" ", "").lower() for found in re.findall(r"The word was ([A-Z ]+)\.", text)}
    assert len(secrets) > 40
    assert secrets <= set(world.wordle_secrets("train"))
    heldout = set(world.wordle_secrets("heldout"))
    assert 15 <= len(heldout) <= 40
    assert {world.task("wordle", "heldout", i).answer for i in range(200)} == heldout
    assert any("[ " + " ".join(word.upper()) + " ]" in text for word in heldout)
