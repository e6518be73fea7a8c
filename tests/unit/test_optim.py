"""Schedules at their exact boundaries, and who is decayed by what."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from nurture import optim
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.optim import (
    Muon,
    OptimizerConfig,
    ScheduleConfig,
    alike,
    build_optimizer,
    learning_rate_factor,
    orthogonalise,
    parameter_groups,
)


def small_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=64, width=32, layers=2, heads=2))


def test_wsd_rises_stays_and_falls_at_exact_steps() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup=0.1, decay=0.2)
    factors = [learning_rate_factor(schedule, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    assert learning_rate_factor(schedule, 100, 100) == 0.0


def test_wsd_matches_smollm3s_released_boundaries() -> None:
    schedule = ScheduleConfig(warmup_steps=2000, decay=522_000 / 4_720_000)
    assert learning_rate_factor(schedule, 1999, 4_720_000) == 1.0
    assert learning_rate_factor(schedule, 4_198_000, 4_720_000) == 1.0
    assert learning_rate_factor(schedule, 4_198_001, 4_720_000) < 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decays_equal_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    theirs = make(optimizer, num_warmup_steps=10, num_training_steps=100)
    schedule = ScheduleConfig(kind=kind, warmup=0.1)
    for step in range(100):
        if step >= 10:  # theirs wastes the first update at 0
            assert learning_rate_factor(schedule, step, 100) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_a_floor_is_kept() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup=0.0, final=0.1)
    assert learning_rate_factor(schedule, 1000, 1000) == pytest.approx(0.1)
    assert learning_rate_factor(schedule, 500, 1000) == pytest.approx(0.55)


def test_warmup_and_decay_cannot_overlap() -> None:
    with pytest.raises(ValidationError, match="together exceed"):
        ScheduleConfig(warmup=0.6, decay=0.6)


def test_embeddings_and_norms_are_not_decayed() -> None:
    model = small_model()
    matrices, others, undecayed = parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in undecayed} == {
        name for name in names.values() if name.endswith("norm.weight") or name == "embedding.weight"
    }
    assert len(matrices) == 2 * 4
    assert not others
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5, learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if "norm" not in name and name != "embedding.weight" else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(kind="muon"))
    adamw, muon = optimizer.parts
    assert sum(len(g["params"]) for g in muon.param_groups) == 8
    assert {id(p) for p in optimizer.parameters} == {id(p) for p in model.parameters()}
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, torch.optim.Muon)
    optimizer.set_factor(0.25)
    assert adamw.param_groups[0]["lr"] == pytest.approx(0.25 * OptimizerConfig().learning_rate)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.25 * OptimizerConfig().muon_learning_rate)


def muon_on(
    matrices: list[torch.Tensor], make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
) -> Any:
    """Return the matrices after three updates by the gradients of one seed."""
    parameters = [torch.nn.Parameter(matrix.clone()) for matrix in matrices]
    optimizer, generator = make(parameters), torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


SHAPES = ((16, 16), (16, 48), (48, 16), (16, 16), (16, 48), (8, 1))


def test_muon_equals_torchs() -> None:
    """Which always computes in bfloat16; ours may take the better type, and stacks matrices of one shape."""
    matrices = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]
    ours = muon_on(matrices, lambda p: Muon(p, lr=0.02, momentum=0.9, weight_decay=0.1))
    theirs = muon_on(
        matrices,
        lambda p: torch.optim.Muon(
            p, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
    )
    for start, a, b in zip(matrices, ours, theirs, strict=True):
        torch.testing.assert_close(a - start, b - start, atol=2e-3, rtol=0.05)
    assert not torch.allclose(ours[0], matrices[0], atol=1e-2)


def test_orthogonalise_in_full_precision() -> None:
    """Against the step's own effect on singular values: aS + bS^3 + cS^5, in double precision."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    for shape in ((7, 7), (3, 5, 9), (2, 9, 5)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        s = s / s.norm(dim=-1, keepdim=True)
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        expected = u @ torch.diag_embed(s) @ v
        torch.testing.assert_close(orthogonalise(x, coefficients, 5, 1e-7), expected)
        single = orthogonalise(x.float(), coefficients, 5, 1e-7)
        torch.testing.assert_close(single, expected.float(), atol=1e-4, rtol=1e-3)
    assert not orthogonalise(torch.zeros(4, 4), coefficients, 5, 1e-7).any()


def test_only_small_matrices_of_one_shape_are_stacked() -> None:
    small = [torch.zeros(shape, device="meta") for shape in SHAPES]
    assert alike(small) == [[0, 3], [1, 4], [2], [5]]
    large = [torch.zeros(2048, 1500, device="meta") for _ in range(3)]
    assert alike(large) == [[0], [1], [2]], "copies of large matrices take memory and save nothing"


@pytest.mark.parametrize("native", [True, False])
def test_muon_takes_bfloat16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """In software its products are a hundred times slower than float32's."""
    seen: list[torch.dtype] = []
    honest = optim.orthogonalise
    monkeypatch.setattr(optim, "has_fast_bf16", lambda _: native)
    monkeypatch.setattr(optim, "orthogonalise", lambda x, *rest: seen.append(x.dtype) or honest(x, *rest))
    muon_on([torch.ones(4, 6)], lambda p: Muon(p, lr=0.02, momentum=0.9, weight_decay=0.1))
    assert set(seen) == {torch.bfloat16 if native else torch.float32}


def test_adamw_follows_the_papers_update() -> None:
    """One parameter, three updates, against the formulas of arXiv 1711.05101, algorithm 2."""
    model = torch.nn.Linear(1, 1, bias=False)
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9)
    optimizer = build_optimizer(model, config)
    value, first, second = model.weight.item(), 0.0, 0.0
    for step, gradient in enumerate([0.5, -1.0, 2.0], start=1):
        model.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        update = (first / (1 - 0.8**step)) / (math.sqrt(second / (1 - 0.9**step)) + 1e-8)
        value = value * (1 - 0.01 * 0.1) - 0.01 * update
        assert model.weight.item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_step_is_seen_by_who_watches_the_weights(kind: str) -> None:
    """The engine knows by the tensors' versions that its copy is old; fused kernels alone do not count theirs."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
    before = [parameter._version for parameter in model.parameters()]
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert all(p._version > old for p, old in zip(model.parameters(), before, strict=True))
