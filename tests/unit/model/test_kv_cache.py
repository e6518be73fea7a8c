"""The cache against attention over the whole sequence, and its row bookkeeping."""

from __future__ import annotations

import pytest
import torch

from nurture.model.attention import attention
from nurture.model.config import ModelConfig
from nurture.model.kv_cache import KVCache

CONFIG = ModelConfig(vocab_size=10, width=32, layers=1, heads=4, kv_heads=2)
TOKENS = 75  # more than two blocks of columns


@pytest.fixture(scope="module")
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, TOKENS, heads, 8, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


def feed(
    cache: KVCache, qkv: tuple[torch.Tensor, ...], columns: slice, counts: list[int] | None = None
) -> torch.Tensor:
    q, k, v = (part[:, columns] for part in qkv)
    cache.begin(q.shape[1], counts)
    return cache.attend(0, q, k, v)


@pytest.mark.parametrize("chunks", [[TOKENS], [1] * TOKENS, [5, 1, 1, 30, 1, 37], [40, 35]], ids=str)
def test_any_split_of_a_sequence_gives_full_attention(
    chunks: list[int], qkv: tuple[torch.Tensor, ...]
) -> None:
    cache = KVCache(CONFIG, max_rows=3)
    parts, start = [], 0
    for count in chunks:
        parts.append(feed(cache, qkv, slice(start, start + count)))
        start += count
    torch.testing.assert_close(torch.cat(parts, 1), attention(*qkv), atol=2e-6, rtol=0)
    assert cache.lengths == [TOKENS] * 3


def test_ragged_rows_match_rows_alone(qkv: tuple[torch.Tensor, ...]) -> None:
    """Rows of 2, 9 and 5 tokens, right-padded with garbage, then five single tokens and two at once."""
    lengths = [2, 9, 5]
    cache = KVCache(CONFIG, max_rows=3)
    padded = [part[:, :9].clone() for part in qkv]
    for part in padded:
        for row, length in enumerate(lengths):
            part[row, length:] = 1e4
    cache.begin(9, lengths)
    cache.attend(0, *padded)  # type: ignore[call-arg]
    whole = attention(*qkv)
    for count in (1, 1, 1, 1, 1, 2):
        new = [torch.stack([part[row, cache.lengths[row] :][:count] for row in range(3)]) for part in qkv]
        expected = torch.stack([whole[row, cache.lengths[row] :][:count] for row in range(3)])
        positions = cache.begin(count)
        assert positions[:, 0].tolist() == [length - count for length in cache.lengths]
        torch.testing.assert_close(cache.attend(0, *new), expected, atol=2e-6, rtol=0)  # type: ignore[call-arg]


def test_queries_of_the_last_tokens_alone(qkv: tuple[torch.Tensor, ...]) -> None:
    lengths = [4, 7, 1]
    cache = KVCache(CONFIG, max_rows=3)
    q, k, v = (part[:, :7] for part in qkv)
    cache.begin(7, lengths)
    ends = torch.tensor(lengths) - 1
    last = cache.attend(0, q[torch.arange(3), ends][:, None], k, v)
    torch.testing.assert_close(last[:, 0], attention(q, k, v)[torch.arange(3), ends], atol=2e-6, rtol=0)


def test_appended_and_dropped_rows_keep_their_contents(qkv: tuple[torch.Tensor, ...]) -> None:
    source = KVCache(CONFIG, max_rows=3)
    feed(source, qkv, slice(0, 8), [8, 3, 6])
    cache = KVCache(CONFIG, max_rows=5, rows=0)
    cache.append(source, [2, 0])
    cache.append(source, [1, 1, 0])
    assert (cache.rows, cache.lengths) == (5, [6, 8, 3, 3, 8])
    assert cache.drop([0, 3]) == [4, 1, 2]
    assert (cache.rows, cache.lengths) == (3, [8, 8, 3])
    for row, original in enumerate([0, 0, 1]):
        length = cache.lengths[row]
        assert torch.equal(cache.keys[0][row, :, :length], source.keys[0][original, :, :length])
        assert torch.equal(cache.values[0][row, :, :length], source.values[0][original, :, :length])
    assert cache.drop([0, 1, 2]) == []
    assert (cache.rows, cache.lengths) == (0, [])


def test_truncated_rows_go_on_as_if_the_rest_had_never_been(qkv: tuple[torch.Tensor, ...]) -> None:
    cache = KVCache(CONFIG, max_rows=3)
    feed(cache, qkv, slice(0, 20))
    feed(cache, tuple(part.flip(1) for part in qkv), slice(0, 9))
    cache.truncate(20)
    parts = [feed(cache, qkv, slice(20, 25)), feed(cache, qkv, slice(25, 26))]
    torch.testing.assert_close(torch.cat(parts, 1), attention(*qkv)[:, 20:26], atol=2e-6, rtol=0)


def test_grouped_heads_are_not_expanded_and_memory_grows_by_blocks(qkv: tuple[torch.Tensor, ...]) -> None:
    cache = KVCache(CONFIG, max_rows=3, dtype=torch.bfloat16)
    feed(cache, qkv, slice(0, 33))
    assert cache.keys[0].shape == (3, 2, 64, 8)
    assert cache.keys[0].dtype == torch.bfloat16
