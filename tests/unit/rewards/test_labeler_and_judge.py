"""The simulated labeler's agreement, and a judge that is asked in both orders."""

from __future__ import annotations

from random import Random

import pytest

from nurture.rewards.judge import position_bias, rank_with_judge, read_verdict
from nurture.rewards.labeler import Labeler, calibrate, measured_agreement

PROMPT = [{"role": "user", "content": "Q"}]


def test_calibrated_labelers_agree_as_instructgpts_did():
    random = Random(0)
    golds = [[random.random() for _ in range(5)] for _ in range(400)]
    labeler = calibrate(golds)
    assert measured_agreement(labeler, golds, Random(7)).ordered == pytest.approx(0.73, abs=0.02)


def test_a_labeler_without_doubt_ranks_by_gold():
    assert Labeler(0.0).rank([0.2, 0.9, 0.2], Random(0)) == ((1,), (0, 2))


def test_a_judge_that_only_sees_places_ties_everything():
    (judged,) = rank_with_judge(lambda questions: ["A"] * len(questions), [PROMPT], [["x", "y", "z"]])
    assert judged.ranking == ((0, 1, 2),)
    assert position_bias([judged]) == 1.0


def test_a_consistent_judge_is_believed():
    def longer(questions):
        texts = [q[0]["content"] for q in questions]
        parts = [
            (t.split("[Answer A]\n")[1].split("\n")[0], t.split("[Answer B]\n")[1].split("\n")[0])
            for t in texts
        ]
        return ["A" if len(a) > len(b) else "B" for a, b in parts]

    (judged,) = rank_with_judge(longer, [PROMPT], [["x", "xxx", "xx"]])
    assert judged.ranking == ((1,), (2,), (0,))
    assert read_verdict("Answer B is better.") == "B"
