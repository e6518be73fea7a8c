"""Blocked attention against the library's, with documents, groups, odd lengths and recomputation."""

from __future__ import annotations

import pytest
import torch

from nurture.model import attention as module


@pytest.mark.parametrize(("tokens", "block"), [(16, 16), (50, 16), (33, 32), (7, 128)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_the_library(
    monkeypatch: pytest.MonkeyPatch, tokens: int, block: int, documents: bool, recompute: bool
) -> None:
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    monkeypatch.setattr(module, "RECOMPUTE_FROM", 1 if recompute else 10_000)
    torch.manual_seed(0)
    q = torch.randn(2, tokens, 6, 8, requires_grad=True)
    k, v = (torch.randn(2, tokens, 2, 8, requires_grad=True) for _ in range(2))
    ids = torch.randint(0, 3, (2, tokens)).sort(1).values if documents else None
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(2, 1, tokens, tokens)
    if ids is not None:
        visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
    upstream = torch.randn(2, tokens, 6, 8)
    results = []
    for out in (module.attention(q, k, v, ids), module.masked_attention(q, k, v, visible)):
        gradients = torch.autograd.grad((out * upstream).sum(), (q, k, v))
        results.append((out.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
