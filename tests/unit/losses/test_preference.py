"""Preference losses against numbers worked out by hand, and against what must not matter: packing, padding, order."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from nurture.data.preference import Preference, PreferenceBatches
from nurture.losses.preference import (
    PAIR_LOSSES,
    PreferenceLoss,
    apo_down,
    apo_zero,
    dpo,
    ipo,
    kto,
    sequence_logprobs,
)

H = torch.tensor([0.0, 1.0, -2.0, 3.0])
L = torch.tensor([0.0, -1.0, 1.0, 3.0])


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (dpo, lambda w, l: -math.log(s(0.5 * (w - l)))),
        (ipo, lambda w, l: (w - l - 1.0) ** 2),
        (apo_zero, lambda w, l: 1 - s(0.5 * w) + s(0.5 * l)),
        (apo_down, lambda w, l: s(0.5 * w) + 1 - s(0.5 * (w - l))),
    ],
)
def test_formulas_at_beta_one_half(loss, formula) -> None:
    expected = [formula(w, l) for w, l in zip(H.tolist(), L.tolist(), strict=True)]
    torch.testing.assert_close(loss(H, L, 0.5), torch.tensor(expected))


def test_values_where_the_policy_is_the_reference() -> None:
    zero = torch.zeros(1)
    values = {name: float(loss(zero, zero, 0.1)) for name, loss in PAIR_LOSSES.items()}
    assert values == pytest.approx({"dpo": math.log(2), "ipo": 25.0, "apo_zero": 1.0, "apo_down": 1.0})


def test_apo_zero_raises_the_chosen_and_apo_down_lowers_both() -> None:
    for loss, signs in ((apo_zero, (-1, 1)), (apo_down, (0, 1))):
        chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        loss(chosen, rejected, 0.1).sum().backward()
        assert [
            round(float(x.grad.sign())) if abs(float(x.grad)) > 1e-9 else 0 for x in (chosen, rejected)
        ] == list(signs)
    # Once the rejected is far below, apo_down pushes the chosen down too.
    chosen = torch.zeros(1, requires_grad=True)
    apo_down(chosen, torch.full((1,), -50.0), 0.1).sum().backward()
    assert float(chosen.grad) > 0


def test_far_ratios_neither_overflow_nor_lose_their_gradient_sign() -> None:
    for loss in PAIR_LOSSES.values():
        chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
        value = loss(chosen, -chosen.detach(), 0.1)
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(chosen.grad).all()


def test_kto_by_hand() -> None:
    ratios, desirable = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    expected = [1 - s(0.1 * (2 - 0.5)), 1 - s(0.1 * (0.5 - 2))]
    torch.testing.assert_close(kto(ratios, desirable, torch.tensor(0.5), 0.1), torch.tensor(expected))


class Letters(nn.Module):
    """log p(token) = -token * weight, whatever came before: sums can be done in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))

    def forward(self, token_ids: Tensor, *, labels: Tensor, **_: Tensor) -> Tensor:
        return torch.where(labels >= 0, -self.weight * labels, 0.0)


def preference(prompt: list[int], *answers: list[int], ranking=((0,), (1,))) -> Preference:
    sequences = tuple([*prompt, *answer] for answer in answers)
    masks = tuple([False] * len(prompt) + [True] * len(answer) for answer in answers)
    return Preference(sequences, len(prompt), ranking, masks=masks)


PREFERENCES = [
    preference([1, 2], [3], [4, 5]),
    preference([9, 9, 9, 9], [7, 7], [1]),
    preference([5], [1, 1], [2, 2], [8], ranking=((1,), (0, 2))),
]


def batches(preferences: list[Preference], sequence_length: int = 40) -> PreferenceBatches:
    return PreferenceBatches(
        preferences, batch_size=2, sequence_length=sequence_length, seed=0, pad_token_id=0
    )


def test_only_completions_count_and_each_answer_is_summed_by_itself() -> None:
    source = batches(PREFERENCES)
    found = {}
    for batch, members in source.in_order(1):
        logprobs = sequence_logprobs(Letters(), batch)
        place = 0
        for member in members[0]:
            count = len(source.preferences[member].answers)
            found[member] = logprobs[0, place : place + count].tolist()
            place += count
    assert [found[i] for i in range(3)] == [
        pytest.approx([-0.3, -0.9]),
        pytest.approx([-1.4, -0.1]),
        pytest.approx([-0.2, -0.4, -0.8]),
    ]


