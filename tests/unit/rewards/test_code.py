"""From a reply to a program to a verdict: extraction, rows of every format, and the judge's honest cases."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from nurture.data.rows import parse_row
from nurture.errors import NurtureError
from nurture.rewards import exam
from nurture.rewards.code import CodeTask, code_task, extract_program, grade_code
from nurture.rewards.sandbox import Job, Limits, Sandbox
from nurture.world import World

TASK = CodeTask(("assert f(1) == 2",), (), "f")


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    if sys.platform != "linux":
        pytest.skip("programs are run on Linux only")
    with Sandbox(1, Limits(wall_seconds=3)) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("```python\ndef f(x):\n    return 1\n```", "def f(x):\n    return 1\n"),
        ("Here it is:\n```\ndef f(x): pass\n```\nDone.", "def f(x): pass\n"),
        ("```py\ndef f(x): pass", "def f(x): pass"),
        (
            "```python\ndef f(): pass\n```\nBetter:\n```python\ndef f(x): return 2\n```",
            "def f(x): return 2\n",
        ),
        (
            "```python\nimport math\n```\n```python\ndef f(x): return math.pi\n```",
            "def f(x): return math.pi\n",
        ),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("<think>```python\ndef f(x): 1\n```</think>```python\ndef f(x): 2\n```", "def f(x): 2\n"),
        ("I would add one.", None),
        ("<think>def f(x): 1", None),
        ("", None),
    ],
)
def test_extract_program(reply: str, program: str | None):
    assert extract_program(reply, TASK) == program


HUMAN_EVAL = {
    "task_id": "x/0",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """ Add up.\n    >>> total([1])\n    1\n    """\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
MBPP = {
    "task_id": 2,
    "text": "Find the shared elements.",
    "code": "def shared(a, b):\r\n  return tuple(set(a) & set(b))",
    "test_list": [
        "assert set(shared((3, 4, 5), (5, 4, 7))) == set((4, 5))",
        "assert set(shared((1, 2), (5, 4))) == set(())",
    ],
    "test_setup_code": "",
}


def test_humaneval_rows(box: Sandbox):
    task = code_task(parse_row(HUMAN_EVAL, "row:1"))
    replies = [
        "    return sum(xs)\n",
        "```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```",
        "    return len(xs)\n",
    ]
    assert [v.passed for v in grade_code(replies, [task] * 3, box)] == [True, True, False]


def test_mbpp_rows(box: Sandbox):
    row = parse_row(MBPP, "row:1")
    task = code_task(row)
    assert task.entry_point == "shared"  # not `set`, though it comes first
    assert task.shown == (MBPP["test_list"][0],)
    replies = [
        "```python\n" + row.metadata["solution"] + "\n```",
        "```python\ndef shared(a, b): return (4, 5)\n```",
        "```python\nclass set:\n    def __init__(self, *a): pass\n    def __eq__(self, o): return True\ndef shared(a, b): return 1\n```",
    ]
    assert [v.passed for v in grade_code(replies, [task] * 3, box)] == [True, False, False]


def test_setup_code_with_a_class_of_the_program(box: Sandbox):
    row = parse_row(
        {
            "text": "Sum a tree.",
            "code": "",
            "test_list": ["assert total(root) == 3", "assert total(root.left) == 2"],
            "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
        },
        "row:1",
    )
    program = "class Node:\n    def __init__(self, v):\n        self.v = v\n        self.left = None\n"
    program += "def total(n):\n    return 0 if n is None else n.v + total(n.left)\n"
    replies = [f"```python\n{program}```", f"```python\n{program.replace('n.v +', '3 or')}```"]
    assert [v.passed for v in grade_code(replies, [code_task(row)] * 2, box)] == [True, False]


def test_rows_without_tests_are_refused():
    with pytest.raises(NurtureError, match="no tests"):
        code_task(parse_row({"prompt": "Hello"}, "row:1"))
    with pytest.raises(NurtureError, match="no tests"):
        code_task(World().task("fact", "train", 0))


def test_the_worlds_demonstrations_pass_and_wrong_ones_do_not(box: Sandbox):
    world = World()
    tasks = [world.task("code", "heldout", index) for index in range(60)]
    graded = [code_task(task) for task in tasks]
    assert all(len(task.tests) >= 8 for task in graded)
    assert all(v.passed for v in grade_code([task.demonstration for task in tasks], graded, box))
    nothing = [f"```python\ndef {task.entry_point}(x):\n    return x\n```" for task in tasks]
    assert not any(v.passed for v in grade_code(nothing, graded, box))


HONEST = {
    "tuple": ("def f(x): return (x, [x])", "assert f(1) == (1, [1])"),
    "dict of a counter": ("from collections import Counter\ndef f(x): return Counter('aab')", "assert f(1) == {'a': 2, 'b': 1}"),
    "set": ("def f(x): return {x}", "assert f(1) == {1}"),
    "bytes": ("def f(x): return b'a' * x", "assert f(2) == b'aa'"),
    "big": ("def f(x): return 7 ** x", "assert f(9999) % 1000 == 143"),
    "complex": ("def f(x): return x * 1j", "assert f(2) == 2j"),
    "fraction": ("from fractions import Fraction\ndef f(x): return Fraction(x, 3)", "from fractions import Fraction\nassert f(2) == Fraction(2, 3)"),
    "decimal": ("from decimal import Decimal\ndef f(x): return Decimal(x)", "from decimal import Decimal\nassert f(2) == Decimal('2')"),
    "date": ("import datetime\ndef f(x): return datetime.date(2020, 1, x)", "import datetime\nassert f(2) == datetime.date(2020, 1, 2)"),
    "float": ("def f(x): return x / 3", "assert abs(f(1) - 0.3333) < 1e-3"),
    "none": ("def f(x): return None", "assert f(1) is None"),
    "text": ("def f(x): return 'é\\ud800' * x", "assert f(1) == 'é\\ud800'"),
    "generator": ("def f(x): yield from range(x)", "assert list(f(3)) == [0, 1, 2]"),
    "closure": ("def f(x): return lambda y: x + y", "assert f(1)(2) == 3"),
    "named": ("def f(x, *, y=2): return x + y", "assert f(1, y=4) == 5"),
    "raises": ("def f(x): raise ValueError('no')", "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False"),
    "own error": ("class Odd(ValueError): pass\ndef f(x): raise Odd(x)", "try:\n    f(1)\nexcept Odd:\n    pass\nelse:\n    assert False"),
    "prints": ("def f(x):\n    print('log')\n    return x", "assert f(1) == 1"),
    "state": ("n = 0\ndef f(x):\n    global n\n    n += x\n    return n", "assert f(1) == 1\nassert f(1) == 2"),
    "math without import": ("def f(x): return x * 1.0", "assert math.isclose(f(2), 2)"),
    "threads": ("from concurrent.futures import ThreadPoolExecutor\ndef f(x):\n    with ThreadPoolExecutor(4) as e: return list(e.map(abs, range(-x, 0)))", "assert f(3) == [3, 2, 1]"),
    "asyncio": ("import asyncio\nasync def g(x): return x\ndef f(x): return asyncio.run(g(x))", "assert f(3) == 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(box: Sandbox, name: str):
    program, test = HONEST[name]
    if name in ("threads", "asyncio") and not box.walls.scratch:
        pytest.skip("the library's files are not to be read here")
    result = box.run(program, [test], entry_point="f")
    assert result.passed, result
    assert result.calls >= 1
    if name == "prints":
        assert result.output == "log\n"


def test_both_ways_of_testing_agree():
    program = "def f(x): return x + 1"
    assert exam.literal_calls(["assert f(1) == 2", "assert f(-1) == 0\nassert f(x=[1, (2,)]) == {'a': None}"])
    for other in (
        "assert f(1) == g(1)",
        "assert f(1) != 2",
        "x = 1",
        "assert f(x) == 1",
        "assert len(f(1)) == 1",
        "assert f(1",
    ):
        assert exam.literal_calls([other]) is None
    assert exam.literal_calls(["assert len([1]) == 1"]) is None  # a builtin is not the program's
    with Sandbox(1) as box:
        for value in (2, 3):
            tests = [f"assert f(1) == {value}"], [f"assert f(1) in [{value}]"]
            assert {box.run(program, test).passed for test in tests} == {value == 2}


def test_results_are_in_order_and_the_same_every_time(box: Sandbox):
    programs = [
        f"import random\ndef f(x): return {i} + 0 * hash('a') + 0 * random.random()" for i in range(10)
    ]
    jobs = [Job(program, (f"assert f(1) == {i // 2 * 2}",), "f") for i, program in enumerate(programs)]
    assert [r.passed for r in box.run_many(jobs)] == [i % 2 == 0 for i in range(10)]
    chance = "import random\nprint(random.random(), {'a', 'b', 'c', 'd'})"
    first = box.run(chance).output
    with Sandbox(1) as other:
        assert other.run(chance).output == first


def test_a_program_alone(box: Sandbox):
    done = box.run("if __name__ == '__main__':\n    print('main')")
    assert (done.status, done.output) == ("passed", "main\n")
    assert box.run("raise SystemExit(3)").detail == "ended with exit code 3"
    assert "ZeroDivisionError" in box.run("1 / 0").output
