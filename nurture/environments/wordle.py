"""Wordle: find a word in six guesses from the marks that each guess gets. The house's multi-turn game.

The rules are textarena's Wordle-v0: a guess is a word in square brackets, letters are marked G, Y or X by
`world.wordle.feedback` (greens first, repeated letters used up), a word may not be said twice, and one invalid move is
tolerated: a second one in a row ends the game. Unlike there, a game is a pure function of (task, seed), lists of any
size and length can be given, and hard mode (hints must be used) is a setting.

`reward` is `binary` (1 for a win), `textarena` (1 for a win, else (greens + yellows / 2) / letters of the last valid
guess), or weights over named parts, those of TRL's notebook:

    correct   1 if the word was found        greens    greens / letters of the last valid guess
    yellows   the same for yellows           repeats   different words / words said
    format    share of turns that are exactly one bracketed guess

It is paid when the game ends. Main failure mode: partial credit that looks like skill; `info["won"]` and
`info["invalid"]` are therefore counted from the game itself.

Source: the game is Josh Wardle's (2021); textarena (arXiv 2504.11442); TRL's Wordle notebook for the parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from nurture.environments.protocol import Observation, StepResult, weigh
from nurture.errors import NurtureError
from nurture.recipe import Section
from nurture.types import Message
from nurture.world import wordle as words
from nurture.world.grading import without_thoughts
from nurture.world.split import pick, random_for

PARTS = ("correct", "greens", "yellows", "repeats", "format")
TOLERATED = 1
"""Invalid moves in a row that do not end the game."""

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


class WordleConfig(Section):
    """What is played, and what is paid for it."""

    answers: str | None = None
    """File of secret words, one a line; by default the world's. Any one length."""
    allowed: str | None = None
    """File of further words that may be guessed; by default the world's, or the answers alone."""
    guesses: PositiveInt = words.GUESSES
    """Valid guesses in a game."""
    hard_mode: bool = False
    """Every hint must be used: greens stay, yellow letters appear again."""
    reward: Literal["binary", "textarena"] | dict[str, float] = "binary"
    """binary, textarena, or weights of the parts correct, greens, yellows, repeats, format."""
    style: Literal["spelled", "textarena"] = "spelled"
    """How the game talks: letters spelled for small models, or as textarena does, with the rules explained."""


class Wordle:
    """One game.

    Attributes:
        history: (guess, marks) of every valid guess.
        secret: the word; set by `reset`.
    """

    def __init__(self, config: WordleConfig | None = None) -> None:
        """Read the word lists.

        Raises:
            NurtureError: a list is missing, empty or of mixed lengths, or a weight names no part.
        """
        self.config = config or WordleConfig()
        self.answers, self.allowed = word_lists(self.config)
        self._known = frozenset(self.allowed)
        self.letters = len(self.answers[0])
        if isinstance(self.config.reward, dict):
            weigh(dict.fromkeys(PARTS, 0.0), self.config.reward)
        self.over = True

    def reset(self, task: Any = None, seed: int = 0) -> Observation:
        """Start a game.

        Args:
            task: a task or row whose `answer` is the secret, the secret itself, or None: drawn from the answers.
            seed: decides the secret where the task does not.

        Raises:
            NurtureError: the secret has another length than the answers.
        """
        answer = task if isinstance(task, str) else getattr(task, "answer", None)
        self.secret = answer or pick(random_for("wordle", seed), self.answers)
        if len(self.secret) != self.letters:
            raise NurtureError(
                f"Wordle: '{self.secret}' does not have {self.letters} letters as the answers do"
            )
        self.history: list[tuple[str, str]] = []
        self._said: list[str] = []
        self._turns = self._well_formed = self._invalid = self._invalid_in_a_row = 0
        self.over = False
        return self._opening(task)

    def step(self, action: str) -> StepResult:
        """Take a turn: text that holds a guess in square brackets, or nothing but a guess."""
        if self.over:
            raise NurtureError("Wordle: the game is over (or was never begun); call reset first")
        reply = without_thoughts(action)
        guess = guess_in(reply)
        self._turns += 1
        self._well_formed += len(_BRACKETS.findall(reply)) == 1 and _BRACKETS.fullmatch(reply) is not None
        problem = self._problem(guess)
        if guess:
            self._said.append(guess)
        if problem is None:
            assert guess is not None
            self.history.append((guess, words.feedback(guess, self.secret)))
            self._invalid_in_a_row = 0
        else:
            self._invalid += 1
            self._invalid_in_a_row += 1
        used_up = len(self.history) == self.config.guesses
        self.over = self.won or used_up or self._invalid_in_a_row > TOLERATED
        parts = self._parts()
        return StepResult(
            Observation.of(self._answer_to(problem)),
            reward=self._reward(parts) if self.over else 0.0,
            done=self.over,
            parts=parts,
            info={"won": self.won, "invalid": self._invalid, "guesses": len(self.history)}
            | ({"secret": self.secret} if self.over else {}),
        )

    def forgive(self) -> None:
        """Forget the invalid moves in a row: the next one is tolerated again."""
        self._invalid_in_a_row = 0

    @property
    def stumbled(self) -> bool:
        """Whether the last move was invalid."""
        return self._invalid_in_a_row > 0

    def give_up(self) -> None:
        """End the game."""
        self.over = True

    @property
    def won(self) -> bool:
        """Whether the secret was guessed."""
        return bool(self.history) and self.history[-1][0] == self.secret

    def _problem(self, guess: str | None) -> str | None:
        """Say what is wrong with a guess, None if nothing."""
        if guess is None:
            return f"A guess looks like {self._written(self.answers[0])}"
        if len(guess) != self.letters:
            return f"The word has {self.letters} letters"
        if guess in (word for word, _ in self.history):
            return "You said that word before"
        if guess not in self._known:
            return "That is not a word I know"
        if self.config.hard_mode and not uses_hints(guess, self.history):
            return "You must use every hint"
        return None

    def _parts(self) -> dict[str, float]:
        marks = self.history[-1][1] if self.history else ""
        return {
            "correct": float(self.won),
            "greens": marks.count("G") / self.letters,
            "yellows": marks.count("Y") / self.letters,
            "repeats": len(set(self._said)) / max(len(self._said), 1),
            "format": self._well_formed / self._turns,
        }

    def _reward(self, parts: Mapping[str, float]) -> float:
        if isinstance(self.config.reward, dict):
            return weigh(parts, self.config.reward)
        if self.config.reward == "textarena" and not self.won:
            return parts["greens"] + 0.5 * parts["yellows"]
        return parts["correct"]

    # ---- what the game says --------------------------------------------------------------------------------------

    def _written(self, word: str) -> str:
        return words.bracketed(word) if self.config.style == "spelled" else f"[{word}]"

    def _opening(self, task: Any) -> Observation:
        if self.config.style == "textarena":
            return Observation.of(_RULES.format(n=self.letters, k=self.config.guesses))
        asked = _until_reply(getattr(task, "messages", None) or ())
        return Observation(asked) if asked else Observation.of(words.OPENINGS[0])

    def _answer_to(self, problem: str | None) -> str:
        """Return the game's turn after a guess or an invalid move."""
        spelled = self.config.style == "spelled"
        if self.over:
            return f"The word was {self._written(self.secret)}. You {'won' if self.won else 'lost'}."
        if problem is not None:
            return f"{problem}. Guess again." if spelled else _INVALID.format(problem)
        if spelled:
            return words.spelled_feedback(self.history)
        guess, marks = self.history[-1]
        left = self.config.guesses - len(self.history)
        shown = f"{words.spaced(guess)}\n{' '.join(marks)}"
        return (
            f"You submitted [{guess}].\nFeedback:\n{shown}\nYou have {left} guess{'es' * (left != 1)} left."
        )


