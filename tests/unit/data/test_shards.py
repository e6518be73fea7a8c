"""Shards: exact content, reused when nothing changed, never half written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from nurture.data import shards
from nurture.data.decontaminate import Decontaminator
from nurture.data.shards import Shard, build_shard, shard_source
from nurture.errors import NurtureError
from nurture.tokenizer import Tokenizer

TEXTS = [f"Document {i} tells of été and 東京, {i * 37} times." for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def test_content(tokenizer, tmp_path):
    shard = build_shard("web", [*TEXTS, ""], tokenizer, tmp_path)
    assert shard.document_count == len(TEXTS)
    for index in (0, 7, 299):
        assert shard.document(index).tolist() == [
            tokenizer.document_token_id,
            *tokenizer.encode(TEXTS[index]),
        ]
    assert shard.tokens.dtype == np.uint16
    assert isinstance(shard.tokens, np.memmap)
    assert shard.document_starts.dtype == np.int64
    assert shard.token_count == shard.document_starts[-1] == shard.document_lengths.sum()
    assert shard.byte_count == sum(len(text.encode()) for text in TEXTS)
    assert shard.byte_count == tokenizer.token_byte_lengths[np.asarray(shard.tokens)].sum()


def test_chunks_do_not_show(tokenizer, tmp_path, monkeypatch):
    whole = build_shard("web", TEXTS, tokenizer, tmp_path / "a")
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 500)
    pieces = build_shard("web", iter(TEXTS), tokenizer, tmp_path / "b")
    assert np.array_equal(whole.tokens, pieces.tokens)
    assert np.array_equal(whole.document_starts, pieces.document_starts)


@pytest.mark.parametrize("chunk", [100, 2_000_000])
def test_limits_stop_after_the_document_that_reaches_them(tokenizer, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", chunk)
    lengths = [1 + len(ids) for ids in tokenizer.encode_batch(TEXTS)]
    endless = (TEXTS[i % 300] for i in range(10**9))
    shard = build_shard("web", endless, tokenizer, tmp_path, max_tokens=sum(lengths[:20]) - 1)
    assert shard.document_count == 20
    sizes = [len(text.encode()) for text in TEXTS]
    endless = (TEXTS[i % 300] for i in range(10**9))
    shard = build_shard("web", endless, tokenizer, tmp_path, max_bytes=sum(sizes[:31]) + 1)
    assert shard.document_count == 32


def test_reuse_and_key(tokenizer, tmp_path):
    calls = []

    def texts():
        calls.append(1)
        return TEXTS

    first = build_shard("web", texts, tokenizer, tmp_path, identity="v1")
    again = build_shard("web", texts, tokenizer, tmp_path, identity="v1")
    assert len(calls) == 1
    assert again.fingerprint == first.fingerprint
    build_shard("web", texts, tokenizer, tmp_path, identity="v2")
    build_shard("web", texts, tokenizer, tmp_path, identity="v1", max_tokens=100)
    build_shard("web", texts, Tokenizer.train(TEXTS, 290), tmp_path, identity="v1")
    assert len(calls) == 4


def test_lists_are_their_own_identity(tokenizer, tmp_path):
    first = build_shard("web", TEXTS, tokenizer, tmp_path)
    assert build_shard("web", list(TEXTS), tokenizer, tmp_path).fingerprint == first.fingerprint
    assert build_shard("web", TEXTS[1:], tokenizer, tmp_path).fingerprint != first.fingerprint


def test_iterators_are_always_read(tokenizer, tmp_path):
    assert build_shard("web", iter(TEXTS), tokenizer, tmp_path).document_count == 300
    assert build_shard("web", iter(TEXTS[:9]), tokenizer, tmp_path).document_count == 9


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "record"])
def test_damaged_shards_are_named_and_built_again(tokenizer, tmp_path, damage, caplog):
    build_shard("web", TEXTS, tokenizer, tmp_path)
    (directory,) = tmp_path.iterdir()
    tokens = directory / "tokens.bin"
    if damage == "cut":
        os.truncate(tokens, 100)
    elif damage == "flip":
        content = bytearray(tokens.read_bytes())
        content[50] ^= 1
        tokens.write_bytes(content)
    elif damage == "missing":
        (directory / "document_starts.npy").unlink()
    else:
        record = directory / "meta.json"
        record.write_text(record.read_text().replace('"byte_count": 1', '"byte_count": 2'))
    with pytest.raises(NurtureError, match="delete the folder"):
        Shard.open(directory)
    rebuilt = build_shard("web", TEXTS, tokenizer, tmp_path)
    assert "Building it again" in caplog.text
    assert rebuilt.document_count == 300


def test_interrupt_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 200)

    def texts():
        yield from TEXTS[:50]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shard("web", texts, tokenizer, tmp_path, identity="v1")
    assert list(tmp_path.iterdir()) == []
    assert build_shard("web", TEXTS, tokenizer, tmp_path, identity="v1").document_count == 300


def test_kill_leaves_nothing_that_is_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    program = f"""
        from pathlib import Path
        from nurture.data.shards import build_shard
        from nurture.tokenizer import Tokenizer
        def texts():
            for i in range(10**9):
                yield f"document {{i}} " * 50
        build_shard("web", texts, Tokenizer.load({str(tmp_path / "tokenizer")!r}), Path({str(tmp_path / "shards")!r}), identity=1)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=Path(shards.__file__).parents[2]
    )
    deadline = time.monotonic() + 60
    while not any(f.stat().st_size for f in (tmp_path / "shards").glob(".*/tokens.bin")):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [p.name[0] for p in (tmp_path / "shards").iterdir()] == [
        "."
    ]  # half a shard, under a temporary name
    shard = build_shard("web", TEXTS, tokenizer, tmp_path / "shards", identity=1)
    assert shard.document_count == 300
    assert [p.name[0] for p in (tmp_path / "shards").iterdir()] == ["w"]  # the leftover is gone


