"""How likely is a continuation? The measurement under cloze questions, multiple choice, BLiMP and lm-eval's tasks.

A text is split as lm-evaluation-harness splits it: spaces at the end of the context belong to the continuation, and
context + continuation are encoded *together*, for a token may span what a naive split would cut. Texts longer than the
model's context lose their start. Sequences are sorted by length and batched by tokens, and the head is computed at the
continuation's places only, so that a vocabulary of 49,152 costs what a continuation needs.

Source: Biderman et al., arXiv 2405.14782 (lessons of lm-evaluation-harness), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nurture.model.heads import lm_logits
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer

_BATCH_TOKENS = 4096


class Score(NamedTuple):
    """log p(continuation | context) in nats, and whether each of its tokens is the model's first choice."""

    logprob: float
    greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of what follows it; no context is the start of a document."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    if not context:
        return [tokenizer.document_token_id], tokenizer.encode(continuation)
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    return before, whole[len(before) :]


@torch.inference_mode()
def score_continuations(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Score]:
    """Return the score of each (context, continuation) of token ids, neither of them empty."""
    scores = [Score(0.0, True)] * len(pairs)
    for index, logits, labels in _continuation_logits(model, pairs):
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, labels[:, None])[:, 0].tolist()
        scores[index] = Score(sum(chosen), bool((logprobs.argmax(-1) == labels).all()))
    return scores


@torch.inference_mode()
def rank_continuations(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[int]]:
    """Return the rank of each token of each continuation among all tokens there: 1 plus how many are likelier.

    Arguments as of `score_continuations`. A continuation longer than the model's context has ranks of its end only.
    """
    ranks: list[list[int]] = [[] for _ in pairs]
    for index, logits, labels in _continuation_logits(model, pairs):
        ranks[index] = (1 + (logits > logits.gather(1, labels[:, None])).sum(-1)).tolist()
    return ranks


def _continuation_logits(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, longest first, each pair's index, the logits (T, V) of its continuation, and its tokens (T,)."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    start = 0
    while start < len(order):
        width = min(sum(map(len, pairs[order[start]])) - 1, model.config.max_position)
        part = order[start : start + max(1, _BATCH_TOKENS // max(width, 1))]
        found = _batch_logits(model, [pairs[i] for i in part], width)
        yield from ((index, *rest) for index, rest in zip(part, found, strict=True))
        start += len(part)


def _batch_logits(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    device = model.embedding.weight.device
    token_ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    asked = torch.zeros(len(pairs), width, dtype=torch.bool)
    wanted = []
    for row, (context, continuation) in enumerate(pairs):
        whole = [*context, *continuation][-(width + 1) :]
        token_ids[row, : len(whole) - 1] = torch.tensor(whole[:-1])
        ending = whole[-min(len(continuation), len(whole) - 1) :]
        asked[row, len(whole) - 1 - len(ending) : len(whole) - 1] = True
        wanted.append(ending)
    # Padding stands after the text, where causal attention cannot look.
    hidden = model.hidden_states(token_ids.to(device))[asked.to(device)]
    labels = torch.tensor([token for ending in wanted for token in ending], device=device)
    logits = lm_logits(hidden[None], model.output_weight)[0]
    sizes = [len(ending) for ending in wanted]
    yield from zip(logits.split(sizes), labels.split(sizes), strict=True)
