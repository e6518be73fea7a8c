"""An AI judge: ranks answers by comparing them two at a time, each pair in both orders.

Models prefer what stands first (or second), whatever it is. So the judge sees every pair twice, once in each order;
when it sides with the same answer both times that answer is better, and when it contradicts itself the two are tied.
The ranking puts answers with more wins first (a tie is half a win for both), and equal ones in one group.

A judge is a function from questions (conversations that end with "A or B?") to "A", "B" or None for no clear verdict:
`endpoint_judge` asks any OpenAI-compatible server, `local_judge` a checkpoint on this machine. `position_bias` says how
often a judge contradicted itself; one that always does has ranked nothing.

Sources: Zheng et al., arXiv 2306.05685, section 3.4 (position bias, swapping); Bai et al., arXiv 2212.08073.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import model_validator
from torch import Tensor

from nurture.inference.chat import load_chat_model
from nurture.inference.endpoint import EndpointConfig, ask_endpoint
from nurture.recipe import Section
from nurture.types import Message

T = TypeVar("T")
Verdict = Literal["A", "B"] | None
Judge = Callable[[Sequence[Sequence[Message]]], list[Verdict]]

QUESTION = """\
Compare two answers to the same request. Judge which one helps the user better: it does what was asked, it is true, it \
harms nobody, and it is no longer than it needs to be. The order of the answers means nothing.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one letter, A or B."""


class JudgeConfig(Section):
    """Who judges: a model behind an endpoint, or a checkpoint on this machine."""

    endpoint: EndpointConfig | None = None
    """An OpenAI-compatible server."""
    model: str | None = None
    """A checkpoint folder, a .gguf file, or smollm2."""
    question: str = QUESTION
    """What the judge is asked; {prompt}, {first} and {second} are filled in."""

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if (self.endpoint is None) == (self.model is None):
            raise ValueError("needs either an endpoint or a model")
        if missing := [slot for slot in ("{prompt}", "{first}", "{second}") if slot not in self.question]:
            raise ValueError(f"question lacks {', '.join(missing)}")
        return self


def make_judge(config: JudgeConfig) -> Judge:
    """Return the judge that `config` describes."""
    if config.endpoint is not None:
        return endpoint_judge(config.endpoint)
    return local_judge(config.model or "")


@dataclass(frozen=True)
class JudgedRanking:
    """A judge's ranking of the answers to one prompt.

    Attributes:
        ranking: groups of indices, best first.
        pairs: how many pairs were compared.
        contradicted: on how many of them the judge sided with another answer when the order was turned.
        unclear: questions (two a pair) without a clear verdict.
    """

    ranking: tuple[tuple[int, ...], ...]
    pairs: int
    contradicted: int
    unclear: int


def rank_with_judge(
    judge: Judge,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[Sequence[str]],
    question: str = QUESTION,
) -> list[JudgedRanking]:
    """Have the answers to every prompt ranked; all questions of all prompts go to the judge together.

    Args:
        answers: K texts for every prompt; K(K - 1) questions are asked.
    """
    questions: list[list[Message]] = []
    for prompt, texts in zip(prompts, answers, strict=True):
        for first, second in combinations(range(len(texts)), 2):
            for a, b in ((first, second), (second, first)):
                slots = {"prompt": _as_text(prompt), "first": texts[a], "second": texts[b]}
                questions.append(filled(question, slots))
    verdicts = iter(judge(questions))
    judged = []
    for texts in answers:
        pairs = list(combinations(range(len(texts)), 2))
        judged.append(_ranking(len(texts), pairs, [(next(verdicts), next(verdicts)) for _ in pairs]))
    return judged


def filled(question: str, slots: Mapping[str, str]) -> list[Message]:
    """Ask with all slots filled in at once, so that a slot's name inside an answer stays what it is."""
    content = re.sub(rf"\{{({'|'.join(slots)})\}}", lambda found: slots[found[1]], question)
    return [{"role": "user", "content": content}]


def _as_text(prompt: Sequence[Message]) -> str:
    turns = [(turn["role"], turn.get("content") or "") for turn in prompt]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)


def _ranking(
    count: int, pairs: Sequence[tuple[int, int]], verdicts: Sequence[tuple[Verdict, Verdict]]
) -> JudgedRanking:
    wins = [0.0] * count
    contradicted = unclear = 0
    for (first, second), (straight, turned) in zip(pairs, verdicts, strict=True):
        unclear += (straight is None) + (turned is None)
        if straight == "A" and turned == "B":
            wins[first] += 1
        elif straight == "B" and turned == "A":
            wins[second] += 1
        else:
            contradicted += straight is not None and straight == turned
            wins[first] += 0.5
            wins[second] += 0.5
    groups = tuple(
        tuple(i for i in range(count) if wins[i] == won) for won in sorted(set(wins), reverse=True)
    )
    return JudgedRanking(groups, len(pairs), contradicted, unclear)


def position_bias(judged: Sequence[JudgedRanking]) -> float:
    """Return the share of pairs on which the judge contradicted itself when the order was turned."""
    return sum(one.contradicted for one in judged) / max(sum(one.pairs for one in judged), 1)


def read_verdict(text: str) -> Verdict:
    """Return the letter a judge chose: the last one that stands alone, or None."""
    letters = re.findall(r"(?<![A-Za-z'])([AB])(?![A-Za-z'])", text)
    return letters[-1] if letters else None


def ask_for(
    config: EndpointConfig,
    questions: Sequence[Sequence[Message]],
    read: Callable[[str], T],
    max_tokens: int = 512,
) -> list[T | None]:
    """Ask an endpoint and read its replies; None where it refused the question.

    Args:
        max_tokens: room for what a reasoning model thinks aloud before its verdict.
    """
    replies = ask_endpoint(config, questions, max_tokens=max_tokens)
    return [None if reply.finish_reason == "error" else read(reply.text) for reply in replies]


def first_token_logits(
    path: str | Path, words: Sequence[str]
) -> Callable[[Sequence[Sequence[Message]]], list[Tensor | None]]:
    """Return a function from questions to the logits that a checkpoint's reply begins with each of `words`, (words,).

    Nothing is generated, so that even a small model, which would rather chat, says something. A question that is longer
    than its context gets None.
    """
    chat = load_chat_model(path)
    token_ids = [chat.tokenizer.encode(word)[0] for word in words]

    @torch.inference_mode()
    def logits_of(messages: Sequence[Message]) -> Tensor | None:
        prompt = chat.tokenizer.encode_prompt(messages)
        if len(prompt) > chat.model.config.max_position:
            return None
        return chat.model.output_weight[token_ids] @ chat.model.hidden_states(torch.tensor([prompt]))[0, -1]

    return lambda questions: [logits_of(messages) for messages in questions]


def endpoint_judge(config: EndpointConfig) -> Judge:
    """Return a judge behind an OpenAI-compatible endpoint."""
    return lambda questions: ask_for(config, questions, read_verdict)


def local_judge(path: str | Path) -> Judge:
    """Return a judge that is a checkpoint: of "A" and "B" the likelier first token of its reply is its verdict."""
    ask = first_token_logits(path, ("A", "B"))

    def verdict(logits: Tensor | None) -> Verdict:
        a, b = (0.0, 0.0) if logits is None else logits.tolist()
        return "A" if a > b else "B" if b > a else None

    return lambda questions: [verdict(logits) for logits in ask(questions)]
