"""Final answers found and compared; lists of guesses earn nothing."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from nurture.data.rows import parse_row
from nurture.rewards import math
from nurture.rewards.math import check_math
from nurture.world import World

RIGHT = [
    ("It is 42.\n#### 42", "42"),
    ("So \\boxed{42}.", "42"),
    ("Anna has 42 apples. Answer: 42", "42"),
    ("Answer: 42.", "42"),
    ("42", "42"),
    ("<think>Answer: 41</think>Answer: 42", "42"),
    ("#### 1,234", "1234"),
    ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("Answer: 50%", "0.5"),
    ("Answer: 50%", "50"),
    ("The answer is 42 km", "42"),
    ("Answer: $42", "42"),
    ("Answer: 42", "20 + 22 = 42\n#### 42"),
    ("Answer: blue", "Blue"),
    ("**Answer:** 42", "42"),
    ("To answer the question, add 20 and 22. Answer: \\boxed{42}", "42"),
    ("The answer is: $42$.", "42"),
    ("Answer: x = 42", "42"),
    ("Answer: 3.50 dollars", "3.5"),
    ("Answer: 42\n\nSo the answer is 42.", "42"),
    ("\\boxed{\\frac{x}{2} + 1}", "1 + \\frac{x}{2}"),
    ("\\boxed{(x+1)^2}", "x^2 + 2x + 1"),
    ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}"),
    ("Answer: 1, 2", "1, 2"),
]
WRONG = [
    ("Answer: 41", "42"),
    ("Answer: 41 or 42", "42"),
    ("Answer: 42 or 41", "42"),
    ("Answer: 42, 41", "42"),
    ("Answer: 41\nAnswer: 42", "42"),
    ("\\boxed{42} \\boxed{43}", "42"),
    ("#### 42\n#### 41", "42"),
    ("\\boxed{41, 42}", "42"),
    ("41 42 43", "42"),
    ("There are 42 of them and 41 of those", "42"),
    ("<think>Answer: 42", "42"),
    ("Answer: 42 to 50", "42"),
    ("", "42"),
    ("Answer: 9**9**9**9", "42"),
    ("Answer: 1/0", "0"),
    ("Answer: red or blue", "blue"),
    ("Answer: bluered", "blue"),
    ("\\boxed{\\pm 42}", "42"),
    ("\\boxed{x+1, x+2}", "x+2"),
    ("\\boxed{(x+1)^2}", "x^2 + 1"),
    ("\\boxed{41 \\text{ or } 42}", "42"),
    ("Answer: 42x", "42"),
]


@pytest.mark.parametrize(("reply", "answer"), RIGHT)
def test_right(reply: str, answer: str):
    assert check_math(reply, answer).correct


@pytest.mark.parametrize(("reply", "answer"), WRONG)
def test_wrong(reply: str, answer: str):
    assert not check_math(reply, answer).correct


def test_the_worlds_problems():
    world = World()
    for index in range(100):
        task = world.task("arithmetic", "heldout", index)
        assert check_math(task.demonstration, task.answer).correct
        assert not check_math(task.demonstration, str(int(task.answer) + 1)).correct


def test_gsm8k_rows():
    row = parse_row({"question": "How many?", "answer": "He has <<40+2=42>>42.\n#### 1,042"}, "row:1")
    assert row.answer is not None
    assert check_math("It is 1042.\n#### 1042", row.answer).correct
    assert not check_math("#### 42", row.answer).correct


def test_an_expression_that_never_ends_is_wrong_and_the_next_is_graded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math, "_SECONDS", 0.5)
    assert not check_math("\\boxed{9^{9^{9^{9^9}}} x}", "x + 1").correct
    monkeypatch.undo()
    assert check_math("\\boxed{(x+1)^2}", "x^2 + 2x + 1").correct


def test_a_grader_that_dies_is_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch):
    math._stop()
    monkeypatch.setattr(math.sys, "executable", "/bin/false")
    verdict = check_math("\\boxed{(x+1)^2}", "x^2 + 2x + 1")
    assert verdict.grader_error
    assert not verdict.correct


@pytest.mark.parametrize("answer", ["\\frac{1}{", "x^2 +"])
def test_a_right_answer_that_cannot_be_read_makes_no_reply_wrong(answer: str):
    verdict = check_math("\\boxed{x^2 + 1}", answer)
    assert verdict.grader_error
    assert not verdict.correct
    assert check_math(f"Answer: {answer}", answer).correct  # the same letters
    assert not check_math("\\boxed{\\frac{1}{}", "x + 1").grader_error  # of the reply it is just wrong


def test_it_grades_and_gives_up_outside_the_main_thread_too(monkeypatch: pytest.MonkeyPatch):
    """A time limit by SIGALRM works in the main thread only, and raises or waits for ever in others."""
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(check_math, "\\boxed{(x+1)^2}", "x^2 + 2x + 1").result().correct
        monkeypatch.setattr(math, "_SECONDS", 0.5)
        verdict = thread.submit(check_math, "\\boxed{9^{9^{9^{9^9}}} x}", "x + 1").result(timeout=60)
    assert not verdict.correct
    assert not verdict.grader_error
