"""What every benchmark shares: named shapes, their transformers twins, round-robin timing, the GEMM peak, the output.

Ours and the peer run in turns in one process with the same threads and the same allocator setting, and the best time
of each counts: on a shared machine the two then see the same weather, and the minimum is what the code can do.
Results are printed as a table, or with `--json` one line each: {"name", "ours", "peer", "ratio", "peak_share"}; where
memory was measured, "memory_ratio" too. A name is STAGE/SHAPE/…/PEER. `bench/all.py` runs every script this way.

Peak memory is a process's, so each side has one of its own: `python bench/X.py --alone SIDE` does a few steps of one
side, as it ships, and prints its peak resident bytes, libraries included.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nurture.model.config import ModelConfig
from nurture.runtime import has_fast_bf16, tune_machine

SHAPES: dict[str, ModelConfig] = {
    "1M": ModelConfig(vocab_size=2048, width=128, layers=4, heads=4, kv_heads=2, ffn_width=352),
    "3M": ModelConfig(vocab_size=4096, width=256, layers=4, heads=4, kv_heads=2, ffn_width=512),
    "10M": ModelConfig(vocab_size=4096, width=384, layers=6, heads=6, kv_heads=2, ffn_width=896),
    "30M": ModelConfig(vocab_size=8192, width=512, layers=8, heads=8, kv_heads=4, ffn_width=1536),
}
"""Llama shapes by their rounded number of parameters; embeddings tied."""

Precision = Literal["fp32", "bf16"]

BEST: Precision = "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32"
"""What both sides compute in at their best: without instructions for it, bfloat16 is a hundred times slower."""
PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32}
if BEST == "bf16":
    PRECISIONS["bf16"] = torch.bfloat16
"""What is worth measuring on this machine."""


@dataclass
class Result:
    """One comparison. `ours` and `peer` in the unit the bench names (higher is better), `ratio` = ours / peer.

    `memory_ratio` is our peak resident memory over the peer's: below 1, ours needs less.
    """

    name: str
    ours: float
    peer: float
    ratio: float
    peak_share: float | None = None
    memory_ratio: float | None = None

    def line(self) -> str:
        """Return the JSON line of the result."""
        return json.dumps({key: _rounded(value) for key, value in asdict(self).items()})


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def prepare() -> None:
    """Use nurture's allocator setting for both sides, where the platform has it."""
    tune_machine()


def peer_config(config: ModelConfig) -> Any:
    """Return the transformers LlamaConfig of the same shape."""
    from transformers import LlamaConfig

    make: Any = LlamaConfig  # it takes more than its signature says
    return make(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        max_position_embeddings=config.max_position,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_epsilon,
        tie_word_embeddings=config.tied_embeddings,
    )


def token_flops(config: ModelConfig, attended: int, labelled: float = 1.0) -> float:
    """Return a token's operations in training: 6 a number of the matrices it meets, and attention below the diagonal.

    Args:
        config: the shape.
        attended: positions that the attention of a token is charged with.
        labelled: share of the tokens whose logits are computed.
    """
    vocabulary = config.vocab_size * config.width
    inside = config.parameter_count() - vocabulary * (1 if config.tied_embeddings else 2)
    return 6.0 * (
        inside + vocabulary * labelled + config.layers * attended * config.heads * config.head_width
    )


def interleave(
    *runs: Callable[[], object],
    repeats: int = 3,
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Run the functions in turns and return the best time of each, in seconds.

    Args:
        runs: what to time.
        repeats: timed turns.
        warm: untimed turns before them.
        clock: `time.process_time` counts processor seconds: with one thread, right on a busy machine too.
    """
    best = [float("inf")] * len(runs)
    for turn in range(warm + repeats):
        for index, run in enumerate(runs):
            gc.collect()
            start = clock()
            run()
            if turn >= warm:
                best[index] = min(best[index], clock() - start)
    return best


def gemm_peak(
    dtype: torch.dtype, size: int = 1024, repeats: int = 10, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the best rate of a square matrix product, in FLOP/s: the limit that `peak_share` is a share of."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    with torch.inference_mode():
        (seconds,) = interleave(lambda: a @ b, repeats=repeats, warm=2, clock=clock)
    return 2 * size**3 / seconds


def trainer_settings(folder: str | Path, rows: int, best: bool) -> dict[str, Any]:
    """Return the arguments that every peer's trainer gets: `rows` a step, at its best or as shipped."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "bf16": best and BEST == "bf16",
        "optim": "adamw_torch_fused" if best else "adamw_torch",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "max_steps": 1,
        "dataloader_num_workers": 0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


class StepTimes:
    """The times of the steps in a trainer of transformers or TRL, each from its beginning to its end, in seconds."""

    def __init__(self, trainer: Any) -> None:
        """Have the trainer call back."""
        from transformers import TrainerCallback

        times = self
        self.times: list[float] = []
        self._began = 0.0

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                times._began = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                times.times.append(time.perf_counter() - times._began)

        trainer.add_callback(Callback())

    def best(self, steps: int = 1) -> float:
        """Return the least mean time of so many steps in a row: of an epoch, where steps differ."""
        epochs = [self.times[first : first + steps] for first in range(0, len(self.times), steps)]
        return min(sum(epoch) / steps for epoch in epochs if len(epoch) == steps)


def run_alone(run: Callable[[], object], times: int = 3) -> None:
    """Run one side a few times and print the peak resident bytes of this process (`--alone`)."""
    for _ in range(times):
        run()
    # Not getrusage: its maximum is inherited from the process that started this one.
    high_water = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"peak_bytes": int(high_water[1]) * 1024 if high_water else 0}), flush=True)


