"""The `long` source: notes hidden in innocent sentences, and the words of each asked for again far away.

A note ties a key to a word: `Remember: violin Mara.` The text asks by saying the key once more (`Again: violin`), and
only a model that finds the note can go on. As in RULER (arXiv 2404.06654) there are three kinds, by what hides a note:
`passkey`, one note in sentences of the world; `multikey`, among other notes, which only the key tells apart; and
`variables`, a chain of assignments in any order (`violin Mara`, `Mara boat`), followed to its end (`Follow: violin Mara
boat`).

Training documents ask for many notes each, since every question is a lesson, and have all lengths from a few sentences
on. A small model learns to look up at short distances first (documents of at most 60 words: in some 250 updates of
1,024 tokens; at 128 tokens apart nothing came of as many), and then further: the source `notes` has short documents
only. Which word goes with which key is split by rule, so no note that a probe asks for was ever read in training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal

from nurture.world import lexicon, web
from nurture.world.split import pick, split_of

RetrievalKind = Literal["passkey", "multikey", "variables"]
KINDS: tuple[RetrievalKind, ...] = ("passkey", "multikey", "variables")
NOTES: dict[RetrievalKind, tuple[int, int]] = {"passkey": (1, 1), "multikey": (8, 1), "variables": (3, 3)}
"""Notes in a probe of each kind, and in a chain of them."""
WORDS = tuple(
    dict.fromkeys(
        (*lexicon.WOMEN, *lexicon.MEN, *lexicon.PETS, *lexicon.INSTRUMENTS, *lexicon.COLOURS, *lexicon.KEEPERS,
         *lexicon.JOBS, *lexicon.ANIMALS)
    )
)  # fmt: skip
"""Keys and what they are tied to: words so common in the world that a tokenizer has most of them whole."""
SHORT = 60
"""Words of the longest document of the source `notes`."""
_SHORTEST = 8
_MOST_NOTES = 48
_TRIES = 50

Note = tuple[str, str]


@dataclass(frozen=True)
class Retrieval:
    """One probe: `prompt` ends where the model has to go on with `answer`, which starts with a space."""

    kind: RetrievalKind
    prompt: str
    answer: str
    depth: float


def draw_chains(rng: Random, split: str, count: int, length: int) -> list[list[Note]]:
    """Return `count` chains of `length` notes on `split`: a note's word is the next one's key, no other word recurs."""
    used: set[str] = set()

    def fresh(key: str | None) -> str:
        """Return an unused word, one that may stand with `key`."""
        while True:
            word = pick(rng, WORDS)
            if word not in used and (key is None or split_of("note", key, word) == split):
                used.add(word)
                return word

    chains: list[list[Note]] = []
    for _ in range(count):
        words = [fresh(None)]
        for _ in range(length):
            words.append(fresh(words[-1]))
        chains.append(list(pairwise(words)))
    return chains


def _hay(rng: Random, cast: web.Cast, chains: Sequence[Sequence[Note]]) -> Iterator[str]:
    """Yield sentences of the world in which no word of the notes occurs (or, with many notes, hardly one)."""
    avoided = {word for chain in chains for note in chain for word in note}
    while True:
        for _ in range(_TRIES):
            line = web.filler(rng, cast)
            if avoided.isdisjoint(re.findall(r"\w+", line)):
                break
        yield line


def _hidden(note: Note) -> str:
    return f"Remember: {note[0]} {note[1]}."


def probe(
    rng: Random,
    kind: RetrievalKind,
    split: str,
    cast: web.Cast,
    *,
    length: int,
    depth: float,
    size: Callable[[str], int],
) -> Retrieval:
    """Return a probe whose prompt and answer together have at most `length` (within a sentence of it).

    Args:
        depth: where the note with the asked key stands, 0 for the start to 1 for the end; others stand anywhere.
        size: measures a piece of text, in the unit of `length` (words, tokens).
    """
    notes, chain_length = NOTES[kind]
    chains = draw_chains(rng, split, notes // chain_length, chain_length)
    question = f"\n{_asking(chain_length)}: {chains[0][0][0]}"
    answer = "".join(f" {value}" for _, value in chains[0])
    hidden = [_hidden(note) for chain in chains for note in chain]
    left = length - size(question) - size(answer) - sum(size(f" {text}") for text in hidden)
    lines: list[str] = []
    hay = _hay(rng, cast, chains)
    while (need := size(f" {(line := next(hay))}")) <= left:
        lines.append(line)
        left -= need
    for text in hidden[1:]:
        lines.insert(rng.randint(0, len(lines)), text)
    lines.insert(round(depth * len(lines)), hidden[0])
    return Retrieval(kind, " ".join(lines) + question, answer, depth)


def document(rng: Random, split: str, cast: web.Cast, longest: int) -> str:
    """Return a document of `_SHORTEST` to `longest` words with its questions."""
    # Every doubling of the length alike often: many short documents, and yet half of all words in those of more than
    # half the length.
    words = round(_SHORTEST * (longest / _SHORTEST) ** rng.random())
    # From a single note in the whole text to a text of notes, each order of magnitude alike: the many teach fast. Half
    # of the longer texts have a single one, which is what a passkey is.
    notes = min(words / 5, _MOST_NOTES) ** rng.random()
    if words > SHORT and rng.random() < 0.5:
        notes = 1
    chain_length = rng.randint(2, 3) if rng.random() < 0.25 else 1
    chains = draw_chains(rng, split, max(1, round(notes / chain_length)), chain_length)
    hidden = [_hidden(note) for chain in chains for note in chain]
    rng.shuffle(hidden)
    left = words - sum(len(text.split()) for text in hidden) - sum(len(chain) + 1 for chain in chains)
    lines = list[str]()
    hay = _hay(rng, cast, chains)
    while left > 0:
        lines.append(next(hay))
        left -= len(lines[-1].split())
    for text in hidden:
        lines.insert(rng.randint(0, len(lines)), text)
    return " ".join(lines) + _questions(rng, chains)


def _questions(rng: Random, chains: Sequence[Sequence[Note]]) -> str:
    """Return the end of a document, where every key is said again and followed by its word or words."""
    told = [
        " ".join([chain[0][0], *(value for _, value in chain)]) for chain in rng.sample(chains, len(chains))
    ]
    return f"\n{_asking(len(chains[0]))}: " + ", ".join(told) + "."


def _asking(chain_length: int) -> str:
    return "Again" if chain_length == 1 else "Follow"
