"""Conversations, packed: many short conversations share a row, and none can see another.

Rows have a fixed length T. Conversations are laid into rows by best-fit decreasing: the longest first, each into the
fullest row that still has room for it. Attention is confined to one conversation by document ids, positions restart,
and a label is trained only where its token was written by the assistant, in the same conversation. So packing changes
the speed and not the loss.

A conversation longer than T is cut at the end or left out, as the setting says; both are counted and reported.

The order is new every epoch and a pure function of (seed, step, rank, world size), as in mixture.py.

Papers: Johnson 1974 for best fit; Ding et al. 2024 (arXiv 2404.10830) for packing without truncation.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from nurture.chat_template import holds_thought, unfolded
from nurture.data.mixture import rank_rows, shuffled
from nurture.data.rows import Row, conversations
from nurture.errors import NurtureError
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX, Batch, Message


class Conversation(NamedTuple):
    """A tokenised conversation.

    Attributes:
        token_ids: (n,) its tokens.
        completion_mask: (n,) bool, True where the assistant wrote the token.
        source: name of the source it is from.
    """

    token_ids: Sequence[int]
    completion_mask: Sequence[bool]
    source: str = "sft"


@dataclass(frozen=True)
class PackingReport:
    """What became of the conversations. Counts are conversations unless they say tokens or rows."""

    conversations: int
    packed: int
    truncated: int
    dropped_overlong: int
    dropped_untrained: int
    rows: int
    tokens: int
    trained_tokens: int
    fill_rate: float
    """Share of the row positions that hold a token."""

    def __str__(self) -> str:
        lost = {
            "cut to the row length": self.truncated,
            "left out, too long": self.dropped_overlong,
            "left out, nothing to train on": self.dropped_untrained,
        }
        notes = "".join(f"; {count} {what}" for what, count in lost.items() if count)
        return (
            f"{self.packed} of {self.conversations} conversations in {self.rows} rows, {self.fill_rate:.1%} full,"
            f" {self.trained_tokens} of {self.tokens} tokens trained{notes}"
        )


def tokenise_conversations(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    source: str = "sft",
    *,
    questions: bool = False,
    chunk: int = 512,
) -> Iterator[Conversation]:
    """Yield the conversations of `rows` as tokens; rows without one are passed over.

    Args:
        questions: train what others said too. A conversation trained in parts has every turn trained once: earlier
            turns are context in the later parts, where their thoughts are gone.

    Raises:
        NurtureError: no row holds a conversation, or the template gives no exact mask.
    """
    pairs = conversations(rows, source)
    while whole := list(islice(pairs, chunk)):
        block = [
            (part, kwargs, later)
            for turns, kwargs in whole
            for later, part in enumerate(_trained_parts(turns, kwargs, tokenizer))
        ]
        if all(not kwargs for _, kwargs, _ in block):
            encoded = tokenizer.encode_conversations([turns for turns, _, _ in block])
        else:
            encoded = [tokenizer.encode_conversation(turns, **kwargs) for turns, kwargs, _ in block]
        for (token_ids, mask), (_, _, later) in zip(encoded, block, strict=True):
            if questions:
                start = _newest_request(token_ids, mask, tokenizer.end_of_turn_id) if later else 0
                mask = [place >= start for place in range(len(token_ids))]
            yield Conversation(token_ids, mask, source)


def _newest_request(token_ids: Sequence[int], mask: Sequence[bool], end_of_turn: int) -> int:
    """Return where the request begins that the trained replies answer: behind the last turn but one before them."""
    reply = list(mask).index(True)
    ends = [place for place, token in enumerate(token_ids[:reply]) if token == end_of_turn]
    return ends[-2] + 1 if len(ends) > 1 else 0


def _trained_parts(
    turns: Sequence[Message], kwargs: Mapping[str, Any], tokenizer: Tokenizer
) -> list[Sequence[Message]]:
    """Return what a conversation is trained as: itself, or parts where its template drops earlier thoughts."""
    if not any(turn["role"] == "assistant" and holds_thought(turn) for turn in turns):
        return [turns]
    return unfolded(turns, tokenizer.render(turns, **kwargs))


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return groups of indices whose lengths sum to at most `capacity` each; O(n log n).

    Raises:
        NurtureError: a length is above the capacity or below 1.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and (lengths[order[0]] > capacity or lengths[order[-1]] < 1):
        raise NurtureError(
            f"lengths must be 1 to {capacity}, got {lengths[order[-1]]} to {lengths[order[0]]}"
        )
    bins: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # free room -> bins that have it
    rooms: list[int] = []  # its keys that hold a bin, sorted: at most `capacity` of them
    for index in order:
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            bins.append([])
            bin_index, room = len(bins) - 1, capacity
        else:
            room = rooms[place]
            bin_index = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        bins[bin_index].append(index)
        room -= length
        if room:
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(bin_index)
    return bins


class PackedRows:
    """What every source of packed rows can tell of its epochs.

    Attributes:
        batch_size: rows in a global batch.
        rows_per_epoch: rows that hold everything once.
        sources: names of the sources, in order of appearance.
    """

    batch_size: int
    rows_per_epoch: int
    sources: tuple[str, ...]

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each source has been read in full once `step` steps are done."""
        return dict.fromkeys(self.sources, step * self.batch_size / self.rows_per_epoch)

    def steps(self, epochs: float) -> int:
        """Return the number of steps that read everything `epochs` times, rounded up."""
        return max(1, int(np.ceil(epochs * self.rows_per_epoch / self.batch_size - 1e-9)))


