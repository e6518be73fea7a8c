"""Tiny Python functions with docstrings and tests: the `code` source and the code tasks.

A function is a family with constants (`add_7` is `add_{c}` with 7); the two decide the split. Its expected results
come from running our own text once; model-written code is never run here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from nurture.world import lexicon
from nurture.world.split import draw, pick, random_for

# argument and pool of constants, then rows: name (which names the family), what it returns, expression
_TABLE = lexicon.table("""
number 23456789
  - add_{c} | {x} plus {c} | {x} + {c}
  - subtract_{c} | {x} minus {c} | {x} - {c}
  - multiply_by_{c} | {x} times {c} | {x} * {c}
  - times_{c}_plus_{d} | {x} times {c} plus {d} | {x} * {c} + {d}
  - times_{c}_minus_{d} | {x} times {c} minus {d} | {x} * {c} - {d}
  - is_more_than_{c} | True if {x} is more than {c} | {x} > {c}
  - is_less_than_{c} | True if {x} is less than {c} | {x} < {c}
  - is_multiple_of_{c} | True if {x} is a multiple of {c} | {x} % {c} == 0
  - at_most_{c} | {x}, but at most {c} | min({x}, {c})
  - at_least_{c} | {x}, but at least {c} | max({x}, {c})
list 2345
  - first_{c} | the first {c} items of {x} | {x}[:{c}]
  - last_{c} | the last {c} items of {x} | {x}[-{c}:]
  - skip_{c} | {x} without its first {c} items | {x}[{c}:]
list 23456789
  - add_{c}_to_all | every item of {x} plus {c} | [item + {c} for item in {x}]
  - multiply_all_by_{c} | every item of {x} times {c} | [item * {c} for item in {x}]
  - keep_more_than_{c} | the items of {x} that are more than {c} | [item for item in {x} if item > {c}]
  - keep_less_than_{c} | the items of {x} that are less than {c} | [item for item in {x} if item < {c}]
  - sum_plus_{c} | the sum of {x} plus {c} | sum({x}) + {c}
text abcdefghijklmnopqrstuvwxyz
  - count_{c} | how often {c} is in {x} | {x}.count("{c}")
  - starts_with_{c} | True if {x} starts with {c} | {x}.startswith("{c}")
  - ends_with_{c} | True if {x} ends with {c} | {x}.endswith("{c}")
  - remove_{c} | {x} without the letter {c} | {x}.replace("{c}", "")
  - replace_{c}_with_{d} | {x} with {d} in place of {c} | {x}.replace("{c}", "{d}")
  - add_ending_{c} | {x} with the ending {c} | {x} + "{c}"
text 23456789
  - repeat_{c}_times | {x} repeated {c} times | {x} * {c}
""")
# family: (argument, pool of constants, what it returns, expression)
FAMILIES = {
    name: (*heading.split(), purpose, expression)
    for heading, rows in _TABLE.items()
    for name, purpose, expression in rows
}
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
        return self.family.format(c=self.constants[0], d=self.constants[1])

    @property
    def purpose(self) -> str:
        """What the function returns, in words."""
        return self._fill(2)

    @property
    def key(self) -> tuple[str, ...]:
        """What decides the split: the family and the constants it uses."""
        return (self.family, *self.constants[: 2 if "{d}" in self.family else 1])

    @property
    def source(self) -> str:
        """The definition without a docstring."""
        return f"def {self.name}({self.argument}):\n    return {self._fill(3)}"

    @property
    def documented(self) -> str:
        """The definition with a docstring."""
        head, body = self.source.split("\n")
        return f'{head}\n    """Return {self.purpose}."""\n{body}'

    @property
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
    argument, pool, *_ = FAMILIES[family]
    c, d = rng.sample(pool, 2)
    return Function(family, (c, d), pick(rng, NAMES[argument]))


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
