"""Games that run somewhere else: any OpenEnv server, played like an environment of our own.

The server owns the game and its tasks; the seed of the episode is all it is told (31 bits, which every server's
generator takes). Text goes into the one text field of its actions, and its observation is read as text again: the
turns that our own server adds, textarena's messages (which repeat all that was said before: only what is new is
passed on), or the one field that holds text. Rewards are summed as they come.

One connection is one game. It is opened when a game begins and used again when the game is over. A connection that
breaks is opened anew and the game played again from its seed; where that does not lead to the same place, the episode
fails loudly. Main failure mode, found in published servers: the seed is ignored, so members of a group play different
games and their advantages mean nothing. The first group in which two members read different openings is therefore an
error.

Source: OpenEnv 0.10's messages on `/ws` (simulation mode).
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import PositiveFloat

from nurture.environments.protocol import Observation, StepResult
from nurture.errors import NurtureError, did_you_mean
from nurture.recipe import Section
from nurture.types import Message

SEEDS = 2**31
"""Seeds are folded below this: what the generators of other servers take."""
_TRIES = (0.0, 0.3, 1.0, 3.0)
"""Seconds before each try to connect."""
_LOCAL = ("localhost", "127.0.0.1", "::1")

T = TypeVar("T")


class OpenEnvConfig(Section):
    """How a server is played."""

    action: str | None = None
    """Field of the action that takes the policy's text; by default its only text field."""
    observation: str | None = None
    """Field of the observation that is put to the policy; by default turns, messages, prompt, or the only text."""
    token: str | None = None
    """Shown to servers that want one."""
    timeout: PositiveFloat = 60.0
    """Seconds that the server may take to answer."""


