"""The machine under the run: device, precision, threads, allocator, process group, seeds, and the metrics log.

Everything here is decided once, at the start of a stage, and by facts of the machine rather than by timing, so that a
resumed run decides the same. float32 on a CPU is the reference; the rest is an `Execution` applied from outside.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import random
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import PositiveInt
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nurture.errors import NurtureError
from nurture.files import atomic_write_text, clear_disk_errors, make_directory, whole_json_lines
from nurture.recipe import Section

P = ParamSpec("P")
T = TypeVar("T")

COMPILE_PAYS_FROM = 2e13
"""Floating-point operations of a stage from which compiling the blocks is worth its start-up (about two minutes)."""
LONGEST_START = timedelta(minutes=30)
"""How long a process waits for the others to start; as long as torch waits for them later."""


class ExecutionConfig(Section):
    """How a stage uses the machine; changes speed and rounding, not the mathematics."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast where the processor multiplies bfloat16 natively, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the blocks; auto: when the stage is long enough and a C++ compiler is there."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    microbatch_tokens: PositiveInt = 8192
    """Tokens one forward pass holds at once, per process; larger batches are accumulated."""
    tensor_parallel: PositiveInt = 1
    """Processes that hold a part of every matrix each and work on the same rows together; for `torchrun`."""


def add_up(total: dict[str, tuple[float, float]], part: Mapping[str, tuple[float, float]]) -> None:
    """Add (sum, count) pairs to those of `total`."""
    for key, (amount, count) in part.items():
        before = total.get(key, (0.0, 0.0))
        total[key] = (before[0] + amount, before[1] + count)


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together.

    Attributes:
        rank: among the processes that have different rows of a batch.
        world_size: how many those are.
        tensor_parallel: how many processes share the same rows, each with a part of every matrix.
        mesh: (world_size, tensor_parallel) devices, named "rows" and "tensor"; None for a process alone.
        is_main: whether this process writes files and talks to the user.
    """

    rank: int = 0
    world_size: int = 1
    tensor_parallel: int = 1
    mesh: DeviceMesh | None = None
    is_main: bool = True

    @property
    def _rows(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh["rows"].get_group()

    def sum(self, values: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Return the (sum, count) pairs added up over all processes; keys may differ between them."""
        if self.world_size == 1:
            return dict(values)
        total: dict[str, tuple[float, float]] = {}
        for part in self.gather(dict(values)):
            add_up(total, part)
        return total

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process with other rows, by rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._rows)
        return gathered

    def sum_number(self, value: float) -> float:
        """Return `value` added up over all processes."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._rows)
        return float(tensor)

    def largest(self, value: float) -> float:
        """Return the largest `value` of all processes."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._rows)
        return float(tensor)

    def agree(self, value: Any) -> Any:
        """Return the main process's `value` in every process."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.mesh is not None:
            dist.barrier()


@dataclass(frozen=True)
class Execution:
    """Decisions about the machine that hold for a whole stage."""

    device: torch.device
    precision: Literal["fp32", "bf16"]
    compile: bool
    checkpoint_activations: bool
    processes: Processes

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that forward passes run in."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def decide_execution(config: ExecutionConfig, flops: float = 0.0) -> Execution:
    """Decide device, precision and compilation from the machine and the stage's size.

    Args:
        config: what the recipe asks for.
        flops: floating-point operations the stage will take in all, for `compile: auto`.
    """
    processes = join_processes(config.tensor_parallel)
    tune_machine()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    precision: Literal["fp32", "bf16"] = "fp32"
    if config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device)):
        precision = "bf16"
    wants = config.compile == "on" or (config.compile == "auto" and flops >= COMPILE_PAYS_FROM)
    return Execution(
        device, precision, wants and can_compile(device), config.checkpoint_activations, processes
    )


def join_processes(tensor_parallel: int = 1) -> Processes:
    """Join the process group if torchrun started this process, and return our place in it.

    Raises:
        NurtureError: the processes cannot be divided into groups of `tensor_parallel`.
    """
    everyone = int(os.environ.get("WORLD_SIZE", "1"))
    if everyone % tensor_parallel:
        raise NurtureError(
            f"execution.tensor_parallel is {tensor_parallel}, which does not divide the {everyone} processes; start "
            f"a multiple of {tensor_parallel} with `torchrun --nproc-per-node=N -m nurture ...`."
        )
    if everyone == 1:
        return Processes()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            rank = int(os.environ["RANK"])
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            agents = dist.TCPStore(address, port, is_master=False, timeout=LONGEST_START)
            store = dist.PrefixStore(name_attempt(agents, rank, everyone), agents)
            dist.init_process_group(backend, store=store, rank=rank, world_size=everyone)
        else:
            dist.init_process_group(backend)
        atexit.register(dist.destroy_process_group)
    mesh = _mesh(everyone // tensor_parallel, tensor_parallel)
    place = mesh["rows"].get_local_rank()
    return Processes(place, mesh["rows"].size(), tensor_parallel, mesh, dist.get_rank() == 0)


@contextmanager
def whole_process() -> Iterator[None]:
    """Run the body as all of a process, which ends with it if it joined others.

    Threads of the process group that have just finished a collective still want the interpreter's lock. In an
    interpreter that is ending they get none, and the process aborts ("terminate called without an active exception"):
    torchrun then counts finished work as failed. So a process whose work is done ends without the interpreter's own
    ending; one that failed ends as ever.
    """
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise
    if dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def name_attempt(store: dist.Store, rank: int, everyone: int) -> str:
    """Agree with the other processes on a name that no earlier attempt had, to keep its keys in `store` apart.

    torchrun's agent keeps one store over all restarts, while torch's own rendezvous counts on a new one each time and
    writes every attempt's addresses under the same keys: whoever comes first reads those of killed processes, and is
    refused. TORCHELASTIC_RESTART_COUNT does not tell attempts apart, because each node counts its own failures only.
    Here a rank leaves a fresh word, which only a rank 0 that lives now can answer, and rank 0 goes on until all are
    answered; words and answers of earlier attempts may lie about, but nobody waits for them.

    Args:
        store: shared by all attempts; its timeout is how long the others may take to start.
        rank: ours of `everyone`.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"nurture/word/{rank}", word)
        name = store.get(f"nurture/answer/{word}").decode()
        store.add(f"nurture/heard/{name}", 1)
        return name
    while store.add(f"nurture/heard/{word}", 0) < everyone - 1:
        for other in range(1, everyone):
            if store.check([f"nurture/word/{other}"]):
                store.set("nurture/answer/" + store.get(f"nurture/word/{other}").decode(), word)
        time.sleep(0.02)
    return word


