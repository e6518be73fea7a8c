"""Tiny Python functions with docstrings and tests: the `code` source and the code tasks.

A function is a family with constants (`add_7`, `replace_a_with_o`); the pair decides the split. Its expected results
come from running our own text once; model-written code is never run here.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cached_property, lru_cache
from random import Random

from nurture.world import lexicon
from nurture.world.split import draw, pick, random_for

# family, then: argument | name | what it returns | expression; {c} and {d} are the constants
_FAMILIES = """
add
  - number | add_{c} | {x} plus {c} | {x} + {c}
subtract
  - number | subtract_{c} | {x} minus {c} | {x} - {c}
multiply
  - number | multiply_by_{c} | {x} times {c} | {x} * {c}
scale add
  - number | times_{c}_plus_{d} | {x} times {c} plus {d} | {x} * {c} + {d}
scale subtract
  - number | times_{c}_minus_{d} | {x} times {c} minus {d} | {x} * {c} - {d}
more
  - number | is_more_than_{c} | True if {x} is more than {c} | {x} > {c}
less
  - number | is_less_than_{c} | True if {x} is less than {c} | {x} < {c}
multiple
  - number | is_multiple_of_{c} | True if {x} is a multiple of {c} | {x} % {c} == 0
limit
  - number | at_most_{c} | {x}, but at most {c} | min({x}, {c})
floor
  - number | at_least_{c} | {x}, but at least {c} | max({x}, {c})
first
  - list | first_{c} | the first {c} items of {x} | {x}[:{c}]
last
  - list | last_{c} | the last {c} items of {x} | {x}[-{c}:]
skip
  - list | skip_{c} | {x} without its first {c} items | {x}[{c}:]
add all
  - list | add_{c}_to_all | every item of {x} plus {c} | [item + {c} for item in {x}]
multiply all
  - list | multiply_all_by_{c} | every item of {x} times {c} | [item * {c} for item in {x}]
keep more
  - list | keep_more_than_{c} | the items of {x} that are more than {c} | [item for item in {x} if item > {c}]
keep less
  - list | keep_less_than_{c} | the items of {x} that are less than {c} | [item for item in {x} if item < {c}]
sum plus
  - list | sum_plus_{c} | the sum of {x} plus {c} | sum({x}) + {c}
count
  - text | count_{c} | how often {c} is in {x} | {x}.count("{c}")
starts
  - text | starts_with_{c} | True if {x} starts with {c} | {x}.startswith("{c}")
ends
  - text | ends_with_{c} | True if {x} ends with {c} | {x}.endswith("{c}")
remove
  - text | remove_{c} | {x} without the letter {c} | {x}.replace("{c}", "")
replace
  - text | replace_{c}_with_{d} | {x} with {d} in place of {c} | {x}.replace("{c}", "{d}")
repeat
  - text | repeat_{c}_times | {x} repeated {c} times | {x} * {c}
ending
  - text | add_ending_{c} | {x} with the ending {c} | {x} + "{c}"
