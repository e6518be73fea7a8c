"""Arithmetic coding under a language model: text as the shortest string of bits from which the model gives it back.

A model that predicts a text well needs few bits for it: sum of -log2 p(token), and at most a few more for the whole
message. The code is a number in [0, 1): every token narrows the interval to its share of it. Evaluations only need the
ideal length (`ideal_bits`); the coder is here to show that the length can be had, and that the model decodes it.

Probabilities are rounded to whole counts, at least 1, so that no token is impossible. Encoder and decoder must compute
the same counts: the same weights, on the same machine, by the same calls.

Source: Witten, Neal, Cleary 1987, "Arithmetic coding for data compression".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

_STATE_BITS, _COUNT_BITS = 48, 24
_WHOLE = 1 << _STATE_BITS
_HALF, _QUARTER = _WHOLE >> 1, _WHOLE >> 2

Distribution = Callable[[Sequence[int]], np.ndarray]
"""From the tokens so far to the (V,) probabilities of the next."""


def ideal_bits(logprobs: Sequence[float]) -> float:
    """Return the bits that tokens with these log-probabilities (nats) take: -sum / ln 2."""
    return -sum(logprobs) / math.log(2)


def encode(token_ids: Sequence[int], distribution: Distribution) -> list[int]:
    """Return the bits (0 and 1) that `decode` turns back into `token_ids`."""
    low, high, waiting = 0, _WHOLE - 1, 0
    bits: list[int] = []

    def emit(bit: int) -> None:
        nonlocal waiting
        bits.append(bit)
        bits.extend([1 - bit] * waiting)
        waiting = 0

    for place, token in enumerate(token_ids):
        low, high = _narrowed(low, high, _ends(distribution(token_ids[:place])), token)
        while True:
            if high < _HALF:
                emit(0)
            elif low >= _HALF:
                emit(1)
                low, high = low - _HALF, high - _HALF
            elif low >= _QUARTER and high < 3 * _QUARTER:
                # Both ends close in on the middle: which half it will be is said by the next bit that is known.
                waiting += 1
                low, high = low - _QUARTER, high - _QUARTER
            else:
                break
            low, high = 2 * low, 2 * high + 1
    waiting += 1
    emit(0 if low < _QUARTER else 1)
    return bits


def decode(bits: Sequence[int], count: int, distribution: Distribution) -> list[int]:
    """Return the `count` tokens that `encode` made `bits` from."""
    stream = iter(bits)
    value = 0
    for _ in range(_STATE_BITS):
        value = 2 * value + next(stream, 0)
    low, high = 0, _WHOLE - 1
    token_ids: list[int] = []
    while len(token_ids) < count:
        ends = _ends(distribution(token_ids))
        scaled = ((value - low + 1) * int(ends[-1]) - 1) // (high - low + 1)
        token = int(np.searchsorted(ends, scaled, side="right")) - 1
        token_ids.append(token)
        low, high = _narrowed(low, high, ends, token)
        while True:
            if high < _HALF:
                shift = 0
            elif low >= _HALF:
                shift = _HALF
            elif low >= _QUARTER and high < 3 * _QUARTER:
                shift = _QUARTER
            else:
                break
            low, high, value = (
                2 * (low - shift),
                2 * (high - shift) + 1,
                2 * (value - shift) + next(stream, 0),
            )
    return token_ids


def _ends(probabilities: np.ndarray) -> np.ndarray:
    """Return (V + 1,) ends of the tokens' parts of a line, whole numbers from 0."""
    counts = np.floor(probabilities.astype(np.float64) * (1 << _COUNT_BITS)).astype(np.int64) + 1
    return np.concatenate([[0], np.cumsum(counts)])


def _narrowed(low: int, high: int, ends: np.ndarray, token: int) -> tuple[int, int]:
    """Return the part of [low, high] that belongs to `token`."""
    width, total = high - low + 1, int(ends[-1])
    return low + width * int(ends[token]) // total, low + width * int(ends[token + 1]) // total - 1
