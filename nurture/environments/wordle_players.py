"""Two players who know the word list: what a policy is measured against.

`RandomConsistent` names any word that fits all feedback: what careful play without thought is worth. `EntropySolver`
takes the guess whose feedback tells most, -sum p log2 p over the marks the remaining words would give, counted over all
of them: close to the upper bound (the best strategy that is known wins every game of the newspaper's list). Both are
functions of the game's history alone.

Source: 3Blue1Brown's information view of the game (2022); Bertsimas and Paskov, "An exact and interpretable solution to
Wordle" (2022) for the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nurture.environments.wordle import Wordle, uses_hints
from nurture.world.split import pick, random_for

_CHUNK_PAIRS = 2_000_000
"""Pairs of guess and secret whose marks are compared at once: bounds memory."""

History = Sequence[tuple[str, str]]
"""(guess, marks) of the guesses so far."""


class Player(Protocol):
    """Names the next word from what is known."""

    def __call__(self, history: History) -> str: ...


def play_out(game: Wordle, player: Player) -> bool:
    """Let a player finish a game that was just reset; return whether it was won."""
    while not game.step(f"[{player(game.history)}]").done:
        pass
    return game.won


def mark_codes(guesses: np.ndarray, secrets: np.ndarray) -> np.ndarray:
    """Return the marks of every guess against every secret as numbers in base 3 (X 0, Y 1, G 2).

    Args:
        guesses: (g, n) letters as integers.
        secrets: (s, n).

    Returns:
        (g, s) int64; the first letter is the most significant digit.
    """
    codes = np.zeros((len(guesses), len(secrets)), dtype=np.int64)
    green = guesses[:, None, :] == secrets[None, :, :]
    for place in range(guesses.shape[1]):
        letter = guesses[:, None, place]
        # Yellow while the secret has more unclaimed letters of this kind than earlier letters of the guess asked for.
        available = ((secrets[None] == letter[..., None]) & ~green).sum(-1)
        asked = sum(((guesses[:, None, j] == letter) & ~green[:, :, j] for j in range(place)), np.int64(0))
        yellow = asked < available
        codes = codes * 3 + np.where(green[:, :, place], 2, yellow)
    return codes


class _ListPlayer:
    """Keeps word lists as arrays and knows which answers are still possible."""

    def __init__(self, game: Wordle) -> None:
        self.answers, self.allowed = game.answers, game.allowed
        self._guesses, self._hard_mode = game.config.guesses, game.config.hard_mode
        self._answer_letters, self._allowed_letters = _letters(game.answers), _letters(game.allowed)

    def candidates(self, history: History) -> np.ndarray:
        """Return indices of the answers that fit the history."""
        possible = np.arange(len(self.answers))
        for guess, marks in history:
            shown = int(marks.translate(str.maketrans("XYG", "012")), 3)
            codes = mark_codes(_letters([guess]), self._answer_letters[possible])[0]
            possible = possible[codes == shown]
        return possible


class RandomConsistent(_ListPlayer):
    """Names any answer that fits; the history and the seed decide which."""

    def __init__(self, game: Wordle, seed: int = 0) -> None:
        super().__init__(game)
        self._seed = seed

    def __call__(self, history: History) -> str:
        """Return the next guess."""
        return self.answers[pick(random_for(self._seed, *history), self.candidates(history).tolist())]


class EntropySolver(_ListPlayer):
    """Names the word that is expected to tell most; among equals one that may be the secret."""

    def __init__(self, game: Wordle) -> None:
        super().__init__(game)
        self._known: dict[tuple[tuple[str, str], ...], str] = {}

    def __call__(self, history: History) -> str:
        """Return the next guess."""
        key = tuple(history)
        if key not in self._known:
            self._known[key] = self._best(key)
        return self._known[key]

    def _best(self, history: History) -> str:
        possible = self.candidates(history)
        fitting = {self.answers[index] for index in possible}
        if len(possible) <= 2 or len(history) == self._guesses - 1:
            return self.answers[possible[0]]
        words = [word for word in self.allowed if not self._hard_mode or uses_hints(word, history)]
        letters = self._allowed_letters if len(words) == len(self.allowed) else _letters(words)
        bits = expected_bits(letters, self._answer_letters[possible])
        order = sorted(
            range(len(words)), key=lambda i: (-round(float(bits[i]), 9), words[i] not in fitting, words[i])
        )
        return words[order[0]]


def expected_bits(guesses: np.ndarray, secrets: np.ndarray) -> np.ndarray:
    """Return the entropy in bits of the marks of each guess (g, n) over equally likely secrets (s, n): (g,)."""
    kinds = 3 ** guesses.shape[1]
    bits = np.empty(len(guesses))
    rows = max(1, _CHUNK_PAIRS // len(secrets))
    for start in range(0, len(guesses), rows):
        codes = mark_codes(guesses[start : start + rows], secrets)
        codes += np.arange(len(codes))[:, None] * kinds
        counts = np.bincount(codes.ravel(), minlength=len(codes) * kinds).reshape(len(codes), kinds)
        share = counts / len(secrets)
        bits[start : start + rows] = -(share * np.log2(np.where(counts, share, 1.0))).sum(1)
    return bits


def _letters(words: Sequence[str]) -> np.ndarray:
    return np.array([[ord(letter) for letter in word] for word in words], dtype=np.int32)
