"""From one row of logits to one token: temperature, the three truncations, and the draw.

Every truncation is a pure function on logits (B, V) that puts minus infinity where a token is ruled out; they are
applied in the order temperature, top-k, top-p, min-p, each renormalising what is left, as transformers does.

The draw uses ONE uniform number a row against the cumulative sum of the probabilities (inverse CDF). The uniform is a
hash of (the sequence's seed, how many tokens it has generated), so a sequence's randomness depends neither on its
neighbours in the batch nor on its place among them, and a resumed rollout repeats its choices. Drawing noise for every
vocabulary entry (`torch.multinomial`, Gumbel) costs several times the softmax; the usual case, temperature alone,
needs no sort either.

The logprob reported is that of the WHOLE vocabulary at the given temperature, log softmax(logits / temperature), which
is what a trainer computes from the same logits; a truncated, renormalised one would be a per-token bias in
importance ratios (huggingface/trl#6789). Greedy choices are scored at temperature 1.

Source: top-p arXiv 1904.09751; min-p arXiv 2407.01082; hash: splitmix64 (Steele et al., 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nurture.errors import NurtureError

_BLOCK = 64
"""Vocabulary entries a block; the draw picks a block, then a token in it, which spares a long cumulative sum."""
_TOP_P_CANDIDATES = 256
"""Most likely tokens among which top-p looks before it sorts the whole vocabulary."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Raises:
        NurtureError: a value is out of its range.
    """

    max_tokens: int = 256
    """Most tokens in a completion, the stop token included."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities sum to at least this; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one; 0 keeps all."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion; the stop token is kept as its last token. Empty: run to max_tokens."""
    seed: int = 0
    """Base of the sequences' seeds where `generate` is given none."""

    def __post_init__(self) -> None:
        for name, good, expectation in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above, and finite"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
        ):
            if not good:
                raise NurtureError(f"sampling: {name} must be {expectation}, got {getattr(self, name)}")
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in self.stop_token_ids))

    @property
    def truncates(self) -> bool:
        """Whether some tokens may be ruled out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Rule out all but the `top_k` largest logits of each row; ties with the last one stay.

    Args:
        logits: (B, V).
        top_k: at least 1; more than V keeps all.
    """
    threshold = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Rule out all but the fewest largest logits whose probabilities sum to `top_p`; ties with the last one stay.

    The nucleus is usually small, so it is looked for among the most likely few hundred tokens first.

    Args:
        logits: (B, V).
        top_p: above 0; the most likely token always stays.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    vocab_size = logits.shape[-1]
    candidates = probabilities.topk(min(_TOP_P_CANDIDATES, vocab_size), dim=-1).values
    if candidates.shape[-1] < vocab_size and bool((candidates.sum(-1) < top_p).any()):
        candidates = probabilities.sort(dim=-1, descending=True).values
    mass_before = candidates.cumsum(-1, dtype=torch.float64) - candidates
    kept = (mass_before < top_p).sum(-1, keepdim=True).clamp(min=1)
    threshold = candidates.gather(-1, kept - 1)
    return logits.masked_fill(probabilities < threshold, -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Rule out tokens less than `min_p` (in (0, 1]) times as likely as the likeliest. Shape (B, V)."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)


def truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """Apply the truncations of `params`, in transformers' order, to logits (B, V) already divided by temperature."""
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    return logits


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return, for each row, the first token whose cumulative weight exceeds `uniform` times the row's total.

    Args:
        weights: (B, V) float32, not negative, not all 0; they need not sum to 1.
        uniform: (B,) float64 in [0, 1).

    Returns:
        (B,) int64; never a token of weight 0.
    """
    rows, vocab_size = weights.shape
    if vocab_size % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, _BLOCK - vocab_size % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    block_totals = blocks.sum(-1)
    cumulative = block_totals.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True)
    block_total = block_totals.gather(-1, block)
    # How far into the block, as a fraction: the sums of the two levels may round differently.
    fraction = (target - (cumulative.gather(-1, block) - block_total)) / block_total
    inside = blocks[torch.arange(rows, device=weights.device), block.squeeze(-1)].cumsum(
        -1, dtype=torch.float64
    )
    offset = torch.searchsorted(inside, fraction.clamp_(0.0, 1.0 - 2.0**-50) * inside[:, -1:], right=True)
    return (block * _BLOCK + offset).squeeze(-1)


def sample(logits: Tensor, params: SamplingParams, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose one token a row.

    Args:
        logits: (B, V), any float dtype.
        params: temperature and truncations.
        uniform: (B,) float64 in [0, 1); unused (may be None) when greedy.

    Returns:
        (token_ids (B,) int64, logprobs (B,) float32 nats under softmax(logits / temperature), whole vocabulary).
    """
    if params.temperature not in (0.0, 1.0):
        logits = logits.float() / params.temperature
    probabilities = logits.softmax(-1, dtype=torch.float32)
    if params.temperature == 0.0:
        token_ids = _first_largest(logits)
    else:
        if uniform is None:
            raise ValueError("sampling above temperature 0 needs a uniform number a row")
        weights = probabilities
        if params.truncates:
            weights = truncate(logits.float(), params).softmax(-1)
        token_ids = inverse_cdf(weights, uniform)
    return token_ids, probabilities.gather(-1, token_ids[:, None]).squeeze(-1).log()


def alike(settings: Sequence[SamplingParams]) -> list[tuple[SamplingParams, list[int]]]:
    """Return groups of rows that can be drawn together: their settings, and which rows they are."""
    groups: dict[tuple[float, int, float, float], tuple[SamplingParams, list[int]]] = {}
    for row, params in enumerate(settings):
        how = (params.temperature, params.top_k, params.top_p, params.min_p)
        groups.setdefault(how, (params, []))[1].append(row)
    return list(groups.values())


def sample_groups(
    logits: Tensor, groups: Sequence[tuple[SamplingParams, list[int]]], uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose one token a row as `sample` does, rows of each group (from `alike`) with their own settings."""
    if len(groups) == 1:
        return sample(logits, groups[0][0], uniform)
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for params, rows in groups:
        token_ids[rows], logprobs[rows] = sample(logits[rows], params, uniform[rows])
    return token_ids, logprobs


def _first_largest(values: Tensor) -> Tensor:
    """Return argmax of (B, V), lowest index on ties; by blocks, as argmax is 20 times slower than a maximum."""
    rows, vocab_size = values.shape
    if vocab_size % _BLOCK:
        return values.argmax(-1)
    blocks = values.view(rows, -1, _BLOCK)
    block = blocks.amax(-1).argmax(-1)
    offset = blocks[torch.arange(rows, device=values.device), block].argmax(-1)
    return block * _BLOCK + offset


def sequence_seeds(seed: int, count: int) -> list[int]:
    """Return `count` unrelated 64-bit sequence seeds; the first ones do not depend on `count`."""
    with np.errstate(over="ignore"):
        base = _mix(np.asarray([seed % 2**64], dtype=np.uint64))
        return [int(value) for value in _mix(base + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))]


def uniforms(seeds: Sequence[int], start: Sequence[int], steps: int) -> Tensor:
    """Return the uniform numbers of the next `steps` tokens of each sequence.

    Args:
        seeds: one integer a sequence.
        start: tokens each sequence has generated so far.
        steps: columns.

    Returns:
        (B, steps) float64 in [0, 1), a function of (seed, index of the token in its completion) alone.
    """
    with np.errstate(over="ignore"):
        keys = _mix(np.asarray([seed % 2**64 for seed in seeds], dtype=np.uint64))
        counters = np.asarray(start, dtype=np.uint64)[:, None] + np.arange(1, steps + 1, dtype=np.uint64)
        bits = _mix(keys[:, None] + _GOLDEN * counters)
    return torch.from_numpy((bits >> np.uint64(12)).astype(np.float64) * 2.0**-52)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers one to one (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