@functools.cache
def _mesh(rows: int, tensor: int) -> DeviceMesh:
    """Return the processes as a grid; neighbours share rows, so that they talk within a node."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, (rows, tensor), mesh_dim_names=("rows", "tensor"))


@functools.cache
def tune_machine() -> None:
    """Set what makes CPU training fast; harmless to call twice."""
    # glibc hands large blocks back to the system after each use, and every step page-faults them in again.
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
            libc.mallopt(m_top_pad, 64 * 2**20)
        except OSError:  # another C library, as on Alpine
            pass
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "inductor"))


def release_memory() -> None:
    """Hand back what a finished stage used: `tune_machine` keeps it, and the next stage has other shapes."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library, as on Alpine
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def cache_directory() -> Path:
    """Return the folder for things that can be made again: `NURTURE_CACHE`, or nurture in the user's cache."""
    root = os.environ.get("NURTURE_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nurture"


def has_fast_bf16(device: torch.device) -> bool:
    """Say whether `device` multiplies bfloat16 natively, from its features (a timing could change its mind)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supports = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(supports)


def can_compile(device: torch.device) -> bool:
    """Say whether torch.compile has the compiler it needs."""
    if device.type == "cuda":
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def never_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Keep a function out of compiled blocks, as `torch.compiler.disable` does; import the compiler at its call.

    The import takes as long as torch's own, and most commands never get to a model.
    """
    return torch._disable_dynamo(function)


@functools.cache
def compile_once(function: Callable[P, T], dynamic: bool | None = None) -> Callable[P, T]:
    """Return `function` compiled, once for all who ask; `dynamic` as in `torch.compile`."""
    return torch.compile(function, dynamic=dynamic)


@contextmanager
def eager_blocks() -> Iterator[None]:
    """Run compiled blocks uncompiled, so that evaluation's other shapes do not compile anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, appended and flushed; mirrored to a tracker if one is asked for.

    Resuming rewinds the log to the step of the checkpoint, so that no step is logged twice.
    """

    def __init__(self, path: Path, tracker: str | None = None, resume_at: int = 0) -> None:
        """Open the log and drop the lines of steps after `resume_at`."""
        self.path = path
        kept = [line for line in whole_json_lines(path) if line["step"] <= resume_at] if resume_at else []
        make_directory(path.parent)
        # Replaced in one step: a run killed right here must not lose what was logged before.
        atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        with clear_disk_errors(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._tracker = open_tracker(tracker, path.parent) if tracker else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append `metrics` of `step` (the number of updates done)."""
        self._write_line({"step": step, **{key: round(value, 6) for key, value in metrics.items()}})
        if self._tracker is not None:
            self._tracker.write(step, metrics)

    def _write_line(self, line: Mapping[str, Any]) -> None:
        with clear_disk_errors(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file and the tracker."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


@dataclass(frozen=True)
class Tracker:
    """Where metrics are mirrored to: `write(step, metrics)`, then `close()`."""

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def open_tracker(name: str, directory: Path) -> Tracker:
    """Open tensorboard, trackio or wandb for the stage in `directory`.

    Raises:
        NurtureError: the name is unknown or the package is not installed.
    """
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(directory / "tensorboard"))

            def to_tensorboard(step: int, metrics: Mapping[str, float]) -> None:
                for key, value in metrics.items():
                    writer.add_scalar(key, value, step)

            return Tracker(to_tensorboard, writer.close)
        if name in ("wandb", "trackio"):
            module = import_module(name)
            module.init(project="nurture", name=f"{directory.parent.name}-{directory.name}")
            return Tracker(lambda step, metrics: module.log(dict(metrics), step=step), module.finish)
    except ImportError as error:
        raise NurtureError(f"tracker '{name}' needs its package: pip install {name}") from error
    raise NurtureError(f"unknown tracker '{name}': choose tensorboard, trackio or wandb")
