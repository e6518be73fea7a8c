"""Does the program in a reply do what was asked? Tests in the sandbox say so, and nothing else.

A task has tests that its prompt shows and tests that it does not; a program must pass all of them. A list of answers to
the tests that were shown therefore earns nothing, and neither does a program that prints what is expected, exits early
or meddles with its test: see sandbox.py and exam.py. Main failure mode: tests so few or so weak that a wrong program
passes; a task whose every test is shown is refused.

Rows: HumanEval (arXiv 2107.03374), MBPP (arXiv 2108.07732), Exercism; and the world's functions.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nurture.data.rows import Row
from nurture.errors import NurtureError
from nurture.rewards import exam
from nurture.rewards.sandbox import Job, Sandbox
from nurture.world.grading import without_thoughts
from nurture.world.tasks import Task


@dataclass(frozen=True)
class CodeTask:
    """What a program must do.

    Attributes:
        tests: Python source, all of which must pass.
        shown: those of the tests that the prompt gives away.
        entry_point: the function to define, where the tests call one.
        module: name under which the tests import the program.
        prefix: source that the reply goes on from (HumanEval), put before the program.
    """

    tests: tuple[str, ...]
    shown: tuple[str, ...] = ()
    entry_point: str | None = None
    module: str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class CodeVerdict:
    """Whether the program passed every test. `grader_error`: we failed, not the program; leave the sample out."""

    passed: bool
    reason: str = ""
    grader_error: bool = False


def code_task(source: Row | Task) -> CodeTask:
    """Return the tests of a HumanEval, MBPP or Exercism row, or of a `code` task of the world.

    Raises:
        NurtureError: there are no tests, or the prompt shows all of them.
    """
    task = _world_task(source) if isinstance(source, Task) else _row_task(source)
    question = source.prompt if isinstance(source, Task) else source.identity()
    if not task.tests:
        raise NurtureError(f"no tests to run a program against: {question[:80]!r}")
    if set(task.tests) <= set(task.shown):
        raise NurtureError(f"the prompt shows every test, so its answers can be listed: {question[:80]!r}")
    return task


def _world_task(task: Task) -> CodeTask:
    """The world knows more examples of a function than a task shows; all are tests."""
    if task.kind != "code":
        return CodeTask(())
    examples = task.metadata["function"].examples
    tests = tuple(dict.fromkeys([*task.tests, *(f"assert {call} == {result}" for call, result in examples)]))
    return CodeTask(tests, tuple(test for test in tests if test in task.prompt), task.entry_point)


def _row_task(row: Row) -> CodeTask:
    prompt = row.identity()
    prefix = str(row.metadata.get("prefix", ""))
    setup = [text for text in (str(row.metadata.get("setup", "")), _helpers(prefix, row.entry_point)) if text]
    module = row.metadata.get("module")
    return CodeTask(
        tests=(*setup, *row.tests) if row.tests else (),
        shown=(*setup, *(test for test in row.tests if test.strip() in prompt)),
        entry_point=_entry_point(row),
        module=str(module) if module else None,
        prefix=prefix,
    )


def _entry_point(row: Row) -> str | None:
    """Return the function that the tests call: in `assert set(f(x)) == ...` that is f, whatever comes first."""
    if row.entry_point is None or not hasattr(builtins, row.entry_point):
        return row.entry_point
    try:
        borrowed, _ = exam.names_used("\n".join(row.tests))
    except SyntaxError:
        return row.entry_point
    return min(borrowed, default=row.entry_point)


def _helpers(prefix: str, entry_point: str | None) -> str:
    """Return what `prefix` defines beside the entry point, for the tests to use: their own copy, not the program's."""
    try:
        body = ast.parse(prefix).body
    except SyntaxError:
        return ""
    return "\n".join(ast.unparse(node) for node in body if getattr(node, "name", None) != entry_point)


_BLOCK = re.compile(
    r"^```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


def extract_program(reply: str, task: CodeTask) -> str | None:
    """Return the program that a reply contains, or None.

    Of several code blocks the last that defines the entry point counts, else all of them together. A reply without
    blocks is a program if it parses as one, by itself or as the rest of the task's prefix. A `<think>` part is ignored.
    """
    if "</think>" in reply or "<think>" in reply:
        reply = without_thoughts(reply)  # which strips the blanks that a bare function body needs
    blocks = _BLOCK.findall(reply)
    defining = [block for block in blocks if _defines(block, task.entry_point)]
    text = defining[-1] if defining else "\n".join(blocks) if blocks else reply
    if not text.strip():
        return None
    if task.prefix and not _defines(text, task.entry_point):
        return task.prefix + text  # the rest of the function
    program = f"{task.prefix}\n{text}" if task.prefix else text
    return program if blocks or _parses(program) else None


def _defines(source: str, name: str | None) -> bool:
    return (
        name is not None
        and re.search(rf"^(?:async )?(?:def|class) {re.escape(name)}\b", source, re.M) is not None
    )


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def grade_code(replies: Sequence[str], tasks: Sequence[CodeTask], sandbox: Sandbox) -> list[CodeVerdict]:
    """Run the program in each reply against the tests of its task.

    Args:
        replies: completions without special tokens.
        tasks: the task of each reply (`code_task`).
        sandbox: where programs run.
    """
    programs = [extract_program(reply, task) for reply, task in zip(replies, tasks, strict=True)]
    jobs = [
        Job(program, task.tests, task.entry_point, task.module)
        for program, task in zip(programs, tasks, strict=True)
        if program is not None
    ]
    results = iter(sandbox.run_many(jobs))
    verdicts = []
    for program in programs:
        if program is None:
            verdicts.append(CodeVerdict(False, "the reply contains no program"))
            continue
        result = next(results)
        verdicts.append(CodeVerdict(result.passed, result.detail, result.status == "grader_error"))
    return verdicts
