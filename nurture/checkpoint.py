"""Training state on disk: written whole or not at all, verified on load, the same files for any number of processes.

`state/step-00001200/` holds model, optimizer and averaged weights through `torch.distributed.checkpoint` (each process
writes and reads its own shards, and may be one of another number of processes when it reads), `progress.json` with
everything else a resume needs, and `manifest.json` with sizes and checksums, written last. The folder is made under
another name and renamed when it is complete, so a process killed at any instant leaves no half checkpoint behind.
Batches are a pure function of the step and nothing else in the loop draws random numbers, so the step is the whole
data state.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from nurture.errors import NurtureError
from nurture.files import (
    DISK_FULL,
    atomic_write_json,
    clear_disk_errors,
    make_directory,
    manifest_problems,
    read_json,
    read_manifest,
    write_manifest,
)
from nurture.optim import Optimizer
from nurture.runtime import Processes

log = logging.getLogger(__name__)


def save_state(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    averages: dict[str, Tensor],
    progress: dict[str, Any],
    processes: Processes,
    keep: int = 2,
) -> Path:
    """Write the state after `step` updates and remove all but the newest `keep`.

    Args:
        directory: the stage's `state/` folder.
        averages: exponentially averaged weights by name; empty if there are none.
        progress: plain JSON data.

    Raises:
        NurtureError: the disk is full or not writable. Earlier states are untouched.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".{final.name}.tmp"
    if processes.is_main:
        make_directory(directory)
        shutil.rmtree(temporary, ignore_errors=True)
    processes.wait()
    with _clear_checkpoint_errors(temporary):
        dcp.save(_state(model, optimizer, averages), checkpoint_id=temporary)
        if processes.is_main:
            facts = {"step": step, "tensor_parallel": processes.tensor_parallel}
            atomic_write_json(temporary / "progress.json", {**facts, **progress})
            write_manifest(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            for old in _states(directory)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
    processes.wait()
    return final


def load_state(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer,
    averages: dict[str, Tensor],
    processes: Processes,
) -> dict[str, Any] | None:
    """Load the newest whole state into model, optimizer and averages; return its progress, or None if there is none.

    A state whose files do not match its manifest is passed over, with a warning that names the file.

    Raises:
        NurtureError: the state was written with another `execution.tensor_parallel`.
    """
    chosen = processes.agree(_newest_whole(directory) if processes.is_main else None)
    if chosen is None:
        return None
    progress: dict[str, Any] = read_json(
        chosen / "progress.json", "Delete this folder to use the one before it."
    )
    parts = progress.pop("tensor_parallel", 1)
    if parts != processes.tensor_parallel:  # the rows of fused matrices lie otherwise
        raise NurtureError(
            f"{chosen} was written with execution.tensor_parallel={parts}, now it is {processes.tensor_parallel}. "
            f"Set it back to resume (the number of processes may be another), or delete {directory} to start anew."
        )
    state = _state(model, optimizer, averages)
    with _quiet():
        dcp.load(state, checkpoint_id=chosen)
    set_state_dict(
        model, optimizer.parts, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    for name, tensor in state.get("averages", {}).items():
        averages[name].copy_(tensor)
    return progress


def _state(model: nn.Module, optimizer: Optimizer, averages: dict[str, Tensor]) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer.parts)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    if averages:
        state["averages"] = averages
    return state


def _states(directory: Path) -> list[Path]:
    """Return the finished states, newest first."""
    return sorted(directory.glob("step-*"), reverse=True) if directory.is_dir() else []


def _newest_whole(directory: Path) -> Path | None:
    for leftover in directory.glob(".step-*.tmp") if directory.is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)
    for path in _states(directory):
        problems = _damage(path)
        if not problems:
            return path
        log.warning("%s is damaged and is passed over: %s", path, "; ".join(problems))
    return None


def _damage(path: Path) -> list[str]:
    """Return what is wrong with a state, nothing if it is whole."""
    try:
        manifest = read_manifest(path)
    except NurtureError as error:
        return [str(error)]
    return ["it has no manifest"] if manifest is None else manifest_problems(path, manifest, checksums=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the checkpoint library's remark that there is only one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _clear_checkpoint_errors(path: Path) -> Iterator[None]:
    """Report a full disk as such, also when the checkpoint library wraps the error; leave nothing half-written."""
    try:
        with _quiet(), clear_disk_errors(path):
            yield
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        failures = getattr(error, "failures", {}).values()
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in failures]
        if any(_is_full_disk(cause) for cause in causes):
            raise NurtureError(
                f"{path}: the disk is full; this checkpoint was not written, earlier ones are intact. Free some "
                f"space and run the same command again to resume."
            ) from error
        if causes:  # the library's exception is no Exception: nothing above would report it
            raise RuntimeError(f"{path}: {causes[0]}") from error
        raise


def _is_full_disk(cause: BaseException) -> bool:
    """Say whether a checkpoint failed for want of space; torch's zip writer only says that bytes are missing."""
    words = ("No space left", "PytorchStreamWriter failed", "inline_container.cc")
    return getattr(cause, "errno", None) in DISK_FULL or any(word in str(cause) for word in words)
