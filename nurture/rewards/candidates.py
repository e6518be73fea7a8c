"""Answers to be ranked: sampled from one or several models, or written, to the same prompts.

A reward model is only as good as the variety it was shown: answers of the model that will be trained on it, in their
whole range, and worse ones it may stray into. Sampled answers keep the tokens they were sampled as; equal answers to a
prompt count once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from nurture.data.comparisons import encode_reply
from nurture.errors import NurtureError
from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.transformer import Transformer
from nurture.progress import progress_bar
from nurture.tokenizer import Tokenizer
from nurture.types import Message


@dataclass(frozen=True)
class Candidate:
    """One answer to a prompt.

    Attributes:
        text: without special tokens.
        token_ids: prompt and answer, up to the answer's last token.
        finished: it ended by itself.
        author: the model it was sampled from, or how it was written.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    author: str


def sample_candidates(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    *,
    count: int,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    author: str = "model",
    max_batch: int = 128,
    dtype: torch.dtype | None = None,
) -> list[list[Candidate]]:
    """Return `count` answers to every prompt, in the order of the prompts.

    Args:
        max_tokens: longest answer; a longer one is cut there and has not finished.
        dtype: of the matrices while sampling; default: the model's.

    Raises:
        NurtureError: model and tokenizer do not belong together, or a prompt leaves no room for an answer.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise NurtureError(
            f"'{author}' has a vocabulary of {model.config.vocab_size} tokens, the tokenizer one of"
            f" {tokenizer.vocab_size}: answers are compared between models of one tokenizer only."
        )
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    stops = tokenizer.stop_token_ids
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop_token_ids=stops)
    repeated = [token_ids for token_ids in encoded for _ in range(count)]
    engine = Engine(model, max_batch=max_batch, dtype=dtype)
    with progress_bar("answers", len(repeated), stays=False) as bar:
        completions = iter(engine.generate(repeated, params, ended=bar.advance))
    answers = []
    for token_ids in encoded:
        drawn = [next(completions) for _ in range(count)]
        answers.append(
            [
                Candidate(
                    tokenizer.decode(completion.token_ids, skip_special=True),
                    (*token_ids, *completion.token_ids),
                    completion.finish_reason == "stop",
                    author,
                )
                for completion in drawn
            ]
        )
    return answers


def written_candidate(tokenizer: Tokenizer, prompt: Sequence[Message], text: str, author: str) -> Candidate:
    """Return an answer that somebody wrote."""
    reply: Message = {"role": "assistant", "content": text}
    return Candidate(text, tuple(encode_reply(tokenizer, prompt, [reply]).token_ids), True, author)


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the answers without those that an earlier one equals, token by token."""
    seen: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        seen.setdefault(candidate.token_ids, candidate)
    return list(seen.values())
