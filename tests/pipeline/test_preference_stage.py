"""The preference stage from rows to a model: what it learns, keeps, resumes, and shares among processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nurture.data.preference import CUT
from nurture.errors import NurtureError
from nurture.evals.replies import ask
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model
from nurture.model.transformer import Transformer
from nurture.stages import preference, training
from nurture.stages.context import StageContext
from nurture.stages.training import save_result_model
from nurture.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COLOURS = "red green blue black white grey brown pink".split()


def rows() -> list[dict]:
    """Whatever is asked, the chosen says yes and the rejected says no."""
    return [
        {
            "prompt": f"Is {a} like {b}?",
            "chosen": f"Yes, {a} it is.",
            "rejected": f"No, {b} it is not." if a < b else "No.",
        }
        for a in COLOURS
        for b in COLOURS
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tokenizer = Tokenizer.train([text for row in rows() for text in row.values()], 320)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, kv_heads=1, max_position=256
    )
    save_result_model(Transformer(shape), tokenizer, folder, answers=True)
    return folder


def settings(**changes: object) -> preference.Config:
    base = {
        "name": "preference",
        "data": {"colours": "rows.jsonl"},
        "steps": 6,
        "batch_size": 2,
        "sequence_length": 128,
        "heldout_every": 5,
        "prompt_count": 4,
        "reply_tokens": 12,
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
        "loop": {"log_every": 1, "evaluate_every": 3},
        "execution": {"precision": "fp32", "compile": "off"},
    }
    return preference.Config.model_validate({**base, **changes})


def train(start: Path, directory: Path, **changes: object) -> dict:
    directory.mkdir(parents=True, exist_ok=True)
    context = StageContext(directory, start=start / "model", base=start, cache=directory.parent / "cache")
    preference.run(settings(**changes), context)
    return json.loads((directory / "result.json").read_text())


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def assert_same_model(one: Path, other: Path) -> None:
    theirs = dict(load_model(other / "model").named_parameters())
    for name, tensor in load_model(one / "model").named_parameters():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("loss", ["dpo", "ipo", "apo_zero", "apo_down", "kto"])
def test_every_loss_learns_a_planted_preference(start: Path, tmp_path: Path, loss: str) -> None:
    # apo_down lowers the chosen too, so it takes longer to tell the two apart.
    result = train(start, tmp_path / "stage", loss=loss, steps=80 if loss == "apo_down" else 25, beta=0.3)
    metrics = result["metrics"]
    accuracy = metrics["label_accuracy" if loss == "kto" else "pair_accuracy"]
    assert accuracy["after"] >= 0.95
    assert accuracy["low"] <= accuracy["after"] <= accuracy["high"]
    assert metrics["rejected_drift"]["before"] == pytest.approx(0, abs=1e-5)
    assert metrics["rejected_drift"]["after"] < metrics["chosen_drift"]["after"]
    assert accuracy["before"] == 0.5
    assert 0 <= metrics["stopped"]["after"] <= 1
    logged = [json.loads(line) for line in (tmp_path / "stage/metrics.jsonl").read_text().splitlines()]
    assert {"train/chosen_drift", "train/rejected_drift", "eval/rejected_drift"} <= set().union(*logged)


def test_with_the_likelihood_beside_it_the_model_says_the_chosen(start: Path, tmp_path: Path) -> None:
    train(start, tmp_path / "stage", loss="dpo", nll_weight=1.0, steps=60)
    question = [[{"role": "user", "content": "Is red like blue?"}]]
    said = [
        ask(load_model(folder), Tokenizer.load(folder), question, max_tokens=20)[0].text
        for folder in (start / "model", tmp_path / "stage/model")
    ]
    assert [text.startswith("Yes") for text in said] == [False, True]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_answers_that_are_cut_off_are_counted_and_told(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, loss: str
) -> None:
    """They lose their end token, and with it what teaches to stop."""
    caplog.set_level("INFO")
    whole = train(start, tmp_path / "whole", loss=loss, steps=1)
    assert "preferences: " not in [
        record.getMessage() for record in caplog.records
    ]  # nothing lost, nothing said
    assert CUT not in whole["preferences"]["left_out"]
    assert "cut off" not in caplog.text
    cut = train(start, tmp_path / "cut", loss=loss, steps=1, answer_tokens=28)
    assert 0 < cut["preferences"]["left_out"][CUT] <= cut["preferences"]["comparisons"]
    assert "cut off after 28 tokens" in caplog.text


def test_the_reference_is_run_once_and_its_cache_is_checked(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(start, tmp_path / "one")
    computed = []
    compute = preference._add_logprobs
    monkeypatch.setattr(preference, "_add_logprobs", lambda *args: (computed.append(1), compute(*args))[1])
    train(start, tmp_path / "two")
    assert not computed
    assert_same_model(tmp_path / "one", tmp_path / "two")
    for file in (tmp_path / "cache/reference").iterdir():
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x40
        file.write_bytes(content)
    train(start, tmp_path / "three")
    assert len(computed) == 2  # training and held-out preferences
    assert "is damaged" in caplog.text
    assert_same_model(tmp_path / "one", tmp_path / "three")
    # Another reference has another place in the cache, and the policy then does not start at it.
    torch.manual_seed(5)
    other = tmp_path / "other"
    save_result_model(
        Transformer(load_model(start / "model").config), Tokenizer.load(start / "model"), other, answers=True
    )
    (tmp_path / "four").mkdir()
    context = StageContext(
        tmp_path / "four", start=start / "model", base=start, cache=tmp_path / "cache",
        models={"other": other / "model"},
    )  # fmt: skip
    preference.run(settings(reference="other"), context)
    drift = json.loads((tmp_path / "four/result.json").read_text())["metrics"]["chosen_drift"]["before"]
    assert abs(drift) > 0.1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the reference is run over, each time it is."""
    counts: list[int] = []
    compute = preference._add_logprobs
    monkeypatch.setattr(
        preference, "_add_logprobs", lambda *args: (counts.append(len(args[4])), compute(*args))[1]
    )
    return counts


