"""A run as it is on disk, while it runs and afterwards: its stages, their curves, their samples, the report.

Only reads; `steer` stops and resumes. Curves grow by asking for what lies past an offset of `metrics.jsonl`, so a page
that stays open costs a few lines a second. A stage is *running* when the process that holds the run's lock is alive and
this is its next stage.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from nurture import files, pipeline
from nurture.errors import NurtureError
from nurture.report.table import collect, finished_stages
from nurture.studio import steer
from nurture.studio.library import UnknownModel

_MOST_BYTES = 2 << 20
"""Bytes of metrics or samples in one answer."""


def stage_map(run: Path) -> dict[str, Any]:
    """Return every stage of a run with what it starts from, how it stands and what it has left."""
    folders = _folders(run)
    finished = {folder.name for folder in finished_stages(run)}
    rows: list[dict[str, Any]] = []
    problem = None
    try:
        for step in pipeline.plan(pipeline.recall(run), run):
            starts = [parent.directory.name for parent in step.parents]
            rows.append(
                {
                    "name": step.directory.name,
                    "kind": step.config.kind,
                    "status": step.status,
                    "reason": step.reason,
                    "from": starts,
                }
            )
    except NurtureError as error:  # no recipe, or its data has moved: what is there can still be shown
        problem, names = str(error), sorted(folders)
        rows = [
            {
                "name": name,
                "kind": _kind(folders[name]),
                "status": "fresh" if name in finished else "unfinished",
            }
            | {"reason": "", "from": names[:index][-1:]}
            for index, name in enumerate(names)
        ]
    alive, problem = is_running(run), steer.failure(run) or problem
    current = next((row["name"] for row in rows if row["status"] != "fresh"), None) if alive else None
    for row in rows:
        folder = folders.get(row["name"])
        row["running"] = row["name"] == current
        row["has_metrics"] = folder is not None and (folder / "metrics.jsonl").is_file()
        row["has_samples"] = folder is not None and (folder / "samples.jsonl").is_file()
        if row["name"] in finished and folder is not None:
            result = files.read_json(folder / "result.json", f"Delete {folder} and run again.")
            row |= {"seconds": result.get("seconds"), "tokens": result.get("tokens")}
    open_stages = any(row["status"] != "fresh" for row in rows)
    return {
        "run": run.resolve().name,
        "running": alive,
        "problem": problem,
        "can_stop": bool(steer.holder(run)),
        "can_resume": not alive and open_stages and (run / "run.json").is_file(),
        "stages": rows,
    }


def is_running(run: Path) -> bool:
    """Return whether a process works on the run."""
    if steer.is_starting(run) or steer.holder(run):
        return True
    if sys.platform == "linux":
        return False
    try:
        holder = re.search(r"\d+", (run / ".lock").read_text(encoding="utf-8"))
        if holder is None:
            return False
        os.kill(int(holder[0]), 0)
        return True
    except PermissionError:  # alive, and somebody else's
        return True
    except OSError:
        return False


def metrics(run: Path, stage: str, after: int) -> dict[str, Any]:
    """Return the whole lines of a stage's metrics past byte `after`, and where to go on.

    Raises:
        NurtureError: no such stage.
    """
    path = stage_folder(run, stage) / "metrics.jsonl"
    if not path.is_file():
        return {"rows": [], "next": 0}
    if path.stat().st_size < after:  # the stage began anew
        after = 0
    with open(path, "rb") as file:
        file.seek(after)
        content = file.read(_MOST_BYTES)
    whole = content[: content.rfind(b"\n") + 1]
    return {"rows": _json_lines(whole), "next": after + len(whole), "restarted": after == 0}


def samples(run: Path, stage: str) -> list[Any]:
    """Return the last samples a stage has left.

    Raises:
        NurtureError: no such stage.
    """
    path = stage_folder(run, stage) / "samples.jsonl"
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _MOST_BYTES))
        return _json_lines(file.read())[-200:]


def episodes(run: Path) -> list[dict[str, Any]]:
    """Return the games among all stages' samples: `stage`, `index` among its samples, task, reward, messages."""
    return [
        {"stage": name, "index": index}
        | {key: row.get(key) for key in ("task", "reward", "finished", "messages")}
        for name in _folders(run)
        for index, row in enumerate(samples(run, name))
        if isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]
    ]


def report(run: Path) -> dict[str, Any]:
    """Return the run's report, without stages where none has finished."""
    return collect(run) if finished_stages(run) else {"run": run.resolve().name, "seconds": 0, "stages": []}


def stage_folder(run: Path, stage: str) -> Path:
    """Return the folder of a stage by its name among those there are.

    Raises:
        UnknownModel: there is none of this name.
    """
    folders = _folders(run)
    if stage not in folders:
        raise UnknownModel(
            f"there is no stage '{stage[:100]}' here. There are: {', '.join(folders) or 'none yet'}."
        )
    return folders[stage]


def _folders(run: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(run.glob("[0-9][0-9]-*"))
        if path.is_dir() and path.suffix not in (".old", ".swap")
    }


def _kind(folder: Path) -> str:
    return folder.name.split("-", 1)[-1]


def _json_lines(content: bytes) -> list[Any]:
    """Return the lines that are JSON; the first of a cut file, or the last of a killed process, may not be."""
    rows = []
    for line in content.splitlines():
        try:
            rows.append(json.loads(line, parse_constant=lambda name: None))
        except ValueError:
            continue
    return rows
