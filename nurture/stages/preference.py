"""Preference learning without a reward model: DPO, IPO, APO-zero, APO-down, KTO.

Input: a fine-tuned model and preferences in any written form (`prompt/chosen/rejected`, `responses/ranking`,
`prompt/completion/label`), or those an earlier stage made (`stage:reward/comparisons.jsonl`, `stage:synthesize`). The
reference, by default the start itself, is run once over those that are read; its logprobs are kept in the run's cache.
Output: a model that makes the chosen likelier than the rejected. Preferences are packed (data/preference.py): a
preference stage is a batch builder and a loss, the rest is `fit`.

Main failure mode: both completions become less likely, the rejected faster, and what is left goes to replies nobody
ranked. The loss does not see it: watch `train/chosen_drift` (nats; a slow fall is usual, a steep one is not),
`stopped`, and in the embedded world `gold_win_rate` over the start. Remedies: a smaller learning rate, `nll_weight`.

Source: losses/preference.py names the papers; SmolLM3's APO recipe for the setting.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from nurture.data.preference import (
    CUT,
    Preference,
    PreferenceBatch,
    PreferenceBatches,
    tokenise_judged,
    tokenise_preferences,
)
from nurture.data.rows import Row
from nurture.data.sources import DataSpec, check_shares, is_endless, make_world, thinned
from nurture.errors import NurtureError
from nurture.evals.measure import Measure, mean, rate, wilson
from nurture.evals.replies import Reply, ask_rows, ask_tasks, heldout_tasks, samples_of
from nurture.evals.win_rate import gold_measures, gold_samples, named_kinds, wins
from nurture.evals.world_card import programs_that_work
from nurture.files import atomic_write, make_directory, sha256_file
from nurture.losses.preference import PreferenceKind, PreferenceLoss, sequence_logprobs
from nurture.model.hugging_face import load_model
from nurture.model.parallel import prepare
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, ScheduleConfig
from nurture.progress import Bar, progress_bar
from nurture.recipe import Count, Share
from nurture.rewards.learned import load_reward_model, score_replies
from nurture.runtime import add_up, eager_blocks
from nurture.stages.context import StageContext
from nurture.stages.training import (
    Session,
    TrainingConfig,
    open_session,
    plan_steps,
    remember,
    save_result_model,
    train_planned,
    write_result,
)
from nurture.types import LossFunction, LossResult
from nurture.world import Task

log = logging.getLogger(__name__)

VERSION = 1

_SAVED_PASSES = 256
"""Passes of the reference between two writings of its cache."""


class Config(TrainingConfig):
    """Settings of preference learning."""

    references: ClassVar[tuple[str, ...]] = ("reference", "reward_model")

    kind: Literal["preference", "dpo"] = "preference"
    data: dict[str, DataSpec]
    """Source name -> where its preferences come from."""
    shares: dict[str, Share] = {}
    """Part of a source's rows that is used, where it is not all of them."""
    rows: Count = Field(default=100_000, gt=0)
    """Most rows taken from each source."""
    heldout_rows: PositiveInt = 200
    """Held-out rows of each source that are measured on."""
    heldout_every: int = Field(default=20, ge=2)
    """One row in so many is held out, chosen by a hash of what it asks."""
    loss: PreferenceKind = "apo_zero"
    """dpo, ipo, apo_zero (the chosen are better than what the model writes), apo_down (they are not), or kto (single
    completions, judged good or bad)."""
    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference (SmolLM3: 0.05); ipo: tau."""
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the chosen's negative log-likelihood in nats a token, beside the loss of a pair."""
    desirable_weight: PositiveFloat = 1.0
    """kto: weight of completions judged good."""
    undesirable_weight: PositiveFloat = 1.0
    """kto: weight of completions judged bad."""
    reference: str | None = None
    """Earlier stage or checkpoint that the policy is held to; by default the start."""
    answer_tokens: PositiveInt | None = None
    """Prompt and answer are cut off after so many tokens; by default half a row."""
    epochs: PositiveFloat = 1.0
    """Times every preference is seen, unless `steps` or `minutes` say otherwise."""

    prompts: DataSpec | None = None
    """Held-out prompts that start and result both answer: `world:tasks`, whose truth is known, or rows; by default
    those of the held-out preferences."""
    prompt_count: PositiveInt = 25
    """So many prompts, of each kind where they are the world's."""
    reply_tokens: PositiveInt = 128
    """Longest reply to them."""
    temperature: NonNegativeFloat = 1.0
    """Of these replies; 1 asks the policy as it is, 0 for its likeliest reply."""
    reward_model: str | None = None
    """Earlier stage or checkpoint that scores the replies: `proxy_reward` and `proxy_win_rate`."""

    batch_size: PositiveInt = 4
    sequence_length: PositiveInt = 768
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", warmup=0.1, final=0.1)

    @model_validator(mode="after")
    def _check_shares(self) -> Config:
        check_shares(self.shares, self.data)
        return self

    @model_validator(mode="before")
    @classmethod
    def _dpo_by_name(cls, data: Any) -> Any:
        return {"loss": "dpo", **data} if isinstance(data, dict) and data.get("kind") == "dpo" else data


