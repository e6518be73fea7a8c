"""The reward model's loss and gradient against TRL's RewardTrainer: the same pairs, packed by us and padded by TRL."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from nurture.data.comparisons import Comparison, ComparisonBatches
from nurture.losses.reward import RewardLoss
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model, save_model
from nurture.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="parity needs transformers")
reward_trainer = pytest.importorskip("trl.trainer.reward_trainer", reason="parity needs trl")

PAD = 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One reward model, as ours and as transformers'."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=90, width=32, layers=2, heads=4, kv_heads=2, tied_embeddings=False, init_std=0.3
    )
    save_model(Transformer(shape, head="scalar"), folder, pad_token_id=PAD)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return load_model(folder, head="scalar"), peer, folder


def pairs(with_ratings: bool) -> list[Comparison]:
    """Pairs of many lengths, one-token answers among them; the chosen answer at either place."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(7):
        prompt = torch.randint(1, 90, (3 + number,), generator=generator).tolist()
        answers = tuple(
            prompt + torch.randint(1, 90, (length,), generator=generator).tolist()
            for length in (1 + 5 * (number % 3), 1 + number)
        )
        ranking = ((0,), (1,)) if number % 2 else ((1,), (0,))
        ratings = (3.0, 0.5 * number) if number % 2 else (-number / 2, 1.0)
        made.append(Comparison(answers, len(prompt), ranking, ratings if with_ratings else ()))
    return made


def theirs(peer: torch.nn.Module, given: list[Comparison], centring: float | None) -> torch.Tensor:
    """Return what `RewardTrainer.compute_loss` makes of these pairs."""
    examples = []
    for comparison in given:
        (best,), (worst,) = comparison.ranking
        example = {"chosen_ids": comparison.answers[best], "rejected_ids": comparison.answers[worst]}
        if comparison.ratings:
            example["margin"] = comparison.ratings[best] - comparison.ratings[worst]
        examples.append(example)
    fake = SimpleNamespace(
        model=peer,
        args=SimpleNamespace(center_rewards_coefficient=centring),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = reward_trainer.DataCollatorForPreference(PAD).torch_call(examples)
    return reward_trainer.RewardTrainer.compute_loss(fake, peer, inputs)


@pytest.mark.parametrize("centring", [0.0, 0.01])
@pytest.mark.parametrize("margin", [False, True])
def test_loss_and_gradient_equal_trl(models, margin: bool, centring: float) -> None:
    ours, peer, folder = models
    given = pairs(margin)
    batches = ComparisonBatches(given, batch_size=3, sequence_length=72, seed=0, pad_token_id=PAD, ties=False)
    assert batches.rows_per_epoch == 3  # several comparisons in a row, several rows
    for model in (ours, peer):
        model.train().zero_grad()
    result = RewardLoss("drop", margin=float(margin), centring=centring)(ours, batches(0))
    (result.total / batches(0).loss_count).backward()
    loss = theirs(peer, given, centring or None)
    loss.backward()
    assert batches(0).loss_count == len(given)
    torch.testing.assert_close(result.total / len(given), loss, rtol=1e-5, atol=1e-6)
    # A gradient as the difference of two checkpoints, so that the names are translated by the code that loads them.
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.data, parameter.grad = parameter.grad, parameter.data
        peer.save_pretrained(folder / "gradient")
        for parameter in peer.parameters():
            parameter.data, parameter.grad = parameter.grad, parameter.data
    expected = dict(load_model(folder / "gradient", head="scalar").named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)
