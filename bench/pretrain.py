"""Pretraining step against transformers: the same shapes, batch, packed data, optimizer and number of steps.

    python bench/pretrain.py                      a table
    python bench/pretrain.py --shapes 3M --json   one JSON line a comparison
    python bench/pretrain.py --curve 3M           loss per token, bf16 compiled against fp32 eager

Both sides run in this process, in turns, with the same allocator setting and AdamW. Ours is what a long stage uses:
bf16 autocast and compiled blocks, document masks on. The peer is shown as shipped (fp32, eager, AdamW not fused) and at
its best (bf16 autocast, fused AdamW). `peak_share` is the model's floating-point operations over the best bf16 matrix
product measured in the same process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import (
    BEST,
    PRECISIONS,
    SHAPES,
    Result,
    gemm_peak,
    interleave,
    peak_memory,
    peer_config,
    prepare,
    report,
    run_alone,
    token_flops,
)

from nurture.losses.language import LanguageLoss
from nurture.model.config import ModelConfig
from nurture.model.parallel import prepare as prepare_model
from nurture.model.transformer import Transformer
from nurture.optim import Optimizer, OptimizerConfig, build_optimizer
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.trainer import split_to_fit, train_step
from nurture.types import Batch

ROWS, TOKENS = 32, 256


def packed_batch(vocab_size: int, seed: int = 0) -> Batch:
    """Return a random batch whose rows hold two documents each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (ROWS, TOKENS + 1), generator=generator)
    columns = torch.arange(TOKENS)
    cut = 100
    documents = (columns >= cut).long().expand(ROWS, TOKENS).contiguous()
    positions = torch.where(columns >= cut, columns - cut, columns).expand(ROWS, TOKENS).contiguous()
    labels = tokens[:, 1:].contiguous()
    return Batch(tokens[:, :-1].contiguous(), labels, positions, documents, torch.zeros_like(labels))


def our_step(
    config: ModelConfig, execution: ExecutionConfig, optimizer_config: OptimizerConfig | None = None
) -> tuple[Callable[[Batch], float], Transformer]:
    """Return a function that does one update and returns its loss in nats a token."""
    decided = decide_execution(execution)
    torch.manual_seed(0)
    model = prepare_model(Transformer(config), decided)
    optimizer: Optimizer = build_optimizer(model, optimizer_config or OptimizerConfig())
    loss_fn = LanguageLoss(torch.ones(config.vocab_size, dtype=torch.int64))

    def step(batch: Batch) -> float:
        parts = split_to_fit(batch, execution.microbatch_tokens)
        done = train_step(model, optimizer, parts, loss_fn, clip_norm=1.0, execution=decided)
        return done.metrics["loss"][0] / done.metrics["loss"][1]

    return step, model


def peer_step(config: ModelConfig, *, at_its_best: bool) -> Callable[[Batch], float]:
    """Return the same for transformers' Llama."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(peer_config(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=at_its_best)

    def step(batch: Batch) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=at_its_best and BEST == "bf16"):
            loss = model(input_ids=batch.token_ids, labels=batch.token_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def step_flops(config: ModelConfig) -> float:
    """Return the operations of one step."""
    return ROWS * TOKENS * token_flops(config, TOKENS)


def alone(side: str, name: str) -> None:
    """Do a few steps of one side."""
    config = SHAPES[name]
    batch = packed_batch(config.vocab_size)
    if side == "ours":
        step = our_step(config, ExecutionConfig(compile="on", precision="auto"))[0]
    else:
        step = peer_step(config, at_its_best=side == "best")
    run_alone(lambda: step(batch))


def compare(name: str, repeats: int, memory: bool) -> list[Result]:
    """Measure one shape."""
    config = SHAPES[name]
    batch = packed_batch(config.vocab_size)
    ours, _ = our_step(config, ExecutionConfig(compile="on", precision="auto"))
    shipped, best = peer_step(config, at_its_best=False), peer_step(config, at_its_best=True)
    peak = gemm_peak(PRECISIONS[BEST])
    times = interleave(
        lambda: ours(batch), lambda: shipped(batch), lambda: best(batch), repeats=repeats, warm=2
    )
    speeds = [ROWS * TOKENS / seconds for seconds in times]
    share = step_flops(config) / times[0] / max(peak, gemm_peak(PRECISIONS[BEST]))
    sides = ("ours", "shipped", "best") if memory else ()
    peaks = [peak_memory(__file__, "--alone", side, "--shapes", name) for side in sides]
    results = []
    for index, label in enumerate(
        ("transformers as shipped (fp32)", f"transformers at its best ({BEST})"), 1
    ):
        memory_ratio = peaks[0] / peaks[index] if memory else None
        ratio = speeds[0] / speeds[index]
        results.append(
            Result(f"pretrain/{name}/{label}", speeds[0], speeds[index], ratio, share, memory_ratio)
        )
    return results


def curve(name: str, steps: int = 60) -> None:
    """Print the loss per token of bf16 compiled and fp32 eager on the same learnable stream."""
    config = SHAPES[name]
    fast, _ = our_step(config, ExecutionConfig(compile="on", precision="bf16"))
    exact, _ = our_step(config, ExecutionConfig(compile="off", precision="fp32"))
    print(f"{'step':>5} {'bf16 compiled':>14} {'fp32 eager':>11}")
    for step in range(steps):
        batch = packed_batch(64, seed=step)  # few of the vocabulary's tokens: something to learn
        losses = fast(batch), exact(batch)
        if step % 5 == 0 or step == steps - 1:
            print(f"{step:5} {losses[0]:14.4f} {losses[1]:11.4f}", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="3M,10M,30M", help="comma separated: " + ", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--curve", metavar="SHAPE")
    parser.add_argument("--quick", action="store_true", help="3M, two turns")
    parser.add_argument("--memory", action="store_true", help="measure each side's peak memory too")
    parser.add_argument("--alone", choices=("ours", "shipped", "best"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments.alone, arguments.shapes)
        return
    if arguments.quick:
        arguments.shapes, arguments.repeats = "3M", 2
    prepare()
    if arguments.curve:
        curve(arguments.curve)
        return
    for name in arguments.shapes.split(","):
        report(compare(name, arguments.repeats, arguments.memory), "tokens/s", arguments.json)


if __name__ == "__main__":
    main()
