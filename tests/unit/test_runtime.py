"""The name of an attempt; the metrics log: rewound on resume, mirrored to trackers."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

from nurture.errors import NurtureError
from nurture.runtime import MetricsLog, name_attempt


def test_every_attempt_gets_a_name_of_its_own_from_a_store_that_keeps_the_words_of_the_dead():
    """Three attempts over one store; of the second only rank 2 lives long enough to leave its word."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))

    def attempt() -> set[str]:
        with ThreadPoolExecutor() as threads:
            return set(threads.map(lambda rank: name_attempt(store, rank, 3), (2, 1, 0)))

    first = attempt()
    store.set("nurture/word/2", "of the dead")
    third = attempt()
    assert len(first) == len(third) == 1
    assert first != third


def test_resuming_drops_the_lines_after_the_checkpoint_and_half_a_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    log = MetricsLog(path, resume_at=1)
    log.write(2, {"loss": 2.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5},
    ]


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the tracker extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", tracker="tensorboard")
    log.write(10, {"train/loss": 2.5})
    log.write(20, {"train/loss": 1.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.5), (20, 1.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_run_trackers_are_started_once_and_finished(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    calls: list[Any] = []
    module = ModuleType(name)
    module.init = lambda **settings: calls.append(("init", settings))  # type: ignore[attr-defined]
    module.log = lambda metrics, step: calls.append(("log", step, metrics))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append(("finish",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    stage = tmp_path / "run" / "01-pretrain"
    log = MetricsLog(stage / "metrics.jsonl", tracker=name)
    log.write(1, {"train/loss": 2.5})
    log.close()
    assert calls == [
        ("init", {"project": "nurture", "name": "run-01-pretrain"}),
        ("log", 1, {"train/loss": 2.5}),
        ("finish",),
    ]


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(NurtureError, match="pip install wandb"):
        MetricsLog(tmp_path / "metrics.jsonl", tracker="wandb")
