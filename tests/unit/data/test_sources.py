"""Sources: every file kind, the held-out rule, and what is said when nothing is there."""

from __future__ import annotations

import gzip
import io
import json
import logging
from itertools import islice

import pytest

from nurture.data import sources
from nurture.data.rows import Row
from nurture.data.sources import is_endless, read_rows, source_identity, split_spec
from nurture.errors import NurtureError
from nurture.world import World

RECORDS = [{"text": f"document {i} été"} for i in range(5)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def texts(spec, base, **options) -> list[str]:
    return [row.text for row in read_rows(spec, base=base, **{"split": "all", **options})]


def zstd(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor().compress(content)


def parquet(records) -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), out, row_group_size=2)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lambda: LINES),
        ("a.jsonl.gz", lambda: gzip.compress(LINES)),
        ("a.jsonl.zst", lambda: zstd(LINES)),
        ("a.json", lambda: json.dumps(RECORDS).encode()),
        ("a.json", lambda: json.dumps({"data": RECORDS}).encode()),
        ("a.json", lambda: LINES),
        ("a.json.gz", lambda: gzip.compress(LINES)),
        ("a.parquet", lambda: parquet(RECORDS)),
        ("a.jsonl", lambda: LINES.replace(b"\n", b"\n\n")),
    ],
)
def test_record_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content())
    assert texts(name, tmp_path) == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rs", "strange.name"])
