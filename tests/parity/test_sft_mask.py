"""What supervised fine-tuning trains on: ours against transformers' mask and TRL's SFTTrainer preparation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nurture.chat_template import named_template, read_template
from nurture.data.packing import ConversationBatches, tokenise_conversations
from nurture.data.rows import parse_row
from nurture.errors import NurtureError
from nurture.losses.language import LanguageLoss
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX

transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers (pip install 'nurture[test]')"
)

ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"What is {i} + {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}.\n"},
            {"role": "user", "content": "And twice that? 🎉"},
            {"role": "assistant", "content": f"\n{4 * i}, naïve 東京" + " indeed" * (i % 5)},
        ][: 5 if i % 3 else 3]
    }
    for i in range(23)
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    ours = Tokenizer.train([m["content"] for row in ROWS for m in row["messages"]], 300)
    ours.save(directory)
    return ours, transformers.AutoTokenizer.from_pretrained(directory)


def our_conversations(tokenizer):
    return list(tokenise_conversations([parse_row(row, "test") for row in ROWS], tokenizer))


def test_masks_equal_transformers_token_by_token(tokenizers):
    ours, theirs = tokenizers
    for row, conversation in zip(ROWS, our_conversations(ours), strict=True):
        reference = theirs.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert conversation.token_ids == reference["input_ids"]
        assert [int(m) for m in conversation.completion_mask] == reference["assistant_masks"]
        words = theirs.decode(
            [t for t, m in zip(conversation.token_ids, conversation.completion_mask, strict=True) if m]
        )
        assert words == "".join(
            m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"
        )


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
    {"role": "user", "content": "And 2 + 2?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Ask.",
        "tool_calls": [{"name": "f", "arguments": {}}],
    },
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "<think>\nTold.\n</think>\n4"},
]
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        # Thoughts about the first request are gone in the second part, and its reply is context there.
        (
            {"enable_thinking": True},
            [
                (3, ["<think>\nOne and one.\n</think>\n2"]),
                (7, [f"<think>\nAsk.\n</think>\n{CALL}", "<think>\nTold.\n</think>\n4"]),
            ],
        ),
        ({"enable_thinking": False}, [(7, ["2", CALL, "4"])]),
        # Plain ChatML with thoughts in it trains as thinking does.
        (
            {},
            [
                (3, ["<think>\nOne and one.\n</think>\n2"]),
                (7, [f"<think>\nAsk.\n</think>\n{CALL}", "<think>\nTold.\n</think>\n4"]),
            ],
        ),
    ],
    ids=["think", "no_think", "plain"],
)
def test_masks_of_every_mode_equal_transformers_token_by_token(tokenizers, variables, parts):
    ours, theirs = tokenizers
    row = parse_row({"messages": TURNS, "chat_template_kwargs": variables}, "test")
    found = list(tokenise_conversations([row], ours))
    assert len(found) == len(parts)
    for conversation, (turns, trained) in zip(found, parts, strict=True):
        reference = theirs.apply_chat_template(
            TURNS[:turns], return_dict=True, return_assistant_tokens_mask=True, **variables
        )
        assert conversation.token_ids == reference["input_ids"]
        assert [int(m) for m in conversation.completion_mask] == reference["assistant_masks"]
        words = [t for t, m in zip(conversation.token_ids, conversation.completion_mask, strict=True) if m]
        assert theirs.decode(words) == "".join(f"{text}<|im_end|>" for text in trained)


@pytest.mark.parametrize(("name", "thinks"), [("chatml", None), ("chatml_think", True), ("chatml_no_think", False)])  # fmt: skip
def test_a_default_mode_is_saved_and_is_that_mode_in_transformers(tokenizers, tmp_path, name, thinks):
    """Who names no mode gets the template's own; who names one gets that, whatever the template's is."""
    ours, plain = tokenizers
    ours.for_chat(name).save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    said = {} if thinks is None else {"enable_thinking": thinks}
    for turns, prompt in ((TURNS, False), (TURNS[1:4], True)):
        how = {"tokenize": False, "add_generation_prompt": prompt}
        text = saved.apply_chat_template(turns, **how)
        assert text == plain.apply_chat_template(turns, **how, **said)
        assert text == Tokenizer.load(tmp_path).render(turns, add_generation_prompt=prompt)
        assert ("Reasoning Mode: /think" in text, "Reasoning Mode: /no_think" in text) == (
            thinks is True,
            thinks is False,
        )
        for other in (True, False):
            named = saved.apply_chat_template(turns, **how, enable_thinking=other)
            assert named == plain.apply_chat_template(turns, **how, enable_thinking=other)


def test_packed_labels_equal_trl(tokenizers, tmp_path):
    """Every packed document of ours has the labels that TRL's dataset preparation and collator give that row."""
    trl = pytest.importorskip("trl", reason="parity needs trl (pip install 'nurture[test]')")
    datasets = pytest.importorskip("datasets")
    ours, theirs = tokenizers
    config = transformers.LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=True,
        packing=False,
        max_length=128,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=theirs,
    )
    collated = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    expected = set()
    for token_ids, labels, present in zip(
        collated["input_ids"].tolist(),
        collated["labels"].tolist(),
        collated["attention_mask"].tolist(),
        strict=True,
    ):
        length = sum(present)
        # TRL's labels stand at the token itself and are shifted in the model; ours are shifted already.
        expected.add((tuple(token_ids[:length]), (*labels[1:length], IGNORE_INDEX)))

    source = ConversationBatches(
        our_conversations(ours), batch_size=1, sequence_length=128, seed=0, pad_token_id=ours.pad_token_id
    )
    found = set()
    for step in range(source.rows_per_epoch):
        batch = source(step)
        for document in set(batch.document_ids[0].tolist()) - {-1}:
            here = batch.document_ids[0] == document
            found.add((tuple(batch.token_ids[0][here].tolist()), tuple(batch.labels[0][here].tolist())))
        assert (batch.labels[0][batch.document_ids[0] == -1] == IGNORE_INDEX).all()
    assert found == expected
    assert (
        sum(sum(label != IGNORE_INDEX for label in labels) for _, labels in found)
        == source.report.trained_tokens
    )
    assert torch.tensor([len(tokens) for tokens, _ in found]).max() <= 128


