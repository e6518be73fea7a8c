"""Stopping and resuming: only the process that holds the run's lock is signalled, and a resumed one stands alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from nurture.errors import NurtureError
from nurture.studio import steer, watch
from nurture.studio.library import Library
from nurture.studio.server import build_app

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux who holds a lock")

_HOLD = """
import fcntl, pathlib, signal, sys, time
# Not as inherited: whoever starts the tests in the background of a script has it ignored.
signal.signal(signal.SIGINT, signal.SIG_IGN if "deaf" in sys.argv else signal.default_int_handler)
file = open(pathlib.Path(sys.argv[-1]) / ".lock", "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def hold(run: Path, *how: str) -> subprocess.Popen[str]:
    """Start a process that holds the run's lock, as `nurture run` does."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, *how, str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def until(met: Callable[[], bool]) -> bool:
    return any(met() or time.sleep(0.02) for _ in range(500))


def test_stop_reaches_the_process_that_holds_the_lock_and_no_other(tmp_path: Path):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / ".lock").write_text(f"process {bystander.pid}")  # left by a run that is long gone
    try:
        assert steer.holder(tmp_path) is None
        with pytest.raises(NurtureError, match="not running"):
            steer.stop(tmp_path)
        run = hold(tmp_path)
        assert steer.holder(tmp_path) == run.pid
        assert watch.is_running(tmp_path)
        steer.stop(tmp_path)
        assert run.wait(20) != 0
        assert until(lambda: not watch.is_running(tmp_path))
        assert bystander.poll() is None
    finally:
        bystander.kill()


def test_a_process_that_does_not_heed_it_is_stopped_at_once(tmp_path: Path):
    run = hold(tmp_path, "deaf")
    steer.stop(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(0.3)
    steer.stop(tmp_path, at_once=True)
    assert run.wait(20) != 0


def test_resume_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's requests; what the process says when it fails; no second one beside a first."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "run.json").write_text('{"recipe": "x", "folder": ".", "data": {}}')
    with TestClient(build_app(Library([folder])), base_url="http://localhost") as client:
        address = "/studio/runs/small"
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert client.post(f"{address}/resume", content=b"", headers=form).status_code == 415
        foreign = {"Origin": "https://evil.example"}
        assert client.post(f"{address}/resume", json={}, headers=foreign).status_code == 403
        assert client.post("/studio/runs/../resume", json={}).status_code in (404, 405)
        assert client.post(f"{address}/stop", json={}).status_code == 400
        monkeypatch.setattr(steer, "_GO_ON", (sys.executable, "-c", _HOLD))
        assert client.post(f"{address}/resume", json={}).status_code == 200
        again = client.post(f"{address}/resume", json={})
        assert (again.status_code, "running already" in again.text) == (400, True)
        assert until(lambda: steer.holder(folder) is not None)
        assert client.get(address).json()["can_stop"]
        assert client.post(f"{address}/stop", json={}).status_code == 200
        assert until(lambda: not watch.is_running(folder))
        monkeypatch.setattr(steer, "_GO_ON", (sys.executable, "-c", "raise SystemExit('no such data')"))
        assert client.post(f"{address}/resume", json={}).status_code == 200
        assert until(lambda: not steer.is_starting(folder))
        assert client.get(address).json()["problem"] == "no such data"
