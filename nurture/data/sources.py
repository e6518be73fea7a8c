"""Where rows come from: files, hub datasets and the embedded world, all as one stream of `Row`s.

A source is written as one string:

    world:web                         documents of the embedded world (endless)
    world:tasks, world:tasks:fact,code   its tasks (all, or some kinds) with a demonstration (endless)
    world:people, world:people:fact   the same, demonstrated by people who are not always to the point (endless)
    world:think, world:no_think:fact  the tasks in a mode of the chat template, with worked thoughts or none (endless)
    corpus.jsonl, books/, src/**/*.py    files, folders and globs; .gz and .zst are unpacked on the way
    hf:org/name[:config[:split]]      a hub dataset, streamed
    stage:NAME[/FILE]                 in a recipe: what an earlier stage wrote, rows.jsonl if no file is named

Several, separated by commas, are read one after the other. A text file of any kind is one document; .jsonl, .json and
.parquet hold one row a record. Nothing is kept in memory but the record at hand.

Held-out rows are chosen by the sha256 of what they ask (or of their text): one in `heldout_every`. The choice needs
no list, never changes when files are added or reordered, and puts duplicates on the same side. The world has a split
of its own, by people, facts and problems.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NewType

from nurture.data.rows import Row, parse_rows
from nurture.errors import NurtureError, did_you_mean
from nurture.types import Message

if TYPE_CHECKING:
    from nurture.world import World

DataSpec = NewType("DataSpec", str)
"""A source as it is written in a recipe. A stage's setting of this type (`dict[str, DataSpec]`) is checked before
anything runs, and the stage runs again when the files change; `StageContext.rows` takes nothing else."""

Split = Literal["train", "heldout", "all"]

HELDOUT_EVERY = 50
"""One row in this many is held out."""

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .html .htm .xml .csv .tsv .py .pyi .rs .go .java .kt .scala .c .h .cc .cpp .hpp .cu"
    " .cs .js .jsx .ts .tsx .rb .php .swift .sh .sql .lua .jl .r .hs .ml .el .lisp .toml .yaml .yml .ini".split()
)
_COMPRESSED = (".gz", ".zst")
_log = logging.getLogger(__name__)


def read_rows(
    spec: str,
    *,
    split: Split = "train",
    base: Path = Path("."),
    heldout_every: int = HELDOUT_EVERY,
    world: World | Mapping[str, Any] | None = None,
    start: int = 0,
) -> Iterator[Row]:
    """Yield the rows of a source.

    Args:
        spec: what to read; see the module's docstring.
        split: "train", "heldout" or "all".
        base: folder that relative paths start from.
        heldout_every: one row in this many is held out; 0 holds out nothing.
        world: the world (or its settings) that `world:` sources are taken from.
        start: where an endless source begins, so that a stage can read what no earlier one has.

    Raises:
        NurtureError: nothing is there, or a file or row is malformed; always naming file and line.
    """
    if split not in ("train", "heldout", "all"):
        raise NurtureError(f"split must be train, heldout or all, got {split!r}")
    for part in split_spec(spec):
        if part.startswith("world:"):
            yield from _world_rows(part.removeprefix("world:"), split, world, start)
            continue
        rows = _hub_rows(part.removeprefix("hf:")) if part.startswith("hf:") else _file_rows(part, base)
        for row in rows:
            if split == "all" or row.is_heldout(heldout_every) == (split == "heldout"):
                yield row


def thinned(rows: Iterable[Row], share: float) -> Iterator[Row]:
    """Yield about `share` of the rows, chosen by a hash of their content: the same ones every time, in their order."""
    for row in rows:
        said = f"share\n{row.identity()}\n{row.text}\n{row.messages}\n{row.responses}"
        digest = hashlib.sha256(said.encode("utf-8", "replace")).digest()
        if int.from_bytes(digest[:8], "big") < share * 2**64:
            yield row


def check_shares(shares: Mapping[str, float], data: Mapping[str, str]) -> None:
    """Raise ValueError, which the reading of a recipe reports, if a share is of no source of `data`."""
    if unknown := set(shares) - set(data):
        raise ValueError(f"shares names '{sorted(unknown)[0]}', which is no source of data")


def split_spec(spec: str) -> list[str]:
    """Return the parts of a comma-separated source; words after `world:` that are no paths stay with it.

    Raises:
        NurtureError: the source is empty.
    """
    parts: list[str] = []
    for piece in (piece.strip() for piece in spec.split(",")):
        if parts and parts[-1].startswith("world:") and piece.replace("-", "").replace("_", "").isalnum():
            parts[-1] += f",{piece}"
        elif piece:
            parts.append(piece)
    if not parts:
        raise NurtureError("the source is empty; give a path, a glob, hf:ORG/NAME or world:SOURCE")
    return parts


def is_endless(spec: str) -> bool:
    """Return whether the source never ends, so that the caller must limit it."""
    return any(part.startswith("world:") for part in split_spec(spec))


def source_identity(
    spec: str,
    *,
    split: Split,
    base: Path = Path("."),
    heldout_every: int = HELDOUT_EVERY,
    world: World | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a JSON value that changes whenever the rows may: paths, sizes and times of files; the world's code."""
    parts: list[Any] = []
    for part in split_spec(spec):
        if part.startswith("world:"):
            parts.append([part, _world_settings(world), _world_code()])
        elif part.startswith(("hf:", "stage:")):  # an earlier stage is identified by its own fingerprint
            parts.append([part])
        else:
            files = ((file, file.stat()) for file in find_files(part, base))
            parts.append([[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in files])
    return {"parts": parts, "split": split, "heldout_every": heldout_every}


# ---- files ------------------------------------------------------------------------------------------------------


def find_files(pattern: str, base: Path = Path(".")) -> list[Path]:
    """Return the files of a path, folder or glob, sorted.

    Raises:
        NurtureError: nothing matches; the message names the nearest thing that exists.
    """
    path = base / Path(pattern).expanduser()
    if path.is_file():
        if not path.stat().st_size:
            raise NurtureError(f"{path}: this file is empty")
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _kind(file) is not None]
        if not found:
            raise NurtureError(f"{path}: no files in this folder that hold text or rows")
        return sorted(file for file in found if not _hidden(file.relative_to(path)))
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    files = [match for match in matches if match.is_file()]
    if not files:
        raise NurtureError(_no_match(path, is_glob=glob.has_magic(str(path)), folders=len(matches)))
    return files


