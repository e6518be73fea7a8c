"""The stages of training: one file each, and the table of what there is.

Adding a stage takes one file and one line: `nurture/stages/KIND.py` with `class Config(StageConfig)`, `VERSION` and
`run(config, context)`, and an entry in `STAGES`. Recipes, `nurture run`, and a command of its own follow from that
(CONTRIBUTING.md walks through it). Modules are imported when a recipe uses them, never before: the help stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from nurture.errors import NurtureError, did_you_mean


@dataclass(frozen=True)
class StageKind:
    """One kind of stage.

    Attributes:
        module: where its `Config` and `run` are.
        summary: one line for `nurture --help`.
        examples: command lines for `nurture KIND --help`.
        continues: the next stage starts from its model where the recipe does not say; not so if it makes no policy.
    """

    module: str
    summary: str
    examples: tuple[str, ...] = ()
    continues: bool = True


STAGES: dict[str, StageKind] = {
    "prepare": StageKind(
        "nurture.stages.prepare",
        "Clean raw text before it is trained on: rules, language, classifier, decontamination, near-duplicates.",
        (
            "nurture prepare --data web='crawl/*.jsonl.gz' language=en without.gsm8k=gsm8k.jsonl",
            "nurture prepare --data web='crawl/*.parquet' classifier=my_module:education threshold=3",
        ),
        continues=False,
    ),
    "pretrain": StageKind(
        "nurture.stages.pretrain",
        "Train a base model on raw text: a new one, or further from a checkpoint.",
        (
            "nurture pretrain --data 'books/**/*.txt' --minutes 10",
            "nurture pretrain --data web='web/*.jsonl.gz' --data code='src/**/*.py' model.preset=3m",
            "nurture pretrain --model runs/tiny/01-pretrain --data notes.txt optimizer.learning_rate=3e-4",
        ),
    ),
    "extend": StageKind(
        "nurture.stages.extend",
        "Reach further back: longer rows, slower rotations, and YaRN past the trained length.",
        (
            "nurture extend --model runs/tiny/01-pretrain --data world:long --data world:web sequence_length=2048 "
            "trained_length=256 tokens=1M yarn=2",
            "nurture extend --model smollm2 --data 'books/*.jsonl.gz' sequence_length=16384 minutes=60",
        ),
    ),
    "reason": StageKind(
        "nurture.stages.sft",
        "Reasoning mid-training: the stage `sft` on worked thoughts, with the questions in the loss, before it.",
        ("nurture reason --model runs/tiny/01-pretrain --data world:think",),
    ),
    "sft": StageKind(
        "nurture.stages.sft",
        "Teach a model to answer: supervised fine-tuning on conversations.",
        (
            "nurture sft --model runs/tiny/01-pretrain --data chats.jsonl",
            "nurture sft --model smollm2 --data 'rows/*.parquet' epochs=2",
        ),
    ),
    "reward": StageKind(
        "nurture.stages.reward",
        "Learn which of two answers people prefer: a reward model from rankings.",
        (
            "nurture reward --model runs/tiny/04-sft --data world:tasks",
            "nurture reward --model runs/tiny/04-sft --data runs/tiny/labels/rankings.jsonl",
            "nurture reward --model smollm2 --data 'rows/*.jsonl' ties=drop --minutes 60",
        ),
        continues=False,
    ),
    "ppo": StageKind(
        "nurture.stages.ppo",
        "Raise a reward model's score by PPO, close to the start: reinforcement learning from human feedback.",
        (
            "nurture ppo --model runs/tiny/04-sft --data world:tasks reward_model=runs/tiny/05-reward steps=60",
            "nurture ppo --model sft --data prompts.jsonl reward_model=rm kl.target=6 lora.rank=16 steps=500",
        ),
    ),
    "grpo": StageKind(
        "nurture.stages.grpo",
        "Learn from rewards that can be checked (math, code, games) by GRPO and its family.",
        (
            "nurture grpo --model runs/tiny/04-sft --data world:tasks:arithmetic,code --minutes 1",
            "nurture grpo --model runs/tiny/04-sft --env wordle environment.reward=textarena steps=60",
            "nurture grpo --model smollm2 --data gsm8k.jsonl loss.loss_type=dr_grpo reward_scale=none "
            "lora.rank=16 steps=200",
            "nurture grpo --model runs/tiny/04-sft --env openenv:http://localhost:8000 steps=50",
        ),
    ),
    "synthesize": StageKind(
        "nurture.stages.synthesize",
        "Have models write data: thoughts for rows without, rows without their thoughts, pairs of strong and weak.",
        (
            "nurture synthesize --model runs/tiny/04-sft --data world:tasks:arithmetic make=traces rows=500",
            "nurture synthesize --model big --data prompts.jsonl make=pairs weak=small",
            "nurture synthesize --model smollm2 --data prompts.jsonl make=traces "
            "strong_endpoint.url=http://localhost:8000/v1 strong_endpoint.model=NAME",
        ),
        continues=False,
    ),
    "preference": StageKind(
        "nurture.stages.preference",
        "Learn from preferences without a reward model: DPO, IPO, APO, KTO.",
        (
            "nurture preference --model runs/tiny/04-sft --data runs/tiny/05-reward/comparisons.jsonl",
            "nurture preference --model smollm2 --data 'pairs/*.jsonl' loss=apo_zero beta=0.05 --minutes 60",
            "nurture preference --model runs/tiny/04-sft --data judged.jsonl loss=kto",
        ),
    ),
    "dpo": StageKind(
        "nurture.stages.preference",
        "The stage `preference` with loss=dpo.",
        ("nurture dpo --model runs/tiny/04-sft --data runs/tiny/05-reward/comparisons.jsonl beta=0.1",),
    ),
    "merge": StageKind(
        "nurture.stages.merge",
        "Average the weights of several models, to regain what later training lost.",
        (
            "nurture merge --model runs/tiny/08-apo 'models=[runs/tiny/04-sft]' share=0.9",
            "nurture merge --model a 'models=[b]' 'sweep=[0.5,0.7,0.9]' prompts=world:tasks",
            "nurture merge --model a 'models=[b,c]' base=d method=ties density=0.3 'weights=[1,1,1]'",
        ),
    ),
}
"""Kind -> where it is. The order is the order of the pipeline and of the help."""


def stage_module(kind: str) -> ModuleType:
    """Import the module of a stage kind.

    Raises:
        NurtureError: there is no such kind.
    """
    if kind not in STAGES:
        hint = did_you_mean(kind, STAGES) or f" Known kinds: {', '.join(STAGES)}."
        raise NurtureError(f"there is no stage kind '{kind}'.{hint}")
    return import_module(STAGES[kind].module)
