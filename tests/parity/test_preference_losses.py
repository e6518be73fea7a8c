"""DPO, IPO, APO and KTO against TRL's trainers: the same rows, packed by us and padded by TRL, the same loss and gradient."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from nurture.data.preference import CUT, PreferenceBatches, tokenise_judged, tokenise_preferences
from nurture.data.rows import parse_row
from nurture.losses.preference import PreferenceLoss, sequence_logprobs
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer

transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers (pip install 'nurture[test]')"
)
trl = pytest.importorskip("trl", reason="parity needs trl (pip install 'nurture[test]')")
datasets = pytest.importorskip("datasets")

LONGEST = 90
EARLIER = [
    {"role": "user", "content": "Hello! 🎉"},
    {"role": "assistant", "content": "Hello, what can I do?"},
]


def row(i: int) -> dict:
    """Rows of many lengths: several turns, one-word and equal-length replies, and one that is longer than the limit."""
    prompt = [
        *(EARLIER if i % 3 == 0 else []),
        {"role": "user", "content": f"What is {i} + {i}?" + " Please." * (i % 4)},
    ]
    chosen, rejected = f"It is {2 * i}." + " Indeed." * (i % 5), "No." if i % 2 else f"It is {2 * i + 1}."
    if i == 7:
        chosen = "so long " * 60
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


ROWS = [row(i) for i in range(11)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Our tokenizer, a policy and a reference; and both models and the tokenizer as transformers loads them."""
    folder = tmp_path_factory.mktemp("models")
    texts = [turn["content"] for row in ROWS for part in row.values() for turn in part]
    tokenizer = Tokenizer.train(texts, 320)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=4, kv_heads=2, max_position=256
    )
    models, peers = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Transformer(shape)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)  # far enough apart that the sigmoids are not all in their middle
        save_model(model, folder / str(seed))
        tokenizer.save(folder / str(seed))
        models.append(model)
        peers.append(
            transformers.AutoModelForCausalLM.from_pretrained(folder / str(seed), dtype=torch.float32)
        )
    return tokenizer, models, peers, transformers.AutoTokenizer.from_pretrained(folder / "0")


