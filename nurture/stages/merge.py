"""Merging: give a model back what training cost it, by averaging weights with earlier or sister checkpoints.

Input: the start and further checkpoints of the same shape: stages of the run, folders, .gguf files. Nothing is trained;
weights are combined tensor by tensor (model/merging.py), so that memory holds one tensor of each model. With `sweep`,
several shares of the start are tried and the one with the best score on held-out prompts is taken; those prompts are
others than the ones the result is measured on. `compare` names further models to stand in the table beside start and
result: what training cost, and what merging gave back. SmolLM3: 0.9 of the soup of its APO checkpoints and 0.1 of the
mid-training checkpoint, which brought its long context back.

Main failure mode: the models are too far apart, and every mixture is worse than both: the table in `result.json`
(`sweep`) then has its best at the end, 1.0, which is tried too.

Source: model soups, arXiv 2203.05482; SmolLM3's merging; the methods' papers are named in model/merging.py.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from nurture.data.mixture import heldout_batches
from nurture.data.shards import shard_source
from nurture.data.sources import DataSpec, make_world
from nurture.errors import NurtureError
from nurture.evals.bits_per_byte import bits_per_byte
from nurture.evals.long_context import accuracy, find_again
from nurture.evals.measure import Measure
from nurture.evals.replies import ask_tasks, heldout_tasks
from nurture.evals.win_rate import gold_measures, gold_samples, named_kinds, wins
from nurture.evals.world_card import cloze_accuracy
from nurture.files import make_directory
from nurture.model import merging
from nurture.model.hugging_face import load_model, load_tokenizer, save_config
from nurture.model.transformer import Transformer
from nurture.recipe import Share
from nurture.runtime import ExecutionConfig, decide_execution, join_processes
from nurture.stages.context import StageConfig, StageContext
from nurture.stages.training import remember, write_result
from nurture.tokenizer import Tokenizer
from nurture.types import Batch
from nurture.world import World

log = logging.getLogger(__name__)

VERSION = 1

_SELECTION = 5_000
"""Held-out prompts that choose the share start here; the result is measured on the first ones."""


class Config(StageConfig):
    """Settings of merging."""

    references: ClassVar[tuple[str, ...]] = ("models", "base", "compare")

    kind: Literal["merge"] = "merge"
    models: list[str] = Field(min_length=1)
    """Earlier stages or checkpoints to merge with the start."""
    method: Literal["linear", "slerp", "ties", "dare_linear", "dare_ties"] = "linear"
    """linear (with equal weights: a soup); slerp (two models); ties, dare_linear, dare_ties (changes since `base`)."""
    share: Share = 0.9
    """Weight of the start; the others share the rest."""
    weights: list[NonNegativeFloat] | None = None
    """Weights of the start and of each of `models`, in place of `share`. Proportions, except in dare."""
    base: str | None = None
    """ties and dare: the earlier stage or checkpoint that all were trained from."""
    density: float = Field(default=0.5, gt=0, le=1)
    """ties and dare: part of each difference that is kept."""
    scale: PositiveFloat = 1.0
    """ties and dare: factor of the merged difference (lambda)."""

    sweep: list[Share] = []
    """Shares of the start to try; 1, the start alone, is always among them."""
    score: list[str] = ["gold_reward"]
    """Measures whose mean decides the sweep (bits per byte count as their negative)."""
    prompts: DataSpec | None = None
    """Prompts of the world that models are measured on, such as `world:tasks`."""
    prompt_count: PositiveInt = 25
    """So many prompts of each kind."""
    reply_tokens: PositiveInt = 128
    """Longest reply to them."""
    temperature: NonNegativeFloat = 1.0
    """Of these replies."""
    lengths: list[PositiveInt] = []
    """Lengths in tokens at which notes of the world must be found again: `passkey/LENGTH`."""
    compare: list[str] = []
    """Earlier stages or checkpoints that are measured too, for the table."""
    data: dict[str, DataSpec] = {}
    """Sources of text to measure `bpb/SOURCE` on."""
    heldout_tokens: PositiveInt = 8192
    """Held-out tokens of each source that are measured on."""
    heldout_every: int = Field(default=50, ge=2)
    """One row in so many is held out, chosen by a hash of its content."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.weights is not None and len(self.weights) != 1 + len(self.models):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {1 + len(self.models)} models, the start first"
            )
        if self.weights is not None and not sum(self.weights):
            raise ValueError("weights are all 0")
        if self.weights is not None and self.sweep:
            raise ValueError("give weights or a sweep, not both")
        if self.method == "slerp" and len(self.models) != 1:
            raise ValueError(f"slerp merges the start with one model, got {len(self.models)}")
        if (self.base is not None) != self.method.startswith(("ties", "dare")):
            raise ValueError("base is needed by ties and dare, and by no other method")
        if self.sweep and not (self.prompts or self.data or self.lengths):
            raise ValueError(
                "a sweep needs something to be scored on: prompts, or data with score: [bpb/SOURCE], or lengths with"
                " score: [passkey/LENGTH]"
            )
        return self


