"""People, towns and animals: what is true in the world, and the ways to say it and to ask for it.

An entity has one single-word value per relation. Every relation has several statements (knowledge can only be
asked for if it was read in many wordings, arXiv 2309.14316), questions and answers. Entities come in groups:
`train` (facts and questions are seen), `heldout` (facts are in the pretraining text, but nobody ever asks about
them in a train document or task) and, for people, `unseen` (never named in any document).

Templates: {n} and {o} are the name and its possessive at the start of a sentence (a pronoun may stand there), {f} is
the name anywhere else, {v} the value and {a} the value with its article.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from nurture.world import lexicon
from nurture.world.split import pick, random_for

GROUPS = ("train", "heldout", "unseen")


@dataclass(frozen=True)
class Relation:
    """One attribute: its possible values and its wordings. `cloze` ends right before the value."""

    values: tuple[str, ...]
    cloze: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


# relation, then rows: cloze; statements; questions; answers
_PERSON = """
town
  - {f} lives in
  - {n} lives in {v}. | {o} home is in {v}. | {n} has a house in {v}. | The home town of {f} is {v}. | The town
    of {v} is the home of {f}.
  - Where does {f} live? | In which town does {f} live? | What is the home town of {f}? | Can you tell me where
    {f} lives?
  - {f} lives in {v}. | The home town of {f} is {v}.
job
  - {f} works as a
  - {n} works as {a}. | {n} is {a}. | {n} earns money as {a}. | The job of {f} is {v}. | By trade, {f} is {a}.
  - What is the job of {f}? | What does {f} do for work? | What kind of work does {f} do? | Do you know the job
    of {f}?
  - {f} works as {a}. | The job of {f} is {v}.
food
  - {f} loves to eat
  - {n} loves to eat {v}. | {o} favourite food is {v}. | {n} likes {v} best of all. | The favourite food of {f}
    is {v}. | Nothing tastes better to {f} than {v}.
  - What is the favourite food of {f}? | What does {f} love to eat? | Which food does {f} like best? | Can you
    tell me what {f} likes to eat?
  - {f} loves to eat {v}. | The favourite food of {f} is {v}.
pet
  - {f} has a pet
  - {n} has a pet {v}. | {n} keeps {a} as a pet. | {o} pet is {a}. | The pet of {f} is {a}. | At home, {f} looks
    after {a}.
  - What pet does {f} have? | Which animal does {f} keep as a pet? | What kind of pet does {f} have? | Do you
    know what pet {f} has?
  - {f} has a pet {v}. | The pet of {f} is {a}.
pet name
  - {f} has a pet called
  - {n} has a pet called {v}. | {o} pet is called {v}. | {n} named the pet {v}. | The pet of {f} is called {v}.
    | {v} is the name of the pet of {f}.
  - What is the pet of {f} called? | What is the name of the pet of {f}? | How did {f} name the pet? | Do you
    know the name of the pet of {f}?
  - {f} has a pet called {v}. | The pet of {f} is called {v}.
instrument
  - {f} plays the
  - {n} plays the {v}. | {n} makes music on the {v}. | {o} instrument is the {v}. | The instrument of {f} is the
    {v}. | In the evening, {f} plays the {v}.
  - Which instrument does {f} play? | What instrument does {f} play? | What is the instrument of {f}? | Can you
    tell me which instrument {f} plays?
  - {f} plays the {v}. | The instrument of {f} is the {v}.
month
  - {f} was born in
  - {n} was born in {v}. | {o} birthday is in {v}. | {n} has a birthday in {v}. | The birthday of {f} is in {v}.
    | Every {v}, {f} has a birthday party.
  - When was {f} born? | In which month was {f} born? | When is the birthday of {f}? | Do you know when {f} was
    born?
  - {f} was born in {v}. | The birthday of {f} is in {v}.
"""
_TOWN = """
region
  - {f} is a town in
  - {n} is a town in {v}. | {n} lies in the region of {v}. | The region around {f} is called {v}.
  - In which region is {f}? | Which region does {f} lie in? | Where is the town of {f}?
  - {f} is a town in {v}. | {f} lies in the region of {v}.
river
  - {f} stands on the river
  - {n} stands on the river {v}. | {o} river is the {v}. | The river {v} runs through {f}.
  - Which river runs through {f}? | On which river does {f} stand? | What is the river of {f} called?
  - {f} stands on the river {v}. | The river {v} runs through {f}.
product
  - {f} is known for its
  - {n} is known for its {v}. | {n} sells {v} far and wide. | If you need {v}, go to {f}.
  - What is {f} known for? | What do people make in {f}? | Which goods come from {f}?
  - {f} is known for its {v}. | {f} makes {v}.
sight
  - In {f} you can visit the old
  - {n} has an old {v}. | {o} best known sight is the {v}. | In {f} you can visit the old {v}.
  - What can you visit in {f}? | What is the best known sight of {f}? | What is there to see in {f}?
  - In {f} you can visit the old {v}. | The best known sight of {f} is the {v}.
"""
_ANIMAL = """
home
  - {f} lives in the
  - {n} lives in the {v}. | {o} home is the {v}. | You can find {f} in the {v}.
  - Where does {f} live? | What is the home of {f}? | Where can I find {f}?
  - {f} lives in the {v}. | The home of {f} is the {v}.
diet
  - {f} eats
  - {n} eats {v}. | {o} food is {v}. | When it is hungry, {f} looks for {v}.
  - What does {f} eat? | What is the food of {f}? | What does {f} like to eat?
  - {f} eats {v}. | The food of {f} is {v}.
