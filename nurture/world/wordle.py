"""Wordle in the world: its words, the feedback rule, games to imitate, and texts that show how the game looks.

The game itself is an environment (environments/wordle.py); here is what a policy of a million parameters needs to learn
it. Words are few (136 answers), and guess and feedback are spelled under one another, every sign a token of its own:

    [ C R A N E ]
    ( - r - - E )        E right place, r elsewhere in the word, - absent

So what is known of a place is one token, always equally far from the same place of the next guess: keeping what is
green is copying over a fixed distance, which attention learns first. Who names words
that fit the greens of the last feedback alone wins 62 % of games, with the yellows 95 %, with neither 5 %.

Secrets are held out by rule on the word. A held-out word may be *guessed* in train games, for it is a word like any
other, but it is never what was looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from nurture.world.split import pick, split_of

GUESSES = 6
"""Guesses in a game."""

ANSWERS = tuple(
    "apple beach bread brick bring brown chair child class clean clear climb clock cloud coast cover crane cream dance "
    "dream dress drink drive earth eight fence field fight final flame floor flour fruit ghost glass grain grape grass "
    "great green group guest happy heart honey horse hotel house inner juice knife large laugh lemon light limit "
    "lucky lunch magic maple march metal money month mouse music night north novel ocean olive onion order paint panel "
    "paper party peach pearl phone piano pilot place plain plane plant plate point pride queen quick quiet radio river "
    "robin round salad scale sheep shell shirt shore sleep small smile snake south space spoon sport stage stone storm "
    "story sugar sweet table teach thing tiger toast tower train uncle under value video voice water whale wheat wheel "
    "white woman world young".split()
)
EXTRA = tuple(
    "about above actor after again agree alarm alive allow alone angle angry arise asked audio aside badge baker basic "
    "basin begin being below bench berry birth black blade blank blend block bloom board boost bored bound brain brave "
    "break brief broad broom brush build bunch cabin cable candy carry catch cause chain chalk charm chase cheap check "
    "cheek chess chest chief civil claim click cliff coach coral count court crash crazy crisp cross crowd crown curve "
    "daily dairy delay depth dirty doubt dozen draft drama drawn eager early elbow empty enemy enjoy enter equal error "
    "event every exact extra faith false fault favor fever fiber flash fleet float flock fluid focus force forty forum "
    "found frame fresh front frost funny giant given globe glove goose grade grand grant grave grill guard guess guide "
    "habit harsh heavy hello hobby human humor ideal image index input issue ivory jelly joint judge knock known label "
    "later layer learn least leave legal level lodge logic loose lower loyal major match maybe mayor medal mercy merit "
    "minor model moral motor mount mouth movie nerve never noble noise nurse occur offer often opera orbit other outer "
    "owner paste patch pause peace petal photo pitch pizza press price prime print prize proof proud pupil quart "
    "quite raise ranch range rapid ratio reach ready reply right rigid rival roast rough route royal rural saint sauce "
    "scare scene scent score sense serve seven shade shake shape share sharp shelf shine short shout sight skill slate "
    "slice slide slope smart smoke solid solve sound spare speak speed spell spend spice stair stare start state steam "
    "steel stick still stock stood store strip study style swift sword taken taste teeth thank their theme there thick "
    "third those three throw tight title today token tooth topic torch total touch tough trace track trade trail treat "
    "trend trial tribe trick truck trust truth twice union until upper urban usual visit vital waste watch weary which "
    "while whole worth wrist write wrong yield zebra".split()
)
ALLOWED = tuple(sorted({*ANSWERS, *EXTRA}))
"""Words that may be guessed."""


def secrets(split: str) -> tuple[str, ...]:
    """Return the answers that are looked for in games of a split."""
    return tuple(word for word in ANSWERS if split_of("wordle", word) == split)


def feedback(guess: str, secret: str) -> str:
    """Return one letter per position: `G` right place, `Y` elsewhere in the word, `X` absent.

    Greens are given first and use their letter up; then yellows from left to right, while the secret has a letter of
    that kind left (textarena's Wordle-v0, and the newspaper's game).
    """
    marks = ["G" if a == b else "X" for a, b in zip(guess, secret, strict=True)]
    left = [b for a, b in zip(guess, secret, strict=True) if a != b]
    for i, letter in enumerate(guess):
        if marks[i] == "X" and letter in left:
            marks[i] = "Y"
            left.remove(letter)
    return "".join(marks)


@lru_cache(maxsize=50_000)
def _cached_feedback(guess: str, secret: str) -> str:
    return feedback(guess, secret)


def consistent(words: Sequence[str], guesses: Sequence[str], secret: str) -> list[str]:
    """Return the words that could still be the secret after the feedback on `guesses`."""
    shown = [(guess, _cached_feedback(guess, secret)) for guess in guesses]
    return [
        word
        for word in words
        if len(word) == len(secret) and all(_cached_feedback(guess, word) == marks for guess, marks in shown)
    ]


def play(rng: Random, secret: str) -> list[str]:
    """Return the guesses of a player who only names answers that fit all feedback so far (at most six)."""
    candidates, guesses = list(ANSWERS), list[str]()
    while len(guesses) < GUESSES and guesses[-1:] != [secret]:
        guesses.append(pick(rng, candidates))
        candidates = consistent(candidates, guesses[-1:], secret)
    return guesses


# ---- how it is written ------------------------------------------------------------------------------------------

OPENINGS = (
    "Let us play Wordle. Guess my word of five letters.",
    "I think of a word with five letters. Can you guess it?",
    "A game of Wordle: find the word of five letters.",
)


def spaced(word: str) -> str:
    """Return `C R A N E`."""
    return " ".join(word.upper())


def bracketed(word: str) -> str:
    """Return `[ C R A N E ]`, a guess."""
    return f"[ {spaced(word)} ]"


def spelled_feedback(history: Sequence[tuple[str, str]]) -> str:
    """Return what is known of each place after (guess, marks) so far, `( - r - - E )` after `crane` with `XYXXG`.

    A large letter is in its place, a small one in the word but not here. What an earlier guess found stays.
    """
    shown = ["-"] * len(history[-1][0])
    for guess, marks in history:
        for place, (letter, mark) in enumerate(zip(guess, marks, strict=True)):
            if mark == "G":
                shown[place] = letter.upper()
    for guess, marks in reversed(history):
        found = [letter for letter, mark in zip(guess, marks, strict=True) if mark != "X"]
        for place, (letter, mark) in enumerate(zip(guess, marks, strict=True)):
            told = [sign.lower() for sign in shown].count(letter.lower())
            if mark == "Y" and shown[place] == "-" and told < found.count(letter):
                shown[place] = letter.lower()
    return f"( {' '.join(shown)} )"


def knowledge(guesses: Sequence[str], secret: str) -> str:
    """Return what the feedback on `guesses` says, in one line: places known, letters in the word, letters not in it."""
    places = ["_"] * len(secret)
    present, absent = dict[str, None](), dict[str, None]()
    for guess in guesses:
        for place, (letter, mark) in enumerate(zip(guess.upper(), feedback(guess, secret), strict=True)):
            if mark == "G":
                places[place] = letter
            (absent if mark == "X" else present)[letter] = None
    elsewhere = [letter for letter in present if letter not in places]
    gone = [letter for letter in absent if letter not in present]
    return f"Known: {' '.join(places)}. In it: {' '.join(elsewhere)}. Not in it: {' '.join(gone)}."


def draw_game(rng: Random, split: str) -> tuple[str, str, list[str]]:
    """Return (secret, opening, guesses) of a played game."""
    secret = pick(rng, secrets(split))
    return secret, pick(rng, OPENINGS), play(rng, secret)


def document(rng: Random, split: str) -> str:
    """Return a played game, or a spelling lesson."""
    if rng.random() < 0.15:
        words = [pick(rng, ANSWERS if rng.random() < 0.7 else ALLOWED) for _ in range(8)]
        return " ".join(f"The word {word} is spelled {spaced(word)}." for word in words)
    secret, opening, guesses = draw_game(rng, split)
    lines, history = [opening], list[tuple[str, str]]()
    for guess in guesses:
        history.append((guess, _cached_feedback(guess, secret)))
        lines += [bracketed(guess), spelled_feedback(history)]
    lines[-1] = f"The word was {spaced(secret)}. You {'won' if guesses[-1] == secret else 'lost'}."
    return "\n".join(lines)
