"""A run that is killed goes on where it was, from the command line, and two runs do not share a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
PROGRAM = """
import signal, sys
# A shell starts background jobs, CI runs among them, with SIGINT ignored; Python then has no KeyboardInterrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
from nurture import stages, cli
for kind in ("grow", "polish"):
    stages.STAGES[kind] = stages.StageKind("fake_stage", "A fake stage.")
sys.argv = ["nurture", *sys.argv[1:]]
cli.main()
"""


def nurture(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    stages = "stages:\n  - {kind: grow, start: base, steps: 6}\n  - {kind: polish}\n"
    (tmp_path / "trial.yaml").write_text(f"name: trial\n{stages}")
    return tmp_path


def test_a_killed_run_resumes_and_a_finished_one_runs_nothing(folder: Path):
    for step in ("2", "4"):
        killed = nurture("run", "trial.yaml", cwd=folder, FAKE_STOP=f"grow:{step}", FAKE_STOP_HOW="kill")
        assert killed.returncode == -signal.SIGKILL
        assert not (folder / "runs/trial/01-grow/manifest.json").exists()
    done = nurture("run", "trial.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = (folder / "runs/trial/01-grow/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(6))
    again = nurture("run", "trial.yaml", cwd=folder)
    assert again.returncode == 0
    assert "Nothing to run: all 2 stages" in again.stdout


def test_stopping_says_how_to_go_on(folder: Path):
    stopped = nurture("run", "trial.yaml", cwd=folder, FAKE_STOP="polish:1")
    assert stopped.returncode == 130
    assert "run the same command again to resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_two_runs_do_not_share_a_folder_and_a_dead_one_leaves_no_lock(folder: Path):
    run_folder = folder / "runs" / "trial"
    run_folder.mkdir(parents=True)
    holding = (
        "import sys, time, pathlib; from nurture.pipeline import _lock\n"
        f"with _lock(pathlib.Path({str(run_folder)!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = nurture("run", "trial.yaml", cwd=folder)
        holder.send_signal(signal.SIGKILL)
    assert refused.returncode == 1
    assert f"process {holder.pid} is running here already" in refused.stderr
    assert "--out" in refused.stderr
    taken_over = nurture("run", "trial.yaml", cwd=folder)
    assert taken_over.returncode == 0, taken_over.stderr


def test_ctrl_c_while_a_stage_runs(folder: Path):
    """A real SIGINT, not a raised exception: the process ends with 130 and the stage can go on."""
    slow = PROGRAM.replace(
        "cli.main()",
        "import fake_stage, time; fake_stage._maybe_die = lambda *a: time.sleep(0.2)\ncli.main()",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-c", slow, "run", "trial.yaml", "grow.steps=1000"]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        log = folder / "runs/trial/01-grow/metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in errors
    assert (folder / "runs/trial/01-grow/state/step").exists()
