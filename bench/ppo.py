"""PPO step against TRL's PPOTrainer: the same shapes, prompts, lengths and optimizer steps.

    pip install --no-deps --target trl-1.10 trl==1.10.0      the last TRL with a PPO trainer; later ones have none
    python bench/ppo.py --trl trl-1.10                       a table
    python bench/ppo.py --trl trl-1.10 --json                one JSON line a comparison

A step is 64 rollouts of 32 to 40 prompt tokens and 64 new ones, their scores, and two epochs of four minibatches for
policy and value model. All four models (policy, reference, reward, value) have the same shape. The peer runs in its own
trainer in bf16 without gradient checkpointing; ours is the stage's own step, in bf16 too. Tokens are those of
prompts and completions of a step. Both sides use the same allocator setting; the best step of each counts. Without
`--trl` (or a TRL that has the trainer) nothing is compared, and that is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    BEST,
    PRECISIONS,
    SHAPES,
    Result,
    gemm_peak,
    interleave,
    peer_config,
    prepare,
    report,
    trainer_settings,
)

from nurture.data.rows import Row
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.rewards.learned import RewardScale, write_scale
from nurture.stages import ppo
from nurture.stages.context import StageContext
from nurture.stages.rl import Played, update
from nurture.stages.training import open_session, save_result_model
from nurture.tokenizer import Tokenizer

ROLLOUTS, NEW, EPOCHS, MINIBATCHES = 64, 64, 2, 4


def make_prompts() -> list[Row]:
    """Return questions of a few words."""
    words = "zero one two three four five six seven eight nine".split()
    texts = [f"{words[i % 10]} and {words[i // 10]}?" for i in range(ROLLOUTS)]
    return [Row(text=text, prompt=({"role": "user", "content": text},)) for text in texts]


def make_start(config: ModelConfig, folder: Path) -> Tokenizer:
    """Write a policy and a reward model with a tokenizer; return the tokenizer."""
    tokenizer = Tokenizer.train([row.text or "" for row in make_prompts()] * 4, 300)
    for name, head in (("policy", "lm"), ("reward", "scalar")):
        torch.manual_seed(0)
        save_result_model(Transformer(config, head), tokenizer, folder / name, answers=True)  # type: ignore[arg-type]
    write_scale(folder / "reward/model", RewardScale())
    return tokenizer


def our_step(folder: Path, tokens: list[int]) -> Callable[[], None]:
    """Return a function that does one step and notes its tokens."""
    config = ppo.Config.model_validate(
        {
            "name": "ppo", "data": {"prompts": "none"}, "reward_model": "reward", "steps": 1,
            "prompts_per_step": ROLLOUTS, "batch_size": ROLLOUTS // MINIBATCHES, "epochs": EPOCHS,
            "max_tokens": NEW, "sequence_length": 256,
            "execution": {"precision": "auto", "compile": "off"},
        }
    )  # fmt: skip
    context = StageContext(
        folder / "stage", start=folder / "policy/model", models={"reward": folder / "reward/model"}
    )
    session = open_session(config, context, tokens=None)
    models = ppo.open_models(config, context, session, folder / "policy/model")
    rows = make_prompts()

    def step() -> None:
        number = len(tokens)
        rollouts = ppo.collect(config, session, models, rows, number)
        batch, sums = ppo.score(config, session, models, rollouts)
        sums |= ppo.credit(config, session, batch, 0.05)
        played = Played(rollouts, batch, sums)
        update(config, models.learners, played, session.execution, session.seed, number, context)
        tokens.append(sum(len(rollout.token_ids) for rollout in rollouts))

    return step


def peer_run(
    config: ModelConfig, folder: Path, tokenizer: Tokenizer, best: list[float]
) -> Callable[[], None]:
    """Return a function that does three steps of TRL's trainer and keeps the best time of one."""
    from datasets import Dataset
    from transformers import (
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Times(TrainerCallback):
        """TRL's trainer announces the end of a step only."""

        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            best[0], self.began = min(best[0], now - self.began), now

    shape = peer_config(config)
    shape.num_labels = 1
    shape.pad_token_id = tokenizer.pad_token_id
    fast = PreTrainedTokenizerFast.from_pretrained(folder / "policy/model")
    fast.padding_side = "left"
    torch.manual_seed(0)
    scalar = [LlamaForSequenceClassification(shape) for _ in range(2)]
    rows = [{"input_ids": tokenizer.encode_prompt(row.prompt or ())} for row in make_prompts()]
    trainer = PPOTrainer(
        args=PPOConfig(
            **trainer_settings(folder / "trl", ROLLOUTS // MINIBATCHES, True) | {"max_steps": -1},
            gradient_accumulation_steps=MINIBATCHES, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS,
            total_episodes=3 * ROLLOUTS, response_length=NEW, temperature=1.0, num_sample_generations=0
        ),
        processing_class=fast,
        model=LlamaForCausalLM(shape),
        ref_model=LlamaForCausalLM(shape),
        reward_model=scalar[0],
        value_model=scalar[1],
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
        callbacks=[Times()],
    )  # fmt: skip
    trainer.log = lambda *_, **__: None
    return trainer.train


def compare(name: str, repeats: int) -> list[Result]:
    """Measure one shape."""
    config = SHAPES[name]
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written)
        tokenizer = make_start(config, folder)
        tokens, best = list[int](), [float("inf")]
        step, peer = our_step(folder, tokens), peer_run(config, folder, tokenizer, best)
        ours, _ = interleave(step, peer, repeats=repeats, warm=1)
        ours = min(ours, *interleave(step, repeats=4, warm=0))
    per_step = sum(tokens) / len(tokens)
    # Forward passes: sampling, reference, reward, value; forward and backward: policy and value, each epoch.
    operations = per_step * 2.0 * config.parameter_count() * (4 + 2 * 3 * EPOCHS)
    share = operations / ours / gemm_peak(PRECISIONS[BEST])
    speeds = per_step / ours, per_step / best[0]
    return [Result(f"ppo/{name}/TRL 1.10 ({BEST})", *speeds, speeds[0] / speeds[1], share)]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="3M", help="comma separated: " + ", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--trl", help="folder with a TRL that has experimental/ppo (1.10 or older)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one turn")
    arguments = parser.parse_args()
    if arguments.trl:
        sys.path.insert(0, arguments.trl)
    if importlib.util.find_spec("trl.experimental.ppo") is None:
        logging.warning(
            "the TRL that is installed has no PPO trainer, so there is nothing to compare with. For the last one that"
            " had: pip install --no-deps --target FOLDER trl==1.10.0, and --trl FOLDER"
        )
        return
    prepare()
    for name in arguments.shapes.split(","):
        report(compare(name, 1 if arguments.quick else arguments.repeats), "tokens/s", arguments.json)


if __name__ == "__main__":
    main()
