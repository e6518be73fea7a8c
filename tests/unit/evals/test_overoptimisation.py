"""Alarms that do not see gold, and how they are judged by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nurture.evals.overoptimisation import (
    AlarmConfig,
    Point,
    alarms,
    gold_fell_at,
    judge_alarms,
    record,
    repetition,
)

START = Point(0, 0.0, 0.0, 20.0, 0.05, 0.9, gold=0.5, gold_error=0.01)
CONFIG = AlarmConfig(kl=10)


def test_repetition_counts_what_occurred_before() -> None:
    assert repetition([1, 2]) == 0
    assert repetition([1, 2, 3, 4]) == 0
    assert repetition([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kl", {"kl": 11.0}),
        ("length", {"length": 31.0}),
        ("length", {"length": 12.0}),
        ("repetition", {"repetition": 0.2}),
        ("sameness", {"different": 0.4}),
    ],
)
def test_each_alarm_rings_for_its_own_reason(name: str, change: dict[str, float]) -> None:
    assert list(alarms(replace(START, step=1, **change), START, CONFIG)) == [name]
    assert not alarms(replace(START, step=1, kl=9.0, length=25.0), START, CONFIG)


def points(*golds: float, kls: tuple[float, ...] | None = None) -> list[Point]:
    kls = kls or tuple(float(i) for i in range(len(golds)))
    return [replace(START, step=i, gold=g, kl=k) for i, (g, k) in enumerate(zip(golds, kls, strict=True))]


def test_gold_has_fallen_when_it_stays_clearly_below_its_best() -> None:
    assert gold_fell_at(points(0.5, 0.6, 0.59, 0.5, 0.4)) == 3
    assert gold_fell_at(points(0.5, 0.6, 0.4, 0.6)) is None  # it came back
    assert gold_fell_at([replace(point, gold=None) for point in points(0.5, 0.1)]) is None


@pytest.mark.parametrize(
    ("golds", "kls", "verdict"),
    [
        ((0.5, 0.6, 0.4), (0, 5, 12), "right"),
        ((0.5, 0.3, 0.3), (0, 5, 12), "late"),
        ((0.5, 0.6, 0.4), (0, 5, 6), "missed"),
        ((0.5, 0.6, 0.7), (0, 5, 12), "false"),
        ((0.5, 0.6, 0.7), (0, 5, 6), "quiet"),
    ],
)
def test_alarms_are_held_against_gold(golds: tuple, kls: tuple, verdict: str) -> None:
    assert judge_alarms(points(*golds, kls=kls), CONFIG)["kl"]["verdict"] == verdict


def test_without_gold_nobody_knows() -> None:
    unknown = [replace(point, gold=None) for point in points(0.5, 0.5)]
    assert {judged["verdict"] for judged in judge_alarms(unknown, CONFIG).values()} == {"unknown"}
    assert record(unknown, CONFIG)["gold_fell_at"] is None
