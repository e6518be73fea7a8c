"""Every comparison with a peer, in one go: runs the scripts of this folder one after the other and writes RESULTS.md.

    python bench/all.py                         everything, with peak memory (an hour or so on two cores)
    python bench/all.py --quick                 one small shape each, no memory
    python bench/all.py --only sft --shapes 3M  these scripts, with options of theirs; other rows stay as they were
    python bench/all.py --trl F --nanochat G    with the peers that no package index has as they are needed here

A script is a process of its own, in which ours and the peer run in turns and the machine's matrix peak is measured, so
every row compares like with like. Rows are kept in `results.json` by name and written as one table to `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEED_A_MODEL = ("lm_eval_parity", "serve")
"""Scripts that are given a run or a checkpoint: by name only, `--only serve runs/tiny`."""
HERE = Path(__file__).resolve().parent
KEPT, TABLE = HERE / "results.json", HERE / "RESULTS.md"
HEADER = """# Results

Written by `python bench/all.py` from `results.json`; do not edit. Both sides ran in turns in one process with the same
threads and allocator setting; the best of the turns counts. `ours` and `peer`: tokens a second, unless the row says
otherwise. `of peak`: the model's operations over the best matrix product measured in the same process, in bf16 where
the processor has it; fp32 at a peer's best says it has not. `memory`: our peak resident memory over the peer's, each in
a process of its own, libraries included (below 1 is less).

| stage | setting | peer | ours | peer's | ratio | of peak | memory | measured |
|---|---|---|---|---|---|---|---|---|
"""


def scripts() -> list[str]:
    """Return the names of the benchmarks, those that compare with a peer."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("all", "common", "kills"))


def run_script(
    name: str, quick: bool, peers: dict[str, str | None], options: list[str]
) -> Iterator[dict[str, Any]]:
    """Run one benchmark and yield its rows as they come; a later row of the same name is the fuller one.

    A script whose peer must be brought, and was not, is left out.

    Raises:
        RuntimeError: it failed, or had nothing to say.
    """
    script = [sys.executable, str(HERE / f"{name}.py")]
    known = subprocess.run([*script, "--help"], capture_output=True, text=True, check=False).stdout
    wanted = ["--json", *(["--quick"] if quick else ["--memory"])]
    wants = [peer for peer in peers if f"[--{peer} " in known]
    if not all(peers[peer] for peer in wants):
        print(f"{name}: left out, it needs --{wants[0]} FOLDER", file=sys.stderr)
        return
    places = [f"--{peer}={peers[peer]}" for peer in wants]
    command = [*script, *(option for option in wanted if f"[{option}]" in known), *places, *options]
    when = f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores{', quick' if quick else ''}"
    rows = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith('{"name"'):
                rows += 1
                yield {**json.loads(line), "script": name, "measured": when}
    if process.returncode or not rows:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} after {rows} results")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the page with all rows."""
    return HEADER + "".join(map(_line, rows)) + f"\nMachine of the last run: {machine()}.\n"


def _line(row: dict[str, Any]) -> str:
    stage, *middle, peer = row["name"].split("/")
    share, memory = row.get("peak_share"), row.get("memory_ratio")
    cells = (
        stage,
        ", ".join(middle),
        peer,
        f"{row['ours']:,.4g}" if row["ours"] < 1000 else f"{row['ours']:,.0f}",
        f"{row['peer']:,.4g}" if row["peer"] < 1000 else f"{row['peer']:,.0f}",
        f"**{row['ratio']:.2f}**",
        "" if share is None else f"{share:.0%}",
        "" if memory is None else f"{memory:.2f}",
        row["measured"],
    )
    return f"| {' | '.join(cells)} |\n"


def machine() -> str:
    """Return the processor's name and the version of torch."""
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor()}, torch {version('torch')}"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="comma separated: " + ", ".join(scripts()))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trl", help="folder with TRL 1.10, for ppo (see its --help)")
    parser.add_argument("--nanochat", help="folder of a clone of nanochat, for pretrain_nanochat")
    arguments, options = parser.parse_known_args()
    chosen = arguments.only.split(",") if arguments.only else sorted(set(scripts()) - set(NEED_A_MODEL))
    peers = {"trl": arguments.trl, "nanochat": arguments.nanochat}
    unknown = set(chosen) - set(scripts())
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(scripts())}")
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else []
    failed = []
    for name in chosen:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            for row in run_script(name, arguments.quick, peers, options):
                kept = [old for old in kept if old["name"] != row["name"]] + [row]
                kept.sort(
                    key=lambda row: scripts().index(row["script"]) if row["script"] in scripts() else -1
                )
                KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
                TABLE.write_text(table(kept), encoding="utf-8")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
