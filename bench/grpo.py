"""A whole GRPO step against TRL's GRPOTrainer: the same shapes, prompts, lengths, loss and optimizer.

    python bench/grpo.py                        a table
    python bench/grpo.py --shapes 3M --json     one JSON line a comparison

A step: 8 prompts of about 32 tokens are answered 8 times with 64 tokens, the 64 rollouts are paid (different tokens in
them), and the policy is updated once with the loss dapo. The peer runs in its own trainer, as shipped (fp32, eager) and
at its best (bf16, fused AdamW). Ours in fp32, where the engine's logprobs are the trainer's, and in bf16, where the
difference of the two is corrected; both with compiled blocks (`execution.compile=on`, paying where lengths are few).
Both sides use the same allocator setting, and the best step of each counts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import (
    BEST,
    PRECISIONS,
    SHAPES,
    Precision,
    Result,
    StepTimes,
    interleave,
    peak_memory,
    peer_config,
    prepare,
    report,
    run_alone,
    trainer_settings,
)

from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.model.config import ModelConfig
from nurture.model.parallel import prepare as prepare_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.rollout import Rollout
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.stages import grpo
from nurture.stages.context import StageContext
from nurture.stages.rl import Learner, Played, PolicyEngine, PolicyLoss, correction_mode, update
from nurture.tokenizer import Tokenizer

PROMPTS, GROUP, NEW = 8, 8, 64
TEXTS = [f"{n} pebbles, {n + 3} shells: how many?" for n in range(10, 90)]


def make_tokenizer(folder: str) -> Tokenizer:
    """Return a tokenizer of bytes and a few words, saved for the peer."""
    tokenizer = Tokenizer.train(["some words to have a tokenizer"], 280)
    tokenizer.save(folder)
    return tokenizer


def our_step(config: ModelConfig, tokenizer: Tokenizer, precision: Precision) -> Callable[[], None]:
    """Return a function that does one step."""
    settings = grpo.Config(
        name="bench", prompts_per_step=PROMPTS, group_size=GROUP, batch_size=PROMPTS * GROUP, max_tokens=NEW,
        rollout_precision=precision, execution=ExecutionConfig(precision=precision, compile="on"),
        correction="token_truncate" if precision == "bf16" else "off",
    )  # fmt: skip
    execution = decide_execution(settings.execution)
    torch.manual_seed(0)
    policy = prepare_model(Transformer(config), execution)
    optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1e-6, weight_decay=0.0))
    loss = PolicyLoss(settings.loss, 1.0, correction_mode(settings, execution))
    learner = Learner(policy, optimizer, loss, 1.0)
    engine = PolicyEngine(policy, execution, precision)
    models = grpo.Models(policy, engine, {"policy": learner})
    session: Any = SimpleNamespace(execution=execution, tokenizer=tokenizer)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    context, place = StageContext(directory=Path(tempfile.gettempdir())), [0]

    def step() -> None:
        first = place[0] * PROMPTS % len(prompts)
        place[0] += 1
        rows = [prompt for prompt in prompts[first : first + PROMPTS] for _ in range(GROUP)]
        seeds = sequence_seeds(place[0], len(rows))
        written = engine.now().generate(rows, SamplingParams(max_tokens=NEW), seeds)
        rollouts = [
            Rollout(
                prompt, prompt + own.token_ids, [False] * len(prompt) + [True] * len(own.token_ids),
                [0.0] * len(prompt) + own.logprobs, float(len(set(own.token_ids))), group=index // GROUP,
            )
            for index, (prompt, own) in enumerate(zip(rows, written, strict=True))
        ]  # fmt: skip
        batch = grpo.to_batch(settings, tokenizer, rollouts)
        sums = grpo.credit(settings, session, models, batch)
        update(settings, models.learners, Played(rollouts, batch, sums), execution, 0, place[0], context)

    return step


def peer_trainer(config: ModelConfig, folder: str, *, best: bool) -> Any:
    """Return TRL's trainer on the same prompts."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    def different(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [float(len(set(own))) for own in completion_ids]

    torch.manual_seed(0)
    return GRPOTrainer(
        model=LlamaForCausalLM(peer_config(config)),
        reward_funcs=different,
        args=GRPOConfig(
            **trainer_settings(folder, PROMPTS * GROUP, best), num_generations=GROUP, max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW}, beta=0.0, loss_type="dapo", epsilon_high=0.28, learning_rate=1e-6
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in TEXTS]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left"),
    )  # fmt: skip


def alone(side: str, name: str) -> None:
    """Do a few steps of one side."""
    config = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(folder)
        if side == "ours":
            run_alone(our_step(config, tokenizer, BEST))
            return
        trainer = peer_trainer(config, folder, best=side == "best")
        trainer.args.max_steps = 3
        run_alone(trainer.train, 1)


def compare(name: str, repeats: int, memory: bool) -> list[Result]:
    """Measure one shape."""
    config = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(folder)
        steps = {precision: our_step(config, tokenizer, precision) for precision in PRECISIONS}
        trainers = {"as shipped (fp32)": False, f"at its best ({BEST})": True}
        peers = {label: peer_trainer(config, folder, best=best) for label, best in trainers.items()}
        times = {label: StepTimes(trainer) for label, trainer in peers.items()}

        def peer(trainer: Any) -> Callable[[], None]:
            def run() -> None:
                trainer.args.max_steps = 2
                trainer.train()

            return run

        mine = interleave(*steps.values(), *map(peer, peers.values()), repeats=repeats)
        again = interleave(*steps.values(), repeats=2 * repeats, warm=0)
    ours = {precision: min(a, b) for precision, a, b in zip(steps, mine, again, strict=False)}
    sides = ("ours", "shipped", "best") if memory else ()
    peaks = {side: peak_memory(__file__, "--alone", side, "--shapes", name) for side in sides}
    rollouts = PROMPTS * GROUP
    results = []
    for mine_in, label, side in (
        *((precision, "as shipped (fp32)", "shipped") for precision in PRECISIONS),
        (BEST, f"at its best ({BEST})", "best"),
    ):
        speeds = rollouts / ours[mine_in], rollouts / times[label].best()
        ratio = peaks["ours"] / peaks[side] if memory and mine_in == BEST else None
        where = f"grpo/{name}/ours {mine_in}, rollouts a second in whole steps/TRL {label}"
        results.append(Result(where, *speeds, speeds[0] / speeds[1], memory_ratio=ratio))
    return results


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="3M", help="comma separated: " + ", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one turn")
    parser.add_argument("--memory", action="store_true", help="measure each side's peak memory too")
    parser.add_argument("--alone", choices=("ours", "shipped", "best"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments.alone, arguments.shapes)
        return
    if arguments.quick:
        arguments.repeats = 1
    prepare()
    for name in arguments.shapes.split(","):
        report(compare(name, arguments.repeats, arguments.memory), "rollouts/s", arguments.json)


if __name__ == "__main__":
    main()
