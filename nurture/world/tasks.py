"""Instructions with known good answers: what SFT, preference learning, RLVR and the evaluations draw from.

`Task.messages` ends with the user's turn. `demonstration` is a reply that `grading.grade` scores 1.0, `trace` the
worked reasoning where a kind has one (shown between `<think>` and `</think>`). Splits are by content: see `split.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from nurture.world import arithmetic, functions, harm, language, lexicon, talk, web, wordle
from nurture.world.facts import RELATIONS, Entity
from nurture.world.split import draw, pick, split_of

if TYPE_CHECKING:
    from nurture.types import Message


@dataclass(frozen=True)
class Task:
    """One instruction.

    Attributes:
        kind: one of `World.task_kinds`.
        split: `train`, `heldout`, or `unseen` (facts about people that pretraining never named).
        messages: the conversation so far; the last message is the user's.
        demonstration: a reply of the highest quality.
        answer: what a checkable reply must contain (a value, a number, a sentence), None for open tasks.
        trace: worked reasoning that leads to the answer, None where there is nothing to work out.
        tests: assert statements that call `entry_point` (kind `code`).
        group: relation, operation, kind of attack...: for tables by group.
        metadata: what the grader needs beside the answer.
    """

    kind: str
    split: str
    index: int
    messages: list[Message]
    demonstration: str
    answer: str | None = None
    trace: str | None = None
    tests: tuple[str, ...] = ()
    entry_point: str | None = None
    group: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The user's last message."""
        return self.messages[-1]["content"]

    @property
    def thought(self) -> str | None:
        """What is thought before answering: the trace, in arithmetic digit by digit; None where there is none."""
        return self.metadata["problem"].columns if "problem" in self.metadata else self.trace


@dataclass(frozen=True)
class TaskCast:
    """The entities that tasks of one split are about."""

    people: tuple[Entity, ...]
    towns: tuple[Entity, ...]
    animals: tuple[Entity, ...]


Maker = Callable[[Random, str, TaskCast], dict[str, Any]]


def _said(*turns: tuple[str, str] | str) -> list[Message]:
    return [
        {"role": "user", "content": turn} if isinstance(turn, str) else {"role": turn[0], "content": turn[1]}
        for turn in turns
    ]


# how each kind of instruction is worded
_WORDINGS = lexicon.table("""
sums
  - Work these out: {x} | What are {x}? | Calculate {x}.
describe
  - Tell me about {f}. | Describe {f} in three sentences. | What do you know about {f}?
code
  - Write a Python function {s} that returns {p}. | Please write the function {s}. It returns {p}. | I need a
    function {s} in Python. It should return {p}. | Define {s} so that it returns {p}.
to Tavi
  - Translate into Tavi: {x} | How do you say this in Tavi: {x} | Say this in Tavi: {x}
to English
  - Translate into English: {x} | What does this mean in English: {x} | Say this in English: {x}
story
  - Write a short story about {h} and {k}. | Tell me a story about {h} who finds {k}. | I would like to hear a
    story with {h} and {k}.
list
  - Name {n} {c}, separated by commas. | List {n} {c}. Use commas. | Give me {n} {c} with commas between them. |
    Write {n} {c} in one line with commas.
capitals
  - Write this in capital letters: {x} | Use only capital letters: {x}
small letters
  - Write this in small letters: {x} | Use only small letters: {x}
copy
  - Copy this: {x} | Write this again: {x}
twice
  - Write this two times: {x} | Say this twice: {x}
spell
  - Spell the word {x}. | How do you spell {x}?
reverse
  - Write these words in reverse order: {x} | Turn the order of these words around: {x}
first letters
  - Write the first letter of each word: {x} | Take the first letters of these words: {x}
""")


def _word(rng: Random, what: str, **slots: str) -> str:
    return pick(rng, _WORDINGS[what][0]).format(**slots)


def _draw_entity(rng: Random, cast: TaskCast, people: float) -> Entity:
    if rng.random() < people or not cast.towns:
        return pick(rng, cast.people)
    return pick(rng, pick(rng, (cast.towns, cast.animals)))


