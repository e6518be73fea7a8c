"""Files are whole or absent, and a manifest tells a complete folder from any other."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from nurture import files
from nurture.errors import NurtureError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    files.atomic_write_json(path, {"a": 1})

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        files.atomic_write(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot write here")]
)
def test_a_full_disk_is_one_clear_message(tmp_path: Path, code: int, words: str):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(temporary: Path) -> None:
        temporary.write_text("part")
        raise OSError(code, "no")

    with pytest.raises(NurtureError, match=words):
        files.atomic_write(path, full)
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path: Path):
    with pytest.raises(NurtureError, match=r"cannot be made \(File name too long\)"):
        files.make_directory(tmp_path / ("x" * 300))


def test_manifest_finds_missing_short_and_changed_files(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("text")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "s").write_text("not part of the result")
    files.write_manifest(tmp_path, fingerprint="f")
    manifest = files.read_manifest(tmp_path)
    assert manifest is not None
    assert (manifest["fingerprint"], sorted(manifest["files"])) == ("f", ["a", "b", "c"])
    assert files.manifest_problems(tmp_path, manifest, checksums=True) == []
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("longer text")
    (tmp_path / "c").write_text("tExt")
    by_size = files.manifest_problems(tmp_path, manifest)
    assert len(by_size) == 2
    assert "missing" in by_size[0]
    assert "11 bytes, the manifest says 4" in by_size[1]
    assert "checksum differs" in files.manifest_problems(tmp_path, manifest, checksums=True)[2]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": {"size": 1}}}', "\x00"]
)
def test_an_unreadable_manifest_is_named(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(NurtureError) as failure:
        files.read_manifest(tmp_path)
    assert str(failure.value).startswith(str(tmp_path / "manifest.json"))


def test_whole_json_lines_stop_at_half_a_line_and_not_at_odd_characters(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    assert list(files.whole_json_lines(path)) == []
    path.write_text('{"reply": "a\u2028b\x85c"}\n{"reply": "d"}\n{"repl', encoding="utf-8")
    assert list(files.whole_json_lines(path)) == [{"reply": "a\u2028b\x85c"}, {"reply": "d"}]


def test_sha256():
    assert files.sha256_file.__doc__
    path = Path(__file__)
    import hashlib

    assert files.sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_in_the_way_of_a_folder(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(NurtureError, match="a file is in the way of a folder"):
        files.make_directory(tmp_path / "runs" / "x")
    with pytest.raises(NurtureError, match="a file is in the way of a folder"):
        files.make_directory(tmp_path / "runs")
