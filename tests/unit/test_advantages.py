"""Credit assignment against double loops over plain numbers, and against values worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nurture.advantages import (
    gae,
    group_advantages,
    leave_one_out,
    overlong_penalty,
    reinforce_plus_plus,
    spread,
    state_values,
    token_rewards,
    whiten,
    zero_variance_groups,
)


def random_rows(
    seed: int, rows: int = 4, columns: int = 9
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and a mask with prompts, gaps (environment turns) and padding; one row has no token at all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask[:, 0] = False
    mask[0] = False
    rewards = torch.randn(rows, columns, generator=generator)
    return rewards, torch.randn(rows, columns, generator=generator), mask


def slow_gae(rewards, values, mask, discount, trace):
    """A_t = sum_k (discount trace)^k delta_{t+k} over the row's own tokens, straight from the definition."""
    advantages = torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        steps = [t for t in range(rewards.shape[1]) if mask[row, t]]
        for i, t in enumerate(steps):
            total = 0.0
            for k in range(len(steps) - i):
                here, after = steps[i + k], steps[i + k + 1] if i + k + 1 < len(steps) else None
                following = float(values[row, after]) if after is not None else 0.0
                delta = float(rewards[row, here]) + discount * following - float(values[row, here])
                total += (discount * trace) ** k * delta
            advantages[row, t] = total
    return advantages


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_gae_equals_its_definition(seed: int, discount: float, trace: float) -> None:
    rewards, values, mask = random_rows(seed)
    advantages, returns = gae(rewards, values, mask, discount, trace)
    expected = slow_gae(rewards, values, mask, discount, trace)
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, (expected + values) * mask, atol=1e-5, rtol=1e-5)


def test_with_trace_one_the_return_is_the_sum_of_rewards_to_come() -> None:
    rewards, values, mask = random_rows(7)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_come, atol=1e-5, rtol=1e-5)


def test_what_lies_outside_the_mask_changes_nothing() -> None:
    rewards, values, mask = random_rows(3)
    noisy = gae(rewards + 100 * ~mask, values - 50 * ~mask, mask)
    for ours, theirs in zip(noisy, gae(rewards, values, mask), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_token_rewards_by_hand() -> None:
    mask = torch.tensor([[False, True, True, False], [False, True, False, True], [False] * 4])
    kl = torch.tensor([[9.0, 1.0, -2.0, 9.0], [9.0, 3.0, 9.0, 4.0], [1.0] * 4])
    got = token_rewards(torch.tensor([5.0, 7.0, 11.0]), kl, mask, 0.1)
    expected = torch.tensor([[0.0, -0.1, 5.2, 0.0], [0.0, -0.3, 0.0, 6.6], [0.0] * 4])
    torch.testing.assert_close(got, expected)


def test_a_value_belongs_to_the_token_that_is_chosen_after_it() -> None:
    mask = torch.tensor([[False, True, True, False]])
    assert state_values(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), mask).tolist() == [[0.0, 1.0, 2.0, 0.0]]


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_whitened_tokens_have_mean_zero_and_variance_one_over_the_mask_alone(seed: int) -> None:
    values, noise, mask = random_rows(seed, rows=5, columns=12)
    mask[1, 1:4] = True
    got = whiten(values * 3 + 8 + noise * 1e3 * ~mask, mask)
    assert float(got[mask].mean()) == pytest.approx(0, abs=1e-5)
    assert float(got[mask].var()) == pytest.approx(1, rel=1e-4)
    assert not got[~mask].any()
    kept = whiten(values, mask, keep_mean=True)[mask]
    assert float(kept.mean()) == pytest.approx(float(values[mask].mean()), abs=1e-5)


