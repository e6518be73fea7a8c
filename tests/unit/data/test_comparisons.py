"""Rankings, pairs and ratings into each other; comparisons in packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nurture.data.comparisons import Comparison, ComparisonBatches, pairs_of, tokenise_comparisons
from nurture.data.rankings import agreement, comparison_record, join_pairs
from nurture.data.rows import Row, parse_ranking, parse_row, ranking_text
from nurture.errors import NurtureError

RECORD = {"prompt": "Q", "responses": ["a", "b", "c", "d"], "ranking": "D > C > A = B"}


def pair_records(row: Row) -> Iterator[dict[str, Any]]:
    """Yield a ranked row as chosen/rejected objects, one for every pair."""
    for chosen, rejected, tied in [(*p, False) for p in row.pairs()] + [(*p, True) for p in row.ties()]:
        yield {
            "prompt": "Q",
            "chosen": row.responses[chosen][0]["content"],
            "rejected": row.responses[rejected][0]["content"],
            "comparison": "one",
            "pair": ranking_text([[chosen, rejected]] if tied else [[chosen], [rejected]]),
            "tie": tied,
        }


def test_forms_are_lossless():
    row = parse_row(RECORD, "f:1")
    assert ranking_text(row.ranking) == RECORD["ranking"]
    assert parse_row(comparison_record(row), "f:1").ranking == row.ranking
    pairs = [parse_row(record, f"f:{i}") for i, record in enumerate(pair_records(row))]
    assert len(pairs) == 6
    (joined,) = join_pairs(pairs)
    assert (joined.ranking, joined.responses) == (row.ranking, row.responses)


def test_ratings_are_a_ranking_with_distances():
    row = parse_row({"prompt": "Q", "responses": ["a", "b", "c"], "ratings": [1, 3, 1]}, "f:1")
    assert row.ranking == ((1,), (0, 2))
    assert row.metadata["ratings"] == (1.0, 3.0, 1.0)
    with pytest.raises(NurtureError, match=r"f:1.*ratings.*3 numbers"):
        parse_row({"prompt": "Q", "responses": ["a", "b", "c"], "ratings": [1, 3]}, "f:1")


def test_contradicting_pairs_are_named():
    base = {"prompt": "Q", "comparison": "x"}
    said = [("A > B", "a", "b"), ("B > C", "b", "c"), ("C > A", "c", "a")]
    rows = [parse_row({**base, "pair": p, "chosen": c, "rejected": r}, "f:1") for p, c, r in said]
    with pytest.raises(NurtureError, match=r"comparison 'x'.*rows 0, 1, 2.*contradict"):
        join_pairs(rows)


def test_agreement_by_hand():
    one, other = parse_ranking("A > B > C", 3, "f"), parse_ranking("B > A > C", 3, "f")
    assert agreement([(one, other)]).ordered == pytest.approx(2 / 3)


def test_of_a_long_prompt_the_end_is_kept():
    class Letters:
        """A token a character."""

        def encode_prompt(self, turns, **_):
            return [ord(c) for c in turns[0]["content"]]

        def encode_conversation(self, turns, **_):
            prompt, reply = self.encode_prompt(turns), [ord(c) for c in turns[-1]["content"]]
            return prompt + reply, [False] * len(prompt) + [True] * len(reply)

    row = parse_row({"prompt": "abcdef", "responses": ["x", "yz"], "ranking": "A > B"}, "f:1")
    whole, cut = (next(iter(tokenise_comparisons([row], Letters(), prompt_tokens=n))) for n in (None, 2))
    assert (whole.prompt_tokens, cut.prompt_tokens) == (6, 2)
    assert ["".join(map(chr, answer)) for answer in cut.answers] == ["efx", "efyz"]


def test_every_prompt_weighs_the_same_in_any_split():
    comparisons = [
        Comparison(tuple([7] * (3 + i) for i in range(k)), 2, tuple((i,) for i in range(k)))
        for k in (2, 3, 5)
    ]
    assert len(pairs_of(comparisons[2])) == 10
    batches = ComparisonBatches(comparisons, batch_size=4, sequence_length=32, seed=0, pad_token_id=0)
    batch = batches(0)
    assert batch.loss_count == sum(part.loss_count for part in batch.split(4))
    for row in range(4):
        for answer, end in enumerate(batch.answer_ends[row].tolist()):
            if end >= 0:
                assert batch.document_ids[row, end] == answer
