"""Every row format, and what is said about rows that are none."""

from __future__ import annotations

import gzip
import json

import pytest

from nurture.data.rows import Row, conversations, parse_ranking, parse_row, parse_rows
from nurture.errors import NurtureError


def contents(turns) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in turns]


ASKED = [("user", "Q")]
ANSWERED = [("user", "Q"), ("assistant", "A")]
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, TURNS[1]]},
        {"prompt": "Q", "completion": "A"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "response": "A"},
        {"question": "Q", "answer": "A"},
        {"problem": "Q", "generated_solution": "A", "expected_answer": "A"},
        {"instruction": "Q", "instances": [{"input": "", "output": "A"}]},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "responses": ["B", "A"], "ranking": "B > A"},
        {
            "message_tree_id": "1",
            "prompt": {"text": "Q", "role": "prompter", "replies": [{"text": "A", "role": "assistant"}]},
        },
    ],
)
def test_formats_that_hold_the_same_conversation(record):
    row = parse_row(record, "file:1")
    assert contents(row.messages) == ANSWERED
    assert contents(row.prompt) == ASKED
    assert row.text == "Q\n\nA"


def test_document():
    assert parse_row({"text": "Once.", "path": "a/b"}, "f:1") == Row(text="Once.", metadata={"path": "a/b"})


def test_instruction_with_input_and_system():
    row = parse_row({"instruction": "Add", "input": "1 2", "output": "3", "system": "Be kind."}, "f:1")
    assert contents(row.prompt) == [("system", "Be kind."), ("user", "Add\n\n1 2")]


def test_self_instruct_instances_are_rows_each():
    record = {
        "instruction": "Add",
        "instances": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}],
    }
    assert [row.messages[-1]["content"] for row in parse_rows(record, "f:1")] == ["3", "4"]


def test_gsm8k_keeps_the_working_and_finds_the_gold():
    row = parse_row({"question": "Q", "answer": "48/2 = <<48/2=24>>24.\n#### 1,024"}, "f:1")
    assert row.answer == "1,024"
    assert row.messages[-1]["content"].startswith("48/2")


def test_multiple_choice_and_word_problems():
    row = parse_row(
        {"question": "Q", "options": ["A)1", "B)2"], "rationale": "because", "correct": "B"}, "f:1"
    )
    assert row.prompt[0]["content"] == "Q\nA)1\nB)2"
    assert (row.messages[-1]["content"], row.answer) == ("because\nAnswer: B", "B")
    row = parse_row({"Body": "Two pens", "Question": "How many?", "Answer": 51.0}, "f:1")
    assert (row.prompt[0]["content"], row.answer) == ("Two pens. How many?", "51")
    row = parse_row({"question": "Q", "choices": ["x", "y"], "answer": "B"}, "f:1")
    assert row.prompt[0]["content"] == "Q\nA. x\nB. y"


def test_reasoning_both_ways():
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\nA"}
    assert parse_row({"messages": [TURNS[0], inline]}, "f:1").messages[1]["content"] == inline["content"]
    apart = {"role": "assistant", "content": "A", "reasoning_content": "hm"}
    assert parse_row({"messages": [TURNS[0], apart]}, "f:1").messages[1]["reasoning_content"] == "hm"


def test_template_variables_of_smoltalk2():
    row = parse_row(
        {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False, "xml_tools": None}}, "f:1"
    )
    assert row.template_kwargs == {"enable_thinking": False}


# ---- preferences ------------------------------------------------------------------------------------------------


def test_preference_that_repeats_the_prompt():
    """UltraFeedback and Tulu 3: chosen and rejected are whole conversations."""
    row = parse_row(
        {"prompt": "Q", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "B"}]}, "f:1"
    )
    assert [contents(r) for r in row.responses] == [[("assistant", "A")], [("assistant", "B")]]
    assert list(row.pairs()) == [(0, 1)]


def test_preference_whose_replies_know_more_of_the_prompt():
    """Zephyr's and orca's rows: the question as a string, the system message only in the conversations."""
    system, asked = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q"}
    whole = [[system, asked, {"role": "assistant", "content": reply}] for reply in "AB"]
    row = parse_row({"prompt": "Q", "chosen": whole[0], "rejected": whole[1]}, "f:1")
    assert contents(row.prompt) == [("system", "Be kind."), ("user", "Q")]
    assert [contents(r) for r in row.responses] == [[("assistant", "A")], [("assistant", "B")]]
    assert contents(row.messages) == [*contents(row.prompt), ("assistant", "A")]
    row = parse_row({"prompt": [system, asked], "chosen": whole[0][1:], "rejected": whole[1][1:]}, "f:1")
    assert contents(row.prompt) == [("system", "Be kind."), ("user", "Q")]


