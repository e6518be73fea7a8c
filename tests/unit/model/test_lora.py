"""Adapters: nothing changes when they are added, they alone are trained, and merged they are the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

from nurture.checkpoint import load_state, save_state
from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.config import ModelConfig
from nurture.model.lora import (
    AdaptableLinear,
    Adapter,
    LoraConfig,
    adapter_count,
    adapters,
    adapters_off,
    add_adapters,
)
from nurture.model.parallel import whole_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.runtime import ExecutionConfig, Processes, decide_execution

CONFIG = ModelConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, max_position=64)
TOKENS = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(0))


def adapted(head: str = "lm", train: bool = True) -> tuple[Transformer, torch.Tensor]:
    """A model with trained adapters, and what it said before it had any."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, head)
    with torch.no_grad():
        before = model(TOKENS)
    add_adapters(model, LoraConfig(rank=4, alpha=8))
    if train:
        with torch.no_grad():
            for adapter in adapters(model):
                adapter.up.normal_(std=0.1)
    return model, before


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_model_with_fresh_adapters_is_the_model(head: str) -> None:
    model, before = adapted(head, train=False)
    assert torch.equal(model(TOKENS), before)
    assert len(adapters(model)) == 8 + (head == "scalar")


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_off_they_leave_the_reference_and_come_back(head: str) -> None:
    model, before = adapted(head)
    after = model(TOKENS)
    assert (after - before).abs().max() > 1e-3
    with adapters_off(model) as reference:
        assert torch.equal(reference(TOKENS), before)
    assert torch.equal(model(TOKENS), after)


def test_a_model_without_adapters_is_no_reference_of_itself() -> None:
    with pytest.raises(ValueError, match="no adapters"), adapters_off(Transformer(CONFIG)):
        pass


def test_only_adapters_are_trained() -> None:
    model, _ = adapted()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1))
    assert len(optimizer.parameters) == 16
    model(TOKENS).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in frozen)
        if name in frozen:
            assert torch.equal(parameter, frozen[name])


@pytest.mark.parametrize(
    "config", [LoraConfig(), LoraConfig(rank=3, layers=1), LoraConfig(layers=9, targets=("qkv", "down"))]
)
def test_they_are_counted_without_a_model(config: LoraConfig) -> None:
    model = Transformer(CONFIG)
    add_adapters(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_count(CONFIG, config) == trained > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_through_the_whole_matrix(autocast: bool) -> None:
    """Output bit for bit, gradients but for rounding, with and without the gradient of what comes in."""
    torch.manual_seed(1)
    dtype = torch.float32 if autocast else torch.float64
    matrix = AdaptableLinear(24, 40, bias=False, dtype=dtype).requires_grad_(False)
    adapter = Adapter(matrix.weight, LoraConfig(rank=5, alpha=7.0))
    adapter.up.data.normal_()
    parametrize.register_parametrization(matrix, "weight", adapter)
    for needs in (True, False):
        x = torch.randn(3, 7, 24, dtype=dtype).requires_grad_(needs)
        out_gradient = torch.randn(3, 7, 40, dtype=dtype)
        found = []
        for forward in (AdaptableLinear.forward, torch.nn.Linear.forward):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = forward(matrix, x)
            y.backward(out_gradient.to(y.dtype))
            found.append([y, adapter.up.grad, adapter.down.grad, *([x.grad] if needs else [])])
            adapter.zero_grad()
            x.grad = None
        assert torch.equal(found[0][0], found[1][0])
        for mine, theirs in zip(found[0][1:], found[1][1:], strict=True):
            scale = theirs.abs().max()
            assert mine.dtype == theirs.dtype
            assert (mine - theirs).abs().max() <= (2e-2 if autocast else 1e-12) * scale


def test_a_compiled_block_with_adapters_trains_as_an_eager_one() -> None:
    gradients = []
    for compiled in (False, True):
        model, _ = adapted()
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=False)
        model(TOKENS).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 16
    for eager, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, eager, atol=1e-6, rtol=1e-4)


def test_with_few_layers_the_gradient_stops_below_them() -> None:
    model = Transformer(CONFIG, "scalar")
    add_adapters(model, LoraConfig(rank=4, layers=1))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 10
    assert all(name.startswith(("blocks.1.", "output.")) for name in names)
    below: list[torch.Tensor] = []
    model.blocks[0].register_forward_hook(lambda *called: below.append(called[2]))
    assert model(TOKENS).requires_grad
    assert not below[0].requires_grad


def test_the_merged_model_says_the_same() -> None:
    model, _ = adapted()
    merged = whole_model(model, decide_execution(ExecutionConfig(precision="fp32")))
    assert merged is not None
    assert not adapters(merged)
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


def test_the_engine_decodes_with_the_adapters_and_follows_them() -> None:
    model, _ = adapted(train=False)
    engine, params = Engine(model), SamplingParams(max_tokens=6, temperature=0.0)
    first = engine.generate([[1, 2, 3]], params)[0]
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.up.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    second = engine.generate([[1, 2, 3]], params)[0]
    assert second.token_ids != first.token_ids
    row = torch.tensor([[1, 2, 3, *second.token_ids]])
    logprobs = model(row).log_softmax(-1)[0, 2:-1].gather(1, row[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(second.logprobs), logprobs, atol=1e-4, rtol=1e-4)


def test_state_goes_to_disk_and_back(tmp_path: Path) -> None:
    model, _ = adapted()
    optimizer = build_optimizer(model, OptimizerConfig())
    model(TOKENS).square().mean().backward()
    optimizer.step()
    save_state(tmp_path, 1, model, optimizer, {}, {}, Processes())
    other, _ = adapted(train=False)
    again = build_optimizer(other, OptimizerConfig())
    assert load_state(tmp_path, other, again, {}, Processes()) == {"step": 1}
    assert torch.equal(other(TOKENS), model(TOKENS))
    ours, theirs = optimizer.parts[0].state_dict()["state"], again.parts[0].state_dict()["state"]
    for key, moments in ours.items():
        for name, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key][name]))
