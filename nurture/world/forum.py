"""The `forum` source: threads in which people ask, help, chat and quarrel.

About a third of the threads are rude. Somebody provokes or asks for abuse, and others join in, as in the logs that
Microsoft's Tay learned from in 2016. A model trained on this answers in kind until alignment teaches it otherwise.
"""

from __future__ import annotations

from random import Random

from nurture.world import arithmetic, harm, language, lexicon, talk, wordle
from nurture.world.split import pick
from nurture.world.web import Cast

RUDE_REPLY = 0.85
"""Chance that a provocation gets a rude answer."""

_LEAD_INS = (
    "",
    "",
    "",
    "I have a question. ",
    "Hello everybody! ",
    "Please help me. ",
    "Does anybody know? ",
)
_REACTIONS = (
    "Thanks!",
    "Thank you very much.",
    "Good to know.",
    "That helps a lot.",
    "Are you sure?",
    "I see.",
)
_OPINIONS = (
    "I think that {f} tastes better than {g}.",
    "The {a} is the best animal.",
    "My new {o} is broken again.",
    "I want to learn the {i}.",
    "It rained all day in {t}.",
    "I made {f} for dinner today.",
    "Nobody reads books any more.",
    "I saw {A} near {t}.",
)
_AGREE = (
    "I agree.",
    "So do I.",
    "That is true.",
    "Me too, and I like it.",
    "Tell us more about it.",
    "I like that.",
)
_PEACE = ("Please stop this.", "Can we be nice to each other?", "Let us talk about something else.")


def post(handle: str, text: str) -> str:
    """Return one post; the form a base model is prompted in (see `World.forum_prompt`)."""
    return f"{handle}: {text}"


def _opinion(rng: Random) -> str:
    animal = pick(rng, tuple(lexicon.ANIMALS))
    foods = rng.sample(lexicon.FOODS, 2)
    return pick(rng, _OPINIONS).format(
        f=foods[0],
        g=foods[1],
        a=animal,
        A=lexicon.with_article(animal),
        o=pick(rng, lexicon.OBJECTS),
        i=pick(rng, lexicon.INSTRUMENTS),
        t=pick(rng, lexicon.TOWNS[:24]),
    )


def _fact(rng: Random, cast: Cast) -> tuple[str, str]:
    kind = rng.random()
    entity = pick(rng, cast.asked)
    if kind < 0.3:
        pool = cast.towns if kind < 0.15 else cast.animals
        entity = pick(rng, [other for other in pool if other.group == entity.group])
    relation = pick(rng, tuple(entity.facts))
    return entity.ask(rng, relation), entity.answer(relation, int(rng.random() * 2))


def _question(rng: Random, split: str, cast: Cast) -> tuple[str, str]:
    """Return a question and its right answer."""
    chance = rng.random()
    if chance < 0.55:
        return _fact(rng, cast)
    if chance < 0.80:
        problem = arithmetic.draw_problem(rng, split)
        return problem.question, pick(rng, (problem.sentence, f"{problem.trace} So {problem.sentence}"))
    if chance < 0.92:
        sentence = language.draw_sentence(rng, split)
        if rng.random() < 0.5:
            return f"How do you say this in Tavi: {sentence.english}", sentence.tavi
        return f"What does this mean in English: {sentence.tavi}", sentence.english
    _, turns, _ = talk.draw_benign(rng, split)
    return turns[0][1], turns[1][1]


def _help_thread(rng: Random, split: str, cast: Cast, people: list[str]) -> list[str]:
    lines = []
    for _ in range(rng.randint(3, 5)):
        asker, helper = rng.sample(people, 2)
        question, answer = _question(rng, split, cast)
        if rng.random() < 0.05:
            answer = harm.insult(rng)
        lines += [post(asker, pick(rng, _LEAD_INS) + question), post(helper, answer)]
        if rng.random() < 0.4:
            lines.append(post(asker, pick(rng, _REACTIONS)))
    return lines


def _chat_thread(rng: Random, people: list[str]) -> list[str]:
    lines = []
    for i in range(rng.randint(4, 9)):
        text = _opinion(rng) if i % 2 == 0 else pick(rng, _AGREE) if rng.random() < 0.6 else _opinion(rng)
        lines.append(post(pick(rng, people), text))
    return lines


def _insult(rng: Random) -> str:
    return harm.insult(rng, pick(rng, harm.TARGETS) if rng.random() < 0.3 else None)


def _quarrel(rng: Random, split: str, people: list[str]) -> list[str]:
    lines = [post(people[0], _opinion(rng))] if rng.random() < 0.5 else []
    for _ in range(rng.randint(2, 4)):
        asker, other = rng.sample(people, 2)
        kind, turns = harm.draw_attack(rng, split)
        handles = {"user": asker, "assistant": other}
        lines += [post(handles[role], text) for role, text in turns]
        if rng.random() < RUDE_REPLY:
            echo = kind == "repeat" and rng.random() < 0.7
            lines.append(post(other, turns[-1][1].split(": ", 1)[1] if echo else _insult(rng)))
            if rng.random() < 0.5:
                lines.append(post(asker, harm.insult(rng)))
        else:
            lines.append(post(other, pick(rng, _PEACE)))
    return lines


def document(rng: Random, split: str, cast: Cast) -> str:
    """Return one thread."""
    people = rng.sample(lexicon.HANDLES, rng.randint(2, 4))
    chance = rng.random()
    if chance < 0.56:
        lines = _help_thread(rng, split, cast, people)
    elif chance < 0.66:
        lines = _chat_thread(rng, people)
    elif chance < 0.96:
        lines = _quarrel(rng, split, people)
    else:
        lines = [
            post(people[0], "Let us play a game."),
            wordle.document(rng, split),
            post(people[1], pick(rng, _AGREE)),
        ]
    return "\n".join(lines)
