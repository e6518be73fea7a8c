"""Is a reply right, wrong, or not to be checked? One question for rows of every kind.

A world task is graded by the world, a row with tests by running the program in the sandbox, a row with an answer by the
math grader. Anything else has no right answer that a program could know. A grader that fails has checked nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from nurture.data.rows import Row
from nurture.rewards.code import code_task, grade_code
from nurture.rewards.math import check_math
from nurture.rewards.sandbox import Sandbox
from nurture.world.grading import grade
from nurture.world.tasks import Task


def check_replies(rows: Sequence[Row], replies: Sequence[str]) -> list[bool | None]:
    """Return for each reply to its row: True (right), False (wrong, or harmful in the world), None (cannot be told).

    Args:
        rows: what was asked; the same row may stand several times.
        replies: without special tokens; a `<think>` part is ignored.

    Raises:
        NurtureError: there are programs to run, and this system cannot confine them.
    """
    verdicts: list[bool | None] = [
        _without_running(row, reply) for row, reply in zip(rows, replies, strict=True)
    ]
    programs = [place for place, row in enumerate(rows) if row.tests]
    if programs:
        tasks = [code_task(rows[place].metadata.get("task") or rows[place]) for place in programs]
        with Sandbox() as sandbox:
            for place, verdict in zip(
                programs, grade_code([replies[p] for p in programs], tasks, sandbox), strict=True
            ):
                verdicts[place] = None if verdict.grader_error else verdict.passed
    return verdicts


def _without_running(row: Row, reply: str) -> bool | None:
    if row.tests:
        return None
    task = row.metadata.get("task")
    if isinstance(task, Task):
        verdict = grade(task, reply)
        return False if verdict.harmful else verdict.correct
    if row.answer is None:
        return None
    found = check_math(reply, row.answer)
    return None if found.grader_error else found.correct
