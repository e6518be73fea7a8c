"""The coder against what it must do: give the text back, in no more bits than the model's surprise and a few."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nurture.evals.arithmetic_code import decode, encode, ideal_bits
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer


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
