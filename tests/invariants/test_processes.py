"""Any number of processes, however they divide the work and whatever becomes of them, train the model that one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extend_toy import extended, said
from rl_toy import toy_learn
from training_toy import toy_fit

from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.pipeline import run
from nurture.stages.recipe import load_recipe
from nurture.stages.training import save_result_model
from nurture.tokenizer import Tokenizer
from nurture.world import World

TESTS = Path(__file__).resolve().parent.parent


def torchrun(script: str, *words: str, processes: int, restarts: int = 0) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(TESTS / script), *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_processes_leave_their_group_before_the_interpreter_ends(tmp_path: Path) -> None:
    """Without it an interpreter may abort at its end, and torchrun count work that is done as failed."""
    script = tmp_path / "joins.py"
    script.write_text(
        "import atexit, os, pathlib\nimport torch.distributed as dist\nfrom nurture.runtime import join_processes\n"
        f"said = pathlib.Path({str(tmp_path)!r}) / ('rank' + os.environ['RANK'])\n"
        "atexit.register(lambda: said.write_text(str(dist.is_initialized())))\n"
        "join_processes()\nassert dist.is_initialized()\n"
    )
    torchrun(str(script), processes=2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["False", "False"]


def assert_alike(trained: torch.nn.Module, other: torch.nn.Module) -> None:
    """Check that the weights of two models are the same but for the order of sums."""
    for (name, mine), theirs in zip(trained.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-2, msg=name)


def curve(directory: Path, key: str = "train/loss") -> list[float]:
    written = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in written if key in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines]


@pytest.mark.slow
def test_reinforcement_learning_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    """Prompts are shared over the ranks and sampled as one process would; policy and value model resume in two, in one."""
    settings = {"batch_size": 48, "loop": {"log_every": 1}}
    toy_learn(tmp_path / "one", 5, **settings)
    many = tmp_path / "many"
    torchrun("rl_toy.py", str(many), "5", "save_every=2", "batch_size=48", processes=4)
    forget_after(many, 4)
    torchrun("rl_toy.py", str(many), "5", "save_every=1", "batch_size=48", processes=2)
    forget_after(many, 4)
    toy_learn(many, 5, **settings)
    for key in ("rl/reward_mean", "rl/length", "rl/policy_loss", "rl/value_loss", "rl/grad_norm"):
        assert curve(many, key) == pytest.approx(curve(tmp_path / "one", key), rel=2e-3, abs=2e-5), key
    assert rl_ledger(many, 5) == rl_ledger(tmp_path / "one", 5)


def rl_ledger(directory: Path, step: int) -> list[dict[str, int]]:
    progress = json.loads((directory / f"state/step-{step:08d}/progress.json").read_text())["progress"]
    return [progress[model]["tokens"] for model in ("policy", "value")]


def forget_after(directory: Path, step: int) -> None:
    for state in (directory / "state").glob("step-*"):
        if state.name > f"step-{step:08d}":
            shutil.rmtree(state)


@pytest.mark.slow
def test_four_lose_one_and_start_again_then_two_go_on_then_one(tmp_path: Path) -> None:
    """A rank of four is killed before its sixth update; torchrun starts all of them again from the third."""
    one, report = toy_fit(tmp_path / "one", 12)
    many = tmp_path / "many"
    out = torchrun("training_toy.py", str(many), "12", "save_every=3", "dies=2:5", processes=4, restarts=1)
    assert "exitcode: -9" in out
    assert curve(many) == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    forget_after(many, 9)
    assert (many / "state/step-00000009").exists()
    torchrun("training_toy.py", str(many), "12", "save_every=1", processes=2)
    assert curve(many) == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    forget_after(many, 11)
    again, last = toy_fit(many, 12)
    assert curve(many) == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    assert last.tokens == report.tokens  # the ledger: the same data, once
    assert one is not None
    assert again is not None
    assert_alike(again, one)


@pytest.mark.slow
def test_adapters_train_in_two_processes_as_in_one(tmp_path: Path) -> None:
    one, _ = toy_fit(tmp_path / "one", 8, lora=True)
    torchrun("training_toy.py", str(tmp_path / "two"), "8", "lora=on", processes=2)
    losses = curve(tmp_path / "one")
    assert losses[-1] < losses[0] - 0.05
    assert curve(tmp_path / "two") == pytest.approx(losses, rel=2e-4)
    assert curve(tmp_path / "two", "train/grad_norm") == pytest.approx(
        curve(tmp_path / "one", "train/grad_norm"), rel=2e-3
    )
    from nurture.model.hugging_face import load_model

    assert one is not None
    assert_alike(load_model(tmp_path / "two/model"), one)


SMALL = """
name: small
model: {width: 32, layers: 2, heads: 2, kv_heads: 1, ffn_width: 64, max_position: 512}
tokenizer: {vocab_size: 400, sample_bytes: 50000}
stages:
  - {kind: pretrain, sources: {web: world:web}, steps: 2, batch_size: 4, sequence_length: 64, heldout_tokens: 256}
  - kind: sft
    data: {tasks: world:tasks}
    conversations: 24
    heldout_conversations: 2
    reply_tokens: 8
    steps: 6
    batch_size: 4
    sequence_length: 128
    loop: {save_every: 2, log_every: 1}
  - kind: reward
    data: {tasks: world:tasks}
    comparisons: 24
    heldout_comparisons: 8
    answer_tokens: 8
    best_of: 2
    best_of_prompts: 2
    steps: 2
    batch_size: 4
    sequence_length: 512
  - kind: ppo
    start: sft
    reward_model: reward
    data: {tasks: world:tasks}
    prompts: 40
    heldout_prompts: 4
    steps: 4
    prompts_per_step: 4
    group_size: 2
    batch_size: 8
    epochs: 1
    max_tokens: 12
    sequence_length: 128
    loop: {save_every: 1, log_every: 1}
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in two processes, undisturbed."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(SMALL)
    words = ("run", str(folder / "small.yaml"), "--out", str(folder / "straight"))
    torchrun("dying_nurture.py", "nobody:0", *words, processes=2)
    return folder / "straight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "updates", "curves"),
    [("02-sft", 5, ["train/loss"]), ("04-ppo", 5, ["rl/reward_mean", "rl/value_loss"])],
)
def test_a_run_whose_rank_is_killed_ends_with_the_weights_of_an_undisturbed_one(
    straight: Path, tmp_path: Path, stage: str, updates: int, curves: list[str]
) -> None:
    """`nurture run` under torchrun: rank 1 is killed before a later update of a stage; its last state goes on."""
    disturbed = tmp_path / "disturbed"
    shutil.copytree(straight, disturbed, symlinks=True)
    shutil.rmtree(disturbed / stage)
    words = ("run", str(straight.parent / "small.yaml"), "--out", str(disturbed), "--until", stage[3:])
    out = torchrun("dying_nurture.py", f"1:{updates}", *words, processes=2, restarts=1)
    assert "exitcode: -9" in out
    assert f"{stage}: was interrupted, goes on" in out
    results = [json.loads((run / stage / "result.json").read_text()) for run in (straight, disturbed)]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["metrics"] == results[1]["metrics"]  # also those of before training, remembered
    for key in curves:
        assert curve(disturbed / stage, key) == curve(straight / stage, key)
    weights = [(run / stage / "model/model.safetensors").read_bytes() for run in (straight, disturbed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_find_again_what_one_does(tmp_path: Path) -> None:
    """Probes of long context are shared, on the sharded model: their outcomes, what is said, the samples, the result."""
    world = World()
    tokenizer = Tokenizer.train([world.document("web", "train", index) for index in range(60)], 400)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=2, heads=2, kv_heads=1, max_position=64
    )
    save_result_model(Transformer(shape), tokenizer, tmp_path / "start", answers=False)
    start = tmp_path / "start/model"
    extended(start, tmp_path / "one")
    torchrun("extend_toy.py", str(start), str(tmp_path / "two"), processes=2)
    for name in ("long_context.json", "samples.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text(), name
    results = [
        json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("one", "two")
    ]
    assert {name for name in results[0] if name.startswith("passkey")} == {"passkey/4x", "passkey_yarn/8x"}
    for name, one in results[0].items():
        assert results[1][name] == pytest.approx(one, rel=1e-3), name
    alone = said()
    assert len({token for answer in alone for token in answer}) > 5
    assert json.loads((tmp_path / "two/said.json").read_text()) == alone
    torchrun("extend_toy.py", str(start), str(tmp_path / "cut"), "2", processes=4)
    assert json.loads((tmp_path / "cut/said.json").read_text()) == alone


MERGED = """
name: merged
model: {width: 32, layers: 1, heads: 2, kv_heads: 1, ffn_width: 64, max_position: 256}
tokenizer: {vocab_size: 400, sample_bytes: 50000}
stages:
  - {kind: pretrain, sources: {web: world:web}, steps: 2, batch_size: 4, sequence_length: 64, heldout_tokens: 256}
  - {kind: pretrain, name: longer, sources: {web: world:web}, steps: 4, batch_size: 4, sequence_length: 64, heldout_tokens: 256}
  - kind: merge
    models: [pretrain]
    sweep: [0.5]
    score: [bpb/web]
    prompts: world:tasks:fact
    prompt_count: 2
    reply_tokens: 8
    lengths: [100, 200]
    compare: [pretrain]
    data: {web: world:web}
    heldout_tokens: 9000
"""


@pytest.mark.slow
def test_a_merge_is_measured_by_two_processes_as_by_one(tmp_path: Path) -> None:
    recipe = tmp_path / "merged.yaml"
    recipe.write_text(MERGED)
    one, two = tmp_path / "one", tmp_path / "two"
    run(load_recipe(recipe), one)
    shutil.copytree(one, two, symlinks=True)
    shutil.rmtree(two / "03-merge")
    torchrun("dying_nurture.py", "nobody:0", "run", str(recipe), "--out", str(two), processes=2)
    weights = [(folder / "03-merge/model/model.safetensors").read_bytes() for folder in (one, two)]
    assert weights[0] == weights[1]
    results = [json.loads((folder / "03-merge/result.json").read_text()) for folder in (one, two)]
    assert {"passkey/100", "passkey/200", "gold_reward", "bpb/web"} <= set(results[0]["metrics"])
    assert results[1]["weights"] == results[0]["weights"]
    for name, measured in results[0]["metrics"].items():
        assert results[1]["metrics"][name] == pytest.approx(measured, abs=2e-6), name
    for key in ("sweep", "table"):
        for mine, theirs in zip(results[0][key], results[1][key], strict=True):
            assert mine.keys() == theirs.keys()
            assert list(mine.values()) == [
                pytest.approx(v, abs=2e-6) if isinstance(v, float) else v for v in theirs.values()
            ]
    assert not (two / "03-merge/state").exists() or not (two / "03-merge/state/tried").exists()


@pytest.mark.parametrize(("processes", "parts"), [(2, 2), (4, 2)])
def test_a_model_cut_over_processes_is_the_model(processes: int, parts: int) -> None:
    """Loss, logprobs, entropies, logits and all gradients; grouped queries, QK norm, an untied and a scalar head."""
    assert "equal" in torchrun("tensor_parallel_toy.py", str(parts), processes=processes)


def test_tensor_parallel_training_gives_the_curve_of_one(tmp_path: Path) -> None:
    one, _ = toy_fit(tmp_path / "one", 8)
    words = (str(tmp_path / "cut"), "8", "tensor_parallel=2", "save_every=4")
    torchrun("training_toy.py", *words, processes=4)
    forget_after(tmp_path / "cut", 4)
    torchrun("training_toy.py", *words, processes=2)  # resumes with as many parts, but half the rows at once
    assert curve(tmp_path / "cut") == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    from nurture.model.hugging_face import load_model

    assert one is not None
    assert_alike(load_model(tmp_path / "cut/model"), one)