class Server:
    """An OpenEnv server, and connections to it that no game uses at the moment.

    Attributes:
        address: `http://HOST:PORT`, without a slash at the end.
        field: name of the action's field that takes text.
    """

    def __init__(self, url: str, config: OpenEnvConfig | None = None) -> None:
        """Ask the server what its actions look like.

        Raises:
            NurtureError: nothing answers there, it is no OpenEnv server, or text alone cannot play it.
        """
        try:
            import websockets  # noqa: F401
        except ModuleNotFoundError:
            raise NurtureError(
                "playing an OpenEnv server needs the extra package: pip install 'nurture[openenv]'"
            ) from None
        self.config = config or OpenEnvConfig()
        self.address = _http_address(url)
        self.field = self.config.action or _text_field(self._schema(), self.address)
        self._idle: list[Any] = []
        self._openings: dict[int, str] = {}

    def _schema(self) -> dict[str, Any]:
        """Return the JSON schema of an action."""
        request = urllib.request.Request(f"{self.address}/schema", headers=self._headers())
        local = urlsplit(self.address).hostname in _LOCAL
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
        try:
            with opener.open(request, timeout=self.config.timeout) as answer:
                schema = json.loads(answer.read())["action"]
        except urllib.error.HTTPError as error:
            raise NurtureError(_refusal(self.address, error.code)) from error
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            raise NurtureError(_nobody(self.address, reason)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise NurtureError(
                f"{self.address}/schema does not describe an OpenEnv server's actions"
            ) from error
        return schema if isinstance(schema, dict) else {}

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.config.token}"} if self.config.token else {}

    async def line(self, fresh: bool = False) -> Any:
        """Return a connection: an idle one, or a new one.

        Raises:
            NurtureError: nobody answers.
        """
        from websockets.asyncio.client import connect
        from websockets.exceptions import InvalidHandshake, InvalidStatus

        if self._idle and not fresh:
            return self._idle.pop()
        address = f"ws{self.address.removeprefix('http')}/ws"
        options: dict[str, Any] = {"proxy": None} if urlsplit(address).hostname in _LOCAL else {}
        problem: Exception | None = None
        for pause in _TRIES:
            await asyncio.sleep(pause)
            try:
                return await connect(
                    address,
                    additional_headers=self._headers(),
                    max_size=None,
                    open_timeout=self.config.timeout,
                    **options,
                )
            except InvalidStatus as error:
                raise NurtureError(_refusal(self.address, error.response.status_code)) from error
            except (OSError, InvalidHandshake) as error:
                problem = error
        raise NurtureError(_nobody(self.address, problem)) from problem

    def give_back(self, line: Any) -> None:
        """Keep a connection for the next game."""
        self._idle.append(line)

    async def ask(self, line: Any, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and return the data of the answer.

        Raises:
            NurtureError: the server refuses, or does not answer in time.
            websockets.exceptions.ConnectionClosed: the connection broke.
        """
        from websockets.exceptions import ConnectionClosed

        with suppress(
            ConnectionClosed
        ):  # a server that is full says so and hangs up: its words can still be read
            await line.send(json.dumps({"type": kind, "data": data}))
        try:
            answer = json.loads(await asyncio.wait_for(line.recv(), self.config.timeout))
        except (TimeoutError, asyncio.TimeoutError):
            await line.close()  # or its late answer would be taken for the next one
            raise NurtureError(
                f"{self.address} did not answer a {kind} within {self.config.timeout:g} s "
                "(the environment's setting `timeout`)"
            ) from None
        said: dict[str, Any] = answer.get("data") or {}
        if answer.get("type") == "error":
            await line.close()
            hint = "; let it take more (`--sessions`), or play fewer games at once" * (
                said.get("code") == "CAPACITY_REACHED"
            )
            raise NurtureError(f"{self.address}: {said.get('message')} ({said.get('code')}){hint}")
        return said

    def remember(self, seed: int, opening: str) -> None:
        """Note what a game of this seed began with.

        Raises:
            NurtureError: another one of the same seed began differently.
        """
        if self._openings.setdefault(seed, opening) != opening:
            raise NurtureError(
                f"{self.address} gives different games for the same seed, so completions of one group cannot be "
                "compared; use a server that honours `seed`"
            )


class OpenEnv:
    """One game on a server."""

    def __init__(self, server: Server) -> None:
        """Keep the server; a connection is taken when a game begins."""
        self._server = server
        self._line: Any = None

    def __del__(self) -> None:
        self._release()

    def reset(self, task: Any, seed: int) -> Observation:
        """Start a game.

        Args:
            task: not sent: the server owns its tasks.
            seed: folded to 31 bits.

        Raises:
            NurtureError: the server is gone, full, or ignores seeds.
        """
        self._seed, self._actions = seed % SEEDS, list[str]()
        self._heard, self._transcript = list[str](), ""
        self._line, said = _talk(self._begin())
        return Observation(self._hear(said))

    def step(self, action: str) -> StepResult:
        """Send the policy's text."""
        return self.step_many([self], [action])[0]

    @staticmethod
    def step_many(environments: Sequence[OpenEnv], actions: Sequence[str]) -> list[StepResult]:
        """Step all at the same time."""

        async def together() -> list[dict[str, Any]]:
            return await asyncio.gather(
                *(one._step(action) for one, action in zip(environments, actions, strict=True))
            )

        return [one._result(said) for one, said in zip(environments, _talk(together()), strict=True)]

    def _release(self) -> None:
        line, self._line = getattr(self, "_line", None), None
        if line is not None:
            self._server.give_back(line)

    async def _begin(self) -> tuple[Any, dict[str, Any]]:
        """Reset on the connection at hand, or on a new one where that has gone stale."""
        from websockets.exceptions import ConnectionClosed

        line, self._line = self._line or await self._server.line(), None
        try:
            return line, await self._server.ask(line, "reset", {"seed": self._seed})
        except ConnectionClosed:
            line = await self._server.line(fresh=True)
            return line, await self._server.ask(line, "reset", {"seed": self._seed})

    async def _step(self, action: str) -> dict[str, Any]:
        from websockets.exceptions import ConnectionClosed

        if self._line is None:
            raise NurtureError("this game is over (or was never begun); call reset first")
        self._actions.append(action)
        try:
            return await self._server.ask(self._line, "step", {self._server.field: action})
        except ConnectionClosed:
            return await self._play_again()

    async def _play_again(self) -> dict[str, Any]:
        """Come back to where the game was when the connection broke: same seed, same actions, same game."""
        self._line = None
        self._line, said = await self._begin()
        for heard, action in zip(self._heard, self._actions, strict=True):
            if said.get("done") or self._text(said) != heard:
                raise NurtureError(
                    f"{self._server.address} lost its games (was it restarted?) and does not give the same one "
                    "for the same seed, so the episode cannot go on"
                )
            said = await self._server.ask(self._line, "step", {self._server.field: action})
        return said

    def _result(self, said: dict[str, Any]) -> StepResult:
        observation = said.get("observation") or {}
        given: Any = observation.get("info")
        given = given if isinstance(given, dict) else {}
        info = {**(observation.get("metadata") or {}), **(said.get("metadata") or {}), **given}
        parts = info.pop("reward_signals", None) or {}
        done = bool(said.get("done"))
        messages = self._hear(said)
        if done:
            self._release()
        return StepResult(
            Observation(messages),
            float(said.get("reward") or 0.0),
            done,
            {name.rpartition(".")[2]: float(value) for name, value in parts.items()},
            info,
        )

    def _hear(self, said: dict[str, Any]) -> tuple[Message, ...]:
        """Return what an observation adds to the conversation."""
        observation = said.get("observation") or {}
        text = self._text(said)
        if not self._heard:
            self._server.remember(self._seed, text)
        self._heard.append(text)
        turns = observation.get("turns")
        if isinstance(turns, list) and turns and self._server.config.observation is None:
            return tuple({"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns)
        new = text.removeprefix(self._transcript) if self._transcript else text
        self._transcript = text
        return ({"role": "user", "content": new.strip("\n")},)

    def _text(self, said: dict[str, Any]) -> str:
        """Return an observation as text."""
        observation = said.get("observation") or {}
        wanted = self._server.config.observation
        if wanted is not None:
            if wanted not in observation:
                hint = did_you_mean(wanted, observation) or f" It has {', '.join(observation)}."
                raise NurtureError(f"{self._server.address}: its observation has no field '{wanted}'.{hint}")
            return _as_text(observation[wanted])
        messages = observation.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            return "\n".join(str(message.get("content", "")) for message in messages)
        if isinstance(observation.get("prompt"), str) and observation["prompt"]:
            return str(observation["prompt"])
        texts = [value for value in observation.values() if isinstance(value, str)]
        rest = {key: value for key, value in observation.items() if key != "metadata"}
        return texts[0] if len(texts) == 1 else _as_text(rest)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _http_address(url: str) -> str:
    """Return `http(s)://host:port` of what a person wrote."""
    url = url.strip().rstrip("/").removesuffix("/ws").removesuffix("/web")
    if "://" not in url:
        url = f"http://{url}"
    parts = urlsplit(url.replace("ws://", "http://", 1).replace("wss://", "https://", 1))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise NurtureError(
            f"openenv:{url} is no address of a server; write for example openenv:http://127.0.0.1:8000"
        )
    return parts.geturl()


def _text_field(schema: Mapping[str, Any], address: str) -> str:
    """Return the one field of an action that takes text.

    Raises:
        NurtureError: there is none or there are several, or another field must be given as well.
    """
    fields = {
        name: _types(field) for name, field in (schema.get("properties") or {}).items() if name != "metadata"
    }
    required = [name for name in schema.get("required") or () if name in fields]
    texts = [name for name in required if "string" in fields[name]]
    texts = texts or [name for name in fields if "string" in fields[name]]
    listed = ", ".join(f"{name} ({' or '.join(sorted(types)) or 'any'})" for name, types in fields.items())
    if others := [name for name in required if name not in texts]:
        raise NurtureError(
            f"{address}: its actions need {', '.join(others)}, so text alone cannot play it. Fields: {listed}"
        )
    if len(texts) != 1:
        raise NurtureError(
            f"{address}: which field of an action takes the policy's text? Name it in the environment's setting "
            f"`action`. Fields: {listed or 'none'}"
        )
    return texts[0]


def _types(field: Mapping[str, Any]) -> set[str]:
    options = [field, *field.get("anyOf", ())]
    return {str(option["type"]) for option in options if "type" in option}


def _nobody(address: str, reason: object) -> str:
    return f"no OpenEnv server answers at {address} ({reason}). Is it running? `nurture env serve wordle` starts one."


def _refusal(address: str, status: int) -> str:
    if status in (401, 403):
        return f"{address} refuses ({status}): it wants a token (the environment's setting `token`)"
    return f"{address} is no OpenEnv server in simulation mode: it answered {status}"


def _talk(work: Coroutine[Any, Any, T]) -> T:
    """Have the talking thread do it, and wait."""
    return asyncio.run_coroutine_threadsafe(work, _event_loop(os.getpid())).result()


@lru_cache(maxsize=1)
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the loop of a thread of its own: a server's pings are answered also while the caller trains."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="openenv", daemon=True).start()
    return loop
