"""Wordle's rules, rewards and texts, the two players, and what the environment refuses."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest

from nurture.environments.protocol import Environment, step_all, weigh
from nurture.environments.wordle import Wordle, WordleConfig, guess_in, uses_hints
from nurture.environments.wordle_players import (
    EntropySolver,
    RandomConsistent,
    expected_bits,
    mark_codes,
    play_out,
)
from nurture.errors import NurtureError
from nurture.world import World
from nurture.world.wordle import ANSWERS, feedback


def game(secret: str = "crane", **settings: object) -> Wordle:
    made = Wordle(WordleConfig(**settings))  # type: ignore[arg-type]
    made.reset(secret, seed=0)
    return made


def test_it_is_an_environment() -> None:
    assert isinstance(Wordle(), Environment)


def test_a_won_game() -> None:
    wordle = game()
    first = wordle.step("[ D R E A M ]")
    assert first.observation.text == "( - R e a - )"
    assert (first.reward, first.done) == (0.0, False)
    last = wordle.step("[crane]")
    assert (last.reward, last.done) == (1.0, True)
    assert last.parts == {"correct": 1.0, "greens": 1.0, "yellows": 0.0, "repeats": 1.0, "format": 1.0}
    assert last.info == {"won": True, "invalid": 0, "guesses": 2, "secret": "crane"}
    assert last.observation.text == "The word was [ C R A N E ]. You won."
    with pytest.raises(NurtureError, match="the game is over"):
        wordle.step("[crane]")


def test_textarena_feedback_text() -> None:
    wordle = game("crane", style="textarena")
    text = wordle.step("I try [grain], then.").observation.text
    assert text == "You submitted [grain].\nFeedback:\nG R A I N\nX G G X Y\nYou have 5 guesses left."
    for word in ("brick", "bring", "brown"):
        wordle.step(f"[{word}]")
    assert wordle.step("[bread]").observation.text.endswith("You have 1 guess left.")


@pytest.mark.parametrize(
    ("reward", "paid"),
    [
        ("binary", 0.0),
        ("textarena", (2 + 0.5 * 1) / 5),
        ({"correct": 1.0, "greens": 0.5, "repeats": 0.1, "format": 0.2}, 0.5 * 2 / 5 + 0.1 + 0.2 * 5 / 6),
    ],
)
def test_what_a_lost_game_pays(reward: object, paid: float) -> None:
    """The last guess counts, not the best one."""
    wordle = game("crane", reward=reward)
    words = ["dance", "cream", "drink", "climb", "clear"]
    results = [wordle.step(f"[{word}]") for word in words] + [wordle.step("So: [grain]")]
    assert [result.reward for result in results[:-1]] == [0.0] * 5
    assert feedback("grain", "crane") == "XGGXY"
    assert results[-1].reward == pytest.approx(paid)
    assert results[-1].done
    assert not results[-1].info["won"]


def test_one_invalid_move_is_tolerated_and_two_in_a_row_end_it() -> None:
    wordle = game("crane", reward="textarena")
    assert wordle.step("[cream]").reward == 0.0
    for action, reason, then in (("[xxxxx]", "not a word", "[dance]"), ("[cream]", "said that", "[grain]")):
        result = wordle.step(action)
        assert not result.done
        assert result.info["guesses"] == len(wordle.history)
        assert reason in result.observation.text
        wordle.step(then)
    assert not wordle.step("nothing").done
    fatal = wordle.step("[cran]")
    assert fatal.done
    assert fatal.info | {"secret": "crane"} == {"won": False, "invalid": 4, "guesses": 3, "secret": "crane"}
    assert fatal.reward == pytest.approx((2 + 0.5) / 5)
    assert fatal.parts["repeats"] == pytest.approx(6 / 7)  # cream twice
    assert fatal.parts["format"] == pytest.approx(6 / 7)


def test_an_invalid_start_earns_nothing() -> None:
    wordle = game(reward="textarena")
    wordle.step("hello there")
    assert wordle.step("hello there").reward == 0.0


@pytest.mark.parametrize(
    ("reply", "guess"),
    [
        ("[crane]", "crane"),
        ("[ C R A N E ]", "crane"),
        ("crane", "crane"),
        (" C r a n e\n", "crane"),
        ("I say [Crane] or [plane]", "crane"),
        ("I say crane", None),
        ("[cr4ne]", None),
        ("[]", None),
        ("", None),
        ("[c-r-a-n-e]", None),
    ],
)
def test_finding_the_guess(reply: str, guess: str | None) -> None:
    assert guess_in(reply) == guess


def test_thoughts_are_not_guesses() -> None:
    assert game().step("<think>\n[plane]?\n</think>\n[crane]").info["won"]
    assert game().step("<think>\n[crane]").info["invalid"] == 1


def test_hard_mode() -> None:
    history = [("cream", feedback("cream", "crane"))]
    assert uses_hints("crane", history)
    assert not uses_hints("dream", history)  # the green C is given up
    assert uses_hints("green", [("order", feedback("order", "green"))])
    assert not uses_hints("great", [("sheep", feedback("sheep", "green"))])  # two E are known
    wordle = game("crane", hard_mode=True)
    wordle.step("[cream]")
    assert "every hint" in wordle.step("[dream]").observation.text


def test_seeds_and_tasks_decide_the_secret() -> None:
    wordle = Wordle()

    def secret(task: object, seed: int) -> str:
        wordle.reset(task, seed)
        return wordle.secret

    assert secret(None, 3) == secret(None, 3)
    assert len({secret(None, seed) for seed in range(40)}) > 20
    task = World().task("wordle", "train", 7)
    assert secret(task, 1) == task.answer
    first = wordle.reset(task, 0)
    assert [m["role"] for m in first.messages][-1] == "user"
    assert list(first.messages) == task.messages[: len(first.messages)]


def test_world_demonstrations_are_games_the_environment_agrees_with() -> None:
    """Turn by turn the same texts, and every guess is valid: what SFT learns is what RL plays."""
    for index in range(30):
        task = World().task("wordle", "train", index)
        wordle = Wordle()
        said = list(wordle.reset(task, 0).messages)
        for message in task.messages[len(said) :]:
            if message["role"] == "assistant":
                result = wordle.step(message["content"])
            else:
                assert result.observation.text == message["content"]
        last = wordle.step(task.demonstration)
        assert last.done
        assert last.info["invalid"] == 0
        assert last.info["won"] == (task.demonstration == f"[ {' '.join(task.answer.upper())} ]")


def test_what_was_found_stays_known() -> None:
    wordle = game("crane")
    assert wordle.step("[great]").observation.text == "( - R e a - )"
    assert wordle.step("[music]").observation.text == "( - R e a c )"
    assert wordle.step("[trade]").observation.text == "( - R A - E )"
    assert game("eight").step("[sheep]").observation.text == "( - h e - - )", "one e is enough"


def test_lists_of_any_size_and_length(tmp_path: Path) -> None:
    answers, more = tmp_path / "answers.txt", tmp_path / "more.txt"
    answers.write_text("kitchen\nCURTAIN\n\n")
    more.write_text("morning\n")
    wordle = Wordle(WordleConfig(answers=str(answers), allowed=str(more), guesses=9))
    wordle.reset("curtain")
    assert wordle.step("[morning]").observation.text == "( - - R n i - - )"
    assert wordle.step("[curtain]").info["won"]
    more.write_text("cup\n")
    with pytest.raises(NurtureError, match=r"more.txt:1: 'cup' is not a word of 7 letters"):
        Wordle(WordleConfig(answers=str(answers), allowed=str(more)))
    answers.write_text("\n")
    with pytest.raises(NurtureError, match="is empty"):
        Wordle(WordleConfig(answers=str(answers)))
    with pytest.raises(NurtureError, match="no such word list"):
        Wordle(WordleConfig(answers="nowhere.txt"))


def test_refusals() -> None:
    with pytest.raises(NurtureError, match="does not have 5 letters"):
        Wordle().reset("kitchen")
    with pytest.raises(NurtureError, match="no part 'green'"):
        Wordle(WordleConfig(reward={"green": 1.0}))
    assert weigh({"a": 2.0, "b": 5.0}, {"a": 0.5}) == 1.0


def test_step_all_steps_each_game() -> None:
    games = [game("crane"), game("green")]
    assert [r.info["won"] for r in step_all(games, ["[crane]", "[crane]"])] == [True, False]


# ---- players -----------------------------------------------------------------------------------------------------


def test_mark_codes_equal_the_feedback_rule() -> None:
    """All words over two letters (where repeats matter most), and words of the world."""
    rng = Random(0)
    words = ["".join(letters) for letters in product("ab", repeat=4)]
    for some in (words, [rng.choice(ANSWERS) for _ in range(60)]):
        letters = np.array([[ord(c) for c in word] for word in some])
        digits = str.maketrans("XYG", "012")
        expected = [[int(feedback(g, s).translate(digits), 3) for s in some] for g in some]
        assert mark_codes(letters, letters).tolist() == expected


def test_expected_bits_by_hand() -> None:
    """Against ab, ba, cc the guess ab shows GG, YY, XX: log2 3 bits; cc tells cc from the rest only."""
    letters = np.array([[0, 1], [1, 0], [2, 2]])
    bits = expected_bits(letters[[0, 2]], letters)
    assert bits.tolist() == pytest.approx([np.log2(3), np.log2(3) - 2 / 3])


def test_the_players_play_well() -> None:
    wordle = Wordle()
    solver, random = EntropySolver(wordle), RandomConsistent(wordle, seed=1)
    guesses = []
    for index, secret in enumerate(ANSWERS[:60]):
        wordle.reset(secret)
        assert play_out(wordle, solver)
        guesses.append(len(wordle.history))
        wordle.reset(secret, index)
        play_out(wordle, random)
        assert all(
            feedback(wordle.history[0][0], word) == wordle.history[0][1] for word, _ in wordle.history[1:]
        )
    assert sum(guesses) / len(guesses) < 3.2


def test_the_solver_keeps_to_hard_mode() -> None:
    wordle = Wordle(WordleConfig(hard_mode=True))
    solver = EntropySolver(wordle)
    for secret in ANSWERS[60:80]:
        wordle.reset(secret)
        assert play_out(wordle, solver)
        assert wordle._invalid == 0
