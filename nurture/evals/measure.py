"""A measured number with its interval, and the before/after table entry made of two.

Rates get Wilson's 95 % interval, which stays inside [0, 1] and is honest at 0 and 1 where the textbook interval has no
width. Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Measure:
    """A number from `n` observations; `low` and `high` bound it with 95 % confidence where that is known."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


def rate(outcomes: Sequence[float]) -> Measure:
    """Return the share of true outcomes with Wilson's interval; 0 of 0 is 0 with no information. Ties count as 0.5."""
    n, successes = len(outcomes), sum(outcomes)
    if n == 0:
        return Measure(0.0, 0, 0.0, 1.0)
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 of n and n of n the bound is exactly 0 or 1; rounding must not say otherwise.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Measure(share, n, low, high)


def before_and_after(
    before: Mapping[str, Measure], after: Mapping[str, Measure]
) -> dict[str, dict[str, float | int]]:
    """Return the `metrics` of a stage's result.json: before, after, and the latter's interval and n."""
    table: dict[str, dict[str, float | int]] = {}
    for name, measure in after.items():
        entry: dict[str, float | int] = {}
        if name in before:
            entry["before"] = round(before[name].value, 6)
        entry["after"] = round(measure.value, 6)
        if measure.low is not None and measure.high is not None:
            entry |= {"low": round(measure.low, 6), "high": round(measure.high, 6)}
        entry["n"] = measure.n
        table[name] = entry
    return table
