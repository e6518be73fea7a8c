"""Keep evaluation questions out of the training text.

A training document is dropped when it shares a run of `n` consecutive words (13 by default) with an evaluation text:
words in lower case, without punctuation. An evaluation text shorter than that counts as one run of its own length, if
it has at least `shortest` words; shorter ones cannot be told from ordinary language and are reported as unchecked.

Words become 64-bit hashes and runs become polynomials of them, so a document costs a few array operations.

Paper: Brown et al. 2020 (arXiv 2005.14165), appendix C.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from nurture.data.rows import Row
from nurture.errors import NurtureError

_WORD = re.compile(r"\w+")
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass
class DecontaminationReport:
    """What was checked and what was dropped.

    Attributes:
        documents, dropped: training documents seen, and those left out.
        by_set: evaluation set -> documents dropped because of it.
        examples: up to 20 (set, start of the dropped document).
        unchecked: evaluation set -> texts too short to check.
    """

    documents: int = 0
    dropped: int = 0
    by_set: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)
    unchecked: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        sets = ", ".join(f"{name} {count}" for name, count in self.by_set.most_common())
        short = sum(self.unchecked.values())
        return (
            f"{self.dropped} of {self.documents} documents dropped"
            + (f" ({sets})" if sets else "")
            + (f"; {short} evaluation texts are too short to be checked" if short else "")
        )


class Decontaminator:
    """Finds training documents that contain evaluation texts."""

    def __init__(
        self, evaluations: Mapping[str, Iterable[str]] | Iterable[str], *, n: int = 13, shortest: int = 8
    ) -> None:
        """Index the evaluation texts.

        Args:
            evaluations: texts by evaluation set, or just texts.
            n: words in a run.
            shortest: texts of fewer words are not checked.

        Raises:
            NurtureError: `n` or `shortest` make no sense.
        """
        if not 1 <= shortest <= n:
            raise NurtureError(f"decontamination: shortest must be 1 to n ({n}), got {shortest}")
        sets = evaluations if isinstance(evaluations, Mapping) else {"evaluation": evaluations}
        self.n, self.shortest = n, shortest
        self.report = DecontaminationReport()
        self._names = tuple(sets)
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        digest = hashlib.sha256(repr((n, shortest)).encode())
        for index, (name, texts) in enumerate(sets.items()):
            for text in texts:
                words = _words(text)
                digest.update(f"{name}\0{' '.join(words)}\n".encode("utf-8", "replace"))
                size = min(n, len(words))
                if size < shortest:
                    self.report.unchecked[name] += 1
                else:
                    found.setdefault(size, []).append((_runs(_hashes(words), size), index))
        self.fingerprint = digest.hexdigest()
        self._index = {size: _sorted_index(entries) for size, entries in found.items()}

    def matches(self, text: str) -> set[str]:
        """Return the names of the evaluation sets that `text` shares a run of words with."""
        hashes = _hashes(_words(text))
        names: set[str] = set()
        for size, (known, owners) in self._index.items():
            if len(hashes) < size:
                continue
            runs = _runs(hashes, size)
            first, last = (np.searchsorted(known, runs, side=side) for side in ("left", "right"))
            for hit in np.flatnonzero(first < last):
                names.update(self._names[owner] for owner in owners[first[hit] : last[hit]])
        return names

    def filter(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that share nothing with an evaluation text, and keep count in `report`."""
        for row in rows:
            self.report.documents += 1
            names = self.matches(row.text or "")
            if not names:
                yield row
                continue
            self.report.dropped += 1
            self.report.by_set.update(names)
            if len(self.report.examples) < 20:
                self.report.examples.append((min(names), (row.text or "")[:100]))


def evaluation_texts(rows: Iterable[Row]) -> Iterator[str]:
    """Yield what must not be trained on of evaluation rows: the question, or else the text."""
    return (row.identity() for row in rows)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


_KNOWN_WORDS: dict[str, int] = {}


def _hashes(words: list[str]) -> np.ndarray:
    """(words,) uint64, the same in every process."""
    known = _KNOWN_WORDS
    if len(known) > 2_000_000:
        known.clear()
    for word in words:
        if word not in known:
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            known[word] = int.from_bytes(digest, "big")
    return np.fromiter((known[word] for word in words), dtype=np.uint64, count=len(words))


def _runs(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hash of every run of `size` words: the polynomial sum(h[i + j] * m**j) modulo 2**64."""
    count = len(hashes) - size + 1
    total = np.zeros(count, dtype=np.uint64)
    power = 1
    for offset in range(size):
        total += hashes[offset : offset + count] * np.uint64(power)
        power = power * _MULTIPLIER % 2**64
    return total


def _sorted_index(entries: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    runs = np.concatenate([runs for runs, _ in entries])
    owners = np.concatenate([np.full(len(runs), owner) for runs, owner in entries])
    order = np.argsort(runs, kind="stable")
    return runs[order], owners[order]
