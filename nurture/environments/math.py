"""Problems with one right answer, as games of a single step: a row of GSM8K, or a sum of the world.

The reply earns 1 if the one final answer it states is right (rewards/math.py), else 0. Failure mode: answers that are
listed rather than found; a reply that states several earns nothing. If the grader itself fails, `info["grader_error"]`
says so, as the code environment's does: such a rollout is to be left out.
"""

from __future__ import annotations

from typing import Any

from nurture.environments.protocol import Observation, StepResult, prompt_of
from nurture.errors import NurtureError
from nurture.rewards.math import check_math


class Math:
    """One problem."""

    def reset(self, task: Any, seed: int = 0) -> Observation:
        """Put a task or row that has an `answer`."""
        if not getattr(task, "answer", None):
            raise NurtureError(
                "the math environment needs problems with an answer (answer, or GSM8K's #### 42)"
            )
        self._answer: str = task.answer
        return Observation(prompt_of(task))

    def step(self, action: str) -> StepResult:
        """Grade the reply."""
        verdict = check_math(action, self._answer)
        paid = float(verdict.correct)
        text = "That is right." if verdict.correct else f"The answer is {self._answer}."
        info = {"won": verdict.correct, "grader_error": verdict.grader_error}
        return StepResult(Observation.of(text), paid, True, {"correct": paid}, info)
