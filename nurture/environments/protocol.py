"""What an environment is: reset gives the first messages, step takes what the policy wrote and pays.

A game keeps its own state between steps and is a pure function of (task, seed, actions): members of a group get the
same task and seed and therefore the same game. A single-turn task (a sum, a program) is a game that is over after one
step. Environments see text, never tokens; `rollout.collect` plays them with a policy.

A reward may have named parts (greens, repeats, format); `weigh` makes the reward of them, and every part is logged. The
failure to watch for is a reward that can be had without playing well: whether a game was won is therefore said in
`info["won"]` by the game's own state, apart from what was paid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from nurture.errors import NurtureError, did_you_mean
from nurture.types import Message


@dataclass(frozen=True)
class Observation:
    """What the policy gets to read.

    Attributes:
        messages: turns added to the conversation: after reset the whole prompt (system, user), later mostly one turn.
    """

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, text: str, system: str | None = None) -> Observation:
        """Return one user turn, after a system message where one is given."""
        first: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
        return cls((*first, {"role": "user", "content": text}))

    @property
    def text(self) -> str:
        """The last turn's text."""
        return self.messages[-1].get("content", "") if self.messages else ""


@dataclass(frozen=True)
class StepResult:
    """What an action did.

    Attributes:
        observation: the next turn; what it says when `done` is for people, the policy does not read it.
        reward: earned by this action; an episode's reward is the sum over its steps.
        done: the game is over.
        parts: reward parts by name, unweighted, of the whole episode so far.
        info: facts for logs and evaluations (`won`, `invalid`, ...), never for the policy.
    """

    observation: Observation
    reward: float
    done: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Environment(Protocol):
    """One game. A new one needs these two methods and nothing else.

    Where many games can be stepped cheaper together (programs in a sandbox), the class may have
    `step_many(environments, actions) -> list[StepResult]` as a static method; `step_all` then uses it.
    """

    def reset(self, task: Any, seed: int) -> Observation:
        """Start a new game.

        Args:
            task: what to play: a world task, a data row, or None where the seed alone decides.
            seed: decides everything random in the game.
        """
        ...

    def step(self, action: str) -> StepResult:
        """Take the policy's turn (its text without special tokens)."""
        ...


def prompt_of(task: Any) -> tuple[Message, ...]:
    """Return the turns that put a task to the policy: a row's prompt, or a world task's messages.

    Raises:
        NurtureError: the task has neither.
    """
    prompt = getattr(task, "prompt", None)
    if isinstance(prompt, tuple) and prompt:
        return prompt
    messages = getattr(task, "messages", None)
    if not messages:
        raise NurtureError(f"an environment was given a {type(task).__name__} without a prompt to play")
    return tuple(messages)


def step_all(environments: Sequence[Environment], actions: Sequence[str]) -> list[StepResult]:
    """Step every environment with its action; those of a kind that has `step_many` together."""
    results: list[StepResult | None] = [None] * len(environments)
    kinds: dict[type, list[int]] = {}
    for index, environment in enumerate(environments):
        kinds.setdefault(type(environment), []).append(index)
    for kind, indices in kinds.items():
        together = getattr(kind, "step_many", None)
        if together is not None:
            found = together([environments[i] for i in indices], [actions[i] for i in indices])
        else:
            found = [environments[i].step(actions[i]) for i in indices]
        for index, result in zip(indices, found, strict=True):
            results[index] = result
    return [result for result in results if result is not None]


def weigh(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted sum of reward parts; a part without a weight counts 0.

    Raises:
        NurtureError: a weight names no part.
    """
    for name in weights:
        if name not in parts:
            hint = did_you_mean(name, parts) or f" Parts: {', '.join(parts)}."
            raise NurtureError(f"reward weights: there is no part '{name}'.{hint}")
    return sum(weight * parts[name] for name, weight in weights.items())
