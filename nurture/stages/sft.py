"""Supervised fine-tuning: imitate demonstrations, and learn to answer and to stop.

Input: a base model and conversations (any row format of `data.rows`). The loss counts the assistant's tokens only, its
end token included; everything else is context. Output: a model that answers in the chat format. Main failure mode: too
many epochs (it repeats the demonstrations: held-out `bpb` rises while the training loss falls); a model that cannot
stop (`stopped`) was not trained on its end token.

With `replay`, text of pretraining is read beside the conversations, so that less of it is forgotten (what PPO-ptx is to
PPO; arXiv 1811.11682): `bpb/SOURCE` of that text, before and after, says how much is.

The kind `reason` is the same stage before it: mid-training on worked thoughts packed as chat, where questions count in
the loss too. Rows in both modes of the chat template make a dual-mode model: `think_obeyed`, `no_think_obeyed`.

Source: InstructGPT (arXiv 2203.02155, section 3.5); packing: arXiv 2404.10830 (best fit); SmolLM3's mid-training and
SFT recipes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from nurture.chat_template import BUILT_IN
from nurture.data.packing import Conversation, ConversationBatches, tokenise_conversations
from nurture.data.rows import Row
from nurture.data.sources import (
    DataSpec,
    check_shares,
    is_endless,
    make_world,
    task_kinds,
    thinned,
    voice_of,
)
from nurture.errors import did_you_mean
from nurture.evals.bits_per_byte import bits_per_byte
from nurture.evals.measure import Measure, rate
from nurture.evals.replies import ask_rows, samples_of
from nurture.evals.world_card import WorldCard, dual_mode, world_card
from nurture.losses.language import LanguageLoss
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, ScheduleConfig
from nurture.progress import progress_bar
from nurture.recipe import Count, Share
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
from nurture.types import Batch

log = logging.getLogger(__name__)

VERSION = 1


class Config(TrainingConfig):
    """Settings of supervised fine-tuning."""

    templates: ClassVar[tuple[str, ...]] = ("chat_template",)

    kind: Literal["sft", "reason"] = "sft"
    data: dict[str, DataSpec]
    """Source name -> where its conversations come from (files, globs, `world:tasks`, `hf:NAME`)."""
    shares: dict[str, Share] = {}
    """Part of a source's rows that is used, where it is not all of them."""
    epochs: PositiveFloat = 2.0
    """Times every conversation is seen, unless `steps` or `minutes` say otherwise."""
    conversations: Count = Field(default=4000, gt=0)
    """Most conversations taken from an endless source."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that are trained: what the assistant wrote, or questions too (as in SmolLM3's mid-training; the default of
    the kind reason)."""
    replay: dict[str, DataSpec] = {}
    """Source name -> text of pretraining that is read beside the conversations, so that less of it is forgotten."""
    replay_share: float = Field(default=0.2, gt=0, lt=1)
    """Part of all tokens that is such text, where there is any."""
    chat_template: str | None = None
    """The chat template that is trained and saved with the model: FILE.jinja, or nurture's own: chatml, or chatml_think
    or chatml_no_think, which say what holds where neither a row nor a user names a mode. By default the start's, and
    chatml for a base model. Later stages (reward, preference, ppo, grpo) take their start's: another would be a format
    that nobody trained."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to conversations longer than a row."""
    heldout_conversations: PositiveInt = 100
    """Held-out conversations of each source that are measured on."""
    heldout_every: int = Field(default=50, ge=2)
    """One row in so many is held out, chosen by a hash of what it asks."""
    reply_tokens: PositiveInt = 128
    """Longest reply when the model is asked."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", warmup=0.03, final=0.1)

    @model_validator(mode="after")
    def _check_shares(self) -> Config:
        check_shares(self.shares, self.data)
        return self

    @field_validator("chat_template")
    @classmethod
    def _check_template(cls, value: str | None) -> str | None:
        if value is None or value in BUILT_IN or value.endswith(".jinja"):
            return value
        raise ValueError(
            f"should be a .jinja file or one of {', '.join(BUILT_IN)}.{did_you_mean(value, BUILT_IN)}"
        )

    @model_validator(mode="before")
    @classmethod
    def _reason_by_name(cls, data: Any) -> Any:
        return {"loss_on": "all", **data} if isinstance(data, dict) and data.get("kind") == "reason" else data


def run(config: Config, context: StageContext) -> None:
    """Fine-tune `context.start` and leave a model that answers in `context.directory`."""
    context.needed_start(config, "fine-tuning needs a model")
    session = open_session(config, context, tokens=None)
    tokenizer = session.tokenizer.for_chat(context.template(config.chat_template))
    with progress_bar("tokenise", None, show=session.is_main) as bar:
        packed = ConversationBatches(
            _counted(bar, _beside_text(config, context, tokenizer)),
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=session.seed,
            pad_token_id=tokenizer.pad_token_id,
            overlong=config.overlong,
        )
    log.info("%s", packed.report)
    if packed.report.truncated:
        log.warning(
            "%d of %d conversations are longer than sequence_length=%d and are cut there, some before their end token; "
            "raise it, or leave them out with overlong=drop",
            packed.report.truncated,
            packed.report.conversations,
            config.sequence_length,
        )
    heldout = {name: list(_rows(config, context, name, "heldout")) for name in config.data}
    heldout_batches = _heldout_batches(config, context, session, tokenizer, heldout)

    def heldout_bits() -> dict[str, Measure]:
        bits = bits_per_byte(session.model, heldout_batches, session.byte_lengths, session.execution)
        return {f"bpb/{source}": measure for source, measure in bits.items()}

    def measure_all(model: Transformer | None, *, base: bool) -> WorldCard:
        """Measure held-out bits per byte and, in the main process, replies."""
        bits = heldout_bits()
        card = WorldCard() if model is None else _card(config, context, model, tokenizer, heldout, base=base)
        card.measures = bits | card.measures
        return card

    started = time.monotonic()
    before = remember(
        context.directory, "before", lambda: measure_all(session.whole(), base=_is_base(context)).measures
    )
    loss_fn = LanguageLoss(session.byte_lengths)
    seconds = (time.monotonic() - started) / 10
    report = train(
        config, context, session, lambda _: packed, loss_fn, heldout_bits,
        default_steps=packed.steps(config.epochs), evaluation_seconds=seconds,
    )  # fmt: skip
    model = session.whole()
    card = measure_all(model, base=False)
    if model is None:
        return
    save_result_model(model, tokenizer, context.directory, answers=True)
    write_result(
        context.directory,
        tokens=sum(report.tokens.values()),
        before=before,
        after=card.measures,
        samples=card.samples,
        notes={
            "steps": report.steps,
            "epochs": packed.epochs(report.steps),
            "packing": vars(packed.report),
        },
    )


def _rows(
    config: Config, context: StageContext, name: str, split: Literal["train", "heldout"]
) -> Iterator[Row]:
    """Yield the rows of one source; an endless one is cut."""
    spec = config.data[name]
    rows = context.rows(spec, split, config.heldout_every)
    if split == "train" and is_endless(spec):
        rows = islice(rows, config.conversations)  # first, so that a share is one of these
    if name in config.shares:
        rows = thinned(rows, config.shares[name])
    return islice(rows, config.heldout_conversations) if split == "heldout" else iter(rows)


def _conversations(
    config: Config, context: StageContext, tokenizer: Tokenizer, name: str
) -> Iterator[Conversation]:
    rows = _rows(config, context, name, "train")
    return tokenise_conversations(rows, tokenizer, name, questions=config.loss_on == "all")


def _heldout_batches(
    config: Config,
    context: StageContext,
    session: Session,
    tokenizer: Tokenizer,
    heldout: dict[str, list[Row]],
) -> list[Batch]:
    """Pack held-out conversations and texts; there may be none of a small file, which is no reason not to train."""
    pieces: list[Conversation] = []
    for name, rows in heldout.items():
        if taught := [row for row in rows if row.messages]:
            pieces += tokenise_conversations(taught, tokenizer, name)
    pieces += [c for name in config.replay for c in _pieces(config, context, tokenizer, name, "heldout")]
    pieces = [piece for piece in pieces if any(piece.completion_mask[1 : config.sequence_length])]
    if not pieces:
        log.warning(
            "stage '%s': no conversation was chosen to be held out (one in %d is) that has a reply within %d tokens, "
            "so nothing is measured on any. Lower heldout_every.",
            config.name,
            config.heldout_every,
            config.sequence_length,
        )
        return []
    packed = ConversationBatches(
        pieces,
        batch_size=max(1, config.execution.microbatch_tokens // config.sequence_length),
        sequence_length=config.sequence_length,
        seed=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [packed(step) for step in range(packed.steps(1.0))]


def _beside_text(config: Config, context: StageContext, tokenizer: Tokenizer) -> Iterator[Conversation]:
    """Yield every conversation, then pieces of the texts in turn until they are `replay_share` of all tokens."""
    said = 0
    for name in config.data:
        for conversation in _conversations(config, context, tokenizer, name):
            said += len(conversation.token_ids)
            yield conversation
    owed = said * config.replay_share / (1 - config.replay_share)
    texts = [_pieces(config, context, tokenizer, name, "train") for name in config.replay]
    while texts and owed > 0:
        for text in tuple(texts):
            piece = next(text, None)
            if piece is None:
                texts.remove(text)
                continue
            owed -= len(piece.token_ids)
            yield piece


def _pieces(
    config: Config, context: StageContext, tokenizer: Tokenizer, name: str, split: Literal["train", "heldout"]
) -> Iterator[Conversation]:
    """Yield the documents of a text source as pretraining read them, cut to rows; of held-out ones only so many."""
    rows = context.rows(config.replay[name], split, config.heldout_every)
    for row in islice(rows, config.heldout_conversations if split == "heldout" else None):
        token_ids = [tokenizer.document_token_id, *tokenizer.encode(row.text or "")]
        for start in range(0, len(token_ids), config.sequence_length):
            piece = token_ids[start : start + config.sequence_length]
            if len(piece) > 1:
                yield Conversation(piece, [True] * len(piece), name)


def _counted(bar: Any, conversations: Iterator[Conversation]) -> Iterator[Conversation]:
    for conversation in conversations:
        bar.advance(1, conversation.source)
        yield conversation


def _is_base(context: StageContext) -> bool:
    """Say whether the start is a base model: one saved without a chat template."""
    start = context.start
    return start is not None and start.is_dir() and not (start / "chat_template.jinja").exists()


def _card(
    config: Config,
    context: StageContext,
    model: Transformer,
    tokenizer: Tokenizer,
    heldout: dict[str, list[Row]],
    *,
    base: bool,
) -> WorldCard:
    """Ask held-out questions: the world's, whose answers are known, or else those of the data."""
    world = make_world(context.world)
    kinds = world_kinds(config.data, context)
    thought_about = world_kinds(config.data, context, voices=("think",))
    if kinds or thought_about:
        card, n = WorldCard(), config.heldout_conversations
        if kinds:
            how: dict[str, Any] = {"per_kind": n, "max_tokens": config.reply_tokens, "base": base}
            card = world_card(model, tokenizer, world, kinds=kinds, **how)
        if thought_about:
            both = dual_mode(model, tokenizer, world, kinds=thought_about, per_kind=n)
            card = WorldCard(card.measures | both.measures, card.samples + both.samples)
        return card
    asked = (
        (row.prompt, row.template_kwargs)
        for rows in heldout.values()
        for row in rows
        if row.messages and row.prompt
    )
    prompts, replies = ask_rows(
        model, tokenizer, asked, config.heldout_conversations, max_tokens=config.reply_tokens
    )
    if not prompts:
        return WorldCard()
    measures = {
        "stopped": rate([reply.stopped for reply in replies]),
        "format": rate([reply.stopped and bool(reply.text.strip()) for reply in replies]),
    }
    return WorldCard(measures, samples_of(prompts, replies))


def world_kinds(
    data: Mapping[str, str], context: StageContext, voices: tuple[str, ...] = ("tasks", "people")
) -> tuple[str, ...]:
    """Return the task kinds of the world that the data teaches, red-team tasks aside (they are always measured).

    Args:
        voices: whose demonstrations count; by default those that name no mode of the chat template.
    """
    worlds = [spec.removeprefix("world:") for spec in data.values() if spec.startswith("world:")]
    built = make_world(context.world)
    named = {kind for names in worlds if voice_of(names) in voices for kind in task_kinds(names, built)}
    return tuple(kind for kind in built.task_kinds if kind in named and kind != "redteam")
