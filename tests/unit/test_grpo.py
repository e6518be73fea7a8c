"""GRPO between rollouts and update: what is paid, kept, left out and credited, with a policy that recites."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from nurture.advantages import alone
from nurture.data.rows import Row, parse_row
from nurture.environments.catalog import environment_maker
from nurture.environments.protocol import Observation, StepResult
from nurture.errors import NurtureError
from nurture.inference.engine import Completion, Episode
from nurture.losses.policy import PolicyLossConfig
from nurture.rollout import Rollout
from nurture.runtime import Processes
from nurture.stages import grpo, ppo
from nurture.stages.context import StageContext
from nurture.stages.rl import PromptStream, Question, play_rows, read_prompts, rollout_sums, share_prompts
from nurture.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(
    ["What is 6 times 7? Answer: 42. def double(x): return x"], 300
).with_chat_template()
SUM = parse_row({"question": "What is 6 times 7?", "answer": "6 x 7 = 42\n#### 42"}, "f:1")


class Reciter:
    """A policy that says what it is told to, reply by reply."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)

    def converse(self, prompts, respond, params=None, seeds=None, *, max_length=None) -> list[Episode]:
        episodes = []
        for index in range(len(prompts)):
            said = TOKENIZER.encode(self.replies.pop(0))
            end = [TOKENIZER.end_of_turn_id]
            cut = len(said) >= params.max_tokens
            written = said[: params.max_tokens] if cut else said + end
            turn = Completion(written, [-1.0] * len(written), "length" if cut else "stop")
            if not cut:
                assert respond([(index, turn)]) == [None]
            episodes.append(Episode([turn]))
        return episodes


def config(**settings: object) -> grpo.Config:
    defaults = {"name": "grpo", "steps": 1, "prompts_per_step": 2, "group_size": 2, "max_tokens": 400}
    return grpo.Config.model_validate({**defaults, "sequence_length": 2000, **settings})


