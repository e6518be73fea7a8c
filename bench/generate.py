"""Batched generation: nurture's engine against transformers.generate, same shape, batch and lengths.

64 prompt tokens and 64 new ones a sequence, sampled at temperature 1 over the whole vocabulary, no stop token. The
peers: transformers as it ships (dynamic cache) in float32 and bfloat16, and with a static cache. `ours` is the engine
in bfloat16, `ours-fp32` in float32; tokens/s counts new tokens.

    python bench/generate.py [--quick] [--json] [--shapes 3M,10M] [--batches 1,64] [--peers fp32,bf16] [--cpu-time]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from common import SHAPES, Result, gemm_peak, interleave, peer_config, prepare, report

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


def compare(
    shape: str,
    batch: int,
    peers: list[str],
    repeats: int,
    peaks: dict[torch.dtype, float],
    clock: Callable[[], float],
) -> Iterator[Result]:
    """Yield ours against each peer for one shape and batch."""
    config = SHAPES[shape]
    prompts = torch.randint(0, config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    ours = {dtype: our_run(config, dtype, prompts) for dtype in (torch.bfloat16, torch.float32)}
    theirs = {name: peer_run(config, *PEERS[name], prompts) for name in peers}
    seconds = interleave(*ours.values(), *theirs.values(), repeats=repeats, clock=clock)
    tokens = batch * NEW
    for (dtype, ours_seconds), label in zip(
        zip(ours, seconds, strict=False), ("ours", "ours-fp32"), strict=True
    ):
        for name, peer_seconds in zip(peers, seconds[len(ours) :], strict=True):
            share = flops(config, batch) / ours_seconds / peaks[dtype]
            yield Result(
                f"generate/{shape}/batch{batch}/{label}-vs-{name}",
                tokens / ours_seconds,
                tokens / peer_seconds,
                peer_seconds / ours_seconds,
                share,
            )


def main() -> None:
    """Run the comparisons asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3M at batch 16 against fp32 and bf16")
    parser.add_argument("--json", action="store_true", help="print one JSON line a comparison")
    parser.add_argument("--shapes", default="1M,3M,10M,30M")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--peers", default="fp32,bf16,bf16-static")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, processor seconds: for a busy machine"
    )
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.batches, args.peers, args.repeats = "3M", "16", "fp32,bf16", 2
    clock = time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    prepare()
    peaks = {dtype: gemm_peak(dtype, clock=clock) for dtype in (torch.bfloat16, torch.float32)}
    for shape in args.shapes.split(","):
        for batch in map(int, args.batches.split(",")):
            found = compare(shape, batch, args.peers.split(","), args.repeats, peaks, clock)
            report(list(found), "new tokens/s", args.json)


if __name__ == "__main__":
    main()
