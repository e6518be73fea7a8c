"""Pipelines of datatrove that clean text: rules, a language, a classifier, decontamination, near-duplicates.

datatrove (github huggingface/datatrove) made FineWeb. Here stand the readers and filters it is given and the order of
the steps; `stages/prepare.py` runs them on this machine, and datatrove's Slurm or Ray executors run the same lists on a
cluster. Its word tokenizers load models of languages; ours is a pattern, so nothing is downloaded.

Sources: Gopher's rules, arXiv 2112.11446, appendix A; FineWeb's rules and FineWeb-Edu's classifier, arXiv 2406.17557;
MinHash: Broder 1997, in bands as Leskovec et al., Mining of Massive Datasets, section 3.4.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.pipeline.filters.lambda_filter import LambdaFilter
from datatrove.pipeline.readers.jsonl import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from nurture.data.decontaminate import Decontaminator
from nurture.data.sources import read_rows
from nurture.errors import NurtureError

COMMON_WORDS: dict[str, tuple[str, ...]] = {
    "en": tuple("the of and to in is that for it with as was on be by".split()),
    "de": tuple("der die und das ist nicht ein zu den mit von auf eine sich dem".split()),
    "fr": tuple("le la les et des est une dans que qui pour du pas sur au".split()),
    "es": tuple("el la los que del y en las por una con se para es como".split()),
    "it": tuple("il di che la e non per una sono con del della si dei nel".split()),
    "pt": tuple("o de que e do da em um para com uma os no se na".split()),
    "nl": tuple("de het een van en dat niet op te zijn voor met die aan ook".split()),
}
"""Words that no text of some length in a language does without."""

Pipelines = dict[str, tuple[list[Any], int]]
"""Step -> (pipeline, number of tasks); a step needs the one before it complete."""


class Words(WordTokenizer):
    """Words and punctuation by pattern."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words and signs of `text`."""
        return re.findall(r"\w+|[^\w\s]+", text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Return its sentences."""
        return re.split(r"(?<=[.!?])\s+", text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return where its sentences begin and end."""
        return [match.span() for match in re.finditer(r"\S.*?(?:[.!?](?=\s)|$)", text, re.DOTALL)]


class Rows(PipelineStep):
    """Reads a task's files by nurture's own readers, so every format that a stage reads."""

    type = "READER"
    name = "rows"

    def __init__(self, units: Sequence[tuple[str, str]], base: Path) -> None:
        """Keep (source, what is read at a time), which are dealt out to the tasks."""
        super().__init__()
        self.units, self.base = list(units), base

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of this task."""
        for source, spec in self.units[rank::world_size]:
            for number, row in enumerate(read_rows(spec, split="all", base=self.base)):
                if row.text:
                    self.stat_update("documents")
                    yield Document(row.text, f"{spec}/{number}", metadata={"source": source})


def pipelines(
    reader: PipelineStep, filters: Sequence[BaseFilter], work: Path, tasks: int, *, drop_duplicates: bool
) -> Pipelines:
    """Return what has to be run, in order; the documents that stay are in `work/kept/SOURCE/`."""
    write_kept = JsonlWriter(str(work / "kept"), "${source}/${rank}.jsonl.gz")
    if not drop_duplicates:
        return {"filter": ([reader, *filters, write_kept], tasks)}
    settings = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    passed, signatures, matches, removals = (
        str(work / name) for name in ("passed", "signatures", "matches", "removals")
    )
    read = JsonlReader(passed, glob_pattern="*.jsonl.gz")
    return {
        "filter": ([reader, *filters, JsonlWriter(passed)], tasks),
        "sign": ([read, MinhashDedupSignature(signatures, settings, language=Words())], tasks),
        "match": ([MinhashDedupBuckets(signatures, matches, config=settings)], settings.num_buckets),
        "cluster": ([MinhashDedupCluster(matches, removals, config=settings)], 1),
        "keep": ([read, MinhashDedupFilter(removals), write_kept], tasks),
    }


def build_filters(
    removed: Path,
    *,
    rules: Sequence[str],
    shortest: int,
    language: str | None,
    evaluations: Mapping[str, Sequence[str]],
    score: Callable[[list[str]], Sequence[float]] | None,
    threshold: float,
) -> list[BaseFilter]:
    """Return the filters in the order of what they cost, each named; what one removes goes to `removed/NAME`.

    Args:
        rules: of repetition, quality, lines.
        shortest: words of the shortest document that quality keeps.
        language: the one that is kept.
        evaluations: texts by evaluation set, none of which may be in a document.
        score: the classifier.
        threshold: its least score that is kept.
    """
    words = Words()
    # "the, be, to, of ..." are English: of other languages only the remaining rules of quality can be asked.
    stop_words = 2 if language in (None, "en") else 0
    known: dict[str, Callable[..., BaseFilter]] = {
        "repetition": partial(GopherRepetitionFilter, language=words),
        "quality": partial(GopherQualityFilter, shortest, min_stop_words=stop_words, language=words),
        "lines": partial(FineWebQualityFilter, language=words),
    }
    makers: dict[str, Callable[..., BaseFilter]] = {}
    if language:
        makers["language"] = partial(LambdaFilter, lambda doc: language_of(doc.text) == language)
    makers |= {name: known[name] for name in rules}
    if evaluations:
        seen = Decontaminator(evaluations)
        makers["evaluation"] = partial(LambdaFilter, lambda doc: not seen.matches(doc.text))
    if score is not None:
        makers["classifier"] = partial(LambdaFilter, lambda doc: score([doc.text])[0] >= threshold)
    filters = []
    for name, make in makers.items():
        filters.append(make(exclusion_writer=JsonlWriter(str(removed / name))))
        filters[-1].stats.name = name
    return filters


def classifier(name: str) -> Callable[[list[str]], Sequence[float]]:
    """Return the function `module:function`.

    Raises:
        NurtureError: there is none.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError) as error:
        raise NurtureError(
            f"classifier '{name}': {error}. Write module:function, a function that takes a list of texts and returns a "
            f"score for each, and have the module on PYTHONPATH."
        ) from error


def language_of(text: str, least: float = 0.08) -> str | None:
    """Return the language whose commonest words make up most of `text`; None where no language's are frequent."""
    words = re.findall(r"\w+", text.lower())
    counts = Counter(words)
    shares = {
        language: sum(counts[word] for word in common) / max(1, len(words))
        for language, common in COMMON_WORDS.items()
    }
    best = max(shares, key=lambda language: shares[language])
    return best if shares[best] >= least else None