def peak_memory(script: str, *arguments: str) -> float:
    """Return the peak resident bytes of `python script ARGUMENTS`, which ends in `run_alone`."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def report(results: list[Result], unit: str, as_json: bool) -> None:
    """Print results as JSON lines or as a table."""
    if as_json:
        for result in results:
            print(result.line(), flush=True)
        return
    width = max((len(result.name) for result in results), default=0)
    print(f"{'':{width}}  {'ours':>10}  {'peer':>10}  ratio  of peak  memory   ({unit})", flush=True)
    for result in results:
        share = "" if result.peak_share is None else f"{result.peak_share:.1%}"
        memory = "" if result.memory_ratio is None else f"{result.memory_ratio:.2f}"
        rates = f"{result.ours:10.0f}  {result.peer:10.0f}  {result.ratio:5.2f}"
        print(f"{result.name:{width}}  {rates}  {share:>7}  {memory:>6}", flush=True)


def random_pairs(
    vocab_size: int, varied: bool, *, count: int, prompt: int, longest: int
) -> list[tuple[list[int], ...]]:
    """Return pairs of answers (prompt included) of random tokens; the two share a prompt of `prompt` tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(8, vocab_size, (length,), generator=generator).tolist()

    pairs = []
    for _ in range(count):
        lengths = (
            torch.randint(prompt + 8, longest + 1, (2,), generator=generator).tolist()
            if varied
            else [longest] * 2
        )
        asked = tokens(prompt)
        pairs.append(tuple(asked + tokens(length - prompt) for length in lengths))
    return pairs


def run_trainer_alone(
    side: str, make_step: Callable[[], Callable[[], object]], trainer_in: Callable[[str, bool], Any]
) -> None:
    """Do a few steps of one side of a comparison with a trainer.

    Args:
        side: ours, shipped or best.
        make_step: prepares our side and returns its step.
        trainer_in: makes the peer's trainer in a folder, at its best or as shipped.
    """
    if side == "ours":
        run_alone(make_step())
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_in(folder, side == "best")
        trainer.args.max_steps = 3
        run_alone(trainer.train, 1)


def compare_with_trainer(
    script: str,
    shape: tuple[str, str, str],
    step: Callable[[], object],
    tokens: float,
    trainer_in: Callable[[str, bool], Any],
    trainer_tokens: float,
    *,
    rows: str,
    attended: int,
    labelled: float,
    repeats: int,
    memory: bool,
    epoch: int = 1,
) -> Iterator[list[Result]]:
    """Measure our step against the peer's trainer, as it ships and at its best; if asked, then the memory of each too.

    Args:
        script: the file that runs a side alone.
        shape: the stage, the model's shape, and the rows' lengths: even or varied.
        step: does one of our updates.
        tokens: of our update, on average.
        trainer_in: makes the peer's trainer in a folder, at its best or as shipped.
        trainer_tokens: of the trainer's update, on average.
        rows: the script's option for the lengths.
        attended: positions that the attention of a token is charged with.
        labelled: share of the tokens whose logits are computed.
        repeats: turns of both.
        memory: whether to measure it.
        epoch: steps of the peer that count together, where they differ.
    """
    stage, name, kind = shape
    with tempfile.TemporaryDirectory() as folder:
        trainers = [trainer_in(folder, best) for best in (False, True)]
        times = [StepTimes(trainer) for trainer in trainers]

        def peer(trainer: Any) -> Callable[[], None]:
            def run() -> None:
                trainer.args.max_steps = 4
                trainer.train()

            return run

        ours, *_ = interleave(step, *map(peer, trainers), repeats=repeats, warm=2)
        ours = min(ours, *interleave(step, repeats=10, warm=0))
    share = tokens * token_flops(SHAPES[name], attended, labelled) / ours / gemm_peak(PRECISIONS[BEST])

    def results(peaks: list[float]) -> list[Result]:
        found = []
        for index, label in enumerate(("TRL as shipped (fp32)", f"TRL at its best ({BEST})")):
            speeds = tokens / ours, trainer_tokens / times[index].best(epoch)
            ratio = peaks[0] / peaks[index + 1] if peaks else None
            found.append(
                Result(f"{stage}/{name}/{kind}/{label}", *speeds, speeds[0] / speeds[1], share, ratio)
            )
        return found

    yield results([])
    if memory:
        arguments = ("--shapes", name, f"--{rows}", kind)
        yield results(
            [peak_memory(script, "--alone", side, *arguments) for side in ("ours", "shipped", "best")]
        )


def trainer_main(
    doc: str | None,
    rows: str,
    compare: Callable[[str, bool, int, bool], Iterable[list[Result]]],
    alone: Callable[[str, str, bool], None],
) -> None:
    """Read the command line of a comparison with a trainer and run it.

    Args:
        doc: the script's own words.
        rows: what its rows are called, and the option that chooses their lengths.
        compare: measures a shape on rows of even or varied lengths, so many turns, with or without memory.
        alone: does a few steps of one side.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="3M", help="comma separated: " + ", ".join(SHAPES))
    parser.add_argument(f"--{rows}", dest="rows", default="even,varied", help="even, varied, or both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help=f"even {rows}, one turn")
    parser.add_argument("--memory", action="store_true", help="measure each side's peak memory too")
    parser.add_argument("--alone", choices=("ours", "shipped", "best"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments.alone, arguments.shapes, arguments.rows == "varied")
        return
    if arguments.quick:
        arguments.rows, arguments.repeats = "even", 1
    prepare()
    for name in arguments.shapes.split(","):
        for kind in arguments.rows.split(","):
            for results in compare(name, kind == "varied", arguments.repeats, arguments.memory):
                report(results, "tokens/s", arguments.json)