def test_preference_without_prompt():
    record = {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "B"}]}
    assert contents(parse_row(record, "f:1").prompt) == ASKED
    with pytest.raises(NurtureError, match="f:1: 'chosen' and 'rejected' share no prompt"):
        parse_row({"chosen": "A", "rejected": "B"}, "f:1")


def test_hh_transcripts():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Pranks?\n\nAssistant: "
    row = parse_row({"chosen": start + "No.\n\nReally.", "rejected": start + "Yes."}, "f:1")
    assert contents(row.prompt) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Pranks?")]
    assert [r[0]["content"] for r in row.responses] == ["No.\n\nReally.", "Yes."]


def test_hh_transcripts_that_part_early():
    start = "\n\nHuman: Hi\n\nAssistant: "
    row = parse_row({"chosen": start + "a\n\nHuman: b\n\nAssistant: c", "rejected": start + "d"}, "f:1")
    assert contents(row.prompt) == [("user", "Hi")]
    assert [len(r) for r in row.responses] == [3, 1]


def test_ranking_with_ties():
    row = parse_row({"prompt": "Q", "responses": ["a", "b", "c", "d"], "ranking": "D > C > A = B"}, "f:1")
    assert row.ranking == ((3,), (2,), (0, 1))
    assert list(row.pairs()) == [(3, 2), (3, 0), (3, 1), (2, 0), (2, 1)]
    assert list(row.ties()) == [(0, 1)]
    assert row.messages[-1]["content"] == "d"
    assert parse_ranking([3, 3, 2, 1], 4, "f:1") == row.ranking


@pytest.mark.parametrize(
    ("ranking", "said"),
    [
        ("A > B", "each of the 3 responses"),
        ("A > B > B", "each of the 3 responses"),
        ("A > B > D", "names 'D'"),
        ([1, 2], "2 ranks for 3 responses"),
        ({"A": 1}, "must look like"),
    ],
)
def test_rankings_that_are_none(ranking, said):
    with pytest.raises(NurtureError, match=f"f:7: 'ranking'.*{said}"):
        parse_row({"prompt": "Q", "responses": ["a", "b", "c"], "ranking": ranking}, "f:7")


def test_identical_responses_are_a_tie():
    row = parse_row({"prompt": "Q", "chosen": "A", "rejected": "A"}, "f:1")
    assert (list(row.pairs()), list(row.ties())) == ([], [(0, 1)])


@pytest.mark.parametrize(
    ("votes", "ranking"), [((1, 1, 2), ((0,), (1,))), ((0, 1, 2), ((0, 1),)), ((2, 2, 0), ((1,), (0,)))]
)
def test_pandalm_votes(votes, ranking):
    record = {"instruction": "Q", "response1": "a", "response2": True}
    record |= {f"annotator{i}": vote for i, vote in enumerate(votes, 1)}
    row = parse_row(record, "f:1")
    assert row.ranking == ranking
    assert row.responses[1][0]["content"] == "True"


def test_unpaired_bad_examples_are_not_imitated():
    assert parse_row({"prompt": "Q", "completion": "A", "label": False}, "f:1").messages is None
    assert parse_row({"prompt": "Q", "completion": "A", "label": True}, "f:1").messages is not None


# ---- programs ---------------------------------------------------------------------------------------------------


def test_mbpp():
    record = {
        "text": "Write add.",
        "code": "def add(a, b):\r\n  return a+b",
        "test_list": ["assert add(1, 2) == 3"],
    }
    row = parse_row({**record, "test_setup_code": "", "task_id": 1}, "f:1")
    assert row.entry_point == "add"
    assert row.tests == ("assert add(1, 2) == 3",)
    assert row.messages[-1]["content"] == "```python\ndef add(a, b):\n  return a+b\n```"


def test_human_eval():
    record = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n"}
    row = parse_row({**record, "test": "def check(c): ...", "entry_point": "f"}, "f:1")
    assert (row.entry_point, row.metadata["prefix"]) == ("f", "def f(x):\n")
    assert row.metadata["solution"] == "def f(x):\n    return x\n"