legs
  - The number of legs of {f} is
  - {n} has {v} legs. | {n} is an animal with {v} legs. | If you count the legs of {f}, you find {v}.
  - How many legs does {f} have? | What is the number of legs of {f}?
  - {f} has {v} legs. | The number of legs of {f} is {v}.
cover
  - The body of {f} is covered with
  - {n} is covered with {v}. | {o} body is covered with {v}. | The body of {f} is covered with {v}.
  - What covers the body of {f}? | What is {f} covered with?
  - {f} is covered with {v}. | The body of {f} is covered with {v}.
"""


def _relations(text: str, values: dict[str, tuple[str, ...]]) -> dict[str, Relation]:
    rows = lexicon.table(text)
    return {key: Relation(values[key], rows[key][0][0], *rows[key][1:]) for key in rows}


_ANIMAL_VALUES = zip(
    ("home", "diet", "legs", "cover"), zip(*lexicon.ANIMALS.values(), strict=True), strict=True
)
PERSON = _relations(
    _PERSON,
    {
        "town": lexicon.TOWNS,
        "job": lexicon.JOBS,
        "food": lexicon.FOODS,
        "pet": lexicon.PETS,
        "pet name": lexicon.PET_NAMES,
        "instrument": lexicon.INSTRUMENTS,
        "month": lexicon.MONTHS,
    },
)
TOWN = _relations(
    _TOWN,
    {
        "region": lexicon.REGIONS,
        "river": lexicon.RIVERS,
        "product": lexicon.PRODUCTS,
        "sight": lexicon.SIGHTS,
    },
)
ANIMAL = _relations(_ANIMAL, {key: tuple(dict.fromkeys(column)) for key, column in _ANIMAL_VALUES})
RELATIONS: dict[str, dict[str, Relation]] = {"person": PERSON, "town": TOWN, "animal": ANIMAL}


@dataclass(frozen=True)
class Entity:
    """A person, a town or an animal, with the truth about it.

    Attributes:
        name: as it stands inside a sentence (`Mara Dunn`, `the fox`).
        pronouns: subject and possessive, capitalised.
        group: one of `GROUPS`.
        facts: relation -> the one true value.
    """

    kind: str
    name: str
    pronouns: tuple[str, str]
    group: str
    facts: dict[str, str] = field(hash=False)

    @cached_property
    def _sentences(self) -> dict[tuple[str, bool], tuple[str, ...]]:
        forms = {
            False: (lexicon.capitalised(self.name), f"{lexicon.capitalised(self.name)}'s"),
            True: self.pronouns,
        }
        return {
            (relation, pronoun): tuple(
                self.fill(text, relation, n=n, o=o)
                for text in RELATIONS[self.kind][relation].statements
                if not pronoun or "{n}" in text or "{o}" in text
            )
            for relation in self.facts
            for pronoun, (n, o) in forms.items()
        }

    def fill(self, template: str, relation: str, value: str | None = None, n: str = "", o: str = "") -> str:
        """Return `template` about this entity, with another `value` than the true one if given."""
        value = value or self.facts[relation]
        text = template.format(n=n or self.name, o=o, f=self.name, v=value, a=lexicon.with_article(value))
        return lexicon.capitalised(text)

    def state(self, rng: Random, relation: str, pronoun: bool = False) -> str:
        """Return one true sentence."""
        return pick(rng, self._sentences[relation, pronoun])

    def ask(self, rng: Random, relation: str) -> str:
        """Return one question for the value of `relation`."""
        return self.fill(pick(rng, RELATIONS[self.kind][relation].questions), relation)

    def answer(self, relation: str, wording: int = 0, value: str | None = None) -> str:
        """Return the answer to `ask`, in one of two wordings."""
        return self.fill(RELATIONS[self.kind][relation].answers[wording], relation, value)


def build_people(seed: int, counts: dict[str, int], towns: tuple[str, ...]) -> list[Entity]:
    """Return people with distinct names. First and last names are shared, so only both together name a person."""
    rng = random_for(seed, "people")
    firsts, lasts = list(lexicon.WOMEN + lexicon.MEN), list(lexicon.LAST_NAMES)
    rng.shuffle(firsts)
    rng.shuffle(lasts)
    groups = [group for group in GROUPS for _ in range(counts[group])]
    rng.shuffle(groups)
    people = []
    for i, group in enumerate(groups):
        first = firsts[i % len(firsts)]
        last = lasts[(i * 7 + i // len(firsts)) % len(lasts)]
        facts = {
            name: pick(rng, towns if name == "town" else relation.values) for name, relation in PERSON.items()
        }
        pronouns = ("She", "Her") if first in lexicon.WOMEN else ("He", "His")
        people.append(Entity("person", f"{first} {last}", pronouns, group, facts))
    return people


def _groups(rng: Random, count: int) -> list[str]:
    groups = ["heldout" if i % 6 == 0 else "train" for i in range(count)]
    rng.shuffle(groups)
    return groups


def build_towns(seed: int, count: int) -> list[Entity]:
    """Return towns with random facts; one in six is held out."""
    rng = random_for(seed, "towns")
    facts = [{key: pick(rng, relation.values) for key, relation in TOWN.items()} for _ in range(count)]
    entities = zip(lexicon.TOWNS, facts, _groups(rng, count), strict=False)
    return [Entity("town", name, ("It", "Its"), group, values) for name, values, group in entities]


def build_animals(seed: int) -> list[Entity]:
    """Return the animals, one in six held out; their facts are the same in every world."""
    groups = _groups(random_for(seed, "animals"), len(lexicon.ANIMALS))
    return [
        Entity("animal", f"the {name}", ("It", "Its"), group, dict(zip(ANIMAL, row, strict=True)))
        for (name, row), group in zip(lexicon.ANIMALS.items(), groups, strict=True)
    ]