@pytest.mark.parametrize("kind", ["dpo", "ipo", "apo_zero", "apo_down"])
def test_packing_and_splitting_change_neither_loss_nor_gradient(kind: str) -> None:
    def measure(sequence_length: int, rows: int) -> tuple[float, float, dict[str, float]]:
        model, source = Letters(), batches(PREFERENCES, sequence_length)
        source.reference_logprobs += 0.25 * torch.arange(9.0).view(3, 3).numpy()
        loss_fn, total, sums = PreferenceLoss(kind, 0.5, nll_weight=0.1), 0.0, Counter()
        for batch, _ in source.in_order(rows):
            for part in batch.split(2):
                result = loss_fn(model, part)
                result.total.backward()
                total += float(result.total.detach())
                for name, (amount, count) in result.metrics.items():
                    sums[name] += amount
                    sums["count"] += count / len(result.metrics)
        return total, float(model.weight.grad), sums

    whole = measure(40, 8)
    assert whole[2]["count"] == pytest.approx(3)
    for other in (measure(40, 1), measure(14, 2)):
        assert other[0] == pytest.approx(whole[0], rel=1e-5)
        assert other[1] == pytest.approx(whole[1], rel=1e-5)
        assert other[2] == pytest.approx(whole[2], rel=1e-4)


def test_a_ranking_counts_as_one_item_however_many_pairs_it_has() -> None:
    (batch, _), *_ = batches(PREFERENCES).in_order(8)
    assert batch.loss_count == 3
    assert (batch.weights > 0).sum() == 4  # one, one, and the best of three against each of two


def test_metrics_of_a_pair() -> None:
    (batch, _), *_ = batches([PREFERENCES[1]]).in_order(1)
    batch.reference_logprobs[0, :2] = torch.tensor([-2.0, -0.3])
    metrics = PreferenceLoss("dpo", 0.5)(Letters(), batch).metrics
    values = {name: amount / count for name, (amount, count) in metrics.items()}
    assert values["chosen_logprob"] == pytest.approx(-1.4)
    assert values["chosen_drift"] == pytest.approx(0.6)
    assert values["rejected_drift"] == pytest.approx(0.2)
    assert values["margin"] == pytest.approx(0.2)
    assert values["pair_accuracy"] == 1.0
    assert values["loss"] == pytest.approx(-math.log(s(0.2)))


def test_equal_ratios_count_half_in_accuracy() -> None:
    (batch, _), *_ = batches(PREFERENCES[:2]).in_order(1)
    batch.reference_logprobs = sequence_logprobs(Letters(), batch).detach()
    amount, count = PreferenceLoss("apo_zero", 0.1)(Letters(), batch).metrics["pair_accuracy"]
    assert amount / count == 0.5


def test_a_policy_that_is_its_reference_is_right_about_half_of_the_thumbs() -> None:
    (batch, _), *_ = batches(
        [preference([1], [2], [3]), preference([1], [6], [5], ranking=((1,), (0,)))]
    ).in_order(1)
    batch.reference_logprobs = sequence_logprobs(Letters(), batch).detach()
    amount, count = PreferenceLoss("kto", 1.0)(Letters(), batch).metrics["label_accuracy"]
    assert amount / count == 0.5


def test_kto_reads_the_thumb_from_the_ranking_and_subtracts_the_unrelated() -> None:
    good = preference([1], [2], [3])
    bad = preference([1], [6], [5], ranking=((1,), (0,)))
    (batch, _), *_ = batches([good, bad]).in_order(1)
    batch.reference_logprobs.fill_(-1.0)
    result = PreferenceLoss("kto", 1.0, undesirable_weight=2.0)(Letters(), batch)
    # Log-ratios: own 0.8 and 0.4, unrelated 0.7 and 0.5, so z = 0.6.
    expected = (1 - s(0.8 - 0.6)) + 2 * (1 - s(0.6 - 0.4))
    assert float(result.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert result.metrics["reference_point"][0] == pytest.approx(0.6)
    assert batch.loss_count == 2