def run(config: Config, context: StageContext) -> None:
    """Train `context.start` on preferences and leave the policy in `context.directory`."""
    context.needed_start(config, "preference learning needs a fine-tuned model")
    session = open_session(config, context, tokens=None)
    session.tokenizer = session.tokenizer.for_chat()
    lost: Counter[str] = Counter()
    heldout_rows = [row for name in config.data for row in _rows(config, context, name, "heldout")]
    batches = _pack(config, context, session, "train", lost)
    heldout = _pack(config, context, session, "heldout", Counter())
    assert batches is not None  # the training split raises where it is empty
    log.info("%s", batches.report)
    if lost.total():
        log.info("preferences: %s", _told(lost))
    if lost[CUT]:
        log.warning(
            "%d preferences have an answer that is cut off after %d tokens, prompt included, and so never ends; raise "
            "sequence_length or answer_tokens",
            lost[CUT],
            config.answer_tokens or config.sequence_length // 2,
        )
    reference = Reference(config, context, session)
    if heldout is not None:
        reference.add_logprobs(heldout, range(heldout.rows_per_epoch))
    loss_fn = PreferenceLoss(
        config.loss,
        config.beta,
        nll_weight=config.nll_weight,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )

    def on_pairs() -> dict[str, Measure]:
        return {} if heldout is None else heldout_measures(session, heldout, loss_fn, _rows_at_once(config))

    started = time.monotonic()
    exam = Exam(config, context, session, heldout_rows)
    pairs_before = on_pairs()
    evaluation_seconds = time.monotonic() - started
    # The same numbers on the pairs are known beforehand (the policy is the reference), but not where it is another.
    before = remember(context.directory, "before", lambda: pairs_before | exam.sit(session.whole()))
    steps = plan_steps(
        config,
        context,
        session,
        lambda _: batches,
        _after_reference(loss_fn),
        batches.steps(config.epochs),
        evaluation_seconds,
    )
    # Whole groups of rows, so that a longer run groups its rows no differently.
    read = -(-steps * config.batch_size // _rows_at_once(config)) * _rows_at_once(config)
    reference.add_logprobs(batches, batches.row_order(0)[:read].tolist())
    report = train_planned(config, context, session, batches, loss_fn, on_pairs, steps)
    model = session.whole()
    after = on_pairs() | exam.sit(model)
    if model is None:
        return
    after |= wins(before, after)
    save_result_model(model, session.tokenizer, context.directory, answers=True)
    write_result(
        context.directory,
        tokens=sum(report.tokens.values()),
        before=before,
        after=after,
        samples=exam.samples,
        notes={
            "steps": report.steps,
            "epochs": batches.epochs(report.steps),
            "loss": config.loss,
            "beta": config.beta,
            "preferences": {**vars(batches.report), "left_out": dict(+lost)},
        },
    )


# ---- preferences ------------------------------------------------------------------------------------------------


def _rows(
    config: Config, context: StageContext, name: str, split: Literal["train", "heldout"]
) -> Iterator[Row]:
    spec = config.data[name]
    if is_endless(spec):
        raise NurtureError(
            f"stage '{config.name}': source '{name}' ({spec}) has demonstrations and no preferences. Have answers"
            " ranked first (kind: reward writes comparisons.jsonl) or written by two models (kind: synthesize)."
        )
    rows = context.rows(spec, split, config.heldout_every)
    if name in config.shares:
        rows = thinned(rows, config.shares[name])
    return islice(rows, config.rows if split == "train" else config.heldout_rows)


def _pack(
    config: Config,
    context: StageContext,
    session: Session,
    split: Literal["train", "heldout"],
    lost: Counter[str],
) -> PreferenceBatches | None:
    """Return the packed preferences of a split; None where no source has any that is held out."""
    cut = config.answer_tokens or config.sequence_length // 2
    preferences: list[Preference] = []
    for name in config.data:
        rows = list(_rows(config, context, name, split))
        if not rows and split == "heldout":
            log.warning("source '%s' has no row that is held out; it is not measured", name)
            continue
        if config.loss == "kto":
            found = tokenise_judged(rows, session.tokenizer, name, answer_tokens=cut, lost=lost)
        else:
            found = tokenise_preferences(
                rows,
                session.tokenizer,
                name,
                answer_tokens=cut,
                row_tokens=config.sequence_length,
                lost=lost,
            )
        preferences += found
    if not preferences and split == "heldout":
        return None
    if not preferences:
        raise NurtureError(
            f"stage '{config.name}': no preference is left to train on: {_told(lost)}. Prompt and answer are cut off"
            f" after {cut} tokens: raise sequence_length or answer_tokens where the prompts are longer."
        )
    return PreferenceBatches(
        preferences,
        batch_size=config.batch_size if split == "train" else session.execution.processes.world_size,
        sequence_length=config.sequence_length,
        seed=session.seed,
        pad_token_id=session.tokenizer.pad_token_id,
    )


def _told(lost: Counter[str]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in (+lost).items())


def _rows_at_once(config: Config) -> int:
    return max(1, config.execution.microbatch_tokens // config.sequence_length)


# ---- the reference ----------------------------------------------------------------------------------------------


def _after_reference(loss_fn: PreferenceLoss) -> LossFunction:
    """Return `loss_fn` with the reference's pass before it: what a row costs that is trained on for the first time."""

    def both(model: nn.Module, batch: PreferenceBatch) -> LossResult:
        with torch.no_grad(), eager_blocks():
            sequence_logprobs(model, batch)
        return loss_fn(model, batch)

    return both


class Reference:
    """The model that the policy is held to, known by the hash of its weights, and the run's cache of its logprobs."""

    def __init__(self, config: Config, context: StageContext, session: Session) -> None:
        """Find it; its weights are read where a logprob is missing."""
        path = context.models[config.reference] if config.reference is not None else context.start
        assert path is not None
        self._path, self._weights, self._is_start = path, _weights_hash(path), config.reference is None
        self._folder, self._session, self._together = (
            context.cache / "reference",
            session,
            _rows_at_once(config),
        )

    def add_logprobs(self, batches: PreferenceBatches, rows: Sequence[int]) -> None:
        """Set the reference's logprobs of the preferences in `rows`: from the cache, or computed and put there.

        Others stay NaN: a large set of which a stage reads a part costs that part. The cache's name is a hash of the
        reference's weights, the tokens, and what decides which rows are computed together; its content carries a
        checksum. One that does not match is computed again, with a warning.
        """
        session, processes, together = self._session, self._session.execution.processes, self._together
        file = self._folder / f"{_cache_key(self._weights, batches, session, together)}.safetensors"
        kept = read_cached(file, batches.reference_logprobs.shape) if processes.is_main else None
        kept = processes.agree(kept)
        values = np.full_like(batches.reference_logprobs, np.nan) if kept is None else kept
        missing = [row for row in rows if np.isnan(values[batches.members(row)]).any()]
        if missing:
            model = session.model if self._is_start else prepare(load_model(self._path), session.execution)
            model.eval()
            # Saved now and then: a kill loses little of what may be an hour's work.
            size = _SAVED_PASSES * together
            with progress_bar("reference", len(missing), show=processes.is_main) as bar:
                for part in (missing[first : first + size] for first in range(0, len(missing), size)):
                    _add_logprobs(values, model, session, batches, part, together, bar)
                    if processes.is_main:
                        write_cached(file, values)
        batches.reference_logprobs = values


@torch.no_grad()
def _add_logprobs(
    values: np.ndarray,
    model: nn.Module,
    session: Session,
    batches: PreferenceBatches,
    rows: Sequence[int],
    rows_at_once: int,
    bar: Bar,
) -> None:
    """Set in `values`, (N, K) float32, the summed logprob under `model` of each answer to the preferences in `rows`."""
    processes, execution = session.execution.processes, session.execution
    found: dict[str, tuple[float, float]] = {}
    for batch, members in batches.in_order(rows_at_once, processes.rank, processes.world_size, chosen=rows):
        with execution.autocast(), eager_blocks():
            logprobs = sequence_logprobs(model, batch.to(execution.device)).cpu()
        for row, numbers in zip(logprobs.tolist(), members, strict=False):
            place = 0
            for number in numbers:
                for answer in range(len(batches.preferences[number].answers)):
                    found[f"{number} {answer}"] = (row[place], 1.0)
                    place += 1
        bar.advance(len(members) * processes.world_size)
    values[[number for row in rows for number in batches.members(row)]] = 0.0
    for name, (value, _) in processes.sum(found).items():
        number, answer = map(int, name.split())
        values[number, answer] = value


def _weights_hash(path: Path) -> str:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


def _cache_key(weights: str, batches: PreferenceBatches, session: Session, rows_at_once: int) -> str:
    how = f"{session.execution.precision} {session.execution.device.type} {rows_at_once} {batches.seed}"
    digest = hashlib.sha256(f"{weights} {how}\n".encode())
    for preference in batches.preferences:
        for token_ids, mask in zip(preference.answers, preference.masks, strict=True):
            digest.update(np.asarray(token_ids, dtype=np.int32).tobytes())
            digest.update(np.asarray(mask, dtype=bool).tobytes() + b"|")
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def write_cached(file: Path, values: np.ndarray) -> None:
    """Write reference logprobs with their checksum."""
    make_directory(file.parent)
    metadata = {"sha256": hashlib.sha256(values.tobytes()).hexdigest()}
    atomic_write(file, lambda temporary: save_file({"reference_logprobs": values}, temporary, metadata))


def read_cached(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return cached reference logprobs, or None if there are none of this shape with the right checksum."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="np") as store:
            values: np.ndarray = store.get_tensor("reference_logprobs")
            right = (store.metadata() or {}).get("sha256") == hashlib.sha256(values.tobytes()).hexdigest()
    except (SafetensorError, OSError, ValueError):
        right = False
    if right and values.shape == shape:
        return values.copy()
    log.warning("%s is damaged; the reference's logprobs are computed again", file)
    return None


# ---- measures ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def heldout_measures(
    session: Session, heldout: PreferenceBatches, loss_fn: PreferenceLoss, rows_at_once: int
) -> dict[str, Measure]:
    """Return the loss's metrics on held-out preferences, by the model in training; all processes must call it."""
    execution, processes = session.execution, session.execution.processes
    was_training = session.model.training
    session.model.eval()
    totals: dict[str, tuple[float, float]] = {}
    with progress_bar("held-out pairs", heldout.rows_per_epoch, show=processes.is_main, stays=False) as bar:
        for batch, members in heldout.in_order(rows_at_once, processes.rank, processes.world_size):
            with execution.autocast(), eager_blocks():
                result = loss_fn(session.model, batch.to(execution.device))
            if members:
                add_up(totals, result.metrics)
            bar.advance(len(members) * processes.world_size)
    session.model.train(was_training)
    measures = {}
    for name, (amount, count) in processes.sum(totals).items():
        if not count or name.endswith("_logprob"):
            continue
        value, n = amount / count, round(count)
        bounds = wilson(min(max(value, 0.0), 1.0), n) if name.endswith("_accuracy") else (None, None)
        measures[name] = Measure(value, n, *bounds)
    return measures


class Exam:
    """Held-out prompts that are answered before and after, with the same uniform numbers.

    Attributes:
        samples: some replies of the last sitting.
    """

    def __init__(self, config: Config, context: StageContext, session: Session, rows: Sequence[Row]) -> None:
        """Choose the prompts."""
        self.config, self.session = config, session
        self.samples: list[dict[str, Any]] = []
        spec = config.prompts or DataSpec("")
        self.world = make_world(context.world) if spec.startswith("world:") else None
        self.tasks: list[Task] = []
        if self.world is not None:
            self.tasks = heldout_tasks(self.world, named_kinds(spec, self.world), config.prompt_count)
        elif spec:
            rows = list(islice(context.rows(spec, "heldout", config.heldout_every), config.prompt_count))
        self.rows = [] if self.tasks else [row for row in rows if row.prompt][: config.prompt_count]
        name = config.reward_model
        self.reward_model = load_reward_model(context.models[name]) if name is not None else None

    def sit(self, model: Transformer | None) -> dict[str, Measure]:
        """Return what the replies of `model` are worth; nothing in processes that have none."""
        if model is None:
            return {}
        config, tokenizer = self.config, self.session.tokenizer
        how: dict[str, Any] = {"max_tokens": config.reply_tokens, "temperature": config.temperature}
        if self.world is not None:
            graded = ask_tasks(model, tokenizer, self.world, self.tasks, **how)
            measures = gold_measures(graded)
            if any(task.kind == "code" for task in self.tasks):
                measures |= programs_that_work(graded)
            self.samples = gold_samples(graded)
            return measures | self._scored([task.messages for task in self.tasks], [g.reply for g in graded])
        asked = ((row.prompt, row.template_kwargs) for row in self.rows if row.prompt)
        prompts, replies = ask_rows(model, tokenizer, asked, len(self.rows), **how)
        if not prompts:
            return {}
        self.samples = samples_of(prompts, replies)
        return {
            "stopped": rate([reply.stopped for reply in replies]),
            "reply_tokens": mean([float(reply.tokens) for reply in replies]),
            **self._scored(prompts, replies),
        }

    def _scored(self, prompts: Sequence[Any], replies: Sequence[Reply]) -> dict[str, Measure]:
        if self.reward_model is None:
            return {}
        scores = score_replies(self.reward_model, prompts, [reply.text for reply in replies])
        return {"proxy_reward": mean(scores.tolist())}
