"""A game or a reward of one's own, by the name of a class or a function: `my_module:Between` or `rewards.py:short`.

A class is an environment (protocol.py) and is made anew for every game. A function is a reward: it is given the reply
and the task (a data row, with `prompt`, `answer` and `metadata`) and returns a number, or named parts whose sum is the
reward. None or NaN says that it could not judge the reply: that one is left out of mean and loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from nurture.environments.protocol import Environment, Observation, StepResult, prompt_of
from nurture.errors import NurtureError

Judged = float | Mapping[str, float] | None
"""What a reward function may return."""


class Paid:
    """A prompt that is answered once and paid by a function."""

    def __init__(self, reward: Callable[[str, Any], Judged], name: str) -> None:
        """Keep the function, and what messages call it."""
        self._reward, self._name = reward, name

    def reset(self, task: Any, seed: int) -> Observation:
        """Put the task's prompt."""
        if task is None:
            raise NurtureError(
                f"env '{self._name}' is a reward function, so it needs data: rows with a prompt."
            )
        self._task = task
        return Observation(prompt_of(task))

    def step(self, action: str) -> StepResult:
        """Have the reply judged."""
        judged = self._reward(action, self._task)
        named = judged if isinstance(judged, Mapping) else {"reward": judged}
        parts = {name: math.nan if value is None else value for name, value in named.items()}
        if not all(isinstance(value, (int, float)) for value in parts.values()):
            raise NurtureError(
                f"env '{self._name}' returned {judged!r}; a reward is a number, named numbers, or None."
            )
        parts = {name: float(value) for name, value in parts.items()}
        paid = sum(parts.values())
        if math.isnan(paid):
            return StepResult(Observation(()), 0.0, True, info={"grader_error": True})
        return StepResult(Observation(()), paid, True, parts)


def own_environment(spec: str, options: Mapping[str, Any]) -> Callable[[], Environment]:
    """Return a function that makes one environment a call.

    Args:
        spec: `module:NAME`, or `FILE.py:NAME`.
        options: keyword arguments of the class or the function.

    Raises:
        NurtureError: there is no such module or name, or it is neither a class nor a function.
        TypeError: it does not take these options.
    """
    where, _, name = spec.rpartition(":")
    try:
        found = getattr(_module(where), name)
    except (ImportError, AttributeError, ValueError, OSError, SyntaxError) as error:
        raise NurtureError(
            f"environment '{spec}': {error}. Write module:NAME with the module on PYTHONPATH, or FILE.py:NAME; NAME is "
            f"a class with reset and step, or a function of a reply and its row that returns the reward."
        ) from error
    if isinstance(found, type) and hasattr(found, "reset") and hasattr(found, "step"):
        signature(found).bind(**options)  # a wrong setting is told now, not at the first game
        return partial(found, **options)
    if isinstance(found, type) or not callable(found):
        raise NurtureError(
            f"environment '{spec}': {name} is neither a class with reset and step nor a function."
        )
    signature(found).bind("", None, **options)
    reward = partial(found, **options)
    return lambda: Paid(reward, spec)


def _module(where: str) -> ModuleType:
    """Import a module by name, or a file once."""
    if not where.endswith(".py"):
        return import_module(where)
    file = Path(where).expanduser().resolve()
    name = f"own_environment:{file}"
    if name not in sys.modules:
        found = spec_from_file_location(name, file)
        if found is None or found.loader is None:
            raise ImportError(f"{file} cannot be imported")
        module = sys.modules[name] = module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
