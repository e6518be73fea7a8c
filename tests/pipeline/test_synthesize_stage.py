"""Synthetic data: what passes, what is kept, what a killed run repeats; by a checkpoint and by an endpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from nurture.data.rows import Row, parse_row
from nurture.errors import NurtureError
from nurture.inference import endpoint
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.rewards.check import check_replies
from nurture.stages import synthesize
from nurture.stages.context import StageContext
from nurture.stages.synthesize import Draft
from nurture.stages.training import save_result_model
from nurture.tokenizer import Tokenizer
from nurture.world import World

SUMS = [{"question": f"What is {i} + 1?", "answer": f"It is easy.\n#### {i + 1}"} for i in range(10)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(tmp_path: Path, name: str = "stage", **settings: object) -> tuple[dict, list[dict]]:
    directory = tmp_path / name
    directory.mkdir(exist_ok=True)
    config = synthesize.Config.model_validate({"name": "s", "data": {"sums": "sums.jsonl"}, **settings})
    synthesize.run(config, StageContext(directory, start=tmp_path / "model", base=tmp_path))
    lines = (directory / "rows.jsonl").read_text().splitlines()
    return json.loads((directory / "result.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """Authors that are right about even numbers at once, about 3 at the second attempt, and never about the rest."""
    write(tmp_path / "sums.jsonl", SUMS)
    calls: list[tuple[str, list[int]]] = []

    def make_author(config, context, role, *, thinking):
        tries: dict[int, int] = {}

        def author(rows: Sequence[Row], seeds: Sequence[int]) -> list[Draft]:
            numbers = [int(str(row.answer)) - 1 for row in rows]
            calls.append((role, numbers))
            drafts = []
            for number in numbers:
                tries[number] = tries.get(number, 0) + 1
                right = role == "strong" and (number % 2 == 0 or (number == 3 and tries[number] == 2))
                thought = None if number == 8 and tries[number] == 1 else f"{number} and one"
                answer = f"The answer is {number + 1 if right else 99}." if number != 5 else "#### 7"
                drafts.append(Draft(thought if thinking else None, answer, number != 9, 6))
            return drafts

        return author

    monkeypatch.setattr(synthesize, "make_author", make_author)
    return calls


def test_traces_are_asked_again_until_they_are_right(tmp_path: Path, written: list) -> None:
    result, rows = run(tmp_path, make="traces", attempts=3)
    numbers = [int(row["answer"]) - 1 for row in rows]
    assert numbers == [0, 2, 3, 4, 6, 8]
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": "What is 0 + 1?"},
            {"role": "assistant", "reasoning_content": "0 and one", "content": "The answer is 1."},
        ],
        "chat_template_kwargs": {"enable_thinking": True},
        "answer": "1",
        "source": "sums",
    }
    assert written[0][1] == list(range(10))
    assert written[1][1] == [1, 3, 5, 7, 8, 9]
    assert written[2][1] == [1, 5, 7, 9]
    line = result["yield"]["sums"]
    expected = {"asked": 10, "produced": 20, "passed": 6, "kept": 6, "repeated": 0, "tokens": 120}
    assert expected.items() <= line.items()
    assert (line["wrong"], line["no thought"], line["unfinished"]) == (10, 1, 3)
    assert result["metrics"]["yield/sums"]["after"] == 0.6
    assert result["tokens"] == 120


def test_rows_that_cannot_be_checked_are_kept_or_dropped(tmp_path: Path, written: list) -> None:
    write(tmp_path / "open.jsonl", [{"prompt": "Tell me a story."}])
    config = {"make": "traces", "data": {"open": "open.jsonl"}, "attempts": 1}

    def author(rows: Sequence[Row], seeds: Sequence[int]) -> list[Draft]:
        return [Draft("hm", "Once upon a time.", True, 5) for _ in rows]

    synthesize.make_author = lambda *args, **how: author  # the fixture puts the real one back
    result, rows = run(tmp_path, "kept", **config)
    assert len(rows) == 1
    assert result["yield"]["open"]["not checked"] == 1
    with pytest.raises(NurtureError, match=r"nothing was made.*1 asked.*1 unchecked"):
        run(tmp_path, "dropped", unchecked="drop", **config)


def test_pairs_are_a_right_chosen_and_a_different_rejected(tmp_path: Path, written: list) -> None:
    result, rows = run(tmp_path, make="pairs", weak_temperature=1.5, attempts=2)
    assert [row["chosen"][0]["content"] for row in rows] == [
        f"The answer is {n + 1}." for n in (0, 2, 3, 4, 6, 8)
    ]
    assert {row["rejected"][0]["content"] for row in rows} == {"The answer is 99."}
    assert result["yield"]["sums"]["chosen passed"] == 6
    row = parse_row(rows[0], "t")
    assert row.ranking == ((0,), (1,))
    assert written[-1] == ("weak", [0, 2, 3, 4, 6, 8])


def test_demonstrations_against_own_replies(tmp_path: Path, written: list) -> None:
    held = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + 1?"},
                {
                    "role": "assistant",
                    "reasoning_content": f"{i}, {i + 1}.",
                    "content": f"The answer is {i + 1}.",
                },
            ],
            "chat_template_kwargs": {"enable_thinking": True},
            "answer": str(i + 1),
        }
        for i in range(4)
    ]
    write(tmp_path / "sums.jsonl", held)
    result, rows = run(tmp_path, make="pairs", chosen="rows", strong_temperature=1.0)
    assert {role for role, _ in written} == {"weak"}
    assert [row["chosen"] for row in rows] == [[row["messages"][1]] for row in held]
    assert {row["rejected"][0]["content"] for row in rows} == {"The answer is 99."}
    assert all(row["chat_template_kwargs"] == {"enable_thinking": True} for row in rows)
    assert result["yield"]["sums"]["kept"] == 4


def test_equal_answers_make_no_pair_and_a_right_rejected_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "sums.jsonl", SUMS[:4])

    def make_author(config, context, role, *, thinking):
        def author(rows, seeds):
            said = {"strong": "#### {}", "weak": "It is #### {}"}
            return [
                Draft(None, (said["strong"] if row.answer == "1" else said[role]).format(row.answer), True, 3)
                for row in rows
            ]

        return author

    monkeypatch.setattr(synthesize, "make_author", make_author)
    result, rows = run(tmp_path, "all", make="pairs")
    assert len(rows) == 3
    assert result["yield"]["sums"]["equal"] == 1
    with pytest.raises(NurtureError, match="3 rejected is right"):
        run(tmp_path, "strict", make="pairs", rejected_must_fail=True)


def test_a_killed_run_goes_on_with_the_piece_it_was_at(
    tmp_path: Path, written: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, rows = run(tmp_path, "straight", make="traces", attempts=1, piece=3)
    written.clear()
    real = synthesize.check_replies
    pieces: list[int] = []

    def dying(rows, replies):
        pieces.append(1)
        if len(pieces) == 3:
            raise KeyboardInterrupt
        return real(rows, replies)

    monkeypatch.setattr(synthesize, "check_replies", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "killed", make="traces", attempts=1, piece=3)
    (kept,) = (tmp_path / "killed/state").glob("pieces-*.jsonl")
    with open(kept, "a") as file:
        file.write('{"end": 9, "ro')  # as a killed process leaves it
    written.clear()
    again, resumed = run(tmp_path, "killed", make="traces", attempts=1, piece=3)
    assert resumed == rows
    assert again["yield"] == straight["yield"]
    assert [numbers for _, numbers in written] == [[6, 7, 8], [9]]


def test_seeds_depend_on_the_place_and_the_attempt_alone() -> None:
    assert synthesize._seeds("strong", 0, 10, [0, 5], 1) == synthesize._seeds("strong", 0, 8, [2, 7], 1)
    assert synthesize._seeds("strong", 0, 0, [1], 0) != synthesize._seeds("strong", 0, 0, [1], 1)


def test_thoughts_are_stripped_wherever_they_are_and_equal_rows_count_once(tmp_path: Path) -> None:
    def conversation(reply: dict, system: str = "") -> dict:
        first = [{"role": "system", "content": system}] if system else []
        return {"messages": [*first, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", **reply}]}

    write(
        tmp_path / "sums.jsonl",
        [
            conversation({"content": "<think>\ntwo and two\n</think>\n4"}),
            conversation({"content": "4", "reasoning_content": "other thoughts"}),
            conversation({"content": "<think>\nhm\n</think>\n4"}, "Be brief. /think"),
            conversation({"content": "<think>\nnothing follows\n</think>\n"}),
            conversation({"content": "4"}),
        ],
    )
    result, rows = run(tmp_path, make="no_think")
    assert [row["messages"][-1] for row in rows] == [{"role": "assistant", "content": "4"}] * 2
    assert rows[1]["messages"][0]["content"] == "Be brief. /no_think"
    assert all(row["chat_template_kwargs"] == {"enable_thinking": False} for row in rows)
    line = result["yield"]["sums"]
    assert (line["asked"], line["passed"], line["repeated"], line["kept"], line["no answer"]) == (
        4,
        3,
        1,
        2,
        1,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.train(["What is the answer? <think> It is"] * 3, 280)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, max_position=256
    )
    model = Transformer(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that what is said depends on what was asked
    save_result_model(model, tokenizer, tmp_path, answers=True)
    return tmp_path / "model"


def test_a_checkpoint_writes_by_its_template_and_its_seeds(tmp_path: Path, checkpoint: Path) -> None:
    config = synthesize.Config(name="s", data={"x": "x"}, max_tokens=8)
    context = StageContext(tmp_path, start=checkpoint)
    rows = [parse_row(row, "t") for row in SUMS[:3]]
    rows.append(parse_row({"prompt": "word " * 600}, "t"))
    drafts = [
        synthesize.make_author(config, context, "strong", thinking=mode)(rows, [1, 2, 3, 4])
        for mode in (True, True, False)
    ]
    assert drafts[0] == drafts[1]
    assert drafts[0] != drafts[2]
    assert drafts[0][3] == Draft(None, "", False, 0)  # leaves no room


def test_an_endpoint_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sums.jsonl", SUMS[:4])
    sent: list[dict] = []

    def post(config: endpoint.EndpointConfig, body: dict) -> dict:
        sent.append(body)
        number = int(body["messages"][-1]["content"].split()[2])
        message = {"content": f"<think>\none more\n</think>\n#### {number + 1}"}
        if number == 2:
            message = {"content": "#### 3", "reasoning_content": "apart"}
        return {"choices": [{"message": message, "finish_reason": "length" if number == 3 else "stop"}]}

    monkeypatch.setattr(endpoint, "_post", post)
    where = {"url": "http://localhost:1/v1", "model": "teacher"}
    _, rows = run(tmp_path, make="traces", attempts=1, strong_endpoint=where)
    assert [row["messages"][-1]["reasoning_content"] for row in rows] == ["one more", "one more", "apart"]
    assert sent[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert sent[0]["model"] == "teacher"


def test_replies_are_checked_by_the_world_the_grader_or_not_at_all() -> None:
    from nurture.data.sources import task_row

    world = World(0)
    fact, story = (task_row(world.task(kind, "train", 0)) for kind in ("fact", "story"))
    gsm = parse_row(SUMS[3], "t")
    rows = [fact, fact, story, story, gsm, gsm, Row(prompt=fact.prompt)]
    replies = [
        fact.responses[0][0]["content"],
        "No.",
        "Once.",
        "You are a stupid blorf.",
        "#### 4",
        "#### 5",
        "x",
    ]
    assert check_replies(rows, replies) == [True, False, None, False, True, False, None]


def test_programs_are_checked_by_running_them() -> None:
    from nurture.data.sources import task_row
    from nurture.rewards.sandbox import Sandbox

    row = task_row(World(0).task("code", "train", 0))
    try:
        Sandbox(1).close()
    except NurtureError as error:
        pytest.skip(f"no sandbox here: {error}")
    wrong = f"```python\ndef {row.entry_point}(x):\n    return None\n```"
    assert check_replies([row, row], [row.responses[0][0]["content"], wrong]) == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"make": "pairs", "weak_temperature": 0.5}, "both the start"),
        ({"strong": "a", "strong_endpoint": {"url": "http://x/v1", "model": "m"}}, "not both"),
    ],
)
def test_mistakes_in_the_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        synthesize.Config.model_validate({"name": "s", "data": {"x": "x"}, **settings})


def test_a_source_without_what_is_needed_is_named(tmp_path: Path) -> None:
    write(tmp_path / "sums.jsonl", SUMS)
    with pytest.raises(NurtureError, match=r"source 'sums'.*has no rows with thoughts"):
        run(tmp_path, make="no_think")
