"""Which models the server offers, by what names, and which of them are in memory.

A run offers every finished stage that left a language model, as `RUN/STAGE` (`tiny/04-sft`); a folder, a .gguf file or
`smollm2` offers itself under its own name. Stages that finish while the server runs appear by themselves, a stage that
was made again is loaded again. Names from a request are only ever looked up among these, never joined to a path.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nurture import files
from nurture.errors import NurtureError, did_you_mean
from nurture.inference.chat import SMOLLM2, ChatModel, load_chat_model
from nurture.model.hugging_face import CONFIG, checkpoint_head
from nurture.report.table import finished_stages, stage_kind

_LOADED = 6
"""Models kept in memory; the one unused for longest makes room."""


class UnknownModel(NurtureError):
    """A request named a model that is not here."""


@dataclass(frozen=True)
class Entry:
    """One model that can be asked for.

    Attributes:
        name: as clients write it.
        path: what `load_chat_model` takes.
        kind: kind of the stage that made it ("sft"), or "model".
        made: when its files were written, seconds since 1970.
        is_base: continues text instead of answering, as far as its files tell.
    """

    name: str
    path: Path
    kind: str
    made: float
    is_base: bool


class Library:
    """The models of some runs and checkpoints.

    Attributes:
        runs: name -> folder of every run that was given.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        """Take note of runs, stages, checkpoints, .gguf files and `smollm2`; nothing is loaded.

        Raises:
            NurtureError: a path is none of these.
        """
        self.runs: dict[str, Path] = {}
        self._single: dict[str, Path] = {}
        self._loaded: dict[Entry, ChatModel] = {}
        self._loading = threading.Lock()
        for path in map(Path, paths):
            if path.is_dir() and _is_run(path):
                self.runs[_free_name(path.resolve().name, self.runs)] = path
            elif str(path) == SMOLLM2 or path.is_file() or _has_model(path):
                self._single[_free_name(_checkpoint_name(path), self._single)] = path
            else:
                raise NurtureError(
                    f"{path}: no run and no model here. Give a run (runs/NAME), a stage of one, a folder with "
                    "config.json and model.safetensors, a .gguf file, or smollm2."
                )
        if not paths:
            raise NurtureError("nurture serve needs a run or a model: `nurture serve runs/tiny`.")

    def entries(self) -> list[Entry]:
        """Return the language models there are now, runs first, their stages in order."""
        found = [
            _entry(f"{run}/{stage.name}", stage, stage_kind(stage))
            for run, folder in self.runs.items()
            for stage in finished_stages(folder)
            if (stage / "model" / CONFIG).is_file() and checkpoint_head(stage / "model") == "lm"
        ]
        return found + [_entry(name, path, "model") for name, path in self._single.items()]

    def find(self, name: str) -> Entry:
        """Return the model of this name; the stage alone (`04-sft`, `sft`) will do where only one is meant.

        Raises:
            UnknownModel: there is none, or several.
        """
        entries = self.entries()
        for meant in (
            lambda entry: entry.name == name,
            lambda entry: entry.name.split("/")[-1] == name,
            lambda entry: entry.name.split("/")[-1].split("-", 1)[-1] == name,
        ):
            matching = [entry for entry in entries if meant(entry)]
            if len(matching) == 1:
                return matching[0]
            if matching:
                meanings = ", ".join(entry.name for entry in matching)
                raise UnknownModel(f"the model '{name}' may be any of {meanings}: write the whole name.")
        names = [entry.name for entry in entries]
        hint = did_you_mean(name, names) or f" There are: {', '.join(names) or 'none yet'}."
        raise UnknownModel(f"the model '{name[:100]}' does not exist.{hint}")

    def load(self, entry: Entry) -> ChatModel:
        """Return a model, from memory where it is there. Safe from any thread; slow the first time.

        Raises:
            NurtureError: its files cannot be read.
        """
        with self._loading:
            model = self._loaded.pop(entry, None)
            if model is None:
                for stale in [held for held in self._loaded if held.name == entry.name]:
                    del self._loaded[stale]
                model = load_chat_model(entry.path)
            self._loaded[entry] = model  # now the one used last
            while len(self._loaded) > _LOADED:
                del self._loaded[next(iter(self._loaded))]
            return model

    def run_folder(self, name: str) -> Path:
        """Return the folder of a run.

        Raises:
            UnknownModel: no such run was given to the server.
        """
        if name not in self.runs:
            raise UnknownModel(f"there is no run '{name[:100]}' here.{did_you_mean(name, self.runs)}")
        return self.runs[name]


def _entry(name: str, path: Path, kind: str) -> Entry:
    folder = path / "model" if (path / "model").is_dir() else path
    without_template = folder.is_dir() and not _has_template(folder)
    return Entry(name, path, kind, _made(path), kind in ("pretrain", "extend") or without_template)


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in settings.read_text(encoding="utf-8")


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or any(path.glob("[0-9][0-9]-*/stage.yaml"))


def _has_model(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / "model" / CONFIG).is_file()


def _checkpoint_name(path: Path) -> str:
    path = path if str(path) == SMOLLM2 else path.resolve()
    return path.parent.name if path.name == "model" else path.stem if path.is_file() else path.name


def _free_name(name: str, taken: dict[str, Path]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def _made(path: Path) -> float:
    for file in (path / files.MANIFEST, path / "model.safetensors", path):
        if file.exists():
            return file.stat().st_mtime
    return 0.0
