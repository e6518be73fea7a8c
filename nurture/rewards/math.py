"""Is the final answer of a reply right? Numbers are compared exactly; other answers as text without blanks and case.

A final answer is `\\boxed{42}`, `#### 42`, `Answer: 42`, or a reply that is nothing but the answer. A reply that states
several different ones, or hedges ("41 or 42"), states none: a list of guesses earns nothing, which is the main way to
cheat here. Fractions, percent, thousands separators and units after the number are understood; algebra is not.
"""

from __future__ import annotations

import re
from fractions import Fraction

from nurture.world.grading import without_thoughts

_STATED = re.compile(
    r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|####[ \t]*([^\n]+)|answer(?:\s+is)?\s*:?[ \t]+([^\n]+)", re.I
)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?")
_UNIT = re.compile(r"(?:\\?%|°|[A-Za-z][A-Za-z.²³/]*)(?: [A-Za-z]+)?")


def _number(text: str) -> tuple[Fraction, bool] | None:
    """Return the number that `text` is and whether it is percent; None if it is not one number with a unit."""
    text = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = (
        re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r" \1", text)
        .strip(" $.\\")
        .replace("\\$", "")
        .replace("\\!", "")
    )
    found = _NUMBER.match(text)
    if found is None or not any(map(str.isdigit, found[0])) or len(found[0]) > 60:
        return None
    rest = text[found.end() :].strip()
    if (rest and not _UNIT.fullmatch(rest)) or re.match(r"(or|and|to)\b", rest, re.I):
        return None
    try:
        return Fraction(found[0].replace(",", "")), rest.endswith("%") or rest.lower().startswith("percent")
    except (ValueError, ZeroDivisionError):
        return None


def _same(stated: str, wanted: str) -> bool:
    ours, theirs = _number(stated), _number(wanted)
    if ours is None or theirs is None:
        return ours is theirs and _plain(stated) == _plain(wanted) != ""
    if ours[1] != theirs[1]:  # one side wrote percent, the other the number of percents or the share
        return ours[0] == theirs[0] or ours[0] == theirs[0] * (100 if ours[1] else Fraction(1, 100))
    return ours[0] == theirs[0]


def _plain(text: str) -> str:
    return re.sub(r"\s+", "", text).strip("$.").lower()


def grade_math(reply: str, answer: str) -> bool:
    """Return whether the one final answer that `reply` states equals `answer`.

    Args:
        reply: a completion; its `<think>` part is ignored.
        answer: the right answer; of a GSM8K solution the part after `####`.
    """
    reply, answer = without_thoughts(reply), answer.rsplit("####", 1)[-1].strip()
    stated = [next(filter(None, groups)).strip() for groups in _STATED.findall(reply) if any(groups)] or [
        reply
    ]
    return all(_same(text, answer) for text in stated)
