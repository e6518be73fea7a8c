"""Run programs that a model wrote, keep everything else out of their reach, and believe only the judge.

A `Sandbox` is a pool of warm workers (worker.py), one a core. Each job is forked from one: the program behind the walls
of walls.py, and its judge (exam.py) in another process behind the same walls. Program text, tests and verdict travel in
file descriptors that only the process they are for has open, so the verdict cannot be forged from inside: not by
printing, exiting, patching, or writing to a guessed place. Nothing is random that a verdict could depend on.

On a system where a wall is missing nothing is run: `Sandbox()` refuses and says what to do. Main failure mode: an
outage of our own taken for a wrong program; that is the status `grader_error`, tried twice, and no 0 reward.

Not a defence against holes in the kernel itself: for hostile programs at scale, put the whole run in a virtual machine.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

from nurture.errors import NurtureError
from nurture.rewards import exam

Status = Literal["passed", "failed", "error", "timeout", "memory", "grader_error"]


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 5.0
    """Seconds until it is stopped; its tests included."""
    cpu_seconds: int = 5
    """Seconds of processor time, all threads together."""
    memory_mb: int = 256
    """Address space in MiB."""
    output_bytes: int = 65_536
    """How much of what it prints is kept; it can print as much as one file may hold."""
    file_mb: int = 1
    """Largest file in MiB."""
    scratch_mb: int = 16
    """All files together in MiB; they are gone when the program ends."""
    threads: int = 16
    """Threads beside the first. It can start no processes at all."""
    open_files: int = 64
    """Open files."""


@dataclass(frozen=True)
class Job:
    """A program and the tests that it must pass.

    Attributes:
        source: the program, untrusted.
        tests: Python source with assert statements, a `check(candidate)` function, `test_...` functions or unittest
            classes; run in another process than the program. Empty: the program is only run.
        entry_point: the function that the tests call, also known to them as `candidate`.
        module: name under which the tests import the program.
    """

    source: str
    tests: tuple[str, ...] = ()
    entry_point: str | None = None
    module: str | None = None


@dataclass(frozen=True)
class SandboxResult:
    """How a run ended.

    Attributes:
        status: `failed` a test did not pass; `error` the program did not run; `grader_error` our own failure.
        detail: the reason in words.
        output: what the program printed, cut at `Limits.output_bytes`.
        seconds: wall time.
        calls: how often the tests called the program.
    """

    status: Status
    detail: str = ""
    output: str = ""
    seconds: float = 0.0
    calls: int = 0

    @property
    def passed(self) -> bool:
        """Whether every test passed (or, without tests, the program ran to its end)."""
        return self.status == "passed"


@dataclass(frozen=True)
class Walls:
    """How this system confines a program.

    Attributes:
        namespaces: own users, files, network and processes.
        landlock: version of Landlock, 0 for none.
        bubblewrap: the workers run inside bubblewrap, because only it may make namespaces here.
    """

    namespaces: bool
    landlock: int
    bubblewrap: bool

    def __str__(self) -> str:
        parts = ["bubblewrap"] * self.bubblewrap + ["namespaces"] * self.namespaces
        parts += [f"Landlock {self.landlock}"] * bool(self.landlock) + ["seccomp", "limits"]
        return " + ".join(parts)

    @property
    def scratch(self) -> bool:
        """Whether programs have a scratch folder; one without a limit on its size is not given."""
        return self.namespaces


_PACKAGE = Path(__file__).resolve().parent.parent.parent
_START = (
    f"import sys; sys.path.insert(0, {str(_PACKAGE)!r})\nfrom nurture.rewards import worker\nworker.main()"
)
_PATIENCE = 10.0
"""Seconds beyond a job's own limit before its worker is given up."""
_numbers = count()


def _uid() -> int | None:
    """Return the user that a worker of root becomes: a number no system hands out, another for every worker."""
    return 0x7000_0000 + (os.getpid() * 64 + next(_numbers)) % 0x0F00_0000 if os.geteuid() == 0 else None


class _Worker:
    """A running worker and the job it has."""

    def __init__(self, namespaces: bool, bubblewrap: bool, memory_mb: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        uid = _uid()
        settings = {
            "control": theirs.fileno(),
            "namespaces": namespaces,
            "memory_mb": memory_mb,
            "uid": None if bubblewrap else uid,
        }
        command = [sys.executable, "-s", "-S", "-B", "-c", _START, json.dumps(settings)]
        nobody: dict[str, Any] = {}
        if bubblewrap:
            command = [*_bubblewrap(), *command]
            nobody = {"user": uid, "group": uid, "extra_groups": []} if uid is not None else {}
        self.control = ours
        self.job: _Running | None = None
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **nobody,
            )
        finally:
            theirs.close()

    def hello(self) -> dict[str, Any]:
        """Return what the worker says of its walls."""
        self.control.settimeout(30)
        try:
            message = self.control.recv(65_536)
        except OSError:
            message = b""
        self.control.settimeout(None)
        answer: dict[str, Any] = json.loads(message) if message else {"error": "the worker did not start"}
        return answer

    def close(self) -> None:
        """Kill the worker; the kernel then kills whatever it started."""
        self.control.close()
        self.process.kill()
        self.process.wait()
        if self.job is not None:
            self.job.close()


