"""The extend stage: what it changes in the model, what it measures, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nurture.errors import NurtureError
from nurture.evals import long_context, replies
from nurture.model.config import ModelConfig, YarnConfig
from nurture.model.hugging_face import load_model
from nurture.model.transformer import Transformer
from nurture.runtime import Execution
from nurture.stages import extend
from nurture.stages.context import StageContext
from nurture.stages.training import save_result_model
from nurture.tokenizer import Tokenizer
from nurture.world import World
from nurture.world.long import KINDS


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = World()
    texts = [world.document(source, "train", i) for source in ("long", "web") for i in range(60)]
    tokenizer = Tokenizer.train(texts, 400)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, max_position=64
    )
    folder = tmp_path_factory.mktemp("start")
    save_result_model(Transformer(shape), tokenizer, folder, answers=False)
    return folder / "model"


def run(start: Path | None, directory: Path, **settings: object) -> dict:
    directory.mkdir(exist_ok=True)
    config = extend.Config.model_validate(
        {
            "name": "extend", "sources": {"long": "world:long", "web": "world:web"}, "steps": 3, "batch_size": 2,
            "sequence_length": 256, "heldout_tokens": 512, "probes": 10, "yarn": 2, "rope_theta": 20_000,
            "execution": {"precision": "fp32", "compile": "off"}, **settings,
        }
    )  # fmt: skip
    extend.run(config, StageContext(directory, start=start, cache=directory.parent / "cache"))
    return json.loads((directory / "result.json").read_text())


def test_it_trains_at_the_new_length_and_writes_the_reach_into_the_model(start: Path, tmp_path: Path) -> None:
    result = run(start, tmp_path / "stage")
    model = load_model(tmp_path / "stage/model")
    assert model.config.rope_theta == result["rope_theta"] == 20_000
    assert model.config.max_position == 512
    assert model.config.yarn == YarnConfig(factor=2, original_max_position=256)
    metrics = result["metrics"]
    # Probes are named by how many times longer than the start's rows they are.
    for kind in ("passkey", "multikey", "variables"):
        assert {f"{kind}/4x", f"{kind}_yarn/8x"} <= set(metrics)
        assert 0 <= metrics[f"{kind}/4x"]["before"] <= 1
    assert metrics["passkey/4x"]["n"] == 10
    # Of random weights, before, and of the trained model with its new rotations, after.
    for source in ("long", "web"):
        assert metrics[f"bpb/{source}"]["after"] < metrics[f"bpb/{source}"]["before"]
    found = json.loads((tmp_path / "stage/long_context.json").read_text())
    assert {cell["length"] for cell in found["after"]} == {64, 128, 256, 512}
    assert {cell["length"] for cell in found["before"]} == {256}
    assert result["tokens"] == 3 * 2 * 256


def test_the_start_is_measured_as_it_was(start: Path, tmp_path: Path) -> None:
    """Held-out bits before are those of the start's own rotations, whatever theta is trained with."""
    results = [
        run(start, tmp_path / f"{theta:.0f}", rope_theta=theta, probes=0, yarn=None) for theta in (1e4, 1e2)
    ]
    first, second = (result["metrics"]["bpb/web"] for result in results)
    assert first["before"] == second["before"]
    assert first["after"] != second["after"]
    assert not (tmp_path / "10000/long_context.json").exists()


def test_an_interrupted_stage_goes_on(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(start, tmp_path / "whole", probes=5)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(extend, "write_result", stop)
        with pytest.raises(KeyboardInterrupt):
            run(start, tmp_path / "again", probes=5)
    with monkeypatch.context() as watched:
        watched.setattr(extend, "find_again", stop)  # what was found is kept
        again = run(start, tmp_path / "again", probes=5)
    assert again["metrics"] == whole["metrics"]


def test_without_yarn_no_probe_counts_twice(start: Path, tmp_path: Path) -> None:
    result = run(start, tmp_path / "stage", yarn=None, probes=5)
    assert result["metrics"]["passkey/4x"]["n"] == 5


def test_a_probe_that_is_shown_leaves_room_for_its_reply(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without YaRN the context ends where the rows do: a prompt that fills it cannot be gone on with."""
    asked: list[int] = []

    def go_on(
        model: Transformer, prompts: list[list[int]], tokens: int, execution: Execution
    ) -> list[list[int]]:
        asked.extend(len(prompt) + tokens for prompt in prompts)
        return long_context.go_on(model, prompts, tokens, execution)

    monkeypatch.setattr(extend, "go_on", go_on)
    for length in (250, 254, 258):
        run(start, tmp_path / str(length), sequence_length=length, yarn=None, probes=0, steps=1)
        assert len(asked) == 3
        assert max(asked) <= length
        asked.clear()


def test_a_probe_that_is_shown_is_gone_on_with_as_the_engine_would(start: Path, tmp_path: Path) -> None:
    run(start, tmp_path / "stage", probes=0)
    model, tokenizer = load_model(tmp_path / "stage/model"), Tokenizer.load(tmp_path / "stage/model")
    shown = [json.loads(line) for line in (tmp_path / "stage/samples.jsonl").read_text().splitlines()]
    world = World()
    prompts = [world.retrieval(kind, "heldout", 0, length=256 - 9, depth=0.5,
                               size=lambda text: len(tokenizer.encode(text))).prompt for kind in KINDS]  # fmt: skip
    expected = replies.ask(model, tokenizer, prompts, max_tokens=8)
    assert [line["reply"] for line in shown] == [reply.text for reply in expected]


def test_theta_by_default_turns_the_slowest_pair_as_far_as_before() -> None:
    shape = ModelConfig(vocab_size=300, width=64, layers=1, heads=2, max_position=64, rope_theta=10_000)
    config = extend.Config(name="extend", sources={}, sequence_length=512)
    theta = extend._stretched_theta(shape, 64, config)
    slowest = [base ** (-(shape.head_width - 2) / shape.head_width) for base in (10_000, theta)]
    assert slowest[1] * 512 == pytest.approx(slowest[0] * 64)


def test_mistakes_are_named(start: Path, tmp_path: Path) -> None:
    with pytest.raises(NurtureError, match="needs a model to start from"):
        run(None, tmp_path / "none")
    with pytest.raises(NurtureError, match=r"multiple of|does not divide"):
        run(start, tmp_path / "shared", context_parallel=2)
    with pytest.raises(
        NurtureError, match=r"too short; reading .* Started again as it is, it need not measure"
    ):
        run(start, tmp_path / "hurried", steps=None, minutes=0.001)
