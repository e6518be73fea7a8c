"""The chunked loss and logprobs against PyTorch's own cross entropy, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nurture.model import heads
from nurture.runtime import can_compile
from nurture.types import IGNORE_INDEX

COMPILED = pytest.param(
    True, marks=pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
)


def random_case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 50, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 16, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 37, (3, 50), generator=generator)
    labels[0, :20] = IGNORE_INDEX
    labels[2, -1] = IGNORE_INDEX
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [7, 64, 4096])
@pytest.mark.parametrize("compiled", [False, COMPILED])
def test_sum_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk: int, compiled: bool) -> None:
    monkeypatch.setattr(heads, "CHUNK", chunk)
    hidden, weight, labels = random_case()
    total, losses = heads.cross_entropy_sum(hidden, weight, labels, compiled)
    (total / 7).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    (expected.sum() / 7).backward()
    torch.testing.assert_close(losses, expected.detach().view(3, 50), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, expected.sum(), atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(ours, (hidden.grad, weight.grad), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("compiled", [False, COMPILED])
def test_logprobs_and_their_gradient(
    monkeypatch: pytest.MonkeyPatch, temperature: float, compiled: bool
) -> None:
    monkeypatch.setattr(heads, "CHUNK", 11)
    hidden, weight, labels = random_case()
    upstream = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    ours = heads.label_logprobs(hidden, weight, labels, temperature, compiled)
    (ours * upstream).sum().backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, -1)
    expected = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORE_INDEX)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad), atol=1e-4, rtol=1e-4)


def test_a_batch_without_labels_is_zero_not_nan() -> None:
    hidden, weight, labels = random_case()
    total, losses = heads.cross_entropy_sum(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    total.backward()
    assert total.item() == 0.0
    assert not losses.any()
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert not hidden.grad.isnan().any()


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, labels = random_case()
    with torch.no_grad():
        total, _ = heads.cross_entropy_sum(hidden, weight, labels)
    assert not total.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("compiled", [False, COMPILED])
def test_entropies_and_their_gradient(
    monkeypatch: pytest.MonkeyPatch, temperature: float, compiled: bool
) -> None:
    monkeypatch.setattr(heads, "CHUNK", 11)
    hidden, weight, labels = random_case()
    generator = torch.Generator().manual_seed(1)
    up, entropy_up = torch.randn(3, 50, generator=generator), torch.randn(3, 50, generator=generator)
    ours, entropies = heads.label_logprobs_and_entropies(hidden, weight, labels, temperature, compiled)
    (ours * up + entropies * entropy_up).sum().backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    trained = labels != IGNORE_INDEX
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, -1)
    expected = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * trained
    wanted = -(logprobs.exp() * logprobs).sum(-1) * trained
    (expected * up + wanted * entropy_up).sum().backward()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad), atol=1e-4, rtol=1e-4)


def test_entropy_alone_has_a_gradient() -> None:
    hidden, weight, labels = random_case()
    _, entropies = heads.label_logprobs_and_entropies(hidden, weight, labels)
    entropies.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[1].abs().sum() > 0
    assert not hidden.grad[0, :20].any()


def test_a_label_that_is_almost_certain_keeps_its_small_gradient_in_bfloat16() -> None:
    """p rounds to 1 in bfloat16 there; p - 1 does not round to 0."""
    hidden = torch.tensor([[8.0, 0.0]], requires_grad=True)
    weight = torch.eye(2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, losses = heads.cross_entropy_sum(hidden, weight, torch.tensor([0]))
        logprobs = heads.label_logprobs(hidden, weight, torch.tensor([0]))
    left = 1 - 1 / (1 + torch.exp(torch.tensor(-8.0)))
    torch.testing.assert_close(losses[0], -logprobs.detach()[0])
    for result in (total, -logprobs.sum()):
        (gradient,) = torch.autograd.grad(result, hidden)
        torch.testing.assert_close(gradient[0], torch.stack((-left, left)), rtol=1e-2, atol=0)
