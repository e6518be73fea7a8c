"""Best of n by hand: its KL, and the mean over all choices."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from nurture.evals.best_of_n import best_of_n, best_of_n_kl


def test_kl():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


def test_mean_over_all_choices():
    proxy, gold = np.array([[0.3, 0.9, -1.0, 0.5]]), np.array([[1.0, 2.0, 3.0, 4.0]])
    for n in (1, 2, 3, 4):
        chosen = [gold[0][max(c, key=lambda i: proxy[0][i])] for c in combinations(range(4), n)]
        assert best_of_n(proxy, gold, n)[0] == pytest.approx(np.mean(chosen))