def run(config: Config, context: StageContext) -> None:
    """Merge `context.start` with the other models and leave the result in `context.directory`."""
    start, processes = context.needed_start(config, "merging needs a model"), join_processes()
    tokenizer = load_tokenizer(start)
    exam = _Exam(config, context, tokenizer)
    target = context.directory / "model"
    beside = {
        name: remember(context.directory, f"beside-{place}", partial(_measured, exam, context.models[name]))
        for place, name in enumerate(config.compare)
    }
    before = remember(context.directory, "before", partial(_measured, exam, start))
    share, table = config.share, list[dict[str, float]]()
    if config.sweep:
        share, table = choose_share(config, context, exam, start)
    seconds = time.monotonic()
    write_merged(config, context, start, tokenizer, target, config.weights or shares_of(config, share))
    seconds = time.monotonic() - seconds
    after = _measured(exam, target)
    after |= wins(before, after)
    if not processes.is_main:
        return
    write_result(
        context.directory,
        tokens=0,
        before=before,
        after=after,
        samples=exam.samples,
        notes={
            "method": config.method,
            "weights": dict(
                zip(["start", *config.models], config.weights or shares_of(config, share), strict=True)
            ),
            "sweep": table,
            "table": table_of({**beside, "start": before, "merged": after}),
            "merge_seconds": round(seconds, 3),
        },
    )


def shares_of(config: Config, share: float) -> list[float]:
    """Return the weights of the start and the others, where the start has `share`."""
    return [share, *[(1 - share) / len(config.models)] * len(config.models)]


def choose_share(
    config: Config, context: StageContext, exam: _Exam, start: Path
) -> tuple[float, list[dict[str, float]]]:
    """Try every share of the sweep on the selection's prompts; return the best (the larger of equals) and the table."""
    table = []
    for share in sorted({*config.sweep, 1.0}, reverse=True):
        measured = partial(_tried, config, context, exam, start, share)
        measures = remember(context.directory, f"share-{share:g}", measured)
        missing = [name for name in config.score if name not in measures]
        if missing:
            raise NurtureError(
                f"stage '{config.name}': score names '{missing[0]}', which is not measured here. Measured:"
                f" {', '.join(measures)}."
            )
        signed = [-measures[n].value if n.startswith("bpb/") else measures[n].value for n in config.score]
        scores = {name: round(measure.value, 6) for name, measure in measures.items()}
        table.append({"share": share, "score": round(sum(signed) / len(signed), 6), **scores})
        log.info("share %g of the start: score %.4f", share, table[-1]["score"])
    best = max(table, key=lambda line: line["score"])
    return best["share"], table


def _measured(exam: _Exam, path: Path, first: int = 0) -> dict[str, Measure]:
    return exam.measures(load_model(path).to(exam.execution.device), first)


def table_of(models: dict[str, dict[str, Measure]]) -> list[dict[str, Any]]:
    """Return a line of values for each model, in order: what a stage cost, and what the merge gave back."""
    return [
        {"model": name, **{key: round(measure.value, 6) for key, measure in measures.items()}}
        for name, measures in models.items()
    ]


def _tried(
    config: Config, context: StageContext, exam: _Exam, start: Path, share: float
) -> dict[str, Measure]:
    """Merge with one share into a folder that is thrown away, and measure on the selection's prompts."""
    folder = context.directory / "state" / "tried"
    write_merged(config, context, start, exam.tokenizer, folder, shares_of(config, share))
    measures = _measured(exam, folder, first=_SELECTION)
    exam.execution.processes.wait()
    if exam.execution.processes.is_main:
        shutil.rmtree(folder)
    return measures


