"""From the tokens of a completion to what a client shall read: text, where it stops, thoughts, tool calls.

All of it works piece by piece, for streams: what may still turn out to be the beginning of a stop string or of a tag is
held back until that is known, so that no client ever sees half a tag.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from nurture.inference.chat import TextStream
from nurture.tokenizer import Tokenizer

_THINK, _THOUGHT = "<think>", "</think>"
_CALL = "<tool_call>"


class StoppingText:
    """Text of a completion that ends before the first of some stop strings.

    Attributes:
        stopped: one of them was found; nothing follows.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], skip_special: bool) -> None:
        self._stream = TextStream(tokenizer, skip_special=skip_special)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; return what is certain now."""
        return self._release(self._stream.add(token))

    def finish(self) -> str:
        """Return what is left, a broken character as U+FFFD."""
        released = self._release(self._stream.finish())
        rest, self._held = self._held, ""
        return released + rest

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _overlap(text: str, wanted: str) -> int:
    """Return the length of the longest beginning of `wanted` that `text` ends with, short of all of it."""
    return next((n for n in range(min(len(text), len(wanted) - 1), 0, -1) if text.endswith(wanted[:n])), 0)


class ReplyParts:
    """A reply as it grows, in its parts: what was thought, what is said, and tools that are called.

    Attributes:
        reasoning, content: what is certain so far.
    """

    def __init__(self, starts_thinking: bool = False, with_tools: bool = False) -> None:
        """Begin a reply; `starts_thinking` where the prompt has opened the thought already."""
        self.reasoning, self.content = "", ""
        self._text = _THINK if starts_thinking else ""
        self._with_tools = with_tools

    def add(self, piece: str, final: bool = False) -> tuple[str, str]:
        """Take a piece of text; return what it adds to (reasoning, content)."""
        self._text += piece
        reasoning, content = split_thought(self._text, final)
        if self._with_tools:
            at = content.find(_CALL)
            if at >= 0 and not (
                final and not self.tool_calls()
            ):  # a call that cannot be read is said as it stands
                content = content[:at]
            elif not final:
                content = _without_beginning(content, _CALL)
        added = reasoning[len(self.reasoning) :], content[len(self.content) :]
        self.reasoning, self.content = reasoning, content
        return added

    def tool_calls(self) -> list[dict[str, Any]]:
        """Return the calls in the finished reply, in OpenAI's form; malformed ones are left out."""
        if not self._with_tools:
            return []
        said = split_thought(self._text, True)[1]
        return [call for body in _CALLS.findall(said) if (call := _tool_call(body))]


_CALLS = re.compile(rf"{_CALL}\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


def split_thought(text: str, final: bool = True) -> tuple[str, str]:
    """Split a reply into what was thought and what is said; while it grows (not `final`) only what is certain.

    A thought that never ends is all thought: nothing was said.
    """
    body = text.lstrip()
    if not body.startswith(_THINK):
        undecided = not final and _THINK.startswith(body)
        return "", "" if undecided else text
    body = body[len(_THINK) :].lstrip("\n")
    at = body.find(_THOUGHT)
    if at >= 0:
        return body[:at].rstrip("\n"), body[at + len(_THOUGHT) :].lstrip("\n")
    return (body if final else _without_beginning(body, _THOUGHT).rstrip("\n")), ""


def _without_beginning(text: str, wanted: str) -> str:
    return text[: len(text) - _overlap(text, wanted)]


def _tool_call(body: str) -> dict[str, Any] | None:
    try:
        call = json.loads(body)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError):
        return None
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": str(name), "arguments": written}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
