"""Cost per token of the data path, from a million to a hundred million tokens, and far into a run: it must not grow.

    python bench/flat.py [--json] [--quick]

Random documents of 20 to 600 tokens are written as a shard of the given size and read back mapped, as training reads
it. Timed: the batches of 32 x 256 around the beginning, and around the end of the second epoch, by a reader that was
just made, as after a resume, its jump included. `ours` is the rate at the given place, `peer` the rate of the first
batches of the smallest shard, so `ratio` 1 is flat. Conversations: packing 1e6 to 1e7 tokens (their layout is kept in
memory), tokens a second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import Result, prepare, report

from nurture.data.mixture import MixtureBatches, MixturePhase
from nurture.data.packing import Conversation, ConversationBatches
from nurture.data.shards import Shard

ROWS, LENGTH, TIMED = 32, 256, 200


def make_shard(folder: Path, tokens: int) -> Shard:
    """Return a mapped shard of about so many tokens in documents of 20 to 600."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 601, size=tokens // 310)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    file = folder / f"{tokens}.bin"
    with open(file, "wb") as out:
        for first in range(0, int(starts[-1]), 1_000_000):
            size = min(1_000_000, int(starts[-1]) - first)
            out.write(rng.integers(1, 4096, size=size, dtype=np.uint16).tobytes())
    return Shard(str(tokens), np.memmap(file, dtype=np.uint16, mode="r"), starts, 0, str(tokens))


def batch_rate(shards: dict[str, Shard], step: int, steps: int) -> tuple[float, float]:
    """Return tokens a second from `step` on by a new reader, and the seconds its first batch took."""
    reader = MixtureBatches(
        shards,
        [MixturePhase(weights=dict.fromkeys(shards, 1 / len(shards)))],
        steps=steps,
        batch_size=ROWS,
        sequence_length=LENGTH,
        seed=1,
    )
    began = time.perf_counter()
    reader(step)
    jump = time.perf_counter() - began
    times = []
    for offset in range(1, TIMED + 1):
        began = time.perf_counter()
        reader(step + offset)
        times.append(time.perf_counter() - began)
    return ROWS * LENGTH / float(np.median(times)), jump


def mixtures(sizes: list[int]) -> Iterator[Result]:
    """Yield the rate at the beginning and late in the second epoch of shards of each size."""
    smallest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            shard = make_shard(Path(folder), size)
            steps = 2 * shard.token_count // (ROWS * LENGTH) + TIMED + 2
            places = {"first batches": 0, "late in the second epoch": steps - TIMED - 2}
            for place, step in places.items():
                rate, jump = batch_rate({"a": shard}, step, steps)
                smallest = smallest or rate
                name = f"data/{size:.0e} tokens/{place}/first batches of {sizes[0]:.0e}"
                yield Result(
                    f"{name} (a resume's first batch: {jump:.3f} s)", rate, smallest, rate / smallest
                )


def packing(sizes: list[int]) -> Iterator[Result]:
    """Yield the rate of packing conversations of each size."""
    smallest = 0.0
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        lengths = torch.randint(40, 257, (size // 148,), generator=generator).tolist()
        conversations = [Conversation(range(8, 8 + n), [False] * 30 + [True] * (n - 30)) for n in lengths]
        began = time.perf_counter()
        ConversationBatches(conversations, batch_size=32, sequence_length=512, seed=0, pad_token_id=0)(0)
        rate = sum(lengths) / (time.perf_counter() - began)
        smallest = smallest or rate
        yield Result(f"packing/{size:.0e} tokens/of {sizes[0]:.0e}", rate, smallest, rate / smallest)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="to 1e7 tokens")
    arguments = parser.parse_args()
    prepare()
    sizes = [10**6, 10**7] if arguments.quick else [10**6, 10**7, 10**8]
    report([*mixtures(sizes), *packing([10**6, 10**7])], "tokens/s", arguments.json)


if __name__ == "__main__":
    main()
