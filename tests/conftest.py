"""What all tests share: calm surroundings, the real data where it is present, and stages that train nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Set before torch is imported: test processes share the cores with each other, and colours would change messages.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "200"
os.environ.pop("NURTURE_DEBUG", None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (NURTURE_SHARED_DATA, or ../shared/data beside the repository)."""
    folder = Path(os.environ.get("NURTURE_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "README.md").is_file():
        pytest.skip(f"real data is not here: no {folder}/README.md (set NURTURE_SHARED_DATA)")
    return folder


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stage kinds that write files instead of training: `grow` and `polish` (tests/fake_stage.py)."""
    from nurture import cli, stages

    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    for kind in ("grow", "polish"):
        monkeypatch.setitem(stages.STAGES, kind, stages.StageKind("fake_stage", "A fake stage."))
        cli.add_stage_command(kind)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that looks like a checkpoint from outside."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder
