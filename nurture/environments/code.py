"""Programming problems as games of a single step: HumanEval, MBPP, or a function of the world.

The program in the reply earns 1 if it passes every test in the sandbox (rewards/code.py), else 0. Replies of one step
are run together on the warm pool. If the sandbox itself fails, the reply earns nothing and `info["grader_error"]` says
so: such a rollout is to be left out, not to be learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nurture.environments.protocol import Observation, StepResult, prompt_of
from nurture.rewards.code import CodeVerdict, code_task, grade_code
from nurture.rewards.sandbox import Sandbox


class Code:
    """One problem; the sandbox is shared."""

    def __init__(self, sandbox: Sandbox) -> None:
        """Keep the sandbox that programs run in."""
        self.sandbox = sandbox

    def reset(self, task: Any, seed: int = 0) -> Observation:
        """Put a task or row that has tests."""
        self._task = code_task(task)
        return Observation(prompt_of(task))

    def step(self, action: str) -> StepResult:
        """Run the program in the reply."""
        return self.step_many([self], [action])[0]

    @staticmethod
    def step_many(environments: Sequence[Code], actions: Sequence[str]) -> list[StepResult]:
        """Run all programs at once."""
        verdicts = grade_code(actions, [one._task for one in environments], environments[0].sandbox)
        return [_result(verdict) for verdict in verdicts]


def _result(verdict: CodeVerdict) -> StepResult:
    passed = verdict.passed and not verdict.grader_error
    text = "All tests pass." if passed else f"The tests do not pass: {verdict.reason}"
    info = {"won": passed, "reason": verdict.reason, "grader_error": verdict.grader_error}
    return StepResult(Observation.of(text), float(passed), True, {"correct": float(passed)}, info)
