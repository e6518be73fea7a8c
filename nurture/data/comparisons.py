"""Comparisons as tokens, packed: all answers to one prompt share a row, and none can see another.

A comparison is a prompt with K answers and their ranking. Its K(K-1)/2 pairs are one item of the loss, so the answers
of a prompt are laid into the same row as documents of their own (attention is confined to each, positions restart):
every answer passes through the model once, whatever number of pairs it is in, and rows can be split over microbatches
and processes. InstructGPT found that pairs scattered over batches overfit within one epoch.

An answer is scored at its last token: its end token, or where it was cut off. Ranked rows become comparisons with
`tokenise_comparisons`; answers that were sampled keep the tokens that were sampled.

Source: InstructGPT, arXiv 2203.02155, section 3.5 ("all comparisons from each prompt as a single batch element").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nurture.data.mixture import rank_rows, shuffled
from nurture.data.packing import PackedRows, best_fit_decreasing
from nurture.data.rows import Row
from nurture.errors import NurtureError
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX, Batch, Message


class EncodedReply(NamedTuple):
    """A prompt with one reply as tokens, up to the last one the assistant wrote."""

    token_ids: list[int]
    completion_mask: list[bool]


def encode_reply(
    tokenizer: Tokenizer, prompt: Sequence[Message], reply: Sequence[Message], **template_kwargs: Any
) -> EncodedReply:
    """Encode prompt and reply, without what the template writes after the assistant's end token.

    Raises:
        NurtureError: a message is malformed, or there is nothing of the assistant's in the reply.
    """
    token_ids, mask = tokenizer.encode_conversation([*prompt, *reply], **template_kwargs)
    if not any(mask):
        raise NurtureError("a reply to be scored has nothing that the assistant wrote")
    end = len(mask) - mask[::-1].index(True)
    return EncodedReply(token_ids[:end], mask[:end])


@dataclass(frozen=True)
class Comparison:
    """Answers to one prompt and how somebody ranked them.

    Attributes:
        answers: K sequences of token ids, each prompt and answer.
        prompt_tokens: how many tokens of each answer are the prompt's.
        ranking: indices into `answers`, best first; equally good ones share a group.
        ratings: how good each answer is in the labeler's own units, where that was asked: margins come from it.
        source: name of the source.
    """

    answers: tuple[Sequence[int], ...]
    prompt_tokens: int
    ranking: tuple[tuple[int, ...], ...]
    ratings: tuple[float, ...] = ()
    source: str = "comparisons"

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.answers))


class Pair(NamedTuple):
    """Two answers of one comparison: `first` is better, or they are tied."""

    first: int
    second: int
    tied: bool
    margin: float


def pairs_of(comparison: Comparison, *, ties: bool = True) -> list[Pair]:
    """Return every pair of the comparison, K(K-1)/2 of them, or only those that are ordered."""
    ranks = {index: place for place, group in enumerate(comparison.ranking) for index in group}
    ordered = [index for group in comparison.ranking for index in group]
    ratings = comparison.ratings
    found = []
    for place, first in enumerate(ordered):
        for second in ordered[place + 1 :]:
            tied = ranks[first] == ranks[second]
            if ties or not tied:
                margin = ratings[first] - ratings[second] if ratings and not tied else 0.0
                found.append(Pair(first, second, tied, margin))
    return found


def tokenise_comparisons(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    source: str = "comparisons",
    *,
    prompt_tokens: int | None = None,
) -> Iterator[Comparison]:
    """Yield the ranked rows as tokens; rows without a ranking are passed over.

    Args:
        prompt_tokens: of a longer prompt the last so many are kept: the end of a conversation is what is answered.

    Raises:
        NurtureError: no row has a ranking.
    """
    seen = found = 0
    for row in rows:
        seen += 1
        if not row.ranking or not row.prompt:
            continue
        found += 1
        encoded = [
            encode_reply(tokenizer, row.prompt, reply, **row.template_kwargs) for reply in row.responses
        ]
        prompt = len(tokenizer.encode_prompt(row.prompt, **row.template_kwargs))
        cut = max(0, prompt - prompt_tokens) if prompt_tokens else 0
        ratings = tuple(map(float, row.metadata.get("ratings") or ()))
        answers = tuple(e.token_ids[cut:] for e in encoded)
        yield Comparison(answers, prompt - cut, row.ranking, ratings, source)
    if not found:
        raise NurtureError(
            f"{source}: {seen} rows, but none with ranked answers; a reward model needs prompt/chosen/rejected,"
            " responses/ranking or responses/ratings rows (docs/data.md)"
        )


@dataclass(kw_only=True)
class ComparisonBatch(Batch):
    """Packed rows of comparisons. R answers and P pairs at most in a row.

    Attributes:
        answer_ends: (B, R) int64 column of each answer's last token; -1 where there is no answer.
        pairs: (B, P, 2) int64 places in `answer_ends` of (better, worse) or of two tied answers.
        tied: (B, P) bool.
        margins: (B, P) float32, how much better by the labeler's ratings; 0 where there are none.
        weights: (B, P) float32, one over the number of pairs of the prompt; 0 where there is no pair.
    """

    answer_ends: Tensor
    pairs: Tensor
    tied: Tensor
    margins: Tensor
    weights: Tensor

    @property
    def loss_count(self) -> int:
        """Number of comparisons: each counts once, however many answers it has."""
        return round(float(self.weights.sum()))


@dataclass(frozen=True)
class ComparisonReport:
    """What became of the comparisons."""

    comparisons: int
    packed: int
    pairs: int
    tied_pairs: int
    too_long: int
    without_pairs: int
    rows: int
    tokens: int

    def __str__(self) -> str:
        lost = {"longer than a row": self.too_long, "without an ordered pair": self.without_pairs}
        notes = "".join(f"; {count} left out, {what}" for what, count in lost.items() if count)
        return (
            f"{self.packed} of {self.comparisons} comparisons, {self.pairs} pairs ({self.tied_pairs} tied), in"
            f" {self.rows} rows{notes}"
        )


class ComparisonBatches(PackedRows):
    """Batches of packed comparisons, a pure function of (seed, step, rank, world size).

    Attributes:
        report: what was packed and left out.
        rows_per_epoch: rows that hold every comparison once.
        sources: names of the sources, in order of appearance.
    """

    def __init__(
        self,
        comparisons: Iterable[Comparison],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        pad_token_id: int,
        ties: bool = True,
    ) -> None:
        """Pack `comparisons` into rows.

        Args:
            batch_size: B, rows in a global batch.
            sequence_length: T, tokens in a row; all answers to a prompt must fit.
            ties: whether tied pairs are pairs of the loss.

        Raises:
            NurtureError: nothing is left to train on.
        """
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self._pad = pad_token_id
        given = list(comparisons)
        fitting = [comparison for comparison in given if comparison.tokens <= sequence_length]
        with_pairs = [(comparison, pairs_of(comparison, ties=ties)) for comparison in fitting]
        self._members = [(comparison, pairs) for comparison, pairs in with_pairs if pairs]
        self.sources = tuple(dict.fromkeys(comparison.source for comparison, _ in self._members))
        if not self._members:
            longest = max((comparison.tokens for comparison in given), default=0)
            raise NurtureError(
                f"nothing to train on: {len(given)} comparisons, {len(given) - len(fitting)} of them longer than a row"
                f" of {sequence_length} tokens (the longest has {longest}), the rest without an ordered pair. Raise"
                " sequence_length, or look at the rankings."
            )
        self._bins = best_fit_decreasing([c.tokens for c, _ in self._members], sequence_length)
        self.rows_per_epoch = len(self._bins)
        self.report = ComparisonReport(
            comparisons=len(given),
            packed=len(self._members),
            pairs=sum(len(pairs) for _, pairs in self._members),
            tied_pairs=sum(pair.tied for _, pairs in self._members for pair in pairs),
            too_long=len(given) - len(fitting),
            without_pairs=len(fitting) - len(self._members),
            rows=self.rows_per_epoch,
            tokens=sum(comparison.tokens for comparison, _ in self._members),
        )

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> ComparisonBatch:
        """Return rank's rows of the global batch of `step`."""
        mine = rank_rows(self.batch_size, rank, world_size)
        numbers = step * self.batch_size + np.arange(self.batch_size)[mine]
        order = {
            epoch: self.row_order(epoch) for epoch in sorted(set((numbers // self.rows_per_epoch).tolist()))
        }
        return self._batch(
            [int(order[n // self.rows_per_epoch][n % self.rows_per_epoch]) for n in numbers.tolist()]
        )

    def row_order(self, epoch: int) -> np.ndarray:
        """Return the numbers of all rows, (rows_per_epoch,) int64, in the order in which `epoch` reads them."""
        return shuffled(self.rows_per_epoch, "comparison rows", self.seed, epoch)

    def _batch(self, rows: Sequence[int]) -> ComparisonBatch:
        contents = [[self._members[member] for member in self._bins[row]] for row in rows]
        shape = (len(rows), self.sequence_length)
        token_ids = np.full(shape, self._pad, dtype=np.int64)
        labels, document_ids = (
            np.full(shape, IGNORE_INDEX, dtype=np.int64),
            np.full(shape, -1, dtype=np.int64),
        )
        position_ids, source_ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        most_answers = max(sum(len(c.answers) for c, _ in row) for row in contents)
        most_pairs = max(sum(len(pairs) for _, pairs in row) for row in contents)
        ends = np.full((len(rows), most_answers), -1, dtype=np.int64)
        places = np.zeros((len(rows), most_pairs, 2), dtype=np.int64)
        tied, margins, weights = (
            np.zeros((len(rows), most_pairs), dtype=kind) for kind in (bool, np.float32, np.float32)
        )
        for row, members in enumerate(contents):
            column = answer = pair_place = 0
            for comparison, pairs in members:
                for place, (first, second, is_tied, margin) in enumerate(pairs, start=pair_place):
                    places[row, place] = answer + first, answer + second
                    tied[row, place], margins[row, place], weights[row, place] = (
                        is_tied,
                        margin,
                        1 / len(pairs),
                    )
                pair_place += len(pairs)
                for sequence in comparison.answers:
                    here = slice(column, column + len(sequence))
                    token_ids[row, here], document_ids[row, here] = sequence, answer
                    labels[row, column : here.stop - 1] = sequence[1:]
                    position_ids[row, here] = np.arange(len(sequence))
                    source_ids[row, here] = self.sources.index(comparison.source)
                    column, ends[row, answer] = here.stop, here.stop - 1
                    answer += 1
        as_tensors: Mapping[str, Tensor] = {
            name: torch.from_numpy(array)
            for name, array in {
                "token_ids": token_ids,
                "labels": labels,
                "position_ids": position_ids,
                "document_ids": document_ids,
                "source_ids": source_ids,
                "answer_ends": ends,
                "pairs": places,
                "tied": tied,
                "margins": margins,
                "weights": weights,
            }.items()
        }
        return ComparisonBatch(**as_tensors, sources=self.sources)