def test_loss_and_gradient_equal_trls(tokenizers, tmp_path):
    """The same rows, packed by us and padded by TRL, give the same mean loss and the same gradient."""
    trl = pytest.importorskip("trl", reason="parity needs trl (pip install 'nurture[test]')")
    datasets = pytest.importorskip("datasets")
    ours, theirs = tokenizers
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=ours.vocab_size, width=32, layers=2, heads=4, kv_heads=2, max_position=256)
    )
    save_model(model, tmp_path / "model")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trainer = trl.SFTTrainer(
        model=peer,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), assistant_only_loss=True, packing=False, max_length=128, report_to=[],
            use_cpu=True, bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=theirs,
    )  # fmt: skip
    collated = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    expected = trainer.compute_loss(peer, dict(collated))
    expected.backward()

    source = ConversationBatches(
        our_conversations(ours), batch_size=1, sequence_length=128, seed=0, pad_token_id=ours.pad_token_id
    )
    loss_fn = LanguageLoss(torch.from_numpy(ours.token_byte_lengths))
    batches = [source(step) for step in range(source.rows_per_epoch)]
    count = sum(batch.loss_count for batch in batches)
    assert count == int((collated["labels"][:, 1:] != IGNORE_INDEX).sum())
    total = torch.zeros(())
    for batch in batches:
        result = loss_fn(model, batch)
        (result.total / count).backward()
        total = total + result.total.detach() / count
    torch.testing.assert_close(total, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model.embedding.weight.grad, peer.get_input_embeddings().weight.grad, atol=1e-5, rtol=1e-3
    )


def test_another_template_gives_rows_of_many_turns_and_tools_the_mask_of_transformers(tokenizers):
    """Qwen3's own template rewrites earlier turns and is refused, by the setting's name; TRL's variant of it is not."""
    trl = pytest.importorskip("trl", reason="parity needs trl (pip install 'nurture[test]')")
    folder = Path(trl.__file__).parent / "chat_templates"
    if not (folder / "qwen3_training.jinja").is_file():
        pytest.skip("this trl has no chat templates")
    ours, theirs = tokenizers
    variables = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}
    row = parse_row({"messages": TURNS, "chat_template_kwargs": variables}, "test")
    qwen = ours.for_chat(read_template(folder / "qwen3.jinja"))
    with pytest.raises(NurtureError, match=r"messages\[2\] differently.*sft's setting chat_template=FILE"):
        list(tokenise_conversations([row], qwen))
    changed = qwen.for_chat(named_template("qwen3_training.jinja", folder))
    (conversation,) = tokenise_conversations([row], changed)
    reference = theirs.apply_chat_template(
        TURNS, chat_template=changed.chat_template, return_dict=True, return_assistant_tokens_mask=True, **variables
    )  # fmt: skip
    assert conversation.token_ids == reference["input_ids"]
    assert [int(m) for m in conversation.completion_mask] == reference["assistant_masks"]
    # And nurture's own, in the place of one that is there.
    assert list(tokenise_conversations([row], qwen.for_chat("chatml"))) == list(
        tokenise_conversations([row], ours)
    )
