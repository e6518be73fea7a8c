"""Best of n: draw n replies, keep the one the reward model likes most. The yardstick of every policy trained on it.

No training, and yet the policy moves: by exactly log n - (n - 1)/n nats from its start, if no two replies are alike
(otherwise by less: it is an upper bound). So its proxy and gold reward can be drawn over the same axis as PPO's.

From N replies to a prompt the mean over all choices of n of them is computed, not a sample of choices: with the replies
sorted by proxy reward, the k-th best is the best of a choice with probability C(N - k, n - 1) / C(N, n).

Sources: Stiennon et al., arXiv 2009.01325, appendix G.3 (KL); Nakano et al., arXiv 2112.09332, section 2.2 (estimator);
Beirami et al., arXiv 2401.01879 (the KL as a bound).
"""

from __future__ import annotations

import math

import numpy as np


def best_of_n_kl(n: int) -> float:
    """Return the KL between the best-of-n policy and the policy it draws from, nats a reply."""
    if n < 1:
        raise ValueError(f"best of n needs n of at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Return, for every prompt, the expected value of the reply with the highest proxy reward among n drawn ones.

    Args:
        proxy: (P, N) proxy rewards of N replies to each of P prompts.
        values: (P, N) what is averaged: the proxy itself, or gold.
        n: 1 to N.

    Returns:
        (P,) float64. Replies of equal proxy reward share their chances.
    """
    replies = proxy.shape[1]
    if not 1 <= n <= replies or proxy.shape != values.shape:
        raise ValueError(
            f"n must be 1 to {replies} and both arrays alike, got {n}, {proxy.shape}, {values.shape}"
        )
    chances = np.array([math.comb(replies - k, n - 1) / math.comb(replies, n) for k in range(1, replies + 1)])
    expected = np.empty(len(proxy))
    for prompt, (rewards, worth) in enumerate(zip(proxy, values, strict=True)):
        order = np.argsort(-rewards, kind="stable")
        _, group = np.unique(-rewards[order], return_inverse=True)
        sums, counts = np.bincount(group, worth[order]), np.bincount(group)
        expected[prompt] = np.bincount(group, chances) @ (sums / counts)
    return expected


def best_of_n_curve(proxy: np.ndarray, gold: np.ndarray | None) -> list[dict[str, float]]:
    """Return {"n", "kl", "proxy", "gold"} for n = 1, 2, 4 ... N: means over prompts; no gold where it is unknown."""
    curve = []
    for n in (2**power for power in range(proxy.shape[1].bit_length())):
        entry = {"n": float(n), "kl": best_of_n_kl(n), "proxy": float(best_of_n(proxy, proxy, n).mean())}
        if gold is not None:
            entry["gold"] = float(best_of_n(proxy, gold, n).mean())
        curve.append(entry)
    return curve
