"""Reward model step against TRL's RewardTrainer: the same shapes, pairs, loss and optimizer.

    python bench/reward.py                     a table
    python bench/reward.py --shapes 3M --json  one JSON line a comparison

16 pairs a step; "even" pairs have two answers of 128 tokens with their prompt, "varied" ones 40 to 128, where packing
saves the padding. The peer runs in its own trainer, as shipped (fp32, eager) and at its best (bf16, fused AdamW); ours
is what a long stage uses (bf16, compiled blocks, packed rows with document masks). Tokens are those of prompts and
answers, never padding. Both sides use the same allocator setting; the best step of each counts. (A ranking of K answers
is K(K-1)/2 pairs to TRL, which reads every answer K-1 times; ours reads it once. That gain is not in these figures.)
"""

from __future__ import annotations

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

from nurture.data.comparisons import Comparison, ComparisonBatches
from nurture.losses.reward import RewardLoss
from nurture.model.config import ModelConfig
from nurture.model.parallel import prepare as prepare_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.trainer import split_to_fit, train_step

PAIRS, LONGEST, PROMPT = 16, 128, 32


def make_pairs(vocab_size: int, varied: bool, count: int = 8 * PAIRS) -> list[Comparison]:
    """Return random pairs."""
    return [
        Comparison(answers, PROMPT, ((0,), (1,)))
        for answers in random_pairs(vocab_size, varied, count=count, prompt=PROMPT, longest=LONGEST)
    ]


def our_step(config: ModelConfig, pairs: list[Comparison]) -> tuple[Callable[[], None], float]:
    """Return a function that does one update, and tokens of a step on average."""
    execution = decide_execution(ExecutionConfig(compile="on", precision="auto"))
    torch.manual_seed(0)
    model = prepare_model(Transformer(config, "scalar"), execution)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
    tokens = sum(pair.tokens for pair in pairs)
    # Equal lengths fill a row of one pair; unequal ones leave less empty in a row of several.
    width = 2 * LONGEST * (1 if tokens == 2 * LONGEST * len(pairs) else 2)
    rows = max(1, round(PAIRS * tokens / len(pairs) / width))
    batches = ComparisonBatches(pairs, batch_size=rows, sequence_length=width, seed=0, pad_token_id=0)
    loss_fn = RewardLoss()
    place = [0]

    def step() -> None:
        batch = batches(place[0])
        place[0] += 1
        train_step(model, optimizer, split_to_fit(batch, 8192), loss_fn, clip_norm=1.0, execution=execution)

    return step, sum(batches(number).token_count for number in range(batches.steps(1))) / batches.steps(1)


def peer_trainer(config: ModelConfig, pairs: list[Comparison], folder: str, *, best: bool) -> Any:
    """Return TRL's trainer on the same pairs."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    from nurture.tokenizer import Tokenizer

    class Tokenised(RewardTrainer):
        """Rows are tokens already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    Tokenizer.train(["some words to have a tokenizer"], 280).save(folder)
    rows = [{"chosen_ids": list(p.answers[0]), "rejected_ids": list(p.answers[1])} for p in pairs]
    shape = peer_config(config)
    shape.num_labels, shape.pad_token_id = 1, 0
    torch.manual_seed(0)
    return Tokenised(
        model=LlamaForSequenceClassification(shape),
        args=RewardConfig(
            **trainer_settings(folder, PAIRS, best), max_length=None
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
    step, tokens = our_step(config, pairs)
    yield from compare_with_trainer(
        __file__, ("reward", name, "varied" if varied else "even"), step, tokens,
        lambda folder, best: peer_trainer(config, pairs, folder, best=best),
        PAIRS * sum(pair.tokens for pair in pairs) / len(pairs),
        rows="pairs", attended=4 * LONGEST,
        labelled=0.0, repeats=repeats, memory=memory,
    )  # fmt: skip


if __name__ == "__main__":
    trainer_main(__doc__, "pairs", compare, alone)
