"""Documents, tokenised once: a shard is a file of token ids that is mapped into memory, not read.

A document is stored as [E] + its tokens, E being the tokenizer's document token; documents follow one another, so
the E after a document is also the label that says "the document ends here". Beside the tokens stand the start of
every document and the number of bytes of text, which makes bits per byte exact.

A shard is keyed by everything its content depends on: the identity of the source, the split, the limits, the
tokenizer and this code. It is built in a temporary folder and renamed when complete, so a killed process leaves
nothing that is ever loaded. A shard that does not match its own record is reported and built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nurture.data import sources
from nurture.data.rows import Row
from nurture.errors import NurtureError
from nurture.files import atomic_write_json, clear_disk_errors, make_directory, read_json
from nurture.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nurture.data.decontaminate import Decontaminator
    from nurture.world import World

FORMAT = 1
"""Raised when the layout of a shard changes, so that old ones are built again."""

_TOKENS, _STARTS, _META = "tokens.bin", "document_starts.npy", "meta.json"
_CHUNK_BYTES = 2_000_000
_CHECKSUM_LIMIT = (
    256_000_000  # bytes; larger token files are checked by size only, as reading them takes long
)
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""progress(tokens, bytes of text) so far."""


class NoTextError(NurtureError):
    """A source has no text in the split that was asked for."""


