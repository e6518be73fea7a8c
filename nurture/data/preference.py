"""Preferences as tokens: ranked answers of one prompt in one row, with what the frozen reference makes of each.

Built on comparisons.py: an answer passes through the model once, however many pairs it is in, and no pair is split over
microbatches. Here in addition only the completion's tokens count (never the prompt's, nor earlier assistant turns, nor
tool results), and every answer carries the reference's logprob, computed once before training.

For KTO, which needs no pairs, an example is one completion with a thumb up or down. Its estimate of the KL needs
completions of *other* prompts; the example is a comparison of two answers, its own completion at the first place and an
unrelated one at the second, and the ranking says which thumb it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nurture.data.comparisons import Comparison, ComparisonBatch, ComparisonBatches, encode_reply
from nurture.data.rows import Row
from nurture.errors import NurtureError
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX, Message

CUT = "answers cut to answer_tokens"
"""Rows of which an answer is longer: it loses its end token, and with it what teaches to stop."""


@dataclass(frozen=True)
class Preference(Comparison):
    """A comparison that knows which tokens of its answers count.

    Attributes:
        masks: for each answer (n,) bool, True where the token belongs to the completion and the assistant wrote it.
    """

    masks: tuple[Sequence[bool], ...] = ()


@dataclass(kw_only=True)
class PreferenceBatch(ComparisonBatch):
    """Packed rows of preferences; labels are completions only.

    Attributes:
        reference_logprobs: (B, R) float32 nats, the reference's summed logprob of each answer.
    """

    reference_logprobs: Tensor


def tokenise_preferences(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    source: str,
    *,
    answer_tokens: int,
    row_tokens: int,
    lost: Counter[str],
) -> Iterator[Preference]:
    """Yield the ranked rows as tokens.

    Args:
        answer_tokens: prompt and answer together are cut off after so many tokens.
        row_tokens: where all answers to a prompt do not fit into so many, the best and the worst stand for them.
        lost: counts what is left out, by reason, and the rows of which an answer was cut off.

    Raises:
        NurtureError: no row has a ranking.
    """
    seen = ranked = 0
    for row in rows:
        seen += 1
        if not row.ranking or not row.prompt:
            lost["without a ranking"] += 1
            continue
        ranked += 1
        if len(row.ranking) < 2:
            lost["all answers tied"] += 1
            continue
        encoded = _encode_answers(row, row.responses, tokenizer, answer_tokens, f"{source}, row {seen}")
        if encoded is None:
            lost["prompt leaves no room"] += 1
            continue
        ranking = row.ranking
        if sum(min(len(token_ids), answer_tokens) for token_ids, _ in encoded) > row_tokens:
            lost["reduced to best and worst"] += len(encoded) > 2
            encoded, ranking = [encoded[ranking[0][0]], encoded[ranking[-1][0]]], ((0,), (1,))
        lost[CUT] += max(len(answer) for answer, _ in encoded) > answer_tokens
        token_ids, masks = zip(*_cut(encoded, answer_tokens), strict=True)
        yield Preference(token_ids, 0, ranking, source=source, masks=masks)
    if not ranked:
        raise NurtureError(
            f"{source}: {seen} rows, but none with ranked answers; preference learning needs prompt/chosen/rejected or"
            " responses/ranking rows (docs/data.md), or `pairs` to have two models write them"
        )


def tokenise_judged(
    rows: Iterable[Row], tokenizer: Tokenizer, source: str, *, answer_tokens: int, lost: Counter[str]
) -> Iterator[Preference]:
    """Yield single completions that were judged good or bad, for KTO; arguments as in `tokenise_preferences`.

    Rows with a `label` are taken as they are; of rankings the best answers are good and the worst are bad.

    Raises:
        NurtureError: no row was judged.
    """
    examples: list[tuple[Row, Sequence[Message], bool]] = []
    seen = 0
    for row in rows:
        seen += 1
        if isinstance(row.metadata.get("label"), bool) and row.prompt and len(row.responses) == 1:
            examples.append((row, row.responses[0], bool(row.metadata["label"])))
        elif len(row.ranking) >= 2 and row.prompt:
            examples += [(row, row.responses[index], True) for index in row.ranking[0]]
            examples += [(row, row.responses[index], False) for index in row.ranking[-1]]
        else:
            lost["not judged"] += 1
    for place, (row, reply, good) in enumerate(examples):
        others = (examples[place - back] for back in range(1, len(examples)))
        unrelated = next((other for other_row, other, _ in others if other_row.prompt != row.prompt), None)
        if unrelated is None:
            raise NurtureError(f"{source}: KTO needs completions of at least two prompts")
        encoded = _encode_answers(row, [reply, unrelated], tokenizer, answer_tokens, source)
        if encoded is None:
            lost["prompt leaves no room"] += 1
            continue
        lost[CUT] += len(encoded[0][0]) > answer_tokens
        token_ids, masks = zip(*_cut(encoded, answer_tokens), strict=True)
        yield Preference(token_ids, 0, ((0,), (1,)) if good else ((1,), (0,)), source=source, masks=masks)
    if not examples:
        raise NurtureError(
            f"{source}: {seen} rows, but none that was judged; KTO needs prompt/completion/label or ranked rows"
        )


def _encode_answers(
    row: Row, replies: Sequence[Sequence[Message]], tokenizer: Tokenizer, answer_tokens: int, where: str
) -> list[tuple[list[int], list[bool]]] | None:
    """Return (token ids, mask of the completion) of each reply, uncut; None if one has no room for its completion."""
    assert row.prompt is not None
    prompt = tokenizer.encode_prompt(row.prompt, **row.template_kwargs)
    found = []
    for reply in replies:
        token_ids, mask = encode_reply(tokenizer, row.prompt, reply, **row.template_kwargs)
        # Where a reply begins with a line break, it may share a token with the header before it.
        start = next(
            (i for i, (a, b) in enumerate(zip(prompt, token_ids, strict=False)) if a != b), len(prompt)
        )
        if start < len(prompt) - 2:
            raise NurtureError(
                f"{where}: the chat template writes the prompt differently when a reply follows, so its completion"
                " cannot be told apart; fine-tune with another template first (sft's chat_template=FILE.jinja)"
            )
        mask = [False] * start + list(mask[start:])
        if not any(mask[:answer_tokens]):
            return None
        found.append((token_ids, mask))
    return found


def _cut(
    encoded: list[tuple[list[int], list[bool]]], answer_tokens: int
) -> list[tuple[list[int], list[bool]]]:
    return [(token_ids[:answer_tokens], mask[:answer_tokens]) for token_ids, mask in encoded]


class PreferenceBatches(ComparisonBatches):
    """Batches of packed preferences, a pure function of (seed, step, rank, world size).

    Attributes:
        reference_logprobs: (N, K) float32 of every preference's answers; zeros until they are set.
    """

    def __init__(
        self,
        preferences: Iterable[Preference],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        """Pack `preferences` into rows; arguments and errors as in `ComparisonBatches`."""
        super().__init__(
            preferences,
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=seed,
            pad_token_id=pad_token_id,
            ties=False,
        )
        self.preferences = [
            preference for preference, _ in self._members if isinstance(preference, Preference)
        ]
        most = max(len(preference.answers) for preference in self.preferences)
        self.reference_logprobs = np.zeros((len(self.preferences), most), dtype=np.float32)

    def members(self, row: int) -> list[int]:
        """Return the numbers of the preferences in a row."""
        return list(self._bins[row])

    def in_order(
        self, rows: int, rank: int = 0, world_size: int = 1, *, chosen: Sequence[int] | None = None
    ) -> Iterator[tuple[PreferenceBatch, list[list[int]]]]:
        """Yield rank's share of the rows, `rows` at a time, with the numbers of the preferences in each row.

        All ranks yield equally often, as sharded models demand; a batch too many repeats another and has no numbers.

        Args:
            chosen: numbers of the rows; by default every row once, as packed.
        """
        wanted = range(self.rows_per_epoch) if chosen is None else chosen
        chunks = -(-len(wanted) // rows)
        for turn in range(-(-chunks // world_size)):
            index = turn * world_size + rank
            first = min(index, chunks - 1) * rows
            here = wanted[first : first + rows]
            yield self._batch(here), [self.members(row) for row in here] if index < chunks else []

    def _batch(self, rows: Sequence[int]) -> PreferenceBatch:
        batch = super()._batch(rows)
        reference = torch.zeros(batch.answer_ends.shape, dtype=torch.float32)
        trained = torch.zeros(batch.labels.shape, dtype=torch.bool)
        for place, row in enumerate(rows):
            column = answer = 0
            for member in self._bins[row]:
                masks = self.preferences[member].masks
                count = len(masks)
                reference[place, answer : answer + count] = torch.from_numpy(
                    self.reference_logprobs[member, :count]
                )
                for mask in masks:
                    trained[place, column : column + len(mask) - 1] = torch.tensor(mask[1:], dtype=torch.bool)
                    column += len(mask)
                answer += count
        labels = batch.labels.masked_fill(~trained, IGNORE_INDEX)
        values = {**vars(batch), "labels": labels, "reference_logprobs": reference}
        return PreferenceBatch(**values)
