"""The pretraining mixture: which tokens the model sees at which step, as a pure function.

A schedule has phases, each with weights over sources. Sequence by sequence, the source that a phase still owes most
is served next, such that at the end of every step every source has had its share to within one sequence: a schedule
without randomness, so counted shares equal planned shares. Within a source, documents follow in an order shuffled
anew each epoch; the k-th sequence of T tokens of a source is tokens [kT, (k+1)T] of that endless stream. A document
longer than T goes on in the source's next sequence, and nothing is padded or thrown away. With `whole_documents` a
document that would fit into a sequence is never only cut: the next sequence starts with it again. A question about the
start of a long document is then read together with it, for which a few tokens are read twice.

Everything follows from (seed, step, rank, world size). There is no state to save: resuming, on any number of
processes, is asking for the next step.

Cost: a batch is a handful of array operations (0.6 ms for 32 x 256). Asking for step n out of order replays the
integer counts of the schedule, not the data: for weights written with few digits the pattern repeats after
(common denominator) steps at most, and in the worst case it costs some 5 microseconds for each step skipped, once.

Paper: the quota ("chairman assignment") problem, Tijdeman 1980; earliest deadline first keeps every count between the
floor and the ceiling of its share. Mixture stages: SmolLM3. Attention does not cross documents: Llama 3, section 3.2.
"""

from __future__ import annotations

import hashlib
import logging
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from nurture.data.shards import Shard
from nurture.errors import NurtureError, did_you_mean
from nurture.recipe import Section
from nurture.types import IGNORE_INDEX, Batch

_log = logging.getLogger(__name__)

SUM_TOLERANCE = 0.02
"""Weights are shares; a sum this far from 1 (SmolLM3's decay weights sum to 1.00565) is rounding and normalised."""

_LAID_OUT = 65536  # tokens of a source whose order is computed at once, at least
_BLOCK = 1024  # steps of a schedule that are computed and remembered together


class MixturePhase(Section):
    """One phase of the mixture."""

    until: float = 1.0
    """Share of all steps at which the phase ends, in (0, 1]; the last phase ends at 1."""
    weights: dict[str, float]
    """Share of the tokens of each source; normalised."""