def test_the_reference_is_asked_for_the_rows_that_are_read_and_a_longer_run_adds_the_rest(
    start: Path, tmp_path: Path, asked: list[int]
) -> None:
    wide = {"execution": {"precision": "fp32", "compile": "off", "microbatch_tokens": 3 * 128}}
    train(start, tmp_path / "short", steps=2, **wide)
    heldout, read = asked
    assert read == 6  # four rows are trained on; three are computed at a time
    train(start, tmp_path / "long", steps=6, **wide)
    assert asked[2:] == [6]
    # Grown piece by piece, the cache holds what one pass gives: the same weights, bit for bit.
    shutil.rmtree(tmp_path / "cache")
    train(start, tmp_path / "fresh", steps=6, **wide)
    assert asked[3:] == [heldout, 12]
    assert_same_model(tmp_path / "long", tmp_path / "fresh")


def test_a_time_budget_counts_the_references_pass_and_only_what_it_reads_is_passed(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    def measured(model: torch.nn.Module, _: object, batches: Any, loss_fn: Any, **__: object) -> float:
        passes: list[int] = []
        hook = model.register_forward_hook(lambda *_: passes.append(1))
        loss_fn(model, batches(0))
        hook.remove()
        assert len(passes) == 2
        return 2 * 128 / 30  # an update of two rows takes half a minute

    monkeypatch.setattr(training, "measure_tokens_per_second", measured)
    alone = {"precision": "fp32", "compile": "off", "microbatch_tokens": 128}
    train(start, tmp_path / "stage", steps=None, minutes=2.0, execution=alone)
    assert len(losses(tmp_path / "stage")) == 3
    assert sum(asked[1:]) == 3 * 2


def test_cached_values_survive_the_disk_and_a_wrong_shape_is_not_taken(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    preference.write_cached(tmp_path / "cache/x.safetensors", values)
    assert np.array_equal(preference.read_cached(tmp_path / "cache/x.safetensors", (5, 2)), values)
    assert preference.read_cached(tmp_path / "cache/x.safetensors", (6, 2)) is None
    assert preference.read_cached(tmp_path / "cache/y.safetensors", (5, 2)) is None
    (tmp_path / "cache/x.safetensors").write_bytes(b"short")
    assert preference.read_cached(tmp_path / "cache/x.safetensors", (5, 2)) is None


def test_a_stage_that_was_interrupted_ends_with_the_same_weights(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(start, tmp_path / "straight")
    from nurture import trainer

    step, calls = trainer.train_step, []

    def dying(*args: object, **how: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args, **how)

    monkeypatch.setattr(trainer, "train_step", dying)
    interrupted = {"loop": {"log_every": 1, "evaluate_every": 3, "save_every": 2}}
    with pytest.raises(KeyboardInterrupt):
        train(start, tmp_path / "resumed", **interrupted)
    resumed = train(start, tmp_path / "resumed", **interrupted)
    assert len(calls) == 5 + 2
    assert_same_model(tmp_path / "straight", tmp_path / "resumed")
    assert resumed["metrics"] == straight["metrics"]


def test_the_worlds_prompts_give_a_gold_win_rate_and_a_reward_model_a_proxy_one(
    start: Path, tmp_path: Path
) -> None:
    (tmp_path / "stage").mkdir()
    reward = tmp_path / "reward"
    model = Transformer(load_model(start / "model").config, head="scalar")
    save_result_model(model, Tokenizer.load(start / "model"), reward, answers=True)
    context = StageContext(
        tmp_path / "stage", start=start / "model", base=start, cache=tmp_path / "cache",
        models={"rm": reward / "model"},
    )  # fmt: skip
    config = settings(prompts="world:tasks:fact,redteam", reward_model="rm", steps=2)
    preference.run(config, context)
    metrics = json.loads((tmp_path / "stage/result.json").read_text())["metrics"]
    assert metrics["gold_win_rate"]["n"] == metrics["proxy_win_rate"]["n"] == 8
    assert {"facts", "harm", "gold_reward", "proxy_reward"} <= set(metrics)
    assert "before" in metrics["gold_reward"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"w": "world:tasks"}}, "has demonstrations and no preferences"),
        (
            {"sequence_length": 16},
            r"no preference is left to train on: \d+ prompt leaves no room.* after 8 tokens",
        ),
        ({"prompts": "world:tasks:fakt"}, "Did you mean 'fact'"),
    ],
)
def test_mistakes_are_named(start: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(NurtureError, match=message):
        train(start, tmp_path / "stage", **changes)


def test_two_processes_learn_what_one_does(start: Path, tmp_path: Path) -> None:
    train(start, tmp_path / "one/01-preference", steps=4)
    overrides = [
        "steps=4", "batch_size=2", "sequence_length=128", "heldout_every=5", "prompt_count=4", "reply_tokens=12",
        "optimizer.learning_rate=3e-3", "optimizer.weight_decay=0.0", "loop.log_every=1", "loop.evaluate_every=3",
        "execution.precision=fp32", "execution.compile=off",
    ]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "nurture",
    ]
    command += ["preference", "--model", str(start / "model"), "--data", f"colours={start / 'rows.jsonl'}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two"), *overrides],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = tmp_path / "one/01-preference", tmp_path / "two/01-preference"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    results = [json.loads((folder / "result.json").read_text())["metrics"] for folder in (one, two)]
    assert results[1]["rejected_drift"]["after"] == pytest.approx(
        results[0]["rejected_drift"]["after"], rel=1e-3
    )
    assert results[1]["pair_accuracy"]["n"] == results[0]["pair_accuracy"]["n"]
