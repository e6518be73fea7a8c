"""Games in the terminal: play one yourself, or watch a model play it.

A person may mistype as often as they like; a model plays by the rules of training, through `rollout.collect`, so what
is seen here is what a rollout is. Where the terminal shows no colours, marks are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from nurture.environments.catalog import Make
from nurture.environments.protocol import Environment, Observation, StepResult
from nurture.environments.wordle import Wordle
from nurture.errors import NurtureError
from nurture.inference.chat import ChatModel
from nurture.inference.sampling import SamplingParams
from nurture.rollout import collect
from nurture.world.split import pick, random_for
from nurture.world.wordle import spaced

_TILES = {"G": "bold white on #15803d", "Y": "bold white on #a16207", "X": "bold white on #57534e"}
_LEAVING = ("q", "quit", "exit")  # in brackets, these are words too
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_HELP = {
    Wordle: "Type a word. Green: right place; yellow: elsewhere in the word; grey: not in it, or not so often. "
    "q, quit or exit leaves.",
    None: "Type your answer; what takes several lines ends with a line that is a single dot. q, quit or exit leaves.",
}


@dataclass
class Player:
    """Where games come from and are shown.

    Attributes:
        make: makes a game.
        tasks: what the seed chooses from; empty where it decides alone.
        seed: of the first game.
    """

    make: Make
    tasks: Sequence[Any]
    seed: int
    console: Console

    def task(self, seed: int) -> Any:
        """Return the task of a game."""
        return pick(random_for("match", seed), self.tasks) if self.tasks else None

    def say(self, text: str, style: str = "") -> None:
        """Print text as it is."""
        self.console.print(Text(text, style), soft_wrap=True)

    def show(self, game: Environment, action: str, result: StepResult) -> None:
        """Show a turn: the row of marks of a guess, or what was written, and what came of it."""
        marked = isinstance(game, Wordle) and not game.stumbled
        if isinstance(game, Wordle) and marked:
            self.console.print(tiles(*game.history[-1], self._colours))
        else:
            self.say(action.strip() or "(nothing)", "dim")
        if result.done and isinstance(game, Wordle) and not marked:
            self.say("A second invalid guess in a row ends the game.", "dim")
        if result.done or not marked:
            self.say(result.observation.text, "green" if result.info.get("won") else "yellow")

    def keyboard(self, game: Wordle) -> None:
        """Show what is known of every letter."""
        best: dict[str, str] = {}
        for word, marks in game.history:
            for letter, mark in zip(word, marks, strict=True):
                best[letter] = max(best.get(letter, "X"), mark, key="XYG".index)
        if not self._colours:
            gone = "".join(sorted(letter for letter, mark in best.items() if mark == "X"))
            self.say(f"not in it: {gone or 'nothing yet'}", "dim")
            return
        for row in _KEYS:
            line = Text(" " * (20 + _KEYS.index(row)))
            for letter in row:
                line.append(letter.upper(), _TILES.get(best.get(letter, ""), "dim"))
                line.append(" ")
            self.console.print(line)

    @property
    def _colours(self) -> bool:
        return self.console.color_system is not None and not self.console.no_color


def tiles(word: str, marks: str, colours: bool) -> Text:
    """Return a guess with its marks, coloured or written out."""
    if not colours:
        return Text(f"{spaced(word)}   {' '.join(marks)}")
    line = Text()
    for letter, mark in zip(word.upper(), marks, strict=True):
        line.append(f" {letter} ", _TILES[mark])
        line.append(" ")
    return line


def play_yourself(player: Player, read: Callable[[str], str]) -> bool | None:
    """Let a person play one game.

    Args:
        read: shows a prompt and returns a line; raises EOFError at the end of the input.

    Returns:
        Whether it was won; None if they left.
    """
    game = player.make()
    task = player.task(player.seed)
    opening = game.reset(task, player.seed)
    wordle = game if isinstance(game, Wordle) else None
    for message in opening.messages:
        if message["role"] == "system":  # it speaks to a model
            continue
        player.say(message.get("content", ""))
    player.say(_HELP[Wordle if wordle else None], "dim")
    try:
        while True:
            action = _written(wordle, read)
            if wordle:
                wordle.forgive()  # people may mistype as often as they like
                action = action if "[" in action else f"[{action}]"
            result = game.step(action)
            player.show(game, action, result)
            if result.done:
                return bool(result.info.get("won", result.reward > 0))
            if wordle:
                player.keyboard(wordle)
    except (EOFError, KeyboardInterrupt, _Leave):
        if wordle:
            player.say(f"The word was {wordle.secret}.", "dim")
    return None


class _Leave(Exception):
    """The player has had enough."""


def _written(wordle: Wordle | None, read: Callable[[str], str]) -> str:
    """Read a guess, or lines up to a single dot (one line that is no code is an answer by itself)."""
    if wordle:
        while not (line := read(f"{len(wordle.history) + 1}/{wordle.config.guesses}> ").strip()):
            pass
        if line.lower() in _LEAVING:
            raise _Leave
        return line
    lines: list[str] = []
    while (line := read("... " if lines else "> ")).strip() != ".":
        if line.strip().lower() in _LEAVING and not lines:
            raise _Leave
        lines.append(line)
        if len(lines) == 1 and line.strip() and not line.rstrip().endswith((":", "```", "python")):
            break
    return "\n".join(lines)


class _Shown:
    """An environment that is looked at while it is played."""

    def __init__(self, player: Player, results: list[StepResult]) -> None:
        self._player, self._results, self._game = player, results, player.make()

    def reset(self, task: Any, seed: int) -> Observation:
        observation = self._game.reset(task, seed)
        for message in observation.messages:
            self._player.say(f"{message['role']}: {message.get('content', '')}")
        return observation

    def step(self, action: str) -> StepResult:
        result = self._game.step(action)
        self._player.show(self._game, action, result)
        self._results.append(result)
        return result


def watch(player: Player, chat: ChatModel, *, games: int, max_tokens: int, temperature: float) -> int:
    """Let a model play, turn by turn on the screen; return how many games it won.

    Raises:
        NurtureError: it is a base model, which cannot take turns.
    """
    if chat.is_base:
        raise NurtureError(f"{chat.name} is a base model, which cannot take turns: name a stage after SFT.")
    won = 0
    for number in range(games):
        if number:
            player.console.rule()
        results: list[StepResult] = []
        seed = player.seed + number
        (rollout,) = collect(
            chat.engine,
            chat.tokenizer.for_chat(),
            lambda: _Shown(player, results),  # noqa: B023
            [player.task(seed)],
            params=SamplingParams(max_tokens=max_tokens, temperature=temperature),
            seed=seed,
        )
        if rollout.finished != "stop":
            ends = {
                "length": f"its turn did not end within {max_tokens} tokens (--max-tokens)",
                "context": "its context is full",
                "turns": "too many turns",
            }
            player.say(f"{rollout.text.strip()}\nIt did not finish: {ends[rollout.finished]}.", "yellow")
        won += bool(rollout.info.get("won"))
        parts = "  ".join(f"{name} {value:.2f}" for name, value in rollout.reward_parts.items())
        player.say(f"reward {rollout.reward:.2f}   {parts}", "dim")
    if games > 1:
        player.say(f"It won {won} of {games}.", "bold")
    return won
