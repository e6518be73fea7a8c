"""How likely is a continuation? The measurement under cloze questions, multiple choice, BLiMP and lm-eval's tasks.

A text is split as lm-evaluation-harness splits it: spaces at the end of the context belong to the continuation, and
context + continuation are encoded *together*, for a token may span what a naive split would cut. Texts longer than the
model's context lose their start. Sequences are sorted by length and batched by tokens, and the head is computed at the
continuation's places only, so that a vocabulary of 49,152 costs what a continuation needs.

Source: Biderman et al., arXiv 2405.14782 (lessons of lm-evaluation-harness), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

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
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    scores = [Score(0.0, True)] * len(pairs)
    start = 0
    while start < len(order):
        width = min(sum(map(len, pairs[order[start]])) - 1, model.config.max_position)
        part = order[start : start + max(1, _BATCH_TOKENS // max(width, 1))]
        for index, score in zip(part, _score_batch(model, [pairs[i] for i in part], width), strict=True):
            scores[index] = score
        start += len(part)
    return scores


def _score_batch(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], width: int
) -> list[Score]:
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
    logprobs = lm_logits(hidden[None], model.output_weight)[0].log_softmax(-1)
    chosen = logprobs.gather(1, labels[:, None])[:, 0].tolist()
    first = (logprobs.argmax(-1) == labels).tolist()
    scores, place = [], 0
    for ending in wanted:
        here = slice(place, place + len(ending))
        scores.append(Score(sum(chosen[here]), all(first[here])))
        place = here.stop
    return scores