"""
FAMILIES = {family: rows[0] for family, rows in lexicon.table(_FAMILIES).items()}
LETTERS = {"count", "starts", "ends", "remove", "replace", "ending"}
CUTS = {"first", "last", "skip"}
NAMES = {
    "number": ("x", "n", "number"),
    "list": ("items", "values", "numbers"),
    "text": ("text", "word", "s"),
}
SAMPLE_WORDS = tuple(
    "banana letter window kitten summer garden rabbit yellow coffee puzzle silver jacket oxygen".split()
)


@dataclass(frozen=True)
class Function:
    """One member of a family, with the name of its argument."""

    family: str
    constants: tuple[str, str]
    argument: str

    def _fill(self, part: int) -> str:
        c, d = self.constants
        return FAMILIES[self.family][part].format(x=self.argument, c=c, d=d)

    @property
    def name(self) -> str:
        """The name to define."""
        return self._fill(1)

    @property
    def purpose(self) -> str:
        """What the function returns, in words."""
        return self._fill(2)

    @property
    def key(self) -> tuple[str, ...]:
        """What decides the split: the family and the constants it uses."""
        return (
            self.family,
            self.constants[0],
            self.constants[1] if "{d}" in FAMILIES[self.family][1] else "",
        )

    @property
    def source(self) -> str:
        """The definition without a docstring."""
        return f"def {self.name}({self.argument}):\n    return {self._fill(3)}"

    @property
    def documented(self) -> str:
        """The definition with a docstring."""
        head, body = self.source.split("\n")
        return f'{head}\n    """Return {self.purpose}."""\n{body}'

    @cached_property
    def examples(self) -> tuple[tuple[str, str], ...]:
        """Calls with their results, as Python text; different results come first."""
        return _examples(self.family, self.constants)

    def tests(self, rng: Random, count: int) -> tuple[str, ...]:
        """Return `count` assert statements."""
        chosen = list(self.examples[:2]) + rng.sample(self.examples[2:], max(count - 2, 0))
        rng.shuffle(chosen)
        return tuple(f"assert {call} == {result}" for call, result in chosen[:count])


@lru_cache(maxsize=8192)
def _examples(family: str, constants: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    function = Function(family, constants, "x")
    rng = random_for("examples", family, constants)
    scope: dict[str, object] = {}
    exec(function.source, scope)  # our own template, never model output
    argument, *_, expression = FAMILIES[family]
    inputs: list[object]
    if argument == "number":
        # products of numbers up to ten are easy steps, so no test can show a held-out one
        inputs = list(rng.sample(range(11 if "*" in expression else 16), 8))
    elif argument == "list":
        inputs = [[rng.randint(0, 9) for _ in range(rng.randint(4, 7))] for _ in range(8)]
    else:
        words = rng.sample(SAMPLE_WORDS, 6)
        inputs = [*words, words[0] + constants[0], constants[0] + words[1]]
    outputs = [scope[function.name](value) for value in inputs]  # type: ignore[operator]
    # first an example that tells the function from doing nothing, then one with another result
    order = sorted(range(len(inputs)), key=lambda i: outputs[i] == inputs[i])
    other = next((i for i in order if outputs[i] != outputs[order[0]]), order[1])
    order = [order[0], other, *(i for i in order[1:] if i != other)]
    pairs = [(f"{function.name}({inputs[i]!r})", repr(outputs[i])) for i in order]
    return tuple((call.replace("'", '"'), result.replace("'", '"')) for call, result in pairs)


_FAMILY_NAMES = tuple(FAMILIES)


def _make_function(rng: Random) -> Function:
    family = pick(rng, _FAMILY_NAMES)
    argument = pick(rng, NAMES[FAMILIES[family][0]])
    pool = string.ascii_lowercase if family in LETTERS else "2345" if family in CUTS else "23456789"
    c, d = pick(rng, pool), pick(rng, pool)
    if family == "replace" and c == d:
        d = "o" if c != "o" else "a"
    return Function(family, (c, d), argument)


def draw_function(rng: Random, split: str) -> Function:
    """Return one function on `split`."""
    return draw(rng, split, _make_function, lambda function: function.key)


def document(rng: Random, split: str) -> str:
    """Return a document of the `code` source: three to five functions, some with asserts or a usage line."""
    parts = []
    for _ in range(rng.randint(3, 5)):
        function = draw_function(rng, split)
        chance = rng.random()
        if chance < 0.25:
            parts.append(f"# Return {function.purpose}.\n{function.source}")
        elif chance < 0.5:
            parts.append(function.documented)
        elif chance < 0.8:
            parts.append(function.documented + "\n\n" + "\n".join(function.tests(rng, rng.randint(2, 3))))
        else:
            call, result = pick(rng, function.examples)
            parts.append(f"{function.documented}\n\nprint({call})  # {result}")
    return "\n\n\n".join(parts) + "\n"
