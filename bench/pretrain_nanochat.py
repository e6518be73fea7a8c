"""Pretraining step against nanochat's: the same width, depth, heads, vocabulary, batch and kind of optimizer.

    git clone https://github.com/karpathy/nanochat FOLDER           (nothing of it need be installed but filelock)
    python bench/pretrain_nanochat.py --nanochat FOLDER             a table
    python bench/pretrain_nanochat.py --nanochat FOLDER --json      one JSON line a comparison

nanochat's model differs in its parts (a squared ReLU in place of SwiGLU, value embeddings, a soft cap), so ours gets
the feed-forward width that makes the numbers in matrices equal, an output matrix of its own, and as many key heads as
query heads. Both are compiled and train their matrices by Muon and the rest by AdamW, as nanochat's base_train does.
The peer as shipped computes in fp32 on a CPU; at its best it is told NANOCHAT_DTYPE=bfloat16. Both run in this process,
in turns, with the same allocator setting. Without `--nanochat` nothing is compared, and that is said.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import BEST, PRECISIONS, SHAPES, Result, gemm_peak, interleave, prepare, report
from pretrain import ROWS, TOKENS, our_step, packed_batch, step_flops

from nurture.model.config import ModelConfig
from nurture.optim import OptimizerConfig
from nurture.runtime import ExecutionConfig
from nurture.types import Batch

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def twin(config: ModelConfig) -> ModelConfig:
    """Return our shape with nanochat's number of parameters in matrices: 12 D^2 a block, and V D of the output."""
    return config.model_copy(
        update={
            "kv_heads": config.heads,
            "ffn_width": round(8 * config.width / 3 / 8) * 8,
            "tied_embeddings": False,
        }
    )


def peer_step(config: ModelConfig, precision: str) -> Callable[[Batch], float]:
    """Return a function that does one update of nanochat's base_train and returns its loss."""
    os.environ["NANOCHAT_DTYPE"] = DTYPES[precision]
    for name in [name for name in sys.modules if name.split(".")[0] == "nanochat"]:
        del sys.modules[name]  # the precision is fixed when it is imported
    gpt = importlib.import_module("nanochat.gpt")
    shape = gpt.GPTConfig(
        sequence_len=TOKENS, vocab_size=config.vocab_size, n_layer=config.layers, n_head=config.heads,
        n_kv_head=config.heads, n_embd=config.width, window_pattern="L",
    )  # fmt: skip
    with torch.device("meta"):
        model = gpt.GPT(shape)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    optimizer = model.setup_optimizer()
    compiled = torch.compile(model, dynamic=False)

    def step(batch: Batch) -> float:
        loss = compiled(batch.token_ids, batch.labels)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def compare(name: str, repeats: int) -> list[Result]:
    """Measure one shape."""
    config = twin(SHAPES[name])
    batch = packed_batch(config.vocab_size)
    execution = ExecutionConfig(compile="on", precision="auto")
    ours, _ = our_step(config, execution, OptimizerConfig(kind="muon"))
    peers = {
        f"nanochat {'as shipped' if precision == 'fp32' else 'at its best'} ({precision})": peer_step(
            config, precision
        )
        for precision in PRECISIONS
    }
    peak = gemm_peak(PRECISIONS[BEST])
    times = interleave(
        lambda: ours(batch), *(lambda peer=peer: peer(batch) for peer in peers.values()), repeats=repeats, warm=2
    )  # fmt: skip
    speeds = [ROWS * TOKENS / seconds for seconds in times]
    share = step_flops(config) / times[0] / max(peak, gemm_peak(PRECISIONS[BEST]))
    return [
        Result(f"pretrain/{name}/{label}", speeds[0], speed, speeds[0] / speed, share)
        for label, speed in zip(peers, speeds[1:], strict=True)
    ]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanochat", type=Path, help="folder of a clone of nanochat")
    parser.add_argument("--shapes", default="3M,10M", help="comma separated: " + ", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="3M, two turns")
    arguments = parser.parse_args()
    if arguments.nanochat is None:
        logging.warning(
            "there is nothing to compare with: git clone https://github.com/karpathy/nanochat FOLDER, then"
            " --nanochat FOLDER"
        )
        return
    if not (arguments.nanochat / "nanochat/gpt.py").exists():
        parser.error(f"{arguments.nanochat} is no clone of nanochat: it has no nanochat/gpt.py")
    sys.path.insert(0, str(arguments.nanochat))
    if arguments.quick:
        arguments.shapes, arguments.repeats = "3M", 2
    prepare()
    for name in arguments.shapes.split(","):
        report(compare(name, arguments.repeats), "tokens/s", arguments.json)


if __name__ == "__main__":
    main()