class MixtureBatches:
    """Batches of a mixture of sources, a pure function of (seed, step, rank, world size)."""

    def __init__(
        self,
        shards: Mapping[str, Shard],
        phases: Sequence[MixturePhase],
        *,
        steps: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        whole_documents: bool = False,
    ) -> None:
        """Lay out the schedule.

        Args:
            shards: source name -> its tokens.
            phases: in order; the last one ends at 1.
            steps: optimizer steps of the whole schedule.
            batch_size: B, sequences in a global batch.
            sequence_length: T, tokens in a sequence.
            seed: decides the order of documents and rows.
            whole_documents: what the end of a sequence cut off is read again, whole, where it fits.

        Raises:
            NurtureError: a phase is wrong (its weights, its end, a source that is unknown or empty).
        """
        if min(steps, batch_size, sequence_length) < 1:
            raise NurtureError(
                "steps, batch size and sequence length must be at least 1, got"
                f" {steps}, {batch_size}, {sequence_length}"
            )
        self.steps, self.batch_size, self.sequence_length, self.seed = (
            steps,
            batch_size,
            sequence_length,
            seed,
        )
        check_phases(phases, shards)
        self.sources = tuple(name for name in shards if any(phase.weights.get(name) for phase in phases))
        whole = sequence_length if whole_documents else None
        self._streams = [_Stream(shards[name], name, seed, whole) for name in self.sources]
        self._phases: list[_PhaseSchedule] = []
        first = 0
        for index, phase in enumerate(phases):
            end = phase_end(phase, steps)
            if end <= first:
                _log.warning(
                    "mixture phase %d has no step (%d steps in all); it is left out", index + 1, steps
                )
                continue
            weights = [phase.weights.get(name, 0.0) for name in self.sources]
            self._phases.append(_PhaseSchedule(first, end, weights, batch_size))
            first = end
        self._before = np.zeros((len(self._phases) + 1, len(self.sources)), dtype=np.int64)
        self._totalled = 0

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return rank's rows of the global batch of `step`: (B / world_size, T) each.

        Raises:
            NurtureError: the step is outside the schedule, or B does not divide by `world_size`.
        """
        if not 0 <= step < self.steps:
            raise NurtureError(f"step {step} is outside the schedule of {self.steps} steps")
        rows = rank_rows(self.batch_size, rank, world_size)
        start, counts = self._served(step), self._counts(step)
        source_of_row = np.repeat(np.arange(len(self.sources)), counts)
        number_of_row = np.concatenate([start[s] + np.arange(n) for s, n in enumerate(counts)] or [[]])
        # Mixed, so that every rank and every microbatch sees all sources.
        order = shuffled(self.batch_size, "rows", self.seed, step)[rows]
        source_of_row, number_of_row = source_of_row[order], number_of_row[order].astype(np.int64)
        length = self.sequence_length
        tokens = np.empty((len(order), length + 1), dtype=np.int64)
        documents = np.empty((len(order), length), dtype=np.int64)
        positions = np.empty((len(order), length), dtype=np.int64)
        for source in np.unique(source_of_row):
            chosen = np.flatnonzero(source_of_row == source)
            stream = self._streams[source]
            parts = stream.windows(stream.starts(number_of_row[chosen], length), length)
            tokens[chosen], documents[chosen], positions[chosen] = parts
        sources = np.repeat(source_of_row[:, None], length, axis=1)
        return Batch(
            token_ids=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
            labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
            position_ids=torch.from_numpy(positions),
            document_ids=torch.from_numpy(documents),
            source_ids=torch.from_numpy(sources),
            sources=self.sources,
        )

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each source has been read in full once `step` steps are done."""
        served = zip(self.sources, self._served(step), self._streams, strict=True)
        return {
            name: float(stream.starts(np.array([n]), self.sequence_length)[0] / stream.length)
            for name, n, stream in served
        }

    def shares(self, step_from: int, step_to: int) -> dict[str, int]:
        """Return the trained tokens of each source in steps [step_from, step_to): the ledger."""
        counts = self._served(step_to) - self._served(step_from)
        return {name: int(n) * self.sequence_length for name, n in zip(self.sources, counts, strict=True)}

    def boundaries(self) -> list[int]:
        """Return the first step of each phase."""
        return [phase.first for phase in self._phases]

    def _served(self, step: int) -> np.ndarray:
        """Sequences of each source before `step`, (sources,) int64."""
        if not 0 <= step <= self.steps:
            raise NurtureError(f"step {step} is outside the schedule of {self.steps} steps")
        index = self._phase_index(min(step, self.steps - 1))
        return self._before_phase(index) + self._phases[index].served(step - self._phases[index].first)

    def _counts(self, step: int) -> np.ndarray:
        phase = self._phases[self._phase_index(step)]
        return phase.served(step - phase.first + 1) - phase.served(step - phase.first)

    def _phase_index(self, step: int) -> int:
        return next(i for i, phase in enumerate(self._phases) if step < phase.end)

    def _before_phase(self, index: int) -> np.ndarray:
        while self._totalled < index:  # summed when first asked for, as it plays a phase through
            phase = self._phases[self._totalled]
            self._before[self._totalled + 1] = self._before[self._totalled] + phase.served(
                phase.end - phase.first
            )
            self._totalled += 1
        return self._before[index]


def check_phases(phases: Sequence[MixturePhase], known: Mapping[str, Shard] | Sequence[str]) -> None:
    """Check the phases of a mixture against the sources there are.

    Raises:
        NurtureError: naming the phase, the source and what is wrong.
    """
    if not phases:
        raise NurtureError("the mixture has no phases; give at least one with weights")
    last = 0.0
    for index, phase in enumerate(phases):
        place = f"mixture phase {index + 1}"
        if not last < phase.until <= 1:
            raise NurtureError(f"{place}: until must be above {last:g} and at most 1, got {phase.until:g}")
        last = phase.until
        normalised_weights(phase, place)
        for name, weight in phase.weights.items():
            if name not in known:
                raise NurtureError(
                    f"{place}: unknown source '{name}'.{did_you_mean(name, known)} There are: {', '.join(known)}"
                )
            if weight and isinstance(known, Mapping) and known[name].token_count == 0:
                raise NurtureError(
                    f"{place}: source '{name}' has no tokens; set its weight to 0 or give it text"
                )
    if last != 1:
        raise NurtureError(f"mixture: the last phase ends at {last:g}; it must end at 1")


def normalised_weights(phase: MixturePhase, place: str = "mixture") -> dict[str, float]:
    """Return the weights of a phase scaled to sum to 1. They may be given as shares or as percentages.

    Raises:
        NurtureError: there is none, one is negative, or the sum is neither about 1 nor about 100.
    """
    for name, weight in phase.weights.items():
        if not weight >= 0 or math.isinf(weight):
            raise NurtureError(f"{place}: weight of '{name}' must be 0 or more, got {weight:g}")
    total = math.fsum(phase.weights.values())
    if not total:
        raise NurtureError(f"{place}: no source has a weight above 0")
    if not any(abs(total / whole - 1) <= SUM_TOLERANCE for whole in (1, 100)):
        raise NurtureError(
            f"{place}: weights must sum to 1 (or to 100, as percentages), got {total:g}; the same shares as"
            f" {', '.join(f'{name}: {weight / total:.4g}' for name, weight in phase.weights.items())}?"
        )
    return {name: weight / total for name, weight in phase.weights.items()}


