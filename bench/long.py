"""Training on long rows against transformers: tokens a second and peak memory at 1, 4 and 16 times the context.

    python bench/long.py                        a table
    python bench/long.py --shapes 3M --json     one JSON line a comparison

One document a row, the worst case for attention; 1x is 256 tokens. The peer is transformers' Llama with its fused
attention, in fp32 as shipped and at its best (bf16 autocast, fused AdamW); ours is eager too (bf16 if the machine has
it), since long rows are not compiled. `--packed` fills each row with documents of 256 tokens: ours attends inside them,
the peer over the whole row, as it ships. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from common import BEST, SHAPES, Result, interleave, peak_memory, peer_config, prepare, report, run_alone

from nurture.losses.language import LanguageLoss
from nurture.model.config import ModelConfig
from nurture.model.parallel import prepare as prepare_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.trainer import train_step
from nurture.types import Batch

ROW, TIMES, TOKENS = 256, (1, 4, 16), 4096
"""Tokens of a row at 1x; how many times longer; tokens of a step, at least one row."""


def make_batch(config: ModelConfig, length: int, packed: bool) -> Batch:
    """Return a step's rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, TOKENS // length)
    tokens = torch.randint(8, config.vocab_size, (rows, length + 1), generator=generator)
    columns = torch.arange(length).repeat(rows, 1)
    documents, positions = (columns // ROW, columns % ROW) if packed else (columns * 0, columns)
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        positions,
        documents,
        torch.zeros_like(columns),
    )


def our_step(config: ModelConfig, batch: Batch) -> Callable[[], None]:
    """Return a function that does one update."""
    execution = decide_execution(ExecutionConfig(compile="off"))
    torch.manual_seed(0)
    model = prepare_model(Transformer(config), execution)
    optimizer = build_optimizer(model, OptimizerConfig())
    loss_fn = LanguageLoss(torch.ones(config.vocab_size, dtype=torch.int64))

    def step() -> None:
        train_step(model, optimizer, [batch], loss_fn, clip_norm=1.0, execution=execution)

    return step


def peer_step(config: ModelConfig, batch: Batch, best: bool) -> Callable[[], None]:
    """Return a function that does one update of transformers' Llama; it gets the labels that it shifts itself."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(peer_config(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=best)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=best and BEST == "bf16"):
            loss = model(input_ids=batch.token_ids, labels=batch.token_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_of(side: str, config: ModelConfig, batch: Batch) -> Callable[[], None]:
    """Return the update of one side: ours, shipped or best."""
    return our_step(config, batch) if side == "ours" else peer_step(config, batch, side == "best")


def compare(name: str, times: int, packed: bool, repeats: int, memory: bool) -> list[Result]:
    """Measure one shape at one length."""
    length = times * ROW
    config = SHAPES[name].model_copy(update={"max_position": length})
    batch = make_batch(config, length, packed)
    sides = ("ours", "shipped", "best")
    # Processor seconds are right on a busy machine too, but only where there is one thread.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = interleave(*(step_of(side, config, batch) for side in sides), repeats=repeats, clock=clock)
    ours, *peers = (batch.token_count / one for one in seconds)
    kind = "packed" if packed else "long"
    results = [
        Result(f"{kind}/{name}/{times}x/transformers-{side}", ours, peer, ours / peer)
        for side, peer in zip(sides[1:], peers, strict=True)
    ]
    if memory:
        words = ["--shapes", name, "--times", str(times), *(["--packed"] if packed else [])]
        mine, *theirs = (peak_memory(__file__, "--alone", side, *words) for side in sides)
        print(
            f"{results[0].name}: peak MB {[round(b / 2**20) for b in (mine, *theirs)]}",
            file=sys.stderr,
            flush=True,
        )
        results = [
            replace(result, memory_ratio=mine / their) for result, their in zip(results, theirs, strict=True)
        ]
    return results


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["3M"], choices=list(SHAPES))
    parser.add_argument("--times", nargs="*", type=int, default=list(TIMES))
    parser.add_argument("--packed", action="store_true", help="rows of many documents")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--alone", choices=["ours", "shipped", "best"], help="a few steps of one side, for its memory"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--quick", action="store_true", help="one turn, no memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prepare()
    if options.alone:
        length = options.times[0] * ROW
        config = SHAPES[options.shapes[0]].model_copy(update={"max_position": length})
        run_alone(step_of(options.alone, config, make_batch(config, length, options.packed)))
        return
    results = [
        result
        for name in options.shapes
        for times in options.times
        for result in compare(
            name,
            times,
            options.packed,
            1 if options.quick else options.repeats,
            options.memory and not options.quick,
        )
    ]
    report(results, "tokens/s", options.json)


if __name__ == "__main__":
    main()
