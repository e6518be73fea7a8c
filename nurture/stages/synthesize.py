"""Synthetic data: a model writes what the data lacks.

Input: rows with prompts, and who writes: the start, another stage or checkpoint, or any OpenAI-compatible endpoint.
Output: `rows.jsonl`, which later stages read as `stage:NAME`. What is made:

    traces     thinking aloud: the teacher answers in its thinking mode; a reply counts if it ends by itself, has a
               thought and an answer, and the answer is right where that can be checked. Failures are asked again.
    no_think   the other way round: rows that have thoughts, without them, for the mode that does not think
    pairs      preferences: the chosen written by a strong model, the rejected by a weak one (SmolLM3: 32B and 0.6B);
               or the chosen is the demonstration that a row has, the rejected the model's own reply (self-play)

Nothing is trained. The work is cut into pieces that are kept one by one, so that a run killed at any instant goes on
with the piece it was at and makes the same rows. Equal rows count once. `result.json` holds the table of the yield by
source: prompts asked, replies produced, passed, kept, and why the rest was not.

Main failure mode: a teacher that is right by luck, or a check that lets anything pass: read `samples.jsonl`, and the
share of unchecked rows in the table.

Source: SmolLM3's synthetic reasoning and preference data; rejection sampling as in STaR, arXiv 2203.14465;
demonstrations against own replies: SPIN, arXiv 2401.01335.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from nurture.chat_template import holds_thought, split_thought
from nurture.data.rows import Row
from nurture.data.sources import DataSpec
from nurture.errors import NurtureError
from nurture.evals.measure import Measure, rate
from nurture.evals.replies import reply_of
from nurture.files import atomic_write_text, clear_disk_errors, json_lines, make_directory, whole_json_lines
from nurture.inference.endpoint import EndpointConfig, ask_endpoint
from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.hugging_face import load_model, load_tokenizer
from nurture.progress import progress_bar
from nurture.recipe import Count
from nurture.rewards.check import check_replies
from nurture.runtime import join_processes
from nurture.stages.context import StageConfig, StageContext
from nurture.stages.training import write_result
from nurture.types import Message

log = logging.getLogger(__name__)

VERSION = 1

ROWS = "rows.jsonl"


class Config(StageConfig):
    """Settings of synthetic data."""

    references: ClassVar[tuple[str, ...]] = ("strong", "weak")
    without_effect: ClassVar[tuple[str, ...]] = ("piece",)

    kind: Literal["synthesize"] = "synthesize"
    make: Literal["traces", "no_think", "pairs"] = "traces"
    """traces (thoughts for rows without), no_think (rows without their thoughts), pairs (strong against weak)."""
    data: dict[str, DataSpec]
    """Source name -> where the rows come from."""
    rows: Count = Field(default=1000, gt=0)
    """Most rows taken from each source."""
    first: int = Field(default=30_000, ge=0)
    """Where the world's tasks begin: earlier ones were used by other stages."""

    chosen: Literal["strong", "rows"] = "strong"
    """pairs: the chosen are written by the strong model, or are the demonstrations that the rows hold."""
    strong: str | None = None
    """Stage or checkpoint that writes traces, or the chosen; by default the start."""
    strong_endpoint: EndpointConfig | None = None
    """An endpoint in its place."""
    strong_temperature: NonNegativeFloat = 0.6
    """Of its sampling."""
    weak: str | None = None
    """Stage or checkpoint that writes the rejected; by default the start, at `weak_temperature`."""
    weak_endpoint: EndpointConfig | None = None
    """An endpoint in its place."""
    weak_temperature: NonNegativeFloat = 1.0
    """Of its sampling."""
    thinking: bool | None = None
    """pairs: in which mode both answer; by default the template's own."""
    max_tokens: PositiveInt = 512
    """Longest reply, the thought included."""
    attempts: PositiveInt = 4
    """Times the strong model is asked until a reply passes."""
    unchecked: Literal["keep", "drop"] = "keep"
    """What happens to replies whose answer cannot be checked."""
    rejected_must_fail: bool = False
    """pairs: leave out pairs whose rejected is right, where that can be checked."""
    piece: PositiveInt = 256
    """Rows that are worked on together and kept together."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        for role in ("strong", "weak"):
            if getattr(self, role) is not None and getattr(self, f"{role}_endpoint") is not None:
                raise ValueError(f"give {role} or {role}_endpoint, not both")
        alone = not any((self.strong, self.strong_endpoint, self.weak, self.weak_endpoint))
        alone = alone and self.chosen == "strong"
        if self.make == "pairs" and alone and self.strong_temperature >= self.weak_temperature:
            raise ValueError(
                "the strong and the weak model are both the start: give another, or a lower strong_temperature"
            )
        return self


@dataclass(frozen=True)
class Draft:
    """What a model wrote.

    Attributes:
        thought: None where there is none, or none that ended.
        answer: what follows it.
        finished: it ended by itself.
        tokens: how many were written.
    """

    thought: str | None
    answer: str
    finished: bool
    tokens: int


Author = Callable[[Sequence[Row], Sequence[int]], list[Draft]]
"""author(rows, one seed a row) -> a draft for each."""


@dataclass
class Piece:
    """What became of some rows: the rows made of them, and counts by what happened."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def run(config: Config, context: StageContext) -> None:
    """Write `rows.jsonl` into `context.directory`."""
    processes = join_processes()
    if processes.is_main:
        _synthesize(config, context)
    processes.wait()


