"""Labelling in the terminal: rank sampled answers, or write the answer yourself.

The same rows in the same files as the studio's label page (label.py), so people may use either. Answers that another
labeler has ranked come first, as long as there are any: only answers that two have ranked say how far people agree.
What is typed is a ranking (`B > A = C`), or a command. Reading and printing are passed in, so that everything here can
be tested, and used from elsewhere.

Source: InstructGPT, arXiv 2203.02155, section 3.4 and appendix B.2: K answers side by side, ranked with ties.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from nurture.data.rows import parse_ranking, ranking_text
from nurture.data.sources import make_world, read_rows
from nurture.errors import NurtureError
from nurture.inference.chat import ChatModel
from nurture.pipeline import recall_world
from nurture.rewards.candidates import distinct, sample_candidates
from nurture.studio.label import DEMONSTRATIONS, RANKINGS, open_comparison, save, summary, undo
from nurture.types import Message

HELP = """\
  B > A = C    rank the answers, best first; = for a tie
  w            write the answer you would have given
  s            skip this one
  u            take back the last label
  q            leave (also ctrl-d)"""


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
        for row in rows:
            if row.prompt:
                yield list(row.prompt)
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
    kept: list[tuple[str, str]] = []
    skipped: set[str] = set()
    show(HELP)
    try:
        while True:
            question = _others_question(run, labeler, skipped) or next(questions, None)
            if question is None:
                break
            if len(question.responses) < 2:
                continue
            show(_laid_out(question))
            answered = _one_label(run, labeler, question, kept, read, show)
            if not answered:
                skipped.add(repr(question.prompt))
    except (EOFError, _Leave):
        pass
    show(_progress(run, labeler))
    return len(kept)


class _Leave(Exception):
    """The labeler is done."""


def _one_label(
    run: Path,
    labeler: str,
    question: Question,
    kept: list[tuple[str, str]],
    read: Callable[[str], str],
    show: Callable[[str], None],
) -> bool:
    """Read lines until the question is labelled (True) or skipped (False)."""
    while True:
        line = read("ranking> ").strip()
        command = line.lower()
        if command in ("q", "quit"):
            raise _Leave
        if command in ("s", "skip"):
            return False
        if command in ("u", "undo"):
            if kept:
                undo(run, *kept.pop())
                show(f"taken back; {_progress(run, labeler)}")
            else:
                show("nothing of this session is left to take back")
            continue
        identity = secrets.token_hex(8)
        about = {"id": identity, "labeler": labeler}
        if command in ("w", "write"):
            reply = read("your answer> ").strip()
            if reply:
                said = [*question.prompt, {"role": "assistant", "content": reply}]
                save(run, DEMONSTRATIONS, {"messages": said, **about})
                kept.append((DEMONSTRATIONS, identity))
                show(f"saved; {_progress(run, labeler)}. Now rank, or s to go on.")
            continue
        if command in ("", "?", "h", "help"):
            show(HELP)
            continue
        try:
            ranking = parse_ranking(line.upper(), len(question.responses), "your ranking")
        except NurtureError as error:
            show(str(error))
            continue
        record = {
            "prompt": question.prompt,
            "responses": question.responses,
            "ranking": ranking_text(ranking),
        }
        save(run, RANKINGS, {**record, "model": question.model, **about})
        kept.append((RANKINGS, identity))
        show(f"saved; {_progress(run, labeler)}")
        return True


def _others_question(run: Path, labeler: str, skipped: set[str]) -> Question | None:
    found: dict[str, Any] | None = open_comparison(run, labeler)
    if found is None or repr(found["prompt"]) in skipped:
        return None
    return Question(found["prompt"], found["responses"], str(found.get("model", "")))


def _laid_out(question: Question) -> str:
    lines = [f"\n{turn['role']}: {turn.get('content', '')}" for turn in question.prompt]
    lines += [f"\n  [{chr(65 + index)}] {text}" for index, text in enumerate(question.responses)]
    return "\n".join(lines) + "\n"


def _progress(run: Path, labeler: str) -> str:
    """Say how much there is, and how far labelers agree."""
    facts = summary(run)
    mine = facts["rankings"].get(labeler, 0), facts["demonstrations"].get(labeler, 0)
    text = f"{mine[0]} rankings and {mine[1]} demonstrations by {labeler}"
    text += f", {sum(facts['rankings'].values())} rankings in all"
    agreed = facts["agreement"]
    if agreed["pairs"]:
        text += f"; labelers agree on {agreed['ordered']:.0%} of {agreed['pairs']} pairs (InstructGPT's: 73%)"
    return text
