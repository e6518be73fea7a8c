"""Ask a model and collect what it says: the step every evaluation by generation shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nurture.inference.engine import Completion, Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.transformer import Transformer
from nurture.progress import progress_bar
from nurture.tokenizer import Tokenizer
from nurture.types import Message


@dataclass(frozen=True)
class Reply:
    """One reply.

    Attributes:
        text: without special tokens.
        stopped: the model ended its turn itself, within the limit.
        tokens: how many tokens were written, the end token included.
    """

    text: str
    stopped: bool
    tokens: int


def ask(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message] | str],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    variables: Sequence[Mapping[str, Any]] = (),
    **template_kwargs: Any,
) -> list[Reply]:
    """Return the model's reply to each prompt.

    Args:
        prompts: conversations, put through the chat template; or plain text, continued as the start of a document.
        max_tokens: longest reply.
        temperature: 0 for the most likely reply.
        dtype: of the engine's matrices; default: the model's.
        variables: of the chat template, for each prompt its own (a row's mode, its tools); default: none.
        template_kwargs: variables of the chat template for all, such as `enable_thinking`.
    """
    encoded = [
        [tokenizer.document_token_id, *tokenizer.encode(prompt)]
        if isinstance(prompt, str)
        else tokenizer.encode_prompt(prompt, **{**own, **template_kwargs})
        for prompt, own in zip(prompts, variables or [{}] * len(prompts), strict=True)
    ]
    stops = tokenizer.stop_token_ids
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop_token_ids=stops)
    with progress_bar("replies", len(encoded), stays=False) as bar:
        completions = Engine(model, max_batch=128, dtype=dtype).generate(encoded, params, ended=bar.advance)
    return [reply_of(completion, tokenizer) for completion in completions]


def reply_of(completion: Completion, tokenizer: Tokenizer) -> Reply:
    """Return what the engine wrote as a reply."""
    return Reply(
        tokenizer.decode(completion.token_ids, skip_special=True),
        # A base model ends documents, not turns: only the end of the turn counts as an answer that stopped.
        completion.finish_reason == "stop" and completion.token_ids[-1] == tokenizer.end_of_turn_id,
        len(completion.token_ids),
    )
