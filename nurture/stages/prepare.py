"""Prepare raw text for pretraining: rules, a language, a quality classifier, decontamination, near-duplicates.

Input: sources of text (`data`), as any stage reads them. Output: `NAME.jsonl.gz` for each, which later stages read as
`stage:prepare/NAME.jsonl.gz` and tokenise into shards (`data/shards.py`). No model is trained. The work is pipelines
of datatrove (github huggingface/datatrove), which made FineWeb: files are dealt out to `tasks`, a finished task is
never done again, and its Slurm and Ray executors run the same `pipelines` on a cluster.

    rules        Gopher's of quality and repetition (arXiv 2112.11446, appendix A), FineWeb's of lines (2406.17557)
    language     the one whose commonest words are the most frequent; a better judge can be given as a classifier
    classifier   `module:function`, texts -> scores; FineWeb-Edu keeps what educates at 3 of 5 and more
    without      documents that share 13 words in a row with an evaluation text (`data/decontaminate.py`)
    duplicates   MinHash of 5-word shingles in 14 bands of 8: a pair of similarity 0.8 is found with 92 %

Main failure mode: rules made for English prose throw out code, poems and other languages: read `result.json`, which
counts what every rule removed, and `removed.jsonl`, which shows some of it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from nurture.data.decontaminate import evaluation_texts
from nurture.data.sources import DataSpec, find_files, is_endless, split_spec
from nurture.errors import NurtureError
from nurture.files import atomic_write_text, clear_disk_errors, json_lines, make_directory
from nurture.runtime import join_processes
from nurture.stages.context import StageConfig, StageContext
from nurture.stages.training import write_result

log = logging.getLogger(__name__)

VERSION = 1

SHOWN = 50
"""Removed documents that are shown for each reason."""


class Config(StageConfig):
    """Settings of preparing text."""

    without_effect: ClassVar[tuple[str, ...]] = ("workers",)

    kind: Literal["prepare"] = "prepare"
    data: dict[str, DataSpec]
    """Source name -> where its text comes from."""
    rules: tuple[Literal["repetition", "quality", "lines"], ...] = ("repetition", "quality", "lines")
    """Gopher's repetition and quality rules, FineWeb's rules about lines."""
    shortest: PositiveInt = 50
    """Words of the shortest document that the quality rules keep."""
    language: Literal["en", "de", "fr", "es", "it", "pt", "nl"] | None = None
    """Keep this language only; by default all."""
    classifier: str | None = None
    """`module:function`: given a list of texts, returns a score for each."""
    threshold: float = 3.0
    """Least score that is kept."""
    without: dict[str, DataSpec] = {}
    """Evaluation sets: name -> where their rows are; documents that contain any of them are dropped."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to near-duplicates, over all sources; of each group one document stays."""
    tasks: PositiveInt = 16
    """Parts that the files are dealt out to; each is done again as a whole if it was interrupted."""
    workers: PositiveInt | None = None
    """Processes that work on them; by default one a core."""


def run(config: Config, context: StageContext) -> None:
    """Write `NAME.jsonl.gz` for every source into `context.directory`."""
    processes = join_processes()
    if processes.is_main:
        _prepare(config, context)
    processes.wait()


def _prepare(config: Config, context: StageContext) -> None:
    work = context.directory / "state"
    make_directory(work)
    with clear_disk_errors(context.directory):
        for step, (pipeline, tasks) in _steps(config, context, work).items():
            _execute(pipeline, tasks, config.workers, work / "logs" / step)
            counts = _counts(work / "logs")
            if not any(file for folder in ("passed", "kept") for file in (work / folder).rglob("*.gz")):
                raise NurtureError(
                    f"stage '{config.name}': no document passed ({_told(counts)}). Loosen rules, language or "
                    f"threshold, and delete {work}."
                )
        kept = {
            name: _join(work / "kept" / name, context.directory / f"{name}.jsonl.gz") for name in config.data
        }
    _show_removed(work / "removed", context.directory / "removed.jsonl")
    counts |= {f"kept/{name}": count for name, count in kept.items()}
    write_result(context.directory, tokens=0, before={}, after={}, samples=[], notes={"documents": counts})
    log.info("%s", _told(counts))


