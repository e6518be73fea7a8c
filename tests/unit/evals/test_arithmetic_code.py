"""The ideal length of a text under a model can be had: an arithmetic coder reaches it and gives the text back.

The code is a number in [0, 1): every token narrows the interval to its share of it. Probabilities are rounded to whole
counts, at least 1, so that no token is impossible; encoder and decoder must compute the same counts.

Source: Witten, Neal, Cleary 1987, "Arithmetic coding for data compression".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nurture.evals.adaptation import ideal_bits
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer

_STATE_BITS, _COUNT_BITS = 48, 24
_WHOLE = 1 << _STATE_BITS
_HALF, _QUARTER = _WHOLE >> 1, _WHOLE >> 2

Distribution = Callable[[Sequence[int]], np.ndarray]
"""From the tokens so far to the (V,) probabilities of the next."""


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=60), st.integers(0, 2**32 - 1))
def test_what_was_encoded_comes_back(tokens: list[int], seed: int) -> None:
    """Under distributions that depend on the tokens so far, some of them almost certain of the wrong token."""

    def distribution(before: list[int]) -> np.ndarray:
        rng = np.random.default_rng([seed, len(before), *before[-2:]])
        return rng.dirichlet(np.full(5, 0.05))

    assert decode(encode(tokens, distribution), len(tokens), distribution) == tokens


def test_the_length_is_the_surprise() -> None:
    """1,000 fair bits take 1,000 bits; 1,000 tokens of probability 0.99 take 14.5 and a few."""
    rng = np.random.default_rng(0)
    fair = encode(rng.integers(0, 2, 1000).tolist(), lambda before: np.array([0.5, 0.5]))
    assert 1000 <= len(fair) <= 1003
    certain = encode([0] * 1000, lambda before: np.array([0.99, 0.01]))
    ideal = ideal_bits([math.log(0.99)] * 1000)
    assert ideal < len(certain) <= ideal + 3


def test_a_transformer_decodes_its_own_code() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, width=32, layers=2, heads=2, max_position=64)
    model = Transformer(config).eval()

    @torch.no_grad()
    def distribution(before: list[int]) -> np.ndarray:
        logits = model(torch.tensor([[1, *before]]))[0, -1]
        return logits.softmax(-1).numpy()

    tokens = [7, 3, 49, 0, 0, 12, 30, 7, 7, 21]
    bits = encode(tokens, distribution)
    assert decode(bits, len(tokens), distribution) == tokens
    with torch.no_grad():
        logprobs = model(torch.tensor([[1, *tokens[:-1]]]), labels=torch.tensor([tokens]))[0]
    assert abs(len(bits) - ideal_bits(logprobs.tolist())) <= 3
