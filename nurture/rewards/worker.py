"""One worker of the sandbox: a warm interpreter that forks a child for every program and every judge.

Started by sandbox.py with an empty environment, it puts up the walls it can, reports them, and then takes jobs. The
worker itself handles no program text, no test and no verdict: those pass between the parent and the children in file
descriptors. So nothing of an earlier job (tests of the same task, another reply) lies in the memory that the next
program is forked with. It holds capabilities in its own namespaces only, and gives none of them to a child.

    parent ── descriptors, limits ──> worker ──fork──> program (source) <─ values ─> judge (tests) ── verdict ──> parent

Only the standard library is imported. Main failure mode: a child that outlives its job; children are killed when the
job ends, a program's own children are impossible (seccomp) and would die with its process namespace.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

from nurture.rewards import exam, walls

_FIRST, _SECOND, _THIRD = 3, 4, 5  # what a child keeps, see `run`
_JUDGE_MEMORY_MB = 512

WARM = """
abc array base64 bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum fractions
functools hashlib heapq io itertools json math numbers operator queue random re statistics string struct textwrap
threading time typing unittest zlib
""".split()
"""Modules imported once in the worker; the rest of the standard library is imported from its files when needed."""


def library_folders() -> list[str]:
    """Return the folders of the standard library: of its modules, and of those that are compiled."""
    library = os.path.realpath(os.path.dirname(os.__file__))
    compiled = [os.path.realpath(path) for path in sys.path if path.endswith("lib-dynload")]
    return list(dict.fromkeys([library, *compiled]))


def main() -> None:
    """Serve the parent until it closes the control socket."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=settings["control"])
    try:
        worker = _Worker(settings)
        hello = worker.hello()
    except Exception as error:
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    control.send(json.dumps(hello).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 4)
        if not message:
            return
        report = worker.run(json.loads(message), descriptors)
        control.send(json.dumps(report).encode())


class _Worker:
    """The walls around this worker, and what it takes to put up those around its children."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.namespaces: bool = settings["namespaces"]
        for name in WARM:
            importlib.import_module(name)
        sys.path[:] = library_folders()
        visible = [path for path in sys.path if not path.startswith(sys.path[0] + os.sep)]
        sys.argv[:] = ["program.py"]
        for name in [name for name in sys.modules if name.split(".")[0] == "nurture"]:
            del sys.modules[name]  # a program that imports these finds nothing
        self.memory_mb: int = settings["memory_mb"]
        nobody: int | None = settings["uid"]
        if self.namespaces:
            walls.enter_namespaces(nobody)
            if os.fork():  # this process stays outside and passes on the end of its child
                os.close(settings["control"])
                os._exit(os.waitstatus_to_exitcode(os.wait()[1]) & 0xFF)
            walls.enter_empty_root(visible)
        if nobody is not None:
            walls.become_nobody(nobody, keep_capabilities=self.namespaces)
        walls.die_with_parent()
        os.chdir("/")
        self.own = os.pidfd_open(os.getpid())
        self.nothing = os.open("/dev/null", os.O_RDWR)
        self.confined = mmap.mmap(-1, 2)  # set by a program and by a judge once behind its walls
        self.landlock = walls.landlock_rules(visible, scratch=self.namespaces)
        self.seccomp = walls.seccomp_program()
        gc.collect()
        gc.freeze()  # a collection in a child would otherwise copy every page of this process

    def hello(self) -> dict[str, Any]:
        """Put a child behind the walls and have it try to get out; return which walls stand and what got out."""
        reader, writer = os.pipe()
        limits = {"memory_mb": self.memory_mb, "cpu_seconds": 5, "file_mb": 1, "open_files": 64, "threads": 8}
        limits["scratch_mb"] = 1

        def try_everything() -> None:
            found = walls.breaches("/etc/passwd", self.memory_mb)
            os.write(_FIRST, json.dumps(found).encode())

        child = self._fork([writer], [self.nothing] * 3, limits, try_everything)
        os.close(writer)
        answer = b"".join(iter(lambda: os.read(reader, 4096), b""))
        os.close(reader)
        os.waitpid(child, 0)
        found = json.loads(answer) if answer else ["the trial of the walls ended early"]
        return {"breaches": found, "landlock": walls.landlock_version()}

    def run(self, job: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Run one job: a program and, where the job has tests, its judge."""
        started = time.monotonic()
        limits, kind = job["limits"], job["kind"]
        source, output, *rest = descriptors
        streams = [self.nothing, output, output]
        self.confined[:] = bytes(2)
        if kind == "judge":
            program_end, judge_end = socket.socketpair()
            given = [source, program_end.fileno()]
            children = {"program": self._fork(given, streams, limits, _program_for_judge)}
            given = [rest[0], judge_end.fileno(), rest[1]]
            children["judge"] = self._fork(given, [self.nothing] * 3, None, _judge)
            program_end.close()
            judge_end.close()
        else:
            body = _program_with_list if kind == "list" else _program_alone
            children = {"program": self._fork([source, *rest], streams, limits, body)}
        for descriptor in descriptors:
            os.close(descriptor)
        last = [*children][-1]  # the job is over when the judge is
        timed_out = not _ends_within(children[last], limits["wall_seconds"])
        report: dict[str, Any] = {"timed_out": timed_out}
        for name, child in children.items():
            if name != last or timed_out:
                os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
            _, status, usage = os.wait4(child, 0)
            code = os.waitstatus_to_exitcode(status)
            report[name] = {"code": code, "cpu": usage.ru_utime + usage.ru_stime}
        report["confined"] = all(self.confined[: len(children)])
        report["seconds"] = time.monotonic() - started
        return report

    def _fork(
        self, kept: list[int], streams: list[int], limits: dict[str, Any] | None, body: Callable[[], None]
    ) -> int:
        """Fork a child that goes behind the walls and then runs `body`; return its process number.

        Args:
            kept: descriptors the child keeps, as 3, 4, ...
            streams: its standard input, output and error.
            limits: of a program; None for a judge, which needs no scratch folder or threads.
        """
        own_processes = self.namespaces and limits is not None
        if own_processes:
            walls.next_child_in_own_processes()
        try:
            child = os.fork()
            if child == 0:
                self._confine(kept, streams, limits, body)
        finally:
            if own_processes:
                walls.next_child_in_my_processes(self.own)
        return child

    def _confine(
        self, kept: list[int], streams: list[int], limits: dict[str, Any] | None, body: Callable[[], None]
    ) -> None:
        """Put up the walls in this fresh child, run `body`, end."""
        code = 1
        try:
            rules = _rearrange([*streams, *kept], self.landlock)
            if self.namespaces:
                if limits is not None:
                    walls.mount_scratch(limits["scratch_mb"])
                walls.drop_capabilities()
            if limits is None:
                walls.set_limits(_JUDGE_MEMORY_MB, 600, 1, 16, None)
            else:
                walls.set_limits(
                    limits["memory_mb"], limits["cpu_seconds"], limits["file_mb"], limits["open_files"],
                    limits["threads"] + 3,  # beside this worker, the program and its judge
                )  # fmt: skip
            walls.landlock(rules)
            if rules is not None:
                os.close(rules)
            walls.seccomp(self.seccomp)
            self.confined[limits is None] = 1
            self.confined.close()  # unmapped before a stranger's code runs, which so cannot unsay it
            body()
            code = 0
        except exam.EndOfChannel:
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            os._exit(code & 0xFF)


