"""Is the final answer of a reply right? Numbers are compared exactly, algebra by math-verify.

A final answer is `\\boxed{42}`, `#### 42`, `Answer: 42`, or a reply that is nothing but the answer. A reply that states
several different ones, or hedges ("41 or 42"), is wrong: a list of guesses earns nothing, which is the main way to
cheat here. Fractions, percent, thousands separators and units after the number are understood.

What is no plain number goes to math-verify (symbolic equality through sympy) in a process of its own, behind seccomp,
that is killed when it takes too long: sympy can be kept busy for ever, and math-verify's own time limit works in the
main thread only. A failure of that process is reported as `grader_error`, apart from a wrong answer; so is a right
answer that math-verify cannot read, against which every reply would be wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from nurture.errors import NurtureError
from nurture.world.grading import without_thoughts

_BOXED = r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_STATED = re.compile(
    rf"####[ \t]*([^\n]+)|\banswer(?:\s+is)?[ \t]*:[ \t]*([^\n]+)|\banswer\s+is[ \t]+([^\n]+)|{_BOXED}",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?")
_UNIT = re.compile(r"(?:%|°|[A-Za-z][A-Za-z./²³]*(?:\^\{?[23]\}?)?)(?: [A-Za-z]+)?")
_HEDGE = re.compile(r",|;|\bor\b|\band\b|\\lor|\\pm|±|\\cup|\bto\b")
_SECONDS = 5.0


@dataclass(frozen=True)
class MathVerdict:
    """Whether the reply is right, what it states, and whether we (not the reply) failed."""

    correct: bool
    stated: tuple[str, ...] = ()
    grader_error: bool = False


def check_math(reply: str, answer: str) -> MathVerdict:
    """Say whether the one final answer that `reply` states equals `answer`.

    Args:
        reply: a completion; its `<think>` part is ignored.
        answer: the right answer; of a GSM8K solution the part after `####`.

    Returns:
        The verdict; where `grader_error` is set it is none, and the sample should be left out.

    Raises:
        NurtureError: the answers need math-verify, which is not installed.
    """
    stated = tuple(final_answers(reply))
    wanted = _tidy(answer.rsplit("####", 1)[-1])
    try:
        return MathVerdict(all(_same(text, wanted) for text in stated), stated)
    except _VerifierError:
        return MathVerdict(False, stated, grader_error=True)


def final_answers(reply: str) -> list[str]:
    """Return every final answer that a reply states, without repeats; the whole reply if it marks none."""
    reply = without_thoughts(reply).replace("**", "")
    marked = [next(filter(None, groups), "") for groups in _STATED.findall(reply)]
    return list(dict.fromkeys(map(_tidy, marked or [reply])))


def _tidy(text: str) -> str:
    """Strip what surrounds an answer: a box, dollar signs, a full stop, `x =`."""
    boxed = re.search(_BOXED, text)
    if boxed:
        text = boxed[1]
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", text.strip())
    text = re.sub(r"\\[!,;:]|\\left|\\right|\\displaystyle", "", text).replace("\\%", "%").replace("\\$", "$")
    text = text.strip().rstrip(".").strip("$ ").removeprefix("\\(").removesuffix("\\)").strip()
    return re.sub(r"^[A-Za-z]\s*=\s*", "", text)


def _number(text: str) -> tuple[Fraction, bool] | None:
    """Return the number that `text` is and whether it is percent; None if it is not one number with a unit."""
    text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    found = _NUMBER.match(text)
    if found is None or not any(map(str.isdigit, found[0])) or len(found[0]) > 60:
        return None
    rest = text[found.end() :].strip().removeprefix("^\\circ").strip()
    if rest and (not _UNIT.fullmatch(rest) or _HEDGE.search(rest)):
        return None
    # `3x` is algebra, `3 km` and `3km` are not
    if len(rest) == 1 and rest.isalpha() and not text[found.end() :].startswith(" "):
        return None
    try:
        return Fraction(found[0].replace(",", "")), rest.lower().startswith(("%", "percent"))
    except (ValueError, ZeroDivisionError):
        return None


def _same(stated: str, wanted: str) -> bool:
    if not stated or not wanted:
        return False
    ours, theirs = _number(stated), _number(wanted)
    if ours and theirs:
        if ours[1] != theirs[1]:  # one side wrote percent, the other the number of percents or the share
            share = ours[0] / 100 if ours[1] else ours[0] * 100
            return theirs[0] in (ours[0], share)
        return ours[0] == theirs[0]
    if re.sub(r"\s+", "", stated).lower() == re.sub(r"\s+", "", wanted).lower():
        return True
    if len(_HEDGE.findall(stated)) != len(_HEDGE.findall(wanted)) or len(stated) > 500:
        return False
    if not re.search(r"[\d\\^=()]", stated + wanted) and max(len(stated), len(wanted)) > 2:
        return False  # words, and they differ
    return _verify(stated, wanted)


# --- math-verify in a process that can be killed ---------------------------------------------------------------------


class _VerifierError(Exception):
    """The process of math-verify failed twice, or cannot read the right answer."""


_process: subprocess.Popen[bytes] | None = None
_lock = threading.Lock()


def _verify(stated: str, wanted: str) -> bool:
    """Ask math-verify; what it cannot decide in time is not equal.

    Raises:
        NurtureError: math-verify is not installed.
        _VerifierError: its process died, not for want of time; or `wanted` is nothing that it can read.
    """
    if find_spec("math_verify") is None:
        raise NurtureError(
            f"comparing {stated!r} with {wanted!r} needs math-verify: pip install math-verify. Plain numbers do not."
        )
    question = (json.dumps([wanted, stated]) + "\n").encode()
    with _lock:
        for _ in range(2):
            process = _started()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(question)
                process.stdin.flush()
                if not select.select([process.stdout], [], [], _SECONDS)[0]:
                    _stop()
                    return False
                answer = process.stdout.readline()
            except OSError:
                answer = b""
            if answer == b"null\n":
                raise _VerifierError
            if answer:
                return answer == b"true\n"
            _stop()
    raise _VerifierError


def _started() -> subprocess.Popen[bytes]:
    global _process
    if _process is None:
        root = Path(__file__).resolve().parent.parent.parent
        program = f"import sys; sys.path.insert(0, {str(root)!r}); from nurture.rewards.math import _serve; _serve()"
        _process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert _process.stdout is not None
        select.select(
            [_process.stdout], [], [], 60
        )  # importing sympy takes a second, which no question should pay
        _process.stdout.readline()
    return _process


@atexit.register
def _stop() -> None:
    """End the process of math-verify; the next question starts another."""
    global _process
    if _process is not None:
        _process.kill()
        _process.wait()
        for stream in (_process.stdin, _process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        _process = None


def _serve() -> None:
    """Answer questions on standard input until it ends: the process of math-verify."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(text: str) -> list[object]:
        # Only LaTeX: math-verify hands plain expressions to sympy's parser, which evaluates Python.
        found: list[object] = parse(
            f"\\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None
        )
        return found

    if sys.platform == "linux":
        from nurture.rewards import walls

        with contextlib.suppress(OSError):  # sympy runs nothing, so this is a second wall and may be missing
            verify(parsed("\\frac{x}{2}+1"), parsed("1+x/2"), timeout_seconds=None)  # imports what it needs
            walls.landlock(None)
            walls.seccomp(walls.seccomp_program())
    print("ready", flush=True)
    for line in sys.stdin:
        wanted, stated = (parsed(text) for text in json.loads(line))
        try:
            same = bool(stated and verify(wanted, stated, timeout_seconds=None))
        except Exception:
            same = False
        print(json.dumps(same if wanted else None), flush=True)
