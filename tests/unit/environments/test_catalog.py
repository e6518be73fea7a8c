"""Environments by name, and tasks that find their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nurture.data.rows import parse_row
from nurture.environments import code as code_module
from nurture.environments import math as math_module
from nurture.environments.catalog import environment_maker, kind_of
from nurture.environments.code import Code
from nurture.environments.math import Math
from nurture.environments.protocol import Environment, step_all
from nurture.environments.wordle import Wordle
from nurture.errors import NurtureError
from nurture.rewards.code import CodeVerdict
from nurture.rewards.math import MathVerdict
from nurture.world import World

WORLD = World()


def test_every_maker_call_makes_another_game() -> None:
    make = environment_maker("wordle", {"hard_mode": True})
    first, second = make(), make()
    first.reset("crane", 0)
    second.reset("dream", 0)
    assert isinstance(first, Wordle)
    assert (first.secret, second.secret, first.config.hard_mode) == ("crane", "dream", True)  # type: ignore[attr-defined]
    first.step("[grain]")
    assert second.history == []  # type: ignore[attr-defined]


def test_kinds() -> None:
    for kind, name in (("wordle", "wordle"), ("arithmetic", "math"), ("code", "code"), ("fact", "math")):
        assert kind_of(WORLD.task(kind, "train", 0)) == name
    assert (
        kind_of(parse_row({"question": "What is 6 x 7?", "answer": "6 x 7 = 42\n#### 42"}, "f:1")) == "math"
    )
    with pytest.raises(NurtureError, match="story has neither an answer nor tests"):
        kind_of(WORLD.task("story", "train", 0))


def test_auto_mixes_games_and_problems() -> None:
    make = environment_maker("auto")
    tasks = [WORLD.task(kind, "train", 3) for kind in ("wordle", "arithmetic", "wordle")]
    games = [make() for _ in tasks]
    for game, task in zip(games, tasks, strict=True):
        first = game.reset(task, 0)
        assert list(first.messages) == task.messages[: len(first.messages)]
    results = step_all(games, [f"[{tasks[0].answer}]", f"Answer: {tasks[1].answer}", "[zzzzz]"])
    assert [(r.done, r.reward) for r in results] == [(True, 1.0), (True, 1.0), (False, 0.0)]


def test_math_pays_for_the_right_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grader that fails pays nothing either, and says that it was the grader."""
    game, task = Math(), WORLD.task("arithmetic", "train", 1)
    for reply, paid in ((f"Answer: {task.answer}", 1.0), ("Answer: 123456", 0.0)):
        game.reset(task)
        result = game.step(reply)
        assert (result.reward, result.done, result.parts) == (paid, True, {"correct": paid})
        assert result.info == {"won": bool(paid), "grader_error": False}
    monkeypatch.setattr(math_module, "check_math", lambda *_: MathVerdict(False, grader_error=True))
    failed = game.step("\\boxed{x}")
    assert (failed.reward, failed.info) == (0.0, {"won": False, "grader_error": True})
    with pytest.raises(NurtureError, match="needs problems with an answer"):
        Math().reset(WORLD.task("story", "train", 0))


def test_programs_of_a_step_are_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for all; a sandbox that failed pays nothing and says so."""
    calls: list[list[str]] = []

    def grade(replies: list[str], tasks: object, sandbox: object) -> list[CodeVerdict]:
        calls.append(list(replies))
        return [
            CodeVerdict(True),
            CodeVerdict(False, "assert 1 == 2"),
            CodeVerdict(True, "", grader_error=True),
        ]

    monkeypatch.setattr(code_module, "grade_code", grade)
    games = [Code(sandbox=None) for _ in range(3)]  # type: ignore[arg-type]
    for index, game in enumerate(games):
        game.reset(WORLD.task("code", "train", index))
    results = step_all(games, ["a", "b", "c"])
    assert calls == [["a", "b", "c"]]
    assert [result.reward for result in results] == [1.0, 0.0, 0.0]
    assert [result.info["grader_error"] for result in results] == [False, False, True]
    assert "assert 1 == 2" in results[1].observation.text


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("wordel", {}, "no environment 'wordel'.*wordle"),
        (
            "wordle",
            {"hardmode": True},
            "environment 'wordle': key 'hardmode': unknown key. Did you mean 'hard_mode'",
        ),
        ("math", {"x": 1}, "it has no settings, got x"),
        ("auto", {"hard_mode": True}, "by environment"),
    ],
)
def test_refusals(spec: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(NurtureError, match=message):
        environment_maker(spec, options)


def test_the_game_of_the_docs_is_whole_short_and_served() -> None:
    """docs/environments.md promises a new game in under 60 lines; it runs as printed, also as a task's number."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "environments.md").read_text()
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Between" in block
    )
    assert len(code.splitlines()) < 60
    names: dict[str, Any] = {}
    exec(code, names)
    game = names["Between"]()
    assert isinstance(game, Environment)
    game.reset("40", 0)
    said = [game.step(guess) for guess in ("50", "30", "I say 40!")]
    assert [result.observation.text for result in said] == ["It is less.", "It is more.", "You won."]
    assert [result.done for result in said] == [False, False, True]
    assert said[-1].parts == {"correct": 1.0, "closer": pytest.approx(1 / 3), "format": pytest.approx(2 / 3)}
    assert said[-1].reward == pytest.approx(1 + 0.2 / 3 + 0.1 * 2 / 3)
    game.reset(None, 5)
    first = game.secret
    game.reset(None, 5)
    assert game.secret == first
    assert [game.step("0").done for _ in range(7)][-1]