def session(rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    processes = Processes(rank, world_size) if world_size > 1 else Processes()
    return SimpleNamespace(tokenizer=TOKENIZER, seed=0, execution=SimpleNamespace(processes=processes))


def play(settings: grpo.Config, rows: Sequence[Row], *replies: str) -> tuple[list[Rollout], list[Rollout]]:
    make = environment_maker(settings.env, settings.environment)
    return grpo.sample(settings, session(), Reciter(*replies), make, PromptStream(rows, 0), 0)


def test_answers_are_paid_and_credit_is_against_the_group() -> None:
    right, wrong = "6 x 7 = 42. Answer: 42", "Answer: 41"
    kept, played = play(config(), [SUM], right, wrong, right, right)
    assert kept == played
    assert [rollout.reward for rollout in kept] == [1, 0, 1, 1]
    assert [rollout.group for rollout in kept] == [0, 0, 1, 1]
    sums = grpo.group_sums(kept, played)
    assert sums == {"zero_variance": (1, 2), "solved": (1, 2), "kept": (2, 2), "won": (3, 4)}
    batch = grpo.to_batch(config(), TOKENIZER, kept)
    credit = grpo.advantages(
        config(), batch.rewards, batch.groups, batch.logprobs, batch.completion_mask, alone
    )
    half = 0.5 / (0.5**0.5 + 1e-4)
    expected = torch.tensor([[half], [-half], [0.0], [0.0]]) * batch.completion_mask
    torch.testing.assert_close(credit, expected)
    assert not credit[~batch.completion_mask].any()


def test_groups_that_teach_nothing_are_replaced_as_long_as_tries_are_left() -> None:
    right, wrong = "Answer: 42", "Answer: 7"
    replies = [right, right, right, wrong, wrong, wrong, wrong, right]
    kept, played = play(config(refills=3), [SUM], *replies)
    assert [rollout.reward for rollout in kept] == [1, 0, 0, 1]
    assert [rollout.group for rollout in played] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert grpo.group_sums(kept, played)["kept"] == (2, 4)
    assert grpo.group_sums(kept, played)["zero_variance"] == (2, 4)
    kept, played = play(config(refills=1), [SUM], right, right, right, wrong, wrong, wrong)
    assert [rollout.reward for rollout in kept] == [1, 0]
    assert len(played) == 6
    # Nothing useful at all: a batch without credit rather than none.
    kept, _ = play(config(refills=1), [SUM], *[wrong] * 8)
    assert len(kept) == 4


def test_every_process_trains_on_as_many_rows() -> None:
    settings = config(refills=1, prompts_per_step=4)
    make = environment_maker("math")
    replies = Reciter(*["Answer: 7"] * 3, "Answer: 42", *["Answer: 7"] * 2)
    kept, _ = grpo.sample(settings, session(1, 2), replies, make, PromptStream([SUM], 0), 0)
    assert len(kept) == 4
    assert [rollout.reward for rollout in kept] == [0, 1, 0, 0]


def test_what_could_not_be_graded_is_no_zero() -> None:
    rollouts = play(config(), [SUM], "Answer: 42", "Answer: 7", "Answer: 42", "Answer: 42")[0]
    rollouts[0].info["grader_error"] = True
    grpo.pay(config(), rollouts)
    assert math.isnan(rollouts[0].reward)
    sums = rollout_sums(rollouts)
    assert (sums["ungraded"], sums["reward_mean"]) == ((1, 4), (2, 3))
    assert sums["different"] == (2, 4)
    batch = grpo.to_batch(config(), TOKENIZER, rollouts)
    assert batch.completion_mask.any(1).tolist() == [False, True, True, True]
    credit = grpo.advantages(
        config(), batch.rewards, batch.groups, batch.logprobs, batch.completion_mask, alone
    )
    assert not credit[:2].any()  # the other one of its group is alone


@pytest.mark.parametrize("info", [{}, {"won": True}])
def test_a_win_rate_is_measured_where_the_server_says_who_won(info: dict[str, bool]) -> None:
    class Remote:
        def reset(self, task: object, seed: int) -> Observation:
            return Observation.of("What is 6 times 7?")

        def step(self, action: str) -> StepResult:
            return StepResult(Observation.of("def"), 0.5, True, {}, info)

    settings = config(env="openenv:http://there", max_tokens=20)
    engine = SimpleNamespace(now=lambda: Reciter("Answer: 42", "Answer: 42 " * 9))
    measures = grpo.Exam(settings, session(), engine, Remote, [None, None]).sit().measures  # type: ignore[arg-type]
    assert measures["openenv_reward"].value == 0.25  # the second was cut
    wins = {"openenv_win": 0.5} if info else {}
    assert {name: m.value for name, m in measures.items() if name != "openenv_reward"} == wins


@pytest.mark.parametrize("name", ["math", "code"])
def test_partial_credit_is_no_win(name: str) -> None:
    """Half of the reward for a try, say: what is measured is whether the problem was solved."""

    class Kind:
        def reset(self, task: object, seed: int) -> Observation:
            return Observation.of("What is 6 times 7?")

        def step(self, action: str) -> StepResult:
            won = action == "Answer: 42"
            return StepResult(Observation.of("def"), 1.0 if won else 0.5, True, {}, {"won": won})

    engine = SimpleNamespace(now=lambda: Reciter("Answer: 42", "Answer: 41", "Answer: 40", "Answer: 39"))
    measures = grpo.Exam(config(env=name), session(), engine, Kind, [None] * 4).sit().measures  # type: ignore[arg-type]
    assert measures[name].value == 0.25


def test_length_costs_near_the_limit_and_cut_replies_can_be_left_out() -> None:
    settings = config(max_tokens=20, overlong_cushion=10, drop_truncated=True)
    long = "Answer: 42 " * 9
    rollouts, _ = play(settings, [SUM], "42", long, "42", "Answer: 42 .......")
    lengths = [sum(rollout.completion_mask) for rollout in rollouts]
    assert [r.finished for r in rollouts] == ["stop", "length", "stop", "stop"]
    assert lengths[1] == 20
    expected = [1 - max(0, length - 10) / 10 for length in lengths]
    expected[1] = -1.0  # the environment never saw it
    assert [rollout.reward for rollout in rollouts] == pytest.approx(expected)
    assert rollouts[1].reward_parts["overlong"] == -1
    batch = grpo.to_batch(settings, TOKENIZER, rollouts)
    assert batch.completion_mask.any(1).tolist() == [True, False, True, True]


def test_rloo_and_reinforce_take_the_kl_from_the_reward() -> None:
    rewards, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    token_kl = torch.tensor([[0.0, 0.1, 0.3], [0.0, 0.2, 0.0]])

    def credit(loss_type: str) -> torch.Tensor:
        loss = PolicyLossConfig(loss_type=loss_type, kl_coefficient=0.5)
        return grpo.advantages(config(loss=loss), rewards, groups, token_kl, mask, alone)

    # 1 - 0.5 * 0.4 = 0.8 against 0 - 0.5 * 0.2 = -0.1
    torch.testing.assert_close(credit("rloo"), torch.tensor([[0, 0.9, 0.9], [0, -0.9, 0]]))
    # 0.5 - 0.2, 0.5 - 0.15, -0.5 - 0.1: what is still to come, then whitened
    to_come = torch.tensor([0.3, 0.35, -0.6])
    torch.testing.assert_close(credit("reinforce++")[mask], (to_come - to_come.mean()) / to_come.std())
    half = 0.5 / (0.5**0.5 + 1e-4)  # grpo's KL is in the loss
    torch.testing.assert_close(credit("grpo"), torch.tensor([[0, half, half], [0, -half, 0]]))


def test_dr_grpo_divides_by_a_constant_and_not_by_the_deviation() -> None:
    settings = config(reward_scale="none", loss={"loss_type": "dr_grpo"})
    kept, _ = play(settings, [SUM], "Answer: 42", "Answer: 7", "Answer: 7", "Answer: 7")
    batch = grpo.to_batch(settings, TOKENIZER, kept)
    credit = grpo.advantages(
        settings, batch.rewards, batch.groups, batch.logprobs, batch.completion_mask, alone
    )
    assert batch.loss_count == 4 * 400
    assert sorted(set(credit.flatten().tolist())) == [-0.5, 0, 0.5]


# --- reward hacks through the stage ---------------------------------------------------------------------------------


DOUBLE = Row(
    prompt=({"role": "user", "content": "Write double(x), which doubles x."},),
    tests=("assert double(2) == 4", "assert double(5) == 10", "assert double(-1) == -2"),
    entry_point="double",
)


@pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
def test_programs_that_cheat_earn_nothing_and_are_unlearned() -> None:
    cheats = [
        "print(4); print(10); print(-2); print('passed')",
        "import sys; sys.exit(0)",
        "import os\ndef double(x): os._exit(0)",
        "class E:\n    def __eq__(self, o): return True\ndef double(x): return E()",
        "import builtins\nbuiltins.AssertionError = type(None)\ndef double(x): return 0",
        "def double(x): return {2: 4}.get(x)",
        "import sys\nfor m in list(sys.modules.values()):\n    setattr(m, 'judge', lambda *a: True)\ndef double(x): return 0",
    ]
    settings = config(prompts_per_step=1, group_size=len(cheats) + 1)
    replies = [f"```python\n{program}\n```" for program in [*cheats, "def double(x): return x + x"]]
    kept, _ = play(settings, [DOUBLE], *replies)
    assert [rollout.reward for rollout in kept] == [0.0] * len(cheats) + [1.0]
    batch = grpo.to_batch(settings, TOKENIZER, kept)
    credit = grpo.advantages(
        settings, batch.rewards, batch.groups, batch.logprobs, batch.completion_mask, alone
    )
    assert (credit[:-1][batch.completion_mask[:-1]] < 0).all()
    assert (credit[-1][batch.completion_mask[-1]] > 0).all()


def test_lists_of_answers_earn_nothing() -> None:
    kept, _ = play(
        config(),
        [SUM],
        "Answer: 41 or Answer: 42",
        " ".join(f"Answer: {n}" for n in range(60)),
        "Answer: 40, 41, 42, 43",
        "The answer is 42 or 43.",
    )
    assert [rollout.reward for rollout in kept] == [0, 0, 0, 0]


# --- what is played -------------------------------------------------------------------------------------------------


def test_games_bring_their_words_and_other_environments_need_data() -> None:
    make = environment_maker("wordle")
    settings, context = config(env="wordle"), StageContext(directory=None)  # type: ignore[arg-type]
    train, heldout = (
        grpo.tasks_of(settings, context, TOKENIZER, make, split)  # type: ignore[arg-type]
        for split in ("train", "heldout")
    )
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 136
    with pytest.raises(NurtureError, match="env 'math' needs data"):
        grpo.tasks_of(config(env="math"), context, TOKENIZER, environment_maker("math"), "train")


def test_the_command_line_names_the_environment() -> None:
    from typer.testing import CliRunner

    from nurture.cli import app

    runner = CliRunner()
    assert "openenv:URL" in runner.invoke(app, ["grpo", "--help"]).output
    said = runner.invoke(app, ["grpo", "--model", "nowhere", "--env", "wordle"]).exception
    assert "nowhere" in str(said)  # --env was understood


@pytest.mark.parametrize(
    ("split", "sequence_length", "message"),
    [
        ("heldout", 256, "no heldout prompt that fits.*one in heldout_every=50 is held out: give more rows"),
        ("train", 8, r"no train prompt that fits. prompt \+ max_tokens must not exceed sequence_length"),
    ],
)
def test_why_there_are_no_prompts_is_told(
    tmp_path: Path, split: str, sequence_length: int, message: str
) -> None:
    (tmp_path / "few.jsonl").write_text('{"question": "What is 6 times 7?", "answer": "#### 42"}\n')
    assert not SUM.is_heldout(50)
    config = grpo.Config(name="g", kind="grpo", sequence_length=sequence_length, max_tokens=4, steps=1)
    context = StageContext(tmp_path, base=tmp_path)
    with pytest.raises(NurtureError, match=message):
        read_prompts(config, {"few": "few.jsonl"}, context, TOKENIZER, split)


def test_prompts_are_measured_as_they_are_played(tmp_path: Path) -> None:
    """A mode of the chat template makes them longer: one that leaves no room then would be cut in its reply."""
    (tmp_path / "few.jsonl").write_text('{"question": "What is 6 times 7?", "answer": "#### 42"}\n')
    context = StageContext(tmp_path, base=tmp_path)
    bare = len(TOKENIZER.encode_prompt(SUM.prompt))
    settings: dict[str, Any] = {"sequence_length": bare + 4, "max_tokens": 4}
    assert read_prompts(config(**settings), {"few": "few.jsonl"}, context, TOKENIZER, "train")
    thinking = config(**settings, template_kwargs={"enable_thinking": True})
    with pytest.raises(NurtureError, match="no train prompt that fits"):
        read_prompts(thinking, {"few": "few.jsonl"}, context, TOKENIZER, "train")


def test_as_many_prompts_as_the_recipe_says(tmp_path: Path) -> None:
    rows = [f'{{"question": "What is {n} times 7?", "answer": "#### {7 * n}"}}\n' for n in range(60)]
    (tmp_path / "many.jsonl").write_text("".join(rows))
    context, data = StageContext(tmp_path, base=tmp_path), {"many": "many.jsonl", "again": "many.jsonl"}

    def count(split: Any, **settings: Any) -> int:
        return len(read_prompts(config(heldout_every=5, **settings), data, context, TOKENIZER, split))

    everything = count("train")
    assert 80 < everything < 2 * 60
    assert count("train", prompts=7) == 2 * 7  # of each source, endless or not
    assert count("train", prompts=1000) == everything
    assert count("heldout", prompts=7, heldout_prompts=6) == 6


def test_every_process_gets_as_many_prompts_or_none_starts() -> None:
    """With fewer updates than the others a process would wait for ever."""
    share_prompts(config(prompts_per_step=4), Processes(world_size=2))
    with pytest.raises(NurtureError, match="prompts_per_step is 3, which 2 processes cannot share equally"):
        share_prompts(config(prompts_per_step=3), Processes(world_size=2))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "rloo", "sapo", "luspo"])
