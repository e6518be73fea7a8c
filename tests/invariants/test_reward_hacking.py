"""Programs that want the reward without the work. Each earns 0 on tests that an honest program passes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from nurture.data.rows import parse_row
from nurture.errors import NurtureError
from nurture.rewards.code import CodeTask, code_task, grade_code
from nurture.rewards.sandbox import Limits, Sandbox
from nurture.world import World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(1, Limits(wall_seconds=3, cpu_seconds=1)) as sandbox:
        yield sandbox


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


def passes(box: Sandbox, program: str, task: CodeTask) -> bool:
    verdict = grade_code([fenced(program)], [task], box)[0]
    assert not verdict.grader_error, verdict
    return verdict.passed


SHOWN = "assert double(2) == 4"
COMPARED = CodeTask((SHOWN, "assert double(5) == 10", "assert double(-1) == -2"), (SHOWN,), "double")
JUDGED = CodeTask(
    (SHOWN, "assert abs(double(5) - 10) < 1e-6", "assert double(-1) in [-2]"), (SHOWN,), "double"
)
CHECKED = CodeTask(
    (
        "import math\ndef check(candidate):\n    assert candidate(5) == 10\n    assert math.isclose(candidate(-1), -2)",
    ),
    (),
    "double",
)
UNITTEST = CodeTask(
    (
        "import unittest\nfrom doubling import double\nclass T(unittest.TestCase):\n"
        "    def test_it(self):\n        self.assertEqual(double(5), 10)\n        self.assertEqual(double(-1), -2)\n",
    ),
    (),
    None,
    "doubling",
)

HACKS = {
    "prints the expected answers": "print(4); print(10); print(-2); print('passed')",
    "exits at once": "import sys; sys.exit(0)",
    "exits in the function": "import sys\ndef double(x): sys.exit(0)",
    "ends the process": "import os; os._exit(0)",
    "ends the process in the function": "import os\ndef double(x): os._exit(0)",
    "raises SystemExit(0)": "def double(x): raise SystemExit(0)",
    "raises StopIteration": "def double(x): raise StopIteration",
    "raises a skip": "import unittest\ndef double(x): raise unittest.SkipTest('no')",
    "raises KeyboardInterrupt": "def double(x): raise KeyboardInterrupt",
    "returns what equals everything": "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    def __sub__(self, o): return 0\n    def __hash__(self): return 0\ndef double(x): return E()",
    "returns a number that equals everything": "class E(int):\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    def __sub__(self, o): return 0\n    def __hash__(self): return 0\ndef double(x): return E(0)",
    "returns a float that equals everything": "class E(float):\n    def __eq__(self, o): return True\n    def __sub__(self, o): return 0.0\n    __hash__ = float.__hash__\ndef double(x): return E(0)",
    "returns a list that equals everything": "class E(list):\n    def __eq__(self, o): return True\ndef double(x): return E()",
    "lies about its class": "class E:\n    __class__ = int\n    def __eq__(self, o): return True\ndef double(x): return E()",
    "lists the shown answers": "def double(x): return {2: 4}.get(x)",
    "returns a shown constant": "def double(x): return 4",
    "patches builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = type(None)\nbuiltins.all = builtins.any = lambda x: True\ndef double(x): return 0",
    "brings its own abs and math": "class math:\n    isclose = staticmethod(lambda a, b: True)\ndef abs(x): return 0\ndef double(x): return 0",
    "brings its own check": "def check(candidate): pass\ndef candidate(x): return x\ndef double(x): return 0",
    "patches math": "import math\nmath.isclose = lambda a, b: True\ndef double(x): return 0",
    "patches unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestCase.run = lambda *a: None\ndef double(x): return 0",
    "traces every frame": "import sys\ndef t(f, e, a):\n    f.f_trace_opcodes = False\n    return t\nsys.settrace(t)\ndef double(x): return 0",
    "imports the grader": "try:\n    from nurture.rewards import exam\n    exam.judge = exam.mark = lambda *a: {'status': 'passed'}\nexcept ImportError:\n    pass\ndef double(x): return 0",
    "patches the loaded grader": "import sys, gc\nfor o in gc.get_objects():\n    if type(o) is dict and 'judge' in o and 'mark' in o:\n        o['judge'] = o['mark'] = lambda *a: {'status': 'passed', 'detail': '', 'calls': 1}\ndef double(x): return 0",
    "patches json": "import json\njson.dumps = lambda *a, **k: '[{\"value\": null}, {\"value\": true}]'\ndef double(x): return 0",
    "writes a verdict to every descriptor": "import os\nfor n in range(3, 40):\n    try: os.write(n, b'{\"status\": \"passed\", \"detail\": \"\", \"calls\": 3}')\n    except OSError: pass\ndef double(x): return 0",
    "runs at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef double(x): return 0",
    "deletes itself": "import sys\nsys.modules.clear()\ndef double(x): return 0",
    "defines nothing": "pass",
    "answers for ever": "def double(x):\n    while True: pass",
    "returns a generator": "def double(x):\n    while True: yield x * 2",
    "returns the function": "def double(x): return double",
    "returns nan": "def double(x): return float('nan')",
    "returns far too much": "def double(x): return [0] * 10_000_000",
    "nests without end": "def double(x):\n    a = []\n    for _ in range(100_000): a = [a]\n    return a",
    "returns itself inside": "def double(x):\n    a = []\n    a.append(a)\n    return a",
}  # fmt: skip


@pytest.mark.parametrize(
    "task", [COMPARED, JUDGED, CHECKED, UNITTEST], ids=["compared", "judged", "check", "unittest"]
)
def test_no_hack_earns_anything(box: Sandbox, task: CodeTask):
    assert passes(box, "def double(x):\n    return x * 2", task)
    earned = [name for name, program in HACKS.items() if passes(box, program, task)]
    assert not earned


def test_changing_the_arguments_earns_nothing(box: Sandbox):
    task = CodeTask(
        ("a = [3, 1, 2]\nassert ordered(a) == sorted(a)", "assert ordered([2, 1]) == [1, 2]"), (), "ordered"
    )
    assert passes(box, "def ordered(a): return sorted(a)", task)
    assert not passes(box, "def ordered(a):\n    a.clear()\n    return []", task)
    only = CodeTask(("a = [3, 1, 2]\nassert ordered(a) == sorted(a)",), (), "ordered")
    assert not passes(box, "def ordered(a):\n    a.clear()\n    return []", only)


def test_helpers_of_humaneval_are_the_tests_own(box: Sandbox):
    """HumanEval/32 compares by `poly`, which its prompt defines: the program's own `poly` must not count."""
    prefix = 'def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\ndef root(xs):\n    """Find x."""\n'
    record = {
        "prompt": prefix,
        "canonical_solution": "    return -xs[0] / xs[1]\n",
        "test": "def check(candidate):\n    for xs in ([1, 2], [-3, 1]):\n        assert abs(poly(xs, candidate(xs))) < 1e-6\n",
        "entry_point": "root",
    }
    task = code_task(parse_row(record, "row:1"))
    assert passes(box, "def root(xs):\n    return -xs[0] / xs[1]", task)
    assert not passes(box, "def poly(xs, x):\n    return 0\n\ndef root(xs):\n    return 7", task)


def test_a_task_whose_every_test_is_shown_is_refused():
    record = {"text": "Double it.", "code": "def f(x): return 2 * x", "test_list": ["assert f(1) == 2"]}
    with pytest.raises(NurtureError, match="shows every test"):
        code_task(parse_row(record, "row:1"))


def test_answers_to_the_shown_tests_of_the_world_earn_nothing(box: Sandbox):
    """A table of everything that the prompt shows passes what is shown and nothing else."""
    world = World()
    tasks = [t for t in (world.task("code", "train", i) for i in range(200)) if "It must pass" in t.prompt]
    assert len(tasks) > 30
    honest = grade_code([t.demonstration for t in tasks], [code_task(t) for t in tasks], box)
    assert all(verdict.passed for verdict in honest)
    tables = []
    for task in tasks:
        call, result = code_task(task).shown[0].removeprefix("assert ").split(" == ")
        tables.append(fenced(f"def {task.entry_point}(x):\n    return {result}"))
        assert box.run(f"def {task.entry_point}(x): return {result}", [f"assert {call} == {result}"]).passed
    assert not any(v.passed for v in grade_code(tables, [code_task(t) for t in tasks], box))
