"""The `web` source: biographies, town and animal pages, stories, explanations, notes to remember.

Facts are told again and again in other words and another order, because a fact read in one wording only cannot be
asked for later. Notes state a number and ask for it at the end: long-context retrieval in miniature.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from nurture.world import lexicon, wordle
from nurture.world.facts import Entity
from nurture.world.lexicon import capitalised, with_article
from nurture.world.split import draw, pick

FIRST_NAMES = lexicon.WOMEN + lexicon.MEN


@dataclass(frozen=True)
class Cast:
    """Who may be named in documents of one split. `asked` may be asked about, `known` may only be told about."""

    known: tuple[Entity, ...]
    asked: tuple[Entity, ...]
    towns: tuple[Entity, ...]
    animals: tuple[Entity, ...]
    by_town: dict[str, tuple[Entity, ...]]


_OPENERS = ("Meet {f}.", "This page is about {f}.", "Who is {f}?", "Here is a short portrait of {f}.", "")
_CLOSERS = (
    "That is all we know about {f}.",
    "Everybody here knows {f}.",
    "You can read more about {f} soon.",
    "",
)


def portrait(rng: Random, entity: Entity, count: int) -> str:
    """Return `count` facts about `entity` as running text; pronouns stand for the name now and then."""
    relations = list(entity.facts)
    rng.shuffle(relations)
    return " ".join(
        entity.state(rng, relation, pronoun=i > 0 and rng.random() < 0.45)
        for i, relation in enumerate(relations[:count])
    )


def _page(rng: Random, entity: Entity) -> str:
    parts = (pick(rng, _OPENERS), portrait(rng, entity, rng.randint(4, 7)), pick(rng, _CLOSERS))
    return " ".join(part for part in parts if part).format(f=entity.name)


def biography(rng: Random, cast: Cast) -> str:
    """Return one to three biographies."""
    people = [pick(rng, cast.known) for _ in range(rng.randint(1, 3))]
    return "\n\n".join(_page(rng, person) for person in people)


def town_page(rng: Random, cast: Cast) -> str:
    """Return a page about a town and some of the people who live there."""
    town = pick(rng, cast.towns)
    text = _page(rng, town)
    people = cast.by_town[town.name]
    if people:
        some = rng.sample(people, min(len(people), rng.randint(2, 4)))
        lines = (f"{person.name} lives in {town.name}. {portrait(rng, person, 2)}" for person in some)
        text += f"\n\nPeople of {town.name}\n" + "\n".join(lines)
    return text


def animal_page(rng: Random, cast: Cast) -> str:
    """Return a page about two or three animals."""
    return "\n\n".join(_page(rng, pick(rng, cast.animals)) for _ in range(rng.randint(2, 3)))


_TRAITS = tuple("small old brave clever lonely hungry gentle curious".split())
_PLACES = ("in a deep forest", "near a quiet lake", "on a high hill", "by the sea", "at the edge of a town")
ACTS = lexicon.table("""
finds
  - One morning the {h} found {o} on the road. | One day {o} came down the river, and the {h} pulled it out. |
    After a storm the {h} saw {o} under a tree. | A stranger gave {o} to the {h}.
wishes
  - The {h} did not know what to do with the {k}. | The {h} was very proud of the {k}. | The {h} had never seen
    a {k} before. | The {h} wanted to keep the {k} for ever.
troubles
  - But then a {g} came and cried, because its home was gone. | But in the night the wind took the {k} away. |
    But a {g} wanted the {k} too, and they had a fight. | But the {k} was broken, and nobody could mend it.
helps
  - Together they looked for help and worked all night. | The {h} asked {p}, who always knew what to do. | An
    old {g} told the {h} to be patient. | The {h} thought about it for three days.
ends
  - In the end the {h} gave the {k} to a friend, and both were happy. | In the end the {k} was safe again, and
    they all had a big dinner. | From that day on the {h} and the {g} were friends. | Since then the {k} hangs
    over the door, and everybody can see it.
""")
ANIMAL_NAMES = tuple(lexicon.ANIMALS)


def tell_story(rng: Random, hero: str, thing: str) -> str:
    """Return a story of six sentences about an animal and a thing."""
    helper = pick(rng, ANIMAL_NAMES)
    while helper == hero:
        helper = pick(rng, ANIMAL_NAMES)
    slots = {"h": hero, "g": helper, "k": thing, "o": with_article(thing), "p": pick(rng, FIRST_NAMES)}
    start = f"Once upon a time {with_article(pick(rng, _TRAITS))} {hero} lived {pick(rng, _PLACES)}."
    return " ".join([start, *(pick(rng, wordings).format(**slots) for (wordings,) in ACTS.values())])


def draw_story_subject(rng: Random, split: str) -> tuple[str, str]:
    """Return (animal, thing) to tell a story about; the pair decides the split."""
    return draw(
        rng,
        split,
        lambda rng: (pick(rng, ANIMAL_NAMES), pick(rng, lexicon.OBJECTS)),
        lambda pair: ("story", *pair),
    )


_RECIPES = lexicon.table("""
soup
  - water | carrots | salt
