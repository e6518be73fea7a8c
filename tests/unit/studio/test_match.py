"""Games in the terminal: a person's game with its mistakes, colours or none, and a model that is watched."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nurture.cli import app
from nurture.environments.catalog import environment_maker, tasks_for
from nurture.environments.math import Math
from nurture.errors import NurtureError
from nurture.inference.chat import ChatModel
from nurture.inference.engine import Completion, Episode, Respond
from nurture.rewards.math import MathVerdict
from nurture.studio.match import Player, play_yourself, tiles, watch
from nurture.tokenizer import Tokenizer


def player(colours: bool = False, tasks: Sequence[object] = ("crane",), **settings: object) -> Player:
    console = Console(file=io.StringIO(), force_terminal=colours, no_color=not colours, width=100)
    return Player(environment_maker("wordle", settings), tasks, 3, console)


def shown(made: Player) -> str:
    assert isinstance(made.console.file, io.StringIO)
    return made.console.file.getvalue()


def saying(lines: Sequence[str]) -> Callable[[str], str]:
    left: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        for line in left:
            return line
        raise EOFError

    return read


def test_a_person_may_mistype_and_wins() -> None:
    made = player()
    assert play_yourself(made, saying(["xxxxx", "cran", "yyyyy", "", "grain", "[crane]"])) is True
    text = shown(made)
    assert text.count("Guess again.") == 3
    assert "G R A I N   X G G X Y" in text
    assert "not in it: gi" in text
    made = player(style="textarena")
    play_yourself(made, saying(["grain", "grain"]))
    assert shown(made).count("X G G X Y") == 1
    assert "You said that word before" in shown(made)
    assert "You won." in text


def test_hard_mode_is_explained_and_leaving_shows_the_word() -> None:
    made = player(hard_mode=True)
    assert play_yourself(made, saying(["cream", "dream", "q"])) is None
    assert "You must use every hint. Guess again." in shown(made)
    assert "The word was crane." in shown(made)

    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    made = player()
    assert play_yourself(made, interrupted) is None
    assert "The word was crane." in shown(made)


@pytest.mark.parametrize("word", ["q", "quit", "EXIT"])
def test_words_that_leave(word: str) -> None:
    made = player()
    assert play_yourself(made, saying([word, "crane"])) is None
    assert "The word was crane." in shown(made)
    made = player()
    make = environment_maker("math", {})
    made.make, made.tasks = make, tasks_for("math", {}, None, "heldout")
    assert play_yourself(made, saying([word, "1"])) is None


def test_a_person_is_not_told_what_a_model_is() -> None:
    for seed in range(8):
        made = player()
        made.seed = seed
        play_yourself(made, saying(["q"]))
        assert "helpful assistant" not in shown(made)


def test_colours_are_the_marks() -> None:
    line = tiles("grain", "XGGXY", colours=True)
    assert [(line.plain[span.start : span.end].strip(), str(span.style).split("#")[1]) for span in line.spans] == [
        ("G", "57534e"), ("R", "15803d"), ("A", "15803d"), ("I", "57534e"), ("N", "a16207"),
    ]  # fmt: skip
    made = player(colours=True)
    assert play_yourself(made, saying(["house", "brick", "bring", "brown", "chair", "chain"])) is False
    assert "\x1b[" in shown(made)
    assert "You lost." in shown(made)


def test_problems_are_answered_in_a_line_or_up_to_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    from nurture.environments import math as math_module

    heard: list[str] = []

    def check(reply: str, answer: str) -> MathVerdict:
        heard.append(reply)
        return MathVerdict(True)

    monkeypatch.setattr(math_module, "check_math", check)
    console = Console(file=io.StringIO(), no_color=True)
    tasks = tasks_for("math", {}, None, "heldout")
    made = Player(Math, tasks, 1, console)
    assert play_yourself(made, saying(["42"])) is True
    assert play_yourself(made, saying(["```python", "x = 1", "```", "."])) is True
    assert heard == ["42", "```python\nx = 1\n```"]
    assert "That is right." in shown(made)


class Saying:
    """An engine that says words."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        self.turns = [[*tokenizer.encode(f"[{word}]"), tokenizer.end_of_turn_id] for word in words]

    def converse(self, prompts: object, respond: Respond, *more: object, **settings: object) -> list[Episode]:
        episode = Episode()
        for tokens in self.turns:
            episode.turns.append(Completion(tokens, [-1.0] * len(tokens), "stop"))
            answer = respond([(0, episode.turns[-1])])[0]
            if answer is None:
                break
            episode.answers.append(list(answer))
        return [episode]


def test_a_model_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train(["[crane] user assistant"] * 4, 280)
    chat = object.__new__(ChatModel)
    chat.name, chat.tokenizer, chat.is_base = "m", tokenizer, False
    chat.engine = Saying(tokenizer, ["zzzzz", "yyyyy"])  # type: ignore[assignment]
    made = player()
    assert watch(made, chat, games=1, max_tokens=8, temperature=1.0) == 0
    assert "A second invalid guess in a row ends the game." in shown(made)
    chat.engine = Saying(tokenizer, ["zzzzz", "grain", "crane"])  # type: ignore[assignment]
    made = player()
    assert watch(made, chat, games=2, max_tokens=8, temperature=1.0) == 2
    text = shown(made)
    assert (
        text.index("That is not a word I know") < text.index("G R A I N   X G G X Y") < text.index("You won.")
    )
    assert "reward 1.00   correct 1.00" in text
    assert "It won 2 of 2." in text
    chat.is_base = True
    with pytest.raises(NurtureError, match="m is a base model, which cannot take turns"):
        watch(made, chat, games=1, max_tokens=8, temperature=1.0)


def test_the_commands() -> None:
    run = CliRunner().invoke
    played = run(app, ["play", "wordle", "hard_mode=true", "--seed", "1"], input="crane\nq\n")
    assert played.exit_code == 0
    assert "C R A N E" in played.output
    assert "The word was" in played.output
    for words, said in (
        (["play", "wordel"], "no environment 'wordel'.*wordle"),
        (["play", "wordle", "hard_mod=true"], "hard_mod"),
        (["play", "wordle", "a", "b"], "one model plays at a time"),
        (["play", "wordle", "--data", "world:tasks:arithmetic"], "no heldout row there is a task for wordle"),
        (["env", "serve", "wordle", "reward=bnary"], "reward"),
        (["env", "serve", "wordle", "--split", "tran"], "--split tran"),
    ):
        with pytest.raises(NurtureError, match=said):
            run(app, words, catch_exceptions=False)


def test_a_taken_port_is_said() -> None:
    pytest.importorskip("starlette")
    from nurture.studio.server import listen

    with listen("127.0.0.1", 0) as taken:
        words = ["env", "serve", "wordle", "--port", str(taken.getsockname()[1])]
        with pytest.raises(NurtureError, match=r"is taken.*--port"):
            CliRunner().invoke(app, words, catch_exceptions=False)
