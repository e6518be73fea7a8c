"""A simulated labeler: ranks answers by the gold reward, with ties, and as unsure as InstructGPT's labelers were.

Each answer makes an impression, its gold reward divided by a temperature plus noise of its own (Gumbel), and answers
whose impressions lie within a threshold of the best of their group are ranked equal. So the difference of two
impressions is logistic, and a pair is ordered or tied with the probabilities of Rao and Kupper's model at
d = (gold_i - gold_j) / temperature: the truth behind the reward model's loss is known. (With three or more answers a
group is held together by its best answer, which makes a few more or fewer ties than pairs on their own would have.)

The temperature is not guessed: `calibrate` finds the one at which two such labelers agree on 73 % of the pairs that
both order, as InstructGPT's did (72.6 +- 1.5 %), on the very answers that are to be ranked. Nothing here knows the
world: whoever has gold rewards can have them ranked.

Sources: InstructGPT, arXiv 2203.02155, section 3.4; Rao and Kupper 1967.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from nurture.data.rankings import Agreement, agreement

INSTRUCTGPT_AGREEMENT = 0.73
"""Share of pairs on which two labelers said the same."""


@dataclass(frozen=True)
class Labeler:
    """How unsure a labeler is.

    Attributes:
        temperature: difference of gold rewards that makes odds of e to 1; 0 for a labeler without doubt.
        tie_threshold: differences of impressions up to this (in log odds) are ties. Equally good answers are tied with
            probability tanh(tie_threshold / 2): 0.5 gives 24 %.
    """

    temperature: float
    tie_threshold: float = 0.5

    def rank(self, golds: Sequence[float], rng: Random) -> tuple[tuple[int, ...], ...]:
        """Return groups of indices, best first."""
        if self.temperature > 0:
            impressions = [gold / self.temperature + _gumbel(rng) for gold in golds]
            threshold = self.tie_threshold
        else:
            impressions, threshold = list(golds), 0.0
        groups: list[list[int]] = []
        for index in sorted(range(len(golds)), key=lambda i: (-impressions[i], i)):
            if groups and impressions[groups[-1][0]] - impressions[index] <= threshold:
                groups[-1].append(index)
            else:
                groups.append([index])
        return tuple(tuple(sorted(group)) for group in groups)


def _gumbel(rng: Random) -> float:
    return -math.log(-math.log(1.0 - rng.random() or 0.5))


def calibrate(
    gold_sets: Sequence[Sequence[float]],
    agreement_wanted: float = INSTRUCTGPT_AGREEMENT,
    tie_threshold: float = 0.5,
) -> Labeler:
    """Return the labeler who agrees with another like him on so many of the pairs that both order.

    Args:
        gold_sets: gold rewards of the answers to each prompt; some hundred sets give a steady result.
        agreement_wanted: 0.5 to 1; 1 is a labeler without doubt. Where answers are so alike that so much agreement
            cannot be had, the labeler is nearly without doubt.
    """
    if agreement_wanted >= 1:
        return Labeler(0.0, tie_threshold)
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(20):
        labeler = Labeler(math.exp((low + high) / 2), tie_threshold)
        if measured_agreement(labeler, gold_sets, Random(0)).ordered > agreement_wanted:
            low = math.log(labeler.temperature)
        else:
            high = math.log(labeler.temperature)
    return Labeler(math.exp(low), tie_threshold)


def measured_agreement(labeler: Labeler, gold_sets: Sequence[Sequence[float]], rng: Random) -> Agreement:
    """Let two such labelers rank the same answers and compare them."""
    return agreement((labeler.rank(golds, rng), labeler.rank(golds, rng)) for golds in gold_sets)
