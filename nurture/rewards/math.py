"""Is the final answer of a reply right? (in work: the signatures stand)"""

from __future__ import annotations


def grade_math(reply: str, answer: str) -> bool:
    """Return whether the one final answer that `reply` states equals `answer`.

    A final answer is `\\boxed{42}`, `#### 42`, `Answer: 42`, or a reply that is nothing but the answer. A reply that
    states several different ones, or hedges ("41 or 42"), is wrong. A `<think>` part is ignored.
    """
    raise NotImplementedError
