"""Merging against mergekit 0.1.5: live where it is installed, else against what it gave for the same numbers.

`python tests/parity/test_merging.py` with mergekit on the path writes mergekit_merges.json anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nurture.model.merging import dare, linear, slerp, ties

GOLDEN = Path(__file__).with_name("mergekit_merges.json")


def numbers(seed: int, shape: tuple[int, ...] = (4, 6)) -> Tensor:
    """Tensors that need no random generator: the same on every machine."""
    count = int(torch.Size(shape).numel())
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    return (torch.sin(steps * (1.3 + 0.7 * seed)) + 0.2 * torch.cos(steps * seed)).float().view(shape)


BASE, MODELS = numbers(0), [numbers(seed) for seed in (1, 2, 3)]
WEIGHTS = [0.7, 0.5, 0.3]
CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, not normalised": {"normalize": False},
    "slerp 0.1": {"t": 0.1},
    "slerp 0.5": {"t": 0.5},
    "slerp of nearly equal tensors": {"t": 0.3, "near": True},
    "ties 0.5": {"density": 0.5},
    "ties 0.2, lambda 0.6": {"density": 0.2, "lambda": 0.6},
    "ties 1.0, not normalised": {"density": 1.0, "normalize": False},
    "dare_linear 1.0": {"density": 1.0},
    "dare_ties 1.0, normalised": {"density": 1.0, "normalize": True},
}


def ours(case: str) -> Tensor:
    how = CASES[case]
    scale = how.get("lambda", 1.0)
    if case.startswith("linear"):
        merged = linear(MODELS, WEIGHTS)
        return merged if how.get("normalize", True) else merged * sum(WEIGHTS)
    if case.startswith("slerp"):
        other = MODELS[0] + 1e-3 * MODELS[1] if how.get("near") else MODELS[1]
        return slerp(MODELS[0], other, how["t"])
    if case.startswith("ties"):
        normalize = how.get("normalize", True)
        return ties(BASE, MODELS, WEIGHTS, density=how["density"], scale=scale, normalize=normalize)
    elect = case.startswith("dare_ties")
    return dare(
        BASE,
        MODELS,
        WEIGHTS,
        density=how["density"],
        seed=0,
        elect=elect,
        normalize=how.get("normalize", False),
    )


def mergekits(case: str) -> Tensor:
    from types import SimpleNamespace as Plain

    from mergekit.merge_methods.generalized_task_arithmetic import (
        ConsensusMethod,
        GeneralizedTaskArithmeticMerge,
    )
    from mergekit.merge_methods.linear import linear_merge
    from mergekit.merge_methods.slerp import slerp as mergekit_slerp
    from mergekit.sparsify import SparsificationMethod

    how = CASES[case]
    names = ["a", "b", "c"]
    if case.startswith("linear"):
        # A batch of one group: a first dimension of one on every tensor.
        batch = Plain(tensors=[tensor[None] for tensor in MODELS])
        weights = torch.tensor([WEIGHTS])
        return linear_merge.implementation(batch, weights, normalize=how.get("normalize", True))[0]
    if case.startswith("slerp"):
        other = MODELS[0] + 1e-3 * MODELS[1] if how.get("near") else MODELS[1]
        return mergekit_slerp(torch.tensor([how["t"]]), MODELS[0][None], other[None])[0]
    random = case.startswith("dare")
    method = GeneralizedTaskArithmeticMerge(
        consensus_method=None if case.startswith("dare_linear") else ConsensusMethod.sum,
        sparsification_method=SparsificationMethod.random if random else SparsificationMethod.magnitude,
        default_normalize=not random,
        default_rescale=random,
        method_name="m",
        method_pretty_name=None,
        method_reference_url=None,
    )
    entries = [Plain(id=name, tensor=tensor.clone()) for name, tensor in zip(names, MODELS, strict=True)]
    return method.merge_group(
        Plain(base=Plain(tensor=BASE.clone()), non_base=entries),
        weight=dict(zip(names, WEIGHTS, strict=True)),
        density=dict.fromkeys(names, how["density"]),
        normalize=how.get("normalize", not random),
        rescale=random,
        int8_mask=False,
        **{"lambda": how.get("lambda", 1.0)},
    )


@pytest.mark.parametrize("case", CASES)
def test_merges_equal_what_mergekit_gave(case: str) -> None:
    expected = torch.tensor(json.loads(GOLDEN.read_text())[case])
    torch.testing.assert_close(ours(case), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_merges_equal_mergekit(case: str) -> None:
    pytest.importorskip(
        "mergekit", reason="mergekit pins what we cannot have beside it; see the golden values"
    )
    torch.testing.assert_close(ours(case), mergekits(case), atol=2e-6, rtol=1e-5)


def slow_ties(density: float) -> list[list[float]]:
    """The paper's three steps (arXiv 2306.01708, algorithm 1), one number at a time."""
    rows, columns = BASE.shape
    kept = int(density * rows * columns)
    trimmed = []
    for model in MODELS:
        difference = {(r, c): float(model[r, c] - BASE[r, c]) for r in range(rows) for c in range(columns)}
        largest = sorted(difference, key=lambda place: -abs(difference[place]))[:kept]
        trimmed.append({place: difference[place] if place in largest else 0.0 for place in difference})
    merged = [[0.0] * columns for _ in range(rows)]
    for r in range(rows):
        for c in range(columns):
            votes = [w * t[r, c] for w, t in zip(WEIGHTS, trimmed, strict=True)]
            sign = 1 if sum(votes) >= 0 else -1
            winners = [(w, v) for w, v in zip(WEIGHTS, votes, strict=True) if v * sign > 0]
            mean = sum(v for _, v in winners) / sum(w for w, _ in winners) if winners else 0.0
            merged[r][c] = float(BASE[r, c]) + mean
    return merged


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_equals_the_papers_algorithm(density: float) -> None:
    torch.testing.assert_close(
        ties(BASE, MODELS, WEIGHTS, density=density), torch.tensor(slow_ties(density)), atol=1e-5, rtol=1e-5
    )


def test_dare_keeps_the_mean_and_divides_by_the_density() -> None:
    """arXiv 2311.03099, equation 1: what stays is delta / (1 - p), so its expectation is delta."""
    base, model = torch.zeros(200, 500), torch.full((200, 500), 2.0)
    merged = dare(base, [model], [1.0], density=0.25, seed=3)
    assert set(merged.unique().tolist()) == {0.0, 8.0}
    assert float(merged.mean()) == pytest.approx(2.0, abs=0.05)
    again = dare(base, [model], [1.0], density=0.25, seed=4)
    assert not torch.equal(merged, again)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case: mergekits(case).tolist() for case in CASES}, indent=1) + "\n")
