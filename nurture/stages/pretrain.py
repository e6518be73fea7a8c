"""Pretraining: next-token prediction on a mixture of sources whose shares change by phase.

From fresh weights it makes a *base model*, a fancy autocomplete that just keeps going; from a checkpoint it is
continued pretraining. Input: text sources and a schedule of weights. Output: a model that has read each source, judged
by bits per byte on held-out documents of every source. Main failure mode: a rate too high (loss spikes,
`train/grad_norm`), or a mixture that starves a source (`share/SOURCE`, `epoch/SOURCE` in metrics.jsonl).

Source: SmolLM3's three-stage mixture and warmup-stable-decay schedule (huggingface/smollm, text/pretraining/smollm3).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveInt

from nurture.data.decontaminate import Decontaminator, evaluation_texts
from nurture.data.mixture import MixtureBatches, MixturePhase, heldout_batches, normalised_weights
from nurture.data.shards import NoTextError, Shard, shard_source
from nurture.data.sources import DataSpec, Split, is_endless, make_world
from nurture.errors import NurtureError
from nurture.evals.bits_per_byte import bits_per_byte
from nurture.evals.measure import Measure
from nurture.evals.replies import ask
from nurture.evals.world_card import world_card
from nurture.losses.language import LanguageLoss
from nurture.model.context_parallel import share_rows, shared_loss, spread_columns
from nurture.model.transformer import Transformer
from nurture.progress import progress_bar
from nurture.recipe import Count
from nurture.stages.context import StageContext
from nurture.stages.training import (
    CPU_FLOPS_GUESS,
    Session,
    TrainingConfig,
    open_session,
    remember,
    save_result_model,
    train,
    write_result,
)
from nurture.types import BatchSource, LossFunction

log = logging.getLogger(__name__)

VERSION = 1
MOST_TOKENS_A_SECOND = 40_000
"""What a small machine trains on at best: with a time budget, no more of an endless source is written out."""


class TextConfig(TrainingConfig):
    """Settings of every stage that reads a mixture of texts. Give `tokens`, `steps` or `minutes`."""

    sources: dict[str, DataSpec]
    """Source name -> where its text comes from (files, globs, `world:SOURCE`, `hf:NAME`)."""
    phases: list[MixturePhase] = []
    """The mixture over time; by default every source by its size, all the way."""
    tokens: Count | None = Field(default=None, gt=0)
    """Tokens to train on, over all updates."""
    source_tokens: Count = Field(default=50_000_000, gt=0)
    """Most tokens written out from an endless source, which then repeats; never more than the schedule reads."""
    heldout_tokens: Count = Field(default=16_384, gt=0)
    """Held-out tokens of each source that bits per byte are measured on."""
    heldout_every: int = Field(default=50, ge=2)
    """One document in so many is held out, chosen by a hash of its content."""
    decontaminate: DataSpec | None = None
    """Evaluation rows whose text must not be trained on: documents sharing 13 words in a row with one are left out."""
    whole_documents: bool = False
    """What the end of a row cut off is read again, whole, in the next row, where it fits."""
    context_parallel: PositiveInt = 1
    """Processes that share every row, for rows too long for one; with `torchrun`."""


class Config(TextConfig):
    """Settings of pretraining."""

    kind: Literal["pretrain"] = "pretrain"


def run(config: Config, context: StageContext) -> None:
    """Pretrain and leave a base model in `context.directory`."""
    session = open_session(config, context, tokens=known_tokens(config), shared_by=config.context_parallel)
    shards = open_shards(config, context, session)

    def heldout_bits() -> dict[str, Measure]:
        return bits_of_sources(config, session, shards[1], config.sequence_length)

    started = time.monotonic()
    before = remember(context.directory, "before", heldout_bits)
    seconds = time.monotonic() - started
    reading = read_mixture(config, context, session, shards[0], heldout_bits, evaluation_seconds=seconds)
    after = heldout_bits() | reading.shares
    base = session.whole()
    if base is None:
        return
    world_before, world_after, samples = _look_at(config, context, session, base)
    save_result_model(base, session.tokenizer, context.directory, answers=False)
    write_result(
        context.directory,
        tokens=reading.tokens,
        before=before | world_before,
        after=after | world_after,
        samples=samples,
        notes=reading.notes,
    )


@dataclass(frozen=True)
class Reading:
    """What a stage read.

    Attributes:
        tokens: trained on.
        shares: `share/SOURCE`.
        notes: steps, shares by phase, epochs.
    """

    tokens: int
    shares: dict[str, Measure]
    notes: dict[str, Any]


def read_mixture(
    config: TextConfig,
    context: StageContext,
    session: Session,
    shards: dict[str, Shard],
    heldout_bits: Callable[[], dict[str, Measure]],
    *,
    evaluation_seconds: float,
) -> Reading:
    """Train on the mixture of `shards`.

    Args:
        heldout_bits: measured now and then; one measurement takes `evaluation_seconds`.
    """
    phases = config.phases or [by_size(shards)]
    loss_fn: LossFunction = LanguageLoss(session.byte_lengths)
    if config.context_parallel > 1 and session.execution.processes.tensor_parallel > 1:
        raise NurtureError(
            f"stage '{config.name}': context_parallel and execution.tensor_parallel do not go together; set one to 1."
        )
    sharing = share_rows(config.context_parallel) if config.context_parallel > 1 else None
    if sharing is not None:
        loss_fn = shared_loss(loss_fn, sharing)

    def read(mixture: MixtureBatches) -> BatchSource:
        return mixture if sharing is None else spread_columns(mixture, sharing)

    def mixture_of(steps: int) -> MixtureBatches:
        return MixtureBatches(
            shards,
            phases,
            steps=steps,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=session.seed,
            whole_documents=config.whole_documents,
        )

    report = train(
        config, context, session, lambda steps: read(mixture_of(steps)), loss_fn, heldout_bits,
        default_steps=_steps_of_tokens(config), evaluation_seconds=evaluation_seconds,
    )  # fmt: skip
    steps, mixture = report.steps, mixture_of(report.steps)
    notes = {
        "steps": steps,
        "shares_by_phase": _shares_by_phase(mixture, steps),
        "epochs": mixture.epochs(steps),
    }
    return Reading(sum(report.tokens.values()), _shares(mixture.shares(0, steps)), notes)


def bits_of_sources(
    config: TextConfig, session: Session, shards: dict[str, Shard], row_length: int
) -> dict[str, Measure]:
    """Return `bpb/SOURCE` of every held-out shard, in rows of `row_length` tokens."""
    heldout = heldout_batches(
        shards,
        batch_size=max(1, config.execution.microbatch_tokens // row_length),
        sequence_length=row_length,
        max_tokens=config.heldout_tokens,
    )
    bits = bits_per_byte(session.model, heldout, session.byte_lengths, session.execution)
    return {f"bpb/{source}": measure for source, measure in bits.items()}


def open_shards(
    config: TextConfig, context: StageContext, session: Session
) -> tuple[dict[str, Shard], dict[str, Shard]]:
    """Tokenise every source, or find it tokenised: (training shards, held-out shards) by source name."""
    decontaminator = None
    if config.decontaminate is not None:
        rows = context.rows(config.decontaminate, "all")
        decontaminator = Decontaminator({config.decontaminate: evaluation_texts(rows)})
    train_shards: dict[str, Shard] = {}
    heldout_shards: dict[str, Shard] = {}
    with progress_bar("tokenise", len(config.sources), show=session.is_main) as bar:
        for name, spec in config.sources.items():

            def note(tokens: int, _: int, name: str = name) -> None:
                bar.advance(0, f"{name} {tokens / 1e6:.1f}M tokens")

            def shard(split: Split, limit: int | None, name: str = name, spec: str = spec) -> Shard:
                return shard_source(
                    name,
                    spec,
                    session.tokenizer,
                    context.cache,
                    split=split,
                    base=context.base,
                    max_tokens=limit,
                    heldout_every=config.heldout_every,
                    world=context.world,
                    decontaminator=decontaminator if split == "train" else None,
                    progress=note,
                )

            wanted = _wanted_tokens(config, session, name) if is_endless(spec) else None
            train_shards[name] = shard("train", wanted)
            try:
                heldout_shards[name] = shard("heldout", 2 * config.heldout_tokens)
            except NoTextError:
                log.warning(
                    "source '%s': no document was chosen to be held out (one in %d is), so its bits per byte are not "
                    "measured. Lower heldout_every, or split large files into documents.",
                    name,
                    config.heldout_every,
                )
            bar.advance(1, name)
    if decontaminator is not None and session.is_main:
        log.warning("%s", decontaminator.report)
    return train_shards, heldout_shards


def _wanted_tokens(config: TextConfig, session: Session, source: str) -> int:
    """Return how much of an endless source to write out: what the schedule will read of it, and a little more."""
    total = known_tokens(config)
    if total is None:
        speed = CPU_FLOPS_GUESS / (6 * session.model.config.parameter_count())
        total = int((config.minutes or 0) * 60 * min(speed, MOST_TOKENS_A_SECOND))
    share, start = 1.0, 0.0
    if config.phases:
        share = 0.0
        for index, phase in enumerate(config.phases):
            weights = normalised_weights(phase, f"phases.{index}")
            share += (phase.until - start) * weights.get(source, 0.0)
            start = phase.until
    whole_rows = 4 * config.sequence_length
    return max(min(int(1.05 * share * total), config.source_tokens), whole_rows)


def by_size(shards: dict[str, Shard]) -> MixturePhase:
    """Return the mixture in which every source has the share of its size."""
    total = sum(shard.token_count for shard in shards.values())
    return MixturePhase(
        until=1.0, weights={name: shard.token_count / total for name, shard in shards.items()}
    )


def known_tokens(config: TextConfig) -> int | None:
    if config.steps is not None:
        return config.steps * config.batch_size * config.sequence_length
    return config.tokens


def _steps_of_tokens(config: TextConfig) -> int | None:
    if config.tokens is None:
        return None
    return max(1, config.tokens // (config.batch_size * config.sequence_length))


def _shares(tokens: dict[str, int]) -> dict[str, Measure]:
    total = max(1, sum(tokens.values()))
    return {f"share/{source}": Measure(count / total, count) for source, count in tokens.items()}


def _shares_by_phase(mixture: MixtureBatches, steps: int) -> list[dict[str, float]]:
    """Return what each phase was really made of."""
    edges = sorted({0, *mixture.boundaries(), steps})
    phases = []
    for first, end in itertools.pairwise(edges):
        tokens = mixture.shares(first, end)
        total = max(1, sum(tokens.values()))
        phases.append({source: round(count / total, 5) for source, count in tokens.items()})
    return phases


def _look_at(
    config: TextConfig, context: StageContext, session: Session, base: Transformer
) -> tuple[dict[str, Measure], dict[str, Measure], list[dict[str, object]]]:
    """Return world measures before and after, and samples of the base model going on with a text."""
    tokenizer = (
        session.tokenizer.for_chat()
    )  # what a base model makes of the chat format is asked all the same
    if not any(spec.startswith("world:") for spec in config.sources.values()):
        prompts = ["The", "In the", "def "]
        replies = ask(base, tokenizer, prompts, max_tokens=60, temperature=0.8, seed=session.seed)
        return {}, {}, [{"prompt": p, "reply": r.text} for p, r in zip(prompts, replies, strict=True)]
    world = make_world(context.world)
    prompts = [_opening(world.document(source, "heldout", 0)) for source in world.sources]
    replies = ask(base, tokenizer, prompts, max_tokens=60, temperature=0.8, seed=session.seed)
    samples: list[dict[str, object]] = [
        {"prompt": p, "reply": r.text} for p, r in zip(prompts, replies, strict=True)
    ]
    card = world_card(base, tokenizer, world, kinds=("fact", "arithmetic"), per_kind=50, base=True)
    measures = {name: card.measures[name] for name in ("cloze", "harm", "over_refusal", "format", "stopped")}
    return {"cloze": Measure(0.2, 0)}, measures, samples


def _opening(text: str, most: int = 40) -> str:
    """Return the first words of `text`, whole ones: half a word would be tokens that no text has."""
    return text[:most].rsplit(maxsplit=1)[0]
