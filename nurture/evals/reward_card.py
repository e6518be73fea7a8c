"""The reward model's report card, on held-out comparisons: is it good enough to be trained against?

`pair_accuracy` is the share of ordered pairs on which the reward model sides with the labeler (`pair_accuracy/SOURCE`
where there are several). Labelers err, so it cannot reach 1: `pair_ceiling` is what the gold reward itself scores
against the same labels (equal golds count half), where gold is known. `tie_accuracy` shows a tied and an ordered pair
and asks which is the tie, the one with the smaller difference of rewards (chance 1/2); `tie_ceiling` is gold's.
`calibration_error` is the mean distance between what the model gives as the probability that the first answer is
preferred and how often it is. Length is what reward models are fooled by: `longer_preferred` is how often the longer of
two answers has the higher reward, to be read beside how often the labelers preferred it.

Pairs of a prompt share answers and are not independent: intervals are from resampling prompts, not pairs.

Sources: InstructGPT, arXiv 2203.02155, sections 3.4, 3.5; calibration: Guo et al., arXiv 1706.04599; length: Singhal
et al., arXiv 2310.03716.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nurture.data.comparisons import Comparison, pairs_of
from nurture.evals.measure import Measure
from nurture.losses.reward import TIE_MODELS, TieModel

_RESAMPLES = 200
_BINS = 10


@dataclass
class RewardCard:
    """Measures by name, and tables for the result: calibration by bin, rewards by length."""

    measures: dict[str, Measure] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pairs:
    """All pairs of all comparisons, as arrays over pairs; the first answer is the better one unless tied."""

    comparison: np.ndarray
    tied: np.ndarray
    difference: np.ndarray
    gold: np.ndarray | None
    longer: np.ndarray
    """1 where the first answer is the longer one, -1 where the second is, 0 where they are as long."""


def reward_card(
    comparisons: Sequence[Comparison],
    rewards: Sequence[Sequence[float]],
    golds: Sequence[Sequence[float]] | None = None,
    *,
    ties: TieModel,
    tie_threshold: float,
) -> RewardCard:
    """Measure rewards against a labeler's rankings.

    Args:
        comparisons: held out.
        rewards: of every answer of every comparison.
        golds: the same of the gold reward, where it is known.
        ties: how the model was trained on ties; its probabilities are those of that model.
        tie_threshold: alpha of that model.
    """
    pairs = _all_pairs(comparisons, rewards, golds)
    count, ordered = len(comparisons), ~pairs.tied
    card = RewardCard()

    def add(name: str, scores: np.ndarray, chosen: np.ndarray) -> None:
        if chosen.any():
            card.measures[name] = _resampled(
                lambda w: np.average(scores, weights=w), chosen, pairs.comparison, count
            )

    def add_ties(name: str, difference: np.ndarray) -> None:
        if pairs.tied.any() and ordered.any():
            everything = np.ones_like(pairs.tied)
            closeness = -np.abs(difference)
            card.measures[name] = _resampled(
                lambda w: _two_choices(closeness, pairs.tied, w), everything, pairs.comparison, count
            )

    add("pair_accuracy", _sides_with(pairs.difference), ordered)
    source_of = np.array([comparison.source for comparison in comparisons])[pairs.comparison]
    for source in sources if len(sources := dict.fromkeys(source_of.tolist())) > 1 else ():
        add(f"pair_accuracy/{source}", _sides_with(pairs.difference), ordered & (source_of == source))
    if pairs.gold is not None:
        add("pair_ceiling", _sides_with(pairs.gold), ordered)
        known = pairs.gold != 0
        add("gold_accuracy", _sides_with(pairs.difference * np.sign(pairs.gold)), known)
    add_ties("tie_accuracy", pairs.difference)
    if pairs.gold is not None:
        add_ties("tie_ceiling", pairs.gold)
    uneven = ordered & (pairs.longer != 0)
    add("longer_preferred", _sides_with(pairs.difference * pairs.longer), uneven)
    add("longer_preferred_labels", _sides_with(pairs.longer), uneven)
    probability = _probability_preferred(pairs.difference, ties, tie_threshold)
    error, bins = _calibration(probability[ordered], pairs.comparison[ordered])
    card.measures["calibration_error"] = Measure(error, int(ordered.sum()))
    card.tables["calibration"] = bins
    card.tables["length"] = _by_length(comparisons, rewards, golds)
    return card


def _all_pairs(
    comparisons: Sequence[Comparison],
    rewards: Sequence[Sequence[float]],
    golds: Sequence[Sequence[float]] | None,
) -> _Pairs:
    rows: list[tuple[float, ...]] = []
    for number, (comparison, reward) in enumerate(zip(comparisons, rewards, strict=True)):
        gold = golds[number] if golds is not None else [0.0] * len(reward)
        lengths = [len(answer) for answer in comparison.answers]
        for first, second, tied, _ in pairs_of(comparison):
            longer = (lengths[first] > lengths[second]) - (lengths[first] < lengths[second])
            rows.append((number, tied, reward[first] - reward[second], gold[first] - gold[second], longer))
    number_of, tied_of, difference, gold_difference, longer_of = np.array(rows, dtype=np.float64).T
    return _Pairs(
        number_of.astype(int),
        tied_of.astype(bool),
        difference,
        gold_difference if golds is not None else None,
        longer_of,
    )


def _sides_with(difference: np.ndarray) -> np.ndarray:
    """Return 1 where the first answer is preferred, 0 where the second is, 1/2 where neither."""
    return (np.sign(difference) + 1) / 2


def _resampled(
    statistic: Callable[[np.ndarray], float], chosen: np.ndarray, comparison: np.ndarray, count: int
) -> Measure:
    """Return a statistic of weighted pairs with its interval from resampling comparisons.

    Args:
        statistic: takes a weight a pair.
        chosen: which pairs count.
        comparison: number of the comparison that each pair is from, below `count`.
    """
    random = np.random.default_rng(0)
    draws = []
    for _ in range(_RESAMPLES):
        weights = np.bincount(random.integers(0, count, count), minlength=count)[comparison] * chosen
        if weights.any():
            try:
                draws.append(float(statistic(weights)))
            except ZeroDivisionError:  # a sample without a tie
                continue
    low, high = np.percentile(draws, [2.5, 97.5]) if draws else (None, None)
    return Measure(float(statistic(chosen.astype(float))), int(chosen.sum()), low, high)


def _two_choices(closeness: np.ndarray, tied: np.ndarray, weights: np.ndarray) -> float:
    """Return how often a tied pair is closer than an ordered one (half for equal): the area under the ROC curve."""
    values, place = np.unique(closeness, return_inverse=True)
    positive = np.bincount(place, weights * tied, len(values))
    negative = np.bincount(place, weights * ~tied, len(values))
    total = positive.sum() * negative.sum()
    if not total:
        raise ZeroDivisionError
    below = np.cumsum(negative) - negative
    return float(positive @ (below + negative / 2) / total)


def _probability_preferred(difference: np.ndarray, ties: TieModel, threshold: float) -> np.ndarray:
    """Return the probability that the first answer is preferred, given that they are not tied."""
    model = TIE_MODELS[ties]
    differences = torch.from_numpy(difference).double()
    better, worse = model(differences, threshold)[0], model(-differences, threshold)[0]
    return torch.softmax(torch.stack((better, worse)), 0)[0].numpy()


def _calibration(probability: np.ndarray, comparison: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error and its bins. The preferred answer is the first in every pair."""
    # Half of the pairs are turned around (by their place), or "preferred" would be the answer to everything.
    turned = np.arange(len(probability)) % 2 == 1
    said, happened = np.where(turned, 1 - probability, probability), (~turned).astype(float)
    place = np.minimum((said * _BINS).astype(int), _BINS - 1)
    bins, error = [], 0.0
    for number in range(_BINS):
        here = place == number
        if here.any():
            bins.append(
                {
                    "said": float(said[here].mean()),
                    "happened": float(happened[here].mean()),
                    "n": int(here.sum()),
                }
            )
            error += here.mean() * abs(bins[-1]["said"] - bins[-1]["happened"])
    return float(error), bins


def _by_length(
    comparisons: Sequence[Comparison],
    rewards: Sequence[Sequence[float]],
    golds: Sequence[Sequence[float]] | None,
) -> list[dict[str, float]]:
    """Return mean reward (and gold) of answers by length, in fifths of the answers.

    Both are relative to the mean of their prompt's answers, so that prompts that ask for long answers do not count.
    """
    lengths, relative, relative_gold = [], [], []
    for number, (comparison, reward) in enumerate(zip(comparisons, rewards, strict=True)):
        lengths += [len(answer) - comparison.prompt_tokens for answer in comparison.answers]
        relative += [value - sum(reward) / len(reward) for value in reward]
        if golds is not None:
            relative_gold += [value - sum(golds[number]) / len(reward) for value in golds[number]]
    order = np.argsort(lengths, kind="stable")
    table = []
    for part in np.array_split(order, 5):
        if len(part):
            row = {
                "tokens": float(np.mean(np.take(lengths, part))),
                "reward": float(np.mean(np.take(relative, part))),
            }
            if golds is not None:
                row["gold"] = float(np.mean(np.take(relative_gold, part)))
            table.append(row | {"n": len(part)})
    return table
