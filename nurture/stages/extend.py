"""Long context: go on pretraining with longer rows and slower rotations, then reach further without training.

A model trained on rows of n tokens has never seen a distance above n. The stage raises RoPE's base (theta), so that the
distances of the longer rows turn the slow pairs of a head no further than the old ones did, and trains on a mixture of
long documents and the pretraining mixture, which keeps what short rows taught. Long documents stay whole and attention
inside each of them. A recipe goes up in steps, one stage each (SmolLM3: 4k to 32k tokens at theta 1.5M, to 64k at 5M).
With `yarn` the saved configuration reaches past the trained length, by YaRN and without training.

Input: a base model. Output: the same, with a longer `max_position`; `long_context.json`, drawn as a heat map where
matplotlib is, with accuracy by kind of probe, length and depth. Main failure mode: a theta raised without enough
training, seen as `bpb/SOURCE` that does not come back, or long rows without anything to look up far away, seen as
`passkey` that stays.

Source: ABF (arXiv 2309.16039), YaRN (arXiv 2309.00071), SmolLM3's long-context configurations; probes as in RULER
(arXiv 2404.06654).
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from nurture.data.sources import make_world
from nurture.evals.long_context import Cell, accuracy, draw, find_again, go_on
from nurture.evals.measure import Measure
from nurture.files import atomic_write_json, read_json
from nurture.model.config import ModelConfig, YarnConfig
from nurture.model.transformer import Transformer
from nurture.stages.context import StageContext
from nurture.stages.pretrain import (
    TextConfig,
    bits_of_sources,
    known_tokens,
    open_shards,
    read_mixture,
)
from nurture.stages.training import Session, open_session, remember, save_result_model, write_result
from nurture.tokenizer import Tokenizer
from nurture.world import World
from nurture.world.long import KINDS

log = logging.getLogger(__name__)

VERSION = 1


class Config(TextConfig):
    """Settings of extending. `sequence_length` is the new length; give `tokens`, `steps` or `minutes`."""

    kind: Literal["extend"] = "extend"
    rope_theta: PositiveFloat | None = None
    """Base of the rotation frequencies from here on; by default the start's, times how much longer the rows get, to the
    power H / (H - 2): the slowest pair then turns as far over the new length as over the old."""
    trained_length: PositiveInt | None = None
    """Length that the start was trained at, by default its max_position: held-out bits per byte are measured in rows of
    it, and probes are so many times as long."""
    yarn: float | None = Field(default=None, ge=1)
    """Reach so many times further than `sequence_length`, by YaRN and without training."""
    whole_documents: bool = True
    """What the end of a row cut off is read again, whole, in the next row, where it fits."""
    probes: NonNegativeInt = 40
    """Passkeys at each length, over five depths; of the harder kinds half as many. 0: nothing is probed."""


def run(config: Config, context: StageContext) -> None:
    """Extend the context of `context.start` and leave the model in `context.directory`."""
    context.needed_start(config, "extending needs a model")
    session = open_session(
        config,
        context,
        tokens=known_tokens(config),
        longest=config.sequence_length,
        shared_by=config.context_parallel,
    )
    trained = config.trained_length or session.trained_position
    train_shards, heldout_shards = open_shards(config, context, session)
    probes = _Probes(config, context, session, trained)

    def heldout_bits() -> dict[str, Measure]:
        return bits_of_sources(config, session, heldout_shards, trained)

    started = time.monotonic()
    before = remember(context.directory, "before", heldout_bits)
    seconds = time.monotonic() - started
    target = config.sequence_length // trained
    probes.look("before", [config.sequence_length])

    longer = {"rope_theta": config.rope_theta or _stretched_theta(session.model.config, trained, config)}
    set_rotation(session.model, max_position=config.sequence_length, yarn=None, **longer)
    reading = read_mixture(config, context, session, train_shards, heldout_bits, evaluation_seconds=seconds)
    reach = config.sequence_length
    if config.yarn is not None:
        reach = round(config.yarn * config.sequence_length)
        probes.look("without yarn", [reach])
        stretched = YarnConfig(factor=config.yarn, original_max_position=config.sequence_length)
        set_rotation(session.model, max_position=reach, yarn=stretched)
    probes.look("after", list(dict.fromkeys([*_doubled(trained, config.sequence_length), reach])))
    after = heldout_bits() | reading.shares
    samples = probes.samples(config.sequence_length)
    base = session.whole()
    if base is None:
        return
    before |= probes.measures("before", config.sequence_length, f"{target}x")
    after |= probes.measures("after", config.sequence_length, f"{target}x")
    if config.yarn is not None:
        times = f"{reach // trained}x"
        before |= probes.measures("without yarn", reach, times, "_yarn")
        after |= probes.measures("after", reach, times, "_yarn")
    probes.draw()
    save_result_model(base, session.tokenizer, context.directory, answers=False)
    write_result(
        context.directory,
        tokens=reading.tokens,
        before=before,
        after=after,
        samples=samples,
        notes=reading.notes | longer,
    )


def set_rotation(model: Transformer, **changes: Any) -> None:
    """Change fields of the model's configuration that its rotations follow from (max_position, rope_theta, yarn)."""
    model.config = ModelConfig.model_validate({**model.config.model_dump(), **changes})
    model.reset_rotation()


