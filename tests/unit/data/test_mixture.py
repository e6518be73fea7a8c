"""The mixture: planned shares, exact boundaries, one order for any number of processes and any restart."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nurture.data.mixture import (
    MixtureBatches,
    MixturePhase,
    _PhaseSchedule,
    heldout_batches,
    normalised_weights,
    shuffled,
)
from nurture.data.shards import Shard
from nurture.errors import NurtureError
from nurture.types import IGNORE_INDEX

E = 0


def make_shard(name: str, lengths, first: int) -> Shard:
    """Documents whose tokens are all different: `first` + a running number."""
    documents = []
    for length in lengths:
        documents.append([E, *range(first, first + length - 1)])
        first += length - 1
    return Shard.from_documents(name, documents)


@pytest.fixture(scope="module")
def shards() -> dict[str, Shard]:
    rng = np.random.default_rng(0)
    return {
        "web": make_shard("web", rng.integers(2, 60, 80), 100_000),
        "code": make_shard("code", [500, 3, 2, 1, 40], 200_000),
        "math": make_shard("math", [7] * 30, 300_000),
    }


PHASES = [
    MixturePhase(until=0.72, weights={"web": 0.85, "code": 0.12, "math": 0.03}),
    MixturePhase(until=0.9, weights={"web": 0.75, "code": 0.15, "math": 0.1}),
    MixturePhase(until=1.0, weights={"web": 0.63, "code": 0.24, "math": 0.13}),
]


def mixture(shards, phases=PHASES, **changes) -> MixtureBatches:
    options = {"steps": 100, "batch_size": 8, "sequence_length": 16, "seed": 5, **changes}
    return MixtureBatches(shards, phases, **options)


def equal(first, second) -> bool:
    fields = ("token_ids", "labels", "position_ids", "document_ids", "source_ids")
    return all(torch.equal(getattr(first, f), getattr(second, f)) for f in fields)


# ---- what a sequence is -----------------------------------------------------------------------------------------


def naive_stream(shard: Shard, seed: int, epochs: int) -> tuple[list[int], list[int]]:
    """The stream as its definition says, token by token: tokens, and where the document of each began."""
    tokens: list[int] = []
    begins: list[int] = []
    for epoch in range(epochs):
        for index in shuffled(shard.document_count, shard.name, seed, epoch):
            document = shard.document(int(index)).tolist()
            begins += [len(tokens)] * len(document)
            tokens += document
    return tokens, begins


def test_rows_are_consecutive_windows_of_the_shuffled_stream(shards):
    batches = mixture(shards, steps=60)
    served = dict.fromkeys(shards, 0)
    for step in range(60):
        batch = batches(step)
        rows = {name: [] for name in shards}
        for row in range(8):
            (source,) = set(batch.source_ids[row].tolist())
            rows[batch.sources[source]].append(
                [batch.token_ids[row], batch.labels[row], batch.position_ids[row], batch.document_ids[row]]
            )
        for name, found in rows.items():
            tokens, begins = naive_stream(shards[name], 5, 8)
            expected = {}
            for number in range(served[name], served[name] + len(found)):
                start = number * 16
                window = tokens[start : start + 17]
                position = [spot - max(begins[spot], start) for spot in range(start, start + 16)]
                document = np.cumsum([p == 0 for p in position]) - 1
                expected[number] = [window[:-1], window[1:], position, document.tolist()]
            served[name] += len(found)
            found_rows = sorted([part.tolist() for part in row] for row in found)
            assert found_rows == sorted(expected.values())


def test_a_long_document_goes_on_in_the_next_sequence():
    shard = make_shard("one", [100], 1)
    batches = mixture({"one": shard}, [MixturePhase(weights={"one": 1})], batch_size=1, steps=6)
    tokens = [token for step in range(6) for token in batches(step).token_ids[0].tolist()]
    assert tokens == list(range(96))
    assert batches(1).position_ids[0].tolist() == list(range(16))
    assert batches(1).labels[0, -1] == 32


def test_labels_cross_documents_and_attention_does_not(shards):
    batch = mixture({"math": shards["math"]}, [MixturePhase(weights={"math": 1})])(0)
    assert (batch.labels != IGNORE_INDEX).all()
    starts = batch.token_ids == E
    assert (batch.position_ids[starts] == 0).all()
    changes = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    assert torch.equal(changes, starts[:, 1:])
    assert (batch.labels[:, :-1][changes] == E).all()  # "the document ends here"


def test_an_epoch_reads_every_token_once(shards):
    web = shards["web"]
    batches = mixture(
        {"web": web},
        [MixturePhase(weights={"web": 1})],
        sequence_length=1,
        batch_size=1,
        steps=3 * web.token_count,
    )
    read = [int(batches(step).token_ids) for step in range(2 * web.token_count)]
    first, second = read[: web.token_count], read[web.token_count :]
    assert sorted(first) == sorted(second) == sorted(web.tokens.tolist())
    assert first != second
    assert batches.epochs(web.token_count) == {"web": 1.0}
    assert batches.epochs(web.token_count // 2)["web"] == pytest.approx(0.5, abs=0.01)


def test_shards_shorter_than_a_row(shards):
    tiny = make_shard("tiny", [3, 2], 1)
    batch = mixture({"tiny": tiny}, [MixturePhase(weights={"tiny": 1})])(3)
    assert batch.token_ids.shape == (8, 16)
    assert sorted(batch.token_ids.unique().tolist()) == [0, 1, 2, 3]


# ---- pure function ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_are_the_global_batch(shards, world_size):
    for step in (0, 71, 72, 99):
        whole = mixture(shards)(step)
        parts = [mixture(shards)(step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.token_ids for part in parts]), whole.token_ids)
        assert torch.equal(torch.cat([part.source_ids for part in parts]), whole.source_ids)
        assert torch.equal(torch.cat([part.document_ids for part in parts]), whole.document_ids)


def test_restart_anywhere_replays(shards):
    run = mixture(shards)
    history = [run(step) for step in range(100)]
    for start in (99, 3, 50, 72, 90):
        assert equal(mixture(shards)(start), history[start])
    backwards = mixture(shards)
    assert all(equal(backwards(step), history[step]) for step in reversed(range(100)))


def test_seed_changes_the_order_and_other_sources_do_not(shards):
    assert not equal(mixture(shards)(0), mixture(shards, seed=6)(0))
    alone = mixture(shards, [MixturePhase(weights={"web": 1})])
    with_more = mixture({"math": shards["math"], **shards}, [MixturePhase(weights={"web": 0.5, "math": 0.5})])
    first = {tuple(row.tolist()) for step in range(4) for row in alone(step).token_ids}
    second = {
        tuple(row.tolist()) for step in range(8) for row in with_more(step).token_ids if row.max() < 200_000
    }
    assert first == second


def test_order_never_changes():
    """Old runs must resume on new versions: these values are part of the format."""
    assert shuffled(8, "web", 5, 0).tolist() == [6, 0, 5, 2, 3, 7, 1, 4]
    assert sorted(shuffled(1000, "x", 1)) == list(range(1000))


# ---- shares -----------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    weights=st.lists(st.one_of(st.integers(1, 1000), st.floats(1e-4, 1)), min_size=1, max_size=12),
    batch_size=st.integers(1, 40),
)
def test_counts_follow_the_weights_to_within_one_sequence(weights, batch_size):
    total = sum(weights)
    schedule = _PhaseSchedule(0, 200, [w / total for w in weights], batch_size)
    counts = np.array([schedule.served(step) for step in range(201)])
    target = np.arange(201)[:, None] * batch_size * np.array(weights) / total
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts.sum(axis=1) == batch_size * np.arange(201)).all()
    assert np.abs(counts - target).max() < 1 + 1e-3


def test_shares_of_every_phase(shards):
    batches = mixture(shards, steps=1000)
    assert batches.boundaries() == [0, 720, 900]
    for phase, (first, last) in zip(PHASES, pairwise([0, 720, 900, 1000]), strict=True):
        counted = dict.fromkeys(shards, 0)
        for step in range(first, last, 37):
            batch = batches(step)
            for index, name in enumerate(batch.sources):
                counted[name] += int((batch.source_ids == index).sum())
            assert counted.keys() == batches.shares(step, step + 1).keys()
        ledger = batches.shares(first, last)
        for name, weight in phase.weights.items():
            assert abs(ledger[name] - weight * (last - first) * 8 * 16) <= 16


def test_ledger_equals_what_was_served(shards):
    batches = mixture(shards)
    counted = dict.fromkeys(batches.sources, 0)
    for step in range(60, 95):
        batch = batches(step)
        for index, name in enumerate(batch.sources):
            counted[name] += int((batch.source_ids == index).sum())
    assert counted == batches.shares(60, 95)


def test_last_phase_is_reached_and_first_one_is_left(shards):
    """nanotron#380: scheduled stages stuck on the last one."""
    phases = [MixturePhase(until=0.5, weights={"web": 1}), MixturePhase(until=1, weights={"code": 1})]
    batches = mixture(shards, phases, steps=10)
    seen = [batches.sources[int(batches(step).source_ids[0, 0])] for step in range(10)]
    assert seen == ["web"] * 5 + ["code"] * 5


