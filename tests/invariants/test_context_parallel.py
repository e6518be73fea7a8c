"""Two processes that share every row learn what one process learns: losses, gradient norms and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toy import toy_fit

from nurture.errors import NurtureError
from nurture.model.attention import attention, document_starts
from nurture.model.context_parallel import Sharing, spread_columns
from nurture.model.hugging_face import load_model
from nurture.types import Batch

TESTS = Path(__file__).resolve().parent.parent


def share_between_two(*words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(TESTS / "context_parallel_toy.py"), *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def curve(directory: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("words", [(), ("checkpoint",)])
def test_two_processes_share_rows_and_equal_one(tmp_path: Path, words: tuple[str, ...]) -> None:
    one, _ = toy_fit(tmp_path / "one", 8)
    share_between_two(str(tmp_path / "two"), *words)
    for key in ("train/loss", "train/grad_norm", "tokens/a", "tokens/b"):
        assert curve(tmp_path / "two", key) == pytest.approx(curve(tmp_path / "one", key), rel=1e-5), key
    assert one is not None
    for mine, theirs in zip(load_model(tmp_path / "two/model").parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


class Rows:
    """One batch of 2 rows a rank, of 24 columns in three documents."""

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        token_ids = torch.arange(48).view(2, 24) + 100 * rank
        ids = torch.tensor([0] * 9 + [1] * 10 + [2] * 5).expand(2, 24)
        return Batch(token_ids, token_ids + 1, torch.arange(24).repeat(2, 1), ids, torch.zeros_like(ids))

    def epochs(self, step: int) -> dict[str, float]:
        return {}


def test_every_column_is_some_process_s_and_the_work_is_even() -> None:
    parts = [spread_columns(Rows(), Sharing(place, 3, None))(0, place + 3, 6) for place in range(3)]
    columns = sorted(column for part in parts for column in part.token_ids[0].tolist())
    assert columns == list(range(100, 124))
    assert parts[1].token_ids[0].tolist() == [*range(104, 108), *range(116, 120)]
    assert all(torch.equal(part.labels, part.token_ids + 1) for part in parts)
    seen = [sum(int(position) + 1 for position in part.position_ids[0]) for part in parts]
    assert len(set(seen)) == 1
    with pytest.raises(NurtureError, match="multiple of 10"):
        spread_columns(Rows(), Sharing(0, 5, None))(0)


@pytest.mark.parametrize("size", [2, 3])
def test_pieces_attend_as_the_row_does(size: int) -> None:
    """Without processes: the pieces of all places, each with the keys before its end, are the whole."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 24, 4, 8), torch.randn(2, 24, 2, 8), torch.randn(2, 24, 2, 8)
    starts = document_starts(Rows()(0).document_ids)
    whole = attention(q, k, v, starts)
    for place in range(size):
        for first, end in Sharing(place, size, None).pieces(24):
            part = attention(q[:, first:end], k[:, :end], v[:, :end], starts[:, :end], first)
            torch.testing.assert_close(part, whole[:, first:end], atol=1e-6, rtol=1e-5)
