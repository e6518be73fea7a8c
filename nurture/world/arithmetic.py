"""Arithmetic with worked steps: the `math` source, and the problems every other source and task borrows.

A problem is one step (`37 + 25`) or two; only `hard` steps can be held out. Sums with a one-digit number, with a
multiple of ten, and the small times table are the alphabet that worked steps are written in, so they are always
train. The second step of a two-step problem is always an easy one: the first step decides the split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from nurture.world import lexicon
from nurture.world.split import Split, pick, split_of

FIRST_NAMES = lexicon.WOMEN + lexicon.MEN
LIMIT = {"+": 99, "-": 99, "x": 199}
"""Largest result of each operation."""


@dataclass(frozen=True)
class Step:
    """One operation on two whole numbers; `x` is multiplication."""

    left: int
    operation: str
    right: int

    @property
    def result(self) -> int:
        """The value of the step."""
        left, right = self.left, self.right
        return (
            left + right if self.operation == "+" else left - right if self.operation == "-" else left * right
        )

    @property
    def hard(self) -> bool:
        """Whether the step needs working out, and so may be held out."""
        if self.operation == "+":
            return min(self.left, self.right) > 10 and self.left % 10 != 0 and self.right % 10 != 0
        if self.operation == "-":
            return self.right > 10 and self.right % 10 != 0
        low, high = sorted((self.left, self.right))
        return low > 1 and high > 10 and high % 10 != 0

    @property
    def split(self) -> Split:
        """The side of this instance; `a + b` and `b + a` are one instance."""
        if not self.hard:
            return "train"
        left, right = (self.left, self.right) if self.operation == "-" else sorted((self.left, self.right))
        return split_of("step", left, self.operation, right)

    def __str__(self) -> str:
        return f"{self.left} {self.operation} {self.right}"

    def work(self) -> str:
        """Return the worked steps: tens first, then ones."""
        if not self.hard:
            return f"{self} = {self.result}."
        if self.operation == "x":
            low, high = sorted((self.left, self.right))
            tens, ones = Step(low, "x", high - high % 10), Step(low, "x", high % 10)
            return f"{tens.work()} {ones.work()} {Step(tens.result, '+', ones.result).work()}"
        tens = Step(self.left, self.operation, self.right - self.right % 10)
        return f"{tens.work()} {Step(tens.result, self.operation, self.right % 10).work()}"

    def columns(self) -> str:
        """Return the step worked out digit by digit, ones first, in sums so small that they can be known by heart.

        The carry (or what is borrowed) is always written, and sums have two digits: a small model finds the same thing
        at the same place every time.
        """
        high, low = (
            (self.left, self.right) if self.operation == "-" else sorted((self.left, self.right))[::-1]
        )
        (tens, ones), (more_tens, more_ones) = divmod(high, 10), divmod(low, 10)
        head = f"{high:02d} {self.operation} {low:02d}:"
        if self.operation == "x":  # one of the two has one digit
            carry = ones * low // 10
            first = f"{ones} x {low} = {ones * low:02d}"
            return f"{head} {first}, {tens} x {low} + {carry} = {tens * low + carry:02d}. {self.result}."
        sign = 1 if self.operation == "+" else -1
        carry = (ones + more_ones) // 10 if sign == 1 else int(ones < more_ones)
        start = ones if sign == 1 else ones + 10 * carry
        first = f"{start} {self.operation} {more_ones} = {start + sign * more_ones:02d}"
        rest = tens + sign * (more_tens + carry)
        second = f"{tens} {self.operation} {more_tens} {self.operation} {carry} = {rest:02d}"
        return f"{head} {first}, {second}. {self.result}."


@lru_cache(maxsize=1)
def step_pools() -> dict[tuple[str, str, bool], tuple[Step, ...]]:
    """Return all steps by (split, operation, hard)."""
    pools: dict[tuple[str, str, bool], list[Step]] = {}
    for operation, rights in (("+", range(1, 90)), ("-", range(1, 90)), ("x", range(2, 30))):
        for left in range(2, 100 if operation != "x" else 10):
            for right in rights:
                step = Step(left, operation, right)
                if 0 < step.result <= LIMIT[operation]:
                    pools.setdefault((step.split, operation, step.hard), []).append(step)
    return {key: tuple(steps) for key, steps in pools.items()}


def draw_step(rng: Random, split: str, operation: str | None = None) -> Step:
    """Return one step; in `heldout` always a held-out instance, in `train` an easy one now and then."""
    operation = operation or pick(rng, "++--x")
    hard = split == "heldout" or rng.random() < 0.65
    return pick(rng, step_pools()[split, operation, hard])


@dataclass(frozen=True)
class Problem:
    """A question with its truth: `sentence` states the answer, `trace` works it out."""

    question: str
    sentence: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        """The value asked for."""
        return self.steps[-1].result

    @property
    def trace(self) -> str:
        """The worked steps, in order."""
        return " ".join(step.work() for step in self.steps)

    @property
    def columns(self) -> str:
        """The same, digit by digit."""
        return " ".join(step.columns() for step in self.steps)

    @property
    def solution(self) -> str:
        """The sentence and the answer in its fixed form."""
        return f"{self.sentence} Answer: {self.answer}"


PLAIN = ("What is {e}?", "Calculate {e}.", "How much is {e}?", "Work out {e}.", "Please compute {e}.")
# operation, then rows: what happens; question; answer; may something more happen?
STORIES = lexicon.table("""
+
  - {n} has {a} {t}. {m} gives {n} {b} more {t}. | How many {t} does {n} have now? | {n} has {c} {t}. | yes
  - {n} finds {a} {t} on Monday and {b} {t} on Sunday. | How many {t} does {n} have? | {n} has {c} {t}. | yes
  - There are {a} red {t} and {b} blue {t} in a box. | How many {t} are in the box? | There are {c} {t}. | no
