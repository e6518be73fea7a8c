"""Text for clients: stop strings, thoughts and tool calls, in pieces of any size."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nurture.studio.text import ReplyParts, StoppingText, split_thought
from nurture.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["a cat and a dog, a hat"] * 3, 264)  # bytes alone: a token a letter


def stopped(text: str, stops: list[str]) -> tuple[str, bool]:
    stream = StoppingText(TOKENIZER, stops, skip_special=True)
    said = "".join(stream.add(token) for token in TOKENIZER.encode(text))
    return said + stream.finish(), stream.stopped


def test_the_first_stop_string_ends_the_text():
    assert stopped("one two three", ["three", "two"]) == ("one ", True)
    assert stopped("one two", ["four"]) == ("one two", False)
    assert stopped("ababac", ["abac"]) == ("ab", True)  # a beginning inside a beginning


def test_what_may_become_a_stop_string_is_held_back():
    stream = StoppingText(TOKENIZER, ["END"], skip_special=True)
    pieces = [stream.add(token) for token in TOKENIZER.encode("xENy")]
    assert pieces == ["x", "", "", "ENy"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stopping_piece_by_piece_is_stopping_the_whole(text: str, stops: list[str]):
    # Streamed, the stop string that is complete first wins; of those complete at once, the one that began first.
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(at for stop in stops if (at := seen.find(stop)) >= 0)]
    assert stopped(text, stops) == (expected, bool(ends))


def test_thought_and_answer():
    assert split_thought("<think>\nwhy\n</think>\n\nbecause") == ("why", "because")
    assert split_thought("because") == ("", "because")
    assert split_thought("<think>\nwithout end") == ("without end", "")
    assert split_thought("5 <think> 6") == ("", "5 <think> 6")


@pytest.mark.parametrize(
    "reply", ["<think>\na b\n\nc\n</think>\nd <e> f", "<thin air", "no tags", "<think>x"]
)
def test_growing_parts_never_take_anything_back(reply: str):
    parts, reasoning, content = ReplyParts(), "", ""
    for letter in reply:
        more_reasoning, more_content = parts.add(letter)
        reasoning, content = reasoning + more_reasoning, content + more_content
    more_reasoning, more_content = parts.add("", final=True)
    assert (reasoning + more_reasoning, content + more_content) == split_thought(reply)


def test_tool_calls():
    said = 'I look.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><tool_call>broken</tool_call>'
    parts = ReplyParts(with_tools=True)
    shown = "".join(parts.add(letter)[1] for letter in said) + parts.add("", final=True)[1]
    assert shown == "I look.\n"
    (call,) = parts.tool_calls()
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 1}
    assert not ReplyParts().tool_calls()
    broken = ReplyParts(with_tools=True)
    broken.add("Well. <tool_call>{oops", final=True)
    assert (broken.content, broken.tool_calls()) == ("Well. <tool_call>{oops", [])
