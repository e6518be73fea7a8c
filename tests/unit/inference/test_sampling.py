"""Truncations by hand-computed values, the draw by its frequencies, the hash by its independence of the batch."""

from __future__ import annotations

import pytest
import torch

from nurture.errors import NurtureError
from nurture.inference.sampling import (
    SamplingParams,
    inverse_cdf,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
    sequence_seeds,
    truncate,
    uniforms,
)


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_top_k_keeps_the_largest() -> None:
    assert kept(keep_top_k(torch.tensor([[1.0, 4.0, 3.0, 2.0], [9.0, 1.0, 8.0, 7.0]]), 2)) == [[1, 2], [0, 2]]


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert kept(keep_top_k(torch.zeros(1, 3), 10)) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.3, [1]), (0.5, [1]), (0.55, [1, 3]), (0.85, [0, 1, 3]), (1e-6, [1])]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(logits_of(0.15, 0.52, 0.05, 0.28), top_p)) == [expected]


def test_top_p_sorts_everything_when_the_nucleus_is_wide() -> None:
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * 0.1
    counts = keep_top_p(logits, 0.9).isfinite().sum(-1)
    ordered = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    assert counts.tolist() == ((ordered < 0.9).sum(-1) + 1).tolist()


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept(keep_min_p(logits_of(0.5, 0.24, 0.26, 0.0), 0.5)) == [[0, 2]]


@pytest.mark.parametrize("vocab_size", [5, 64, 200])
def test_inverse_cdf_picks_the_token_whose_interval_holds_the_uniform(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    weights = torch.rand(400, vocab_size, generator=generator)
    weights[weights < 0.5] = 0
    weights[:, 3] = 0.1
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    cumulative = weights.double().cumsum(-1)
    expected = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    assert torch.equal(inverse_cdf(weights, uniform), expected)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-52])
def test_inverse_cdf_never_picks_a_token_of_weight_zero_at_the_ends(uniform: float) -> None:
    weights = torch.zeros(3, 130)
    weights[0, 70], weights[1, 129], weights[2, :2] = 1e-30, 0.3, torch.tensor([0.0, 1.0])
    token_ids = inverse_cdf(weights, torch.full((3,), uniform, dtype=torch.float64))
    assert token_ids.tolist() == [70, 129, 1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.5, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=0.8, min_p=0.1, top_k=9, top_p=0.95),
    ],
    ids=str,
)
def test_frequencies_match_the_truncated_distribution(params: SamplingParams) -> None:
    draws, vocab_size = 40_000, 12
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1)).expand(draws, -1)
    uniform = uniforms(sequence_seeds(3, draws), [0] * draws, 1)[:, 0]
    token_ids, logprobs = sample(logits, params, uniform)
    counts = token_ids.bincount(minlength=vocab_size)
    expected = truncate(logits[0:1] / params.temperature, params)[0].softmax(-1) * draws
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < 35  # 11 degrees of freedom: beyond 35 less than once in 4,000, and the seed is fixed
    # The logprob reported is of the whole vocabulary, whatever was truncated.
    full = (logits / params.temperature).log_softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, full, atol=1e-5, rtol=0)


def test_what_truncation_leaves_is_renormalised() -> None:
    left = truncate(logits_of(0.6, 0.2, 0.15, 0.05).expand(4, -1), SamplingParams(top_k=2)).softmax(-1)
    torch.testing.assert_close(left[0], torch.tensor([0.75, 0.25, 0.0, 0.0]))


@pytest.mark.parametrize("vocab_size", [7, 128])
def test_greedy_takes_the_first_of_the_largest(vocab_size: int) -> None:
    logits = torch.zeros(2, vocab_size)
    logits[0, [3, 5]] = 2.0
    logits[1, vocab_size - 1] = 1.0
    token_ids, logprobs = sample(logits, SamplingParams(temperature=0.0), None)
    assert token_ids.tolist() == [3, vocab_size - 1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1))


def test_uniforms_depend_on_seed_and_index_alone() -> None:
    together = uniforms([7, 8, 9], [0, 5, 2], 4)
    assert torch.equal(uniforms([8], [6], 2)[0], together[1, 1:3])
    assert torch.equal(uniforms([9, 7], [2, 0], 4), together[[2, 0]])
    assert ((together >= 0) & (together < 1)).all()


def test_uniforms_are_uniform_across_seeds_and_along_a_sequence() -> None:
    for numbers in (uniforms(range(20_000), [0] * 20_000, 1), uniforms([5], [0], 20_000)):
        counts = numbers.flatten().mul(20).long().bincount(minlength=20)
        assert ((counts - 1000.0) ** 2 / 1000).sum() < 45  # 19 degrees of freedom
    pair = uniforms([1, 2], [0, 0], 5000)
    assert torch.corrcoef(pair)[0, 1].abs() < 0.05


def test_sequence_seeds_differ_and_do_not_depend_on_the_count() -> None:
    seeds = sequence_seeds(0, 1000)
    assert len(set(seeds)) == 1000
    assert sequence_seeds(0, 3) == seeds[:3]
    assert not set(sequence_seeds(1, 1000)) & set(seeds)
    assert uniforms([-1], [0], 1) == uniforms([2**64 - 1], [0], 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.5}, "min_p must be between 0"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, float], message: str) -> None:
    with pytest.raises(NurtureError, match=message):
        SamplingParams(**bad)  # type: ignore[arg-type]
