"""Packing: full rows, exact masks, nothing lost silently, one order for any number of processes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nurture.data.packing import (
    Conversation,
    ConversationBatches,
    best_fit_decreasing,
    tokenise_conversations,
)
from nurture.data.rows import Row, parse_row
from nurture.errors import NurtureError
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX

PAD = 3


def conversation(
    first: int, length: int, trained: slice = slice(2, None), source: str = "sft"
) -> Conversation:
    mask = np.zeros(length, dtype=bool)
    mask[trained] = True
    return Conversation(list(range(first, first + length)), mask.tolist(), source)


def make(count: int = 60, seed: int = 0) -> list[Conversation]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 30, count)
    starts = 10 + np.concatenate([[0], np.cumsum(lengths)])
    return [
        conversation(int(s), int(n), source="ab"[int(s) % 2]) for s, n in zip(starts, lengths, strict=False)
    ]


def batches(conversations, **changes) -> ConversationBatches:
    options = {"batch_size": 4, "sequence_length": 32, "seed": 1, "pad_token_id": PAD, **changes}
    return ConversationBatches(conversations, **options)


# ---- best fit ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_best_fit_keeps_everything_and_overfills_nothing(lengths, capacity):
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(index for group in bins for index in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in group) <= capacity for group in bins)
    # The classic guarantee: at most 11/9 of the best possible, plus 4.
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // capacity) * 2 + 4


@given(st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_equals_the_plain_algorithm(lengths):
    bins = best_fit_decreasing(lengths, 20)
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(20 - length)
    assert sorted(20 - sum(lengths[i] for i in group) for group in bins) == sorted(rooms)


def test_best_fit_by_hand():
    assert best_fit_decreasing([5, 7, 5, 2, 4, 2, 5, 1, 6], 10) == [[1, 3, 7], [8, 4], [0, 2], [6, 5]]
    assert best_fit_decreasing([], 10) == []
    with pytest.raises(NurtureError, match="1 to 10, got 3 to 11"):
        best_fit_decreasing([3, 11], 10)


# ---- rows -------------------------------------------------------------------------------------------------------


def test_one_row_by_hand():
    source = batches(
        [conversation(10, 5, slice(2, 4)), conversation(20, 3, slice(1, 3), "other")],
        batch_size=1,
        sequence_length=10,
    )
    batch = source(0)
    x = IGNORE_INDEX
    assert batch.token_ids.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, PAD, PAD]]
    assert batch.labels.tolist() == [[x, 12, 13, x, x, 21, 22, x, x, x]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, -1, -1]]
    assert batch.source_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch.sources == ("sft", "other")
    assert batch.loss_count == 4


def test_label_is_trained_exactly_where_the_next_token_is_the_assistants():
    conversations = make()
    written = {t for c in conversations for t, m in zip(c.token_ids, c.completion_mask, strict=True) if m}
    whole = {tuple(c.token_ids) for c in conversations}
    source = batches(conversations)
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(-(-source.rows_per_epoch // 4)):
        batch = source(step)
        for row in range(4):
            if step * 4 + row >= source.rows_per_epoch:
                continue
            token_ids, labels, documents = (
                f[row].tolist() for f in (batch.token_ids, batch.labels, batch.document_ids)
            )
            for position in range(32):
                following = position + 1 < 32 and documents[position + 1] == documents[position] >= 0
                expected = (
                    token_ids[position + 1]
                    if following and token_ids[position + 1] in written
                    else IGNORE_INDEX
                )
                assert labels[position] == expected
            for document in set(documents) - {-1}:
                seen[tuple(t for t, d in zip(token_ids, documents, strict=True) if d == document)] += 1
    assert seen == Counter(whole)


def test_every_epoch_has_every_conversation_once_in_a_new_order():
    conversations = make(200)
    source = batches(conversations, batch_size=1)
    rows = source.rows_per_epoch
    orders = []
    for epoch in range(3):
        tokens = torch.cat([source(epoch * rows + i).token_ids[0] for i in range(rows)])
        tokens = tokens[tokens != PAD].tolist()
        assert sorted(tokens) == sorted(t for c in conversations for t in c.token_ids)
        orders.append(tokens)
    assert orders[0] != orders[1] != orders[2]
    first = {frozenset(source(i).token_ids[0].tolist()) for i in range(rows)}
    second = {frozenset(source(rows + i).token_ids[0].tolist()) for i in range(rows)}
    assert first != second  # neighbours change too
    assert source.epochs(rows) == {"a": 1.0, "b": 1.0}
    assert (source.steps(1), source.steps(2.5), batches(conversations).steps(1)) == (
        rows,
        round(2.5 * rows + 0.49),
        -(-rows // 4),
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_and_restarts(world_size):
    source = batches(make())
    for step in (0, 5, 40, 1000):
        whole = source(step)
        parts = [batches(make())(step, rank, world_size) for rank in range(world_size)]
        for field in ("token_ids", "labels", "position_ids", "document_ids", "source_ids"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    assert not torch.equal(batches(make(), seed=2)(0).token_ids, source(0).token_ids)


# ---- what is lost is counted ------------------------------------------------------------------------------------


def test_overlong_conversations_are_cut_or_left_out_and_counted():
    conversations = [
        conversation(10, 20),
        conversation(100, 50, slice(5, 45)),
        conversation(200, 50, slice(40, 50)),
    ]
    cut = batches(conversations)
    assert (cut.report.truncated, cut.report.dropped_untrained, cut.report.packed) == (1, 1, 2)
    assert "1 cut to the row length; 1 left out, nothing to train on" in str(cut.report)
    token_ids = cut(0).token_ids
    assert 131 in token_ids
    assert 132 not in token_ids
    dropped = batches(conversations, overlong="drop")
    assert (dropped.report.dropped_overlong, dropped.report.packed) == (2, 1)
    assert dropped.report.conversations == 3
    with pytest.raises(NurtureError, match="truncate or drop, got 'split'"):
        batches(conversations, overlong="split")


def test_cut_exactly_at_the_first_trained_token():
    # The label of position 31 would be token 32, which is cut off: nothing is trained, so nothing is kept.
    with pytest.raises(
        NurtureError,
        match=r"of 1 conversations.*1 without .*a prompt that fills the row\); a row has 32 tokens",
    ):
        batches([conversation(10, 40, slice(32, 40))])
    assert batches([conversation(10, 40, slice(31, 40))]).report.trained_tokens == 1


def test_report():
    conversations = make(300)
    report = batches(conversations, sequence_length=64).report
    tokens = sum(len(c.token_ids) for c in conversations)
    assert report.tokens == tokens
    assert report.fill_rate == pytest.approx(tokens / (report.rows * 64))
    assert report.fill_rate > 0.95
    assert report.trained_tokens == sum(sum(c.completion_mask) for c in conversations)


@pytest.mark.parametrize("conversations", [[], [conversation(10, 5, slice(0, 0))]])
def test_nothing_to_train_on(conversations):
    with pytest.raises(NurtureError, match="nothing to train on"):
        batches(conversations)


def test_mask_of_another_length():
    with pytest.raises(NurtureError, match="conversation 1: 3 tokens but 2 mask values"):
        batches([Conversation([1, 2, 3], [True, True])])


def test_tokenised_rows():
    tokenizer = Tokenizer.train(["Hello there, how are you?"] * 3, 280)
    rows = [parse_row({"prompt": f"Q{i}", "completion": f"A{i}"}, "f:1") for i in range(5)]
    found = list(tokenise_conversations([Row(text="passed over"), *rows], tokenizer, "mine", chunk=2))
    assert [c.source for c in found] == ["mine"] * 5
    for row, got in zip(rows, found, strict=True):
        assert (got.token_ids, got.completion_mask) == tokenizer.encode_conversation(row.messages)
    report = batches(found, sequence_length=64, pad_token_id=tokenizer.pad_token_id).report
    assert report.packed == 5


def test_with_questions_every_turn_is_trained_once():
    """Where earlier thoughts are dropped, a conversation is trained in parts; what stands in both is trained in one."""
    tokenizer = Tokenizer.train(["What is 1+1? one and two 4"] * 3, 280)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\none and one\n</think>\n2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "<think>\nthree and three\n</think>\n6"},
    ]
    row = parse_row({"messages": turns}, "f:1")

    def trained(**how) -> list[str]:
        parts = tokenise_conversations([row], tokenizer, **how)
        return [
            tokenizer.decode([t for t, own in zip(c.token_ids, c.completion_mask, strict=True) if own])
            for c in parts
        ]

    replies = [f"{turns[place]['content']}<|im_end|>" for place in (2, 4, 6)]
    assert trained() == replies
    questions = [f"<|im_start|>user\n{turns[place]['content']}<|im_end|>\n" for place in (1, 3, 5)]
    whole = [f"{q}<|im_start|>assistant\n{r}\n" for q, r in zip(questions, replies, strict=True)]
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert trained(questions=True) == [system + whole[0], "\n" + whole[1], "\n" + whole[2]]
    # Without thoughts there is one part, all of it trained.
    plain = parse_row({"messages": [turns[1], {"role": "assistant", "content": "2"}] * 2}, "f:2")
    (part,) = tokenise_conversations([plain], tokenizer, questions=True)
    assert all(part.completion_mask)
