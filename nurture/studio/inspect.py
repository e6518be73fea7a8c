"""What the model thought at each token of a text: its probability, the alternatives, the entropy, what sampling cuts.

One forward pass scores a whole text. For one place in it `candidates` shows the next-token distribution as sampling
sees it: the model's own probability of each token, the probability after temperature and truncation, and whether
top-k, top-p or min-p rule it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nurture.inference.sampling import SamplingParams, truncate
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer

_CHUNK = 256
"""Positions whose logits are in memory at once."""


@dataclass(frozen=True)
class Scored:
    """One token of a text.

    Attributes:
        logprob: nats, given all tokens before; None for the first, before which there is nothing.
        entropy: nats, of the distribution it was predicted from; None for the first.
        rank: tokens that were likelier; None for the first.
        top: the likeliest tokens in its place with their logprobs.
    """

    logprob: float | None = None
    entropy: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def score_tokens(model: Transformer, token_ids: Sequence[int], top: int = 0) -> list[Scored]:
    """Score every token of a text; `top` is how many alternatives to report."""
    scored = [Scored()]
    if len(token_ids) < 2:
        return scored[: len(token_ids)]
    ids = torch.tensor([list(token_ids)], device=model.embedding.weight.device)
    hidden_TD = model.hidden_states(ids)[0, :-1]
    for start in range(0, len(hidden_TD), _CHUNK):
        logprobs = _log_softmax(hidden_TD[start : start + _CHUNK], model)
        following = ids[0, start + 1 : start + 1 + len(logprobs), None]
        own = logprobs.gather(1, following)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        ranks = (logprobs > own).sum(-1)
        values, alternatives = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        for row in range(len(logprobs)):
            pairs = zip(alternatives[row].tolist(), values[row].tolist(), strict=True)
            scored.append(Scored(float(own[row]), float(entropies[row]), int(ranks[row]), tuple(pairs)))
    return scored


def _log_softmax(hidden: Tensor, model: Transformer) -> Tensor:
    return torch.nn.functional.linear(hidden, model.output_weight).float().log_softmax(-1)


@torch.inference_mode()
def candidates(
    model: Transformer, tokenizer: Tokenizer, token_ids: Sequence[int], params: SamplingParams, count: int
) -> dict[str, Any]:
    """Return the distribution of the token after `token_ids`, the `count` likeliest tokens one by one.

    Returns:
        entropy (nats, of the model itself), effective (exp of it: so many equally likely tokens would be as open),
        kept (tokens that sampling may choose), kept_mass (their probability before renormalising, after temperature),
        and candidates: token, text, probability (model), sampled (after temperature and truncation), cut by which rule.
    """
    ids = torch.tensor([list(token_ids)], device=model.embedding.weight.device)
    logprobs = _log_softmax(model.hidden_states(ids)[0, -1:], model)
    tempered = logprobs / params.temperature if params.temperature else logprobs
    if params.temperature == 0:
        kept = torch.full_like(logprobs, -torch.inf)
        kept[0, logprobs[0].argmax()] = 0.0
    else:
        kept = truncate(tempered, params)
    sampled, before = kept.softmax(-1)[0], tempered.softmax(-1)[0]
    entropy = float(-(logprobs.exp() * logprobs).sum())
    values, order = logprobs[0].topk(min(count, logprobs.shape[-1]))
    rules = _cut_by(tempered, params)
    return {
        "entropy": entropy,
        "effective": math.exp(entropy),
        "kept": int(torch.isfinite(kept).sum()),
        "kept_mass": float(before[torch.isfinite(kept[0])].sum()),
        "vocabulary": logprobs.shape[-1],
        "candidates": [
            {
                "token": token,
                "text": token_text(tokenizer, token),
                "probability": math.exp(value),
                "sampled": float(sampled[token]),
                "cut": next((name for name, mask in rules if not mask[token]), None),
            }
            for token, value in zip(order.tolist(), values.tolist(), strict=True)
        ],
    }


def _cut_by(tempered: Tensor, params: SamplingParams) -> list[tuple[str, Tensor]]:
    """Return for every rule in force, in the order they are applied, which tokens it leaves (V,)."""
    if params.temperature == 0:
        best = torch.zeros_like(tempered[0], dtype=torch.bool)
        best[tempered[0].argmax()] = True
        return [("temperature 0", best)]
    rules: list[tuple[str, Tensor]] = []
    so_far = tempered
    for name, rule in (
        ("top-k", {"top_k": params.top_k}),
        ("top-p", {"top_p": params.top_p}),
        ("min-p", {"min_p": params.min_p}),
    ):
        one = SamplingParams(**rule)  # type: ignore[arg-type]
        if one.truncates:
            so_far = truncate(so_far, one)
            rules.append((name, torch.isfinite(so_far[0])))
    return rules


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; part of a character as U+FFFD."""
    return tokenizer.decode([token])
