"""Causal attention that stays inside a document.

Several documents share a row (packing); a token sees earlier tokens of its own document only, so a packed batch
computes exactly what separate rows would. Grouped-query attention: each key/value head serves N/K query heads
(arXiv 2305.13245).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Attend causally within each document.

    Args:
        q_BTNH: queries; N is a multiple of K, query head n reads key/value head n // (N / K).
        k_BTKH: keys, rotated already.
        v_BTKH: values.
        document_ids: (B, T); a token sees only tokens of equal id. None: the row is one document.

    Returns:
        (B, T, N, H) in the dtype of the queries.
    """
    mask = None
    if document_ids is not None:
        tokens = document_ids.shape[1]
        earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=document_ids.device).tril()
        # A token always sees itself, so that no row is fully masked: padding yields numbers, never NaN.
        mask = (document_ids[:, None, :, None] == document_ids[:, None, None, :]) & earlier
    return masked_attention(q_BTNH, k_BTKH, v_BTKH, mask, is_causal=mask is None)


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