def test_ppo_takes_no_loss_that_is_averaged_over_rollouts(loss_type: str) -> None:
    """Its rows are counted by tokens, so such a loss would be smaller by the length of a reply."""
    settings = {"name": "ppo", "data": {"a": "a.jsonl"}, "reward_model": "reward"}
    assert ppo.Config.model_validate({**settings, "loss": {"loss_type": "dapo"}}).loss.loss_type == "dapo"
    with pytest.raises(ValidationError, match=f"loss.loss_type is {loss_type}, which is no mean over tokens"):
        ppo.Config.model_validate({**settings, "loss": {"loss_type": loss_type}})


def test_a_rows_own_template_variables_are_in_its_prompt() -> None:
    """Tools of a row, say; what the stage sets goes before what the row does."""
    tools = [{"name": "get_weather", "parameters": {}}]
    record = {
        "prompt": "Rain?",
        "answer": "no",
        "tools": tools,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    rows = [parse_row(record, "f:1"), parse_row({"prompt": "Rain?", "answer": "no"}, "f:2")]
    settings = config(template_kwargs={"enable_thinking": True})
    first, second = play_rows(settings, Reciter("No.", "No."), TOKENIZER, Question, rows, seed=0)
    assert first.prompt_ids == TOKENIZER.encode_prompt(rows[0].prompt, tools=tools, enable_thinking=True)
    assert second.prompt_ids == TOKENIZER.encode_prompt(rows[1].prompt, enable_thinking=True)


def test_prompts_are_as_long_as_their_template_variables_make_them(tmp_path: Path) -> None:
    tools = [{"name": "get_weather", "description": "long " * 200}]
    lines = [
        {"prompt": f"Rain {i}?", "answer": "no", **({"tools": tools} if i % 2 else {})} for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = config(data={"rows": "rows.jsonl"}, sequence_length=500, max_tokens=400)
    context = StageContext(tmp_path, base=tmp_path)
    kept = read_prompts(settings, settings.data, context, TOKENIZER, "train")
    assert kept
    assert not any(row.template_kwargs for row in kept)