def _steps(config: Config, context: StageContext, work: Path) -> dict[str, tuple[list[Any], int]]:
    """Return the pipelines that do what is configured.

    Raises:
        NurtureError: datatrove is not installed, or a source or the classifier is not there.
    """
    try:
        from nurture.data import web
    except ImportError as error:
        raise NurtureError(
            f"the stage prepare needs datatrove ({error}): pip install 'nurture[web]'"
        ) from error
    units = [unit for name, spec in config.data.items() for unit in _units(name, spec, context.base)]
    filters = web.build_filters(
        work / "removed",
        rules=config.rules,
        shortest=config.shortest,
        language=config.language,
        evaluations={
            name: list(evaluation_texts(context.rows(spec, "all"))) for name, spec in config.without.items()
        },
        score=web.classifier(config.classifier) if config.classifier else None,
        threshold=config.threshold,
    )
    reader, tasks = web.Rows(units, context.base), min(config.tasks, len(units))
    return web.pipelines(reader, filters, work, tasks, drop_duplicates=config.duplicates == "drop")


def _units(name: str, spec: str, base: Path) -> Iterator[tuple[str, str]]:
    """Yield (source, what is read at a time): every file, or a data set of the hub as a whole."""
    if is_endless(spec):
        raise NurtureError(f"source '{name}' ({spec}) is made, not found: there is nothing to prepare.")
    for part in split_spec(spec):
        if part.startswith("hf:"):
            yield name, part
        else:
            yield from ((name, str(file)) for file in find_files(part, base))


def _execute(pipeline: list[Any], tasks: int, workers: int | None, logs: Path) -> None:
    """Run a pipeline to its end; tasks that were finished before are not done again."""
    from datatrove.executor import LocalPipelineExecutor

    count = min(tasks, workers or len(os.sched_getaffinity(0)))
    with contextlib.redirect_stderr(io.StringIO()):  # it tells its progress there; the logs have all of it
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=count, logging_dir=str(logs)).run()


def _counts(logs: Path) -> dict[str, int]:
    """Return how many documents were read, and how many each filter removed, over all tasks."""
    counts: Counter[str] = Counter()
    for file in sorted(logs.glob("*/stats/*.json")):
        for step in json.loads(file.read_text(encoding="utf-8")):
            name = step["name"].rsplit(": ", 1)[-1]
            for key, value in step["stats"].items():
                total = int(value["total"] if isinstance(value, dict) else value)
                if key == "documents" and name == "rows":
                    counts["read"] += total
                elif key == "dropped":
                    counts[f"removed/{'duplicate' if 'MinHash' in name else name}"] += total
                elif key.startswith("dropped_"):
                    counts[f"removed/{name}/{key.removeprefix('dropped_')}"] += total
    return dict(sorted(counts.items()))


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "there was none"


def _join(folder: Path, target: Path) -> int:
    """Lay the files of all tasks one after the other into `target`; return the number of documents."""
    files = sorted(folder.glob("*.jsonl.gz")) if folder.is_dir() else []
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("wb") as out:
        for file in files:
            with file.open("rb") as part:  # gzip files one after the other are a gzip file
                shutil.copyfileobj(part, out)
    temporary.rename(target)
    with gzip.open(target, "rb") as lines:
        return sum(1 for _ in lines)


def _show_removed(folder: Path, target: Path) -> None:
    """Write a few removed documents for every reason."""
    shown = []
    for file in sorted(folder.rglob("*.jsonl.gz")):
        reason = file.relative_to(folder).parts[0]
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line, _ in zip(lines, range(SHOWN)):
                row = json.loads(line)
                why = row.get("metadata", {}).get("filter_reason", "")
                shown.append({"reason": reason, "why": why, "text": row["text"][:500]})
    atomic_write_text(target, json_lines(shown))