def _synthesize(config: Config, context: StageContext) -> None:
    work = {name: _asked(config, context, name) for name in config.data}
    makers = {"traces": _make_traces, "no_think": _make_no_think, "pairs": _make_pairs}
    make = makers[config.make](config, context)
    made: dict[str, Piece] = {}
    with progress_bar(config.make, sum(map(len, work.values())), show=True) as bar:
        for name, rows in work.items():
            made[name] = Piece()
            for piece in _kept(context.directory / "state", name, rows, config.piece, make):
                made[name].rows += piece.rows
                made[name].counts += piece.counts
                bar.advance_to(sum(one.counts["asked"] for one in made.values()), name)
    lines, table = [], {}
    seen: set[str] = set()
    for name, piece in made.items():
        unique = [row for row in piece.rows if not _known(row, seen)]
        table[name] = _yield(piece, len(unique))
        lines += [{**row, "source": name} for row in unique]
    if not lines:
        raise NurtureError(f"stage '{config.name}': nothing was made. {_told(table)}")
    atomic_write_text(context.directory / ROWS, json_lines(lines))
    log.info("%s", _told(table))
    measures: dict[str, Measure] = {}
    for name, counts in table.items():
        kept = [1.0] * counts["kept"] + [0.0] * max(counts["asked"] - counts["kept"], 0)
        measures[f"yield/{name}"] = rate(kept)
    every = max(1, len(lines) // 12)
    write_result(
        context.directory,
        tokens=sum(counts["tokens"] for counts in table.values()),
        before={},
        after=measures,
        samples=lines[::every][:12],
        notes={"make": config.make, "rows": len(lines), "yield": table},
    )


_REASONS = (
    "unfinished",
    "no thought",
    "no answer",
    "wrong",
    "unchecked",
    "refused",
    "equal",
    "rejected is right",
)


def _yield(piece: Piece, kept: int) -> dict[str, int]:
    """Return a line of the table: asked, produced, passed, kept, tokens, and reasons with their counts."""
    columns = {name: piece.counts[name] for name in ("asked", "produced", "passed")}
    reasons = {name: piece.counts[name] for name in _REASONS if piece.counts[name]}
    extra = {name: piece.counts[name] for name in ("chosen passed", "not checked") if piece.counts[name]}
    repeated = len(piece.rows) - kept
    return {
        **columns,
        "repeated": repeated,
        "kept": kept,
        "tokens": piece.counts["tokens"],
        **extra,
        **reasons,
    }


def _told(table: dict[str, dict[str, int]]) -> str:
    parts = []
    for name, counts in table.items():
        words = ", ".join(
            f"{count} {what}" for what, count in counts.items() if count or what in ("asked", "kept")
        )
        parts.append(f"{name}: {words}")
    return "; ".join(parts)


def _known(row: dict[str, Any], seen: set[str]) -> bool:
    """Return whether an equal row was seen before, and remember this one."""
    turns = row.get("messages") or [*row["prompt"], *row["chosen"], *row["rejected"]]
    said = [
        (turn["role"], " ".join(f"{turn.get('reasoning_content', '')} {turn['content']}".split()))
        for turn in turns
    ]
    key = hashlib.sha256(json.dumps([said, row.get("chat_template_kwargs")]).encode()).hexdigest()
    if key in seen:
        return True
    seen.add(key)
    return False


# ---- what is asked, and what was done before ----------------------------------------------------------------------


def _asked(config: Config, context: StageContext, name: str) -> list[Row]:
    """Return the rows of a source that something can be made of; a prompt that was there before counts once."""
    spec = config.data[name]
    stream = context.rows(spec, "train", heldout_every=0, start=config.first)
    wants_thoughts = config.make == "no_think"
    rows, seen = list[Row](), set[str]()
    for row in stream:
        if len(rows) == config.rows:
            break
        has = row.messages is not None and any(holds_thought(turn) for turn in row.messages)
        if wants_thoughts or (config.make == "pairs" and config.chosen == "rows"):
            usable = bool(row.messages) and (has or not wants_thoughts)
        else:
            usable = bool(row.prompt) and not has
        key = json.dumps(
            [list(row.messages or ()) if wants_thoughts else list(row.prompt or ())], default=str
        )
        if usable and key not in seen:
            seen.add(key)
            rows.append(row)
    if not rows:
        what = "with thoughts" if wants_thoughts else "with a prompt and without thoughts"
        what = "with a demonstration" if config.make == "pairs" and config.chosen == "rows" else what
        raise NurtureError(f"stage '{config.name}': source '{name}' ({spec}) has no rows {what}.")
    return rows


def _kept(
    state: Path, name: str, rows: Sequence[Row], size: int, make: Callable[[Sequence[Row], int], Piece]
) -> Iterator[Piece]:
    """Yield what was made of every piece of `rows`: read where it was kept by an earlier try, else made and kept."""
    make_directory(state)
    file = state / f"pieces-{hashlib.sha256(name.encode()).hexdigest()[:12]}.jsonl"
    done = list(whole_json_lines(file))
    first = 0
    for line in done:
        yield Piece(line["rows"], Counter(line["counts"]))
        first = line["end"]
    # A process killed while writing leaves half a line; what is whole is written anew before anything is added.
    atomic_write_text(file, json_lines(done))
    for start in range(first, len(rows), size):
        part = rows[start : start + size]
        piece = make(part, start)
        line = {"end": start + len(part), "rows": piece.rows, "counts": dict(piece.counts)}
        with clear_disk_errors(file), open(file, "a", encoding="utf-8") as out:
            out.write(json_lines([line]))
            out.flush()
            os.fsync(out.fileno())
        yield piece


# ---- who writes ---------------------------------------------------------------------------------------------------


def make_author(
    config: Config, context: StageContext, role: Literal["strong", "weak"], *, thinking: bool | None
) -> Author:
    """Return the author of a role.

    Raises:
        NurtureError: the role is left to a start that there is not.
    """
    temperature = getattr(config, f"{role}_temperature")
    mode = {} if thinking is None else {"enable_thinking": thinking}
    endpoint: EndpointConfig | None = getattr(config, f"{role}_endpoint")
    if endpoint is not None:
        return _endpoint_author(endpoint, mode, config.max_tokens, temperature)
    name = getattr(config, role)
    path = context.start if name is None else context.models[name]
    if path is None:
        raise NurtureError(
            f"stage '{config.name}': nobody writes: give `start`, `{role}` or `{role}_endpoint`."
        )
    return _local_author(path, mode, config.max_tokens, temperature)


def demonstrations(rows: Sequence[Row], seeds: Sequence[int]) -> list[Draft]:
    """Return what the rows themselves hold, as if somebody had written it."""
    drafts = []
    for row in rows:
        reply = row.responses[0][-1] if row.responses else (row.messages or ())[-1]
        thought, answer = reply.get("reasoning_content"), reply.get("content") or ""
        if "</think>" in answer:
            thought, answer = split_thought(answer)
        drafts.append(Draft(thought, answer, True, 0))
    return drafts


def _local_author(path: Path, mode: dict[str, Any], max_tokens: int, temperature: float) -> Author:
    tokenizer = load_tokenizer(path).for_chat()
    model = load_model(path)
    engine = Engine(model, max_batch=128)
    stops = tokenizer.stop_token_ids
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop_token_ids=stops)

    def write(rows: Sequence[Row], seeds: Sequence[int]) -> list[Draft]:
        prompts = [
            tokenizer.encode_prompt(row.prompt or (), **{**row.template_kwargs, **mode}) for row in rows
        ]
        fits = [len(prompt) < model.config.max_position for prompt in prompts]
        asked = [(prompt, seed) for prompt, seed, fit in zip(prompts, seeds, fits, strict=True) if fit]
        completions = iter(
            engine.generate([prompt for prompt, _ in asked], params, [seed for _, seed in asked])
        )
        drafts = []
        for fit in fits:
            if not fit:
                drafts.append(Draft(None, "", False, 0))
                continue
            reply = reply_of(next(completions), tokenizer)
            drafts.append(Draft(*split_thought(reply.text), reply.stopped, reply.tokens))
        return drafts

    return write


