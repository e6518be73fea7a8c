"""Supervised fine-tuning with texts beside the conversations: how much, of what, and only of the right split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from nurture import pipeline
from nurture.data.packing import ConversationBatches
from nurture.data.rows import parse_row
from nurture.errors import NurtureError
from nurture.inference.engine import Completion
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import load_model
from nurture.model.transformer import Transformer
from nurture.stages import sft
from nurture.stages.context import StageContext
from nurture.stages.recipe import load_recipe
from nurture.stages.training import save_result_model
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX

SAYING = "the fox lives in the forest and eats mice, and whoever reads the longer text learns of it"


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    tokenizer = Tokenizer.train([SAYING] * 3, 300)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, max_position=256
    )
    torch.manual_seed(0)
    save_result_model(Transformer(shape), tokenizer, tmp_path / "start", answers=False)
    rows = [{"prompt": f"number {n}", "response": f"it is {n}"} for n in range(200)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"text {n}: {SAYING * 3}"} for n in range(300)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "stage").mkdir()
    return StageContext(
        tmp_path / "stage", start=tmp_path / "start/model", base=tmp_path, cache=tmp_path / "cache", models={}
    )


def settings(**more: object) -> sft.Config:
    basic = {"name": "sft", "data": {"talk": "talk.jsonl"}, "replay": {"texts": "texts.jsonl"}}
    small = {
        "steps": 2,
        "batch_size": 2,
        "sequence_length": 64,
        "reply_tokens": 4,
        "heldout_conversations": 3,
    }
    return sft.Config.model_validate({**basic, **small, **more})


def test_a_share_of_the_tokens_is_text_all_of_it_trained(context: StageContext) -> None:
    config = settings(replay_share=0.25)
    tokenizer = Tokenizer.load(context.start).for_chat()
    read = list(sft._beside_text(config, context, tokenizer))
    lengths = {name: sum(len(c.token_ids) for c in read if c.source == name) for name in ("talk", "texts")}
    assert lengths["texts"] / sum(lengths.values()) == pytest.approx(0.25, abs=0.02)
    texts = [c for c in read if c.source == "texts"]
    assert all(all(c.completion_mask) and len(c.token_ids) <= 64 for c in texts)
    # The pieces of a document are all of it, from its start on; a held-out document is never read.
    whole = tokenizer.decode([t for c in texts for t in c.token_ids])
    heldout = list(sft._pieces(config, context, tokenizer, "texts", "heldout"))
    assert whole.count("text ") > 10
    for said in tokenizer.decode([t for c in heldout for t in c.token_ids]).split("text ")[1:]:
        assert f"text {said.partition(':')[0]}:" not in whole


SHOUTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] | upper + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>ASSISTANT\n' }}{% endif %}"
)


@pytest.mark.parametrize("written", ["talk.jinja", "chatml_no_think", None])
def test_the_template_that_is_asked_for_is_trained_and_saved(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, written: str | None
) -> None:
    (context.base / "talk.jinja").write_text(SHOUTING)
    trained: list[Tokenizer] = []
    beside = sft._beside_text
    monkeypatch.setattr(sft, "_beside_text", lambda c, x, t: (trained.append(t), beside(c, x, t))[1])
    sft.run(settings(replay={}, chat_template=written, sequence_length=192), context)
    saved = Tokenizer.load(context.directory / "model")
    assert saved.chat_template == trained[0].chat_template
    begin = saved.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    expected = {
        "talk.jinja": "<|im_start|>USER\nhi<|im_end|><|im_start|>ASSISTANT\n",
        "chatml_no_think": "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
        None: "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    }
    assert begin == expected[written]


def test_a_template_counts_by_its_content_and_is_checked_before_anything_runs(context: StageContext) -> None:
    file = context.base / "talk.jinja"
    recipe = context.base / "recipe.yaml"
    recipe.write_text(
        "name: r\nstages:\n  - kind: sft\n    start: start/model\n    data: {talk: talk.jsonl}\n"
        "    chat_template: talk.jinja\n"
    )

    def fingerprint() -> str:
        return pipeline.plan(load_recipe(recipe), context.base / "run")[0].fingerprint

    with pytest.raises(NurtureError, match=r"recipe.yaml:6.*talk.jinja: there is no such chat template"):
        fingerprint()
    file.write_text("{% if %}")
    with pytest.raises(NurtureError, match=r"talk.jinja:1: "):
        fingerprint()
    file.write_text(SHOUTING)
    first = fingerprint()
    file.touch()
    assert fingerprint() == first
    file.write_text(SHOUTING.replace("upper", "title"))
    assert fingerprint() != first
    recipe.write_text(recipe.read_text().replace("talk.jinja", "chatml_thinks"))
    with pytest.raises(NurtureError, match=r"chat_template.*chatml_think"):
        fingerprint()


@pytest.mark.parametrize("kind", ["sft", "reason"])
def test_the_stage_trains_what_it_says(context: StageContext, kind: str) -> None:
    """The masks of the conversations reach the packed labels: replies with their end alone, or questions too."""
    config = settings(kind=kind, replay={})
    tokenizer = Tokenizer.load(context.start).for_chat()
    packed = ConversationBatches(
        sft._beside_text(config, context, tokenizer),
        batch_size=1,
        sequence_length=64,
        seed=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = [packed(step) for step in range(packed.rows_per_epoch)]
    said = "".join(tokenizer.decode([t for t in row.labels[0].tolist() if t != IGNORE_INDEX]) for row in rows)
    assert said.count("<|im_end|>") == said.count("it is ") * (2 if kind == "reason" else 1) > 100
    assert ("number" in said) == (kind == "reason")


def test_held_out_questions_are_asked_in_their_own_mode(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained with a mode, or with tools, would be measured in a format it never saw without."""
    asked: list[str] = []
    tokenizer = Tokenizer.load(context.start).for_chat()

    class Silent:
        def __init__(self, *model: object, **settings: object) -> None:
            pass

        def generate(self, prompts: list[list[int]], *more: object, **settings: object) -> list[Completion]:
            asked.extend(map(tokenizer.decode, prompts))
            return [Completion([tokenizer.end_of_turn_id], [0.0], "stop") for _ in prompts]

    monkeypatch.setattr("nurture.evals.replies.Engine", Silent)
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "eats mice"}]
    modes: list[dict[str, object]] = [{"enable_thinking": True}, {"enable_thinking": False}, {}]
    rows = [parse_row({"messages": turns, "chat_template_kwargs": mode}, "f:1") for mode in modes]
    card = sft._card(
        settings(replay={}), context, load_model(context.start), tokenizer, {"talk": rows}, base=False
    )
    assert card.measures["stopped"].value == 1
    expected = [tokenizer.render(turns[:1], add_generation_prompt=True, **mode) for mode in modes]
    assert asked == expected
    assert len(set(asked)) == 3


