from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nurture.model import attention
from nurture.model.config import ModelConfig
from nurture.model.kv_cache import KVCache
from nurture.model.parallel import prepare
from nurture.model.transformer import Transformer
from nurture.runtime import ExecutionConfig, can_compile, compile_once, decide_execution
from nurture.types import IGNORE_INDEX

V = 37


def build(family: str = "smollm3", head: str = "lm", **shape) -> Transformer:
    torch.manual_seed(0)
    shape = {"width": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_width": 48, "init_std": 0.2, **shape}
    return Transformer(ModelConfig(family=family, vocab_size=V, **shape), head=head)


def random_tokens(rows: int = 2, tokens: int = 16) -> torch.Tensor:
    return torch.randint(V, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_second_document_is_unchanged_when_the_first_changes() -> None:
    model = build()
    document_ids = torch.tensor([[0] * 7 + [1] * 9] * 2)
    one = random_tokens()
    two = one.clone()
    two[:, :7] = (one[:, :7] + 1) % V
    before, after = model(one, document_ids=document_ids), model(two, document_ids=document_ids)
    assert torch.equal(before[:, 7:], after[:, 7:])
    assert not torch.allclose(before[:, :7], after[:, :7])
    leaking = model(two)[:, 7:] - model(one)[:, 7:]
    assert leaking.abs().max() > 0.01, "without document ids the same change is seen"


@torch.no_grad()
def test_the_future_is_not_seen() -> None:
    model = build()
    one = random_tokens()
    two = one.clone()
    two[:, 10:] = (one[:, 10:] + 1) % V
    torch.testing.assert_close(model(one)[:, :10], model(two)[:, :10])


def test_an_all_padding_row_gives_numbers() -> None:
    model = build()
    token_ids, document_ids = random_tokens(), torch.zeros(2, 16, dtype=torch.long)
    token_ids[1] = 0
    document_ids[1] = -1
    labels = token_ids.roll(-1, 1)
    labels[1] = IGNORE_INDEX
    total, token_losses = model(token_ids, document_ids=document_ids, labels=labels, reduction="sum")
    total.backward()
    assert total.isfinite()
    assert (token_losses[1] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_checkpointing_activations_changes_no_gradient() -> None:
    token_ids = random_tokens()
    gradients = []
    for switch in (False, True):
        model = build()
        model.checkpoint_activations = switch
        model(token_ids, labels=token_ids.roll(-1, 1), reduction="sum")[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("family", ["llama", "smollm3", "qwen3"])
def test_gradients_reach_every_parameter(family: str) -> None:
    model = build(family, tied_embeddings=False)
    token_ids = random_tokens()
    model(token_ids, labels=token_ids.roll(-1, 1), reduction="sum")[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_model_is_the_same(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """`aot_eager` traces forward and backward as torch.compile does, without a C++ build: no graph break in a block.

    But for attention, where compiling that does not pay (processors without bfloat16).
    """
    monkeypatch.setattr(attention, "PRODUCTS_PAY", whole)
    torch.compiler.reset()
    token_ids, document_ids = random_tokens(), torch.tensor([[0] * 7 + [1] * 9] * 2)
    labels = token_ids.roll(-1, 1)
    results = []
    for compiled in (False, True):
        model = build()
        if compiled:  # blocks only: the loss takes as many rows as are trained, which no static graph can
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=whole, dynamic=False)
        total, _ = model(token_ids, document_ids=document_ids, labels=labels, reduction="sum")
        total.backward()
        results.append((total.detach(), model.embedding.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_any_number_of_rows_is_served_by_one_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `parallel.prepare` compiles on a CPU; another length is another compilation."""
    monkeypatch.setattr(attention, "PRODUCTS_PAY", True)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, eager = build("llama"), build("llama")
    for block in model.blocks:
        block.compile(backend=counter, dynamic=True)
    for rows, tokens, compilations in ((2, 16, 1), (5, 16, 1), (3, 16, 1), (3, 24, 2), (7, 24, 2)):
        token_ids = torch.randint(0, model.config.vocab_size, (rows, tokens))
        options = {
            "document_ids": (torch.arange(tokens) > 6).long().expand(rows, tokens),
            "labels": token_ids,
        }
        torch.testing.assert_close(model(token_ids, **options), eager(token_ids, **options))
        assert counter.frame_count == compilations


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_what_is_computed_does_not_depend_on_which_shape_came_first() -> None:
    """A resumed run meets other shapes first; 4 x 16 tokens are as many as the vocabulary has words."""
    execution = decide_execution(ExecutionConfig(precision="fp32", compile="on"))
    found = []
    for order in ((4, 2), (2, 4)):
        torch.compiler.reset()
        compile_once.cache_clear()
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "width": 32, "layers": 1, "heads": 4, "kv_heads": 2, "ffn_width": 48}
        model = prepare(Transformer(ModelConfig(**shape)), execution)
        gradients = {}
        for rows in order:
            token_ids = torch.randint(64, (rows, 16), generator=torch.Generator().manual_seed(rows))
            model(token_ids, labels=token_ids, reduction="sum")[0].backward()
            gradients[rows] = [parameter.grad for parameter in model.parameters()]
            model.zero_grad()
        found.append(gradients)
    for rows in (2, 4):
        assert all(map(torch.equal, found[0][rows], found[1][rows]))


def test_fresh_weights_have_the_stated_spread() -> None:
    model = build(width=128, ffn_width=256, layers=8, init_std=0.02)
    block = model.blocks[0]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.ffn.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert (block.ffn_norm.weight == 1).all()
    scalar = build(head="scalar", width=128)
    assert scalar.output_weight.shape == (1, 128)
    assert scalar.output_weight.std().item() == pytest.approx(129**-0.5, rel=0.3)


def test_rotation_frequencies_survive_casts_and_the_meta_device() -> None:
    expected = build().frequencies
    with torch.device("meta"):
        model = build()
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    assert model.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(model.frequencies, expected)


@torch.no_grad()
def test_a_rotation_depends_on_distance_alone() -> None:
    model = build("llama")
    token_ids = random_tokens()
    shifted = model(token_ids, position_ids=torch.arange(16)[None] + 100)
    torch.testing.assert_close(model(token_ids), shifted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "smollm3", "qwen3"])
@torch.no_grad()
def test_cached_decoding_equals_a_full_pass(family: str) -> None:
    model, token_ids = build(family), random_tokens()
    cache = KVCache(model.config, max_rows=2)
    pieces = [
        model(token_ids[:, start:stop], cache=cache) for start, stop in ((0, 5), (5, 6), (6, 7), (7, 16))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(token_ids), rtol=0, atol=1e-4)


def test_misuse_is_refused() -> None:
    token_ids = random_tokens()
    with pytest.raises(ValueError, match="scalar head"):
        build(head="scalar")(token_ids, labels=token_ids)
    with pytest.raises(ValueError, match="temperature"):
        build()(token_ids, labels=token_ids, reduction="sum", temperature=0.5)
