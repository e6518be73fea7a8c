"""The first step of a run that starts from nothing: a tokenizer made for its text.

Reads up to `sample_bytes` of text, an equal share from every source, and learns the merges; or copies the tokenizer
of a checkpoint (`path`). It leaves the tokenizer's files in its folder and has no model. The pipeline puts this step
before the first stage; recipes set it up in their `tokenizer` section.

Balanced shares matter: with the raw proportions of a web-heavy mixture, a second language and code would be spelled
out almost byte by byte. The sign of a bad sample is a source with far fewer bytes per token than the others, which
`result.json` reports as `bytes_per_token/SOURCE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nurture import files
from nurture.data.sources import DataSpec
from nurture.stages.context import StageConfig, StageContext

VERSION = 1
_CHECKED_BYTES = 200_000


class Config(StageConfig):
    """Settings of the tokenizer step."""

    sources: dict[str, DataSpec] = {}
    """Where the text comes from: name -> spec."""
    vocab_size: int = 2048
    """Number of token ids, special tokens included."""
    path: str | None = None
    """Copy the tokenizer of this checkpoint instead of training one."""
    sample_bytes: int = 20_000_000
    """Bytes of text the merges are learned from, all sources together."""


def run(config: Config, context: StageContext) -> None:
    """Train or copy the tokenizer into the step's folder."""
    from nurture.tokenizer import Tokenizer

    if config.path is not None:
        tokenizer = Tokenizer.load(config.path)
        texts: dict[str, list[str]] = {}
    else:
        share = config.sample_bytes // max(1, len(config.sources))
        texts = {name: list(_sample(spec, share, context)) for name, spec in config.sources.items()}
        tokenizer = Tokenizer.train((text for part in texts.values() for text in part), config.vocab_size)
    tokenizer.save(context.directory)
    metrics: dict[str, dict[str, float]] = {"vocab_size": {"after": tokenizer.vocab_size}}
    for name, part in texts.items():
        text = "".join(_within(part, _CHECKED_BYTES))
        ratio = len(text.encode()) / max(1, len(tokenizer.encode(text)))
        metrics[f"bytes_per_token/{name}"] = {"after": round(ratio, 3)}
    files.atomic_write_json(context.directory / "result.json", {"tokens": 0, "metrics": metrics})


def _sample(spec: DataSpec, limit: int, context: StageContext) -> Iterator[str]:
    """Yield texts of one source until `limit` bytes."""
    return _within((row.text for row in context.rows(spec, "train") if row.text), limit)


def _within(texts: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        if seen >= limit:
            return
        seen += len(text.encode())
        yield text
