"""Plain files that are either whole or absent.

Everything a run leaves on disk is written to a temporary neighbour, flushed to the device and renamed, so that a
process killed at any instant leaves the old file or the new one and never half of either. A finished folder is
described by `manifest.json`, written last: where it is present and its sizes and checksums agree, the folder is
complete. A full disk becomes one clear message. What a manifest *means* for a run is pipeline.py's business.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nurture.errors import NurtureError

MANIFEST = "manifest.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors that a disk, a quota or a limit on a file's size (`ulimit -f`) gives when it is reached."""
_CHUNK = 1 << 20


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a read-only disk met while writing `path` into one clear message.

    Raises:
        NurtureError: in place of such an OSError; every other error passes through.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise NurtureError(
                f"{path}: the disk is full ({error.strerror}). Nothing complete was lost: free some space (`nurture "
                f"doctor` shows how much there is) and run the same command again to go on."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NurtureError(
                f"{path}: cannot write here ({error.strerror}). Choose a folder you may write with --out."
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise NurtureError(
                f"{path}: a file is in the way of a folder. Move it, or choose another folder with --out."
            ) from error
        raise


def make_directory(path: Path) -> Path:
    """Create `path` and its parents if absent and return it.

    Raises:
        NurtureError: a file is in the way, or the place cannot be written.
    """
    with clear_disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP):
                raise
            raise NurtureError(
                f"{path}: this folder cannot be made ({error.strerror}). Choose another place."
            ) from error
    return path


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` produce a file beside `path`, then move it into place in one step.

    Raises:
        NurtureError: the disk is full or not writable; `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with clear_disk_errors(path):
        try:
            write(temporary)
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        # Without this the rename itself may be lost in a power cut.
        _flush(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_lines(rows: Iterable[Any]) -> str:
    """Return the text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path: Path, remedy: str = "") -> Any:
    """Read the JSON file `path`.

    Raises:
        NurtureError: it is not readable JSON; the message names the place in the file and ends with `remedy`.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise NurtureError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). {remedy}".rstrip()
        ) from error
    except UnicodeDecodeError as error:
        raise NurtureError(
            f"{path}: not text ({error.reason} at byte {error.start}). {remedy}".rstrip()
        ) from error
    except OSError as error:
        raise NurtureError(f"{path}: cannot be read ({error.strerror}). {remedy}".rstrip()) from error


def whole_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file up to the first line that is none; nothing if there is no file.

    A process killed while appending leaves half a line at the end.
    """
    if not path.exists():
        return
    # Not splitlines(): text may hold characters that Python takes for ends of lines and JSON does not.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(directory: Path, *, skip: tuple[str, ...] = ("state",), **facts: Any) -> None:
    """Declare `directory` complete: flush its files and write their sizes and checksums, and `facts`, last of all.

    Args:
        skip: names at the top of the folder that do not belong to the result.
        facts: further JSON values kept in the manifest (fingerprint, kind, seconds).
    """
    files = {}
    for path in _files(directory, skip):
        _flush(path)
        files[path.relative_to(directory).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": sha256_file(path),
        }
    atomic_write_json(directory / MANIFEST, {**facts, "files": files})


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished folder, or None where there is none.

    Raises:
        NurtureError: there is one and it cannot be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    whole = isinstance(listed, dict) and all(
        isinstance(facts, dict) and {"size", "sha256"} <= facts.keys() for facts in listed.values()
    )
    if not whole:
        raise NurtureError(f"{path}: not a manifest (no 'files' with their sizes and checksums in it).")
    return manifest


def manifest_problems(directory: Path, manifest: dict[str, Any], *, checksums: bool = False) -> list[str]:
    """Return what differs between a folder and its manifest, one line a file; empty when they agree.

    Args:
        checksums: also read every file and compare its sha256. Without it only presence and sizes are compared.
    """
    problems = []
    for name, facts in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != facts["size"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, the manifest says {facts['size']}")
        elif checksums and sha256_file(path) != facts["sha256"]:
            problems.append(f"{path}: its content changed since the stage finished (checksum differs)")
    return problems


def _files(directory: Path, skip: tuple[str, ...]) -> list[Path]:
    """Return the files of a finished folder in a fixed order: no manifest, no temporary leftovers, none of `skip`."""
    found = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        leftover = path.name.startswith(".") and path.name.endswith(".tmp")
        if path.is_file() and not leftover and relative.parts[0] not in (*skip, MANIFEST):
            found.append(path)
    return found


def _flush(path: Path) -> None:
    """Force a file or folder onto the device. Folders cannot be opened for this on every platform; that is fine."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