_RULES = """\
This is Wordle. I have chosen a secret English word of {n} letters, and you have {k} guesses to find it.
Write each guess in square brackets, such as [crane]. It must be a word of {n} letters that you have not tried yet.
After a guess I show a mark for each of its letters:
G (green): the letter is right and in the right place.
Y (yellow): the letter is in the word, but in another place.
X: the letter is not in the word, or not as often as you used it.
What is your first guess?"""

_INVALID = "You attempted an invalid move. Reason: {}. Please resubmit a valid move."
"""TRL's scripts look for the first sentence."""


MARKS = re.compile(r"\( (?:(?:-|[^\W\d_]) )+\)|\b[GYX](?: [GYX])+\b")
"""Marks as `Wordle` writes them after a valid guess, spelled or in textarena's style: a replay looks for them."""


def guess_in(reply: str) -> str | None:
    """Return the guess in a reply: the first thing in square brackets, or else the whole reply; None if it is no word.

    Letters may be spelled: `[crane]`, `[ C R A N E ]` and `Crane` are the same guess.
    """
    found = _BRACKETS.search(reply)
    text = (found[1] if found else reply).strip()
    spelled = re.fullmatch(r"[^\W\d_](?:\s+[^\W\d_])*", text)
    word = "".join(text.split()) if spelled else text
    return word.lower() if word.isalpha() else None


def uses_hints(guess: str, history: Sequence[tuple[str, str]]) -> bool:
    """Return whether a guess keeps every green letter in its place and has every yellow letter (hard mode)."""
    for word, marks in history:
        if any(mark == "G" and guess[place] != word[place] for place, mark in enumerate(marks)):
            return False
        shown = [letter for letter, mark in zip(word, marks, strict=True) if mark != "X"]
        if any(guess.count(letter) < shown.count(letter) for letter in shown):
            return False
    return True


def word_lists(config: WordleConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (secret words, words that may be guessed); the latter hold the former.

    Raises:
        NurtureError: a file is missing or empty, or a line is not a word of the length of the others.
    """
    if config.answers is None and config.allowed is None:
        return words.ANSWERS, words.ALLOWED
    answers = _read_words(config.answers) if config.answers else words.ANSWERS
    more = _read_words(config.allowed, len(answers[0])) if config.allowed else ()
    return answers, tuple(sorted({*answers, *more}))


def _read_words(file: str, length: int | None = None) -> tuple[str, ...]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise NurtureError(f"{file}: there is no such word list; give a file with one word a line")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [line.partition("\t")[0].strip().lower() for line in lines]  # a count may follow the word
    length = length or next((len(word) for word in found if word), 0)
    for number, word in enumerate(found, 1):
        if word and (len(word) != length or not word.isalpha()):
            raise NurtureError(f"{file}:{number}: '{word}' is not a word of {length} letters like the others")
    if not any(found):
        raise NurtureError(f"{file}: the word list is empty; one word a line is needed")
    return tuple(dict.fromkeys(word for word in found if word))


def _until_reply(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the turns before the first one of the assistant."""
    end = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return tuple(messages[:end])
