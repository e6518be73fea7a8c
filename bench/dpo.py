"""DPO step against TRL's DPOTrainer: the same shapes, pairs, loss and optimizer.

    python bench/dpo.py                        a table
    python bench/dpo.py --shapes 3M --json     one JSON line a comparison

16 pairs a step; "even" pairs have two completions of 128 tokens with their prompt, "varied" ones 40 to 128, where
packing saves the padding. The peer runs in its own trainer, as shipped (fp32, eager, the reference run in every step)
and at its best (bf16, fused AdamW, the reference run beforehand); ours is what a long stage uses (bf16, compiled
blocks, packed rows with document masks, reference logprobs from the cache). Tokens are those of prompts and
completions, never padding. Both sides use the same allocator setting; the best step of each counts. What the reference
takes is printed too: it is paid once, whatever the number of epochs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import (
    SHAPES,
    Result,
    compare_with_trainer,
    peer_config,
    random_pairs,
    run_trainer_alone,
    trainer_main,
    trainer_settings,
)

from nurture.data.preference import Preference, PreferenceBatches
from nurture.losses.preference import PreferenceLoss, sequence_logprobs
from nurture.model.config import ModelConfig
from nurture.model.parallel import prepare as prepare_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.trainer import split_to_fit, train_step

PAIRS, LONGEST, PROMPT = 16, 128, 32


def make_pairs(vocab_size: int, varied: bool, count: int = 8 * PAIRS) -> list[Preference]:
    """Return random pairs."""
    return [
        Preference(
            answers,
            PROMPT,
            ((0,), (1,)),
            masks=tuple([False] * PROMPT + [True] * (len(answer) - PROMPT) for answer in answers),
        )
        for answers in random_pairs(vocab_size, varied, count=count, prompt=PROMPT, longest=LONGEST)
    ]


def our_step(config: ModelConfig, pairs: list[Preference]) -> tuple[Callable[[], None], float, float]:
    """Return a function that does one update, tokens of a step on average, and seconds the reference takes once."""
    execution = decide_execution(ExecutionConfig(compile="on", precision="auto"))
    torch.manual_seed(0)
    model = prepare_model(Transformer(config), execution)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
    tokens = sum(pair.tokens for pair in pairs)
    # Equal lengths fill a row of one pair; unequal ones leave less empty in a row of several.
    width = 2 * LONGEST * (1 if tokens == 2 * LONGEST * len(pairs) else 2)
    rows = max(1, round(PAIRS * tokens / len(pairs) / width))
    batches = PreferenceBatches(pairs, batch_size=rows, sequence_length=width, seed=0, pad_token_id=0)
    started = time.perf_counter()
    with torch.no_grad(), execution.autocast():
        for batch, _ in batches.in_order(rows):
            sequence_logprobs(model, batch)
    reference_seconds = time.perf_counter() - started
    loss_fn = PreferenceLoss("dpo", 0.1)
    place = [0]

    def step() -> None:
        batch = batches(place[0])
        place[0] += 1
        train_step(model, optimizer, split_to_fit(batch, 8192), loss_fn, clip_norm=1.0, execution=execution)

    per_step = sum(batches(number).token_count for number in range(batches.steps(1))) / batches.steps(1)
    return step, per_step, reference_seconds


def peer_trainer(config: ModelConfig, pairs: list[Preference], folder: str, *, best: bool) -> Any:
    """Return TRL's trainer on the same pairs."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from nurture.tokenizer import Tokenizer

    class Tokenised(DPOTrainer):
        """Rows are tokens already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    tokenizer = Tokenizer.train(["some words to have a tokenizer"], 280)
    tokenizer.save(folder)
    rows = [
        {
            "prompt_ids": list(pair.answers[0][:PROMPT]),
            "chosen_ids": list(pair.answers[0][PROMPT:]),
            "rejected_ids": list(pair.answers[1][PROMPT:]),
        }
        for pair in pairs
    ]
    torch.manual_seed(0)
    return Tokenised(
        model=LlamaForCausalLM(peer_config(config)),
        ref_model=None if best else LlamaForCausalLM(peer_config(config)),
        args=DPOConfig(
            **trainer_settings(folder, PAIRS, best), max_length=None, precompute_ref_log_probs=best, beta=0.1
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )  # fmt: skip


def alone(side: str, name: str, varied: bool) -> None:
    """Do a few steps of one side."""
    config = SHAPES[name]
    pairs = make_pairs(config.vocab_size, varied)
    run_trainer_alone(
        side,
        lambda: our_step(config, pairs)[0],
        lambda folder, best: peer_trainer(config, pairs, folder, best=best),
    )


def compare(name: str, varied: bool, repeats: int, memory: bool) -> Iterator[list[Result]]:
    """Measure one shape."""
    config = SHAPES[name]
    pairs = make_pairs(config.vocab_size, varied)
    step, tokens, reference_seconds = our_step(config, pairs)
    logging.warning("the reference, once: %.2f s for %d pairs", reference_seconds, len(pairs))
    yield from compare_with_trainer(
        __file__, ("dpo", name, "varied" if varied else "even"), step, tokens,
        lambda folder, best: peer_trainer(config, pairs, folder, best=best),
        PAIRS * sum(pair.tokens for pair in pairs) / len(pairs),
        rows="pairs", attended=4 * LONGEST,
        labelled=1 - 2 * PROMPT * len(pairs) / sum(pair.tokens for pair in pairs), repeats=repeats, memory=memory,
    )  # fmt: skip


if __name__ == "__main__":
    trainer_main(__doc__, "pairs", compare, alone)