def test_boundaries_of_smollm3():
    phases = [
        MixturePhase(until=3_450_000 / 4_720_000, weights={"web": 1}),
        MixturePhase(until=4_198_000 / 4_720_000, weights={"web": 1}),
        MixturePhase(until=1, weights={"web": 1}),
    ]
    shard = make_shard("web", [50_000], 1)
    batches = mixture({"web": shard}, phases, steps=4_720_000, batch_size=576, sequence_length=4096)
    assert batches.boundaries() == [0, 3_450_000, 4_198_000]
    assert batches(4_719_999, 7, 64).token_ids.shape == (9, 4096)
    assert batches.shares(0, 4_720_000) == {"web": 4_720_000 * 2_359_296}


def test_smollm3_decay_weights_are_accepted_and_normalised():
    weights = {"web": 0.63825, "code": 0.2343, "math": 0.1331}  # as in the config, they sum to 1.00565
    phase = MixturePhase(weights=weights)
    assert sum(normalised_weights(phase).values()) == pytest.approx(1)
    shards = {name: make_shard(name, [50], 1) for name in weights}
    ledger = mixture(shards, [phase], steps=500).shares(0, 500)
    for name, weight in weights.items():
        assert abs(ledger[name] / 16 - 4000 * weight / 1.00565) < 1


