"""How many bits does a model need to be told before it does a task? Programs that adapt a model, and their lengths.

A *program* gets the model for free and may call and train it; its length is what it holds itself, in bits:

- `prompt`: demonstrations before the question, compressed under the model;
- `data`: training examples, compressed under the model, decoded and trained on when the program runs;
- `adapter`: the trained low-rank corrections, rounded to a few bits each and entropy-coded.

Training is free, and so is the code that all programs share (template, optimizer, decoder). Every length is an upper
bound on the task's complexity given the model, for a shorter program may exist. What a model knows about a task shows
as the difference to a model that knows nothing: the same programs around freshly drawn weights.

Main failure mode: reading one threshold off a curve. Report the curve.

Source: Vergara-Browne et al., arXiv 2602.15829, "Operationalising the superficial alignment hypothesis via task
complexity".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nurture.data.packing import Conversation
from nurture.evals.likelihood import score_continuations
from nurture.evals.measure import Measure
from nurture.model.lora import Adapter, adapters
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate_factor
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.tokenizer import Tokenizer
from nurture.trainer import split_to_fit, train_step
from nurture.types import BatchSource, LossFunction, Message
from nurture.world import Task, World

Construction = Literal["nothing", "prompt", "data", "adapter"]
_SCALE_BITS = 32


@dataclass(frozen=True)
class Program:
    """One way to get a task out of a model.

    Attributes:
        model: name of the model it is for.
        kind: of task.
        construction: what it holds.
        detail: for people: "4 examples", "rank 1, 4 bits".
        bits: its length.
        correct: right replies to held-out tasks.
        form: replies in the form the task demands.
    """

    model: str
    kind: str
    construction: Construction
    detail: str
    bits: float
    correct: Measure
    form: Measure


def demonstration_turns(tasks: Sequence[Task]) -> list[Message]:
    """Return the tasks with their demonstrations as turns of one conversation; system messages are left out."""
    turns: list[Message] = []
    for task in tasks:
        turns += [turn for turn in task.messages if turn["role"] != "system"]
        turns.append({"role": "assistant", "content": task.demonstration})
    return turns


def thread_conversation(
    tokenizer: Tokenizer, world: World, messages: Sequence[Message], reply: str
) -> Conversation:
    """Return a question and its reply as a forum thread, the form a base model knows; the reply is trained on."""
    prompt = [tokenizer.document_token_id, *tokenizer.encode(world.forum_prompt(messages))]
    said = tokenizer.encode(f" {reply}\n")
    return Conversation([*prompt, *said], [False] * len(prompt) + [True] * len(said))


def ideal_bits(logprobs: Sequence[float]) -> float:
    """Return the bits that tokens with these log-probabilities (nats) take: -sum / ln 2."""
    return -sum(logprobs) / math.log(2)


def conversation_bits(
    model: Transformer, tokenizer: Tokenizer, world: World, conversations: Sequence[Sequence[Message]]
) -> float:
    """Return the bits of conversations under `model`, in the cheaper of two spellings: forum thread or chat template.

    Which spelling it is takes one bit; the start of the spelling is the same for all and belongs to the shared code.
    """
    forum, chat = [], []
    for turns in conversations:
        text = world.forum_prompt(turns)
        start, rest = text.split(":", 1)
        # The last line is the opening of a reply that nobody gives.
        rest = rest.rsplit("\n", 1)[0]
        prefix = [tokenizer.document_token_id, *tokenizer.encode(f"{start}:")]
        forum.append((prefix, tokenizer.encode(rest)))
        token_ids, _ = tokenizer.encode_conversation(turns)
        chat.append(([tokenizer.document_token_id], token_ids))
    scores = (score_continuations(model, pairs) for pairs in (forum, chat))
    return 1 + min(ideal_bits([score.logprob for score in spelling]) for spelling in scores)


def tune(
    model: Transformer,
    batches: BatchSource,
    loss_fn: LossFunction,
    config: OptimizerConfig,
    schedule: ScheduleConfig,
    steps: int,
) -> Iterator[int]:
    """Train `model` in place; yield after each update how many are done, with the model in eval mode."""
    execution, optimizer = decide_execution(ExecutionConfig(compile="off")), build_optimizer(model, config)
    for step in range(steps):
        model.train()
        optimizer.set_factor(learning_rate_factor(schedule, step, steps))
        parts = split_to_fit(batches(step), ExecutionConfig().microbatch_tokens)
        train_step(model, optimizer, parts, loss_fn, clip_norm=config.clip_norm, execution=execution)
        model.eval()
        yield step + 1


def cheapest(programs: Sequence[Program], target: float) -> Program | None:
    """Return the shortest program that is right at least so often, None if none is."""
    reaching = [program for program in programs if program.correct.value >= target]
    return min(reaching, key=lambda program: program.bits, default=None)


def on_frontier(program: Program, programs: Sequence[Program]) -> bool:
    """Say whether no shorter program for the same model and kind is right as often: a point of the curve."""
    return not any(
        other.correct.value >= program.correct.value and other.bits < program.bits
        for other in programs
        if (other.model, other.kind) == (program.model, program.kind)
    )


@contextmanager
@torch.no_grad()
def rounded_adapters(model: Transformer, bits: int) -> Iterator[float]:
    """Round the adapters of `model` to 2^bits - 1 levels while inside; yield how many bits they then take.

    Each matrix has levels symmetric around 0 and a scale of 32 bits; the levels of all of them are coded together, with
    their own frequencies.

    Raises:
        ValueError: fewer than 2 bits leave no level but zero.
    """
    if bits < 2:
        raise ValueError(f"adapters need at least 2 bits a number, got {bits}")
    kept, written = [], []
    for matrix in adapter_matrices(model):
        levels, scale = _levels(matrix, bits)
        written.append(levels.flatten())
        kept.append((matrix, matrix.detach().clone()))
        matrix.copy_(levels * scale)
    try:
        yield _SCALE_BITS * len(kept) + _level_bits(torch.cat(written), bits)
    finally:
        for matrix, original in kept:
            matrix.copy_(original)


def adapter_matrices(model: Transformer) -> list[Tensor]:
    """Return the trained matrices of all adapters."""
    found: list[Adapter] = adapters(model)
    return [matrix for adapter in found for matrix in (adapter.down, adapter.up)]


def _levels(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return whole levels and their scale; the scale that loses least among shares of the largest number."""
    most = 2 ** (bits - 1) - 1
    largest = matrix.abs().amax().clamp(min=1e-12)
    scales = [largest * share / most for share in (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)]
    rounded = [(matrix / scale).round().clamp(-most, most) for scale in scales]
    errors = torch.stack([((r * s - matrix) ** 2).sum() for r, s in zip(rounded, scales, strict=True)])
    best = int(errors.argmin())
    return rounded[best], scales[best]


def _level_bits(levels: Tensor, bits: int) -> float:
    """Return the bits of the levels: under their own frequencies, with the table of these, or plain if that is less."""
    _, counts = levels.unique(return_counts=True)
    shares = counts.double() / levels.numel()
    coded = float(-(counts * shares.log2()).sum()) + _SCALE_BITS * len(counts)
    return min(coded, float(levels.numel() * bits))
