"""Reward model: learn from rankings which of two answers people prefer.

Input: a fine-tuned model and comparisons. Those are ranked rows, or prompts: then the model (and further ones in the
run) answers them, and the simulated labeler of the world or an AI judge ranks the answers. Output: the model with a
scalar head in place of the vocabulary, its rewards 0 on average over the demonstrations (`model/reward.json`), and the
comparisons that were made (`comparisons.jsonl`, rows that any stage can read).

Main failure mode: it learns what is easy to see instead of what is good. `pair_accuracy` on held-out prompts, read
beside `pair_ceiling`, shows how much it missed; `longer_preferred` whether it is fooled by length; `best_of_n` whether
choosing by it makes answers better in truth. More than an epoch or two overfits (train/pair_accuracy runs away).

Source: InstructGPT, arXiv 2203.02155, section 3.5 and appendix C.2.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from random import Random
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from nurture.data.comparisons import (
    Comparison,
    ComparisonBatches,
    encode_reply,
    pairs_of,
    tokenise_comparisons,
)
from nurture.data.rankings import comparison_record, join_pairs
from nurture.data.rows import Row, parse_ranking
from nurture.data.sources import DataSpec, make_world
from nurture.errors import NurtureError
from nurture.evals.best_of_n import best_of_n_curve
from nurture.evals.measure import Measure
from nurture.evals.reward_card import RewardCard, reward_card
from nurture.files import atomic_write_text, json_lines, whole_json_lines
from nurture.losses.reward import RewardLoss, TieModel, fit_tie_threshold
from nurture.model.hugging_face import checkpoint_head, load_model
from nurture.optim import OptimizerConfig, ScheduleConfig
from nurture.recipe import Count, Section
from nurture.rewards.candidates import Candidate, distinct, sample_candidates, written_candidate
from nurture.rewards.judge import JudgeConfig, make_judge, position_bias, rank_with_judge
from nurture.rewards.labeler import INSTRUCTGPT_AGREEMENT, Labeler, calibrate, measured_agreement
from nurture.rewards.learned import RewardModel, RewardScale, last_values, score_tokens, write_scale
from nurture.runtime import eager_blocks
from nurture.stages.context import StageContext
from nurture.stages.training import (
    Session,
    TrainingConfig,
    open_session,
    remember,
    save_result_model,
    train,
    write_result,
)
from nurture.tokenizer import Tokenizer
from nurture.types import Message

log = logging.getLogger(__name__)

VERSION = 2

_FIRST_TASK = 10_000
"""Where the world's tasks are read from: demonstrations of earlier ones were learned by heart in fine-tuning."""
_CALIBRATION = 400
"""Comparisons that the labeler is calibrated on."""
_PROGRESS = 100
"""Held-out comparisons of an evaluation during training; the last one is of all."""
_SCALE_SAMPLE = 200
"""Comparisons that the tie threshold is fitted on, and demonstrations that have mean reward 0."""


class LabelerConfig(Section):
    """The simulated labeler of the world."""

    agreement: float = Field(default=INSTRUCTGPT_AGREEMENT, gt=0.5, le=1)
    """Share of pairs on which two such labelers say the same (InstructGPT: 0.73); 1 for one without doubt."""
    tie_threshold: PositiveFloat = 0.5
    """Differences that are called equal, in log odds: answers that are equally good are tied with tanh(half of it)."""