def _endpoint_author(
    endpoint: EndpointConfig, mode: dict[str, Any], max_tokens: int, temperature: float
) -> Author:
    if mode and "chat_template_kwargs" not in endpoint.options:
        # vLLM, SGLang and llama.cpp pass these on to the template; servers without modes ignore them.
        endpoint = endpoint.model_copy(update={"options": {**endpoint.options, "chat_template_kwargs": mode}})

    def write(rows: Sequence[Row], seeds: Sequence[int]) -> list[Draft]:
        conversations = [list(row.prompt or ()) for row in rows]
        replies = ask_endpoint(
            endpoint, conversations, max_tokens=max_tokens, temperature=temperature, seeds=seeds
        )
        drafts = []
        for reply in replies:
            thought, answer = split_thought(reply.text)
            ended = reply.finish_reason == "stop"
            drafts.append(Draft(reply.reasoning.strip() or thought, answer, ended, reply.tokens))
        return drafts

    return write


def _seeds(name: str, seed: int, start: int, places: Sequence[int], attempt: int) -> list[int]:
    """Return a seed for each row that depends on its place and the attempt alone, so that a resume draws the same."""
    texts = (f"{name} {seed} {start + place} {attempt}" for place in places)
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") for text in texts]


# ---- what is made -------------------------------------------------------------------------------------------------