def _kind(file: Path) -> str | None:
    """Return "text", "records", "parquet" or None, from the name without its compression suffix."""
    name = file.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(RECORD_SUFFIXES):
        return "records"
    return "text" if name.endswith(TEXT_SUFFIXES) else None


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _no_match(path: Path, *, is_glob: bool, folders: int) -> str:
    if folders:
        return f"{path}: matches {folders} folders but no file; end the pattern with /** or /*.txt"
    parent = path
    missing = path.name
    while not parent.exists() and parent != parent.parent:
        missing, parent = parent.name, parent.parent
    inside = [child.name for child in parent.iterdir()] if parent.is_dir() else []
    what = "no file matches" if is_glob else "no such file or folder"
    hint = did_you_mean(missing, inside)
    return f"{path}: {what}; the nearest folder that exists is {parent}.{hint}"


def _file_rows(pattern: str, base: Path) -> Iterator[Row]:
    files = find_files(pattern, base)
    skipped: list[str] = []
    for file in files:
        kind = _kind(file) or "text"
        if kind == "parquet":
            yield from _parquet_rows(file)
        elif kind == "records":
            yield from _record_rows(file)
        else:
            try:
                yield from _text_rows(file)
            except _NotText as error:
                if len(files) == 1:
                    raise NurtureError(str(error)) from error
                skipped.append(str(error))
    if skipped:
        _log.warning("%d of %d files skipped, not text; the first: %s", len(skipped), len(files), skipped[0])