class Config(TrainingConfig):
    """Settings of reward modelling."""

    references: ClassVar[tuple[str, ...]] = ("sample_from",)

    kind: Literal["reward"] = "reward"
    data: dict[str, DataSpec]
    """Source name -> ranked rows (files, globs, `hf:NAME`), or prompts to be answered and ranked (`world:tasks`)."""
    comparisons: Count = Field(default=1000, gt=0)
    """Most comparisons of each source."""
    heldout_comparisons: PositiveInt = 200
    """Held-out comparisons of each source that are measured on."""
    heldout_every: int = Field(default=10, ge=2)
    """One row in so many is held out, chosen by a hash of what it asks."""
    epochs: PositiveFloat = 1.0
    """Times every comparison is seen, unless `steps` or `minutes` say otherwise."""
    prompt_tokens: PositiveInt | None = None
    """Of longer prompts of ranked rows the last so many tokens are kept; by default all."""

    answers: int = Field(default=6, ge=2, le=9)
    """Answers to a prompt that are ranked (InstructGPT: 4 to 9), before equal ones are dropped."""
    written: NonNegativeInt = 2
    """Of them, how many the world writes: a demonstration, or one spoiled in some way."""
    sample_from: list[str] = []
    """Further models (stages or checkpoints of the same tokenizer) that write one of the answers each."""
    sample_from_tokens: PositiveInt = 32
    """Longest answer of theirs; a base model never stops, and what it says is clear soon."""
    temperature: PositiveFloat = 1.0
    """Of the sampled answers."""
    answer_tokens: PositiveInt = 160
    """Longest sampled answer."""
    labeler: LabelerConfig = LabelerConfig()
    """Who ranks answers to the world's prompts."""
    judge: JudgeConfig | None = None
    """Who ranks answers to prompts whose truth is unknown: an AI."""

    ties: TieModel = "rao-kupper"
    """How ties are modelled: rao-kupper, davidson, or drop to leave tied pairs out (as InstructGPT did)."""
    tie_threshold: PositiveFloat = 0.5
    """Differences of rewards that the loss takes for ties, in log odds; fitted anew once the rewards are known."""
    margin: NonNegativeFloat = 0.0
    """Log odds demanded for every unit that the labeler's ratings differ by; 0 ignores the ratings."""
    centring: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them near 0 during training (0.01 is usual)."""
    best_of: int = Field(default=16, ge=0, le=64)
    """Measure the best of up to so many answers to held-out prompts of the world; 0 measures nothing."""
    best_of_prompts: PositiveInt = 48
    """Prompts of that."""

    batch_size: PositiveInt = 16
    sequence_length: PositiveInt = 960
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", warmup=0.05, final=0.1)

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.written + len(self.sample_from) > self.answers:
            raise ValueError(
                f"answers is {self.answers}, but {self.written} are written and {len(self.sample_from)} sampled from"
                " other models; that is more"
            )
        return self


@dataclass
class Collected:
    """Comparisons of one split.

    Attributes:
        comparisons: as tokens.
        golds: gold reward of every answer of every comparison; None where the truth is unknown.
        records: what `comparisons.jsonl` holds of them; None for those that were read from ranked rows.
        demonstrations: conversations that end with a good reply.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    golds: list[tuple[float, ...] | None] = field(default_factory=list)
    records: list[dict[str, Any] | None] = field(default_factory=list)
    demonstrations: list[Sequence[Message]] = field(default_factory=list)

    def some(self, count: int) -> Collected:
        """Return about `count` of the comparisons, evenly from all of them."""
        every = max(1, len(self.comparisons) // count)
        return Collected(self.comparisons[::every], self.golds[::every], self.records[::every])

    def known(self) -> list[tuple[float, ...]]:
        """Return the gold rewards where they are known."""
        return [gold for gold in self.golds if gold is not None]


def run(config: Config, context: StageContext) -> None:
    """Train a reward model from `context.start` and leave it in `context.directory`."""
    start = context.needed_start(config, "a reward model needs a model")
    session = open_session(config, context, tokens=None, head="scalar")
    session.tokenizer = session.tokenizer.for_chat()
    is_fresh = checkpoint_head(start) != "scalar"
    if is_fresh:
        _flatten_head(session)
    training = collect(config, context, session, "train")
    labeler = _labeler(config, training.known())
    heldout = collect(config, context, session, "heldout", labeler)
    few = heldout.some(_PROGRESS)
    batches = ComparisonBatches(
        training.comparisons,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        seed=session.seed,
        pad_token_id=session.tokenizer.pad_token_id,
        ties=config.ties != "drop",
    )
    log.info("%s", batches.report)

    def card(threshold: float, measured: Collected = heldout) -> RewardCard:
        return _card(config, measured, _answer_values(config, session, measured.comparisons), threshold)

    def progress() -> dict[str, Measure]:
        measures = card(config.tie_threshold, few).measures
        return {name: measures[name] for name in ("pair_accuracy", "tie_accuracy") if name in measures}

    def before_training() -> RewardCard:
        if not is_fresh:
            return card(config.tie_threshold)
        indifferent = [[0.0] * len(comparison.answers) for comparison in heldout.comparisons]
        return _card(config, heldout, indifferent, config.tie_threshold)

    before = remember(context.directory, "before", lambda: before_training().measures)
    started = time.monotonic()
    if config.minutes is not None:
        progress()
    loss_fn = RewardLoss(config.ties, config.tie_threshold, config.margin, config.centring)
    report = train(
        config, context, session, lambda _: batches, loss_fn, progress,
        default_steps=batches.steps(config.epochs), evaluation_seconds=time.monotonic() - started,
    )  # fmt: skip
    session.model.eval()
    threshold = _fitted_threshold(config, session, training.comparisons)
    shown = min(_SCALE_SAMPLE, len(training.demonstrations))
    demonstrations = [
        encode_reply(session.tokenizer, turns[:-1], turns[-1:]).token_ids
        for turns in Random(session.seed).sample(training.demonstrations, shown)
    ]
    offset = float(_values(config, session, demonstrations).mean())
    after = card(threshold)
    model = session.whole()
    if model is None:
        return
    reward_model = RewardModel(model, session.tokenizer, RewardScale(offset, threshold, config.ties))
    save_result_model(model, session.tokenizer, context.directory, answers=True)
    write_scale(context.directory / "model", reward_model.scale)
    write_result(
        context.directory,
        tokens=sum(report.tokens.values()),
        before=before,
        after=after.measures,
        samples=_samples(heldout, reward_model),
        notes={
            "steps": report.steps,
            "comparisons": vars(batches.report),
            "labeler": _labeler_notes(training, labeler),
            "reward_scale": vars(reward_model.scale),
            **after.tables,
            "best_of_n": _best_of_n(config, context, reward_model),
        },
    )


@torch.no_grad()
def _flatten_head(session: Session) -> None:
    """Start a fresh head at 0: a random one is noise that a small set of comparisons must first undo."""
    for name, parameter in session.model.named_parameters():
        if name in ("output.weight", "output.parametrizations.weight.original"):
            parameter.zero_()


# ---- comparisons ------------------------------------------------------------------------------------------------


def collect(
    config: Config,
    context: StageContext,
    session: Session,
    split: Literal["train", "heldout"],
    labeler: Labeler | None = None,
) -> Collected:
    """Return the comparisons of a split: ranked rows as they are, prompts answered and ranked.

    What is made here is written to `comparisons.jsonl` (`comparisons-heldout.jsonl`) once and read from there ever
    after, by resumed runs and by the other processes.

    Args:
        labeler: who ranks answers to the world's prompts; default: one calibrated on these answers.

    Raises:
        NurtureError: a source has neither rankings nor somebody to rank; or it has no rows in this split.
    """
    collected, prompts = Collected(), dict[str, list[Row]]()
    for name in config.data:
        rows = _rows(config, context, name, split)
        if not rows and split == "train":
            raise NurtureError(
                f"stage '{config.name}': source '{name}' ({config.data[name]}) has no rows to train on."
            )
        if any(row.ranking for row in rows):
            rows = join_pairs(rows, name)
            found = list(
                tokenise_comparisons(rows, session.tokenizer, name, prompt_tokens=config.prompt_tokens)
            )
            collected.comparisons += found
            collected.golds += [None] * len(found)
            collected.records += [None] * len(found)
        elif rows:
            prompts[name] = rows
        collected.demonstrations += [row.messages for row in rows if row.messages]
    if prompts:
        file = context.directory / ("comparisons.jsonl" if split == "train" else "comparisons-heldout.jsonl")
        if session.is_main and not file.exists():
            made = _make_comparisons(config, context, session, prompts, labeler)
            atomic_write_text(file, json_lines(made))
        session.execution.processes.wait()
        for record in whole_json_lines(file):
            collected.records.append(record)
            collected.golds.append(tuple(record["gold"]) if "gold" in record else None)
            collected.comparisons.append(_comparison_of(record, session.tokenizer))
    if not collected.comparisons:
        raise NurtureError(
            f"stage '{config.name}': no comparison is held out; lower heldout_every (now {config.heldout_every}), or "
            "give it more rows."
        )
    return collected


def _rows(config: Config, context: StageContext, name: str, split: Literal["train", "heldout"]) -> list[Row]:
    first, count = (
        (0, config.heldout_comparisons) if split == "heldout" else (_FIRST_TASK, config.comparisons)
    )
    return list(islice(context.rows(config.data[name], split, config.heldout_every, first), count))


def _make_comparisons(
    config: Config,
    context: StageContext,
    session: Session,
    prompts: dict[str, list[Row]],
    labeler: Labeler | None,
) -> Iterator[dict[str, Any]]:
    """Answer every prompt several times, have the answers ranked, and yield the records."""
    world = make_world(context.world)
    known, unknown = list[_Answered](), list[_Answered]()
    for number, (name, rows) in enumerate(prompts.items()):
        answers = _answers(config, context, session, rows, seed=session.seed * 1000 + number)
        for row, candidates in zip(rows, answers, strict=True):
            if len(candidates) > 1:
                (unknown if row.metadata.get("task") is None else known).append(
                    _Answered(name, row, candidates)
                )
    golds = [
        tuple(world.gold_reward(one.row.metadata["task"], c.text) for c in one.candidates) for one in known
    ]
    labeler = labeler or _labeler(config, golds)
    for one, gold in zip(known, golds, strict=True):
        rng = Random(f"labeler {session.seed} {one.row.metadata['split']} {one.row.identity()}")
        yield _record(one, labeler.rank(gold, rng)) | {"gold": gold}
    if unknown:
        if config.judge is None:
            raise NurtureError(
                f"stage '{config.name}': source '{unknown[0].source}' has prompts without ranked answers, and nobody is"
                " there to rank any. Give `judge`, or rows with chosen/rejected or responses/ranking."
            )
        texts = [[candidate.text for candidate in one.candidates] for one in unknown]
        questions = [one.row.prompt or () for one in unknown]
        judged = rank_with_judge(make_judge(config.judge), questions, texts, config.judge.question)
        log.info("the judge contradicted itself on %.0f %% of the pairs", 100 * position_bias(judged))
        for one, verdict in zip(unknown, judged, strict=True):
            facts = {"judge_pairs": verdict.pairs, "judge_contradicted": verdict.contradicted}
            yield _record(one, verdict.ranking) | facts


class _Answered(NamedTuple):
    """A prompt and its answers, in random order, before anybody ranks them."""

    source: str
    row: Row
    candidates: list[Candidate]


def _answers(
    config: Config, context: StageContext, session: Session, rows: Sequence[Row], seed: int
) -> list[list[Candidate]]:
    """Return the distinct answers to every prompt: the start's, one of each further model, and written ones."""
    written = [_written(config, context, session, row) for row in rows]
    own = config.answers - config.written - len(config.sample_from)
    models = [
        ("start", context.start, own, config.answer_tokens),
        *((name, context.models[name], 1, config.sample_from_tokens) for name in config.sample_from),
    ]
    answers = written
    for place, (author, path, count, max_tokens) in enumerate(models):
        if not count or path is None:
            continue
        sampled = sample_candidates(
            load_model(path),
            session.tokenizer,
            [row.prompt or () for row in rows],
            count=count,
            max_tokens=max_tokens,
            temperature=config.temperature,
            seed=seed * 100 + place,
            author=author,
            dtype=torch.bfloat16 if session.execution.precision == "bf16" else None,
        )
        answers = [before + more for before, more in zip(answers, sampled, strict=True)]
    for row, candidates in zip(rows, answers, strict=True):
        candidates[:] = distinct(candidates)
        # Whoever ranks must not be able to tell an author by its place.
        Random(f"order {session.seed} {row.identity()}").shuffle(candidates)
    return answers


def _written(config: Config, context: StageContext, session: Session, row: Row) -> list[Candidate]:
    """Return answers that nobody sampled: the world's, good and spoiled, or the row's own reply."""
    if not config.written:
        return []
    task, prompt = row.metadata.get("task"), row.prompt or ()
    if task is not None:
        texts = make_world(context.world).answers(task, config.written, session.seed)
    else:
        texts = [reply[0]["content"] for reply in row.responses if len(reply) == 1][: config.written]
    return [written_candidate(session.tokenizer, prompt, text, "written") for text in texts]


def _record(one: _Answered, ranking: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Return a line of comparisons.jsonl: a ranked row, with the answers' tokens beside it."""
    responses = tuple(({"role": "assistant", "content": c.text},) for c in one.candidates)
    row = replace(one.row, responses=responses, ranking=ranking, metadata={})  # type: ignore[arg-type]
    return comparison_record(row) | {
        "source": one.source,
        "kind": one.row.metadata.get("kind", one.source),
        "authors": [candidate.author for candidate in one.candidates],
        "finished": [candidate.finished for candidate in one.candidates],
        "token_ids": [candidate.token_ids for candidate in one.candidates],
    }


def _comparison_of(record: dict[str, Any], tokenizer: Tokenizer) -> Comparison:
    answers = tuple(record["token_ids"])
    ranking = parse_ranking(record["ranking"], len(answers), "comparisons.jsonl")
    return Comparison(answers, len(tokenizer.encode_prompt(record["prompt"])), ranking, (), record["source"])


def _labeler(config: Config, golds: Sequence[Sequence[float]]) -> Labeler:
    """Return the world's labeler, as unsure as the recipe wants him on these answers."""
    return calibrate(golds[:_CALIBRATION], config.labeler.agreement, config.labeler.tie_threshold)


def _labeler_notes(training: Collected, labeler: Labeler) -> dict[str, Any]:
    """Return what is known about who ranked the training comparisons."""
    notes: dict[str, Any] = {}
    if known := training.known():
        measured = measured_agreement(labeler, known, Random(1))
        notes = {"temperature": labeler.temperature, "tie_threshold": labeler.tie_threshold, **vars(measured)}
    judged = [record for record in training.records if record and "judge_pairs" in record]
    if judged:
        pairs = sum(record["judge_pairs"] for record in judged)
        notes["judge_contradicted"] = sum(record["judge_contradicted"] for record in judged) / max(pairs, 1)
    return notes


# ---- measures ---------------------------------------------------------------------------------------------------


def _values(config: Config, session: Session, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the raw value of each sequence, (n,), by the model in training; all processes must call it."""
    with session.execution.autocast(), eager_blocks():
        return last_values(session.model, sequences, microbatch_tokens=config.execution.microbatch_tokens)


def _answer_values(config: Config, session: Session, comparisons: Sequence[Comparison]) -> list[list[float]]:
    """Return the raw value of every answer of every comparison."""
    values = _values(config, session, [answer for c in comparisons for answer in c.answers]).tolist()
    ends = list(accumulate(len(comparison.answers) for comparison in comparisons))
    return [values[end - len(c.answers) : end] for c, end in zip(comparisons, ends, strict=True)]


def _card(config: Config, heldout: Collected, rewards: list[list[float]], threshold: float) -> RewardCard:
    """Measure on all held-out comparisons; against gold where it is known for all of them."""
    golds = heldout.known()
    return reward_card(
        heldout.comparisons,
        rewards,
        golds if len(golds) == len(heldout.comparisons) else None,
        ties=config.ties,
        tie_threshold=threshold,
    )


def _fitted_threshold(config: Config, session: Session, comparisons: Sequence[Comparison]) -> float:
    """Return the tie threshold that makes the training labels likeliest at the rewards as they are now."""
    some = Random(session.seed).sample(list(comparisons), min(_SCALE_SAMPLE, len(comparisons)))
    differences, tied = list[float](), list[bool]()
    for comparison, values in zip(some, _answer_values(config, session, some), strict=True):
        for pair in pairs_of(comparison):
            differences.append(values[pair.first] - values[pair.second])
            tied.append(pair.tied)
    return fit_tie_threshold(torch.tensor(differences), torch.tensor(tied), config.ties)


def _best_of_n(config: Config, context: StageContext, reward_model: RewardModel) -> list[dict[str, float]]:
    """Return proxy and gold reward of the start's best of n answers to held-out prompts of the world."""
    specs = [spec for spec in config.data.values() if spec.startswith("world:")]
    if not specs or config.best_of < 2 or context.start is None:
        return []
    world = make_world(context.world)
    rows = context.rows(specs[0], "heldout", start=config.heldout_comparisons)
    tasks = [row.metadata["task"] for row in islice(rows, config.best_of_prompts) if "task" in row.metadata]
    if not tasks:
        return []
    answers = sample_candidates(
        load_model(context.start),
        reward_model.tokenizer,
        [task.messages for task in tasks],
        count=config.best_of,
        max_tokens=config.answer_tokens,
        temperature=config.temperature,
        seed=context.seed,
    )
    rewards = score_tokens(reward_model, [candidate.token_ids for found in answers for candidate in found])
    gold = [
        [world.gold_reward(task, c.text) for c in found] for task, found in zip(tasks, answers, strict=True)
    ]
    return best_of_n_curve(rewards.view(len(tasks), -1).double().numpy(), np.array(gold))


def _samples(heldout: Collected, reward_model: RewardModel, count: int = 12) -> list[dict[str, Any]]:
    """Return some held-out comparisons with what the labeler, the truth and the model say of every answer."""
    samples = []
    every = max(1, len(heldout.comparisons) // count)
    for comparison, gold in list(zip(heldout.comparisons, heldout.golds, strict=True))[::every][:count]:
        rewards = score_tokens(reward_model, comparison.answers).tolist()
        ranks = {index: place + 1 for place, group in enumerate(comparison.ranking) for index in group}
        decode = reward_model.tokenizer.decode
        answers: list[dict[str, Any]] = [
            {
                "reply": decode(answer[comparison.prompt_tokens :], skip_special=True),
                "reward": round(rewards[index], 3),
                "rank": ranks[index],
                **({"gold": gold[index]} if gold is not None else {}),
            }
            for index, answer in enumerate(comparison.answers)
        ]
        prompt = decode(comparison.answers[0][: comparison.prompt_tokens], skip_special=True)
        answers.sort(key=lambda said: -float(said["reward"]))
        samples.append({"prompt": prompt, "answers": answers})
    return samples