def _bubblewrap() -> list[str]:
    """Return the command that runs another inside bubblewrap: system libraries and Python to read, nothing else."""
    shown = ["/usr", "/lib", "/lib64", "/bin", sys.base_prefix, sys.prefix, str(_PACKAGE / "nurture")]
    binds = [
        word for path in dict.fromkeys(shown) if os.path.exists(path) for word in ("--ro-bind", path, path)
    ]
    return [
        "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        *binds,
        "--dev",
        "/dev",
        "--chdir",
        "/",
    ]


@lru_cache(maxsize=1)
def walls_here() -> Walls:
    """Return the walls that this system has, tried out: the strongest arrangement from which nothing gets out.

    Raises:
        NurtureError: there is none.
    """
    if sys.platform != "linux":
        raise NurtureError(
            f"programs written by a model are run on Linux only, this is {sys.platform}. Use a Linux machine or"
            " container, or leave the code tasks out."
        )
    reasons = []
    for namespaces, bubblewrap in ((True, False), (False, True), (False, False)):
        if bubblewrap and not shutil.which("bwrap"):
            continue
        name = "namespaces" if namespaces else "bubblewrap" if bubblewrap else "Landlock and seccomp alone"
        worker = _Worker(namespaces, bubblewrap, Limits().memory_mb)
        try:
            hello = worker.hello()
        finally:
            worker.close()
        if not hello.get("error") and not hello["breaches"]:
            return Walls(namespaces, hello["landlock"], bubblewrap)
        reasons.append(f"{name}: {hello.get('error') or 'a program could ' + ', '.join(hello['breaches'])}")
    raise NurtureError(
        f"this system cannot confine a program, so none is run ({'; '.join(reasons)}). One of these mends it: allow"
        " user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone,"
        " kernel.apparmor_restrict_unprivileged_userns; docker run --security-opt seccomp=unconfined), install"
        " bubblewrap, or use a kernel with Landlock (5.13 or newer)."
    )


@dataclass
class _Running:
    """A job that a worker has: where its verdict and its output will be, and when to give up."""

    index: int
    attempt: int
    expected: Sequence[Any] | None
    verdict: int | None
    output: int
    deadline: float

    def read_verdict(self) -> dict[str, Any] | None:
        """Return the judge's verdict, or ours on what the program wrote down; None where there is none."""
        if self.verdict is None:
            return None
        if self.expected is not None:
            answers = os.pread(self.verdict, exam.MESSAGE_BYTES, 0)
            return exam.mark(answers, self.expected)
        said = os.read(self.verdict, 65_536)
        return json.loads(said) if said else None

    def close(self) -> None:
        for descriptor in (self.verdict, self.output):
            if descriptor is not None:
                os.close(descriptor)


@lru_cache(maxsize=4096)
def _literal_calls(tests: tuple[str, ...]) -> tuple[bytes, list[Any]] | None:
    found = exam.literal_calls(tests)
    return found and (json.dumps(found[0]).encode(), found[1])


