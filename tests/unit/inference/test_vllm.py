"""The vLLM backend against a stand-in that keeps vLLM's interface and computes with our own engine.

What the stand-in cannot show is that a GPU's kernels agree; what it does show is the contract: the arguments vLLM takes,
weights by checkpoint names, logprobs of the drawn tokens, turns that go on from exact tokens.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nurture.errors import NurtureError
from nurture.inference.engine import Completion, Engine
from nurture.inference.sampling import SamplingParams
from nurture.inference.vllm import VllmEngine
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model
from nurture.model.transformer import Transformer
from nurture.model.weights import checkpoint_tensors


@dataclass
class FakeParams:
    """The fields of vllm.SamplingParams that are used, refused where vLLM would refuse them."""

    max_tokens: int
    temperature: float
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    logprobs: int
    seed: int

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1
        assert 0 <= self.seed < 2**63


class FakeLLM:
    """vllm.LLM: loads a checkpoint folder, takes pushed weights by name, answers with RequestOutputs."""

    def __init__(
        self, model: str, *, skip_tokenizer_init: bool, dtype: str, max_model_len: int, max_num_seqs: int,
        gpu_memory_utilization: float, enable_prefix_caching: bool, logprobs_mode: str,
    ) -> None:  # fmt: skip
        self.inside = load_model(model)
        self.forgotten, self.requests = 0, []  # type: ignore[var-annotated]

    def apply_model(self, function: Any) -> list[Any]:
        return [function(self)]

    def load_weights(self, weights: Any) -> None:
        given = dict(weights)
        mine = dict(checkpoint_tensors(self.inside.config, "lm", dict(self.inside.named_parameters())))
        assert given.keys() == mine.keys()
        with torch.no_grad():
            for name, tensor in given.items():
                mine[name].copy_(tensor)

    def reset_prefix_cache(self) -> bool:
        self.forgotten += 1
        return True

    def generate(
        self, prompts: Sequence[Any], *, sampling_params: list[FakeParams], use_tqdm: bool
    ) -> list[Any]:
        engine, outputs = Engine(self.inside), []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ours = SamplingParams(
                params.max_tokens, params.temperature, stop_token_ids=tuple(params.stop_token_ids)
            )
            (one,) = engine.generate([prompt["prompt_token_ids"]], ours, [params.seed])
            self.requests.append((prompt["prompt_token_ids"], params))
            places = [
                {token: SimpleNamespace(logprob=logprob, rank=1)}
                for token, logprob in zip(one.token_ids, one.logprobs)
            ]
            output = SimpleNamespace(
                token_ids=tuple(one.token_ids), logprobs=places, finish_reason=one.finish_reason
            )
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return outputs


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=24, width=32, layers=2, heads=2, max_position=48, init_std=0.3))


@pytest.fixture
def engine(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=FakeParams))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    return VllmEngine(model)


def logprobs_of(model: Transformer, tokens: list[int], temperature: float) -> list[float]:
    with torch.no_grad():
        table = model(torch.tensor([tokens])).div(temperature).log_softmax(-1)[0]
    return [float(table[place - 1, token]) for place, token in enumerate(tokens)][1:]


def test_it_has_the_engines_interface() -> None:
    for name in ("converse", "generate", "refresh"):
        assert inspect.signature(getattr(VllmEngine, name)) == inspect.signature(getattr(Engine, name))


def test_episodes_go_on_from_exact_tokens_with_the_trainers_logprobs(
    engine: VllmEngine, model: Transformer
) -> None:
    prompts = [[1, 2, 3], [4, 5], [6]]
    params = SamplingParams(max_tokens=6, temperature=0.8, stop_token_ids=tuple(range(12, 24)))

    def respond(turns: list[tuple[int, Completion]]) -> list[list[int] | None]:
        return [[7, 8, index] if turn.finish_reason == "stop" else None for index, turn in turns]

    episodes = engine.converse(prompts, respond, params, [11, 12, 13], max_length=40)
    assert max(len(episode.turns) for episode in episodes) > 1
    for prompt, episode in zip(prompts, episodes, strict=True):
        tokens, mine, logprobs = episode.flat()
        assert len(prompt) + len(tokens) <= 40
        expected = logprobs_of(model, prompt + tokens, 0.8)[len(prompt) - 1 :]
        assert [l for l, own in zip(logprobs, mine) if own] == pytest.approx(
            [l for l, own in zip(expected, mine) if own], abs=1e-4
        )
        for turn in episode.turns[:-1]:
            assert turn.finish_reason == "stop"
            assert turn.token_ids[-1] >= 12
    again = engine.converse(prompts, respond, params, [11, 12, 13], max_length=40)
    assert [episode.flat() for episode in again] == [episode.flat() for episode in episodes]
    seeds = [params.seed for _, params in engine._llm.requests]
    assert len(set(seeds)) == len(seeds) // 2


def test_changed_weights_are_pushed_and_the_prefix_cache_forgotten(
    engine: VllmEngine, model: Transformer
) -> None:
    greedy = SamplingParams(max_tokens=5, temperature=0.0)
    before = engine.generate([[1, 2, 3]], greedy)
    assert engine._llm.forgotten == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    after = engine.generate([[1, 2, 3]], greedy)
    assert engine._llm.forgotten == 1
    assert after[0].token_ids == Engine(model).generate([[1, 2, 3]], greedy)[0].token_ids
    assert after[0].logprobs != pytest.approx(before[0].logprobs, abs=1e-3)


def test_a_full_context_ends_the_episode(engine: VllmEngine) -> None:
    params = SamplingParams(max_tokens=4, stop_token_ids=tuple(range(24)))
    (episode,) = engine.converse([[1, 2]], lambda turns: [[3] * 20 for _ in turns], params, max_length=30)
    assert (len(episode.turns), len(episode.answers), episode.is_full) == (2, 1, True)


def test_what_it_refuses(engine: VllmEngine, model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NurtureError, match="without top_k"):
        engine.generate([[1]], SamplingParams(top_k=5))
    with pytest.raises(NurtureError, match="prompt 1 has 48 tokens; between 1 and 47"):
        engine.generate([[1], [1] * 48])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NurtureError, match="needs a GPU"):
        VllmEngine(model)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(NurtureError, match="pip install vllm"):
        VllmEngine(model)
