"""Start-up: how long a command line takes to say what it can do. `nurture --help` against `trl --help`.

    python bench/startup.py [--json] [--quick]

Commands a processor second, so that a busy machine changes little; started in turns, the best of each. The peer's
command is what its package installs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from common import Result, interleave, report


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two turns")
    arguments = parser.parse_args()
    scripts = Path(sys.executable).parent

    def run(name: str) -> None:
        subprocess.run([scripts / name, "--help"], capture_output=True, check=True)

    turns = 2 if arguments.quick else arguments.repeats
    ours, peer = interleave(
        lambda: run("nurture"), lambda: run("trl"), repeats=turns, clock=seconds_of_children
    )
    name = "startup/--help, starts a processor second/trl --help"
    report([Result(name, 1 / ours, 1 / peer, peer / ours)], "starts/s", arguments.json)


def seconds_of_children() -> float:
    """Return the processor seconds of the processes that this one has started."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()