def phase_end(phase: MixturePhase, steps: int) -> int:
    """Return the first step after the phase."""
    return round(phase.until * steps)


def rank_rows(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the rows of a global batch that belong to `rank`.

    Raises:
        NurtureError: the batch does not divide.
    """
    if not 0 <= rank < world_size or batch_size % world_size:
        raise NurtureError(
            f"a batch of {batch_size} sequences cannot be divided among {world_size} processes"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def heldout_batches(
    shards: Mapping[str, Shard], *, batch_size: int, sequence_length: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Yield batches that read each shard once, in its own order, for evaluation. One source a batch.

    Args:
        max_tokens: stop each source after about this many tokens (whole rows).

    The last tokens of a source that fill no row are left out, unless the source is shorter than one row; it is then
    padded.
    """
    names = tuple(shards)
    for index, name in enumerate(names):
        stream = _Stream(shards[name], name, seed=None)
        rows = max(1, min(stream.length - 1, max_tokens or stream.length) // sequence_length)
        for first in range(0, rows, batch_size):
            numbers = np.arange(first, min(first + batch_size, rows), dtype=np.int64)
            tokens, documents, positions = stream.windows(numbers * sequence_length, sequence_length)
            labels = tokens[:, 1:].copy()
            beyond = numbers[:, None] * sequence_length + np.arange(1, sequence_length + 1) >= stream.length
            # A source shorter than one row wraps around; its second reading does not count.
            labels[beyond] = IGNORE_INDEX
            yield Batch(
                token_ids=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
                labels=torch.from_numpy(labels),
                position_ids=torch.from_numpy(positions),
                document_ids=torch.from_numpy(documents),
                source_ids=torch.full((len(numbers), sequence_length), index, dtype=torch.int64),
                sources=names,
            )


# ---- the schedule -------------------------------------------------------------------------------------------------


class _PhaseSchedule:
    """How many sequences of each source have been served after n steps of a phase.

    Weights become integers over a common denominator, so the arithmetic is exact at any step. After n steps every
    count lies between floor(w B n) and ceil(w B n): sources below their floor are served first, and the seats left go
    to the sources whose next sequence is due first. After `period` steps all shares are whole numbers and the pattern
    starts over.
    """

    def __init__(self, first: int, end: int, weights: Sequence[float], batch_size: int) -> None:
        self.first, self.end = first, end
        self._batch_size = batch_size
        exact = [Fraction(weight).limit_denominator(10**9) for weight in weights]
        common = math.lcm(*(fraction.denominator for fraction in exact))
        if common > 10**12:  # numbers with endless digits; a grid of 1e-10 is off by one sequence after 1e10
            common = 10**10
        units = [round(fraction * common) for fraction in exact]
        divisor = math.gcd(*units)
        self._units = [unit // divisor for unit in units]
        self._whole = sum(self._units)
        self._period = self._whole // math.gcd(self._whole, batch_size)
        self._blocks: dict[int, np.ndarray] = {}
        self._starts: list[list[int]] = [[0] * len(units)]

    def served(self, steps: int) -> np.ndarray:
        """Sequences of each source after `steps` steps of this phase, (sources,) int64."""
        periods, rest = divmod(steps, self._period)
        per_period = self._period * self._batch_size // self._whole
        whole = np.array([unit * per_period * periods for unit in self._units], dtype=np.int64)
        block, offset = divmod(rest, _BLOCK)
        return whole + self._block(block)[offset]

    def _block(self, index: int) -> np.ndarray:
        """Cumulative counts after steps [index * _BLOCK, (index + 1) * _BLOCK]."""
        if index not in self._blocks:
            while len(self._starts) <= index:
                self._starts.append(self._play(len(self._starts) - 1)[-1])
            if len(self._blocks) >= 8:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[index] = np.array(self._play(index), dtype=np.int64)
        return self._blocks[index]

    def _play(self, index: int) -> list[list[int]]:
        served = self._starts[index]
        history = [served]
        last = min((index + 1) * _BLOCK, self._period)
        for step in range(index * _BLOCK + 1, last + 1):
            served = self._next(served, step)
            history.append(served)
        return history

    def _next(self, served: Sequence[int], step: int) -> list[int]:
        """Counts after `step` steps, from the counts after one step less."""
        whole, seats = self._whole, self._batch_size * step
        counts = []
        waiting = []
        left = seats
        for source, unit in enumerate(self._units):
            floor, remainder = divmod(unit * seats, whole)
            count = max(served[source], floor)
            counts.append(count)
            left -= count
            if remainder and count == floor:  # below its ceiling
                waiting.append(((count + 1) / unit, source))
        for _, source in sorted(waiting)[:left]:
            counts[source] += 1
        return counts


class _Stream:
    """The endless token stream of one source: its documents, in a new order every epoch."""

    def __init__(self, shard: Shard, name: str, seed: int | None, whole: int | None = None) -> None:
        """`whole`: length of the sequences, if they are to begin with what the one before cut off."""
        self._shard = shard
        self._whole, self._rows_before = whole, [0]
        self._tokens = np.asarray(shard.tokens)
        self._name, self._seed = name, seed
        self.length = shard.token_count
        # Epochs of a small source are laid out several at a time, as a batch may read many of them.
        self._together = max(1, _LAID_OUT // max(1, self.length))
        self._span = self._together * self.length
        self._layout = lru_cache(maxsize=3)(self._make_layout)
        self._block_starts = lru_cache(maxsize=3)(self._make_block_starts)

    def _make_layout(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where each document of a block of epochs starts in the block, and how far that is from the shard."""
        lengths = self._shard.document_lengths
        order = np.tile(np.arange(len(lengths)), self._together)
        if self._seed is not None:
            epochs = range(block * self._together, (block + 1) * self._together)
            order = np.concatenate(
                [shuffled(len(lengths), self._name, self._seed, epoch) for epoch in epochs]
            )
        begins = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
        return begins, self._shard.document_starts[:-1][order] - begins

    def starts(self, numbers: np.ndarray, length: int) -> np.ndarray:
        """Return where in the stream the sequences with these numbers start."""
        if self._whole is None:
            return numbers * length
        return np.array([self._whole_start(int(number)) for number in numbers], dtype=np.int64)

    def _whole_start(self, number: int) -> int:
        while self._rows_before[-1] <= number:
            block = len(self._rows_before) - 1
            self._rows_before.append(self._rows_before[-1] + len(self._block_starts(block)))
        block = bisect_right(self._rows_before, number) - 1
        return block * self._span + self._block_starts(block)[number - self._rows_before[block]]

    def _make_block_starts(self, block: int) -> list[int]:
        """Return where the sequences of a block start in it, such that none begins inside a document that fits."""
        assert self._whole is not None
        begins, _ = self._layout(block)
        place, starts = 0, list[int]()
        while place < self._span:
            starts.append(place)
            end = place + self._whole
            # The document that the end cuts; one longer than a sequence is gone on with.
            document = int(np.searchsorted(begins, end, side="right")) - 1
            begin, after = int(begins[document]), int((*begins[document + 1 : document + 2], self._span)[0])
            fits = begin > place and after - begin <= self._whole
            place = begin if fits and end < self._span else end
        return starts

    def windows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens (R, length + 1), document ids and positions (R, length) of the windows at `starts`."""
        spots = starts[:, None] + np.arange(length + 1)
        first, last = int(starts.min()) // self._span, (int(starts.max()) + length) // self._span
        if first == last:
            shard_index, document_start = self._locate(first, spots)
        else:
            blocks = spots // self._span
            shard_index, document_start = np.empty_like(spots), np.empty_like(spots)
            for block in np.unique(blocks):
                chosen = blocks == block
                shard_index[chosen], document_start[chosen] = self._locate(int(block), spots[chosen])
        # A row's first document may have begun in the row before; here it begins at the row.
        positions = spots[:, :-1] - np.maximum(document_start[:, :-1], spots[:, :1])
        documents = np.cumsum(positions == 0, axis=1) - 1
        return self._tokens[shard_index].astype(np.int64), documents, positions

    def _locate(self, block: int, spots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard offset of stream positions that lie in `block`, and where their documents start."""
        begins, shift = self._layout(block)
        inside = spots - block * self._span
        document = np.searchsorted(begins, inside, side="right") - 1
        return inside + shift[document], begins[document] + block * self._span


# ---- randomness that is a function of its name ----------------------------------------------------------------------


def shuffled(count: int, *name: str | int) -> np.ndarray:
    """Return a permutation of range(count) that depends on `name` alone, on every machine and numpy version."""
    key = int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "big")
    return np.argsort(_mixed(np.arange(count, dtype=np.uint64), key), kind="stable")


def _mixed(counter: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014) of a counter: 64 well mixed bits each."""
    value = (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
