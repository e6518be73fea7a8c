"""`nurture eval`: a model measured once, on the world's held-out tasks or on files of standard sets."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nurture.data.rows import Row
from nurture.data.sources import is_endless, read_rows
from nurture.errors import NurtureError, did_you_mean
from nurture.evals.benchmarks import contamination, read_items, score
from nurture.evals.harm_judge import Judge
from nurture.evals.measure import Measure, before_and_after, rate
from nurture.evals.world_card import world_card
from nurture.inference.chat import load_chat_model
from nurture.world import World

_MOST_ROWS = 50_000
"""Rows of an endless source that are looked through."""


def measure_on_world(path: str, world: World, tasks: str | None, limit: int) -> dict[str, Any]:
    """Return the world's report card of a model in the flat shape of a run's report.

    Raises:
        NurtureError: there is no such model or kind of task.
    """
    known = [kind for kind in World.task_kinds if kind != "redteam"]
    kinds = tasks.split(",") if tasks else known
    for kind in kinds:
        if kind not in known:
            hint = did_you_mean(kind, known) or f" Known: {', '.join(known)}."
            if kind == "redteam":
                hint = " Red-team prompts are always asked: leave it out."
            raise NurtureError(f"--tasks {tasks}: there is no kind of task '{kind}'.{hint}")
    started = time.monotonic()
    chat = load_chat_model(path)
    tokenizer = chat.tokenizer.for_chat()
    card = world_card(chat.model, tokenizer, world, kinds=kinds, per_kind=limit, base=chat.is_base)
    return _outcome(path, started, card.measures)


def measure_on_files(
    path: str,
    data: Sequence[Path],
    limit: int,
    *,
    judge: Judge | None = None,
    samples: int = 1,
    max_tokens: int = 256,
    trained_on: Sequence[str] = (),
    world: World | None = None,
) -> dict[str, Any]:
    """Return scores on files in published formats (benchmarks.py), in the flat shape of a run's report.

    Args:
        limit: questions of each file.
        judge: of harm.
        samples: replies to programming tasks and texts to go on with.
        trained_on: data specs to look for the questions in; adds `SET/contaminated`.

    Raises:
        NurtureError: there is no such model, or a file is none of the known sets.
    """
    started = time.monotonic()
    files = {file: read_items(file)[:limit] for file in data}
    chat = load_chat_model(path)
    measures: dict[str, Measure] = {}
    for file, items in files.items():
        found = score(chat, items, judge=judge, samples=samples, max_tokens=max_tokens)
        if trained_on:
            rows = chain.from_iterable(_training_rows(spec, world) for spec in trained_on)
            hit, _ = contamination(items, rows)
            found[f"{items[0].set}/contaminated"] = rate([i in hit for i in range(len(items))])
        if clash := set(found) & set(measures):  # two files of one set
            found = {f"{name}, {file.name}" if name in clash else name: one for name, one in found.items()}
        measures |= found
    return _outcome(path, started, measures)


def _training_rows(spec: str, world: World | None) -> Iterator[Row]:
    rows = read_rows(spec, world=world)
    return islice(rows, _MOST_ROWS) if is_endless(spec) else rows


def _outcome(path: str, started: float, measures: dict[str, Measure]) -> dict[str, Any]:
    seconds = round(time.monotonic() - started, 3)
    metrics = before_and_after({}, measures)
    stage = {"name": "eval", "kind": "eval", "seconds": seconds, "tokens": 0, "metrics": metrics}
    return {"run": path, "seconds": seconds, "stages": [stage]}
