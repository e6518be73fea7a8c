"""Notes to be found again: they are there, once, where they should be, and a train text never says a held-out one."""

from __future__ import annotations

import itertools
import random
import re
import statistics

import pytest

from nurture.world import World, long
from nurture.world.split import split_of

NOTE = re.compile(r"Remember: (\w+) (\w+)\.")


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=3)


@pytest.mark.parametrize("kind", long.KINDS)
@pytest.mark.parametrize(("length", "depth"), [(90, 0.0), (400, 0.5), (1500, 1.0)])
def test_a_probe_is_answered_by_its_text(
    world: World, kind: long.RetrievalKind, length: int, depth: float
) -> None:
    probe = world.retrieval(kind, "heldout", 5, length=length, depth=depth)
    assert length - 25 < len((probe.prompt + probe.answer).split()) <= length
    text, question = probe.prompt.rsplit("\n", 1)
    notes = dict(NOTE.findall(text))
    assert len(notes) == len(NOTE.findall(text)) == long.NOTES[kind][0]
    key, followed = question.split()[1], list[str]()
    at = text.index(f"Remember: {key} ") / len(text)
    assert abs(at - depth) < 0.25
    while key in notes:
        followed.append(key := notes[key])
        if kind != "variables":
            break
    assert probe.answer == "".join(f" {word}" for word in followed)
    # Nothing else in the hay says the words of the notes.
    hay = NOTE.sub("", text)
    assert not {word for note in notes.items() for word in note} & set(re.findall(r"\w+", hay))


def test_probes_of_one_place_differ(world: World) -> None:
    probes = [world.retrieval("passkey", "heldout", i, length=50, depth=0.5) for i in range(20)]
    assert len({probe.prompt for probe in probes}) == 20
    assert len({probe.answer for probe in probes}) > 10
    assert probes[3] == world.retrieval("passkey", "heldout", 3, length=50, depth=0.5)


def test_sides_are_kept(world: World) -> None:
    for split in ("train", "heldout"):
        pairs = {pair for i in range(300) for pair in NOTE.findall(world.document("long", split, i))}
        assert len(pairs) > 500
        assert {split_of("note", *pair) for pair in pairs} == {split}


def test_every_question_of_a_document_has_its_note(world: World) -> None:
    kinds = set()
    for index in range(300):
        text, question = world.document("long", "train", index).rsplit("\n", 1)
        notes = dict(NOTE.findall(text))
        asking, told = question.rstrip(".").split(": ")
        kinds.add(asking)
        for words in (part.split() for part in told.split(", ")):
            for key, value in itertools.pairwise(words):
                assert notes.pop(key) == value
        assert not notes, "a note that nobody asks for"
    assert kinds == {"Again", "Follow"}


def test_many_documents_are_short_and_many_words_in_long_ones(world: World) -> None:
    rng = random.Random(0)
    cast = world._casts["train"]
    words = [len(long.document(rng, "train", cast, 512).split()) for _ in range(4000)]
    assert 50 < statistics.median(words) < 80  # the geometric mean of 8 and 512 is 64
    assert 0.4 < sum(n for n in words if n > 256) / sum(words) < 0.65
