"""What every stage is given: its settings, and where it stands in the run.

A stage is `run(config, context)`: it reads `context.start`, trains, and leaves a model in `context.directory`. It does
not know the recipe, the other stages, or whether it is resumed by `nurture run` or called alone by `nurture sft`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nurture.chat_template import named_template
from nurture.data.rows import Row
from nurture.data.sources import HELDOUT_EVERY, DataSpec, Split, read_rows
from nurture.errors import NurtureError
from nurture.recipe import Section


class StageConfig(Section):
    """The settings every stage has. A stage's own `Config` adds its settings, one documented field each."""

    references: ClassVar[tuple[str, ...]] = ()
    """Fields (besides `start`) that name an earlier stage or a checkpoint: a reward model, a reference, models to
    merge. The fields hold one name or a list of names; `context.models` maps each name to its folder."""

    without_effect: ClassVar[tuple[str, ...]] = ()
    """Dotted keys of settings that cannot change the result (`loop.log_every`): changing them runs nothing again, and
    an interrupted stage still resumes."""

    templates: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a chat template: the name of a built-in one, or a .jinja file, whose content counts as a setting
    does."""

    name: str
    """Name of the stage: unique in the recipe, used for its folder and in overrides (`sft.epochs=2`)."""
    kind: str
    """What the stage does, one of nurture.stages.STAGES."""
    start: str | None = None
    """Where the weights come from: an earlier stage's name, a checkpoint folder, a .gguf file, a hub name ORG/MODEL, or
    `scratch` for fresh weights. By default the stage before, and fresh weights for the first."""


@dataclass(frozen=True)
class StageContext:
    """Where a stage runs and what it starts from.

    Attributes:
        directory: `runs/NAME/NN-stage`, which exists. The stage leaves `model/`, `metrics.jsonl`, `samples.jsonl`
            and `result.json` (`{"tokens": ..., "metrics": {...}}`) here. What it needs to resume it keeps in
            `state/`, which the pipeline removes once the stage is complete.
        start: the model to go on from (a folder or a .gguf file), or None for fresh weights.
        tokenizer: where `Tokenizer.load` finds the tokenizer of `start`, or the run's own for fresh weights.
        model: the shape of a fresh model (`ModelConfig` fields except `vocab_size`, which the tokenizer decides).
        seed: of everything random in the run.
        base: folder that relative data paths are resolved against.
        cache: folder for tokenised shards, shared by the stages of a run.
        world: settings of the embedded world, `{}` for its defaults.
        models: written name -> model folder, for the fields in `Config.references`.
    """

    directory: Path
    start: Path | None = None
    tokenizer: Path | None = None
    model: dict[str, Any] | None = None
    seed: int = 0
    base: Path = Path()
    cache: Path = Path("cache")
    world: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Path] = field(default_factory=dict)

    def rows(
        self, spec: DataSpec, split: Split, heldout_every: int = HELDOUT_EVERY, start: int = 0
    ) -> Iterator[Row]:
        """Yield the rows of a source as this run sees it; arguments and errors as of `read_rows`."""
        how = {"split": split, "base": self.base, "heldout_every": heldout_every, "world": self.world}
        return read_rows(spec, **how, start=start)  # type: ignore[arg-type]

    def template(self, name: str | None) -> str | None:
        """Return what a field of `StageConfig.templates` stands for: a built-in name itself, of a file its source."""
        return named_template(name, self.base)

    def needed_start(self, config: StageConfig, need: str) -> Path:
        """Return `start`.

        Raises:
            NurtureError: there is none; `need` says who needs what.
        """
        if self.start is None:
            raise NurtureError(f"stage '{config.name}': {need} to start from.")
        return self.start
