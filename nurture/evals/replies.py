"""Ask a model and collect what it says: the step every evaluation by generation shares.

Tasks of the embedded world are asked and graded here as well: what counts is a right reply that also ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from nurture.inference.engine import Completion, Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.transformer import Transformer
from nurture.progress import progress_bar
from nurture.tokenizer import Tokenizer
from nurture.types import Message
from nurture.world import Grade, Task, World


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


@dataclass(frozen=True)
class Graded:
    """A reply to a task of the world and what it is worth."""

    task: Task
    reply: Reply
    grade: Grade

    @property
    def is_right(self) -> bool:
        """Whether the answer is the right one, and the reply ended."""
        return bool(self.grade.correct) and self.reply.stopped

    @property
    def in_form(self) -> bool:
        """Whether the reply has the form that the task demands, and ended."""
        return self.grade.format and self.reply.stopped


Asked: TypeAlias = tuple[Sequence[Message], Mapping[str, Any]]
"""A conversation that waits for a reply, and the variables of the chat template that its row has."""


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


def ask_rows(
    model: Transformer, tokenizer: Tokenizer, asked: Iterable[Asked], most: int, **how: Any
) -> tuple[list[Sequence[Message]], list[Reply]]:
    """Let the model answer conversations, each in the mode and with the tools of its row.

    Args:
        asked: (messages, variables of the chat template); those that leave no room for a reply are passed over.
        most: how many are answered.
        how: arguments of `ask`; `max_tokens` among them.

    Returns:
        (the conversations that were answered, their replies).
    """
    room = model.config.max_position - how["max_tokens"]
    fitting = [(turns, own) for turns, own in asked if len(tokenizer.encode_prompt(turns, **own)) < room]
    prompts, variables = [turns for turns, _ in fitting[:most]], [own for _, own in fitting[:most]]
    return prompts, ask(model, tokenizer, prompts, variables=variables, **how) if prompts else []


def samples_of(prompts: Sequence[Sequence[Message]], replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """Return the first dozen replies, for `samples.jsonl`."""
    return [
        {"prompt": prompt[-1]["content"], "reply": reply.text, "stopped": reply.stopped}
        for prompt, reply in list(zip(prompts, replies, strict=True))[:12]
    ]


def heldout_tasks(world: World, kinds: Sequence[str], per_kind: int, first: int = 0) -> list[Task]:
    """Return held-out tasks, `per_kind` of each kind from index `first` on."""
    return [world.task(kind, "heldout", first + index) for kind in kinds for index in range(per_kind)]


def ask_tasks(
    model: Transformer, tokenizer: Tokenizer, world: World, tasks: Sequence[Task], **how: Any
) -> list[Graded]:
    """Ask a model every task and grade what it says; `how` as in `ask`."""
    return graded(world, tasks, ask(model, tokenizer, [task.messages for task in tasks], **how))


def graded(world: World, tasks: Sequence[Task], replies: Sequence[Reply]) -> list[Graded]:
    """Grade the reply to each task."""
    return [
        Graded(task, reply, world.grade(task, reply.text)) for task, reply in zip(tasks, replies, strict=True)
    ]
