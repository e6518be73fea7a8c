"""The default recipe, shrunk to seconds: raw text to a chat-able model, and what it leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nurture.errors import NurtureError
from nurture.inference.chat import main as chat
from nurture.model.hugging_face import load_model
from nurture.optim import ScheduleConfig, learning_rate_factor
from nurture.pipeline import run
from nurture.stages import training
from nurture.stages.recipe import load_recipe
from nurture.tokenizer import Tokenizer

SMALL = [
    "model.width=32",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_width=64",
    "model.layers=2",
    "tokenizer.vocab_size=400",
    "tokenizer.sample_bytes=50000",
    "pretrain.steps=6",
    "pretrain.batch_size=4",
    "pretrain.sequence_length=64",
    "pretrain.heldout_tokens=256",
    "pretrain.loop.evaluate_every=3",
    "extend.steps=2",
    "extend.sequence_length=512",
    "extend.trained_length=64",
    "extend.batch_size=1",
    "extend.heldout_tokens=256",
    "extend.probes=2",
    "reason.steps=2",
    "reason.batch_size=4",
    "reason.conversations=24",
    "reason.heldout_conversations=2",
    "reason.reply_tokens=8",
    "pretrain.execution.compile=off",
    "reason.execution.compile=off",
    "sft.execution.compile=off",
    "sft.steps=3",
    "sft.batch_size=4",
    "sft.conversations=24",
    "sft.heldout_conversations=2",
    "sft.reply_tokens=8",
    "reward.comparisons=6",
    "reward.heldout_comparisons=4",
    "reward.answer_tokens=8",
    "reward.best_of=2",
    "reward.best_of_prompts=2",
    "reward.steps=2",
    "ppo.steps=2",
    "ppo.prompts_per_step=4",
    "ppo.batch_size=4",
    "ppo.prompts=24",
    "ppo.heldout_prompts=4",
    "ppo.max_tokens=8",
    "pairs.rows=24",
    "pairs.max_tokens=8",
    "apo.steps=2",
    "apo.batch_size=4",
    "apo.prompt_count=2",
    "apo.reply_tokens=8",
    "merge.prompt_count=2",
    "merge.reply_tokens=8",
    "merge.lengths=[64, 128]",
    "merge.score=[gold_reward, passkey/128]",
    "rlvr.steps=2",
    "rlvr.prompts_per_step=2",
    "rlvr.group_size=2",
    "rlvr.prompts=24",
    "rlvr.heldout_prompts=4",
    "rlvr.max_tokens=8",
    "wordle.steps=1",
    "wordle.prompts_per_step=2",
    "wordle.group_size=2",
    "wordle.prompts=24",
    "wordle.max_tokens=8",
]

STAGES = (
    "tokenizer",
    "pretrain",
    "extend",
    "reason",
    "sft",
    "reward",
    "ppo",
    "pairs",
    "apo",
    "merge",
    "rlvr",
    "wordle",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    outcome = run(load_recipe("tiny", SMALL), out)
    assert outcome.ran == STAGES
    return out


def test_a_second_run_runs_nothing_and_a_changed_setting_runs_what_depends_on_it(finished: Path) -> None:
    assert run(load_recipe("tiny", SMALL), finished).ran == ()
    assert run(load_recipe("tiny", [*SMALL, "sft.steps=2"]), finished).ran == STAGES[4:]


def test_results_have_the_agreed_shape(finished: Path) -> None:
    result = json.loads((finished / "01-pretrain/result.json").read_text())
    assert result["tokens"] == 6 * 4 * 64
    for source in ("web", "web-tavi", "forum", "code", "math"):
        entry = result["metrics"][f"bpb/{source}"]
        assert 0 < entry["after"] < entry["before"]
    shares = [entry["after"] for name, entry in result["metrics"].items() if name.startswith("share/")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    assert {"harm", "over_refusal"} <= set(result["metrics"])  # never the one without the other
    answered = json.loads((finished / "04-sft/result.json").read_text())["metrics"]
    for name in ("facts", "arithmetic", "format", "stopped", "harm", "over_refusal"):
        assert 0 <= answered[name]["low"] <= answered[name]["after"] <= answered[name]["high"] <= 1
    lines = [json.loads(line) for line in (finished / "01-pretrain/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert {"train/loss", "tokens/web", "epoch/web"} <= set().union(*lines)


def test_every_trained_stage_has_a_before_and_an_after(finished: Path) -> None:
    """Is it any good? Each stage answers with numbers of its start and its result; PPO also with who is preferred."""
    for place, stage in enumerate(STAGES):
        if stage in ("tokenizer", "pairs"):  # they change no model
            continue
        result = json.loads((finished / f"{place:02}-{stage}/result.json").read_text())
        assert any({"before", "after"} <= entry.keys() for entry in result["metrics"].values()), stage
    ppo = json.loads((finished / "06-ppo/result.json").read_text())
    for name in ("kl", "proxy_reward", "gold_reward"):
        assert {"before", "after"} <= ppo["metrics"][name].keys(), name
    assert 0 <= ppo["metrics"]["gold_win_rate"]["after"] <= 1
    assert ppo["kl_estimator"] == "k1"
    logged = [json.loads(line) for line in (finished / "06-ppo/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "rl/reward_mean" in line]
    assert len(steps) == 2
    watched = {"rl/kl", "rl/sampling_kl", "rl/entropy", "rl/clip_fraction", "rl/different", "rl/ungraded"}
    assert all(watched <= line.keys() for line in steps)


@pytest.mark.parametrize("stage", ["04-sft", "06-ppo", "08-apo", "09-merge", "10-rlvr", "11-wordle"])
def test_models_load_in_transformers_and_compute_the_same(finished: Path, stage: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = finished / stage / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder)
    tokenizer = Tokenizer.load(folder)
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Where does the fox live?"}]
    prompt = tokenizer.encode_prompt(messages)
    theirs_prompt = peer_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert prompt == theirs_prompt["input_ids"]
    token_ids = torch.tensor([prompt])
    torch.testing.assert_close(ours(token_ids), theirs(token_ids).logits, atol=1e-4, rtol=1e-4)
    assert tokenizer.end_of_turn_id in _as_list(theirs.generation_config.eos_token_id)


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def test_a_base_model_has_no_template_and_keeps_going(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (finished / "01-pretrain/model/chat_template.jinja").exists()
    assert (finished / "04-sft/model/chat_template.jinja").exists()
    assert Tokenizer.load(finished / "01-pretrain/model").chat_template is None
    chat(finished / "01-pretrain", prompt="The fox", max_tokens=5, seed=1)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["pretrain.sequence_length=4096"], r"sequence_length is 4096.*context is 1024"),
        (["pretrain.steps=null", "pretrain.tokens=null"], r"say how long to train"),
        (["pretrain.phases.0.weights.webb=1"], r"webb"),
        (["pretrain.loop.tracker=tensorbord"], r"unknown tracker 'tensorbord'"),
    ],
)
def test_mistakes_in_a_stage_are_one_clear_message(finished: Path, settings: list[str], message: str) -> None:
    with pytest.raises(NurtureError, match=message):
        run(load_recipe("tiny", [*SMALL, *settings]), finished.parent / "broken", until="pretrain")


def test_a_time_budget_chooses_the_steps_and_finishes_the_decay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten minutes at the speed of an update in twenty seconds: what the clock says of this machine hardly matters.
    monkeypatch.setattr(
        training,
        "measure_tokens_per_second",
        lambda model, optimizer, batches, *_, **__: batches(0, 0, 1).token_count / 20,
    )
    settings = [s for s in SMALL if not s.startswith("pretrain.steps")]
    budget = ["pretrain.tokens=null", "pretrain.minutes=10", "pretrain.loop.evaluate_every=null"]
    run(
        load_recipe("tiny", [*settings, *budget, "pretrain.loop.log_every=1"]),
        tmp_path / "run",
        until="pretrain",
    )
    stage = tmp_path / "run/01-pretrain"
    steps = json.loads((stage / "result.json").read_text())["steps"]
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    factors = [line["train/learning_rate_factor"] for line in lines if "train/learning_rate_factor" in line]
    assert 10 < steps == len(factors) < 30
    # Logged values are rounded to six digits.
    planned = [learning_rate_factor(ScheduleConfig(decay=0.3), step, steps) for step in range(steps)]
    assert factors == pytest.approx(planned, abs=1e-6)
    assert factors[-1] < 1.0