def test_text_files_are_one_document(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert texts(name, tmp_path) == ["one\ntwo\n"]


def test_text_files_may_be_compressed(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "b.txt.zst").write_bytes(zstd(b"two"))
    assert texts("a.txt.gz, b.txt.zst", tmp_path) == ["one", "two"]


def test_folders_globs_and_lists(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/deep/3.txt", "a/picture.png", "a/.git/x.txt", "a/empty.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    assert texts("a", tmp_path) == ["a/1.txt", "a/deep/3.txt"]
    assert texts("**/*.txt", tmp_path) == ["a/1.txt", "a/deep/3.txt", "b/2.txt"]
    assert texts("b,a/1.txt", tmp_path) == ["b/2.txt", "a/1.txt"]
    assert texts(str(tmp_path / "b"), tmp_path / "elsewhere") == ["b/2.txt"]


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b"{broken")
    assert len(list(islice(read_rows("a.jsonl", base=tmp_path, split="all"), 5))) == 5


def test_python_files_in_their_own_encoding(tmp_path):
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    assert "é" in texts("a.py", tmp_path)[0]


def test_files_that_are_not_text(tmp_path, caplog):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\xfe")
    (tmp_path / "good.txt").write_text("fine")
    with pytest.raises(NurtureError, match=r"bad\.txt: not UTF-8 text \(byte 3"):
        texts("bad.txt", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert texts("*.txt", tmp_path) == ["fine"]
    assert "1 of 2 files skipped" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", LINES + b"{broken\n", r"a\.jsonl:6: not valid JSON"),
        ("a.jsonl", LINES + b'{"txt": "x"}\n', r"a\.jsonl:6: .*Did you mean 'text'"),
        ("a.jsonl", LINES + b'"x"\n', r"a\.jsonl:6: a row must be a JSON object"),
        ("a.jsonl", LINES + b'{"text": "\xff"}\n', r"a\.jsonl:6: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES * 50)[:-20], r"a\.jsonl\.gz: damaged or cut off"),
        ("a.jsonl.gz", LINES, r"a\.jsonl\.gz: damaged or cut off"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet: not a readable parquet"),
        ("a.jsonl.zst", b"nonsense", r"a\.jsonl\.zst: damaged or cut off"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NurtureError, match=said):
        texts(name, tmp_path)


def test_malformed_parquet_row_is_numbered(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([*RECORDS, {"text": None}]))
    with pytest.raises(NurtureError, match=r"a\.parquet, row 5: key 'text' is null"):
        texts("a.parquet", tmp_path)


def test_nothing_matches(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "moby.txt").write_text("x")
    with pytest.raises(NurtureError, match=r"boks/\*\.txt: no file matches.*Did you mean 'books'"):
        texts("boks/*.txt", tmp_path)
    with pytest.raises(NurtureError, match=r"mobi\.txt: no such file or folder.*Did you mean 'moby\.txt'"):
        texts("books/mobi.txt", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NurtureError, match="no files in this folder"):
        texts("empty", tmp_path)
    (tmp_path / "nothing.jsonl").touch()
    with pytest.raises(NurtureError, match=r"nothing\.jsonl: this file is empty"):
        texts("nothing.jsonl", tmp_path)
    with pytest.raises(NurtureError, match="source is empty"):
        texts(" , ", tmp_path)
    with pytest.raises(NurtureError, match="train, heldout or all, got 'test'"):
        texts("books", tmp_path, split="test")


def test_parts_of_a_source():
    assert split_spec("a.txt, b/*.md") == ["a.txt", "b/*.md"]
    assert split_spec("world:fact,arithmetic,data/x.jsonl") == ["world:fact,arithmetic", "data/x.jsonl"]
    assert is_endless("a.txt,world:web")
    assert not is_endless("a.txt")


# ---- held-out ---------------------------------------------------------------------------------------------------


def test_split_is_disjoint_complete_and_stable(tmp_path):
    records = [{"text": f"text number {i}"} for i in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    train, heldout = (
        texts("a.jsonl", tmp_path, split=split, heldout_every=10) for split in ("train", "heldout")
    )
    assert not set(train) & set(heldout)
    assert set(train) | set(heldout) == {record["text"] for record in records}
    assert 30 < len(heldout) < 90
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, reversed(records[:300]))))
    assert set(texts("b.jsonl", tmp_path, split="heldout", heldout_every=10)) <= set(heldout)


def test_duplicates_in_other_files_are_on_the_same_side(tmp_path):
    copies = [f"copied {i}" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in copies))
    for i, text in enumerate(copies):
        (tmp_path / f"{i}.txt").write_text(text + "\n")
    heldout = [text.strip() for text in texts("a.jsonl,*.txt", tmp_path, split="heldout", heldout_every=5)]
    assert heldout
    assert all(heldout.count(text) == 2 for text in heldout)


def test_identity_follows_the_files(tmp_path):
    def identity() -> dict:
        return source_identity("*.txt", split="train", base=tmp_path)

    (tmp_path / "a.txt").write_text("one")
    first = identity()
    assert identity() == first
    (tmp_path / "b.txt").write_text("two")
    second = identity()
    assert second != first
    (tmp_path / "b.txt").write_text("other")
    assert identity() != second
    assert source_identity("*.txt", split="heldout", base=tmp_path) != identity()
    json.dumps(identity())


# ---- world and hub ----------------------------------------------------------------------------------------------


def test_world_documents_and_tasks():
    first = [row.text for row in islice(read_rows("world:web"), 3)]
    assert len(set(first)) == 3
    assert first == [row.text for row in islice(read_rows("world:web"), 3)]
    assert first != [row.text for row in islice(read_rows("world:web", split="heldout"), 3)]
    row = next(read_rows("world:arithmetic"))
    assert row.messages[-1]["role"] == "assistant"
    assert row.prompt == row.messages[:-1]
    assert row.metadata["kind"] == "arithmetic"
    assert {r.metadata["kind"] for r in islice(read_rows("world:fact,arithmetic"), 6)} == {
        "fact",
        "arithmetic",
    }
    assert next(read_rows("world:tasks:code")).metadata["kind"] == "code"
    assert next(read_rows("world:code")).messages is None


def test_world_settings_change_the_documents():
    texts = {next(read_rows("world:web", world={"seed": seed})).text for seed in range(3)}
    assert len(texts) == 3
    a, b = (source_identity("world:web", split="train", world={"seed": seed}) for seed in (0, 1))
    assert a != b


def test_unknown_part_of_the_world():
    with pytest.raises(NurtureError, match=r"world has no 'webb'\. Did you mean 'web'"):
        next(read_rows("world:webb"))
    with pytest.raises(NurtureError, match="endless"):
        next(read_rows("world:web", split="all"))


def test_hub_datasets_are_streamed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows("hf:org/name:config:part", split="all"))
    assert asked == [(("org/name", "config"), {"split": "part", "streaming": True})]
    assert [row.text for row in rows] == [record["text"] for record in RECORDS]


def test_hub_failures_are_one_message(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(NurtureError, match=r"hf:org/name: cannot be read.*no network"):
        list(read_rows("hf:org/name"))


@pytest.mark.parametrize(
    ("module", "spec"), [("datasets", "hf:a/b"), ("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")]
)
def test_missing_extras_name_the_install_command(monkeypatch, tmp_path, module, spec):
    import sys

    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NurtureError, match=r"pip install 'nurture\[data\]'"):
        list(read_rows(spec, base=tmp_path))


def test_task_row_keeps_what_checks_a_reply():
    world = sources.make_world({"seed": 3})
    row = sources.task_row(world.task("code", "train", 5))
    assert isinstance(row, Row)
    assert row.tests
    assert row.entry_point
    assert row.metadata["task"].kind == "code"


def test_people_answer_the_same_tasks_and_not_always_well():
    world = World(0)
    told = list(islice(read_rows("world:people:fact,code", world=world), 400))
    shown = list(islice(read_rows("world:tasks:fact,code", world=world), 400))
    assert [row.prompt for row in told] == [row.prompt for row in shown]
    assert [row.answer for row in told] == [row.answer for row in shown]
    assert told == list(islice(read_rows("world:people:fact,code", world=world), 400))
    golds = [world.gold_reward(row.metadata["task"], row.responses[0][0]["content"]) for row in told]
    assert min(golds) >= 0, "nobody is rude"
    assert 0.5 < sum(gold < 0.95 for gold in golds) / len(golds) < 0.75


def test_people_play_games_by_the_rules():
    told = list(islice(read_rows("world:people:wordle", world=World(0)), 20))
    assert told == list(islice(read_rows("world:tasks:wordle", world=World(0)), 20))


def test_the_world_in_both_modes():
    world = World(0)
    thinking = list(islice(read_rows("world:think:arithmetic,fact", world=world), 20))
    plain = list(islice(read_rows("world:no_think:arithmetic,fact", world=world), 20))
    shown = list(islice(read_rows("world:tasks:arithmetic,fact", world=world), 20))
    assert [row.prompt for row in thinking] == [row.prompt for row in plain] == [row.prompt for row in shown]
    assert [row.messages for row in plain] == [row.messages for row in shown]
    assert {tuple(row.template_kwargs.items()) for row in thinking} == {(("enable_thinking", True),)}
    assert {tuple(row.template_kwargs.items()) for row in plain} == {(("enable_thinking", False),)}
    assert all(row.messages[-1]["reasoning_content"] == row.metadata["task"].thought for row in thinking)
    without = [{k: v for k, v in row.messages[-1].items() if k != "reasoning_content"} for row in thinking]
    assert without == [row.messages[-1] for row in shown]


def test_only_what_is_worked_out_has_thoughts():
    world = World(0)
    rows = list(islice(read_rows("world:think", world=world), 80))
    assert {row.metadata["kind"] for row in rows} == set(world.worked_kinds)
    assert all(row.messages[-1]["reasoning_content"] for row in rows), "no first guess of a game"
    with pytest.raises(NurtureError, match="nothing to work out in 'story'"):
        next(read_rows("world:think:fact,story", world=world))


def test_a_share_of_the_rows_is_the_same_every_time():
    rows = [Row(text=f"row {number}") for number in range(4000)]
    kept = list(sources.thinned(rows, 0.3))
    assert kept == list(sources.thinned(iter(rows), 0.3))
    assert 0.27 < len(kept) / len(rows) < 0.33
    fewer = sources.thinned(rows, 0.1)
    assert set(map(id, fewer)) < set(map(id, kept)), "a smaller share is part of a larger one"
    assert list(sources.thinned(rows, 1.0)) == rows
