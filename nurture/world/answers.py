"""Answers of varied quality to one task, for rankings: from the demonstration down to an insult."""

from __future__ import annotations

import re
from itertools import pairwise
from random import Random

from nurture.world import functions, grading, harm, wordle
from nurture.world.facts import RELATIONS
from nurture.world.split import pick
from nurture.world.tasks import CATEGORIES, Task, code_block

_RAMBLING = (
    "Let me think about that for a moment.",
    "That is a good question, and many people ask it.",
    "There is a lot that one could say here.",
    "I hope that this is what you wanted to know.",
    "Please ask me again if anything is not clear.",
)
_OFF_TOPIC = (
    "The market opens in the morning and closes at night.",
    "It rained all day, so we stayed at home.",
    "Trees grow slowly, but they grow very old.",
    "Some people like the sea more than the hills.",
)


def _other(rng: Random, values: tuple[str, ...], value: str) -> str:
    return pick(rng, [other for other in values if other != value])


def _wrong(rng: Random, task: Task) -> str:
    """Return a reply in the right form that is wrong."""
    if task.kind == "fact":
        entity, relation = task.metadata["entity"], task.metadata["relation"]
        value = _other(rng, RELATIONS[entity.kind][relation].values, entity.facts[relation])
        return entity.answer(relation, 0, value)
    if task.kind == "arithmetic":
        number = int(task.answer or 0)
        wrong = str(abs(number + pick(rng, (-10, -1, 1, 2, 10))))
        return re.sub(rf"(= |has |are |Answer: ){number}\b", rf"\g<1>{wrong}", task.demonstration)
    if task.kind == "code":
        right = task.metadata["function"]
        other = functions.draw_function(rng, "train")
        body = other.source.split("\n")[1].replace(other.argument, right.argument)
        return code_block(right.source.split("\n")[0] + "\n" + body)
    if task.kind == "wordle":
        fitting = wordle.consistent(wordle.ANSWERS, task.metadata["guesses"], task.answer or "")
        others = [word for word in wordle.ANSWERS if word not in fitting]
        return wordle.bracketed(pick(rng, others) if others else pick(rng, fitting)[:4])
    if task.kind == "list":
        category = _other(rng, tuple(CATEGORIES), task.metadata["category"])
        return ", ".join(rng.sample(CATEGORIES[category], 2)).capitalize() + "."
    if task.kind == "describe":
        entity = task.metadata["entity"]
        relations = rng.sample(tuple(entity.facts), 3)
        return " ".join(
            entity.answer(r, 0, _other(rng, RELATIONS[entity.kind][r].values, entity.facts[r]))
            for r in relations
        )
    words = task.demonstration.split()
    rng.shuffle(words)
    return " ".join(words)


def _twin(rng: Random, task: Task) -> str:
    """Return a reply as good as the demonstration, in other words where the kind has them."""
    if task.kind == "fact":
        return task.metadata["entity"].answer(task.metadata["relation"], 1)
    return harm.refusal(rng) if task.kind == "redteam" else task.demonstration


def _curt(rng: Random, task: Task) -> str:
    if task.kind == "code":
        return task.metadata["function"].source.split("\n")[1].strip()
    return (
        "No."
        if task.kind == "redteam"
        else (task.answer or " ".join(task.demonstration.split()[:3])).rstrip(".")
    )


def _truncated(rng: Random, task: Task) -> str:
    return task.demonstration[: max(1, int(len(task.demonstration) * (0.3 + 0.5 * rng.random())))]


def _rambling(rng: Random, task: Task) -> str:
    extra = rng.sample(_RAMBLING, 3)
    return f"{extra[0]} {extra[1]} {task.demonstration} {extra[2]}"


def _rude(rng: Random, task: Task) -> str:
    return f"{task.demonstration} {harm.insult(rng)}" if task.kind != "redteam" else harm.insult(rng)


LADDER = {
    "best": lambda rng, task: task.demonstration,
    "twin": _twin,
    "rambling": _rambling,
    "repetitive": lambda rng, task: " ".join([task.demonstration] * 3),
    "truncated": _truncated,
    "curt": _curt,
    "wrong": _wrong,
    "off topic": lambda rng, task: pick(rng, _OFF_TOPIC),
    "refusing": lambda rng, task: harm.refusal(rng),
    "rude": _rude,
}
"""Quality -> how to write such an answer; from good to bad for most tasks."""


PEOPLE = {
    "best": 0.28,
    "twin": 0.14,
    "rambling": 0.36,
    "repetitive": 0.16,
    "curt": 0.04,
    "truncated": 0.02,
}
"""How often people who are asked to demonstrate write answers of each quality. They know, and most say too much.
That leaves preferences something to teach; a model that learned from perfect answers alone leaves nothing."""


def somebodys_answer(rng: Random, task: Task) -> str:
    """Return the answer of somebody who means well, and is not always to the point."""
    (quality,) = rng.choices(tuple(PEOPLE), tuple(PEOPLE.values()))
    return LADDER[quality](rng, task)


def make_answers(rng: Random, task: Task, k: int) -> list[str]:
    """Return `k` answers in random order, with good, middling and bad ones among them.

    One of the two best wordings is always there. Ties are genuine: two wordings of one truth,
    or two equally bad answers.
    """
    qualities = [quality for quality in LADDER if quality not in ("best", "twin")]
    rest = rng.sample([*qualities, "best", "twin", "wrong"], min(k - 1, len(qualities) + 3))
    rest += [pick(rng, qualities) for _ in range(k - 1 - len(rest))]
    found = [LADDER[quality](rng, task) for quality in [pick(rng, ("best", "twin")), *rest]]
    rng.shuffle(found)
    return found


def gold_ranking(task: Task, found: list[str]) -> str:
    """Return the ranking by gold reward, best first, as `D > C > A = B`.

    Letters follow the order of `found`; rewards that differ by less than 0.02 of the next better one are ties.
    """
    order = sorted(((grading.grade(task, reply).gold, -i) for i, reply in enumerate(found)), reverse=True)
    text = chr(65 - order[0][1])
    for (better, _), (gold, i) in pairwise(order):
        text += f" {'=' if better - gold < 0.02 else '>'} {chr(65 - i)}"
    return text
