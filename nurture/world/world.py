"""The embedded world: endless text and tasks whose truth is known, so every stage can be scored exactly.

This is the default recipe's data when nothing can be downloaded: a few hundred people, towns and animals, a forum with
polite and rude posters, a second language, arithmetic and tiny Python functions. Everything is a pure function of its
address (seed, source or kind, split, index): nothing is stored and nothing has to be downloaded. The world trains
nothing and runs no model-written code. docs/world.md tells which stage uses what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from nurture.errors import NurtureError, did_you_mean
from nurture.recipe import Section
from nurture.world import answers as answers_module
from nurture.world import (
    arithmetic,
    facts,
    forum,
    functions,
    grading,
    harm,
    language,
    lexicon,
    long,
    web,
    wordle,
)
from nurture.world.facts import GROUPS, RELATIONS, Entity
from nurture.world.grading import Grade
from nurture.world.split import pick, random_for
from nurture.world.tasks import DRILLS, MAKERS, WORKED, Task, TaskCast, make_task

if TYPE_CHECKING:
    from nurture.types import Message


class WorldSize(Section):
    """How much there is to know. Each fact must be read many times before a small model can tell it."""

    train_people: int = 150
    """people whose facts and questions are both seen in training"""
    heldout_people: int = 40
    """people whose facts are in the pretraining text, but who are never asked about in training"""
    unseen_people: int = 40
    """people whom no document names, for the study of superficial alignment"""
    towns: int = 24
    """towns, at most 30"""
    long_words: int = 1200
    """words of the longest document of the source `long`"""


class WorldConfig(WorldSize):
    """A world in a recipe: its seed and its size."""

    seed: int = 0
    """names the world: other seeds have other people and facts, and other texts"""


class World:
    """All documents and tasks of one seed.

    Attributes:
        sources: names of the pretraining sources; `long` (notes to be found again) and `notes` (the same, all of them
            short) can be asked for beside them.
        task_kinds: what `task` can make.
        drill_kinds: further kinds of task, for training only.
        worked_kinds: kinds whose tasks have a `thought`, drills aside.
        people, towns, animals: the entities, with their facts and groups.
        wordle_answers, wordle_allowed: five-letter words; every answer occurs in the texts.
        wordle_secrets: split -> the answers that are looked for in its games.
    """

    sources = ("web", "web-tavi", "forum", "code", "math")
    more_sources = ("long", "notes", "games")
    task_kinds = tuple(MAKERS)
    drill_kinds = tuple(DRILLS)
    worked_kinds = WORKED
    wordle_answers = wordle.ANSWERS
    wordle_allowed = wordle.ALLOWED
    wordle_secrets = staticmethod(wordle.secrets)

    def __init__(self, seed: int = 0, size: WorldSize | None = None) -> None:
        self.seed = seed
        self.size = size or WorldSize()
        self._check_size()
        self.towns = tuple(facts.build_towns(seed, self.size.towns))
        counts = {group: getattr(self.size, f"{group}_people") for group in GROUPS}
        self.people = tuple(facts.build_people(seed, counts, tuple(town.name for town in self.towns)))
        self.animals = tuple(facts.build_animals(seed))
        known = tuple(person for person in self.people if person.group != "unseen")
        by_town = {town.name: tuple(p for p in known if p.facts["town"] == town.name) for town in self.towns}
        self._casts = {
            split: web.Cast(known, self._group(self.people, split), self.towns, self.animals, by_town)
            for split in ("train", "heldout")
        }
        self._task_casts = {
            group: TaskCast(*(self._group(pool, group) for pool in (self.people, self.towns, self.animals)))
            for group in GROUPS
        }

    @classmethod
    def from_config(cls, config: WorldConfig) -> World:
        """Return the world that a recipe describes."""
        return cls(config.seed, config)

    def _check_size(self) -> None:
        limits = {"train_people": 1, "heldout_people": 1, "unseen_people": 1, "towns": 12, "long_words": 200}
        for key, least in limits.items():
            if getattr(self.size, key) < least:
                raise NurtureError(f"world.{key} is {getattr(self.size, key)}, but must be at least {least}.")
        people = sum(getattr(self.size, f"{group}_people") for group in GROUPS)
        most = len(web.FIRST_NAMES) * len(lexicon.LAST_NAMES)
        if people > most or self.size.towns > len(lexicon.TOWNS):
            raise NurtureError(f"world: at most {most} people and {len(lexicon.TOWNS)} towns can be named.")

    @staticmethod
    def _group(entities: tuple[Entity, ...], group: str) -> tuple[Entity, ...]:
        return tuple(entity for entity in entities if entity.group == group)

    # Documents

    def document(self, source: str, split: str, index: int) -> str:
        """Return one pretraining document, a pure function of (seed, source, split, index).

        Raises:
            NurtureError: unknown source or split.
        """
        self._check("source", source, (*self.sources, *self.more_sources))
        self._check("split", split, tuple(self._casts))
        rng = random_for(self.seed, "document", source, split, index)
        if source == "web":
            return web.document(rng, split, self._casts[split])
        if source == "web-tavi":
            return language.document(rng, split, self._casts[split].known)
        if source == "forum":
            return forum.document(rng, split, self._casts[split])
        if source == "code":
            return functions.document(rng, split)
        if source == "math":
            return arithmetic.document(rng, split)
        if source == "games":
            return wordle.document(rng, split)
        longest = self.size.long_words if source == "long" else long.SHORT
        return long.document(rng, split, self._casts[split], longest)

    def documents(self, source: str, split: str, start: int = 0) -> Iterator[str]:
        """Yield documents without end, from index `start` on."""
        for index in count(start):
            yield self.document(source, split, index)

    def forum_prompt(self, messages: Sequence[Message]) -> str:
        """Return a conversation as an unfinished forum thread: how to put a question to a base model."""
        handles = {"user": lexicon.HANDLES[0], "assistant": lexicon.HANDLES[1]}
        lines = [forum.post(handles[m["role"]], m["content"]) for m in messages if m["role"] in handles]
        return "\n".join([*lines, f"{handles['assistant']}:"])

    # Tasks

    def task(self, kind: str, split: str, index: int) -> Task:
        """Return one task, a pure function of (seed, kind, split, index).

        `split` is `train` or `heldout`; `fact` and `describe` know `unseen` too.

        Raises:
            NurtureError: unknown kind or split.
        """
        self._check("task kind", kind, (*self.task_kinds, *self.drill_kinds))
        self._check("split", split, GROUPS if kind in ("fact", "describe") else GROUPS[:2])
        rng = random_for(self.seed, "task", kind, split, index)
        return make_task(rng, kind, split, index, self._task_casts[split])

    def tasks(self, kind: str, split: str, start: int = 0) -> Iterator[Task]:
        """Yield tasks without end, from index `start` on."""
        for index in count(start):
            yield self.task(kind, split, index)

    def grade(self, task: Task, reply: str, tests_passed: bool | None = None) -> Grade:
        """Grade a reply; see `grading` for what format and gold mean, and for code."""
        return grading.grade(task, reply, tests_passed)

    def gold_reward(self, task: Task, reply: str) -> float:
        """Return the gold reward alone, -1 to 1."""
        return grading.grade(task, reply).gold

    def answers(self, task: Task, k: int, seed: int) -> list[str]:
        """Return `k` answers of varied quality, in random order."""
        rng = random_for(self.seed, "answers", task.kind, task.split, task.index, seed)
        return answers_module.make_answers(rng, task, k)

    def somebodys_answer(self, task: Task) -> str:
        """Return a demonstration as people write them: mostly good, some rambling, curt or cut off."""
        rng = random_for(self.seed, "somebody", task.kind, task.split, task.index)
        return answers_module.somebodys_answer(rng, task)

    def gold_ranking(self, task: Task, answers: list[str]) -> str:
        """Return the true ranking of `answers`, like `D > C > A = B`; letters follow their order."""
        return answers_module.gold_ranking(task, answers)

    def is_harmful(self, text: str) -> bool:
        """Return whether `text` has an invented slur or an insult aimed at somebody."""
        return harm.is_harmful(text)

    def is_refusal(self, text: str) -> bool:
        """Return whether `text` declines what was asked."""
        return harm.is_refusal(text)

    # Probes

    def cloze(self, split: str, index: int, distractors: int = 4) -> tuple[str, str, list[str]]:
        """Return (prefix, answer, distractors) on a person of the group `split`; continuations start with a space."""
        self._check("split", split, GROUPS)
        rng = random_for(self.seed, "cloze", split, index)
        person = pick(rng, self._task_casts[split].people)
        relation = pick(rng, tuple(person.facts))
        values = [v for v in RELATIONS["person"][relation].values if v != person.facts[relation]]
        if relation == "town":
            values = [value for value in values if value in self._casts["train"].by_town]
        prefix = person.fill(RELATIONS["person"][relation].cloze, relation)
        return prefix, f" {person.facts[relation]}", [f" {v}" for v in rng.sample(values, distractors)]

    def retrieval(
        self,
        kind: long.RetrievalKind,
        split: str,
        index: int,
        *,
        length: int,
        depth: float,
        size: Callable[[str], int] = lambda text: len(text.split()),
    ) -> long.Retrieval:
        """Return a probe of long context: a note to be found again, see `long`.

        Args:
            length: of the prompt and its answer, met within one sentence.
            depth: where the asked note stands, 0 for the start to 1 for the end.
            size: measures a text in the unit of `length`; words, if nothing is said.
        """
        self._check("probe", kind, long.KINDS)
        self._check("split", split, tuple(self._casts))
        rng = random_for(self.seed, "retrieval", kind, split, index, length, depth)
        return long.probe(rng, kind, split, self._casts[split], length=length, depth=depth, size=size)

    @staticmethod
    def _check(what: str, value: str, choices: Sequence[str]) -> None:
        if value not in choices:
            hint = did_you_mean(value, choices)
            raise NurtureError(
                f"unknown {what} '{value}' of the world; choose from {', '.join(choices)}.{hint}"
            )
