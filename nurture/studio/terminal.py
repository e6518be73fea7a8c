"""Labelling in the terminal: rank sampled answers, or write the answer yourself.

The same rows in the same files as the studio's label page (label.py), so people may use either. Answers that another
labeler has ranked come first, as long as there are any: only answers that two have ranked say how far people agree.
What is typed is a ranking (`B > A = C`, or for short `ba=c`), or a command. Taking a label back asks its question
again. Every label is on the disk before the next question. Reading and printing are passed in, so that everything here
can be tested, and used from elsewhere.

Source: InstructGPT, arXiv 2203.02155, section 3.4 and appendix B.2: K answers side by side, ranked with ties.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from nurture.data.rows import parse_ranking, ranking_text
from nurture.data.sources import make_world, read_rows
from nurture.errors import NurtureError
from nurture.inference.chat import ChatModel
from nurture.pipeline import recall_world
from nurture.rewards.candidates import distinct, sample_candidates
from nurture.studio.label import (
    DEMONSTRATIONS,
    RANKINGS,
    comparison_key,
    open_comparison,
    save,
    summary,
    undo,
)
from nurture.types import Message

with suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  # arrow keys, for whoever passes `input` as `read`

HELP = """\
  b > a = c    rank the answers, best first; = for a tie (for short: ba=c)
  w            write the answer you would have given
  s            skip this one
  u            take back the last label and look at it again
  q            leave (also ctrl-d, ctrl-c); every label is saved at once"""


@dataclass(frozen=True)
class Question:
    """A prompt and answers to it, to be ranked.

    Attributes:
        prompt: the turns before the reply.
        responses: distinct answers, in random order.
        model: who wrote them, for the row.
    """

    prompt: list[Message]
    responses: list[str]
    model: str


def draw_prompts(run: Path, spec: str | None, seed: int) -> Iterator[list[Message]]:
    """Yield prompts without end in random order: of a source of rows, or of the run's world.

    Raises:
        NurtureError: the source holds no prompt.
    """
    rng = Random(seed)
    if spec is None or spec.startswith("world:"):
        world = make_world(recall_world(run / "model"))
        rows = read_rows(spec or "world:tasks", split="train", world=world, start=rng.randrange(100_000))
        first = next(rows)
        if not first.prompt:  # the rows of a source of the world are all alike, and have no end
            raise NurtureError(
                f"--prompts {spec}: these are documents, without prompts; world:tasks has some."
            )
        yield list(first.prompt)
        yield from (list(row.prompt) for row in rows if row.prompt)
        return
    prompts = [list(row.prompt) for row in read_rows(spec, split="all", base=Path.cwd()) if row.prompt]
    if not prompts:
        raise NurtureError(f"--prompts {spec}: no row there has a prompt.")
    while True:
        yield from rng.sample(prompts, len(prompts))


def ask_models(
    models: Sequence[ChatModel],
    prompt: list[Message],
    *,
    count: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Question:
    """Return a prompt with `count` answers, taken from the models in turns; equal ones count once."""
    found = []
    for place, chat in enumerate(models):
        share = len(range(place, count, len(models)))
        tokenizer = chat.tokenizer.for_chat()
        if share:
            found += sample_candidates(
                chat.model, tokenizer, [prompt], count=share, max_tokens=max_tokens, temperature=temperature,
                seed=seed + place, author=chat.name,
            )[0]  # fmt: skip
    found = distinct(found)
    Random(seed).shuffle(found)
    texts = list(dict.fromkeys(candidate.text for candidate in found))
    return Question(prompt, texts, ", ".join(chat.name for chat in models))


def label(
    run: Path,
    labeler: str,
    questions: Iterator[Question],
    *,
    read: Callable[[str], str],
    show: Callable[[str], None],
) -> int:
    """Ask until the labeler leaves; return how many labels were kept.

    Args:
        run: its `labels/` folder gets the rows.
        questions: new ones; asked only once what others have ranked is done.
        read: shows a prompt and returns a line; raises EOFError at the end of the input.
        show: prints text.

    Raises:
        NurtureError: the disk is full or not writable. What was labelled before is kept.
    """
    kept: list[_Label] = []
    waiting, skipped = list[Question](), set[str]()
    show(HELP)
    try:
        while True:
            question = waiting.pop() if waiting else None
            question = question or _others_question(run, labeler, skipped) or next(questions, None)
            if question is None:
                break
            if len(question.responses) < 2:
                continue
            show(_laid_out(question))
            outcome = _one_label(run, labeler, question, kept, read, show)
            if isinstance(outcome, Question):
                waiting += [question, outcome]
            elif outcome == "skipped":
                skipped.add(comparison_key(vars(question)))
    except (EOFError, KeyboardInterrupt, _Leave):
        pass
    show(f"\n{_progress(run, labeler)}")
    if kept:
        rows = run / "labels" / RANKINGS
        show(f"Every row is kept. To learn from them: nurture reward --model MODEL --data {rows}")
    return len(kept)


class _Leave(Exception):
    """The labeler is done."""


@dataclass(frozen=True)
class _Label:
    """A row that was saved in this session, and the question it is about."""

    file: str
    identity: str
    question: Question


def _one_label(
    run: Path,
    labeler: str,
    question: Question,
    kept: list[_Label],
    read: Callable[[str], str],
    show: Callable[[str], None],
) -> Question | Literal["ranked", "skipped"]:
    """Read lines until the question is ranked or skipped, or another is to be asked again."""
    while True:
        line = read("ranking> ").strip()
        command = line.lower()
        if command in ("q", "quit"):
            raise _Leave
        if command in ("s", "skip"):
            return "skipped"
        if command in ("u", "undo"):
            if not kept:
                show("nothing of this session is left to take back")
                continue
            taken = kept.pop()
            undo(run, taken.file, taken.identity)
            show(f"taken back; {_progress(run, labeler)}")
            if taken.question is not question:
                return taken.question
            continue
        about = {"id": secrets.token_hex(8), "labeler": labeler}
        if command in ("w", "write"):
            if reply := _written(read):
                said = [*question.prompt, {"role": "assistant", "content": reply}]
                save(run, DEMONSTRATIONS, {"messages": said, **about})
                kept.append(_Label(DEMONSTRATIONS, about["id"], question))
                show(f"saved; {_progress(run, labeler)}. Now rank, or s to go on.")
            continue
        if command in ("", "?", "h", "help"):
            show(HELP)
            continue
        try:
            ranking = parse_ranking(_spelled_out(line), len(question.responses), "your ranking")
        except NurtureError as error:
            show(str(error))
            continue
        record = {
            "prompt": question.prompt,
            "responses": question.responses,
            "ranking": ranking_text(ranking),
        }
        save(run, RANKINGS, {**record, "model": question.model, **about})
        kept.append(_Label(RANKINGS, about["id"], question))
        show(f"saved; {_progress(run, labeler)}")
        return "ranked"


def _written(read: Callable[[str], str]) -> str:
    """Read the lines of an answer up to an empty one."""
    lines = [read("your answer, an empty line ends it> ")]
    while lines[-1].strip():
        lines.append(read("> "))
    return "\n".join(lines).strip()


def _spelled_out(line: str) -> str:
    """Return a ranking with every > written: "ba=c" is "B > A = C"."""
    return re.sub(r"(?<=[A-Z])\s*(?=[A-Z])", " > ", line.upper())


def _others_question(run: Path, labeler: str, skipped: set[str]) -> Question | None:
    found = open_comparison(run, labeler, skipped)
    if found is None:
        return None
    return Question(found["prompt"], found["responses"], str(found.get("model", "")))


def _laid_out(question: Question) -> str:
    lines = [f"\n{turn['role']}: {turn.get('content', '')}" for turn in question.prompt]
    lines += [f"\n  [{chr(65 + index)}] {text}" for index, text in enumerate(question.responses)]
    return "\n".join(lines) + "\n"


def _progress(run: Path, labeler: str) -> str:
    """Say how much there is, and how far labelers agree."""
    facts = summary(run)
    rankings, demonstrations = (facts[kind].get(labeler, 0) for kind in ("rankings", "demonstrations"))
    text = f"{_counted(rankings, 'ranking')} and {_counted(demonstrations, 'demonstration')} by {labeler}"
    if others := sum(facts["rankings"].values()) - rankings:
        text += f", {_counted(others, 'ranking')} by others"
    agreed = facts["agreement"]
    if agreed["pairs"]:
        pairs = _counted(agreed["pairs"], "pair")
        text += f"; labelers agree on {agreed['ordered']:.0%} of {pairs} (InstructGPT's: 73%)"
    return text


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
