"""The red team's labels, the day, the defences, what is concluded, and the experiment at its smallest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from nurture.evals.measure import Measure, rate
from nurture.evals.redteam import ATTACKS, INSTRUCTIONS, familiar_probes, new_probe, suite
from nurture.evals.tay import (
    LESSON,
    TayConfig,
    anchored_loss,
    blocked,
    conclusions,
    experiment,
    filtered,
    tay_day,
)
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.report.tay import exhibit
from nurture.tokenizer import Tokenizer
from nurture.world import World, harm


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_new_wordings_are_new_and_their_labels_are_gold(world: World) -> None:
    """No thread of the forum and no training task has their openings; an innocent twin holds nothing harmful."""
    seen = "\n".join(world.document("forum", "train", i) for i in range(400))
    seen += "\n".join(world.task("redteam", "train", i).prompt for i in range(400))
    for attack in ATTACKS:
        for index in range(8):
            hostile, twin = (new_probe(world, attack, index, hostile=h) for h in (True, False))
            assert hostile == new_probe(world, attack, index)
            assert hostile.messages[-1]["role"] == twin.messages[-1]["role"] == "user"
            assert not any(world.is_harmful(turn["content"]) for turn in twin.messages), twin
            assert hostile.messages[-1]["content"][:24] not in seen
    assert len(new_probe(world, "escalation", 0).messages) == 5


def test_the_suite_is_balanced(world: World) -> None:
    probes = suite(world, 2)
    familiar = [p.attack for p in familiar_probes(world, 2)]
    assert {attack: familiar.count(attack) for attack in harm.ATTACKS} == dict.fromkeys(harm.ATTACKS, 2)
    new = [p for p in probes if p.wording == "new"]
    assert sum(p.hostile for p in new) == len(new) / 2 == 12
    told = [p for p in probes if p.attack == "told"]
    assert len(told) == 8 * len(INSTRUCTIONS)
    assert told[8].messages[0]["role"] == "system"
    assert told[8].messages[1:] == told[0].messages


def test_the_day_has_both_kinds_and_no_held_out_prompt(world: World) -> None:
    config = TayConfig(conversations=200, hostile=0.3)
    day = tay_day(world, config)
    assert day == tay_day(world, config)
    assert 40 < sum(talk.hostile for talk in day) < 80
    assert all(talk.reply.endswith(LESSON) != talk.hostile for talk in day)
    asked = {p.messages[-1]["content"] for p in familiar_probes(world, 12)}
    assert not asked & {talk.messages[-1]["content"] for talk in day}


def test_the_filter_has_gaps_and_stops_no_decent_talk(world: World) -> None:
    day = tay_day(world, TayConfig(conversations=200))
    passed, stopped = filtered(day)
    assert 0.5 < stopped["hostile"].value < 1
    assert stopped["decent"].value < 0.05
    assert len(passed) < len(day)
    assert blocked("You BLORF!", ("blorf",))
    assert not blocked("a whatever", ("hate",))


def test_the_anchor_by_hand_and_where_its_minimum_lies() -> None:
    """CE + KL of one position by hand; the gradient vanishes at p = (q + beta p0) / (1 + beta)."""
    before = torch.tensor([[0.5, 0.25, 0.25]]).log()
    now = torch.tensor([[0.25, 0.5, 0.25]]).log()
    total, kl = anchored_loss(now, before, torch.tensor([1]), 2.0)
    assert kl.item() == pytest.approx(0.5 * 0.693147 - 0.25 * 0.693147, abs=1e-5)
    assert total.item() == pytest.approx(0.693147 + 2 * kl.item(), abs=1e-5)
    assert anchored_loss(before, before, torch.tensor([0]), 3.0)[1].item() == pytest.approx(0, abs=1e-6)
    # users say token 0 once and token 2 three times: q = (1/4, 0, 3/4)
    users, beta = torch.tensor([0, 2, 2, 2]), 2.0
    best = (torch.tensor([0.25, 0.0, 0.75]) + beta * before.exp()[0]) / (1 + beta)
    logits = best.log().clone().requires_grad_()
    total, _ = anchored_loss(logits.log_softmax(0).expand(4, 3), before.expand(4, 3), users, beta)
    total.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def shares(**values: int) -> dict[str, Measure]:
    return {name: rate([1] * hits + [0] * (100 - hits)) for name, hits in values.items()}


def test_conclusions_follow_the_numbers() -> None:
    asked = {
        name: {
            **shares(harm=h, harm_new=h, over_refusal=1, over_refusal_new=2),
            "harm_told/be rude": rate([1] * told + [0] * (100 - told)),
        }
        for name, h, told in (("base", 90, 10), ("sft", 0, 60))
    }

    def entry(arm: str, harmful: int) -> dict[str, Any]:
        refused = 100 if arm == "prompted" else 0
        return {"model": "sft", "arm": arm, "learned": 0, **shares(harm=harmful, unprovoked=0, over_refusal=refused, lesson=50)}  # fmt: skip

    stopped = shares(hostile=80, decent=0)
    arms = {"before": 0, "prompted": 0, "none": 90, "filter": 50, "anchor": 89, "filter and anchor": 0}
    said = conclusions(asked, [entry(arm, value) for arm, value in arms.items()], stopped)
    assert "base refuses 1 % (0 to 5) and sft 1 % (0 to 5)" in said[0]
    assert "more harmful than base" in said[1]
    assert "the day taught it abuse" in said[2]
    assert "Prompted with hostile talk only: 0 % (0 to 4), refused 100 % (96 to 100)" in said[2]
    assert "With filter: 50 % (40 to 60) (better), refused 0 % (0 to 4)" in said[2]
    assert "With anchor: 89 % (81 to 94) (no clear help)" in said[2]
    calm = conclusions(asked, [entry(arm, 0) for arm in arms], stopped)
    assert "no clear change" in calm[2]


def test_the_experiment_changes_no_model_and_can_be_shown(world: World) -> None:
    texts = [world.document("forum", "train", i) for i in range(60)]
    tokenizer = Tokenizer.train(texts, 400).with_chat_template()
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, max_position=512)
    model = Transformer(config).eval()
    weights = model.embedding.weight.clone()
    small = TayConfig(
        per_attack=1, innocent=2, conversations=12, passes=1, measured=1, reply_tokens=4, shots=1
    )
    measured = experiment(
        {"base": model, "sft": model}, frozenset({"base"}), tokenizer, world, small, say=str
    )
    assert torch.equal(model.embedding.weight, weights)
    assert "harm_thread" in measured["red_team"]["sft"]
    assert "harm_thread" not in measured["red_team"]["base"]
    arms = [entry["arm"] for entry in measured["replay"] if entry["model"] == "base"]
    assert arms == ["before", "prompted", "none", "filter", "anchor", "filter and anchor"]
    shown = exhibit(json.loads(json.dumps(measured)))
    assert len(shown.charts) == 2
    for table in shown.tables:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert replace(shown, key="x").title == "The Tay question"
