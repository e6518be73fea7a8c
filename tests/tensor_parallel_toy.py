"""Compare a model cut over processes with the whole one: losses, logprobs, gradients, weights. Started by torchrun.

python tensor_parallel_toy.py TENSOR_PARALLEL
"""

from __future__ import annotations

import sys

import torch

from nurture.model.config import ModelConfig
from nurture.model.parallel import prepare, row_order, whole_weights
from nurture.model.transformer import Transformer
from nurture.runtime import ExecutionConfig, decide_execution, whole_process

SHAPES = {
    "plain": ModelConfig(vocab_size=64, width=32, layers=2, heads=8, kv_heads=4, ffn_width=48, max_position=64),
    "qwen": ModelConfig(
        vocab_size=64, width=32, layers=2, heads=4, kv_heads=4, ffn_width=48, max_position=64, qk_norm=True,
        tied_embeddings=False, family="qwen3",
    ),
}  # fmt: skip


def outputs(model: Transformer, tokens: int) -> list[torch.Tensor]:
    """Run every way out of the model on fixed rows of so many tokens, with gradients of all of them added up."""
    generator = torch.Generator().manual_seed(7)
    token_ids = torch.randint(0, 64, (4, tokens), generator=generator)
    labels = token_ids.roll(-1, 1)
    labels[:, -3:] = -100
    document_ids = (torch.arange(tokens) > 6).long().expand(4, tokens).contiguous()
    if model.head == "scalar":
        values = model(token_ids, document_ids=document_ids)
        (values.square().sum() / 10).backward()
        return [values.detach()]
    with torch.no_grad():  # first: a backward pass must come after it, which puts the whole root away again
        logits = model(token_ids)
    total, losses = model(token_ids, document_ids=document_ids, labels=labels, reduction="sum")
    (total / 100).backward()
    logprobs, entropies = model(token_ids, labels=labels, reduction="entropy", temperature=0.7)
    ((logprobs * 0.3 + entropies * 0.1).sum() / 50).backward()
    return [x.detach() for x in (total, losses, logprobs, entropies, logits)]


def compare(shape: str, head: str, tensor_parallel: int, tokens: int) -> None:
    torch.manual_seed(0)
    whole = Transformer(SHAPES[shape], head)
    torch.manual_seed(0)
    cut = Transformer(SHAPES[shape], head)
    execution = decide_execution(
        ExecutionConfig(precision="fp32", compile="off", tensor_parallel=tensor_parallel)
    )
    prepare(cut, execution)
    for name, weight in whole_weights(cut).items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    for mine, expected in zip(outputs(cut, tokens), outputs(whole, tokens), strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-4)
    expected_gradients = dict(whole.named_parameters())
    for name, parameter in cut.named_parameters():
        order = row_order(cut, name, tensor_parallel)
        expected = expected_gradients[name].grad
        expected = expected if order is None else expected[order]
        torch.testing.assert_close(
            parameter.grad.full_tensor(), expected, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


if __name__ == "__main__":
    with whole_process():
        parts = int(sys.argv[1])
        for tokens in (16, 13):
            compare("plain", "lm", parts, tokens)
        compare("qwen", "lm", parts, 16)
        compare("plain", "scalar", parts, 16)
        print("equal")
