"""Causal attention that stays inside a document.

Several documents share a row (packing); a token sees earlier tokens of its own document only, so a packed batch
computes exactly what separate rows would. Grouped-query attention: each key/value head serves N/K query heads
(arXiv 2305.13245).

Documents of like length are gathered into a batch of their own, which the library's fused kernel reads as whole rows:
it keeps no scores, so memory grows linearly with T, and tokens of different documents never meet.

With fast bfloat16 on a CPU, plain batched matrix multiplications beat that kernel by 2 to 7 times at the lengths small
models train at, and inductor melts the softmax between them into one pass: up to `FUSED_FROM` tokens rows go that way
there. Queries are taken in blocks: a block meets only the keys before its end (which skips the empty upper triangle)
and, uncompiled, only those from the start of its first document on; no T x T matrix exists at once.

On a GPU rows of one document take the library's flash kernel, packed rows FlexAttention: it skips blocks in which no
query meets a key of its document, and its mask is made once for all layers (`document_mask`). The library's kernels
with a mask would fall back to the one that holds T x T scores, as only that one knows grouped queries and masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nurture.runtime import compile_once, has_fast_bf16, never_compiled

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

QUERY_BLOCK = 128
"""Queries taken at once. At 128 the scores of one head stay in the second-level cache."""
FUSED_FROM = 1024
"""Row length from which the fused kernel wins everywhere."""
PRODUCTS_PAY = has_fast_bf16(torch.device("cpu"))
"""Whether products with inductor's softmax between them are worth having for shorter rows: not with AVX2 alone."""


def document_mask(document_ids: Tensor | None) -> Tensor | BlockMask | None:
    """Return what `attention` is given for the documents of a batch, to be made once for all layers.

    On a GPU a mask, elsewhere the (B, T) `document_starts`: two comparisons with a column say what a token sees.
    """
    if document_ids is None:
        return None
    return block_mask(document_ids) if document_ids.device.type == "cuda" else document_starts(document_ids)


def block_mask(document_ids: Tensor) -> BlockMask:
    """Return FlexAttention's mask: causal, and inside equal ids (B, T)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (document_ids[row, query] == document_ids[row, key])

    rows, tokens = document_ids.shape
    return create_block_mask(visible, rows, None, tokens, tokens, device=document_ids.device)


def attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    documents: Tensor | BlockMask | None = None,
    first: int = 0,
) -> Tensor:
    """Attend causally within each document.

    Args:
        q_BTNH: queries of the row's columns `first` to `first + T`; N is a multiple of K, query head n reads key/value
            head n // (N / K).
        k_BSKH: keys, rotated already, of columns 0 to S = `first + T`.
        v_BSKH: values.
        documents: their `document_mask`, or the (B, S) `document_starts`: a token sees only tokens from the start of
            its document on. None: the row is one document.
        first: above 0 where a process has only a part of the row's queries (context parallelism).

    Returns:
        (B, T, N, H) in the dtype of the queries.
    """
    tokens = q_BTNH.shape[1]
    if not (documents is None or isinstance(documents, Tensor)):
        return flex_attention(q_BTNH, k_BSKH, v_BSKH, documents)
    if first:
        return _blocked_attention(q_BTNH, k_BSKH, v_BSKH, documents, first)
    if q_BTNH.device.type == "cpu" and tokens < FUSED_FROM and PRODUCTS_PAY:
        return _blocked_attention(q_BTNH, k_BSKH, v_BSKH, documents)
    if documents is None:
        return masked_attention(q_BTNH, k_BSKH, v_BSKH, None, is_causal=True)
    return _attention_in_groups(q_BTNH, k_BSKH, v_BSKH, documents)


def flex_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: BlockMask) -> Tensor:
    """`attention` by FlexAttention (arXiv 2412.05496); compiled on a GPU, where it holds no scores."""
    from torch.nn.attention import flex_attention as library

    heads = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    grouped = q_BTNH.shape[2] != k_BTKH.shape[2]
    run: Callable[..., Tensor] = library.flex_attention
    if q_BTNH.device.type == "cuda" and not torch.compiler.is_compiling():
        run = compile_once(run)
    out_BNTH: Tensor = run(*heads, block_mask=mask, enable_gqa=grouped)
    return out_BNTH.transpose(1, 2)


@dataclass(frozen=True)
class _Groups:
    """Documents of a batch laid out behind each other, those of like length together and padded to the longest of them.

    Attributes:
        places: (P,) int64 token of the batch, counted through all rows, that each place of the layout holds; padding
            holds its document's last token once more.
        homes: (B * T,) int64 place of each token.
        lengths: tokens of a document in each group, padding included.
        counts: documents in each group.
    """

    places: Tensor
    homes: Tensor
    lengths: list[int]
    counts: list[int]


def _group_documents(row_starts: Tensor) -> _Groups:
    """Lay the documents of (B, T) `document_starts` out in groups: lengths differ by at most an eighth or 8 tokens."""
    is_start = row_starts == torch.arange(row_starts.shape[1], device=row_starts.device)
    starts = is_start.flatten().nonzero().squeeze(1)
    lengths = torch.diff(starts, append=starts.new_tensor([row_starts.numel()]))
    grain = (2 ** (lengths.double().log2().floor().long() - 3)).clamp(min=8)
    kinds, order = (-(-lengths // grain) * grain).sort(stable=True)
    starts, lengths = starts[order], lengths[order]
    _, group, counts = kinds.unique_consecutive(return_inverse=True, return_counts=True)
    longest = torch.zeros_like(counts).scatter_reduce(0, group, lengths, "amax")
    padded = longest[group]
    document = torch.arange(len(starts), device=starts.device).repeat_interleave(padded)
    within = torch.arange(len(document), device=starts.device) - (padded.cumsum(0) - padded)[document]
    is_token = within < lengths[document]
    places = starts[document] + torch.minimum(within, lengths[document] - 1)
    homes = torch.empty_like(row_starts, dtype=torch.int64).flatten()
    homes[places[is_token]] = is_token.nonzero().squeeze(1)
    return _Groups(places, homes, longest.tolist(), counts.tolist())


@never_compiled
def _attention_in_groups(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, row_starts: Tensor) -> Tensor:
    """`attention` as one fused call for all documents of like length."""
    groups = _group_documents(row_starts)
    sizes = [length * count for length, count in zip(groups.lengths, groups.counts, strict=True)]
    # Padding comes after a document's tokens, so causal attention keeps it from them without a mask.
    laid_out = (
        _LaidOut.apply(x.flatten(0, 1), groups.places, groups.homes).split(sizes)
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    outs = []
    for length, *tensors in zip(groups.lengths, *laid_out, strict=True):
        q, k, v = (x.unflatten(0, (-1, length)) for x in tensors)
        outs.append(masked_attention(q, k, v, None, is_causal=True).flatten(0, 1))
    return _TakenHome.apply(torch.cat(outs), groups.homes).view(q_BTNH.shape)


class _LaidOut(torch.autograd.Function):
    """Tokens to places. No gradient arrives at padding (nobody sees it), so the way back is a mere lookup."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, homes: Tensor) -> Tensor:
        ctx.save_for_backward(homes)
        return tokens.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (homes,) = ctx.saved_tensors
        return gradients[0].index_select(0, homes), None, None


