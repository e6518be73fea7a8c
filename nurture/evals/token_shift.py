"""Which tokens of an aligned model's replies would its base have written? The rate of shifted tokens.

The aligned model replies greedily to held-out prompts; in the place of every token of a reply the base, which reads the
same prompt and the same reply so far, ranks its vocabulary. A token is *unshifted* if it is the base's first choice,
*marginal* at rank 2 or 3, *shifted* above. If alignment is superficial, few tokens are shifted, most of them early in
the reply and of style; what is shifted late or in content, alignment has added.

The base reads the prompt in two spellings: `chat`, token for token what the aligned model read, whose control tokens no
base has met; and `thread`, a forum thread whose next post is the reply, the base's own form. There the reply is encoded
anew, for a post starts with a blank and ends with its line.

Tokens of one reply are not independent observations: intervals are over replies (`measure.rate_of_groups`). Main
failure mode: the rank says nothing of how close the first choices were; a shifted token may be a synonym.

Source: Lin et al., arXiv 2312.01552 (URIAL).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from nurture.evals.adaptation import thread_conversation
from nurture.evals.likelihood import rank_continuations
from nurture.evals.measure import rate_of_groups
from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer
from nurture.world import Task, World

Spelling = Literal["chat", "thread"]
SPELLINGS: tuple[Spelling, ...] = ("chat", "thread")
_MARGINAL = 3
"""The worst rank that is not shifted."""
_TOKENS_SHOWN = 12
_END = "end"


@dataclass(frozen=True)
class Ranked:
    """One reply, and the base's rank of each of its tokens.

    Attributes:
        kind: of the task.
        token_ids: of the reply, its end included where it has one.
        ranks: 1 is the base's first choice.
        ended: the last token ends the reply.
    """

    kind: str
    token_ids: Sequence[int]
    ranks: Sequence[int]
    ended: bool

    def places(self) -> Iterator[tuple[str, int]]:
        """Yield (where in the reply, rank) of every token; the end of the reply is a place of its own."""
        for place, rank in enumerate(self.ranks, 1):
            is_end = self.ended and place == len(self.ranks)
            yield _END if is_end else _span(place), rank


def _span(place: int) -> str:
    """Return the span of a place in a reply, counted from 1: 1, 2, 3-4, 5-8, 9-16 ..."""
    last = 1 << (place - 1).bit_length()
    return str(last) if last <= 2 else f"{last // 2 + 1}-{last}"


def write_replies(
    aligned: Transformer, tokenizer: Tokenizer, tasks: Sequence[Task], max_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, likeliest reply) of each task in the chat format, as token ids."""
    prompts = [tokenizer.encode_prompt(task.messages) for task in tasks]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=tokenizer.stop_token_ids)
    completions = Engine(aligned, max_batch=128).generate(prompts, params)
    return [(prompt, done.token_ids) for prompt, done in zip(prompts, completions, strict=True)]


def rank_replies(
    base: Transformer,
    tokenizer: Tokenizer,
    world: World,
    tasks: Sequence[Task],
    replies: Sequence[tuple[Sequence[int], Sequence[int]]],
    spelling: Spelling,
) -> list[Ranked]:
    """Return the base's ranks of replies to tasks, read in one spelling. Empty replies are left out."""
    asked: list[tuple[str, Sequence[int], Sequence[int], bool]] = []
    for task, (prompt, reply) in zip(tasks, replies, strict=True):
        ended = bool(reply) and reply[-1] in tokenizer.stop_token_ids
        if spelling == "thread":
            text = tokenizer.decode(reply, skip_special=True)
            thread = thread_conversation(tokenizer, world, task.messages, text)
            first = thread.completion_mask.index(True)
            prompt, reply = thread.token_ids[:first], thread.token_ids[first:]
            reply = reply if ended else reply[:-1]  # whoever was cut off has not ended his line
        if len(reply):
            asked.append((task.kind, prompt, reply, ended))
    ranks = rank_continuations(base, [(prompt, reply) for _, prompt, reply, _ in asked])
    return [
        Ranked(kind, reply, found, ended) for (kind, _, reply, ended), found in zip(asked, ranks, strict=True)
    ]


def shift_rates(replies: Sequence[Ranked], text_of: Callable[[int], str]) -> dict[str, Any]:
    """Return rates of unshifted, marginal and shifted tokens: in all, by place, by kind; and which tokens.

    Args:
        text_of: what a token id stands for.
    """
    spans = dict.fromkeys(
        _span(place) for place in range(1, 1 + max((len(r.ranks) for r in replies), default=0))
    )
    at = {span: [[k for s, k in reply.places() if s == span] for reply in replies] for span in (*spans, _END)}
    kinds = dict.fromkeys(reply.kind for reply in replies)
    return {
        "replies": len(replies),
        "all": _rates([reply.ranks for reply in replies]),
        "by_place": [{"place": span, **_rates(ranks)} for span, ranks in at.items() if any(ranks)],
        "by_kind": [
            {"kind": kind, **_rates([reply.ranks for reply in replies if reply.kind == kind])}
            for kind in kinds
        ],
        "tokens": _most_shifted(replies, text_of),
    }


def _rates(replies: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the three rates of tokens with these ranks, reply by reply."""
    judged: dict[str, Callable[[int], bool]] = {
        "unshifted": lambda rank: rank == 1,
        "marginal": lambda rank: 1 < rank <= _MARGINAL,
        "shifted": lambda rank: rank > _MARGINAL,
    }
    return {
        name: rate_of_groups([[judge(rank) for rank in ranks] for ranks in replies if ranks]).as_data()
        for name, judge in judged.items()
    }


def _most_shifted(replies: Sequence[Ranked], text_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return the tokens shifted most often: how often, how often written, and the median rank when shifted."""
    written = Counter(token for reply in replies for token in reply.token_ids)
    ranks: dict[int, list[int]] = {}
    for reply in replies:
        for token, rank in zip(reply.token_ids, reply.ranks, strict=True):
            if rank > _MARGINAL:
                ranks.setdefault(token, []).append(rank)
    often = sorted(ranks, key=lambda token: (-len(ranks[token]), token))[:_TOKENS_SHOWN]
    return [
        {"token": text_of(t), "shifted": len(ranks[t]), "written": written[t], "rank": median(ranks[t])}
        for t in often
    ]
