"""Whole episodes: tokens as the template writes them, the policy's own tokens masked, logprobs equal to the trainer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch

from nurture.environments.protocol import Observation, StepResult
from nurture.environments.wordle import Wordle
from nurture.errors import NurtureError
from nurture.inference.engine import Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.rollout import Rollout, collate, collect, token_logprobs
from nurture.tokenizer import Tokenizer
from nurture.world import World


class Echo:
    """Repeats what was said, of a length the seed decides; over after four turns, each worth a point."""

    def reset(self, task: Any, seed: int) -> Observation:
        self.turns, self.words = 0, 1 + seed % 3
        return Observation.of(f"Say something about {task}.", system="Be brief.")

    def step(self, action: str) -> StepResult:
        self.turns += 1
        text = f"You said {action!r}. " * self.words
        return StepResult(Observation.of(text), 1.0, self.turns == 4, {"turns": float(self.turns)})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    world = World()
    texts = [world.document("web", "train", index) for index in range(60)]
    return Tokenizer.train(texts, 320)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.vocab_size, "width": 32, "layers": 2, "heads": 2, "max_position": 400}
    return Transformer(ModelConfig(init_std=0.05, **shape))  # type: ignore[arg-type]


# The end of a turn, and twenty other tokens that stop it: an untrained model would hardly ever end one.
PARAMS = SamplingParams(max_tokens=40, temperature=0.8, stop_token_ids=(2, *range(40, 60)))


@pytest.fixture(scope="module")
def play(model: Transformer, tokenizer: Tokenizer) -> Callable[..., list[Rollout]]:
    def run(tasks: list[Any], max_batch: int = 64, environment: Any = Echo, **settings: Any) -> list[Rollout]:
        engine = Engine(model, max_batch=max_batch)
        settings = {"params": PARAMS, "group_size": 3, "seed": 5} | settings
        return collect(engine, tokenizer, environment, tasks, **settings)

    return run


@pytest.fixture(scope="module")
def rollouts(play: Callable[..., list[Rollout]]) -> list[Rollout]:
    return play(["cats", "the sea", "nothing", "rain"])


def test_episodes_of_every_kind(rollouts: list[Rollout]) -> None:
    """The toy model gives the tests below something to look at."""
    ends = Counter(rollout.finished for rollout in rollouts)
    assert ends["stop"] >= 2
    assert ends["length"] >= 2
    assert [rollout.group for rollout in rollouts] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(len({tuple(r.token_ids) for r in rollouts[i : i + 3]}) == 3 for i in (0, 3, 6, 9))
    assert all(len({tuple(r.prompt_ids) for r in rollouts[i : i + 3]}) == 1 for i in (0, 3, 6, 9))


def test_tokens_are_the_templates_and_the_mask_is_the_policys(
    rollouts: list[Rollout], tokenizer: Tokenizer
) -> None:
    """Between turns stands exactly what the template writes; a turn stopped by another token is closed by the end's."""
    end, others = tokenizer.end_of_turn_id, 0
    for rollout in rollouts:
        spans = [[token for token, _ in run] for _, run in _lists(rollout)]
        assert spans[0] == rollout.prompt_ids == tokenizer.encode_prompt(rollout.messages[:2])
        assert len(spans) == 2 * rollout.turns
        for turn in range(rollout.turns):
            mine, said = spans[2 * turn + 1], rollout.messages[2 + 2 * turn]
            assert said == {"role": "assistant", "content": tokenizer.decode(mine, skip_special=True)}
            if turn + 1 < rollout.turns:
                answer = rollout.messages[3 + 2 * turn]["content"]
                between = spans[2 * turn + 2]
                if mine[-1] != end:
                    others += 1
                    assert between[0] == end
                    between = between[1:]
                assert tokenizer.decode(between) == (
                    f"\n<|im_start|>user\n{answer}<|im_end|>\n<|im_start|>assistant\n"
                )
    assert others > 5


def _lists(rollout: Rollout) -> list[tuple[bool, list[tuple[int, bool]]]]:
    pairs = zip(rollout.token_ids, rollout.completion_mask, strict=True)
    return [(mine, list(run)) for mine, run in groupby(pairs, key=lambda pair: pair[1])]


def test_rewards_and_parts(rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        stepped = rollout.turns - (rollout.finished == "length")  # a turn that was cut off earns nothing
        assert rollout.reward == stepped
        assert rollout.reward_parts == ({"turns": float(stepped)} if stepped else {})
        assert rollout.finished != "stop" or stepped == 4


@torch.no_grad()
def test_logprobs_are_the_trainers(rollouts: list[Rollout], model: Transformer, tokenizer: Tokenizer) -> None:
    batch = collate(rollouts, tokenizer.pad_token_id)
    logprobs = token_logprobs(model, batch, temperature=0.8)
    torch.testing.assert_close(batch.logprobs, logprobs, atol=1e-4, rtol=0)
    assert not batch.logprobs[~batch.completion_mask].any()


@pytest.mark.parametrize("max_batch", [1, 5])
def test_batching_changes_nothing(
    rollouts: list[Rollout], play: Callable[..., list[Rollout]], max_batch: int
) -> None:
    for one, other in zip(rollouts, play(["cats", "the sea", "nothing", "rain"], max_batch), strict=True):
        assert one.token_ids == other.token_ids
        assert (one.reward, one.finished, one.messages) == (other.reward, other.finished, other.messages)
    other = play(["cats", "the sea", "nothing", "rain"], seed=6)
    assert [r.token_ids for r in other] != [r.token_ids for r in rollouts]


def test_limits(play: Callable[..., list[Rollout]], rollouts: list[Rollout]) -> None:
    for rollout in play(["cats", "rain"], max_turns=2):
        assert rollout.finished in ("turns", "length")
        assert rollout.turns <= 2
    longest = max(len(rollout.prompt_ids) for rollout in rollouts) + 30
    short = play(["cats", "the sea", "nothing", "rain"], max_length=longest)
    assert {rollout.finished for rollout in short} == {"context", "length"}
    assert all(len(rollout.token_ids) <= longest for rollout in short)


def test_members_of_a_group_play_the_same_game(model: Transformer, tokenizer: Tokenizer) -> None:
    games: list[Wordle] = []

    def make() -> Wordle:
        games.append(Wordle())
        return games[-1]

    collect(Engine(model), tokenizer, make, [None] * 4, params=PARAMS, group_size=4, seed=1)
    secrets = [[game.secret for game in games[i : i + 4]] for i in range(0, 16, 4)]
    assert all(len(set(group)) == 1 for group in secrets)
    assert len({group[0] for group in secrets}) > 1


def test_a_template_that_forgets_is_refused(model: Transformer, tokenizer: Tokenizer) -> None:
    """A template that shortens an earlier turn once the conversation goes on cannot be continued token by token."""
    forgetful = tokenizer.with_chat_template(
        tokenizer.chat_template.replace(  # type: ignore[union-attr]
            "{%- set content = message['content'] or '' -%}",
            "{%- set content = '' if add_generation_prompt else message['content'] -%}",
        )
    )
    with pytest.raises(NurtureError, match="rewrites an assistant's turn"):
        collect(Engine(model), forgetful, Echo, ["cats"] * 4, params=PARAMS, seed=5)