def _make_traces(config: Config, context: StageContext) -> Callable[[Sequence[Row], int], Piece]:
    author = make_author(config, context, "strong", thinking=True)

    def make(rows: Sequence[Row], start: int) -> Piece:
        piece = Piece(counts=Counter(asked=len(rows)))
        for place, draft in _first_that_pass(config, context, author, rows, start, piece, wants_thought=True):
            reply: Message = {
                "role": "assistant",
                "reasoning_content": draft.thought or "",
                "content": draft.answer,
            }
            piece.rows.append(_conversation(rows[place], reply, thinking=True))
        return piece

    return make


def _first_that_pass(
    config: Config,
    context: StageContext,
    author: Author,
    rows: Sequence[Row],
    start: int,
    piece: Piece,
    *,
    wants_thought: bool,
) -> list[tuple[int, Draft]]:
    """Ask for every row until a draft passes or the attempts are used up; return (place, draft) in order of rows."""
    passed: dict[int, Draft] = {}
    waiting = list(range(len(rows)))
    for attempt in range(config.attempts if config.chosen == "strong" else 1):
        if not waiting:
            break
        drafts = author(
            [rows[place] for place in waiting], _seeds("strong", context.seed, start, waiting, attempt)
        )
        checked = _checked([rows[place] for place in waiting], drafts, wanted=config.chosen == "strong")
        still = []
        for place, draft, right in zip(waiting, drafts, checked, strict=True):
            piece.counts.update(produced=1, tokens=draft.tokens)
            if reason := _problem(config, draft, right, wants_thought):
                piece.counts[reason] += 1
                still.append(place)
                continue
            piece.counts.update({"passed": 1, "not checked": int(right is None)})
            passed[place] = draft
        waiting = still
    return sorted(passed.items())


def _checked(rows: Sequence[Row], drafts: Sequence[Draft], *, wanted: bool) -> list[bool | None]:
    """Return whether each draft is right; None for all where nobody wants to know, for programs have to be run."""
    return check_replies(rows, [draft.answer for draft in drafts]) if wanted else [None] * len(drafts)


