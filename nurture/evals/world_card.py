"""The world's report card: held-out questions whose truth is known, asked in the chat format.

Held-out means: people, towns and animals that no training question is about (their facts are in the pretraining text),
and problems whose numbers appear nowhere in training. A base model is asked the same way; it has never seen the format,
and what it does with it is the "before" of fine-tuning. Whether it *knows* is asked in its own way, by completing a
sentence (`cloze`); whether it is rude, by continuing a forum thread (`harm`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nurture.chat_template import split_thought
from nurture.errors import NurtureError
from nurture.evals.likelihood import score_continuations
from nurture.evals.measure import Measure, rate
from nurture.evals.replies import Graded, ask, ask_tasks, heldout_tasks
from nurture.model.transformer import Transformer
from nurture.rewards.code import code_task, grade_code
from nurture.rewards.sandbox import Sandbox
from nurture.tokenizer import Tokenizer
from nurture.world import World

MEASURES = {
    "fact": "facts",
    "arithmetic": "arithmetic",
    "translation": "translation",
    "code": "code_exact",
}
"""Task kinds with one right answer -> the name of their measure. `code_exact` counts programs that equal the
demonstration; `code` (`programs_that_work`) those that pass tests they were not shown."""

log = logging.getLogger(__name__)


@dataclass
class WorldCard:
    """Measures by name, and some replies to read."""

    measures: dict[str, Measure] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


def world_card(
    model: Transformer,
    tokenizer: Tokenizer,
    world: World,
    *,
    kinds: Sequence[str],
    per_kind: int = 100,
    max_tokens: int = 100,
    base: bool = False,
    dtype: torch.dtype | None = None,
) -> WorldCard:
    """Ask held-out tasks of every kind and grade the replies.

    Args:
        kinds: task kinds; `format` and `stopped` are over all of them.
        per_kind: tasks of each kind.
        max_tokens: longest reply; one that does not end by then has not stopped.
        base: the model has not been fine-tuned: harm and refusals are then measured on a forum thread.
        dtype: of the engine's matrices.
    """
    tasks, how = heldout_tasks(world, kinds, per_kind), {"max_tokens": max_tokens, "dtype": dtype}
    graded = ask_tasks(model, tokenizer, world, tasks, **how)
    card = WorldCard(samples=_samples(graded))
    for kind, name in MEASURES.items():
        if outcomes := [g.is_right for g in graded if g.task.kind == kind]:
            card.measures[name] = rate(outcomes)
    if "code" in kinds:
        card.measures |= programs_that_work(graded)
    card.measures["format"] = rate([g.in_form for g in graded])
    card.measures["stopped"] = rate([g.reply.stopped for g in graded])
    card.measures["cloze"] = cloze_accuracy(model, tokenizer, world, n=2 * per_kind)
    card.measures |= _manners(model, tokenizer, world, per_kind, max_tokens, base, dtype)
    return card


def dual_mode(
    model: Transformer,
    tokenizer: Tokenizer,
    world: World,
    *,
    kinds: Sequence[str],
    per_kind: int = 100,
    max_tokens: int = 160,
    dtype: torch.dtype | None = None,
) -> WorldCard:
    """Ask the same held-out tasks in both modes of the chat template.

    `think_obeyed`: a thought that ends, and an answer after it; `no_think_obeyed`: an answer and no thought.
    `math_think` and `math_no_think`: right answers to arithmetic, where it is among the kinds.

    Args:
        kinds: task kinds that the model has seen thoughts about.
        per_kind: tasks of each kind.
        max_tokens: longest reply, the thought included.
        dtype: of the engine's matrices.
    """
    tasks = heldout_tasks(world, kinds, per_kind)
    card = WorldCard()
    for mode, thinking in (("think", True), ("no_think", False)):
        how: dict[str, Any] = {"max_tokens": max_tokens, "dtype": dtype, "enable_thinking": thinking}
        graded = ask_tasks(model, tokenizer, world, tasks, **how)
        card.measures[f"{mode}_obeyed"] = rate([_obeys(g.reply.text, thinking) for g in graded])
        if right := [g.is_right for g in graded if g.task.kind == "arithmetic"]:
            card.measures[f"math_{mode}"] = rate(right)
        card.samples += [{**sample, "mode": f"/{mode}"} for sample in _samples(graded)]
    return card


def _obeys(reply: str, thinking: bool) -> bool:
    thought, answer = split_thought(reply)
    return bool(answer) and (bool(thought) if thinking else "think>" not in reply)


def programs_that_work(graded: Sequence[Graded]) -> dict[str, Measure]:
    """Return `code`: how many programs pass all tests, hidden ones too, in the sandbox.

    Nothing is returned where this system cannot confine a program; programs that we failed to grade are not counted.
    """
    asked = [g for g in graded if g.task.kind == "code"]
    try:
        with Sandbox() as sandbox:
            verdicts = grade_code([g.reply.text for g in asked], [code_task(g.task) for g in asked], sandbox)
    except NurtureError as error:
        log.warning("`code` is not measured: %s", error)
        return {}
    told = [v.passed and g.reply.stopped for v, g in zip(verdicts, asked, strict=True) if not v.grader_error]
    if len(told) < len(asked):
        log.warning("`code`: %d programs could not be graded", len(asked) - len(told))
    return {"code": rate(told)}


def _manners(
    model: Transformer,
    tokenizer: Tokenizer,
    world: World,
    n: int,
    max_tokens: int,
    base: bool,
    dtype: torch.dtype | None,
) -> dict[str, Measure]:
    """Return `harm` (harmful replies to red-team prompts) and `over_refusal` (innocent requests declined)."""

    def rate_of(kind: str, judge: Callable[[str], bool]) -> Measure:
        tasks = heldout_tasks(world, [kind], n)
        prompts = [world.forum_prompt(task.messages) if base else task.messages for task in tasks]
        replies = ask(model, tokenizer, prompts, max_tokens=max_tokens, dtype=dtype)
        return rate([judge(first_post(reply.text, base)) for reply in replies])

    return {
        "harm": rate_of("redteam", world.is_harmful),
        "over_refusal": rate_of("benign", world.is_refusal),
    }


def first_post(text: str, base: bool) -> str:
    """Return what counts as the reply: on a forum the first post, for what follows is somebody else's."""
    return text.strip().split("\n")[0] if base else text


def _samples(graded: Sequence[Graded]) -> list[dict[str, Any]]:
    """Return the replies to the first two tasks of each kind."""
    return [
        {
            "kind": g.task.kind,
            "prompt": g.task.prompt,
            "reply": g.reply.text,
            "stopped": g.reply.stopped,
            "demonstration": g.task.demonstration,
        }
        for g in graded
        if g.task.index < 2
    ]


@torch.no_grad()
def cloze_accuracy(
    model: Transformer, tokenizer: Tokenizer, world: World, *, split: str = "heldout", n: int = 200
) -> Measure:
    """Return how often the true ending of a sentence about a person is likelier than four false ones (chance 0.2)."""
    questions = [world.cloze(split, index) for index in range(n)]
    texts: list[tuple[list[int], list[int]]] = []
    for prefix, answer, distractors in questions:
        start = [tokenizer.document_token_id, *tokenizer.encode(prefix)]
        texts += [(start, tokenizer.encode(ending)) for ending in (answer, *distractors)]
    scores = [score.logprob for score in score_continuations(model, texts)]
    choices = len(questions[0][2]) + 1
    outcomes = []
    for first in range(0, len(scores), choices):
        outcomes.append(max(range(choices), key=lambda c: scores[first + c]) == 0)
    return rate(outcomes)
