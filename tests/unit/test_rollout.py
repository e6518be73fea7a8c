"""Rollout batches: alignment, padding, splitting, and logprobs that equal the model's on the policy's tokens."""

from __future__ import annotations

import pytest
import torch

from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.rollout import Rollout, RolloutBatch, collate, token_logprobs
from nurture.types import IGNORE_INDEX


def rollout(prompt: list[int], turns: list[tuple[list[int], bool]], **more: object) -> Rollout:
    """Return a rollout of the prompt and (tokens, whether the policy wrote them) turns."""
    token_ids, completion_mask = list(prompt), [False] * len(prompt)
    for tokens, mine in turns:
        token_ids += tokens
        completion_mask += [mine] * len(tokens)
    logprobs = [-0.1 * mine for mine in completion_mask]
    return Rollout(prompt, token_ids, completion_mask, logprobs, **more)  # type: ignore[arg-type]


@pytest.fixture
def batch() -> RolloutBatch:
    return collate(
        [
            rollout([1, 2], [([3, 4], True), ([5], False), ([6], True)], reward=1.0, group=0),
            rollout([7], [([8], True)], reward=-0.5, group=3),
            rollout([1, 2, 3], [([9, 10], True)], group=3),
        ],
        pad_token_id=11,
    )


def test_collate_pads_right_and_keeps_the_mask(batch: RolloutBatch) -> None:
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 11, 11, 11, 11], [1, 2, 3, 9, 10, 11]]
    assert batch.completion_mask.int().tolist() == [
        [0, 0, 1, 1, 0, 1],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0],
    ]
    assert batch.document_ids.tolist() == [[0] * 6, [0, 0, -1, -1, -1, -1], [0, 0, 0, 0, 0, -1]]
    assert batch.rewards.tolist() == [1.0, -0.5, 0.0]
    assert batch.groups.tolist() == [0, 3, 3]
    assert batch.loss_count == 6


def test_labels_are_the_policys_next_tokens(batch: RolloutBatch) -> None:
    n = IGNORE_INDEX
    assert batch.labels.tolist() == [[n, 3, 4, n, 6, n], [8, n, n, n, n, n], [n, n, 9, 10, n, n]]


def test_split_cuts_each_part_to_its_longest_row(batch: RolloutBatch) -> None:
    batch.extra = {
        "advantages": batch.rewards[:, None].expand(3, 6),
        "weights": torch.tensor([1.0, 2.0, 3.0]),
    }
    first, second, third = batch.split(3)
    assert [part.token_ids.shape[1] for part in (first, second, third)] == [6, 2, 5]
    assert second.extra["advantages"].tolist() == [[-0.5, -0.5]]
    assert second.extra["weights"].tolist() == [2.0]
    assert sum(part.loss_count for part in batch.split(2)) == batch.loss_count
    batch.row_count = 1
    assert [part.loss_count for part in batch.split(2)] == [2, 1]


def test_select_reorders(batch: RolloutBatch) -> None:
    assert batch.select(torch.tensor([2, 1])).token_ids.tolist() == [[1, 2, 3, 9, 10], [7, 8, 11, 11, 11]]


def test_token_logprobs_are_of_token_t_given_those_before(batch: RolloutBatch) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=12, width=16, layers=2, heads=2, init_std=0.3))
    with torch.no_grad():
        logprobs = token_logprobs(model, batch, temperature=0.7)
        row = model(torch.tensor([[1, 2, 3, 4, 5]])).div(0.7).log_softmax(-1)[0].tolist()
    assert logprobs[0].tolist() == pytest.approx([0, 0, row[1][3], row[2][4], 0, row[4][6]], abs=1e-5)
    assert not logprobs[~batch.completion_mask].any()


def test_unequal_arrays_are_refused() -> None:
    broken = rollout([1], [([2], True)])
    broken.logprobs.pop()
    with pytest.raises(ValueError, match="rollout 0"):
        collate([broken])
    with pytest.raises(ValueError, match="at least one"):
        collate([])
