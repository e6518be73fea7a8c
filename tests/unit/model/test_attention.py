from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nurture.model.attention import attention, block_mask, document_mask


def reference(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, document_ids: Tensor | None) -> Tensor:
    """One query at a time, in float64."""
    q, k, v = q_BTNH.double(), k_BTKH.double(), v_BTKH.double()
    out = torch.zeros_like(q)
    rows, tokens, heads, width = q.shape
    for b in range(rows):
        for t in range(tokens):
            seen = [
                s for s in range(t + 1) if document_ids is None or document_ids[b, s] == document_ids[b, t]
            ]
            for n in range(heads):
                kv = n // (heads // k.shape[2])
                weights = (k[b, seen, kv] @ q[b, t, n] / width**0.5).softmax(0)
                out[b, t, n] = weights @ v[b, seen, kv]
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_reference(kv_heads: int, packed: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 11, 4, 8), torch.randn(2, 11, kv_heads, 8), torch.randn(2, 11, kv_heads, 8)
    document_ids = torch.tensor([[0] * 4 + [1] * 1 + [2] * 6, [5] * 8 + [-1] * 3]) if packed else None
    out = attention(q, k, v, document_mask(document_ids))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), reference(q, k, v, document_ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_the_reference(packed: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 7, n, 8, requires_grad=True) for n in (4, 2, 2)]
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7]) if packed else None
    pull = torch.randn(2, 7, 4, 8)
    gradients = torch.autograd.grad((attention(*inputs, document_mask(document_ids)) * pull).sum(), inputs)
    expected = torch.autograd.grad((reference(*inputs, document_ids) * pull).sum(), inputs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_mask_of_a_gpu_sees_what_document_ids_say(kv_heads: int) -> None:
    """FlexAttention computes on a CPU what it will on a GPU, forward only; padding (-1) sees itself."""
    q, k, v = (torch.randn(2, 150, heads, 16) for heads in (4, kv_heads, kv_heads))
    document_ids = torch.tensor([[0] * 40 + [1] * 70 + [2] * 40, [0] * 100 + [-1] * 50])
    with torch.no_grad():
        expected = attention(q, k, v, document_mask(document_ids))
        torch.testing.assert_close(attention(q, k, v, block_mask(document_ids)), expected)
        assert not torch.allclose(attention(q, k, v, block_mask(document_ids * 0)), expected)
