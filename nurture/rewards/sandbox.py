"""Run a program that a model wrote, and keep everything else out of its reach. (in work: the signatures stand)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "error", "timeout", "memory", "grader_error"]


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 5.0
    cpu_seconds: int = 5
    memory_mb: int = 256
    output_bytes: int = 65_536
    file_mb: int = 1
    scratch_mb: int = 16
    threads: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class Job:
    """A program and the tests that its functions must pass.

    Attributes:
        source: the program, untrusted.
        tests: Python source with assert statements (or a `check(candidate)` function, or unittest classes); run in
            another process than the program. Empty: the program is only run.
        entry_point: the function that tests call `candidate`.
        module: name under which the tests import the program.
    """

    source: str
    tests: tuple[str, ...] = ()
    entry_point: str | None = None
    module: str | None = None


@dataclass(frozen=True)
class SandboxResult:
    """How a run ended. `grader_error` is our own failure, never the program's."""

    status: Status
    detail: str = ""
    output: str = ""
    seconds: float = 0.0
    calls: int = 0

    @property
    def passed(self) -> bool:
        """Whether every test passed (or, without tests, the program ran to its end)."""
        return self.status == "passed"


class Sandbox:
    """A pool of warm workers. Use as a context manager, or call `close`.

    Raises:
        NurtureError: this system cannot confine a program; the message says what is missing.
    """

    def __init__(self, workers: int | None = None, limits: Limits = Limits()) -> None:
        raise NotImplementedError

    def run_many(self, jobs: Sequence[Job]) -> list[SandboxResult]:
        """Run jobs on all workers; results in the order of `jobs`."""
        raise NotImplementedError

    def close(self) -> None:
        """End all workers."""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def run_program(
    source: str, tests: Sequence[str] = (), *, entry_point: str | None = None, limits: Limits = Limits()
) -> SandboxResult:
    """Run one program in a sandbox made for it. For many programs keep a `Sandbox`."""
    with Sandbox(1, limits) as sandbox:
        return sandbox.run_many([Job(source, tuple(tests), entry_point)])[0]
