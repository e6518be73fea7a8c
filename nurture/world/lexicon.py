"""The words of the world: names, things, jobs, animals. Tables only.

Values of one relation are single words and never overlap with the values of another relation of the same kind
of entity, so a grader can read a stated fact off a reply by set intersection.
"""

from __future__ import annotations

import re

WOMEN = tuple(
    "Mara Lena Tilda Rosa Edith Nora Wanda Greta Alma Clara Elsa Fiona Hilda Irma Jana Kira Lydia Mona Nadia Olga "
    "Petra Ruth Selma Thea Ursa Vera Willa Yara Zelda Bella".split()
)
MEN = tuple(
    "Tom Oskar Felix Hugo Ivan Jonas Karl Leo Milo Nils Otto Paul Rufus Simon Theo Ulf Victor Walter Yann Zeno Adam "
    "Boris Conrad David Emil Frank Gustav Henry Igor Jasper".split()
)
LAST_NAMES = tuple(
    "Dunn Barlow Castle Denby Eller Foster Grange Hobbs Ingram Jarvis Keller Lund Marsh Norris Oakes Penn Quill "
    "Rowan Sands Thorne Upton Vance Wells Yates Abbot Birch Cole Drake Ellis Frost Gale Heath Irons Jensen Knight "
    "Lowe Mercer Nash Orton Parry Reed Stone Tully Underhill Vale Weaver York Archer Blythe Crane Doyle Egan Finch "
    "Graves Hale Ivory Judd Kemp Lark Moss".split()
)
TOWNS = tuple(
    "Brinholt Ashmere Caldry Dunwick Elmstead Fernby Glasten Hollin Ivermouth Jorwell Kelsford Lanport Mirefield "
    "Nettleby Orbridge Pinmoor Quarley Ravenhithe Stokeley Tarnside Ullerton Vexham Windlow Yarrowdale Zellbeck "
    "Appleton Beckford Copperhill Driftwood Eastwater".split()
)
REGIONS = tuple("Norland Estmark Sudria Westmoor Midvale Highfen".split())
RIVERS = tuple("Alda Brue Corin Dell Esk Fenna Garo Hume".split())
PRODUCTS = tuple(
    "salt wool glass clocks boats paper wine tea silk bricks candles baskets carpets knives bells".split()
)
SIGHTS = tuple(
    "tower bridge castle mill lighthouse market fountain library park harbour theatre museum".split()
)

JOBS = tuple(
    "baker farmer teacher doctor painter sailor carpenter gardener tailor miller potter smith driver nurse cook "
    "writer singer judge fisher weaver shepherd clerk builder barber".split()
)
FOODS = tuple(
    "soup bread cheese rice pasta salad pancakes cake beans potatoes mushrooms carrots honey porridge pie noodles "
    "apples pears plums cherries tomatoes eggs yoghurt nuts".split()
)
PETS = tuple("cat dog rabbit parrot turtle pony hamster goose lizard hedgehog canary goat".split())
PET_NAMES = tuple(
    "Pepper Button Clover Fudge Maple Nugget Pickle Poppy Rusty Shadow Smoky Sunny Tiger Waffle Whisper Ziggy "
    "Bramble Comet Dusty Echo Freckle Tinker Marble Noodle".split()
)
INSTRUMENTS = tuple("piano violin flute drum guitar trumpet harp cello horn banjo organ lute".split())
MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)
COLOURS = tuple("red blue green yellow white black brown purple orange grey".split())
THINGS = tuple("apples books coins shells stones stamps pencils cards buttons marbles eggs flowers".split())
OBJECTS = tuple("lantern key map kite bell boat drum coat ladder mirror rope basket book coin hat".split())
KEEPERS = tuple("box door chest gate tower cave ship garden room bridge".split())

# animal: home, food, number of legs, cover
ANIMALS: dict[str, tuple[str, str, str, str]] = {
    row.split()[0]: tuple(row.split()[1:])  # type: ignore[misc]
    for row in """fox forest mice four fur
owl forest mice two feathers
bear forest berries four fur
deer forest leaves four fur
wolf forest meat four fur
squirrel forest acorns four fur
hare meadow grass four fur
horse meadow grass four fur
bee meadow nectar six hair
ant meadow seeds six armour
cow barn grass four fur
sheep barn grass four wool
hen barn seeds two feathers
pig barn roots four skin
eagle mountain meat two feathers
marmot mountain grass four fur
camel desert leaves four fur
snake desert mice zero scales
scorpion desert insects eight armour
frog pond insects four skin
duck pond seeds two feathers
swan pond plants two feathers
newt pond insects four skin
whale sea fish zero skin
shark sea fish zero scales
crab sea plants ten shell
octopus sea crabs eight skin
penguin snow fish two feathers
bat cave insects two fur
spider cave insects eight hair
salmon river insects zero scales
otter river fish four fur
beaver river wood four fur
heron river fish two feathers""".splitlines()
}

HANDLES = tuple(
    "mira_k oldowl sunny77 bobbin rainboat tinfoil kettle9 pinecone jolly_j nightbus redfern mudlark plumtree "
    "haystack quickfox lowtide bluejar copperpot windmill snowpea dustpan tallship firefly paperhat".split()
)


def table(text: str) -> dict[str, list[tuple[str, ...]]]:
    """Read a table of wordings: unindented lines are keys, `- ` starts a row, ` | ` separates its cells."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for block in re.split(r"\n(?=\S)", text.strip()):
        key, *rows = re.split(r"\n *- ", block)
        found[key] = [tuple(cell.strip() for cell in " ".join(row.split()).split("|")) for row in rows]
    return found


def with_article(noun: str) -> str:
    """Return `noun` with `a` or `an` before it."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capitalised(text: str) -> str:
    """Return `text` with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]


def join_words(items: list[str] | tuple[str, ...], last: str = "and") -> str:
    """Return `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