def our_loss_and_gradient(preferences, models, loss_fn: PreferenceLoss, tokenizer, rows_at_once: int):
    policy, reference = models
    policy.zero_grad()
    batches = PreferenceBatches(
        preferences,
        batch_size=1,
        sequence_length=2 * LONGEST + 30,
        seed=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    for batch, members in batches.in_order(2):
        with torch.no_grad():
            logprobs = sequence_logprobs(reference, batch)
        for row_logprobs, numbers in zip(logprobs, members, strict=True):
            for place, number in enumerate(numbers):
                batches.reference_logprobs[number] = row_logprobs[2 * place : 2 * place + 2]
    total, metrics = torch.zeros(()), Counter()
    for batch, _ in batches.in_order(rows_at_once):
        result = loss_fn(policy, batch)
        (result.total / len(preferences)).backward()
        total += result.total.detach() / len(preferences)
        for name, (amount, count) in result.metrics.items():
            metrics[name] += amount
            metrics[f"{name}/count"] += count
    means = {
        name: metrics[name] / metrics[f"{name}/count"] for name in metrics if not name.endswith("/count")
    }
    return total, policy.embedding.weight.grad.clone(), means


def as_trl(preference) -> tuple[list[int], list[list[int]]]:
    """Return prompt and completions as TRL holds them."""
    start = list(preference.masks[0]).index(True)
    assert all(list(mask).index(True) == start for mask in preference.masks)
    return list(preference.answers[0][:start]), [list(answer[start:]) for answer in preference.answers]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("dpo", "sigmoid"), ("ipo", "ipo"), ("apo_zero", "apo_zero"), ("apo_down", "apo_down")],
)
def test_pair_losses_equal_trls(setting, tmp_path, ours: str, theirs: str) -> None:
    tokenizer, models, (peer, peer_reference), peer_tokenizer = setting
    lost = Counter()
    preferences = list(
        tokenise_preferences(
            [parse_row(row, "test") for row in ROWS], tokenizer, "test",
            answer_tokens=LONGEST, row_tokens=2 * LONGEST, lost=lost,
        )
    )  # fmt: skip
    assert len(preferences) == len(ROWS)
    assert lost == {CUT: 1}  # TRL cuts the same one
    trainer = trl.DPOTrainer(
        model=peer,
        ref_model=peer_reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path), loss_type=[theirs], beta=0.2, max_length=LONGEST, report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=peer_tokenizer,
    )  # fmt: skip
    examples = []
    for index, preference in enumerate(preferences):
        prompt, (chosen, rejected) = as_trl(preference)
        examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        # TRL's own preparation gives the same tokens, and the line break after the end token, which we do not train.
        prepared = trainer.train_dataset[index]
        assert prepared["prompt_ids"] == prompt
        newline = tokenizer.encode("\n")
        whole = (prepared["chosen_ids"], prepared["rejected_ids"])
        for mine, other in zip((chosen, rejected), whole, strict=True):
            assert [*mine, *newline] == other or mine == other[: LONGEST - len(prompt)]
    peer.zero_grad()
    expected = trainer.compute_loss(peer, trainer.data_collator(examples))
    expected.backward()
    reported = {name: values[-1] for name, values in trainer._metrics["eval"].items() if values}
    for rows_at_once in (1, 5):
        total, gradient, metrics = our_loss_and_gradient(
            preferences, models, PreferenceLoss(ours, 0.2), tokenizer, rows_at_once
        )
        torch.testing.assert_close(total, expected.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, peer.get_input_embeddings().weight.grad, atol=1e-5, rtol=1e-3)
        assert metrics["pair_accuracy"] == pytest.approx(reported["rewards/accuracies"])
        assert metrics["margin"] == pytest.approx(reported["rewards/margins"], abs=1e-4)
        assert 0.2 * metrics["chosen_drift"] == pytest.approx(reported["rewards/chosen"], abs=1e-4)
        assert metrics["rejected_logprob"] == pytest.approx(reported["logps/rejected"], abs=1e-3)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.5)])
def test_kto_equals_trls(setting, tmp_path, weights: tuple[float, float]) -> None:
    tokenizer, models, (peer, peer_reference), peer_tokenizer = setting
    judged = [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 else "chosen"], "label": i % 3 == 0}
        for i, row in enumerate(ROWS)
    ]
    preferences = list(
        tokenise_judged(
            [parse_row(row, "test") for row in judged],
            tokenizer,
            "test",
            answer_tokens=LONGEST,
            lost=Counter(),
        )
    )
    assert len(preferences) == len(ROWS)
    trainer = trl.KTOTrainer(
        model=peer,
        ref_model=peer_reference,
        args=trl.KTOConfig(
            output_dir=str(tmp_path), beta=0.2, max_length=LONGEST, report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, desirable_weight=weights[0], undesirable_weight=weights[1],
            per_device_train_batch_size=len(ROWS),
        ),
        train_dataset=datasets.Dataset.from_list(judged),
        processing_class=peer_tokenizer,
    )  # fmt: skip
    examples = []
    for preference in preferences:
        prompt, (own, unrelated) = as_trl(preference)
        label = preference.ranking == ((0,), (1,))
        examples.append(
            {"prompt_ids": prompt, "completion_ids": own, "KL_completion_ids": unrelated, "label": label}
        )
    assert [example["label"] for example in examples] == [row["label"] for row in judged]
    peer.zero_grad()
    expected = trainer.compute_loss(peer, trainer.data_collator(examples))
    expected.backward()
    loss_fn = PreferenceLoss("kto", 0.2, desirable_weight=weights[0], undesirable_weight=weights[1])
    # One microbatch: the reference point is estimated on what is at hand, in TRL too.
    total, gradient, metrics = our_loss_and_gradient(preferences, models, loss_fn, tokenizer, 100)
    assert trainer._metrics["eval"]["kl"][-1] == pytest.approx(metrics["reference_point"], abs=1e-4)
    torch.testing.assert_close(total, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, peer.get_input_embeddings().weight.grad, atol=1e-5, rtol=1e-3)
