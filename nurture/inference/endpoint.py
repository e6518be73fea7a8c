"""Ask a model behind an OpenAI-compatible HTTP endpoint: a teacher, a judge, a strong or a weak model.

One call sends many conversations, a few at a time, and returns their replies in order. What can pass is waited for and
tried again (a busy server, a lost connection, a timeout); what cannot (a wrong key, model or address) stops at once
with what the server said. A single conversation that the server refuses (too long, filtered) is not the end of a long
job: its reply has the finish reason "error", for the caller to count.

Only the standard library is used. The key is read from the environment and never written anywhere.
API: POST {url}/chat/completions, as published by OpenAI and served by vLLM, llama.cpp, Ollama and others.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from nurture.errors import NurtureError
from nurture.recipe import Section
from nurture.types import Message

log = logging.getLogger(__name__)

_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP statuses that may be different a moment later."""
_REFUSED = (400, 413, 422)
"""HTTP statuses that concern one conversation."""
_LONGEST_WAIT = 60.0


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible endpoint."""

    url: str
    """Address up to and including the version: http://localhost:8000/v1."""
    model: str
    """Name of the model as the server knows it."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; none is sent where it is not set."""
    parallel: PositiveInt = 8
    """Requests under way at once."""
    timeout: PositiveFloat = 300.0
    """Seconds one request may take."""
    retries: NonNegativeInt = 6
    """Times a request is sent again before giving up; waits double from one second."""
    options: dict[str, Any] = {}
    """Further fields of the request body, such as `top_p` or `chat_template_kwargs`."""


@dataclass(frozen=True)
class EndpointReply:
    """What the server answered.

    Attributes:
        text: the assistant's message.
        reasoning: the trace, where the server sends it apart from the message.
        finish_reason: "stop", "length", what else the server says, or "error" (it refused this conversation).
        tokens: completion tokens as the server counts them, 0 where it does not.
        error: what the server said, for finish reason "error".
    """

    text: str
    reasoning: str = ""
    finish_reason: str = "stop"
    tokens: int = 0
    error: str = ""


def ask_endpoint(
    config: EndpointConfig,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> list[EndpointReply]:
    """Return the endpoint's reply to each conversation.

    Args:
        conversations: the last message is the user's.
        max_tokens: longest reply.
        temperature: 0 for the most likely reply.
        seeds: one a conversation; servers may ignore them.

    Raises:
        NurtureError: the address, the key or the model is wrong, or the server stayed unreachable.
    """
    bodies = [
        {
            "model": config.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            **({"seed": seeds[index]} if seeds is not None else {}),
            **config.options,
        }
        for index, messages in enumerate(conversations)
    ]
    with ThreadPoolExecutor(max_workers=config.parallel) as pool:
        futures = [pool.submit(_ask_one, config, body) for body in bodies]
        try:
            return [future.result() for future in futures]
        except BaseException:
            # The first mistake is everybody's: do not send the rest.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ask_one(config: EndpointConfig, body: Mapping[str, Any]) -> EndpointReply:
    """Send one request until it is answered."""
    for attempt in range(config.retries + 1):
        try:
            return _parse_reply(_post(config, body), _address(config))
        except urllib.error.HTTPError as error:
            said = _said(error)
            if error.code in _REFUSED:
                log.warning("%s refused one conversation (%s): %s", _address(config), error.code, said)
                return EndpointReply("", finish_reason="error", error=said)
            if error.code not in _PASSING:
                raise NurtureError(
                    f"{_address(config)}: {error.code} {said}{_remedy(config, error.code)}"
                ) from error
            reason, wait = f"{error.code} {said}", _number(error.headers.get("Retry-After"))
        except OSError as error:  # refused, reset, timed out, no such host
            reason, wait = str(getattr(error, "reason", None) or error), None
        if attempt < config.retries:
            # Requests that failed together must not all come back together.
            time.sleep(min(wait or 2.0**attempt * (0.5 + random.random()), _LONGEST_WAIT))
    raise NurtureError(
        f"{_address(config)}: no answer after {config.retries + 1} tries ({reason}). Is the server running, and is the"
        " address right? What was made so far is kept: run the same command again to go on."
    )


def _address(config: EndpointConfig) -> str:
    return config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def _post(config: EndpointConfig, body: Mapping[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(config.key_variable):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(_address(config), json.dumps(body).encode(), headers)
    except ValueError as error:
        raise NurtureError(
            f"endpoint url '{config.url}' is not an address ({error}): http://HOST:PORT/v1"
        ) from error
    with urllib.request.urlopen(request, timeout=config.timeout) as response:
        content = response.read()
    try:
        return json.loads(content)
    except ValueError as error:
        raise NurtureError(
            f"{_address(config)}: answered with something that is not JSON ({error})"
        ) from error


def _parse_reply(answer: Any, address: str) -> EndpointReply:
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        return EndpointReply(
            text=message.get("content") or "",
            reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
            finish_reason=choice.get("finish_reason") or "stop",
            tokens=int((answer.get("usage") or {}).get("completion_tokens") or 0),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        shown = json.dumps(answer)[:200]
        raise NurtureError(
            f"{address}: not a chat completion: {shown}. Is this an OpenAI-compatible server?"
        ) from error


def _said(error: urllib.error.HTTPError) -> str:
    """Return the server's own words."""
    text = error.read().decode("utf-8", "replace").strip()
    try:
        content = json.loads(text)
        inner = content.get("error", content) if isinstance(content, dict) else content
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)[:300]
    except ValueError:
        return text[:300] or str(error.reason)


def _remedy(config: EndpointConfig, status: int) -> str:
    if status in (401, 403):
        state = "is not set" if config.key_variable not in os.environ else "holds a key that was not accepted"
        return f". The environment variable {config.key_variable} {state}."
    if status == 404:
        return f". Check the url ({config.url}) and the model's name ({config.model})."
    return ""


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:  # a date
        return None
