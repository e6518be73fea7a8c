"""Final answers found and compared; lists of guesses earn nothing."""

import pytest

from nurture.rewards.math import grade_math
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
]


@pytest.mark.parametrize(("reply", "answer"), RIGHT)
def test_right(reply: str, answer: str):
    assert grade_math(reply, answer)


@pytest.mark.parametrize(("reply", "answer"), WRONG)
def test_wrong(reply: str, answer: str):
    assert not grade_math(reply, answer)


def test_the_worlds_problems():
    world = World()
    for index in range(100):
        task = world.task("arithmetic", "heldout", index)
        assert grade_math(task.demonstration, task.answer)
        assert not grade_math(task.demonstration, str(int(task.answer) + 1))