def test_little_text_ends_without_being_read_again(context: StageContext) -> None:
    tokenizer = Tokenizer.load(context.start).for_chat()
    config = settings(replay_share=0.95)
    pieces = [c for c in sft._beside_text(config, context, tokenizer) if c.source == "texts"]
    assert pieces == list(sft._pieces(config, context, tokenizer, "texts", "train"))


def test_what_becomes_of_the_text_is_measured(context: StageContext) -> None:
    sft.run(settings(), context)
    metrics = json.loads((context.directory / "result.json").read_text())["metrics"]
    assert metrics["bpb/texts"]["after"] < metrics["bpb/texts"]["before"]


def test_a_handful_of_conversations_is_enough(
    context: StageContext, caplog: pytest.LogCaptureFixture
) -> None:
    few = (context.base / "talk.jsonl").read_text().splitlines(keepends=True)[:4]
    (context.base / "talk.jsonl").write_text("".join(few))
    sft.run(settings(replay={}, heldout_every=1000), context)
    assert "no conversation was chosen to be held out" in caplog.text
    assert (context.directory / "model/model.safetensors").exists()


@pytest.mark.parametrize("row", [{"prompt": "word " * 300, "response": "yes"}, {"prompt": "nobody answered"}])
def test_a_held_out_row_that_teaches_nothing_does_not_stop_the_training(
    context: StageContext, caplog: pytest.LogCaptureFixture, row: dict
) -> None:
    """The only one that is held out has its reply beyond the row's end, or has none."""
    texts = [{**row, "prompt": f"{row['prompt']}{n}"} for n in range(200)]
    odd = next(r for r in texts if parse_row(r, "f:1").is_heldout(50))
    rows = [
        r
        for r in ({"prompt": f"number {n}", "response": f"it is {n}"} for n in range(40))
        if not parse_row(r, "f:1").is_heldout(50)
    ]
    (context.base / "talk.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (*rows, odd)))
    sft.run(settings(replay={}), context)
    assert (
        "no conversation was chosen to be held out (one in 50 is) that has a reply within 64" in caplog.text
    )


def test_conversations_that_are_cut_are_told(context: StageContext, caplog: pytest.LogCaptureFixture) -> None:
    sft.run(settings(replay={}), context)
    assert "are cut there" not in caplog.text
    (context.base / "talk.jsonl").write_text(
        "".join(json.dumps({"prompt": f"number {n}", "response": "long " * 80}) + "\n" for n in range(60))
    )
    sft.run(settings(replay={}), replace(context, directory=context.base))
    assert "conversations are longer than sequence_length=64 and are cut there" in caplog.text


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_is_between_none_and_all(share: float) -> None:
    with pytest.raises(ValidationError, match="replay_share"):
        settings(replay_share=share)
