"""Fine-tuning step against TRL's SFTTrainer: the same shape, conversations, loss and optimizer.

    python bench/sft.py                        a table
    python bench/sft.py --shapes 3M --json     one JSON line a comparison

32 conversations a step of at most 256 tokens, 64 of them the prompt, which is not trained on: "even" ones are all of
256 tokens, "varied" ones of 80 to 256, where packing saves the padding. The peer runs in its own trainer, as shipped
(fp32, eager) and at its best (bf16, fused AdamW, conversations of like length together; its packing needs a GPU's
flash attention). Ours is what a long stage uses: bf16, compiled blocks, packed rows with document masks. Tokens are
those of conversations, never padding.
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
    run_trainer_alone,
    trainer_main,
    trainer_settings,
)

from nurture.data.packing import Conversation, ConversationBatches
from nurture.losses.language import LanguageLoss
from nurture.model.config import ModelConfig
from nurture.model.parallel import prepare as prepare_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.trainer import split_to_fit, train_step

ROWS, LONGEST, PROMPT = 32, 256, 64
EPOCH = 4
"""Steps that read every conversation once; the peer's best epoch counts, as its steps differ."""


def make_conversations(vocab_size: int, varied: bool, count: int = EPOCH * ROWS) -> list[Conversation]:
    """Return random conversations."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPT + 16, LONGEST + 1, (count,), generator=generator).tolist()
    return [
        Conversation(
            torch.randint(8, vocab_size, (length,), generator=generator).tolist(),
            [False] * PROMPT + [True] * (length - PROMPT),
        )
        for length in (lengths if varied else [LONGEST] * count)
    ]


def our_step(config: ModelConfig, conversations: list[Conversation]) -> tuple[Callable[[], None], float]:
    """Return a function that does one update, and the tokens of a step on average."""
    execution = decide_execution(ExecutionConfig(compile="on", precision="auto"))
    torch.manual_seed(0)
    model = prepare_model(Transformer(config), execution)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
    tokens = sum(len(c.token_ids) for c in conversations)
    rows = round(ROWS * tokens / len(conversations) / LONGEST)
    # Unequal conversations leave less empty in a row of several.
    width = LONGEST if tokens == LONGEST * len(conversations) else 2 * LONGEST
    batches = ConversationBatches(
        conversations, batch_size=rows * LONGEST // width, sequence_length=width, seed=0, pad_token_id=0
    )
    loss_fn = LanguageLoss(torch.ones(config.vocab_size, dtype=torch.int64))
    place = [0]

    def step() -> None:
        parts = split_to_fit(batches(place[0]), 8192)
        place[0] += 1
        train_step(model, optimizer, parts, loss_fn, clip_norm=1.0, execution=execution)

    return step, batches.report.fill_rate * batches.batch_size * width


def peer_trainer(config: ModelConfig, conversations: list[Conversation], folder: str, *, best: bool) -> Any:
    """Return TRL's trainer on the same conversations."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from nurture.tokenizer import Tokenizer

    class Tokenised(SFTTrainer):
        """Rows are tokens already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    Tokenizer.train(["some words to have a tokenizer"], 280).save(folder)
    rows = [
        {
            "input_ids": list(c.token_ids),
            "labels": [t if own else -100 for t, own in zip(c.token_ids, c.completion_mask, strict=True)],
            "length": len(c.token_ids),
        }
        for c in conversations
    ]
    torch.manual_seed(0)
    return Tokenised(
        model=LlamaForCausalLM(peer_config(config)),
        args=SFTConfig(
            **trainer_settings(folder, ROWS, best), max_length=None,
            train_sampling_strategy="group_by_length" if best else "random", length_column_name="length"
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )  # fmt: skip


def alone(side: str, name: str, varied: bool) -> None:
    """Do a few steps of one side."""
    config = SHAPES[name]
    conversations = make_conversations(config.vocab_size, varied)
    run_trainer_alone(
        side,
        lambda: our_step(config, conversations)[0],
        lambda folder, best: peer_trainer(config, conversations, folder, best=best),
    )


def compare(name: str, varied: bool, repeats: int, memory: bool) -> Iterator[list[Result]]:
    """Measure one shape."""
    config = SHAPES[name]
    conversations = make_conversations(config.vocab_size, varied)
    step, tokens = our_step(config, conversations)
    yield from compare_with_trainer(
        __file__, ("sft", name, "varied" if varied else "even"), step, tokens,
        lambda folder, best: peer_trainer(config, conversations, folder, best=best),
        ROWS * sum(len(c.token_ids) for c in conversations) / len(conversations),
        rows="lengths", attended=LONGEST,
        labelled=1 - PROMPT * len(conversations) / sum(len(c.token_ids) for c in conversations),
        repeats=repeats, memory=memory, epoch=EPOCH,
    )  # fmt: skip


if __name__ == "__main__":
    trainer_main(__doc__, "lengths", compare, alone)
