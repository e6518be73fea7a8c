"""Which environments there are, by name: what a recipe's `environment` and the command line's `--env` may say.

`auto` looks at each task: tests make it a programming problem, the world's `wordle` a game, any other answer a problem.
One run can so mix them. To add a game: write `reset` and `step` (protocol.py), and name it as `module:Game` (own.py);
a name in `MAKERS` makes it one of the house's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar, cast

from nurture.environments.own import own_environment
from nurture.environments.protocol import Environment, Observation, StepResult, step_all
from nurture.environments.wordle import Wordle, WordleConfig
from nurture.errors import NurtureError, did_you_mean
from nurture.recipe import Document, Section, check

Make = Callable[[], Environment]
S = TypeVar("S", bound=Section)

REMOTE = "openenv:"
"""What comes before the address of a server."""
_WORLD_TASKS = {
    "wordle": "world:tasks:wordle",
    "math": "world:tasks:arithmetic",
    "code": "world:tasks:code",
    "auto": "world:tasks:arithmetic,code,wordle",
}
_MOST_TASKS = 500
"""Tasks taken from a source without end."""


def name_of(spec: str) -> str:
    """Return what measures call an environment: its name, `openenv` for any server, NAME of `module:NAME`."""
    return spec.partition(":")[0] if spec.startswith(REMOTE) else spec.rpartition(":")[2]


def environment_maker(spec: str = "auto", options: Mapping[str, Any] | None = None) -> Make:
    """Return a function that makes one environment a call.

    Args:
        spec: `auto`, `wordle`, `math`, `code`, `openenv:URL` for a game on an OpenEnv server, or `module:NAME` for a
            class or a reward function of one's own.
        options: settings of the environment; with `auto` by the name of each (`{"wordle": {...}}`).

    Raises:
        NurtureError: there is no such environment, or it has no such setting.
    """
    if spec not in MAKERS and ":" not in spec:
        hint = did_you_mean(spec, MAKERS) or f" There are {', '.join(MAKERS)}, openenv:URL and module:NAME."
        raise NurtureError(f"there is no environment '{spec}'.{hint}")
    try:
        if spec.startswith(REMOTE):
            return _openenv(spec.removeprefix(REMOTE), dict(options or {}))
        if ":" in spec:
            return own_environment(spec, dict(options or {}))
        return MAKERS[spec](dict(options or {}))
    except TypeError as error:
        raise NurtureError(f"environment '{spec}': {error}") from error


def kind_of(task: Any) -> str:
    """Return the environment that a task or row belongs to.

    Raises:
        NurtureError: nothing checks it.
    """
    kind = getattr(task, "kind", None) or (getattr(task, "metadata", None) or {}).get("kind")
    if kind == "wordle":
        return "wordle"
    if getattr(task, "tests", None):
        return "code"
    if getattr(task, "answer", None):
        return "math"
    raise NurtureError(
        f"this {kind or 'task'} has neither an answer nor tests, so no environment can score it; "
        "choose data with answers (world:tasks:arithmetic, GSM8K rows), tests, or world:tasks:wordle"
    )


def tasks_for(name: str, options: Mapping[str, Any], data: str | None, split: str) -> list[Any]:
    """Return tasks to play where nobody brings any: rows of `data`, by default the world's.

    Wordle with lists of its own, and games on a server or of one's own, need none: the list is empty, the seed decides.

    Raises:
        NurtureError: the split is unknown, the data is missing, or it holds nothing of this kind.
    """
    from nurture.data.sources import is_endless, read_rows

    if split not in ("train", "heldout", "all"):
        raise NurtureError(f"--split {split}: should be train, heldout or all.")
    if data is None and (":" in name or options.get("answers")):
        return []
    spec = data or _WORLD_TASKS.get(name, "world:tasks")
    count = _MOST_TASKS if is_endless(spec) else None
    rows = islice(read_rows(spec, split=cast(Any, split)), count)
    tasks = [row for row in rows if _plays(name, row)]
    if not tasks:
        raise NurtureError(f"{spec}: no {split} row there is a task for {name}.")
    return tasks


def _plays(name: str, row: Any) -> bool:
    try:
        return ":" in name or name in ("auto", kind_of(row))
    except NurtureError:
        return False


class ByTask:
    """Becomes the environment that its task belongs to."""

    def __init__(self, makers: Mapping[str, Make]) -> None:
        """Keep how each kind is made."""
        self._makers = makers

    def reset(self, task: Any, seed: int) -> Observation:
        """Start the task's own environment."""
        self._inner = self._makers[kind_of(task)]()
        return self._inner.reset(task, seed)

    def step(self, action: str) -> StepResult:
        """Step it."""
        return self._inner.step(action)

    @staticmethod
    def step_many(environments: Sequence[ByTask], actions: Sequence[str]) -> list[StepResult]:
        """Step all, those of a kind together."""
        return step_all([environment._inner for environment in environments], actions)


def _wordle(options: dict[str, Any]) -> Make:
    # Word lists are read once; reset gives every copy its own game.
    first = Wordle(_checked(WordleConfig, "wordle", options))
    return lambda: copy.copy(first)


def _math(options: dict[str, Any]) -> Make:
    from nurture.environments.math import Math

    _no_options(options)
    return Math


def _code(options: dict[str, Any]) -> Make:
    from nurture.environments.code import Code
    from nurture.rewards.sandbox import Sandbox

    sandbox = Sandbox(**options)
    return lambda: Code(sandbox)


def _openenv(url: str, options: dict[str, Any]) -> Make:
    from nurture.environments.openenv import OpenEnv, OpenEnvConfig, Server

    server = Server(url, _checked(OpenEnvConfig, "openenv", options))
    return lambda: OpenEnv(server)


class _Lazy(dict[str, Make]):
    """Makers by kind, made when the first task of a kind comes: no sandbox starts for sums."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._options = options

    def __missing__(self, name: str) -> Make:
        self[name] = environment_maker(name, self._options.get(name))
        return self[name]


def _auto(options: dict[str, Any]) -> Make:
    if unknown := set(options) - {"wordle", "math", "code"}:
        raise TypeError(
            f"the settings of auto are by environment (wordle, math, code), got {', '.join(unknown)}"
        )
    makers = _Lazy(options)
    return lambda: ByTask(makers)


def _no_options(options: dict[str, Any]) -> None:
    if options:
        raise TypeError(f"it has no settings, got {', '.join(options)}")


def _checked(section: type[S], name: str, options: dict[str, Any]) -> S:
    """Build the settings of an environment, or name every wrong one."""
    document = Document(f"environment '{name}'", options)
    config = check(section, document)
    document.raise_problems()
    assert config is not None  # check() noted a problem otherwise
    return config


MAKERS: dict[str, Callable[[dict[str, Any]], Make]] = {
    "auto": _auto,
    "wordle": _wordle,
    "math": _math,
    "code": _code,
}
"""Name -> settings -> maker."""
