"""Wordle against the model: the same secret, one guess each, and the words the model was thinking of.

The rules are the environment's (environments/wordle.py), for both players; the model plays as in a rollout, from the
conversation of its own game. What it was thinking of is measured, not asked: `likely_words` walks the letters of the
words that may be guessed through the model, keeps the likeliest beginnings, and gives the exact probability of each
word it reports.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nurture.environments.protocol import StepResult
from nurture.environments.wordle import MARKS, Wordle, guess_in
from nurture.errors import NurtureError
from nurture.inference.chat import ChatModel
from nurture.types import Message
from nurture.world.grading import without_thoughts
from nurture.world.wordle import GUESSES, bracketed, feedback

_GAMES = 200
"""Games kept; the oldest is forgotten."""
_BEAM = 24
"""Beginnings of words that are followed."""


@dataclass
class Game:
    """One secret, two players.

    Attributes:
        conversation: the model's game so far, as it reads it.
    """

    person: Wordle
    model: Wordle
    conversation: list[Message] = field(default_factory=list)


class Table:
    """The games under way."""

    def __init__(self) -> None:
        self._games: dict[str, Game] = {}

    def begin(self, seed: int | None) -> dict[str, Any]:
        """Start a game; the same seed gives the same secret."""
        seed = secrets.randbits(32) if seed is None else seed
        game = Game(Wordle(), Wordle())
        game.person.reset(None, seed)
        game.conversation += game.model.reset(None, seed).messages
        name = secrets.token_urlsafe(12)
        self._games[name] = game
        while len(self._games) > _GAMES:
            del self._games[next(iter(self._games))]
        return {
            "game": name,
            "seed": seed,
            "letters": game.person.letters,
            "guesses": game.person.config.guesses,
        }

    def find(self, name: str) -> Game:
        """Return a game.

        Raises:
            NurtureError: it is over or was forgotten.
        """
        if name not in self._games:
            raise NurtureError("this game is not on the table any more; begin a new one")
        return self._games[name]


def person_turn(game: Game, guess: str) -> dict[str, Any]:
    """Take the person's guess; what is no valid guess costs nothing and is explained."""
    game.person.forgive()  # people may mistype as often as they like
    return _outcome(game.person, game.person.step(f"[{guess.strip()}]"))


def model_turn(game: Game, reply: str) -> dict[str, Any]:
    """Take the model's reply as its guess."""
    result = game.model.step(reply)
    game.conversation.append({"role": "assistant", "content": reply})
    game.conversation += result.observation.messages
    outcome = _outcome(game.model, result)
    if not game.person.over:  # the person is still looking for it
        outcome |= {"secret": None, "says": ""}
    return {"reply": reply, "guess": guess_in(reply)} | outcome


def replay(messages: Sequence[Message]) -> dict[str, Any]:
    """Return an episode turn by turn; of a finished Wordle game also the secret and the marks of every valid guess."""
    said = [str(message.get("content") or "") for message in messages]
    told = re.search(r"The word was \[([^\]]*)\]", said[-1])
    secret = guess_in(f"[{told[1]}]") if told else None
    turns: list[dict[str, Any]] = []
    valid = 0
    for number, (message, text) in enumerate(zip(messages, said, strict=True)):
        turn: dict[str, Any] = {"role": message["role"], "text": text}
        guess = guess_in(without_thoughts(text)) if secret and message["role"] == "assistant" else None
        if secret and guess and len(guess) == len(secret):
            is_last = number + 2 == len(said)  # what follows it tells the word, not the marks
            if guess == secret or (valid == GUESSES - 1 if is_last else MARKS.search(said[number + 1])):
                turn |= {"guess": guess, "marks": feedback(guess, secret)}
                valid += 1
        turns.append(turn)
    return {"turns": turns, "secret": secret}


def model_gives_up(game: Game) -> dict[str, Any]:
    """End the model's game: its context is full."""
    game.model.give_up()
    return {
        "reply": "",
        "guess": None,
        "history": [{"word": word, "marks": marks} for word, marks in game.model.history],
        "says": "",
        "over": True,
        "won": False,
        "secret": None,
    }


def _outcome(board: Wordle, result: StepResult) -> dict[str, Any]:
    return {
        "history": [{"word": word, "marks": marks} for word, marks in board.history],
        "says": result.observation.text,
        "over": result.done,
        "won": board.won,
        "secret": result.info.get("secret"),
    }


@torch.inference_mode()
def likely_words(
    chat: ChatModel, conversation: Sequence[Message], words: Sequence[str], count: int
) -> list[Any]:
    """Return the likeliest of `words` as the model's next reply, with the probability of each.

    The words are found by a beam search over their spellings, the probabilities are exact.
    """
    tokenizer, decoder = chat.tokenizer, chat.engine.decoder
    prompt = tokenizer.encode_prompt(conversation)
    if len(prompt) + 24 >= chat.model.config.max_position:
        return []
    spelled = {(*tokenizer.encode(bracketed(word)), tokenizer.end_of_turn_id): word for word in words}
    following: dict[tuple[int, ...], set[int]] = {}
    for tokens in spelled:
        for length in range(len(tokens)):
            following.setdefault(tokens[:length], set()).add(tokens[length])
    cache = decoder.new_cache(1)
    logprobs = decoder.forward(torch.tensor([prompt], device=decoder.device), cache).float().log_softmax(-1)
    beam: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    found: list[tuple[str, float]] = []
    while beam:
        longer = [
            (score + float(logprobs[row, token]), (*tokens, token), row)
            for row, (tokens, score) in enumerate(beam)
            for token in following[tokens]
        ]
        found += [(spelled[tokens], score) for score, tokens, _ in longer if tokens in spelled]
        kept = sorted((item for item in longer if item[1] not in spelled), reverse=True)[:_BEAM]
        if not kept:
            break
        rows = decoder.new_cache(len(kept), rows=0)
        rows.append(cache, [row for _, _, row in kept])
        cache, beam = rows, [(tokens, score) for score, tokens, _ in kept]
        last = torch.tensor([[tokens[-1]] for tokens, _ in beam], device=decoder.device)
        logprobs = decoder.forward(last, cache).float().log_softmax(-1)
    best = sorted(found, key=lambda pair: -pair[1])[:count]
    return [{"word": word, "probability": math.exp(score)} for word, score in best]
