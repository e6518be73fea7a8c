"""What this machine can do, measured: the first thing to look at when a run is slow or an extra is missing.

Every finding says what it means for training here. The matrix probe takes under a second and decides the most: in
bfloat16 a recent processor is about four times faster than in float32, and one without the instructions a hundred
times slower.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_EXTRAS = {
    "data": ("datasets", "pyarrow", "zstandard"),
    "gguf": ("gguf",),
    "track": ("tensorboard",),
    "plot": ("matplotlib",),
    "serve": ("starlette", "uvicorn"),
    "openenv": ("starlette", "uvicorn", "websockets"),
    "lm-eval": ("lm_eval",),
    "web": ("datatrove",),
    "test": ("pytest", "transformers", "trl"),
}
_PROBE_SIZE = 1024


@dataclass(frozen=True)
class Finding:
    """One fact about the machine: its name, what was found, whether that is fine, and what to do about it."""

    name: str
    value: str
    good: bool = True
    advice: str = ""


def examine() -> list[Finding]:
    """Look at the machine. Takes about two seconds, most of it importing torch."""
    import torch

    findings = [
        Finding("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        _cores(torch.get_num_threads()),
        _memory(),
        _disk(Path.cwd()),
        Finding("torch", torch.__version__),
        _accelerator(),
        *_matrix_speed(),
        _compiler(),
        _sandbox(),
    ]
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        value = f"missing {', '.join(missing)}" if missing else "installed"
        findings.append(
            Finding(
                f"extra {extra}", value, not missing, f"pip install 'nurture[{extra}]'" if missing else ""
            )
        )
    return findings


def usable_cores() -> int:
    """Return the cores this process may use, which in a container can be fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _cores(threads: int) -> Finding:
    cores = usable_cores()
    advice = "more threads than cores slow everything down: set OMP_NUM_THREADS" if threads > cores else ""
    return Finding(
        "cores", f"{cores}, torch uses {threads} thread{'s' * (threads > 1)}", threads <= cores, advice
    )


def _memory() -> Finding:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return Finding("memory", "unknown")
    return Finding(
        "memory", f"{total:.1f} GiB, {free:.1f} GiB free", total >= 4, "" if total >= 4 else "4 GiB is little"
    )


def _disk(path: Path) -> Finding:
    free = shutil.disk_usage(path).free / 2**30
    return Finding(
        "disk here",
        f"{free:.1f} GiB free",
        free >= 2,
        "" if free >= 2 else "a run of the default recipe needs about 1 GiB",
    )


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("accelerator", torch.cuda.get_device_name())
    return Finding("accelerator", "none, the processor trains")


def _matrix_speed() -> list[Finding]:
    import torch

    single = _gflops(torch.float32)
    half = _gflops(torch.bfloat16)
    slow = half < single
    advice = "no instructions for it: precision auto trains in float32, about half as fast" if slow else ""
    return [
        Finding("float32 matrices", f"{single:.0f} GFLOP/s"),
        Finding("bfloat16 matrices", f"{half:.3g} GFLOP/s, {half / single:.2g}x float32", True, advice),
    ]


def _gflops(dtype: object) -> float:
    """Measure square matrix products on the processor in `dtype`."""
    import torch

    size = _PROBE_SIZE
    left = torch.randn(size, size).to(dtype)  # type: ignore[call-overload]
    right = torch.randn(size, size).to(dtype)  # type: ignore[call-overload]
    best, deadline = float("inf"), time.perf_counter() + 0.5
    while True:
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > deadline:
            return 2 * size**3 / best / 1e9


def _compiler() -> Finding:
    found = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    advice = (
        "" if found else "torch.compile needs a C++ compiler; without one training runs uncompiled and slower"
    )
    return Finding("C++ compiler", found or "none", found is not None, advice)


def _sandbox() -> Finding:
    """Try the walls around a program that a model wrote."""
    from nurture.errors import NurtureError
    from nurture.rewards.sandbox import walls_here

    try:
        walls = walls_here()
    except NurtureError as error:
        return Finding("sandbox", "none, programs are not run", False, str(error))
    strength = "strong" if walls.namespaces or walls.bubblewrap else "firm"
    advice = "" if strength == "strong" else "without namespaces programs have no scratch folder"
    return Finding("sandbox", f"{strength}: {walls}", True, advice)
