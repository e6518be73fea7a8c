"""How well a policy plays Wordle, beside two players that know the word list.

`wordle_win` is the share of games won, counted by the game itself, on secrets that no training game looked for.
`wordle_solver` (most expected information) is close to what is possible; `wordle_random` names any word that fits.
The policy samples at the temperature it was trained at and plays every secret several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from nurture.environments.wordle import Wordle, WordleConfig
from nurture.environments.wordle_players import EntropySolver, RandomConsistent, play_out
from nurture.evals.measure import Measure, rate
from nurture.inference.sampling import SamplingParams
from nurture.rollout import Rollout, Sampler, collect
from nurture.tokenizer import Tokenizer
from nurture.world.wordle import secrets

GAMES = 8
"""Games a secret."""


def wordle_card(
    sampler: Sampler,
    tokenizer: Tokenizer,
    *,
    config: WordleConfig | None = None,
    words: Sequence[str] | None = None,
    games: int = GAMES,
    max_tokens: int = 24,
    temperature: float = 1.0,
    max_length: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Measure], list[Rollout]]:
    """Play every secret `games` times.

    Args:
        config: rules and lists; default: the world's.
        words: the secrets; default: the world's held-out ones.
        max_tokens: of one turn.
        max_length: of a game, in tokens.

    Returns:
        `wordle_win`, `wordle_solver`, `wordle_random`, `wordle_invalid` (share of moves that were), and the games.
    """
    config = config or WordleConfig()
    words = tuple(words or secrets("heldout"))
    played = collect(
        sampler,
        tokenizer,
        lambda: Wordle(config),
        words,
        params=SamplingParams(max_tokens=max_tokens, temperature=temperature),
        group_size=games,
        max_turns=2 * config.guesses,
        max_length=max_length,
        seed=seed,
    )
    moves = sum(rollout.turns for rollout in played)
    invalid = sum(int(rollout.info.get("invalid", 0)) + (rollout.finished == "length") for rollout in played)
    measures = {
        "wordle_win": rate([bool(rollout.info.get("won")) for rollout in played]),
        "wordle_invalid": Measure(invalid / max(moves, 1), moves),
    }
    return measures | players(config.model_dump_json(), words, games), played


@lru_cache(maxsize=8)
def players(config_json: str, words: tuple[str, ...], games: int = GAMES) -> dict[str, Measure]:
    """Return `wordle_solver` and `wordle_random` on the same secrets; the solver plays each once, having no chance."""
    game = Wordle(WordleConfig.model_validate_json(config_json))
    solver, won_by_chance = EntropySolver(game), []
    won_by_solver = [_plays(game, solver, word) for word in words]
    for number in range(games):
        player = RandomConsistent(game, seed=number)
        won_by_chance += [_plays(game, player, word) for word in words]
    return {"wordle_solver": rate(won_by_solver), "wordle_random": rate(won_by_chance)}


def _plays(game: Wordle, player: EntropySolver | RandomConsistent, word: str) -> bool:
    game.reset(word)
    return play_out(game, player)