class ConversationBatches(PackedRows):
    """Batches of packed conversations, a pure function of (seed, step, rank, world size).

    Attributes:
        report: what was packed, cut and left out.
        rows_per_epoch: rows that hold every conversation once.
        sources: names of the sources, in order of appearance.
    """

    def __init__(
        self,
        conversations: Iterable[Conversation | tuple[Sequence[int], Sequence[bool], str]],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        pad_token_id: int,
        overlong: Literal["truncate", "drop"] = "truncate",
    ) -> None:
        """Pack `conversations` into rows.

        Args:
            batch_size: B, rows in a global batch.
            sequence_length: T, tokens in a row.
            overlong: what to do with conversations longer than T.

        Raises:
            NurtureError: nothing is left to train on.
        """
        if overlong not in ("truncate", "drop"):
            raise NurtureError(f"overlong must be truncate or drop, got {overlong!r}")
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self._pad = pad_token_id
        self._counter = np.arange(sequence_length)
        self._collect(map(Conversation._make, conversations), overlong)
        self._lengths = np.diff(self._starts)
        self._bins = best_fit_decreasing(self._lengths.tolist(), sequence_length)
        self.rows_per_epoch = len(self._bins)
        self._finish_report()
        self._layout = lru_cache(maxsize=2)(self._make_layout)

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return rank's rows of the global batch of `step`: (B / world_size, T) each."""
        if step < 0:
            raise NurtureError(f"step must be 0 or more, got {step}")
        mine = rank_rows(self.batch_size, rank, world_size)
        rows = step * self.batch_size + np.arange(self.batch_size)[mine]
        fillers = (self._pad, IGNORE_INDEX, 0, -1, 0)
        fields = [np.full((len(rows), self.sequence_length), filler, dtype=np.int64) for filler in fillers]
        for index, number in enumerate(rows.tolist()):
            self._fill_row(number, [field[index] for field in fields])
        token_ids, labels, position_ids, document_ids, source_ids = map(torch.from_numpy, fields)
        return Batch(token_ids, labels, position_ids, document_ids, source_ids, self.sources)

    # ---- packing ------------------------------------------------------------------------------------------------

    def _collect(self, conversations: Iterable[Conversation], overlong: str) -> None:
        """Keep what can be trained on, as three flat arrays."""
        tokens: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        owners: list[int] = []
        sources: dict[str, int] = {}
        self._counts = dict.fromkeys(
            ("conversations", "truncated", "dropped_overlong", "dropped_untrained"), 0
        )
        for conversation in conversations:
            self._counts["conversations"] += 1
            if len(conversation.token_ids) != len(conversation.completion_mask):
                raise NurtureError(
                    f"conversation {self._counts['conversations']}: {len(conversation.token_ids)} tokens but"
                    f" {len(conversation.completion_mask)} mask values"
                )
            too_long = len(conversation.token_ids) > self.sequence_length
            if too_long and overlong == "drop":
                self._counts["dropped_overlong"] += 1
                continue
            token_ids = np.asarray(conversation.token_ids[: self.sequence_length], dtype=np.int64)
            shifted = np.full(len(token_ids), IGNORE_INDEX, dtype=np.int64)
            trained = np.asarray(conversation.completion_mask[1 : self.sequence_length], dtype=bool)
            shifted[:-1][trained] = token_ids[1:][trained]
            if not trained.any():
                self._counts["dropped_untrained"] += 1
                continue
            self._counts["truncated"] += too_long
            tokens.append(token_ids.astype(np.int32))
            labels.append(shifted.astype(np.int32))
            owners.append(sources.setdefault(conversation.source, len(sources)))
        if not tokens:
            overlong_ones, untrained = self._counts["dropped_overlong"], self._counts["dropped_untrained"]
            reasons = (
                (overlong_ones, "longer than a row"),
                (
                    untrained,
                    "without an assistant's token inside a row: no reply, or a prompt that fills the row",
                ),
            )
            lost = ", ".join(f"{count} {reason}" for count, reason in reasons if count)
            raise NurtureError(
                f"nothing to train on: of {self._counts['conversations']} conversations none is left"
                f"{f' ({lost})' if lost else ''}; a row has {self.sequence_length} tokens (sequence_length)"
            )
        self._tokens, self._labels = np.concatenate(tokens), np.concatenate(labels)
        self._starts = [0, *accumulate(map(len, tokens))]
        self._owners = owners
        self.sources = tuple(sources)

    def _finish_report(self) -> None:
        self.report = PackingReport(
            conversations=self._counts["conversations"],
            packed=len(self._lengths),
            truncated=self._counts["truncated"],
            dropped_overlong=self._counts["dropped_overlong"],
            dropped_untrained=self._counts["dropped_untrained"],
            rows=self.rows_per_epoch,
            tokens=len(self._tokens),
            trained_tokens=int((self._labels != IGNORE_INDEX).sum()),
            fill_rate=len(self._tokens) / (self.rows_per_epoch * self.sequence_length),
        )

    def _make_layout(self, epoch: int) -> list[list[int]]:
        """Return the conversations of each row of an epoch.

        Conversations of equal length trade places and rows are shuffled, so neighbours change; the lengths in a row,
        and with them the number of rows, do not.
        """
        count = len(self._lengths)
        mixed = shuffled(count, "conversations", self.seed, epoch)
        by_length = np.lexsort((np.arange(count), self._lengths))
        mixed_by_length = mixed[np.argsort(self._lengths[mixed], kind="stable")]
        stand_in = np.empty(count, dtype=np.int64)
        stand_in[by_length] = mixed_by_length
        return [
            [int(stand_in[i]) for i in self._bins[row]]
            for row in shuffled(self.rows_per_epoch, "packed rows", self.seed, epoch)
        ]

    def _fill_row(self, number: int, fields: list[np.ndarray]) -> None:
        """Write one row of the endless sequence of rows into (T,) views of a batch's fields."""
        epoch, place = divmod(number, self.rows_per_epoch)
        token_ids, labels, position_ids, document_ids, source_ids = fields
        start = 0
        for document, member in enumerate(self._layout(epoch)[place]):
            first, last = self._starts[member], self._starts[member + 1]
            here = slice(start, start + last - first)
            token_ids[here], labels[here] = self._tokens[first:last], self._labels[first:last]
            position_ids[here] = self._counter[: last - first]
            document_ids[here], source_ids[here] = document, self._owners[member]
            start = here.stop
