"""Does the program in a reply do what was asked? (in work: the signatures stand)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nurture.data.rows import Row
from nurture.rewards.sandbox import Sandbox
from nurture.world.tasks import Task


@dataclass(frozen=True)
class CodeTask:
    """What a program must do: tests it was shown and tests it was not."""

    tests: tuple[str, ...]
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
    """Return the tests of a HumanEval, MBPP or Exercism row, or of a `code` task of the world."""
    raise NotImplementedError


def grade_code(replies: Sequence[str], tasks: Sequence[CodeTask], sandbox: Sandbox) -> list[CodeVerdict]:
    """Run the program in each reply against the tests of its task."""
    raise NotImplementedError