def _stretched_theta(shape: ModelConfig, trained: int, config: Config) -> float:
    """Return the base at which the slowest pair turns as far over the new length as it did over the old.

    NTK-aware scaling: theta * s ^ (H / (H - 2)) (bloc97, 2023; arXiv 2309.00071, section 3.1).
    """
    times = max(1.0, config.sequence_length / trained)
    return float(shape.rope_theta * times ** (shape.head_width / (shape.head_width - 2)))


def _doubled(first: int, last: int) -> list[int]:
    """Return first, twice that, ... up to and with `last`."""
    lengths = []
    while first < last:
        lengths.append(first)
        first *= 2
    return [*lengths, last]


def _end(reply: list[int], tokenizer: Tokenizer) -> int:
    """Return how many tokens stand before the first that ends a document or a turn."""
    return next((place for place, token in enumerate(reply) if token in tokenizer.stop_token_ids), len(reply))


_SAMPLE_TOKENS = 8
"""Of what the model goes on with after a probe that is shown."""


class _Probes:
    """What the probes found, kept in `long_context.json` so that a resumed stage does not look again."""

    def __init__(self, config: Config, context: StageContext, session: Session, trained: int) -> None:
        self._config, self._session, self._trained = config, session, trained
        self._world: World = make_world(context.world)
        self._file = context.directory / "long_context.json"
        self._found: dict[str, list[Cell]] = {}
        if self._file.exists():
            saved = read_json(self._file, f"Delete {self._file} to look again.")
            self._found = {when: [Cell(**cell) for cell in cells] for when, cells in saved.items()}

    def look(self, when: str, lengths: list[int]) -> None:
        """Probe the model as it is now, at `lengths`. All processes must call it."""
        done = bool(self._session.execution.processes.agree(when in self._found))
        if done or not self._config.probes:
            return
        session = self._session
        cells: list[Cell] = []
        for kind in KINDS:
            wanted = self._config.probes if kind == "passkey" else self._config.probes / 2
            cells += find_again(
                session.model, session.tokenizer, self._world, kinds=[kind], lengths=lengths,
                each=max(1, round(wanted / 5)), execution=session.execution,
            )  # fmt: skip
        self._found[when] = cells
        if not session.is_main:
            return
        atomic_write_json(
            self._file, {key: [asdict(cell) for cell in found] for key, found in self._found.items()}
        )

    def measures(self, when: str, length: int, times: str, suffix: str = "") -> dict[str, Measure]:
        """Return `KIND_SUFFIX/TIMES` of what was found."""
        if when not in self._found:
            return {}
        return {f"{kind}{suffix}/{times}": accuracy(self._found[when], kind, length) for kind in KINDS}

    def samples(self, length: int) -> list[dict[str, Any]]:
        """Return one probe of each kind and what the model goes on with; of the text only its end is shown.

        All processes must call it.
        """
        tokenizer = self._session.tokenizer

        def size(text: str) -> int:
            return len(tokenizer.encode(text))

        room = length - 1 - _SAMPLE_TOKENS  # beside the token that starts a document, and the reply
        probes = [
            self._world.retrieval(kind, "heldout", 0, length=room, depth=0.5, size=size) for kind in KINDS
        ]
        prompts = [[tokenizer.document_token_id, *tokenizer.encode(probe.prompt)] for probe in probes]
        replies = go_on(self._session.model, prompts, _SAMPLE_TOKENS, self._session.execution)
        return [
            {
                "kind": probe.kind,
                "prompt": f"… {probe.prompt[-200:]}",
                "reply": tokenizer.decode(reply[: _end(reply, tokenizer)], skip_special=True),
                "demonstration": probe.answer,
            }
            for probe, reply in zip(probes, replies, strict=True)
        ]

    def draw(self) -> None:
        """Draw the heat map where matplotlib is."""
        if self._found:
            draw(self._found, self._file.with_suffix(".png"))