def _problem(config: Config, draft: Draft, right: bool | None, wants_thought: bool) -> str | None:
    """Say why a draft does not pass, None if it does."""
    if not draft.tokens and not draft.answer:
        return "refused"
    if not draft.finished:
        return "unfinished"
    if wants_thought and not draft.thought:
        return "no thought"
    if not draft.answer:
        return "no answer"
    if right is False:
        return "wrong"
    dropped = (
        config.unchecked == "drop" and config.chosen == "strong"
    )  # what a row holds is taken at its word
    return "unchecked" if right is None and dropped else None


def _conversation(row: Row, reply: Message, *, thinking: bool) -> dict[str, Any]:
    """Return a conversation row in one mode; what checks an answer stays with it."""
    record: dict[str, Any] = {
        "messages": [*(dict(turn) for turn in row.prompt or ()), dict(reply)],
        "chat_template_kwargs": {**row.template_kwargs, "enable_thinking": thinking},
    }
    if row.answer is not None:
        record["answer"] = row.answer
    return record


def _make_no_think(config: Config, context: StageContext) -> Callable[[Sequence[Row], int], Piece]:
    def make(rows: Sequence[Row], start: int) -> Piece:
        piece = Piece(counts=Counter(asked=len(rows), produced=len(rows)))
        for row in rows:
            turns = [without_thought(turn) for turn in row.messages or ()]
            if not all(turn["content"] for turn in turns if turn["role"] == "assistant"):
                piece.counts["no answer"] += 1
                continue
            piece.counts["passed"] += 1
            kwargs = {**row.template_kwargs, "enable_thinking": False}
            record = {"messages": [dict(turn) for turn in turns], "chat_template_kwargs": kwargs}
            piece.rows.append(record | ({"answer": row.answer} if row.answer is not None else {}))
        return piece

    return make


def without_thought(turn: Message) -> Message:
    """Return a turn without its thought, wherever it was; a system message that asks for thinking asks for none."""
    stripped: Message = {key: value for key, value in turn.items() if key != "reasoning_content"}  # type: ignore[assignment]
    content = turn.get("content") or ""
    if turn["role"] == "assistant":
        stripped["content"] = split_thought(content)[1] if "think>" in content else content
    elif turn["role"] == "system":
        words = ["/no_think" if word == "/think" else word for word in content.split(" ")]
        stripped["content"] = " ".join(words)
    return stripped


def _make_pairs(config: Config, context: StageContext) -> Callable[[Sequence[Row], int], Piece]:
    strong: Author = demonstrations
    if config.chosen == "strong":
        strong = make_author(config, context, "strong", thinking=config.thinking)
    weak = make_author(config, context, "weak", thinking=config.thinking)

    def make(rows: Sequence[Row], start: int) -> Piece:
        piece = Piece(counts=Counter(asked=len(rows)))
        wants_thought = bool(config.thinking)
        chosen = dict(
            _first_that_pass(config, context, strong, rows, start, piece, wants_thought=wants_thought)
        )
        piece.counts["chosen passed"] = piece.counts.pop("passed", 0)
        places = sorted(chosen)
        if not places:
            return piece
        drafts = weak([rows[place] for place in places], _seeds("weak", context.seed, start, places, 0))
        checked = _checked([rows[place] for place in places], drafts, wanted=config.rejected_must_fail)
        for place, draft, right in zip(places, drafts, checked, strict=True):
            piece.counts.update(produced=1, tokens=draft.tokens)
            if not draft.finished or not draft.answer:
                piece.counts["unfinished" if draft.answer else "no answer"] += 1
            elif (draft.thought, draft.answer) == (chosen[place].thought, chosen[place].answer):
                piece.counts["equal"] += 1
            elif config.rejected_must_fail and right:
                piece.counts["rejected is right"] += 1
            else:
                piece.counts["passed"] += 1
                piece.rows.append(_pair(config, rows[place], chosen[place], draft))
        return piece

    return make


def _pair(config: Config, row: Row, chosen: Draft, rejected: Draft) -> dict[str, Any]:
    kwargs = dict(row.template_kwargs)
    if config.thinking is not None:
        kwargs["enable_thinking"] = config.thinking
    record: dict[str, Any] = {"prompt": [dict(turn) for turn in row.prompt or ()]}
    for name, draft in (("chosen", chosen), ("rejected", rejected)):
        turn = {"role": "assistant", "content": draft.answer}
        if draft.thought:
            turn["reasoning_content"] = draft.thought
        record[name] = [turn]
    return record | ({"chat_template_kwargs": kwargs} if kwargs else {})