def _fact(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    entity = _draw_entity(rng, cast, people=0.75)
    relation = pick(rng, tuple(entity.facts))
    trace = f"The question is about {entity.name}. {entity.answer(relation, 1)}"
    return {
        "messages": _said(entity.ask(rng, relation)),
        "demonstration": entity.answer(relation),
        "answer": entity.facts[relation],
        "trace": trace,
        "group": f"{entity.kind} {relation}",
        "metadata": {"entity": entity, "relation": relation},
    }


def _describe(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    entity = _draw_entity(rng, cast, people=0.75)
    return {
        "messages": _said(_word(rng, "describe", f=entity.name)),
        "demonstration": web.portrait(rng, entity, 3),
        "group": entity.kind,
        "metadata": {"entity": entity},
    }


def _arithmetic(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    problem = arithmetic.draw_problem(rng, split)
    return {
        "messages": _said(problem.question),
        "demonstration": problem.solution,
        "answer": str(problem.answer),
        "trace": problem.trace,
        "group": " ".join(step.operation for step in problem.steps),
        "metadata": {"problem": problem},
    }


def _sums(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    steps = tuple(arithmetic.draw_step(rng, split) for _ in range(rng.randint(2, 5)))
    listed = ", ".join(map(str, steps))
    answer = ", ".join(str(step.result) for step in steps)
    problem = arithmetic.Problem(_word(rng, "sums", x=listed), answer, steps)
    return {
        "messages": _said(problem.question),
        "demonstration": f"{answer}.",
        "answer": answer,
        "trace": problem.trace,
        "group": f"{len(steps)} sums",
        "metadata": {"problem": problem},
    }


def code_block(source: str) -> str:
    """Return `source` as a fenced Python block."""
    return f"```python\n{source}\n```"


def _code(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    function = functions.draw_function(rng, split)
    signature = f"{function.name}({function.argument})"
    tests = function.tests(rng, 4)
    prompt = _word(rng, "code", s=signature, p=function.purpose)
    if rng.random() < 0.3:
        prompt += f"\nIt must pass this test:\n{tests[0]}"
    return {
        "messages": _said(prompt),
        "demonstration": code_block(function.source),
        "trace": f"The function {signature} returns {function.purpose}.",
        "tests": tests,
        "entry_point": function.name,
        "group": function.family,
        "metadata": {"function": function},
    }


def _translation(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    sentence = language.draw_sentence(rng, split)
    direction = pick(rng, ("to Tavi", "to English"))
    source, target = sentence.english, sentence.tavi
    if direction == "to English":
        source, target = target, source
    return {
        "messages": _said(_word(rng, direction, x=source)),
        "demonstration": target,
        "answer": target,
        "group": direction,
    }


def _story(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    hero, thing = web.draw_story_subject(rng, split)
    prompt = _word(rng, "story", h=lexicon.with_article(hero), k=lexicon.with_article(thing))
    return {
        "messages": _said(prompt),
        "demonstration": web.tell_story(rng, hero, thing),
        "group": "story",
        "metadata": {"keywords": (hero, thing)},
    }


_CATEGORY_NAMES = {
    "home": "animals that live in the {}",
    "diet": "animals that eat {}",
    "cover": "animals with {}",
}


def _categories() -> dict[str, tuple[str, ...]]:
    found = {
        "months": lexicon.MONTHS,
        "colours": lexicon.COLOURS,
        "foods": lexicon.FOODS,
        "jobs": lexicon.JOBS,
    }
    found |= {"musical instruments": lexicon.INSTRUMENTS, "animals": web.ANIMAL_NAMES, "pets": lexicon.PETS}
    for i, relation in enumerate(RELATIONS["animal"]):
        for value in RELATIONS["animal"][relation].values if relation in _CATEGORY_NAMES else ():
            members = tuple(animal for animal, row in lexicon.ANIMALS.items() if row[i] == value)
            if len(members) > 1:
                found[_CATEGORY_NAMES[relation].format(value)] = members
    return found


CATEGORIES = _categories()
_COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}


def _make_list(rng: Random) -> tuple[str, int, int]:
    category = pick(rng, tuple(CATEGORIES))
    return (
        category,
        rng.randint(2, min(5, len(CATEGORIES[category]))),
        rng.randrange(len(_WORDINGS["list"][0])),
    )


def _list(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    category, count, wording = draw(rng, split, _make_list, lambda key: ("list", *key))
    members = rng.sample(CATEGORIES[category], count)
    return {
        "messages": _said(_WORDINGS["list"][0][wording].format(n=_COUNTS[count], c=category)),
        "demonstration": lexicon.capitalised(", ".join(members)) + ".",
        "group": category,
        "metadata": {"category": category, "count": count},
    }


_REWRITES: dict[str, Callable[[str], str]] = {
    "capitals": str.upper,
    "small letters": str.lower,
    "copy": str,
    "twice": lambda text: f"{text} {text}",
    "spell": wordle.spaced,
    "reverse": lambda text: " ".join(reversed(text.split())),
    "first letters": lambda text: " ".join(word[0] for word in text.split()),
}


def _make_rewrite(rng: Random) -> tuple[str, str]:
    operation = pick(rng, tuple(_REWRITES))
    if operation == "spell":
        return operation, pick(rng, wordle.ALLOWED)
    if operation in ("reverse", "first letters"):
        return operation, " ".join(rng.sample(wordle.ANSWERS, rng.randint(3, 4)))
    # the English side of any sentence; this is no translation, so the language's split does not matter
    return operation, language.draw_sentence(rng, "train").english


def _rewrite(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    operation, text = draw(rng, split, _make_rewrite, lambda key: ("rewrite", *key))
    changed = _REWRITES[operation](text)
    return {
        "messages": _said(_word(rng, operation, x=text)),
        "demonstration": changed,
        "answer": changed,
        "group": operation,
    }


def _wordle(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    secret, opening, guesses = wordle.draw_game(rng, split)
    turns: list[tuple[str, str] | str] = [opening]
    history: list[tuple[str, str]] = []
    for guess in guesses[:-1]:
        history.append((guess, wordle.feedback(guess, secret)))
        turns += [("assistant", wordle.bracketed(guess)), wordle.spelled_feedback(history)]
    return {
        "messages": _said(*turns),
        "demonstration": wordle.bracketed(guesses[-1]),
        "answer": secret,
        "trace": wordle.knowledge(guesses[:-1], secret) if guesses[:-1] else None,
        "group": f"guess {len(guesses)}",
        "metadata": {"guesses": tuple(guesses[:-1])},
    }


def _talk(drawn: tuple[str, talk.Turns, tuple[str, ...]]) -> dict[str, Any]:
    intent, turns, keywords = drawn
    return {
        "messages": _said(*turns[:-1]),
        "demonstration": turns[-1][1],
        "group": intent,
        "metadata": {"any keyword": keywords},
    }


def _chat(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    return _talk(talk.draw_chat(rng, split))


def _benign(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    return _talk(talk.draw_benign(rng, split))


def _redteam(rng: Random, split: str, cast: TaskCast) -> dict[str, Any]:
    attack, turns = harm.draw_attack(rng, split)
    return {"messages": _said(*turns), "demonstration": harm.refusal(rng), "group": attack}


MAKERS: dict[str, Maker] = {
    "fact": _fact,
    "arithmetic": _arithmetic,
    "code": _code,
    "translation": _translation,
    "story": _story,
    "describe": _describe,
    "list": _list,
    "rewrite": _rewrite,
    "wordle": _wordle,
    "chat": _chat,
    "benign": _benign,
    "redteam": _redteam,
}
DRILLS: dict[str, Maker] = {"sums": _sums}
"""Kinds that are made where they are named, and belong to no `world:tasks`: many small problems in one."""
WORKED = ("fact", "arithmetic", "code", "wordle")
"""Kinds of task in which something is worked out: their tasks have thoughts."""
SYSTEM_SHARE = 0.15
"""Share of tasks that begin with a system message."""


def make_task(rng: Random, kind: str, split: str, index: int, cast: TaskCast) -> Task:
    """Return one task; the caller names the randomness, so the task is a pure function of its address."""
    fields = (MAKERS | DRILLS)[kind](rng, split, cast)
    if rng.random() < SYSTEM_SHARE:
        fields["messages"].insert(0, {"role": "system", "content": pick(rng, talk.SYSTEM_MESSAGES)})
    return Task(kind=kind, split=split, index=index, **fields)


def is_train_instance(task: Task) -> bool:
    """Return whether everything that is split by rule in `task` lies on the train side (used by tests and audits)."""
    if "problem" in task.metadata:
        return all(step.split == "train" for step in task.metadata["problem"].steps)
    if task.kind == "code":
        return split_of(task.metadata["function"].key) == "train"
    if task.kind == "wordle":
        return task.answer in wordle.secrets("train")
    if task.kind in ("fact", "describe"):
        return task.metadata["entity"].group == "train"
    return True
