"""Stop a run that is at work, and have it go on: the only two things the studio does to a run.

Which process works on a run is asked of the operating system, which knows who holds the run's lock; the number in the
lock file may be old, and a signal to it would hit a stranger. The process is held by a descriptor while that is
checked, so that its number cannot pass to another in between. Going on starts `nurture run RUN` as a process of its
own, which outlives the studio; what it says is in `RUN/resumed.log`. Nothing in a request but the run's name, looked
up among those that are served, reaches either.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

from nurture import files
from nurture.errors import NurtureError

LOG = "resumed.log"
_LOCK = ".lock"
_FLOCK = "hhqqi"
"""Linux's `struct flock`: kind, from where, start, length, process."""
_GO_ON = (sys.executable, "-m", "nurture", "run")
_started: dict[Path, subprocess.Popen[bytes]] = {}


def holder(run: Path) -> int | None:
    """Return the process that holds the run's lock, None if nobody does (or the system is not Linux)."""
    if sys.platform != "linux" or not (run / _LOCK).is_file():
        return None
    import fcntl

    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with open(run / _LOCK, "rb") as file:
        kind, _, _, _, process = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return process if kind != fcntl.F_UNLCK else None


def stop(run: Path, at_once: bool = False) -> None:
    """Tell the run's process to stop: as ctrl-c does, or `at_once`, where that is not heeded. It can be resumed.

    Raises:
        NurtureError: nothing is running, or the process is somebody else's.
    """
    process = holder(run)
    if not process:
        raise NurtureError(f"{run.name} is not running (or not on this machine)")
    try:
        held = os.pidfd_open(process)
        try:
            if holder(run) == process:
                signal.pidfd_send_signal(held, signal.SIGTERM if at_once else signal.SIGINT)
        finally:
            os.close(held)
    except OSError as error:
        raise NurtureError(f"{run.name}: process {process} cannot be stopped ({error.strerror})") from error


def resume(run: Path) -> None:
    """Have the run go on in a process of its own.

    Raises:
        NurtureError: it is running, or cannot be resumed.
    """
    run = run.resolve()
    begun = _started.get(run)
    if holder(run) or (begun is not None and begun.poll() is None):
        raise NurtureError(f"{run.name} is running already")
    with files.clear_disk_errors(run / LOG), open(run / LOG, "wb") as log:
        _started[run] = subprocess.Popen(
            [*_GO_ON, str(run)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # ctrl-c at the studio does not reach it
        )


def is_starting(run: Path) -> bool:
    """Return whether a resumed process is alive, also before it has taken the lock."""
    begun = _started.get(run.resolve())
    return begun is not None and begun.poll() is None


def failure(run: Path) -> str | None:
    """Return the last words of a resumed process that failed, else None."""
    begun = _started.get(run.resolve())
    if begun is None or begun.poll() in (None, 0, -signal.SIGTERM, 128 + signal.SIGINT):
        return None
    said = (run / LOG).read_text(encoding="utf-8", errors="replace").strip()
    return said[-600:] or f"the resumed run ended with exit code {begun.returncode}"
