"""The Wordle card counts what the games say, and ranks the two players as they should be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nurture.environments.wordle import WordleConfig
from nurture.evals.wordle import players, wordle_card
from nurture.inference.engine import Completion, Episode, Respond
from nurture.tokenizer import Tokenizer
from nurture.world.wordle import bracketed, secrets


class Scripted:
    """A sampler that says the same words in every game."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        self.turns = [[*tokenizer.encode(bracketed(word)), tokenizer.end_of_turn_id] for word in words]

    def converse(
        self, prompts: Sequence[Sequence[int]], respond: Respond, *more: object, **settings: object
    ) -> list[Episode]:
        return [self._one(index, respond) for index in range(len(prompts))]

    def _one(self, index: int, respond: Respond) -> Episode:
        episode = Episode()
        for tokens in self.turns:
            turn = Completion(tokens, [-1.0] * len(tokens), "stop")
            episode.turns.append(turn)
            answer = respond([(index, turn)])[0]
            if answer is None:
                break
            episode.answers.append(list(answer))
        return episode


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["[ C R A N E ] ( - o + ) user assistant"] * 4, 280)


def test_wins_and_invalid_moves_are_the_games_own(tokenizer: Tokenizer) -> None:
    """Against crane: zzzzz is invalid, dream is wrong, crane wins; against bread all six guesses are used up."""
    said = ["zzzzz", "dream", "crane", "brick", "bring", "brown", "chair"]
    sampler = Scripted(tokenizer, said)
    measures, games = wordle_card(sampler, tokenizer, words=["crane", "bread"], games=2)
    assert (measures["wordle_win"].value, measures["wordle_win"].n) == (0.5, 4)
    assert measures["wordle_invalid"].value == pytest.approx(4 / (2 * 3 + 2 * 7))
    assert [game.info["secret"] for game in games] == ["crane", "crane", "bread", "bread"]


def test_the_solver_is_at_least_as_good_as_chance() -> None:
    measures = players(WordleConfig(guesses=3).model_dump_json(), secrets("heldout")[:10], 3)
    assert measures["wordle_solver"].value >= measures["wordle_random"].value > 0.3
    assert (measures["wordle_solver"].n, measures["wordle_random"].n) == (10, 30)
