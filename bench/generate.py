"""Batched generation: nurture's engine against transformers.generate, same shape, batch and lengths.

64 prompt tokens and 64 new ones a sequence, sampled at temperature 1 over the whole vocabulary, no stop token. The
peers: transformers as it ships (dynamic cache) in float32 and bfloat16, and with a static cache. `ours` is the engine
in bfloat16 (float32 on a processor that is slow in it), `ours-fp32` in float32; tokens/s counts new tokens.

    python bench/generate.py [--quick] [--json] [--shapes 3M,10M] [--batches 1,64] [--peers fp32,bf16] [--cpu-time]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

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
)

from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer

PROMPT, NEW = 64, 64
PEERS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp32-static": (torch.float32, "static"),
    "bf16-static": (torch.bfloat16, "static"),
}


def flops(config: ModelConfig, batch: int) -> float:
    """Return the multiplications and additions of one run; the head is used on new tokens only."""
    embeddings = config.vocab_size * config.width
    blocks = config.parameter_count() - embeddings * (1 if config.tied_embeddings else 2)
    return batch * (2.0 * blocks * (PROMPT + NEW) + 2.0 * embeddings * NEW)


def peer_run(
    config: ModelConfig, dtype: torch.dtype, cache: str | None, prompts: torch.Tensor
) -> Callable[[], object]:
    """Return a function that generates with transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(peer_config(config)).eval().to(dtype)
    options = {"cache_implementation": cache} if cache else {}
    mask = torch.ones_like(prompts)
    return lambda: model.generate(
        prompts,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
        disable_compile=True,
        **options,
    )


def our_run(config: ModelConfig, dtype: torch.dtype, prompts: torch.Tensor) -> Callable[[], object]:
    """Return a function that generates with the engine, taking the weights afresh as after an optimizer step."""
    engine = Engine(Transformer(config), max_batch=len(prompts), dtype=dtype)
    params, rows = SamplingParams(max_tokens=NEW), prompts.tolist()

    def run() -> None:
        engine.refresh()
        engine.generate(rows, params)

    return run


def make_prompts(config: ModelConfig, batch: int) -> torch.Tensor:
    """Return random prompts, (batch, PROMPT)."""
    return torch.randint(0, config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))


def alone(side: str, shape: str, batch: int) -> None:
    """Generate a few times with one side: `ours` or a peer."""
    config = SHAPES[shape]
    prompts = make_prompts(config, batch)
    run_alone(
        our_run(config, PRECISIONS[BEST], prompts)
        if side == "ours"
        else peer_run(config, *PEERS[side], prompts)
    )


def compare(
    shape: str,
    batch: int,
    peers: list[str],
    repeats: int,
    peaks: dict[torch.dtype, float],
    clock: Callable[[], float],
    memory: bool,
) -> Iterator[Result]:
    """Yield ours against each peer for one shape and batch."""
    config = SHAPES[shape]
    prompts = make_prompts(config, batch)
    ours = {dtype: our_run(config, dtype, prompts) for dtype in PRECISIONS.values()}
    theirs = {name: peer_run(config, *PEERS[name], prompts) for name in peers}
    seconds = interleave(*ours.values(), *theirs.values(), repeats=repeats, clock=clock)
    tokens = batch * NEW
    memories = {
        side: peak_memory(__file__, "--alone", side, "--shapes", shape, "--batches", str(batch))
        for side in (["ours", *peers] if memory else [])
    }
    for (precision, dtype), ours_seconds in zip(PRECISIONS.items(), seconds, strict=False):
        label = "ours" if precision == BEST else f"ours-{precision}"
        for name, peer_seconds in zip(peers, seconds[len(ours) :], strict=True):
            share = flops(config, batch) / ours_seconds / peaks[dtype]
            yield Result(
                f"generate/{shape}/batch {batch}/{label} vs transformers {name}",
                tokens / ours_seconds,
                tokens / peer_seconds,
                peer_seconds / ours_seconds,
                share,
                memories["ours"] / memories[name] if memory and label == "ours" else None,
            )


def main() -> None:
    """Run the comparisons asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="3M at batch 16 against fp32 and bf16 (where it is fast)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line a comparison")
    parser.add_argument("--shapes", default="1M,3M,10M,30M")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--peers", default=f"{','.join(PRECISIONS)},{BEST}-static")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, processor seconds: for a busy machine"
    )
    parser.add_argument("--memory", action="store_true", help="measure each side's peak memory too")
    parser.add_argument("--alone", choices=("ours", *PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        alone(args.alone, args.shapes, int(args.batches))
        return
    if args.quick:
        args.shapes, args.batches, args.peers, args.repeats = "3M", "16", ",".join(PRECISIONS), 2
    clock = time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    prepare()
    peaks = {dtype: gemm_peak(dtype, clock=clock) for dtype in PRECISIONS.values()}
    for shape in args.shapes.split(","):
        for batch in map(int, args.batches.split(",")):
            found = compare(shape, batch, args.peers.split(","), args.repeats, peaks, clock, args.memory)
            report(list(found), "new tokens/s", args.json)


if __name__ == "__main__":
    main()
