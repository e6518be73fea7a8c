"""A measured number with its interval, the difference of two, and the before/after table entry made of them.

Rates get Wilson's 95 % interval, which stays inside [0, 1] and is honest at 0 and 1 where the textbook interval has no
width. A difference is measured on the same items where their outcomes are known: resampling items together (paired
bootstrap) keeps what easy and hard items do to both out of the interval. Otherwise the two intervals are combined by
Newcombe's square-and-add rule, as if the items were different ones, which is wider. Over several runs the spread
between runs gives the interval: it holds for a new seed, which no interval within one run does.

Sources: Wilson 1927, "Probable inference, the law of succession, and statistical inference"; Newcombe 1998, "Interval
estimation for the difference between independent proportions", method 10; Efron and Tibshirani 1993, chapter 13; Kish
1965, "Survey sampling" (outcomes in groups).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev, stdev

import numpy as np

Z_95 = 1.959963984540054
_RESAMPLES = 4000
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a 95 % interval, by degrees of freedom from 1."""


@dataclass(frozen=True)
class Measure:
    """A number from `n` observations; `low` and `high` bound it with 95 % confidence where that is known.

    `outcomes` are the observations one by one, in the order of the items, so that another measure of the same items can
    be compared with this one.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    outcomes: Sequence[float] | None = field(default=None, repr=False, compare=False)

    def as_data(self) -> dict[str, float | int | None]:
        """Return the measure as plain data, without its outcomes."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def percent(self) -> str:
        """Return a share for a sentence: `54 % (43 to 62)`."""
        return f"{100 * self.value:.0f} % ({100 * (self.low or 0):.0f} to {100 * (self.high or 0):.0f})"

    def side(self, above: str, below: str, neither: str) -> str:
        """Return the word for where a difference is: clearly above 0, clearly below, or neither."""
        return above if (self.low or 0) > 0 else below if (self.high or 0) < 0 else neither


def rate(outcomes: Sequence[float]) -> Measure:
    """Return the share of true outcomes with Wilson's interval; 0 of 0 is 0 with no information. Ties count as 0.5."""
    n, successes = len(outcomes), sum(outcomes)
    if n == 0:
        return Measure(0.0, 0, 0.0, 1.0)
    share = successes / n
    return Measure(share, n, *wilson(share, n), outcomes=tuple(map(float, outcomes)))


def rate_of_groups(groups: Sequence[Sequence[float]]) -> Measure:
    """Return the share of true outcomes that come in groups, such as the tokens of a reply; none of them empty.

    Outcomes of one group are alike, so that they tell less than as many independent ones. The interval is Wilson's for
    as many independent outcomes as would scatter like the groups do (Kish's effective sample size, from the linearised
    variance of a ratio), at most as many as there are.
    """
    n, successes = sum(map(len, groups)), sum(map(sum, groups))
    if n == 0:
        return Measure(0.0, 0, 0.0, 1.0)
    share, many = successes / n, len(groups)
    scatter = sum((sum(group) - share * len(group)) ** 2 for group in groups)
    # Groups that do not scatter at all (one group, or a share of 0 or 1) vouch for no more than their number.
    spread = scatter * many / (many - 1) if many > 1 else 0.0
    effective = share * (1 - share) * n * n / spread if spread else many
    return Measure(share, n, *wilson(share, min(max(effective, 1), n)))


def mean(values: Sequence[float]) -> Measure:
    """Return the mean with its normal 95 % interval."""
    n = len(values)
    if n == 0:
        return Measure(0.0, 0)
    centre = fmean(values)
    half = Z_95 * pstdev(values) / max(n - 1, 1) ** 0.5
    return Measure(centre, n, centre - half, centre + half, outcomes=tuple(values))


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `n`."""
    z2 = Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 of n and n of n the bound is exactly 0 or 1; rounding must not say otherwise.
    return 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half


def difference(before: Measure, after: Measure) -> Measure:
    """Return `after` minus `before` with its 95 % interval, none where neither outcomes nor both intervals are known.

    Outcomes of the same number are taken to be of the same items, in the same order.
    """
    change = after.value - before.value
    if before.outcomes and after.outcomes and len(before.outcomes) == len(after.outcomes):
        changes = np.asarray(after.outcomes, dtype=float) - np.asarray(before.outcomes, dtype=float)
        values, counts = np.unique(changes, return_counts=True)
        # All items alike: resampling would give an interval of no width, which n items cannot justify.
        if len(values) > 1:
            drawn = np.random.default_rng(0).multinomial(len(changes), counts / len(changes), _RESAMPLES)
            low, high = np.quantile(drawn @ values / len(changes), (0.025, 0.975))
            return Measure(change, len(changes), float(low), float(high))
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Measure(change, after.n)
    low = change - math.hypot(after.value - after.low, before.high - before.value)
    high = change + math.hypot(after.high - after.value, before.value - before.low)
    return Measure(change, after.n, low, high)


def over_runs(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> Measure:
    """Return the mean of one number from several runs with Student's 95 % interval, none for a single run.

    Args:
        bounds: what the number can be, (0, 1) for a share: the interval ends there.
    """
    runs = len(values)
    if runs < 2:
        return Measure(fmean(values), runs)
    half = _student(runs - 1) * stdev(values) / math.sqrt(runs)
    low, high = fmean(values) - half, fmean(values) + half
    return Measure(fmean(values), runs, max(low, bounds[0]), min(high, bounds[1]))


def _student(freedom: int) -> float:
    """Return Student's t for a 95 % interval; past the table by its expansion in 1 / freedom, within 0.003."""
    if freedom <= len(_T_95):
        return _T_95[freedom - 1]
    second = (5 * Z_95**5 + 16 * Z_95**3 + 3 * Z_95) / (96 * freedom**2)
    return Z_95 + (Z_95**3 + Z_95) / (4 * freedom) + second


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