def test_full_disk(tokenizer, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(NurtureError, match="disk is full"):
        build_shard("web", TEXTS, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_text(tokenizer, tmp_path):
    with pytest.raises(NurtureError, match="source 'web' holds no text"):
        build_shard("web", ["", ""], tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 3000)
    seen = []
    shard = build_shard("web", TEXTS, tokenizer, tmp_path, progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == (shard.token_count, shard.byte_count)


def test_shard_of_a_source(tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "data" / f"{i}.txt").write_text(text)
    options = {"base": tmp_path, "heldout_every": 10}
    train = shard_source("web", "data/*.txt", tokenizer, tmp_path / "cache", **options)
    heldout = shard_source("web", "data/*.txt", tokenizer, tmp_path / "cache", split="heldout", **options)
    assert train.document_count + heldout.document_count == 300
    assert heldout.document_count > 5
    (tmp_path / "data" / "0.txt").write_text("changed content here")
    changed = shard_source("web", "data/*.txt", tokenizer, tmp_path / "cache", **options)
    assert changed.fingerprint != train.fingerprint


def test_endless_sources_need_a_limit(tokenizer, tmp_path):
    with pytest.raises(NurtureError, match="never ends"):
        shard_source("web", "world:web", tokenizer, tmp_path)
    shard = shard_source("web", "world:web", tokenizer, tmp_path, max_tokens=500)
    assert 500 <= shard.token_count < 2000


def test_decontaminated_source(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "{i} one two three four five six"}}\n' for i in range(9))
    )
    options = {"base": tmp_path, "heldout_every": 0}
    plain = shard_source("web", "a.jsonl", tokenizer, tmp_path / "cache", **options)
    decontaminator = Decontaminator(["3 one two three"], n=4, shortest=4)
    clean = shard_source(
        "web", "a.jsonl", tokenizer, tmp_path / "cache", decontaminator=decontaminator, **options
    )
    assert (plain.document_count, clean.document_count) == (9, 8)
    assert decontaminator.report.dropped == 1
