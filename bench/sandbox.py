"""Programs a second: the sandbox's warm pool against a fresh interpreter for every program, which confines nothing.

Both run the same small function with four tests on all cores. `compared` tests are literal calls, `judged` ones need a
judge's process; the peer runs program and tests together with `python -I -S`, the cheapest interpreter there is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nurture.rewards.sandbox import Job, Sandbox

PROGRAM = "def f(x):\n    return x + 1"
COMPARED = tuple(f"assert f({i}) == {i + 1}" for i in range(4))
JUDGED = tuple(f"assert f({i}) in [{i + 1}]" for i in range(4))


def fresh_interpreter(tests: tuple[str, ...]) -> bool:
    """Run program and tests in a new interpreter."""
    source = "\n".join([PROGRAM, *tests])
    return subprocess.run([sys.executable, "-I", "-S", "-c", source], capture_output=True).returncode == 0


def rate(run: Callable[[int], list[bool]], count: int) -> float:
    """Return runs a second."""
    start = time.perf_counter()
    assert all(run(count))
    return count / (time.perf_counter() - start)


def main() -> None:
    """Measure in turns, the best of each counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with Sandbox(cores) as sandbox, ThreadPoolExecutor(cores) as pool:
        for name, tests in (("compared", COMPARED), ("judged", JUDGED)):

            def ours(count: int, tests: tuple[str, ...] = tests) -> list[bool]:
                return [result.passed for result in sandbox.run_many([Job(PROGRAM, tests, "f")] * count)]

            def theirs(count: int, tests: tuple[str, ...] = tests) -> list[bool]:
                return list(pool.map(fresh_interpreter, [tests] * count))

            ours(20)
            pairs = [
                (rate(ours, arguments.runs), rate(theirs, arguments.runs // 4))
                for _ in range(arguments.repeats)
            ]
            best = [max(values) for values in zip(*pairs, strict=True)]
            line: dict[str, Any] = {"name": f"sandbox/{name}, programs a second/fresh interpreter"}
            line |= {"ours": round(best[0], 1), "peer": round(best[1], 1)}
            line |= {"ratio": round(best[0] / best[1], 2), "peak_share": None}
            if arguments.json:
                print(json.dumps(line), flush=True)
            else:
                print(f"{line['name']:56} {best[0]:7.0f}/s  peer {best[1]:6.0f}/s", flush=True)
        if not arguments.json:
            print(f"{cores} cores, {sandbox.walls}")


if __name__ == "__main__":
    main()
