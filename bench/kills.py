"""Random kills: runs that SIGKILL hits at random instants until they finish end with the undisturbed weights.

    python bench/kills.py --kills 100            all stages in turn, until there were so many kills
    python bench/kills.py --stages ppo --kills 5 --seed 3

A tiny recipe (a few seconds a stage, two blocks 32 wide, a state saved after every update) runs once undisturbed. Then
the same recipe runs under `nurture run --until STAGE` in another folder, where it is killed after a random part of the
time that the stage took undisturbed, start-up included, and started again, with one kill for each start but the last.
Every file of weights must be byte for byte the same. Prints one line of JSON: kills, runs, and what differed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
name: kills
seed: 0
model: {width: 32, layers: 2, heads: 2, kv_heads: 1, ffn_width: 64, max_position: 1024}
tokenizer: {vocab_size: 512, sample_bytes: 200000}
stages:
  - kind: pretrain
    sources: {web: world:web, tasks: world:tasks}
    steps: 10
    batch_size: 4
    sequence_length: 64
    heldout_tokens: 2K
  - {kind: sft, data: {tasks: world:tasks}, conversations: 40, steps: 10, batch_size: 4, sequence_length: 128}
  - kind: reward
    data: {tasks: world:tasks}
    comparisons: 30
    answer_tokens: 8
    best_of: 2
    best_of_prompts: 2
    steps: 8
    batch_size: 4
    sequence_length: 1024
  - kind: ppo
    start: sft
    reward_model: reward
    data: {tasks: world:tasks}
    steps: 4
    prompts_per_step: 4
    batch_size: 4
    max_tokens: 12
    sequence_length: 128
  - kind: preference
    start: sft
    data: {pairs: stage:reward/comparisons.jsonl}
    steps: 8
    batch_size: 4
    sequence_length: 256
  - kind: grpo
    start: sft
    data: {tasks: world:tasks:arithmetic}
    steps: 4
    prompts_per_step: 2
    group_size: 4
    batch_size: 8
    max_tokens: 12
    sequence_length: 128
"""
"""Settings that a stage does not have are left out by `shortened`."""

GRADIENT = {"loop": {"save_every": 1, "log_every": 1, "evaluate_every": 1000}}
EXECUTION = {"execution": {"compile": "off", "precision": "fp32"}}


def recipe(folder: Path) -> list[str]:
    """Write the recipe into `folder` with the settings every stage gets; return the names of its stages."""
    import yaml

    from nurture.stages import stage_module

    content = yaml.safe_load(RECIPE)
    for stage in content["stages"]:
        fields = stage_module(stage["kind"]).Config.model_fields
        for key, value in {**GRADIENT, **EXECUTION}.items():
            if key in fields:
                stage[key] = value
        for key in [key for key in stage if key not in fields]:
            del stage[key]
        for key, value in {"heldout_conversations": 4, "reply_tokens": 8, "heldout_comparisons": 10}.items():
            if key in fields:
                stage[key] = value
    (folder / "kills.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return [stage["kind"] for stage in content["stages"]]


def start(folder: Path, out: Path, until: str) -> subprocess.Popen[bytes]:
    """Start or go on with the run up to a stage."""
    command = [
        sys.executable,
        "-m",
        "nurture",
        "run",
        str(folder / "kills.yaml"),
        "--out",
        str(out),
        "--until",
        until,
    ]
    with open(folder / f"{out.name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def weights(out: Path, stage: str) -> str:
    """Return a digest of what the stage left."""
    (file,) = out.glob(f"*-{stage}/model/model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def kill_through(folder: Path, out: Path, stage: str, seconds: float, most: int, rng: random.Random) -> int:
    """Run up to `stage`, killed up to `most` times at random instants; return how often it was."""
    kills = 0
    while kills < most:
        process = start(folder, out, stage)
        try:
            process.wait(timeout=rng.uniform(0.1, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if process.returncode:
            raise SystemExit(f"{stage}: ended with {process.returncode}, see {folder / (out.name + '.log')}")
        return kills
    if start(folder, out, stage).wait():
        raise SystemExit(f"{stage}: does not go on, see {folder / (out.name + '.log')}")
    return kills


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stages", help="comma separated; by default all")
    parser.add_argument("--each", type=int, default=5, help="most kills of a stage before it may finish")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=400, help="start no further stage after so long")
    parser.add_argument(
        "--folder", type=Path, help="kept, with the undisturbed run; by default a temporary one"
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    stages, rng, began = recipe(folder), random.Random(arguments.seed), time.monotonic()
    chosen = arguments.stages.split(",") if arguments.stages else stages
    straight = folder / "straight"
    times = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
    for stage in stages[: max(map(stages.index, chosen)) + 1]:
        if stage in seconds:
            continue
        started = time.monotonic()
        if start(folder, straight, stage).wait():
            raise SystemExit(f"{stage}: the undisturbed run failed, see {folder / 'straight.log'}")
        seconds[stage] = time.monotonic() - started
        times.write_text(json.dumps(seconds))
    print({stage: round(value, 1) for stage, value in seconds.items()}, file=sys.stderr, flush=True)
    kills, runs, different = dict.fromkeys(chosen, 0), 0, []
    while sum(kills.values()) < arguments.kills and time.monotonic() - began < arguments.seconds:
        for stage in chosen:
            left = min(arguments.each, arguments.kills - sum(kills.values()))
            if not left or time.monotonic() - began > arguments.seconds:
                break
            out = folder / f"killed-{arguments.seed}-{runs}"
            shutil.copytree(
                straight, out, symlinks=True
            )  # the stages before are done: this one alone is killed
            for path in [p for p in out.glob("*-*") if p.name.split("-", 1)[1] == stage]:
                shutil.rmtree(path)
            kills[stage] += kill_through(folder, out, stage, max(seconds[stage], 3.0), left, rng)
            runs += 1
            if weights(out, stage) != weights(straight, stage):
                different.append(f"{stage} in {out}")
            else:
                shutil.rmtree(out)
            done = f"{sum(kills.values())} kills in {runs} runs, {len(different)} differ"
            print(f"{stage}: {done}", file=sys.stderr, flush=True)
    print(json.dumps({"kills": sum(kills.values()), "by_stage": kills, "runs": runs, "different": different}))
    if different:
        raise SystemExit(1)
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