-
  - {n} has {a} {t}. {n} gives {b} {t} to {m}. | How many {t} does {n} have left? | {n} has {c} {t}. | yes
  - {n} had {a} {t} but lost {b} {t}. | How many {t} does {n} have left? | {n} has {c} {t}. | yes
  - {n} has {a} {t} and {m} has {b} {t}. | How many more {t} does {n} have? | {n} has {c} more {t}. | no
x
  - There are {a} boxes with {b} {t} in each box. | How many {t} are there? | There are {c} {t}. | no
  - {n} buys {a} bags. Each bag holds {b} {t}. | How many {t} does {n} have? | {n} has {c} {t}. | yes
""")
MORE = {"+": "Then {n} finds {d} more {t}.", "-": "Then {n} loses {d} {t}."}


def draw_problem(rng: Random, split: str) -> Problem:
    """Return a plain sum or a word problem of one or two steps, all of them on `split`."""
    steps = [draw_step(rng, split)]
    chance = rng.random()
    if chance < 0.3:
        steps += _second(rng, steps[0])
    if rng.random() < 0.5:
        expression = " ".join([str(steps[0]), *(f"{step.operation} {step.right}" for step in steps[1:])])
        question = pick(rng, PLAIN).format(e=expression)
        return Problem(question, f"{expression} = {steps[-1].result}.", tuple(steps))
    scene, question, sentence, open_ended = pick(rng, STORIES[steps[0].operation])
    if open_ended == "no":
        steps = steps[:1]
    name = pick(rng, FIRST_NAMES)
    other = pick(rng, FIRST_NAMES)
    while other == name:
        other = pick(rng, FIRST_NAMES)
    slots = {"n": name, "m": other, "t": pick(rng, lexicon.THINGS), "a": steps[0].left, "b": steps[0].right}
    parts = [scene, *(MORE[step.operation] for step in steps[1:]), question]
    slots["d"] = steps[-1].right
    text = " ".join(parts).format(**slots)
    return Problem(text, sentence.format(c=steps[-1].result, **slots), tuple(steps))


def _second(rng: Random, first: Step) -> list[Step]:
    """Return an easy step that goes on from `first`, if one stays within the limits."""
    second = Step(first.result, pick(rng, "+-"), rng.randint(2, 9))
    return [second] if 0 < second.result <= LIMIT[first.operation] else []


def document(rng: Random, split: str) -> str:
    """Return a document of the `math` source: problems with solutions, or rows of plain equations."""
    if rng.random() < 0.45:
        steps = [draw_step(rng, split) for _ in range(rng.randint(8, 20))]
        if rng.random() < 0.5:
            return "\n".join(f"{step} = {step.result}" for step in steps)
        return "\n".join(f"{step} = {step.result}. Steps: {step.work()}" for step in steps[:9])
    blocks = []
    for _ in range(rng.randint(3, 5)):
        problem = draw_problem(rng, split)
        steps_shown = (
            f"Solution: {problem.trace} {problem.sentence}" if rng.random() < 0.7 else problem.sentence
        )
        blocks.append(f"Problem: {problem.question}\n{steps_shown}\nAnswer: {problem.answer}")
    return "\n\n".join(blocks)