class _NotText(Exception):
    """A file that is not text. One among many is skipped with a warning, a single one is an error."""


def _text_rows(file: Path) -> Iterator[Row]:
    with _opened(file) as stream:
        content = stream.read()
    text = _decode(content, file)
    if text.strip():
        yield Row(text=text, metadata={"path": str(file)})


def _decode(content: bytes, file: Path) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = _decode_python(content) if ".py" in file.suffixes else ""
        if not text:
            raise _NotText(f"{file}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    if "\0" in text[:4096]:
        raise _NotText(f"{file}: not text (it holds zero bytes)")
    return text.replace("\r\n", "\n")


def _decode_python(content: bytes) -> str:
    """Python files may declare another encoding in their first lines."""
    import tokenize

    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return ""


def _record_rows(file: Path) -> Iterator[Row]:
    with _opened(file) as stream:
        if file.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json"):
            yield from _json_rows(stream.read(), file)
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield from parse_rows(_parse_json(line, f"{file}:{number}"), f"{file}:{number}")


def _json_rows(content: bytes, file: Path) -> Iterator[Row]:
    """A .json file: a list of records, an object that holds one, a single record, or lines after all."""
    try:
        value = json.loads(content)
    except ValueError:
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                yield from parse_rows(_parse_json(line, f"{file}:{number}"), f"{file}:{number}")
        return
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(value) == 1 and lists else [value]
    for number, record in enumerate(value if isinstance(value, list) else [value]):
        yield from parse_rows(record, f"{file}, row {number}")


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise NurtureError(f"{where}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    except ValueError as error:
        raise NurtureError(f"{where}: not valid JSON ({error})") from error


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise NurtureError(f"{file}: reading parquet needs pyarrow: pip install 'nurture[data]'") from error
    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=512):
                for record in batch.to_pylist():
                    yield from parse_rows(record, f"{file}, row {number}")
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise NurtureError(f"{file}: not a readable parquet file ({error})") from error


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked. Damaged archives and unreadable files become one clear message."""
    try:
        with file.open("rb") as raw:
            if file.suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw))
            elif file.suffix == ".zst":
                yield io.BufferedReader(
                    _zstandard(file).ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                )
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise NurtureError(f"{file}: damaged or cut off ({error}); copy it again") from error
    except OSError as error:
        raise NurtureError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):
            raise NurtureError(f"{file}: damaged or cut off ({error}); copy it again") from error
        raise


def _zstandard(file: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise NurtureError(f"{file}: reading .zst needs zstandard: pip install 'nurture[data]'") from error
    return zstandard


# ---- hub --------------------------------------------------------------------------------------------------------


def _hub_rows(spec: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise NurtureError(f"hf:{spec}: hub datasets need `datasets`: pip install 'nurture[data]'") from error
    name, config, split = [*spec.split(":"), "", ""][:3]
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, record in enumerate(dataset):
            yield from parse_rows(record, f"hf:{spec}, row {number}")
    except NurtureError:
        raise
    except Exception as error:  # the library raises many kinds, down to plain network errors
        raise NurtureError(
            f"hf:{spec}: cannot be read from the hub ({type(error).__name__}: {error}). Check the name, the config and"
            " the network; local copies work as paths"
        ) from error


# ---- the world --------------------------------------------------------------------------------------------------


def _world_rows(
    names: str, split: Split, world: World | Mapping[str, Any] | None, start: int
) -> Iterator[Row]:
    if split == "all":
        raise NurtureError(f"world:{names}: endless, so there is no 'all'; ask for train or heldout")
    built = make_world(world)
    sources = (*built.sources, *built.more_sources)
    kinds = task_kinds(names, built)
    if names in sources:  # `code` is a source and a kind of task; tasks:code is the task
        for text in built.documents(names, split, start):
            yield Row(text=text)
    elif set(kinds) <= {*built.task_kinds, *built.drill_kinds}:
        yield from _task_rows(built, kinds, split, start, voice_of(names))
    else:
        unknown = next(kind for kind in kinds if kind not in (*built.task_kinds, *built.drill_kinds))
        hint = did_you_mean(unknown, [*sources, *built.task_kinds, *VOICES])
        raise NurtureError(
            f"world:{names}: the world has no '{unknown}'.{hint} It has the sources {', '.join(sources)} and the"
            f" tasks {', '.join(built.task_kinds)}"
        )


VOICES = ("tasks", "people", "think", "no_think")
"""How the world's tasks are demonstrated: perfectly, as people do, and perfectly in a mode of the chat template."""


def task_kinds(names: str, world: World) -> tuple[str, ...]:
    """Return the kinds that a world source names: those it lists, else all (for `think` all that are worked out)."""
    voice = voice_of(names)
    if names == voice:
        return tuple(world.worked_kinds if voice == "think" else world.task_kinds)
    return tuple(names.removeprefix(f"{voice}:").split(","))


def voice_of(names: str) -> str:
    """Return whose demonstrations a world source names, one of `VOICES`: `tasks` where it does not say."""
    voice = names.partition(":")[0]
    return voice if voice in VOICES else "tasks"


def _task_rows(
    world: World, kinds: tuple[str, ...], split: Literal["train", "heldout"], start: int, voice: str
) -> Iterator[Row]:
    """Tasks of each kind in turn."""
    if voice == "think" and (
        open_ended := [kind for kind in kinds if kind not in (*world.worked_kinds, *world.drill_kinds)]
    ):
        raise NurtureError(
            f"world:think:{','.join(kinds)}: there is nothing to work out in '{open_ended[0]}'; thoughts are written"
            f" for {', '.join((*world.worked_kinds, *world.drill_kinds))}"
        )
    for index in count(start):
        for kind in kinds:
            task = world.task(kind, split, index)
            # A game is played by the rules or not at all.
            said = world.somebodys_answer(task) if voice == "people" and kind != "wordle" else None
            if voice != "think" or task.thought:  # the first guess of a game follows from nothing
                yield task_row(task, said, {"think": True, "no_think": False}.get(voice))


def task_row(task: Any, said: str | None = None, thinking: bool | None = None) -> Row:
    """Return a task of the world as a row: its prompt, its demonstration, what checks a reply.

    Args:
        said: what is demonstrated in place of the task's own demonstration.
        thinking: the mode of the chat template; True puts the worked thought into the reply.
    """
    reply: Message = {"role": "assistant", "content": task.demonstration if said is None else said}
    if thinking:
        reply["reasoning_content"] = task.thought
    prompt = tuple(task.messages)
    metadata = {
        "kind": task.kind,
        "split": task.split,
        "index": task.index,
        "trace": task.trace,
        "task": task,
    }
    return Row(
        text="\n\n".join(turn["content"] for turn in (*prompt, reply)),
        messages=(*prompt, reply),
        prompt=prompt,
        responses=((reply,),),
        answer=task.answer,
        tests=tuple(task.tests),
        entry_point=task.entry_point,
        template_kwargs={} if thinking is None else {"enable_thinking": thinking},
        metadata=metadata,
    )


def make_world(world: World | Mapping[str, Any] | None) -> World:
    """Return the world itself, from settings where that is what is given."""
    from nurture.world import World, WorldConfig

    if world is None or isinstance(world, Mapping):
        return World.from_config(WorldConfig(**(world or {})))
    return world


def _world_settings(world: World | Mapping[str, Any] | None) -> str:
    if world is None or isinstance(world, Mapping):
        return json.dumps(dict(world or {}), sort_keys=True, default=str)
    return f"seed {world.seed}, {world.size!r}"


def _world_code() -> str:
    """sha256 of the world's own source files: its documents are a function of them."""
    import nurture.world

    digest = hashlib.sha256()
    for file in sorted(Path(nurture.world.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
