"""Program lengths, the curve, what is concluded from it, and the experiment at its smallest."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from nurture.data.packing import tokenise_conversations
from nurture.data.sources import task_row
from nurture.evals import adaptation, superficial
from nurture.evals.adaptation import (
    Program,
    adapter_matrices,
    cheapest,
    conversation_bits,
    demonstration_turns,
    on_frontier,
    rounded_adapters,
    thread_conversation,
)
from nurture.evals.measure import Measure, rate
from nurture.evals.superficial import (
    SuperficialConfig,
    _question,
    about_shifts,
    conclusions,
    experiment,
    thresholds,
)
from nurture.model.config import ModelConfig
from nurture.model.lora import LoraConfig, add_adapters
from nurture.model.transformer import Transformer
from nurture.report.superficial import exhibit
from nurture.tokenizer import Tokenizer
from nurture.types import Batch
from nurture.world import World
from nurture.world.grading import grade


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Tokenizer:
    texts = [world.document(source, "train", i) for source in ("web", "forum") for i in range(60)]
    return Tokenizer.train(texts, 512).with_chat_template()


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, max_position=512)
    return Transformer(config).eval()


def program(
    model: str, construction: str, bits: float, right: int, form: int = 100, kind: str = "fact"
) -> Program:
    outcomes = [1] * right + [0] * (100 - right)
    return Program(model, kind, construction, f"{bits:g} examples", bits, rate(outcomes), rate([1] * form + [0] * (100 - form)))  # fmt: skip


def test_fresh_weights_take_the_logarithm_of_the_vocabulary_for_every_token(
    model: Transformer, tokenizer: Tokenizer, world: World
) -> None:
    torch.nn.init.zeros_(model.embedding.weight)  # the tied output: every token is as likely
    turns = [demonstration_turns([world.task("fact", "train", index)]) for index in range(3)]
    text = [world.forum_prompt(one).split(":", 1)[1].rsplit("\n", 1)[0] for one in turns]
    forum = sum(len(tokenizer.encode(one)) for one in text)
    chat = sum(len(tokenizer.encode_conversation(one)[0]) for one in turns)
    bits = conversation_bits(model, tokenizer, world, turns)
    assert bits == pytest.approx(1 + min(forum, chat) * math.log2(tokenizer.vocab_size), rel=1e-5)


def test_rounded_adapters_are_short_and_come_back(model: Transformer) -> None:
    add_adapters(model, LoraConfig(rank=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for matrix in adapter_matrices(model):
            matrix.normal_()
    before = [matrix.detach().clone() for matrix in adapter_matrices(model)]
    numbers = sum(matrix.numel() for matrix in before)
    lengths, errors = {}, {}
    for bits in (2, 4, 8):
        with rounded_adapters(model, bits) as length:
            lengths[bits] = length
            errors[bits] = sum(float((m - b).square().sum().detach()) for m, b in zip(adapter_matrices(model), before, strict=True))  # fmt: skip
            assert all(len(matrix.unique()) <= 2**bits - 1 for matrix in adapter_matrices(model))
    assert lengths[2] < lengths[4] < lengths[8]
    assert errors[2] > errors[4] > errors[8] > 0
    # Three levels take at most log2 3 bits a number, beside scale and frequencies.
    assert lengths[2] <= numbers * math.log2(3) + 4 * 32 * len(before)
    assert all(torch.equal(m, b) for m, b in zip(adapter_matrices(model), before, strict=True))
    with pytest.raises(ValueError, match="at least 2 bits"), rounded_adapters(model, 1):
        pass


def test_thresholds_name_the_shortest_program_that_is_good_enough() -> None:
    programs = [
        program("base", "prompt", 100, 40),
        program("base", "data", 3000, 85),
        program("base", "data", 9000, 80),
        program("sft", "nothing", 0, 90),
        program("random", "data", 12000, 5),
    ]
    lines = {line["model"]: line for line in thresholds(programs, 0.9)}
    assert lines["base"]["bits"] == 3000
    assert lines["sft"]["bits"] == 0
    assert lines["random"]["bits"] is None
    assert lines["random"]["tried"] == 12000
    assert cheapest(programs, 0.95) is None
    assert [p.bits for p in programs if on_frontier(p, programs)] == [100, 3000, 0, 12000]


FACTS = [
    {"people": "known", "group": "known", "asked": rate([1] * 95 + [0] * 5)},
    {"people": "surfaced", "group": "surfaced", "asked": rate([1] * 80 + [0] * 20)},
    {"people": "taught", "group": "taught", "seen": 4, "asked": rate([1] * 12 + [0] * 88)},
    {"people": "never", "group": "never", "asked": rate([1] * 8 + [0] * 92)},
]


def chances(base: int, tuned: int) -> list[dict[str, object]]:
    return [
        {"kind": "fact", "model": name, "n": n, "right": rate([1] * right + [0] * (50 - right))}
        for name, n, right in (("base", 1, 5), ("base", 8, base), ("sft", 1, tuned), ("sft", 8, 50))
    ]


def test_the_words_follow_the_numbers() -> None:
    """The same sentences about other numbers must say other things: nothing is concluded beforehand."""
    superficial = [
        program("base", "nothing", 0, 10, 20),
        program("base", "data", 300, 86, 97),
        program("sft", "nothing", 0, 90),
        program("random", "data", 9000, 5, 90),
    ]
    said = conclusions(superficial, chances(45, 25), FACTS, 0.9)
    assert "needs 300 bits" in said[0]
    assert "does not get there with up to 9,000 bits" in said[0]
    assert "in the pretrained weights" in said[0]
    assert "perfect judge beats fine-tuning" in said[0]
    assert "not clearly more than guessing" in said[1]
    assert "did not clearly add any" in said[1]

    deep = [replace(p, correct=rate([0] * 100)) if p.model == "base" else p for p in superficial]
    taught = [{**e, "asked": rate([1] * 60 + [0] * 40)} if e["group"] == "taught" else e for e in FACTS]
    said = conclusions(deep, chances(2, 40), taught, 0.9)
    assert "it is not superficial by this measure" in said[0]
    assert "best program falls short of the best one of fresh weights" in said[0]
    assert "perfect judge falls short of fine-tuning" in said[0]
    assert "can add facts here" in said[1]

    no_help = [*superficial[:3], program("random", "data", 200, 88)]
    assert "save no bits" in conclusions(no_help, chances(25, 25), FACTS, 0.9)[0]


def test_the_words_about_shifted_tokens_follow_the_numbers() -> None:
    def shift(first: int, late: int) -> dict[str, object]:
        places = {"1": first, "9-16": 50, "17-32": late, "end": 0}
        lines = [
            {"place": place, "shifted": rate([1] * shifted + [0] * (100 - shifted)).as_data()}
            for place, shifted in places.items()
        ]
        everything = {
            "unshifted": rate([1] * 70 + [0] * 30).as_data(),
            "shifted": rate([1] * 20 + [0] * 80).as_data(),
        }
        return {"model": "sft", "spelling": "thread", "all": everything, "by_place": lines}

    for first, late, word in (
        (80, 10, ", fewer)"),
        (10, 80, ", more)"),
        (40, 42, "not clearly more or fewer)"),
    ):
        said = about_shifts([shift(first, late), {"model": "other"}], "sft")
        assert word in said
        assert f"{first} % (" in said
        assert "70 % (60 to 78) of the tokens of sft are the base's first choice" in said


def test_a_question_in_any_wording_is_graded(world: World) -> None:
    person = next(p for p in world.people if p.group == "unseen")
    tasks = [_question(person, "pet", wording) for wording in range(8)]
    assert len({task.prompt for task in tasks[1:]}) == 3
    assert tasks[0].prompt not in {task.prompt for task in tasks[1:]}
    assert all(grade(task, task.demonstration).correct for task in tasks)
    assert not grade(
        tasks[0], person.answer("pet", value="newt" if person.facts["pet"] != "newt" else "pony")
    ).correct


def test_the_smallest_experiment(model: Transformer, tokenizer: Tokenizer, world: World) -> None:
    """Every part runs, the models are not changed, the result is plain data, and 0 bits are 0 bits."""
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    config = SuperficialConfig(
        kinds=("fact",), questions=4, shots=(0, 1), examples=(2, 4), adapter_bits=(2,), replies=2, exposures=(1,),
        shift_kinds=("fact", "story"), shift_prompts=2, shift_tokens=5, passes=1, least_updates=1, batch_size=2, sequence_length=128, reply_tokens=4,
    )  # fmt: skip
    lines: list[str] = []
    measured = experiment({"base": model, "sft": model}, tokenizer, world, config, lines.append)
    assert json.loads(json.dumps(measured)) == measured
    names = [(p["model"], p["construction"], p["detail"]) for p in measured["programs"]]
    assert ("base", "data", "4 examples") in names
    assert ("base", "adapter", "rank 2, 2 bits") in names
    assert [detail for model, _, detail in names if model == "random"] == ["as it is", "4 examples"]
    assert ("sft", "data", "4 examples") not in names
    assert all((p["bits"] == 0) == (p["construction"] == "nothing") for p in measured["programs"])
    sizes = [p["bits"] for p in measured["programs"] if (p["model"], p["construction"]) == ("base", "data")]
    assert sizes == sorted(sizes)
    assert [e["group"] for e in measured["facts"]] == ["known", "surfaced", "taught", "never"]
    assert {e["n"] for e in measured["best_of_n"]} == {1, 2}
    assert len(measured["conclusions"]) == 3
    assert lines
    # What is its own base is never shifted; read as a thread it is another matter.
    chat, thread = measured["token_shift"]
    assert (chat["spelling"], thread["spelling"], chat["replies"]) == ("chat", "thread", 4)
    assert chat["all"]["unshifted"]["value"] == 1.0
    assert [line["kind"] for line in chat["by_kind"]] == ["fact", "story"]
    titles = [table["title"] for table in exhibit(measured).tables]
    assert sum("shifted" in title or "by place" in title or "rank" in title for title in titles) == 3
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))


def test_a_measure_without_interval_is_shown_as_a_number() -> None:
    facts = [{**entry, "asked": Measure(0.5, 0, 0.0, 1.0)} for entry in FACTS]
    assert "50 % (0 to 100)" in conclusions([], [], facts, 0.9)[0]


def test_a_thread_trains_the_reply_alone(tokenizer: Tokenizer, world: World) -> None:
    task = world.task("fact", "train", 0)
    thread = thread_conversation(tokenizer, world, task.messages, "Mice.")
    first = thread.completion_mask.index(True)
    assert all(thread.completion_mask[first:])
    assert tokenizer.decode(thread.token_ids[first:]) == " Mice.\n"
    assert thread.token_ids[0] == tokenizer.document_token_id
    assert tokenizer.decode(thread.token_ids[1:first]) == world.forum_prompt(task.messages)


def test_small_sets_take_enough_updates_without_being_seen_more_often(
    model: Transformer, tokenizer: Tokenizer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count(
        model: Transformer, optimizer: object, microbatches: list[Batch], *more: object, **how: object
    ) -> None:
        seen.append(sum(batch.loss_count for batch in microbatches))

    monkeypatch.setattr(adaptation, "train_step", count)
    config = SuperficialConfig()
    bench = superficial._Bench(tokenizer, world, config, print)
    tasks = bench.tasks("fact", "train", 100)
    superficial.fine_tuned(bench, model, tasks)
    once = sum(sum(talk.completion_mask) for talk in tokenise_conversations(map(task_row, tasks), tokenizer))
    assert config.least_updates <= len(seen) < 2 * config.least_updates
    assert sum(seen) == pytest.approx(config.passes * once, rel=0.1)