def test_percentages_are_accepted(shards):
    percent = mixture(shards, [MixturePhase(weights={"web": 85, "code": 12, "math": 3})])
    share = mixture(shards, [PHASES[0].model_copy(update={"until": 1.0})])
    assert equal(percent(7), share(7))


def test_far_steps_are_cheap(shards):
    batches = mixture(shards, PHASES[:1] and [PHASES[0].model_copy(update={"until": 1.0})], steps=10**9)
    assert batches(10**9 - 1).token_ids.shape == (8, 16)  # would take days if it were replayed
    odd = MixturePhase(
        weights={"web": 1 / 3, "code": 0.2718281828459045, "math": 1 - 1 / 3 - 0.2718281828459045}
    )
    assert mixture(shards, [odd], steps=100_000)(50_000).token_ids.shape == (8, 16)


def test_every_rank_sees_every_source(shards):
    batches = mixture(shards, [MixturePhase(weights={"web": 0.5, "code": 0.5})], batch_size=32)
    kinds = [set(batches(step, 1, 4).source_ids[:, 0].tolist()) for step in range(20)]
    assert sum(len(kind) == 2 for kind in kinds) >= 15


# ---- held-out ---------------------------------------------------------------------------------------------------


def test_heldout_batches_read_once_in_order(shards):
    batches = list(heldout_batches({"web": shards["web"]}, batch_size=4, sequence_length=16))
    tokens = torch.cat([batch.token_ids.flatten() for batch in batches])
    count = (shards["web"].token_count - 1) // 16 * 16
    assert tokens.tolist() == shards["web"].tokens[:count].tolist()
    assert (
        torch.cat([b.labels.flatten() for b in batches]).tolist()
        == shards["web"].tokens[1 : count + 1].tolist()
    )
    few = list(heldout_batches(shards, batch_size=4, sequence_length=16, max_tokens=64))
    assert [batch.sources[int(batch.source_ids[0, 0])] for batch in few] == ["web", "code", "math"]
    assert all(batch.token_ids.shape == (4, 16) for batch in few)


def test_heldout_source_shorter_than_a_row():
    (batch,) = heldout_batches({"tiny": make_shard("tiny", [3, 2], 1)}, batch_size=4, sequence_length=16)
    assert batch.labels[0].tolist() == [1, 2, 0, 3] + [IGNORE_INDEX] * 12