class _TakenHome(torch.autograd.Function):
    """Places to tokens; what padding computed is dropped."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, homes: Tensor) -> Tensor:
        ctx.save_for_backward(homes)
        ctx.count = len(places)
        return places.index_select(0, homes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (homes,) = ctx.saved_tensors
        at_places = gradients[0].new_zeros(ctx.count, *gradients[0].shape[1:])
        return at_places.index_copy_(0, homes, gradients[0]), None


def _blocked_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, row_starts: Tensor | None, first: int = 0
) -> Tensor:
    """`attention` as matrix multiplications, one block of queries at a time."""
    batch, tokens, heads, head_width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    # All query heads of one key head are rows of the same multiplication, so keys are never repeated.
    q_BKGTH = q_BTNH.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4) * head_width**-0.5
    k_BKSH, v_BKSH = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    # The backward pass of long rows computes each block's scores again instead of keeping them.
    recompute = first + tokens >= FUSED_FROM and torch.is_grad_enabled()
    lows = _first_keys(row_starts, first + tokens)
    outs = []
    for start in range(0, tokens, QUERY_BLOCK):
        queries = q_BKGTH[:, :, :, start : start + QUERY_BLOCK]
        low, stop = lows[first + start], first + start + queries.shape[3]
        starts = None if row_starts is None else row_starts[:, first + start : stop] - low
        block = (queries, k_BKSH[:, :, low:stop], v_BKSH[:, :, low:stop], starts, first + start - low)
        out = checkpoint(_attend_block, *block, use_reentrant=False) if recompute else _attend_block(*block)
        outs.append(out)
    out_BKGTH = torch.cat(outs, dim=3)
    return out_BKGTH.permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads, head_width)


def _first_keys(row_starts: Tensor | None, columns: int) -> list[int]:
    """Return for every column the first one that a query there, or to its right, can see in any row."""
    if row_starts is None or torch.compiler.is_compiling():  # a compiled block knows shapes, not contents
        return [0] * columns
    lows: list[int] = row_starts.amin(0).tolist()
    return lows


def document_starts(document_ids: Tensor) -> Tensor:
    """Return for every token (B, T) the column where its document begins, int32: a document is a run of equal ids."""
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    columns = torch.arange(document_ids.shape[1], dtype=torch.int32, device=document_ids.device)
    return torch.where(is_start, columns, 0).cummax(dim=1).values


def _attend_block(
    q_BKGTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, starts_BT: Tensor | None, start: int
) -> Tensor:
    """Attend from the queries of columns `start` and on to all keys given, (B, K, G, T, H).

    `starts_BT` are the columns, among those given, where the queries' documents begin. They are compared as 32-bit
    integers: as many fit a vector register as scores, of 64-bit ones half as many.
    """
    batch, kv_heads, group, queries, head_width = q_BKGTH.shape
    keys = k_BKSH.shape[2]
    flat = (batch * kv_heads, group * queries, head_width)
    k_flat, v_flat = k_BKSH.reshape(-1, keys, head_width), v_BKSH.reshape(-1, keys, head_width)
    scores = torch.bmm(q_BKGTH.reshape(flat), k_flat.transpose(1, 2)).float()
    columns = torch.arange(keys, dtype=torch.int32, device=scores.device)
    visible = columns <= columns[start:, None]
    if starts_BT is not None:
        visible = (visible & (columns >= starts_BT[:, :, None]))[:, None, None]
    scores = scores.view(batch, kv_heads, group, queries, keys).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).to(v_BKSH.dtype)
    out = torch.bmm(weights.view(-1, group * queries, keys), v_flat)
    return out.view(q_BKGTH.shape)


def masked_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Attend where `mask` (broadcastable to (B, N, T, S) bool) is true; the keys may be longer than the queries."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
    )
    return out_BNTH.transpose(1, 2)