@dataclass
class Sandbox:
    """A pool of warm workers that run programs. Use as a context manager, or call `close`.

    Args:
        workers: how many; default: one a core.
        limits: what each program may use.

    Raises:
        NurtureError: this system cannot confine a program.
    """

    workers: int | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.walls = walls_here()
        self._lock = threading.Lock()
        self._pool: list[_Worker] = []
        wanted = self.workers or len(os.sched_getaffinity(0))
        fresh = [self._start() for _ in range(wanted)]
        self._pool = [self._greet(worker) for worker in fresh]

    def _start(self) -> _Worker:
        return _Worker(self.walls.namespaces, self.walls.bubblewrap, self.limits.memory_mb)

    def _greet(self, worker: _Worker) -> _Worker:
        hello = worker.hello()
        if hello.get("error") or hello["breaches"]:
            worker.close()
            raise NurtureError(f"a sandbox worker did not start: {hello.get('error') or hello['breaches']}")
        return worker

    def run(
        self,
        source: str,
        tests: Sequence[str] = (),
        *,
        entry_point: str | None = None,
        module: str | None = None,
    ) -> SandboxResult:
        """Run one program."""
        return self.run_many([Job(source, tuple(tests), entry_point, module)])[0]

    def run_many(self, jobs: Sequence[Job]) -> list[SandboxResult]:
        """Run jobs on all workers; results in the order of `jobs`."""
        with self._lock:
            return self._run_many(jobs)

    def _run_many(self, jobs: Sequence[Job]) -> list[SandboxResult]:
        if not self._pool:
            raise NurtureError("the sandbox is closed")
        results: dict[int, SandboxResult] = {}
        waiting = deque((index, 1) for index in range(len(jobs)))
        with selectors.DefaultSelector() as selector:
            while len(results) < len(jobs):
                for worker in self._pool:
                    if waiting and worker.job is None:
                        index, attempt = waiting.popleft()
                        self._give(worker, jobs[index], index, attempt)
                        selector.register(worker.control, selectors.EVENT_READ, worker)
                busy = [worker for worker in self._pool if worker.job is not None]
                next_deadline = min(worker.job.deadline for worker in busy if worker.job is not None)
                ready = selector.select(max(0.0, next_deadline - time.monotonic()))
                answered = [key.data for key, _ in ready]
                late = [w for w in busy if w.job is not None and w.job.deadline <= time.monotonic()]
                for worker in dict.fromkeys([*answered, *late]):
                    selector.unregister(worker.control)
                    running = worker.job
                    result = self._collect(worker, in_time=worker in answered)
                    if result is None and running.attempt == 1:
                        waiting.appendleft((running.index, 2))
                    else:
                        results[running.index] = result or SandboxResult(
                            "grader_error", "the sandbox's worker ended twice on this job"
                        )
        return [results[index] for index in range(len(jobs))]

    def _give(self, worker: _Worker, job: Job, index: int, attempt: int) -> None:
        """Send a job; what only one of its processes may see goes as a descriptor for that process."""
        source = _memory_file(job.source.encode("utf-8", "surrogatepass"))
        given = [source, output := _memory_file(b"")]
        kind, verdict, expected = "alone", None, None
        if literal := _literal_calls(job.tests):
            kind, expected = "list", literal[1]
            given += [_memory_file(literal[0]), verdict := _memory_file(b"")]
        elif job.tests:
            kind, content = (
                "judge",
                {"tests": job.tests, "entry_point": job.entry_point, "module": job.module},
            )
            verdict, writer = os.pipe()
            given += [_memory_file(json.dumps(content).encode()), writer]
        deadline = time.monotonic() + self.limits.wall_seconds + _PATIENCE
        worker.job = _Running(index, attempt, expected, verdict, output, deadline)
        try:
            message = json.dumps({"kind": kind, "limits": asdict(self.limits)}).encode()
            socket.send_fds(worker.control, [message], given)
        except OSError:
            pass  # the worker has died: its socket reads as ended, and `_collect` replaces it
        finally:
            for descriptor in given:
                if descriptor not in (output, verdict):
                    os.close(descriptor)

    def _collect(self, worker: _Worker, in_time: bool) -> SandboxResult | None:
        """Return the result of the worker's job; None, and a new worker, if it died or its walls did not stand."""
        running = worker.job
        assert running is not None
        message = b""
        if in_time:
            try:
                message = worker.control.recv(65_536)
            except OSError:
                message = b""
        if not message:
            worker.close()
            self._pool[self._pool.index(worker)] = self._greet(self._start())
            return None
        report = json.loads(message)
        verdict = running.read_verdict()
        output = os.pread(running.output, self.limits.output_bytes, 0).decode("utf-8", "replace")
        running.close()
        worker.job = None
        if not report["confined"]:
            return None
        return _result(report, verdict, output, self.limits)

    def close(self) -> None:
        """End all workers."""
        for worker in self._pool:
            worker.close()
        self._pool = []

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("job", os.MFD_CLOEXEC)
    while content:
        content = content[os.write(descriptor, content) :]
    return descriptor


def _result(
    report: dict[str, Any], verdict: dict[str, Any] | None, output: str, limits: Limits
) -> SandboxResult:
    """Read the worker's report and the verdict."""
    code, cpu = report["program"]["code"], report["program"]["cpu"]
    status: Status
    if verdict is not None:
        status, detail, calls = verdict["status"], verdict["detail"], verdict["calls"]
    elif "judge" in report:
        ending = _ending(report["judge"]["code"])
        status, detail, calls = "failed", f"the tests could not be finished ({ending})", 0
    else:
        status, detail, calls = ("passed", "", 0) if code == 0 else ("error", _ending(code), 0)
    if report["timed_out"]:
        status, detail = "timeout", f"stopped after {limits.wall_seconds:g} s"
    elif status != "passed" and code == -signal.SIGKILL and cpu > limits.cpu_seconds - 0.5:
        status, detail = "timeout", f"stopped after {limits.cpu_seconds} s of processor time"
    elif status != "passed" and code < 0 and code != -signal.SIGKILL:
        detail = _ending(code)
    return SandboxResult(status, detail, output, report["seconds"], calls)


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