@dataclass(frozen=True)
class Shard:
    """The tokenised documents of one source.

    Attributes:
        name: the source's name.
        tokens: (total,) uint16 or uint32, mapped from the file.
        document_starts: (documents + 1,) int64, offsets into `tokens`; the last is the total.
        byte_count: bytes of text in all documents.
        fingerprint: key of the shard: equal fingerprints mean equal content.
    """

    name: str
    tokens: np.ndarray
    document_starts: np.ndarray
    byte_count: int
    fingerprint: str

    @property
    def token_count(self) -> int:
        """Number of tokens, the document tokens included."""
        return len(self.tokens)

    @property
    def document_count(self) -> int:
        """Number of documents."""
        return len(self.document_starts) - 1

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """(documents,) int64."""
        return np.diff(self.document_starts)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, its document token first."""
        return self.tokens[self.document_starts[index] : self.document_starts[index + 1]]

    @classmethod
    def from_documents(cls, name: str, documents: Sequence[Sequence[int]], *, byte_count: int = 0) -> Shard:
        """Return a shard in memory; `documents` hold their document tokens already."""
        starts = np.cumsum([0, *map(len, documents)]).astype(np.int64)
        tokens = np.concatenate(
            [np.asarray(d, dtype=np.uint32) for d in documents] or [np.zeros(0, np.uint32)]
        )
        return cls(
            name, tokens, starts, byte_count, hashlib.sha256(tokens.tobytes() + starts.tobytes()).hexdigest()
        )

    @classmethod
    def open(cls, directory: Path) -> Shard:
        """Map a shard that was built before.

        Raises:
            NurtureError: a file is missing, cut off, or not what the shard's record says.
        """
        remedy = "delete the folder; it is built again from the source"
        meta = read_json(directory / _META, remedy)
        if not isinstance(meta, dict) or meta.get("check") != _check(meta):
            raise NurtureError(f"{directory / _META}: the record is damaged; {remedy}")
        for name, facts in meta["files"].items():
            file = directory / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["size"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise NurtureError(f"{file}: {found}, expected {facts['size']}; {remedy}")
            if size <= _CHECKSUM_LIMIT and _crc32(file) != facts["crc32"]:
                raise NurtureError(f"{file}: damaged (its checksum differs); {remedy}")
        starts = np.load(directory / _STARTS, allow_pickle=False)
        dtype = np.dtype(meta["dtype"])
        count = meta["files"][_TOKENS]["size"] // dtype.itemsize
        tokens = np.memmap(directory / _TOKENS, dtype=dtype, mode="r") if count else np.zeros(0, dtype)
        return cls(meta["name"], tokens, starts, meta["byte_count"], meta["fingerprint"])


def shard_source(
    name: str,
    spec: str,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    split: sources.Split = "train",
    base: Path = Path("."),
    max_tokens: int | None = None,
    max_bytes: int | None = None,
    heldout_every: int = sources.HELDOUT_EVERY,
    world: World | Mapping[str, Any] | None = None,
    decontaminator: Decontaminator | None = None,
    progress: Progress | None = None,
) -> Shard:
    """Return the shard of a source (see sources.py for `spec`), built only if it is not there yet.

    Raises:
        NurtureError: the source is wrong, is endless without a limit, or the disk is full.
    """
    if max_tokens is None and max_bytes is None and sources.is_endless(spec):
        raise NurtureError(f"source '{name}' ({spec}) never ends; give it a limit in tokens or bytes")
    where = {"split": split, "base": base, "heldout_every": heldout_every, "world": world}
    identity: dict[str, Any] = sources.source_identity(spec, **where)  # type: ignore[arg-type]
    if decontaminator is not None:
        identity["without"] = decontaminator.fingerprint

    def rows() -> Iterator[Row]:
        found = sources.read_rows(spec, **where)  # type: ignore[arg-type]
        return decontaminator.filter(found) if decontaminator else found

    return build_shard(
        name,
        rows,
        tokenizer,
        directory,
        max_tokens=max_tokens,
        max_bytes=max_bytes,
        identity=identity,
        progress=progress,
    )


def build_shard(
    name: str,
    texts: Iterable[str | Row] | Callable[[], Iterable[str | Row]],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    max_tokens: int | None = None,
    max_bytes: int | None = None,
    identity: Any = None,
    progress: Progress | None = None,
) -> Shard:
    """Tokenise `texts` into a shard under `directory`, or return the one that is already there.

    Args:
        texts: documents, or a function that starts reading them (called only if they are needed).
        max_tokens, max_bytes: stop after the document that reaches this many.
        identity: JSON value that stands for the content of `texts`; without it the texts of a list are hashed, and
            an iterator is always tokenised again.
        progress: called with (tokens, bytes) after every chunk.

    Raises:
        NurtureError: there is no text, or the disk is full.
    """
    if identity is None and isinstance(texts, Sequence):
        identity = hashlib.sha256("\0".join(map(_text, texts)).encode("utf-8", "replace")).hexdigest()
    key = json.dumps([FORMAT, name, identity, max_tokens, max_bytes, tokenizer.fingerprint], sort_keys=True)
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    safe_name = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:60]
    final = Path(directory) / f"{safe_name}-{fingerprint[:16]}"
    if identity is not None and final.is_dir():
        try:
            return Shard.open(final)
        except NurtureError as error:
            _log.warning("%s. Building it again.", error)
            shutil.rmtree(final, ignore_errors=True)
    make_directory(Path(directory))
    _remove_leftovers(Path(directory))
    temporary = Path(directory) / f".{safe_name}-{fingerprint[:16]}.tmp-{os.getpid()}"
    try:
        with clear_disk_errors(final):
            temporary.mkdir()
            documents = texts() if callable(texts) else texts
            writer = _Writer(name, fingerprint, tokenizer, temporary, max_tokens, max_bytes, progress)
            writer.write(documents)
            _move_into_place(temporary, final, replace=identity is None)
    finally:  # also on Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)
    return Shard.open(final)


class _Writer:
    """Tokenises chunk by chunk: one thread encodes (without the GIL) while the next chunk is read or generated."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        tokenizer: Tokenizer,
        directory: Path,
        max_tokens: int | None,
        max_bytes: int | None,
        progress: Progress | None,
    ) -> None:
        self._meta = {"name": name, "fingerprint": fingerprint, "format": FORMAT}
        self._tokenizer = tokenizer
        self._directory = directory
        self._limits = (max_tokens or 2**62, max_bytes or 2**62)
        self._progress = progress
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
        self._lengths: list[int] = []
        self._tokens = self._bytes = self._crc32 = 0

    def write(self, documents: Iterable[str | Row]) -> None:
        with (self._directory / _TOKENS).open("wb") as file, ThreadPoolExecutor(1) as pool:
            pending: Future[list[np.ndarray]] | None = None
            sizes: list[int] = []
            full = False
            for chunk in _chunks(documents):
                ahead = pool.submit(self._encode, chunk)
                if pending is not None:
                    full = self._append(pending.result(), sizes, file)
                pending, sizes = ahead, [len(text.encode()) for text in chunk]
                if full or self._bytes + sum(sizes) >= self._limits[1]:
                    break
            if pending is not None and not full:
                self._append(pending.result(), sizes, file)
            file.flush()
            os.fsync(file.fileno())
        if not self._lengths:
            raise NoTextError(f"source '{self._meta['name']}' holds no text")
        self._finish()

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        document = self._tokenizer.document_token_id
        return [np.array([document, *ids], self._dtype) for ids in self._tokenizer.encode_batch(texts)]

    def _append(self, encoded: list[np.ndarray], sizes: list[int], file: Any) -> bool:
        """Write whole documents up to the limits; return whether one is reached."""
        kept = []
        for tokens, size in zip(encoded, sizes, strict=True):
            if self._tokens >= self._limits[0] or self._bytes >= self._limits[1]:
                break
            kept.append(tokens)
            self._lengths.append(len(tokens))
            self._tokens += len(tokens)
            self._bytes += size
        if kept:
            content = np.concatenate(kept).tobytes()
            self._crc32 = zlib.crc32(content, self._crc32)
            file.write(content)
        if self._progress:
            self._progress(self._tokens, self._bytes)
        return self._tokens >= self._limits[0] or self._bytes >= self._limits[1]

    def _finish(self) -> None:
        starts = self._directory / _STARTS
        with starts.open("wb") as file:
            np.save(file, np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64))
            file.flush()
            os.fsync(file.fileno())
        tokens = {"size": self._tokens * self._dtype.itemsize, "crc32": self._crc32}
        meta = {
            **self._meta,
            "dtype": self._dtype.name,
            "byte_count": self._bytes,
            "files": {_TOKENS: tokens, _STARTS: {"size": starts.stat().st_size, "crc32": _crc32(starts)}},
        }
        atomic_write_json(self._directory / _META, {**meta, "check": _check(meta)})


def _chunks(documents: Iterable[str | Row]) -> Iterator[list[str]]:
    """Yield lists of texts, small at first, then of about `_CHUNK_BYTES`. Empty documents are left out."""
    chunk: list[str] = []
    size, limit = 0, _CHUNK_BYTES // 32
    for document in documents:
        text = _text(document)
        if not text:
            continue
        chunk.append(text)
        size += len(text)
        if size >= limit:
            yield chunk
            chunk, size, limit = [], 0, min(2 * limit, _CHUNK_BYTES)
    if chunk:
        yield chunk


def _text(document: str | Row) -> str:
    return document if isinstance(document, str) else document.text or ""


def _check(meta: Mapping[str, Any]) -> str:
    body = {key: value for key, value in meta.items() if key != "check"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _move_into_place(temporary: Path, final: Path, *, replace: bool) -> None:
    if replace and final.is_dir():
        shutil.rmtree(final)
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.is_dir():  # otherwise another process built the same shard meanwhile
            raise


def _remove_leftovers(directory: Path) -> None:
    """Delete temporary folders of processes that are gone."""
    for leftover in directory.glob(".*.tmp-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid() and not _is_running(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
