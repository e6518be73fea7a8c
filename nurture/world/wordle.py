"""The words of the Wordle game and texts that show how its feedback looks.

The game itself is an environment; here are only its words, the feedback rule (greens first, then letters are used up:
textarena Wordle-v0) and documents, so that a policy does not start from nothing.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

from nurture.world.split import pick

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


def feedback(guess: str, secret: str) -> str:
    """Return one letter per position: `G` right place, `Y` elsewhere in the word, `X` absent."""
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


def play(rng: Random, secret: str) -> list[str]:
    """Return the guesses of a player who only names words that fit all feedback so far (at most six)."""
    candidates, guesses = list(ANSWERS), list[str]()
    while len(guesses) < 6:
        guess = pick(rng, candidates)
        guesses.append(guess)
        if guess == secret:
            break
        shown = _cached_feedback(guess, secret)
        candidates = [word for word in candidates if word != guess and _cached_feedback(guess, word) == shown]
    return guesses


def spaced(word: str) -> str:
    """Return `C R A N E`."""
    return " ".join(word.upper())


def document(rng: Random) -> str:
    """Return a played game in the form the environment shows it, or a spelling lesson."""
    if rng.random() < 0.3:
        words = [pick(rng, ANSWERS if rng.random() < 0.7 else ALLOWED) for _ in range(8)]
        return " ".join(f"The word {word} is spelled {spaced(word)}." for word in words)
    secret = pick(rng, ANSWERS)
    lines = ["A game of Wordle. The secret word has five letters."]
    guesses = play(rng, secret)
    for used, guess in enumerate(guesses, 1):
        lines += [f"Guess: [{guess}]", "Feedback:", spaced(guess), spaced(_cached_feedback(guess, secret))]
        lines.append(f"You have {6 - used} guesses left.")
    lines[-1] = f"The secret word was {secret}." + (" You won!" if guesses[-1] == secret else " You lost.")
    return "\n".join(lines)