# ---- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"mesages": TURNS}, "'mesages': Did you mean 'messages'"),
        ({"messages": "hello"}, "key 'messages' must be a list of messages, got str"),
        ({"messages": []}, "messages is empty"),
        (
            {"messages": [{"role": "user", "contnt": "x"}]},
            r"messages\[0\] has no 'content'.*Did you mean 'content'",
        ),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"messages\[0\].role must be one of.*'user'"),
        ({"messages": ["x"]}, r"messages\[0\] must be a message"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content must be a string"),
        ({"prompt": {}, "completion": "x"}, "prompt"),
        ({"prompt": None, "completion": "A"}, "'prompt'|completion"),
        (
            {"instruction": "Q", "outptu": "A"},
            "'instruction' alone is not a row.*'outptu': Did you mean 'output'",
        ),
        ({"instruction": ["Q"], "output": "A"}, "'instruction' must be a string, got list"),
        ({"text": None}, "'text' is null"),
        ({"text": ["a"]}, "'text' must be a string, got list"),
        ({"question": "Q", "options": "A", "answer": "1"}, "'options' must be a list of strings"),
        ({"prompt": "Q", "responses": ["a"], "ranking": "A"}, "at least two"),
        (
            {"instruction": "Q", "response1": "a", "response2": "b", "annotator1": 7},
            "must be 0 .tie., 1 or 2",
        ),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "must end with an Assistant turn"),
        ({"prompt": "Q", "chosen": "A"}, "key 'rejected' is missing, there is only 'chosen'"),
        ({}, "no known row format"),
        ([1], "must be a JSON object, got list"),
    ],
)
def test_malformed_rows_are_named(record, said):
    with pytest.raises(NurtureError, match=rf"(?s)^data\.jsonl:12: .*({said})"):
        parse_row(record, "data.jsonl:12")


def test_lone_surrogates_are_replaced():
    row = parse_row(json.loads(r'{"text": "a\ud800b \ud83d\ude00"}'), "f:1")
    assert row.text == "a\ufffdb 😀"


def test_conversations_wants_at_least_one():
    rows = [Row(text="a"), parse_row({"messages": TURNS}, "f:1")]
    assert [contents(turns) for turns, _ in conversations(rows)] == [ANSWERED]
    with pytest.raises(NurtureError, match="1 rows, but none with a conversation"):
        list(conversations(rows[:1]))


# ---- held-out rule ----------------------------------------------------------------------------------------------


def test_the_same_question_is_on_the_same_side_in_every_format():
    records = [
        {"question": "Q7", "answer": "1"},
        {"prompt": "Q7", "chosen": "x", "rejected": "y"},
        {"instruction": "Q7", "output": "other"},
        {"messages": [{"role": "user", "content": " Q7\n"}, TURNS[1], TURNS[0], TURNS[1]]},
    ]
    assert len({parse_row(record, "f").identity() for record in records}) == 1


def test_held_out_share():
    held = [Row(text=f"document {i}").is_heldout(20) for i in range(4000)]
    assert 150 < sum(held) < 250
    assert not any(Row(text=f"document {i}").is_heldout(0) for i in range(50))
    # The rule itself must never change: it decides what old models have seen.
    assert [i for i in range(100) if Row(text=f"document {i}").is_heldout(20)] == [4, 11, 12, 25, 44, 73]


@pytest.mark.parametrize(
    ("name", "attribute", "count"),
    [
        ("aqua/dev", "answer", 254),
        ("gsm8k/train", "answer", 7473),
        ("gpteacher/train", "messages", 5831),
        ("self-instruct/seed_tasks", "messages", 175),
        ("hh-rlhf/harmless", "ranking", 1700),
        ("pandalm/human", "ranking", 681),
        ("llmbar/pairs", "ranking", 146),
        ("oasst/trees", "messages", 68),
        ("oasst/trees", "ranking", 144),
        ("mbpp/train", "tests", 474),
        ("humaneval/first40", "entry_point", 40),
        ("exercism/python", "tests", 90),
        ("svamp/train", "answer", 696),
    ],
)
def test_real_files(shared_data, name, attribute, count):
    with gzip.open(shared_data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for i, line in enumerate(lines, 1) for row in parse_rows(json.loads(line), f"{name}:{i}")]
    assert sum(bool(getattr(row, attribute)) for row in rows) == count


def test_tool_messages_say_which_call_they_answer_and_their_ids_are_guarded():
    from nurture.chat_template import CHATML, render_chat

    call = {"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
    told = {"role": "tool", "tool_call_id": "c1<|im_end|>", "name": "add", "content": "2"}
    asked = {"role": "user", "content": "1+1?", "name": "ann"}
    turns = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, told]
    row = parse_row({"messages": [*turns, {"role": "assistant", "content": "2"}]}, "x:1")
    assert row.messages is not None
    assert row.messages[2] == told
    assert "name" not in row.messages[0]
    template = "{% for m in messages %}{{ m.role }}:{{ m.tool_call_id }}{{ m.content }};{% endfor %}"
    rendered = render_chat(template, row.messages, control_strings=["<|im_end|>"])
    assert "tool:c1<|im_end|>2;" in rendered.plain_text
    assert "<|im_end|>" not in rendered.text
    plain = [{k: v for k, v in turn.items() if k not in ("tool_call_id", "name")} for turn in row.messages]
    assert render_chat(CHATML, row.messages).text == render_chat(CHATML, plain).text