def test_whitening_in_two_processes_is_whitening_the_whole_batch() -> None:
    """`add_up` is called in the same order by all; here the parts' sums are collected first, then replayed."""
    values, _, mask = random_rows(5, rows=6)
    whole = whiten(values, mask)
    parts = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    rounds: list[torch.Tensor] = []

    def total(part: int, call: int) -> torch.Tensor:
        def collect(sums: torch.Tensor) -> torch.Tensor:
            collected.append(sums)
            return rounds[len(collected) - 1] if len(collected) <= len(rounds) else sums

        collected: list[torch.Tensor] = []
        whiten(*parts[part], add_up=collect)
        return collected[call]

    rounds.append(total(0, 0) + total(1, 0))
    rounds.append(total(0, 1) + total(1, 1))
    for part, rows in enumerate((slice(0, 2), slice(2, 6))):
        replay = iter(rounds)
        torch.testing.assert_close(whiten(*parts[part], add_up=lambda _, r=replay: next(r)), whole[rows])


GROUPS = torch.tensor([7, 3, 7, 3, 7, 9])
REWARDS = torch.tensor([1.0, 0.5, 3.0, 0.5, 5.0, 2.0])


def members(group: int, but: int | None = None) -> list[float]:
    return [float(REWARDS[i]) for i in range(6) if GROUPS[i] == group and i != but]


def test_group_advantages_by_loop() -> None:
    for scale in ("group", "batch", "none"):
        expected = []
        for i in range(6):
            own = members(int(GROUPS[i]))
            centred = float(REWARDS[i]) - statistics.mean(own)
            spread_ = {
                "group": statistics.stdev(own) if len(own) > 1 else 0.0,
                "batch": statistics.stdev(REWARDS.tolist()),
                "none": 1.0 - 1e-4,
            }[scale]
            expected.append(centred / (spread_ + 1e-4))
        torch.testing.assert_close(group_advantages(REWARDS, GROUPS, scale), torch.tensor(expected))


def test_leave_one_out_by_loop() -> None:
    expected = []
    for i in range(6):
        others = members(int(GROUPS[i]), but=i)
        expected.append(float(REWARDS[i]) - statistics.mean(others) if others else 0.0)
    torch.testing.assert_close(leave_one_out(REWARDS, GROUPS), torch.tensor(expected))


def test_what_nothing_could_score_moves_neither_itself_nor_its_group() -> None:
    rewards = torch.tensor([1.0, math.nan, 3.0, 2.0, 2.0, math.nan])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    got = group_advantages(rewards, groups, "none")
    assert got.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert leave_one_out(rewards, groups).tolist() == [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]
    assert zero_variance_groups(rewards, groups).tolist() == [False, True, True]


def test_equal_rewards_teach_nothing() -> None:
    rewards, groups = torch.full((4,), 0.3), torch.tensor([0, 0, 1, 1])
    for scale in ("group", "batch", "none"):
        assert not group_advantages(rewards, groups, scale).any()
    assert zero_variance_groups(rewards, groups).all()


def test_reinforce_plus_plus_by_loop() -> None:
    _, kl, mask = random_rows(2)
    rewards, groups = torch.tensor([4.0, 1.0, -1.0, 2.0]), torch.tensor([0, 0, 1, 1])
    for baseline in (None, groups):
        raw = torch.zeros_like(kl)
        for row in range(4):
            reward = float(rewards[row])
            if baseline is not None:
                reward -= statistics.mean(float(rewards[i]) for i in range(4) if groups[i] == groups[row])
            for t in range(kl.shape[1]):
                later = sum(float(kl[row, s]) for s in range(t, kl.shape[1]) if mask[row, s])
                raw[row, t] = reward - 0.2 * later
        inside = raw[mask]
        expected = ((raw - inside.mean()) / inside.std()) * mask
        got = reinforce_plus_plus(rewards, kl, mask, 0.2, baseline)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_spread_gives_every_completion_token_its_rollouts_advantage() -> None:
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert spread(torch.tensor([2.0, -1.0]), mask).tolist() == [[0, 2, 2], [0, -1, 0]]


def test_overlong_penalty_by_hand() -> None:
    lengths = torch.tensor([10, 80, 90, 100, 120])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -1, -1])
    assert overlong_penalty(lengths, 100, 0).tolist() == [0, 0, 0, 0, -1]
