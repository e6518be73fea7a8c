"""Stopping, limits, and what the engine refuses."""

from __future__ import annotations

import pytest
import torch

from nurture.errors import NurtureError
from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=40, width=16, layers=2, heads=2, max_position=50, init_std=0.3))


def test_a_stop_token_ends_the_completion_and_is_its_last(model: Transformer) -> None:
    free = Engine(model).generate([[1]], SamplingParams(max_tokens=30))[0]
    stop = free.token_ids[11]
    stopped = Engine(model).generate([[1]], SamplingParams(max_tokens=30, stop_token_ids=(stop,)))[0]
    first = free.token_ids.index(stop)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.logprobs == pytest.approx(free.logprobs[: first + 1], abs=1e-5)
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")


def test_a_first_token_that_stops(model: Transformer) -> None:
    first = Engine(model).generate([[1]], SamplingParams(max_tokens=1))[0].token_ids
    completion = Engine(model).generate([[1]], SamplingParams(stop_token_ids=(first[0],)))[0]
    assert (completion.token_ids, completion.finish_reason) == (first, "stop")


@pytest.mark.parametrize("max_tokens", [1, 2, 8, 9, 17])
def test_max_tokens_is_exact_for_every_row(model: Transformer, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=(39,))
    for completion in Engine(model, max_batch=2).generate([[1], [2, 3], [4]], params):
        assert len(completion.token_ids) == len(completion.logprobs)
        assert len(completion.token_ids) == max_tokens or completion.token_ids[-1] == 39


def test_the_context_ends_a_completion(model: Transformer) -> None:
    completions = Engine(model).generate([[1] * 45, [2] * 10], SamplingParams(max_tokens=20))
    assert [len(completion.token_ids) for completion in completions] == [5, 20]
    assert completions[0].finish_reason == "length"


def test_same_seed_same_tokens_other_seed_other_tokens(model: Transformer) -> None:
    engine = Engine(model)
    once, again, other = (
        engine.generate([[1], [1]], SamplingParams(max_tokens=20, seed=seed)) for seed in (3, 3, 4)
    )
    assert once == again
    assert once[0].token_ids != other[0].token_ids
    assert once[0].token_ids != once[1].token_ids


def test_no_prompts_no_completions(model: Transformer) -> None:
    assert Engine(model).generate([]) == []


def test_stream_takes_up_a_conversation_where_it_differs(model: Transformer) -> None:
    """A longer, a shorter and an unrelated prompt after one another: each as from an engine of its own."""
    engine, params = Engine(model), SamplingParams(max_tokens=6)
    first = [1, 2, 3, 4]
    reply = list(engine.stream(first, params))
    for prompt in ([*first, *reply, 5, 6], [1, 2, 3], [1, 2, 3], [9, 9], [9]):
        assert list(engine.stream(prompt, params)) == list(Engine(model).stream(prompt, params))


def test_a_stream_left_early_does_not_disturb_the_next(model: Transformer) -> None:
    engine, params = Engine(model), SamplingParams(max_tokens=12)
    for _ in zip(range(3), engine.stream([1, 2, 3], params), strict=False):
        pass
    assert list(engine.stream([1, 2, 3, 8], params)) == list(Engine(model).stream([1, 2, 3, 8], params))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1, 40]], "token id 40, but the model's vocabulary has 40"),
        ([[-1]], "token id -1"),
        ([[1] * 50], "prompt 0 has 50 tokens, but the model's context is 50"),
    ],
)
def test_bad_prompts_are_named(model: Transformer, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(NurtureError, match=message):
        Engine(model).generate(prompts)


def test_other_refusals(model: Transformer) -> None:
    with pytest.raises(NurtureError, match="2 prompts need as many seeds, got 1"):
        Engine(model).generate([[1], [2]], seeds=[0])
    with pytest.raises(NurtureError, match="max_batch must be at least 1"):
        Engine(model, max_batch=0)
    with pytest.raises(NurtureError, match="scalar head cannot generate"):
        Engine(Transformer(model.config, head="scalar"))
