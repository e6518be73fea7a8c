"""The plan by hand: operations, memory, what does not fit and what would, scaling, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from nurture import plan
from nurture.cli import app
from nurture.errors import NurtureError
from nurture.model.config import PRESETS, ModelConfig
from nurture.plan import Work
from nurture.stages.recipe import load_recipe

SMALL = ModelConfig(vocab_size=100, width=8, layers=2, heads=2, kv_heads=1, head_width=4, ffn_width=16)
BIG = PRESETS["smollm3-3b"]
WORK = Work("a", "pretrain", 1e12, 3 * plan.forward_operations(BIG, 4096), 576 * 4096, 4096, 12_288)


def test_hardware():
    found = plan.parse_hardware("384xH100")
    assert (found.count, found.name, found.shards) == (384, "H100", 384)
    assert plan.parse_hardware("h200").count == 1
    cores = plan.parse_hardware("2xcpu")
    assert cores.shards == 1
    assert cores.memory_of_shard == 2 * cores.memory
    for text in ("0xH100", "", "many", "8xH10"):
        with pytest.raises(NurtureError, match="--hardware"):
            plan.parse_hardware(text)


def test_operations_by_hand():
    weights = 100 * 8 + 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16) + 2 * 2 * 8 + 8
    assert SMALL.parameter_count() == weights
    attention = 2 * 10 * (2 * 4) * 2  # 2 T N H L: half of the 4 T N H L of full attention
    assert plan.forward_operations(SMALL, 10) == 2 * weights + attention
    untied = SMALL.model_copy(update={"tied_embeddings": False})
    assert plan.forward_operations(untied, 10) == 2 * weights + attention  # looking up costs nothing


def test_reinforcement_by_hand():
    assert plan.reinforcement_operations(10, episodes=2, length=3, reference=False) == 6 * (20 + 60)
    assert plan.reinforcement_operations(10, episodes=1, length=1, epochs=4) == 40 + 240
    with_all = plan.reinforcement_operations(10, episodes=1, length=1, reward=5, value=7, pretraining=8)
    assert with_all == 2 * (10 + 10 + 5 + 7) + 6 * 17 + 6 * 10 * 8


def test_memory_by_part():
    work = Work("a", "sft", 1e6, 1.0, 64, 16, 32)
    size = SMALL.parameter_count()
    parts = plan.memory_parts(SMALL, work, 1)
    assert parts["weights"] == parts["gradients"] == 4 * size
    assert parts["optimizer"] == 8 * size
    assert parts["logits"] == 8 * 32 * 100
    assert parts["activations"] == 32 * 2 * 2 * (4 * 8 + 2 * 8 + 2 * 4 + 3 * 16)
    assert "gathered" not in parts
    assert plan.memory_parts(SMALL, work, 4)["optimizer"] == 2 * size
    assert plan.memory_parts(SMALL, replace(work, shard_within=2), 4)["optimizer"] == 4 * size
    saved = plan.memory_parts(SMALL, replace(work, checkpointing=True), 1)
    assert saved["activations"] < parts["activations"]
    assert plan.memory_parts(SMALL, replace(work, optimizer="muon"), 1)["optimizer"] < parts["optimizer"]
    assert plan.memory_parts(SMALL, replace(work, generates=8), 1)["KV cache"] == 4 * 2 * 1 * 4 * 16 * 8
    wide = plan.memory_parts(SMALL, replace(work, is_fp32=True), 1)
    assert wide["activations"] == 2 * parts["activations"]
    assert "bf16 copies" in parts
    assert "bf16 copies" not in wide
    adapted = plan.memory_parts(SMALL, replace(work, adapters=10), 1)
    assert (adapted["adapters"], adapted["gradients"], adapted["optimizer"]) == (40, 40, 80)
    assert adapted["weights"] == parts["weights"]
    assert plan.memory_parts(SMALL, replace(work, adapters=10, optimizer="muon"), 1)["optimizer"] == 40
    assert (
        plan.memory_parts(SMALL, replace(work, frozen=10, trained_beside=10), 1)["other models"] == 40 + 160
    )


def test_what_fits_is_left_alone():
    _, advice = plan.recommended(BIG, WORK, plan.parse_hardware("8xH100"))
    assert advice == "fits as written (FSDP over all devices)."


def test_across_nodes_weights_are_shared_within_a_node():
    """3B fp32 weights gathered over the network for one or two rows are mostly waiting."""
    hardware = plan.parse_hardware("384xH100")
    suited, advice = plan.recommended(BIG, WORK, hardware)
    assert suited.shard_within == 8
    assert "FSDP within each node of 8" in advice
    assert "576 rows on 384 devices leave 25% of them idle; batch_size=768 leaves none" in advice
    flat = plan.update_seconds(BIG, WORK, hardware, WORK.batch_tokens)
    node = plan.update_seconds(BIG, suited, hardware, WORK.batch_tokens)
    assert flat[0] == node[0]
    assert flat[1] > 3 * node[1]


def test_the_communication_model_by_hand():
    hardware = replace(plan.parse_hardware("16xH100"), peak=1e15, efficiency=(0.5, 0.5), network=1e9)
    work = replace(WORK, token_operations=1e9, microbatch_tokens=4096)
    useful, lost = plan.update_seconds(BIG, work, hardware, 16 * 4096)
    computing = 4096 * 1e9 / 0.5e15
    moving = 12 * BIG.parameter_count() * 15 / 16 / 1e9
    assert useful == pytest.approx(computing)
    assert lost == pytest.approx(moving - 0.8 * computing + 3 * 36 * 20e-6 * 4)
    uneven = plan.update_seconds(BIG, work, hardware, 24 * 4096)
    assert sum(uneven) > 2 * computing  # two rows on the busiest


def test_the_smallest_change_that_fits():
    greedy = replace(WORK, microbatch_tokens=24 * 4096)
    eight = plan.parse_hardware("8xH100")
    suited, advice = plan.recommended(BIG, greedy, eight)
    assert plan.fits(BIG, suited, eight)
    assert not suited.checkpointing
    assert f"execution.microbatch_tokens={suited.microbatch_tokens} does" in advice
    assert not plan.fits(BIG, replace(suited, microbatch_tokens=2 * suited.microbatch_tokens), eight)
    # at 64k tokens a row one row is too much, unless activations are computed again
    long = replace(WORK, sequence_length=65_536, batch_tokens=36 * 65_536, microbatch_tokens=65_536)
    suited, advice = plan.recommended(BIG, long, plan.parse_hardware("36xH100"))
    assert suited.checkpointing
    assert "checkpoint_activations=true does" in advice


def test_what_no_change_makes_fit_names_the_hardware_that_would():
    _, advice = plan.recommended(BIG, WORK, plan.parse_hardware("1xRTX4090"))
    count = int(advice.split("does not fit: ")[1].split("xRTX4090 would do")[0])
    smallest = replace(WORK, microbatch_tokens=4096, checkpointing=True)
    assert plan.fits(BIG, smallest, plan.parse_hardware(f"{count}xRTX4090"))
    assert not plan.fits(BIG, smallest, plan.parse_hardware(f"{count - 1}xRTX4090"))
    endless = replace(WORK, sequence_length=10**7, batch_tokens=10**7, microbatch_tokens=10**7)
    assert "activations alone take" in plan.recommended(BIG, endless, plan.parse_hardware("8xH100"))[1]


def test_devices_without_a_row_are_named():
    small = replace(WORK, batch_tokens=4 * 4096)
    assert "Only 4 of 8 devices get a row" in plan.recommended(BIG, small, plan.parse_hardware("8xH100"))[1]


def test_scaling_curves():
    work = replace(WORK, shard_within=8)
    table = plan.scaling(BIG, work, plan.parse_hardware("384xH100"))
    assert table[0] == {"devices": 1, "strong": pytest.approx(1), "weak": pytest.approx(1)}
    assert [row["devices"] for row in table] == [2**i for i in range(11)]
    assert all(0 < row["strong"] <= 1 + 1e-9 and 0 < row["weak"] <= 1 + 1e-9 for row in table)
    assert table[-1]["strong"] < 0.6 < table[-1]["weak"]  # 576 rows on 1,024 devices
    slow = replace(plan.parse_hardware("384xH100"), network=1e9)
    assert plan.scaling(BIG, work, slow)[-1]["weak"] < table[-1]["weak"]


def test_time_cost_and_a_measured_efficiency():
    recipe = load_recipe("tiny", ["pretrain.tokens=10M"])
    cores = plan.parse_hardware("2xCPU")
    half = plan.plan_recipe(recipe, cores, efficiency=0.25, price=1.0)
    full = plan.plan_recipe(recipe, cores, efficiency=0.5, price=2.0)
    first, second = half.stages[0], full.stages[0]
    assert first.tokens == second.tokens == 10_000_000
    assert first.operations == first.tokens * half.token_operations
    assert first.seconds == pytest.approx(2 * second.seconds)
    assert first.seconds == pytest.approx(first.operations / (2 * 450e9 * 0.25))
    assert first.cost == pytest.approx(second.cost) == pytest.approx(first.seconds / 3600 * 2)
    assert (half.efficiency_from, plan.plan_recipe(recipe, cores).efficiency_from) == ("given", "assumed")
    with pytest.raises(NurtureError, match="--efficiency"):
        plan.plan_recipe(recipe, cores, efficiency=29)


def test_tokens_by_source_follow_the_phases():
    recipe = load_recipe("tiny", ["pretrain.tokens=8.192M"])
    stage = plan.plan_recipe(recipe, plan.parse_hardware("2xCPU")).stages[0]
    tokens = {name: source["tokens"] for name, source in stage.sources.items()}
    assert sum(tokens.values()) == pytest.approx(8_192_000)
    ends = [0, *(round(until * 4000) for until in (0.40, 0.56, 0.73, 0.89, 1.0))]
    wanted = sum(w * (b - a) * 2048 for w, a, b in zip((0.12, 0.06, 0.12, 0.14, 0.20), ends, ends[1:]))
    assert tokens["code"] == pytest.approx(wanted)
    assert stage.sources["code"]["text_bytes"] == 4 * tokens["code"]
    assert stage.sources["code"]["shard_bytes"] == 2 * tokens["code"]


def test_a_time_budget_decides_the_tokens_and_unread_data_is_named():
    recipe = load_recipe("tiny", ["pretrain.tokens=null", "pretrain.minutes=10"])
    stages = plan.plan_recipe(recipe, plan.parse_hardware("2xCPU")).stages
    assert stages[0].seconds == pytest.approx(600)
    sft = next(stage for stage in stages if stage.kind == "sft")
    assert sft.tokens is None
    assert "data that has not been read" in sft.unknown


def test_the_command():
    done = CliRunner().invoke(app, ["plan", "tiny", "--hardware", "2xCPU", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.output)
    assert data["hardware"] == "2xCPU"
    assert data["total"]["seconds"] == sum(stage["seconds"] or 0 for stage in data["stages"])
    shown = CliRunner().invoke(app, ["plan", "tiny"])
    assert shown.exit_code == 0
    assert "Memory of one device" in shown.output


def test_the_memory_of_many_stages_is_cut_into_tables_that_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = CliRunner().invoke(app, ["plan", "tiny"]).output
    assert printed.count("Memory of one device") == 2
    lines = printed.splitlines()
    for name in ("optimizer", "activations", "KV cache", "pretrain", "wordle"):
        assert any(name in line for line in lines if line.startswith(("│", "┃"))), name