def _rearrange(descriptors: list[int], rules: int | None) -> int | None:
    """Make `descriptors` 0, 1, 2, ... of this process, close all others, and return where `rules` is now."""
    wanted = [*descriptors, *([] if rules is None else [rules])]
    high = [os.dup2(d, 200 + i) for i, d in enumerate(wanted)]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place)
    walls.close_from(len(wanted))
    return None if rules is None else len(wanted) - 1


def _ends_within(child: int, seconds: float) -> bool:
    handle = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(max(1, int(seconds * 1000))))
    finally:
        os.close(handle)


def _read_all(descriptor: int) -> str:
    """Read a memory file from its start and close it."""
    size = os.fstat(descriptor).st_size
    text = b""
    while len(text) < size:
        text += os.pread(descriptor, size - len(text), len(text))
    os.close(descriptor)
    return text.decode("utf-8", "surrogatepass")


def _fresh_interpreter() -> None:
    """Make this child like any other: the same random numbers every time, and memory collected."""
    random.seed(0)
    gc.enable()


def _program_for_judge() -> None:
    """Descriptors: source, channel to the judge."""
    source = _read_all(_FIRST)
    _fresh_interpreter()
    exam.answer_calls(source, _SECOND)


def _program_with_list() -> None:
    """Descriptors: source, calls to make, where the answers go."""
    source, calls = _read_all(_FIRST), json.loads(_read_all(_SECOND))
    _fresh_interpreter()
    answers = json.dumps(exam.answer_list(source, calls)).encode("ascii")
    while answers:
        answers = answers[os.write(_THIRD, answers) :]


def _program_alone() -> None:
    """Descriptor: source."""
    source = _read_all(_FIRST)
    _fresh_interpreter()
    exam.run_program(source, types.ModuleType("__main__"))


def _judge() -> None:
    """Descriptors: tests, channel to the program, where the verdict goes."""
    content = json.loads(_read_all(_FIRST))
    random.seed(0)
    os.write(_THIRD, json.dumps(exam.judge(content, _SECOND)).encode())
