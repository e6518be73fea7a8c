"""How much data is enough? A saturating power law through measured shares, with intervals, and where it flattens.

    share(n) = max(0, ceiling - gap * n^-exponent)

n counts demonstrations, comparisons or prompts. The three numbers are fitted by least squares, each point weighted by
its precision, over a grid of all of them: few points and a curve that may be flat at either end are what makes gradient
fits run away. Intervals are from resampling the measurements themselves (binomial, parametric bootstrap), so they are
about the questions asked, and about seeds only where several were run. `enough` is the n at which 95 % of the ceiling
is reached; past the measured range it is an extrapolation, and is said to be one.

Main failure mode: believing the ceiling of a curve that has not begun to bend. The interval of `ceiling` shows that.

Sources: Hestness et al., arXiv 1712.00409 (saturating power law); arXiv 2410.03717 (post-training follows one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 300
_ENOUGH = 0.95


@dataclass(frozen=True)
class PowerLaw:
    """share(n) = max(0, ceiling - gap * n^-exponent), with 95 % intervals of what was fitted.

    Attributes:
        intervals: of ceiling, exponent and enough, by name.
        band: (low, high) of the curve at each of the measured n, and at `curve_at`.
        enough: n that reaches 95 % of the ceiling; infinite where the curve is flat and low.
        error: root mean square of the residuals, in shares.
    """

    ceiling: float
    gap: float
    exponent: float
    enough: float
    error: float
    intervals: dict[str, tuple[float, float]]
    curve: list[tuple[float, float]]
    band: list[tuple[float, float]]

    def __call__(self, n: float) -> float:
        """Return the fitted share at n."""
        return max(0.0, self.ceiling - self.gap * n**-self.exponent)


def fit_power_law(
    sizes: Sequence[float], shares: Sequence[float], counts: Sequence[int], seed: int = 0
) -> PowerLaw:
    """Fit shares of `counts` questions measured at `sizes`.

    Args:
        sizes: n of each point, at least three different ones, all positive.
        shares: what was measured, 0 to 1.
        counts: questions behind each share.

    Raises:
        ValueError: fewer than three sizes, which three numbers cannot be fitted to.
    """
    n, y, m = (np.asarray(values, dtype=float) for values in (sizes, shares, counts))
    if len(set(sizes)) < 3 or n.min() <= 0:
        raise ValueError(f"a power law needs three different positive sizes, got {sorted(set(sizes))}")
    # A share of 0 or 1 is not known without error: half a question either way, as in Agresti and Coull.
    smoothed = (y * m + 1) / (m + 2)
    weights = m / (smoothed * (1 - smoothed))
    ceilings, exponents = np.linspace(0.02, 1.0, 50), np.geomspace(0.05, 3.0, 30)
    # The gap is told by the share that the curve would have at the smallest size, which may lie below 0.
    starts = np.linspace(-3.0, 1.0, 41)
    ceiling, start, exponent = (
        grid.ravel() for grid in np.meshgrid(ceilings, starts, exponents, indexing="ij")
    )
    kept = start <= ceiling
    ceiling, start, exponent = ceiling[kept], start[kept], exponent[kept]
    gap = (ceiling - start) * n.min() ** exponent
    predicted = np.clip(ceiling[:, None] - gap[:, None] * n ** -exponent[:, None], 0, None)
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(m.astype(int), np.clip(y, 0, 1), size=(_RESAMPLES, len(n))) / m
    squares = (predicted**2) @ weights
    chosen = [
        int((squares - 2 * predicted @ (weights * target)).argmin())
        for target in np.concatenate([[y], drawn])
    ]
    best, others = chosen[0], np.array(chosen[1:])
    enough = _enough(ceiling, gap, exponent)
    at = np.geomspace(n.min(), n.max(), 40)
    curves = np.clip(ceiling[others, None] - gap[others, None] * at ** -exponent[others, None], 0, None)
    low, high = np.quantile(curves, (0.025, 0.975), axis=0)

    def interval(values: np.ndarray) -> tuple[float, float]:
        return float(np.quantile(values[others], 0.025)), float(np.quantile(values[others], 0.975))

    middle = np.clip(ceiling[best] - gap[best] * at ** -exponent[best], 0, None)
    return PowerLaw(
        float(ceiling[best]),
        float(gap[best]),
        float(exponent[best]),
        float(enough[best]),
        float(np.sqrt(np.mean((predicted[best] - y) ** 2))),
        {"ceiling": interval(ceiling), "exponent": interval(exponent), "enough": interval(enough)},
        list(zip(at.tolist(), middle.tolist())),
        list(zip(low.tolist(), high.tolist())),
    )


def _enough(ceiling: np.ndarray, gap: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Return where gap * n^-exponent = (1 - 0.95) * ceiling."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(gap > 0, (gap / ((1 - _ENOUGH) * ceiling)) ** (1 / exponent), 1.0)


def about(name: str, unit: str, law: PowerLaw, sizes: Sequence[float]) -> str:
    """Say what a fit shows, and whether it reaches beyond what was measured."""
    low, high = law.intervals["enough"]
    where = f"{_count(law.enough)} {unit} ({_count(low)} to {_count(high)})"
    beyond = ", which is beyond what was measured: an extrapolation" if law.enough > max(sizes) else ""
    bottom, top = law.intervals["ceiling"]
    return (
        f"{name}: rises to {100 * law.ceiling:.0f} % ({100 * bottom:.0f} to {100 * top:.0f}); 95 % of that takes "
        f"{where}{beyond}."
    )


def _count(number: float) -> str:
    if not math.isfinite(number) or number > 1e9:
        return "more than 1e9"
    return f"{number:,.0f}" if number < 1000 else f"{float(f'{number:.2g}'):,.0f}"