bread
  - flour | water | salt
cake
  - flour | sugar | eggs
pancakes
  - flour | milk | eggs
porridge
  - oats | milk | honey
salad
  - tomatoes | oil | salt
pie
  - apples | flour | butter
noodles
  - flour | eggs | water
""")
_HOW = lexicon.table("""
How to plant a tree
  - Dig a deep hole in the ground. | Put the young tree into the hole. | Fill the hole with earth. | Give it
    water.
How to write a letter
  - Take a pen and some paper. | Write the name of your friend. | Tell what is new. | Put it in the post box.
How to make a friend
  - Say hello and smile. | Ask what the other one likes. | Listen to the answer. | Meet again soon.
How to clean a room
  - Open the window. | Pick up the things from the floor. | Wipe the table. | Sweep the floor.
How to paint a wall
  - Cover the floor with paper. | Stir the paint. | Start at the top. | Let it dry for a day.
How to learn a song
  - Hear the song a few times. | Read the words aloud. | Sing one line after the other. | Sing it for a friend.
""")
_STEPS = ("First", "Then", "After that", "Next", "Finally")


def how_to(rng: Random) -> str:
    """Return a recipe, an explanation in steps, or a paragraph about the calendar."""
    chance = rng.random()
    if chance < 0.5:
        dish, (parts,) = pick(rng, tuple(_RECIPES.items()))
        things = rng.sample(parts, 3)
        steps = [f"mix the {things[0]} with the {things[1]}.", f"add the {things[2]}."]
        steps += [
            f"wait for {pick(rng, ('ten', 'twenty', 'thirty'))} minutes.",
            f"eat the {dish} with your friends.",
        ]
        title = f"How to make {dish}\nYou need {lexicon.join_words(things)}."
    elif chance < 0.85:
        title = pick(rng, tuple(_HOW))
        steps = [step[0].lower() + step[1:] for step in _HOW[title][0]]
    else:
        start = rng.randint(0, 10)
        pairs = [(lexicon.MONTHS[i % 12], lexicon.MONTHS[(i + 1) % 12]) for i in range(start, start + 5)]
        return "The months of the year\n" + " ".join(f"After {a} comes {b}." for a, b in pairs)
    order = ("First", *rng.sample(_STEPS[1:4], 2), "Finally")
    return title + "\n" + " ".join(f"{word}, {step}" for word, step in zip(order, steps, strict=True))


_NEEDLES = (
    "The secret number of the {c} {k} is {d}.",
    "Remember that the secret number of the {c} {k} is {d}.",
)


def needle(rng: Random, keeper: str, digits: str) -> str:
    """Return the sentence that hides a number."""
    colour, thing = keeper.split()
    return pick(rng, _NEEDLES).format(c=colour, k=thing, d=digits)


def draw_keeper(rng: Random) -> tuple[str, str]:
    """Return (`red box`, five digits)."""
    keeper = f"{pick(rng, lexicon.COLOURS)} {pick(rng, lexicon.KEEPERS)}"
    return keeper, "".join(str(rng.randint(0, 9)) for _ in range(5))


def ask_needle(keeper: str) -> str:
    """Return the question for a hidden number."""
    return f"What is the secret number of the {keeper}?"


def filler(rng: Random, cast: Cast) -> str:
    """Return one innocent sentence."""
    entity = pick(rng, pick(rng, (cast.known, cast.towns, cast.animals)))
    return entity.state(rng, pick(rng, tuple(entity.facts)))


def notes(rng: Random, cast: Cast) -> str:
    """Return a text that hides one to four numbers and asks for each of them at the end.

    Some numbers are said twice at once: copying is learned there first, and looking up follows.
    """
    keys = dict(draw_keeper(rng) for _ in range(rng.randint(1, 4)))
    lines = [filler(rng, cast) for _ in range(rng.randint(0, 6))]
    for keeper, digits in keys.items():
        again = f" I say it again: {digits}." if rng.random() < 0.4 else ""
        lines.insert(rng.randint(0, len(lines)), needle(rng, keeper, digits) + again)
    asked = list(keys)
    rng.shuffle(asked)
    return " ".join(lines) + "".join(f"\nQuestion: {ask_needle(k)}\nAnswer: {keys[k]}" for k in asked)


def document(rng: Random, split: str, cast: Cast) -> str:
    """Return a document of the `web` source."""
    chance = rng.random()
    if chance < 0.44:
        return biography(rng, cast)
    if chance < 0.58:
        return town_page(rng, cast)
    if chance < 0.65:
        return animal_page(rng, cast)
    if chance < 0.75:
        return "\n\n".join(tell_story(rng, *draw_story_subject(rng, split)) for _ in range(rng.randint(1, 2)))
    if chance < 0.80:
        return capitalised(how_to(rng))
    if chance < 0.97:
        return notes(rng, cast)
    return wordle.document(rng, split)
