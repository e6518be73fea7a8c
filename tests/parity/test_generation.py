"""Generation against transformers: greedy tokens of every family, and the truncations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams, keep_min_p, keep_top_k, keep_top_p, truncate
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

NEW = 40


@pytest.mark.parametrize("family", ["llama", "smollm3", "qwen3"])
def test_greedy_tokens_of_a_ragged_batch(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(family=family, vocab_size=97, width=48, layers=5, heads=4, kv_heads=2, init_std=0.2)  # type: ignore[arg-type]
    )
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = [torch.randint(1, 97, (length,)).tolist() for length in (1, 4, 9, 9, 23)]
    width = max(map(len, prompts))
    left_padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(
        left_padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
    )
    ours = Engine(model).generate(prompts, SamplingParams(max_tokens=NEW, temperature=0.0))
    assert [completion.token_ids for completion in ours] == expected[:, width:].tolist()


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(50, 1111, generator=torch.Generator().manual_seed(2)) * 3


@pytest.mark.parametrize("top_k", [1, 7, 50, 5000])
def test_top_k(logits: torch.Tensor, top_k: int) -> None:
    assert torch.equal(keep_top_k(logits, top_k), TopKLogitsWarper(top_k)(None, logits))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.95])
def test_top_p(logits: torch.Tensor, top_p: float) -> None:
    assert torch.equal(keep_top_p(logits, top_p), TopPLogitsWarper(top_p)(None, logits))


def test_top_p_near_one(logits: torch.Tensor) -> None:
    """So far out in the tail a rounding of the sum (theirs is float32) decides about single tokens."""
    ours, theirs = keep_top_p(logits, 0.999), TopPLogitsWarper(0.999)(None, logits)
    different = (ours.isfinite() ^ theirs.isfinite()).sum(-1)
    assert different.max() <= 1
    assert different.sum() <= 3


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
def test_min_p(logits: torch.Tensor, min_p: float) -> None:
    assert torch.equal(keep_min_p(logits, min_p), MinPLogitsWarper(min_p)(None, logits))


def test_all_together_in_the_same_order(logits: torch.Tensor) -> None:
    params = SamplingParams(temperature=0.7, top_k=60, top_p=0.9, min_p=0.02)
    expected = logits
    for warper in (
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(60),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.02),
    ):
        expected = warper(None, expected)
    assert torch.equal(truncate(logits / 0.7, params), expected)