def test_real_word_lists(shared_data: Path) -> None:
    """The newspaper's lists and one with counts, with hard mode and textarena's pay."""
    folder = shared_data / "wordle"
    lists = {"answers": str(folder / "answers.txt"), "allowed": str(folder / "allowed.txt")}
    game = environment_maker(
        "wordle", {**lists, "hard_mode": True, "reward": "textarena", "style": "textarena"}
    )()
    assert isinstance(game, Wordle)
    assert (len(game.answers), len(game.allowed)) == (2309, 2309 + 10638)
    game.reset("abbey", 0)
    assert "A B A T E\nG G X X Y" in game.step("[abate]").observation.text
    assert "use every hint" in game.step("[stalk]").observation.text
    counted = environment_maker("wordle", {"answers": str(folder / "free_answers.tsv")})()
    assert isinstance(counted, Wordle)
    assert len(counted.answers) == 2187
    secrets = {(counted.reset(None, seed), counted.secret)[1] for seed in range(50)}
    assert len(secrets) > 40


OWN = '''
from nurture.environments.protocol import Observation, StepResult

class Echo:
    """Say the secret."""
    def __init__(self, secret="yes"):
        self.secret = secret
    def reset(self, task, seed):
        return Observation.of("?")
    def step(self, action):
        return StepResult(Observation(()), float(action == self.secret), True)

def short(reply, row, most=3):
    if reply == "odd":
        return None
    return {"short": float(len(reply) <= most), "right": float(row.answer in reply)}

constant = 1.0
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("where", ["own_rewards", "own_rewards.py"])
def test_a_reward_of_ones_own_is_a_function_of_the_reply_and_its_row(own: Path, where: str) -> None:
    game = environment_maker(f"{where}:short", {"most": 4})()
    row = parse_row({"question": "6 x 7?", "answer": "42"}, "f:1")
    assert game.reset(row, 0).text == "6 x 7?"
    result = game.step("42")
    assert (result.reward, result.done, result.parts) == (2.0, True, {"short": 1.0, "right": 1.0})
    assert game.step("It is 42").reward == 1.0
    assert game.step("odd").info == {"grader_error": True}  # it could not judge: no zero
    with pytest.raises(NurtureError, match="needs data"):
        game.reset(None, 0)


def test_a_game_of_ones_own_is_made_anew_for_every_rollout(own: Path) -> None:
    make = environment_maker("own_rewards:Echo", {"secret": "no"})
    assert make() is not make()
    assert make().step("no").reward == 1.0


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("own_rewards:Ecko", {}, "has no attribute 'Ecko'. Write module:NAME"),
        ("own_rewardz:Echo", {}, "No module named 'own_rewardz'"),
        ("nowhere.py:Echo", {}, "No such file"),
        ("own_rewards:constant", {}, "neither a class with reset and step nor a function"),
        ("own_rewards:short", {"least": 1}, "unexpected keyword argument 'least'"),
    ],
)
def test_what_is_wrong_with_ones_own_is_told(own: Path, spec: str, options: dict, message: str) -> None:
    with pytest.raises(NurtureError, match=message):
        environment_maker(spec, options)
