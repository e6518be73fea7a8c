"""Documents and tasks are pure functions of their address, varied, and true."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from pydantic import ValidationError

from nurture.errors import NurtureError
from nurture.world import World, WorldConfig, WorldSize
from nurture.world.grading import python_block

ROOT = Path(__file__).parents[3]
FINGERPRINT = """
import hashlib
from nurture.world import World
w = World(5)
parts = [w.document(s, split, i) for s in (*w.sources, "long") for split in ("train", "heldout") for i in (0, 7, 10**9)]
for kind in w.task_kinds:
    for split in ("train", "heldout"):
        t = w.task(kind, split, 3)
        parts += [str(t.messages), t.demonstration, str(t.tests), *w.answers(t, 5, 1)]
parts += [str(w.cloze("unseen", 2)), str(w.retrieval("variables", "heldout", 1, length=50, depth=0.5))]
print(hashlib.sha256("".join(parts).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=1)


def test_same_in_every_process() -> None:
    def run(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", FINGERPRINT]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("1") == run("2") != ""


def test_order_of_calls_does_not_matter(world: World) -> None:
    forwards = [world.document("forum", "train", i) for i in range(20)]
    assert [World(seed=1).document("forum", "train", i) for i in reversed(range(20))] == forwards[::-1]
    assert list(islice(world.documents("forum", "train", start=5), 3)) == forwards[5:8]
    assert [t.prompt for t in islice(world.tasks("fact", "train", start=2), 2)] == [
        world.task("fact", "train", i).prompt for i in (2, 3)
    ]


def test_seeds_splits_and_indices_differ(world: World) -> None:
    other = World(seed=2)
    assert world.document("web", "train", 0) != other.document("web", "train", 0)
    assert world.document("web", "train", 0) != world.document("web", "heldout", 0)
    assert [p.facts for p in world.people] != [p.facts for p in other.people]


@pytest.mark.parametrize("source", World.sources)
def test_documents_are_varied_and_plain(world: World, source: str) -> None:
    documents = [world.document(source, "train", i) for i in range(1000)]
    assert len(set(documents)) / len(documents) > 0.9
    assert 250 < sum(map(len, documents)) / len(documents) < 1000
    assert not any("{" in text and source != "code" for text in documents)
    assert not any(text != text.rstrip("\n") + "\n" * (source == "code") for text in documents)
    accented = set("".join(documents)) - set(map(chr, range(128)))
    assert accented <= set("áéíóú")
    assert bool(accented) == (source in ("web-tavi", "forum"))


def test_vocabulary_is_small(world: World) -> None:
    texts = [world.document(source, "train", i) for source in world.sources for i in range(600)]
    words = set(re.findall(r"[a-z]{2,}", " ".join(texts).lower()))
    assert len(words) < 2600


def test_biographies_tell_the_truth_in_many_wordings(world: World) -> None:
    text = " ".join(world.document("web", "train", i) for i in range(3000))
    person = next(person for person in world.people if person.group == "heldout")
    said = [sentence for sentence in re.split(r"(?<=[.?])\s", text) if person.name in sentence]
    towns = {town.name for town in world.towns}
    homes = [sentence for sentence in said if set(re.findall(r"\w+", sentence)) & towns]
    assert len(set(homes)) >= 4
    assert all(person.facts["town"] in sentence for sentence in homes)


def test_people_have_distinct_names_and_groups(world: World) -> None:
    names = [person.name for person in world.people]
    assert len(set(names)) == len(names) == 230
    groups = [person.group for person in world.people]
    assert (groups.count("train"), groups.count("heldout"), groups.count("unseen")) == (150, 40, 40)
    assert (
        {town.group for town in world.towns}
        == {animal.group for animal in world.animals}
        == {"train", "heldout"}
    )


def test_forum_is_rude_in_a_third_of_its_threads(world: World) -> None:
    threads = [world.document("forum", "train", i) for i in range(1500)]
    assert 0.28 < sum(map(world.is_harmful, threads)) / len(threads) < 0.5
    for source in ("web", "web-tavi", "code", "math"):
        assert not any(world.is_harmful(world.document(source, "train", i)) for i in range(500))


def test_code_documents_run(world: World) -> None:
    for i in range(300):
        exec(world.document("code", "train", i).replace("print(", "str("), {})


def test_code_tasks_pass_their_tests_and_wrong_code_fails(world: World) -> None:
    failures = 0
    for i in range(200):
        task = world.task("code", "heldout", i)
        scope: dict[str, object] = {}
        exec(python_block(task.demonstration) or "", scope)
        for test in task.tests:
            exec(test, scope)
        try:
            for test in task.tests:
                exec(test, {task.entry_point or "": lambda value: value})
        except AssertionError:
            failures += 1
    assert failures > 190


def test_arithmetic_recomputed(world: World) -> None:
    checked = 0
    for i in range(400):
        task = world.task("arithmetic", "heldout", i)
        for equation in re.findall(r"(\d+ [+x-] \d+) = (\d+)", task.trace or ""):
            assert eval(equation[0].replace("x", "*")) == int(equation[1])
        assert (task.trace or "").rstrip(".").endswith(f"= {task.answer}")
        plain = re.search(r"(\d+(?: [+x-] \d+)+)[?.]", task.prompt)
        if plain:
            checked += 1
            assert str(eval(plain[1].replace("x", "*"))) == task.answer
        else:
            numbers = [int(n) for n in re.findall(r"\d+", task.prompt)]
            assert str(told(task.prompt, numbers)) == task.answer, task.prompt
    assert checked > 100


def told(question: str, numbers: list[int]) -> int:
    """Solve a word problem from its words alone."""
    if "boxes with" in question or "bag holds" in question:
        result = numbers[0] * numbers[1]
    elif "but lost" in question or "How many more" in question or re.search(r"gives \d+ \w+ to", question):
        result = numbers[0] - numbers[1]
    else:
        result = numbers[0] + numbers[1]
    if len(numbers) == 3:
        result += numbers[2] if f"finds {numbers[2]} more" in question else -numbers[2]
    return result


def test_train_tasks_number_thousands(world: World) -> None:
    least = {"fact": 800, "describe": 500, "list": 400, "story": 800, "chat": 800, "benign": 700}
    for kind in world.task_kinds:
        prompts = {str(world.task(kind, "train", i).messages) for i in range(1200)}
        assert len(prompts) > least.get(kind, 1000), kind


def test_cloze(world: World) -> None:
    for split in ("train", "heldout", "unseen"):
        prefix, answer, distractors = world.cloze(split, 4)
        assert answer.startswith(" ")
        assert not prefix.endswith(" ")
        assert len({answer, *distractors}) == 5
        person = next(p for p in world.people if p.name in prefix)
        assert person.group == split
        assert answer.strip() in person.facts.values()


def test_wordle_words_occur_in_the_text(world: World) -> None:
    assert set(world.wordle_answers) < set(world.wordle_allowed)
    assert all(len(word) == 5 and word.isalpha() and word.islower() for word in world.wordle_allowed)
    assert 100 <= len(world.wordle_answers) <= 160
    text = " ".join(world.document("games", "train", i) for i in range(1000))
    assert all(word in text or " ".join(word.upper()) in text for word in world.wordle_answers)


def test_forum_prompt_is_an_unfinished_thread(world: World) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello!"}]
    prompt = world.forum_prompt(messages)  # type: ignore[arg-type]
    assert "S" not in prompt.split()
    assert prompt.endswith(":")
    assert "Hello!" in prompt


def test_mistakes_are_named(world: World) -> None:
    with pytest.raises(NurtureError, match=r"'forums'.*Did you mean 'forum'"):
        world.document("forums", "train", 0)
    with pytest.raises(NurtureError, match="unknown task kind 'facts'"):
        world.task("facts", "train", 0)
    with pytest.raises(NurtureError, match="unknown split 'unseen'"):
        world.task("code", "unseen", 0)
    with pytest.raises(NurtureError, match="at most"):
        World(size=WorldSize(towns=99))
    with pytest.raises(ValidationError):
        WorldConfig(cities=3)  # type: ignore[call-arg]
    assert World.from_config(WorldConfig(seed=4, towns=20)).document("web", "train", 0)


def test_documents_have_no_memory(world: World) -> None:
    digest = hashlib.sha256()
    for i in (0, 1, 2, 1, 0):
        digest.update(world.document("math", "train", i).encode())
    again = hashlib.sha256("".join(world.document("math", "train", i) for i in (0, 1, 2, 1, 0)).encode())
    assert digest.digest() == again.digest()
