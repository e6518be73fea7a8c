"""Which things a model may see in training, and randomness that is a pure function of its name.

Everything in the world is drawn from `random_for(seed, what, ...)`, so a document or a task depends on nothing
but its own address: not on the order of calls, the process or Python's hash seed. Problem instances, functions,
sentences and prompts are split by `split_of`, a rule on their content, so the same instance is on the same side
in every source and for every world seed. (People are split by the world itself, see `facts.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from hashlib import blake2b
from random import Random
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]
HELD_OUT_SHARE = 0.15
"""Share of instances kept out of every train document and train task."""

T = TypeVar("T")


def stable_hash(*parts: object) -> int:
    """Return 64 bits that depend on `parts` alone (as text), in any process."""
    return int.from_bytes(blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def random_for(*parts: object) -> Random:
    """Return a fresh random generator named by `parts`."""
    return Random(stable_hash(*parts))


def pick(rng: Random, choices: Sequence[T]) -> T:
    """Return one of `choices`; the same as `rng.choice`, but faster, which matters at 5,000 documents a second."""
    return choices[int(rng.random() * len(choices))]


@lru_cache(maxsize=200_000)
def split_of(*instance: Hashable) -> Split:
    """Return the side an instance is on, by a rule on its content."""
    return "heldout" if stable_hash("held out", *instance) % 1000 < 1000 * HELD_OUT_SHARE else "train"


def draw(rng: Random, split: str, make: Callable[[Random], T], key: Callable[[T], Hashable]) -> T:
    """Draw from `make` until the drawn instance lies on `split`.

    Raises:
        RuntimeError: nothing on that side turned up, so the family of instances is too small to be split.
    """
    for _ in range(2000):
        instance = make(rng)
        if split_of(key(instance)) == split:
            return instance
    raise RuntimeError(f"no {split} instance found with {make}")
