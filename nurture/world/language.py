"""Tavi, the second language: a small regular grammar with a parallel English sentence for everything it can say.

Word order is time, subject, object, place, verb; adjectives follow the noun; plural `-ni`, past `-sé`; no articles.
Accented letters make bytes differ from letters.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from nurture.world.facts import Entity
from nurture.world.lexicon import capitalised
from nurture.world.split import draw, pick

NOUNS = {
    pair.split(":")[0]: pair.split(":")[1]
    for pair in (
        "dog:doru cat:mísa bird:peli fish:nalu horse:kavo fox:réno woman:ameva man:oromo friend:samí king:rego "
        "farmer:garto baker:panelo apple:pomu house:kaso tree:arbo boat:naví book:libru flower:flóri stone:petu "
        "bear:urso owl:ulúma teacher:dokemo rabbit:lapo cake:tórta"
    ).split()
}
PLURALS = {"fish": "fish", "man": "men", "woman": "women", "fox": "foxes"}
ADJECTIVES = {
    pair.split(":")[0]: pair.split(":")[1]
    for pair in (
        "big:gran small:piti red:rúsa blue:lazu green:verdi old:véta young:nova happy:jolu sad:trísa white:albi "
        "black:nera quiet:selu"
    ).split()
}
VERBS = {  # English stem: (past, Tavi)
    "see": ("saw", "vide"),
    "love": ("loved", "ama"),
    "find": ("found", "trova"),
    "carry": ("carried", "porta"),
    "follow": ("followed", "seku"),
    "help": ("helped", "ayu"),
    "hear": ("heard", "oye"),
    "draw": ("drew", "pinta"),
    "know": ("knew", "kone"),
    "like": ("liked", "lika"),
}
PLACES = {
    "garden": "hortu",
    "forest": "sílva",
    "town": "vilo",
    "kitchen": "kusina",
    "snow": "nevo",
    "field": "kampu",
}
TIMES = {"today": ("odi", False), "yesterday": ("yéri", True)}


@dataclass(frozen=True)
class Sentence:
    """The same thing said in both languages."""

    english: str
    tavi: str


def _noun_phrase(rng: Random) -> tuple[str, str, bool]:
    noun, plural = pick(rng, _NOUN_ITEMS), rng.random() < 0.3
    english, tavi = noun
    if plural:
        english, tavi = PLURALS.get(english, f"{english}s"), f"{tavi}ni"
    if rng.random() < 0.4:
        adjective = pick(rng, _ADJECTIVE_ITEMS)
        english, tavi = f"{adjective[0]} {english}", f"{tavi} {adjective[1]}"
    return f"the {english}", tavi, plural


def _third_person(stem: str) -> str:
    return "carries" if stem == "carry" else f"{stem}s"


_NOUN_ITEMS, _ADJECTIVE_ITEMS, _VERB_ITEMS = (
    tuple(NOUNS.items()),
    tuple(ADJECTIVES.items()),
    tuple(VERBS.items()),
)
_PLACE_ITEMS, _TIME_ITEMS = tuple(PLACES.items()), tuple(TIMES.items())


def _make_sentence(rng: Random) -> Sentence:
    subject, subject_tavi, plural = _noun_phrase(rng)
    thing, thing_tavi, _ = _noun_phrase(rng)
    stem, (past, verb) = pick(rng, _VERB_ITEMS)
    english, tavi = [subject], [subject_tavi, thing_tavi]
    is_past = rng.random() < 0.4
    place = pick(rng, _PLACE_ITEMS) if rng.random() < 0.25 else None
    time = pick(rng, _TIME_ITEMS) if rng.random() < 0.25 else None
    if time:
        is_past = time[1][1]
    english.append(past if is_past else stem if plural else _third_person(stem))
    english.append(thing)
    if place:
        english.append(f"in the {place[0]}")
        tavi.append(f"{place[1]} na")
    tavi.append(f"{verb}sé" if is_past else verb)
    if time:
        english.append(time[0])
        tavi.insert(0, time[1][0])
    return Sentence(capitalised(" ".join(english)) + ".", capitalised(" ".join(tavi)) + ".")


def draw_sentence(rng: Random, split: str) -> Sentence:
    """Return one sentence on `split`, in both languages."""
    return draw(rng, split, _make_sentence, lambda sentence: sentence.english)


def document(rng: Random, split: str, people: tuple[Entity, ...]) -> str:
    """Return a document of the `web-tavi` source: running text, a parallel text, or a word list."""
    chance = rng.random()
    sentences = [draw_sentence(rng, split) for _ in range(rng.randint(4, 8))]
    if chance < 0.3:
        lines = [sentence.tavi for sentence in sentences]
        for person in (pick(rng, people) for _ in range(rng.randint(0, 2))):
            lines.insert(rng.randint(0, len(lines)), f"{person.name} {person.facts['town']} na vive.")
        return " ".join(lines)
    if chance < 0.58:
        return "\n".join(f"English: {sentence.english}\nTavi: {sentence.tavi}" for sentence in sentences)
    if chance < 0.86:
        return "\n".join(f"Tavi: {sentence.tavi}\nEnglish: {sentence.english}" for sentence in sentences)
    words = rng.sample(_NOUN_ITEMS, 5) + rng.sample(_ADJECTIVE_ITEMS, 3) + rng.sample(_PLACE_ITEMS, 2)
    rng.shuffle(words)
    wordings = ("In Tavi, {0} is {1}.", "The Tavi word for {0} is {1}.", "{1} means {0}.")
    return " ".join(pick(rng, wordings).format(*word) for word in words) + " " + sentences[0].tavi
