"""Attention's ways of computing against the library's, with documents, groups, odd lengths and parts of a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nurture.model import attention as module


def inputs(tokens: int, documents: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor]:
    """Return ((q, k, v), document ids, what each query may see), drawn by chance."""
    torch.manual_seed(0)
    q = torch.randn(2, tokens, 6, 8, requires_grad=True)
    k, v = (torch.randn(2, tokens, 2, 8, requires_grad=True) for _ in range(2))
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(2, 1, tokens, tokens)
    if not documents:
        return (q, k, v), None, visible
    ids = torch.randint(-1, 2, (2, tokens)).sort(1).values
    return (q, k, v), ids, visible & (ids[:, None, :, None] == ids[:, None, None, :])


@pytest.mark.parametrize(("tokens", "block"), [(16, 16), (50, 16), (33, 32), (7, 128)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_library(
    monkeypatch: pytest.MonkeyPatch, tokens: int, block: int, documents: bool, fused: bool
) -> None:
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    monkeypatch.setattr(module, "PRODUCTS_PAY", not fused)
    (q, k, v), ids, visible = inputs(tokens, documents)
    upstream = torch.randn(2, tokens, 6, 8)
    results = []
    for out in (
        module.attention(q, k, v, module.document_mask(ids)),
        module.masked_attention(q, k, v, visible),
    ):
        gradients = torch.autograd.grad((out * upstream).sum(), (q, k, v))
        results.append((out.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_documents_of_like_length_are_grouped_and_every_token_comes_home() -> None:
    lengths = [[9, 40, 3, 12], [10, 1, 1, 52], [64], [16, 48]]
    ids = torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in lengths])
    groups = module._group_documents(module.document_starts(ids))
    # Up to 8, to 16, to 40, to 48, to 56, to 64; each padded to the longest there is.
    assert (groups.lengths, groups.counts) == ([3, 16, 40, 48, 52, 64], [3, 4, 1, 1, 1, 1])
    assert torch.equal(groups.places[groups.homes], torch.arange(ids.numel()))
    # All that stands in one document of the layout is of one document of the batch.
    documents = ids + 10 * torch.arange(4)[:, None]
    laid_out = documents.flatten()[groups.places]
    for part in laid_out.split(
        [n for n, count in zip(groups.lengths, groups.counts, strict=True) for _ in range(count)]
    ):
        assert len(part.unique()) == 1


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_parts_of_a_row_are_parts_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, documents: bool, recompute: bool
) -> None:
    """Queries of columns 13 to 40 alone get what they get among all, and so do the gradients."""
    monkeypatch.setattr(module, "QUERY_BLOCK", 8)
    (q, k, v), ids, _ = inputs(53, documents)
    whole = module.attention(q, k, v, module.document_mask(ids))[:, 13:40]
    monkeypatch.setattr(module, "FUSED_FROM", 1 if recompute else 10_000)
    part = module.attention(q[:, 13:40], k[:, :40], v[:, :40], module.document_mask(ids), first=13)
    torch.testing.assert_close(part, whole, atol=2e-5, rtol=1e-4)
    upstream = torch.randn_like(whole)
    for ours, theirs in zip(
        torch.autograd.grad((part * upstream).sum(), (q, k, v)),
        torch.autograd.grad((whole * upstream).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def saved_bytes(tokens: int) -> int:
    """Return the bytes that attention over one row keeps for its backward pass, in two documents."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    (q, k, v) = (torch.randn(1, tokens, 2, 8, requires_grad=True) for _ in range(3))
    ids = (torch.arange(tokens) > tokens // 3).long()[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module.attention(q, k, v, module.document_mask(ids))
    assert out.requires_grad
    return sum(kept.values())


def test_memory_grows_linearly_with_the_row() -> None:
    small, large = saved_bytes(module.FUSED_FROM), saved_bytes(8 * module.FUSED_FROM)
    assert large <= 8 * small