# ---- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([], "no phases"),
        ([{"weights": {}}], "phase 1: no source has a weight"),
        ([{"weights": {"web": 0}}], "phase 1: no source has a weight"),
        ([{"weights": {"web": 1.5, "code": -0.5}}], "weight of 'code' must be 0 or more, got -0.5"),
        ([{"weights": {"web": 0.5, "code": 0.43}}], r"sum to 1 .*got 0\.93.*web: 0\.5376"),
        ([{"weights": {"wep": 1}}], "unknown source 'wep'. Did you mean 'web'"),
        ([{"weights": {"empty": 1}}], "'empty' has no tokens"),
        ([{"until": 0.5, "weights": {"web": 1}}], r"last phase ends at 0\.5"),
        ([{"until": 1.2, "weights": {"web": 1}}], r"until must be above 0 and at most 1, got 1\.2"),
        (
            [{"until": 0.6, "weights": {"web": 1}}, {"until": 0.6, "weights": {"web": 1}}],
            r"phase 2: until must be above 0\.6",
        ),
    ],
)
def test_wrong_phases(shards, phases, said):
    known = {**shards, "empty": Shard.from_documents("empty", [])}
    with pytest.raises(NurtureError, match=said):
        mixture(known, [MixturePhase(**phase) for phase in phases])


def test_steps_and_ranks_outside(shards):
    for step in (-1, 100):
        with pytest.raises(NurtureError, match=f"step {step} is outside the schedule of 100"):
            mixture(shards)(step)
    with pytest.raises(NurtureError, match="8 sequences cannot be divided among 3"):
        mixture(shards)(0, 0, 3)
    with pytest.raises(NurtureError, match="at least 1"):
        mixture(shards, batch_size=0)


def test_a_phase_without_steps_is_said(shards, caplog):
    batches = mixture(
        shards, [MixturePhase(until=0.01, weights={"web": 1}), MixturePhase(weights={"code": 1})], steps=10
    )
    assert "phase 1 has no step" in caplog.text
    assert batches.boundaries() == [0]


def test_whole_documents_are_read_whole(shards):
    """Every document that fits is in some sequence from its start to its end, and the shares stay exact."""
    plain, whole = (mixture(shards, sequence_length=64, whole_documents=choice) for choice in (False, True))
    read: dict[bool, set[tuple[int, ...]]] = {False: set(), True: set()}
    for batches in (plain, whole):
        for step in range(60):
            batch = batches(step)
            assert torch.equal(batch.source_ids, plain(step).source_ids)
            for row, ids in zip(batch.token_ids, batch.document_ids, strict=True):
                read[batches is whole] |= {tuple(row[ids == i].tolist()) for i in ids.unique()}
    documents = {tuple(shard.document(i)) for shard in shards.values() for i in range(shard.document_count)}
    fitting = {document for document in documents if len(document) <= 64}
    assert fitting <= read[True]
    assert not fitting <= read[False]
    web = shards["web"].token_count
    assert (
        whole.epochs(60)["web"] < plain.epochs(60)["web"] == pytest.approx(60 * 8 * 0.85 * 64 / web, rel=0.01)
    )


def test_whole_documents_can_be_asked_for_in_any_order_and_split(shards):
    one, other = (mixture(shards, sequence_length=64, whole_documents=True) for _ in range(2))
    late = one(90)
    for step in (3, 90, 4):
        parts = [other(step, rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat([part.token_ids for part in parts]), one(step).token_ids)
    assert equal(late, other(90))


def test_a_document_longer_than_a_sequence_goes_on_in_the_next():
    """Of 150 tokens, 60 and 60 are read, then 30 with the next document, which fits and so is not cut."""
    shard = Shard.from_documents("text", [[E, *range(1, 150)], [E, *range(200, 240)]])
    phases = [MixturePhase(weights={"text": 1.0})]
    batches = MixtureBatches({"text": shard}, phases, steps=9, batch_size=1, sequence_length=60, seed=0,
                             whole_documents=True)  # fmt: skip
    rows = [batches(step).token_ids[0].tolist() for step in range(9)]
    assert any(row[0] == 60 for row in rows)
    assert any(row[0] == 120 for row in rows)
    assert any(row[:40] == [E, *range(200, 239)] for row in rows)