def write_merged(
    config: Config,
    context: StageContext,
    start: Path,
    tokenizer: Tokenizer,
    target: Path,
    weights: Sequence[float],
) -> None:
    """Write the whole checkpoint of a merge, in the main process; the others wait for it."""
    processes = join_processes()
    if processes.is_main:
        others = [context.models[name] for name in config.models]
        based = [context.models[config.base]] if config.base is not None else []
        make_directory(target)
        method = merge_method(config, weights, seed=context.seed)
        # The start comes first: its configuration is the result's.
        shape, dtype = merging.merge_checkpoints([start, *others, *based], target, method)
        save_config(
            shape,
            "lm",
            target,
            end_token_ids=tokenizer.stop_token_ids if tokenizer.chat_template is not None else (),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.document_token_id,
            dtype=dtype,
        )
        tokenizer.save(target)
    processes.wait()


def merge_method(config: Config, weights: Sequence[float], seed: int) -> merging.Method:
    """Return what merges one tensor of (the start, the others, the base if there is one)."""

    def method(name: str, tensors: Sequence[Tensor]) -> Tensor:
        if config.method == "linear":
            return merging.linear(tensors, weights)
        if config.method == "slerp":
            return merging.slerp(tensors[0], tensors[1], weights[1] / sum(weights))
        *models, base = tensors
        how: dict[str, Any] = {"density": config.density, "scale": config.scale}
        if config.method == "ties":
            return merging.ties(base, models, weights, **how)
        how |= {"seed": merging.name_seed(seed, name), "elect": config.method == "dare_ties"}
        return merging.dare(base, models, weights, **how)

    return method


# ---- measures ---------------------------------------------------------------------------------------------------


class _Exam:
    """What a model is measured on, before, after, and for every share of a sweep.

    Attributes:
        samples: some replies of the last model.
    """

    def __init__(self, config: Config, context: StageContext, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer.for_chat()
        self.samples: list[dict[str, Any]] = []
        spec = config.prompts or ""
        if spec and not spec.startswith("world:"):
            raise NurtureError(
                f"stage '{config.name}': prompts '{spec}' must be the world's, such as world:tasks."
            )
        self.world: World | None = make_world(context.world) if spec else None
        self.kinds = named_kinds(spec, self.world) if self.world else ()
        self.texts = _heldout_texts(config, context, tokenizer)
        self.hay: World | None = make_world(context.world) if config.lengths else None
        self.execution = decide_execution(ExecutionConfig(compile="off"))

    def measures(self, model: Transformer, first: int = 0) -> dict[str, Measure]:
        """Return everything measured; `first` is the index of the first held-out prompt.

        All processes must call it, each with the whole model: they share probes and texts, and ask the prompts alike.
        """
        config, measures = self.config, dict[str, Measure]()
        if self.world is not None:
            tasks = heldout_tasks(self.world, self.kinds, config.prompt_count, first=first)
            how: dict[str, Any] = {"max_tokens": config.reply_tokens, "temperature": config.temperature}
            graded = ask_tasks(model, self.tokenizer, self.world, tasks, **how)
            measures |= gold_measures(graded)
            measures["cloze"] = cloze_accuracy(model, self.tokenizer, self.world, n=100)
            self.samples = gold_samples(graded, first)
        if self.hay is not None:
            where: dict[str, Any] = {"lengths": config.lengths, "execution": self.execution}
            cells = find_again(model, self.tokenizer, self.hay, kinds=("passkey",), each=8, **where)
            measures |= {f"passkey/{length}": accuracy(cells, "passkey", length) for length in config.lengths}
        if self.texts:
            lengths = torch.from_numpy(self.tokenizer.token_byte_lengths)
            bits = bits_per_byte(model, self.texts, lengths, self.execution)
            measures |= {f"bpb/{source}": measure for source, measure in bits.items()}
        return measures


def _heldout_texts(config: Config, context: StageContext, tokenizer: Tokenizer) -> list[Batch]:
    """Return packed held-out text of every source."""
    shards = {
        name: shard_source(
            name,
            spec,
            tokenizer,
            context.cache,
            split="heldout",
            base=context.base,
            max_tokens=2 * config.heldout_tokens,
            heldout_every=config.heldout_every,
            world=context.world,
        )
        for name, spec in config.data.items()
    }
    return list(heldout_batches(shards, batch_size=16, sequence_length=256, max_tokens=config.heldout_tokens))
