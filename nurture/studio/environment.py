"""An environment as an OpenEnv server: any OpenEnv client, TRL's scripts too, can play it and train against it.

`/ws` is the session protocol (one connection, one game after another), `/reset`, `/step` and `/state` the same over
HTTP, `/schema`, `/metadata` and `/health` what clients ask first, and `/web/` a page for people. Messages have
OpenEnv's shapes, observations those of its textarena games: `messages[0].content` is everything the game has said so
far, since TRL's scripts cut the new part off it themselves. `turns` holds what is new, as turns of a conversation; our
own client reads those.

A seed decides the task and the game, so equal seeds are equal games on every connection (upstream's textarena games
ignore it). Actions that arrive while others are computed are stepped together, which keeps a sandbox busy. Main
failure mode: what a client sends. It is answered in the protocol's own error shape and the session goes on.

Over HTTP a game is found by its `episode_id`; a request without one means the latest game.

Source: OpenEnv 0.10 (src/openenv/core), its textarena environment, and issue huggingface/OpenEnv#1078 for the seeds.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from nurture import __version__
from nurture.environments.catalog import Make
from nurture.environments.protocol import Environment, StepResult, step_all
from nurture.errors import NurtureError
from nurture.studio.guard import Guard, token_for
from nurture.studio.server import TYPES, listen, run, shown_host
from nurture.types import Message
from nurture.world.split import pick, random_for

_LONGEST = 200_000
"""Characters of an action."""


class Action(BaseModel):
    """What a client does: it writes."""

    model_config = ConfigDict(extra="forbid")

    message: str = Field(max_length=_LONGEST, description="What the player writes.")
    metadata: dict[str, Any] = {}


class ResetRequest(BaseModel):
    """How a game begins; other parameters of other environments are let pass."""

    model_config = ConfigDict(extra="ignore")

    seed: int | None = Field(default=None, ge=0, description="Decides the task and the game.")
    episode_id: str | None = Field(default=None, max_length=255)


class StepRequest(BaseModel):
    """An action over HTTP."""

    model_config = ConfigDict(extra="ignore")

    action: Action
    episode_id: str | None = None


class GameMessage(BaseModel):
    """What was said, in textarena's shape."""

    sender_id: int
    content: str
    category: str


class GameObservation(BaseModel):
    """What a player sees; reward and end of the game stand beside it."""

    prompt: str = Field(description="What the game says now.")
    messages: list[GameMessage] = Field(description="One message: all that the game has said so far.")
    turns: list[dict[str, str]] = Field(description="What the game says now, as turns with role and content.")
    current_player_id: int = 0
    legal_players: list[int] = [0]
    info: dict[str, Any] = Field(
        default={}, description="won, and reward_signals: the unweighted parts of the reward by name."
    )
    metadata: dict[str, Any] = {}


class GameState(BaseModel):
    """Where a session stands."""

    episode_id: str | None = None
    step_count: int = 0
    env_id: str = ""
    done: bool = False
    history: list[dict[str, str]] = Field(
        default=[], description="Guesses and their marks, where it is Wordle."
    )


@dataclass(frozen=True)
class Offer:
    """What a server offers.

    Attributes:
        name: of the environment.
        make: makes one game.
        tasks: what games are drawn from by their seed; empty where the seed alone decides.
        sessions: most games at a time, of either protocol.
    """

    name: str
    make: Make
    tasks: Sequence[Any] = ()
    sessions: int = 1024

    def task(self, seed: int) -> Any:
        """Return the task of a seed."""
        return pick(random_for("openenv", seed), self.tasks) if self.tasks else None


class SessionError(NurtureError):
    """A message that cannot be answered.

    Attributes:
        code: OpenEnv's name for the mistake.
        errors: pydantic's list, where it is about fields.
    """

    def __init__(self, code: str, message: str, errors: list[Any] | None = None) -> None:
        super().__init__(message)
        self.code, self.errors = code, errors

    @property
    def data(self) -> dict[str, Any]:
        """The error as clients read it."""
        return {"message": str(self), "code": self.code} | ({"errors": self.errors} if self.errors else {})


class Stepper:
    """Steps games off the event loop, those that wait together in one call."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Environment, str, asyncio.Future[StepResult]]] = []
        self._work: asyncio.Task[None] | None = None

    async def __call__(self, game: Environment, action: str) -> StepResult:
        """Step one game."""
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._waiting.append((game, action, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            games, actions, futures = zip(*batch)
            try:
                results = await asyncio.to_thread(step_all, games, actions)
            except Exception as error:
                for future in futures:
                    future.cancelled() or future.set_exception(error)
                continue
            for future, result in zip(futures, results, strict=True):
                future.cancelled() or future.set_result(result)


@dataclass
class Session:
    """One client's game."""

    offer: Offer
    stepper: Stepper
    state: GameState = field(default_factory=GameState)
    game: Environment | None = None
    transcript: str = ""

    def reset(self, request: ResetRequest) -> dict[str, Any]:
        """Begin a game."""
        seed = secrets.randbits(31) if request.seed is None else request.seed
        self.game, self.transcript = self.offer.make(), ""
        first = self.game.reset(self.offer.task(seed), seed)
        name = request.episode_id or secrets.token_hex(8)
        self.state = GameState(episode_id=name, env_id=self.offer.name)
        return self._observe(first.messages, None, False, {"seed": seed, "episode_id": name})

    async def step(self, action: Action) -> dict[str, Any]:
        """Take the player's turn.

        Raises:
            SessionError: there is no game, or it is over.
        """
        if self.game is None:
            raise SessionError("EXECUTION_ERROR", "no game has begun: send a reset first")
        if self.state.done:
            raise SessionError("EXECUTION_ERROR", "this game is over: send a reset to begin another")
        result = await self.stepper(self.game, action.message)
        history = getattr(self.game, "history", ())
        self.state = GameState(
            episode_id=self.state.episode_id,
            step_count=self.state.step_count + 1,
            env_id=self.offer.name,
            done=result.done,
            history=[{"word": word, "marks": marks} for word, marks in history],
        )
        signals = {f"{self.offer.name}.{part}": value for part, value in result.parts.items()}
        info = {**result.info, "reward_signals": signals}
        about = {"episode_id": self.state.episode_id}
        return self._observe(result.observation.messages, result.reward, result.done, about, info)

    def _observe(
        self,
        messages: Sequence[Message],
        reward: float | None,
        done: bool,
        metadata: dict[str, Any],
        info: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        turns = [{"role": turn["role"], "content": turn.get("content", "")} for turn in messages]
        new = "\n".join(turn["content"] for turn in turns)
        self.transcript = f"{self.transcript}\n{new}" if self.transcript else new
        category = "MESSAGE" if self.state.step_count else "PROMPT"
        observation = GameObservation(
            prompt=new,
            messages=[GameMessage(sender_id=-1, content=self.transcript, category=category)],
            turns=turns,
            info=info or {},
            metadata=metadata,
        )
        # Older clients (openenv-core 0.2) refuse further keys beside these three.
        return {"observation": observation.model_dump(), "reward": reward, "done": done}


class EnvironmentServer:
    """The routes of one offer."""

    def __init__(self, offer: Offer) -> None:
        self.offer, self.stepper = offer, Stepper()
        self.connected = 0
        self._games: OrderedDict[str, Session] = OrderedDict()
        """Games over HTTP, the latest last."""

    def routes(self) -> list[Route | WebSocketRoute]:
        """Return them."""
        schema = {
            "action": Action.model_json_schema(),
            "observation": GameObservation.model_json_schema(),
            "state": GameState.model_json_schema(),
        }
        metadata = {
            "name": self.offer.name,
            "description": f"{self.offer.name}, served by nurture",
            "version": __version__,
            "readme_content": None,
            "author": None,
            "documentation_url": None,
        }

        def saying(value: dict[str, Any]) -> Callable[[Request], Response]:
            return lambda request: JSONResponse(value)

        return [
            WebSocketRoute("/ws", self.session),
            Route("/reset", _http(self.reset), methods=["POST"]),
            Route("/step", _http(self.step), methods=["POST"]),
            Route("/state", _http(self.state)),
            Route("/health", saying({"status": "healthy"})),
            Route("/schema", saying(schema)),
            *(Route(path, saying(metadata)) for path in ("/metadata", "/web/metadata")),
            *_page(),
        ]

    async def session(self, socket: WebSocket) -> None:
        """Answer a client until it leaves."""
        await socket.accept()
        if self.connected >= self.offer.sessions:
            full = SessionError(
                "CAPACITY_REACHED", f"all {self.offer.sessions} sessions of this server are taken"
            )
            counts = {"active_sessions": self.connected, "max_sessions": self.offer.sessions}
            await socket.send_json({"type": "error", "data": full.data | counts})
            await socket.close(1013)
            return
        self.connected += 1
        session = Session(self.offer, self.stepper)
        try:
            while True:
                try:
                    answer = await self._answer(session, await _received(socket))
                except SessionError as error:
                    answer = {"type": "error", "data": error.data}
                except NurtureError as error:
                    answer = {"type": "error", "data": SessionError("EXECUTION_ERROR", str(error)).data}
                if answer is None:
                    break
                await socket.send_json(answer)
            await socket.close()
        except (WebSocketDisconnect, RuntimeError):
            pass  # it left, perhaps while we were answering
        finally:
            self.connected -= 1

    async def _answer(self, session: Session, message: dict[str, Any]) -> dict[str, Any] | None:
        """Return the answer to a message, None to a close."""
        kind, data = message.get("type"), message.get("data", {})
        if kind == "reset":
            return {"type": "observation", "data": session.reset(_checked(ResetRequest, data, "reset"))}
        if kind == "step":
            return {"type": "observation", "data": await session.step(_checked(Action, data, "step"))}
        if kind == "state":
            return {"type": "state", "data": session.state.model_dump()}
        if kind == "close":
            return None
        raise SessionError(
            "UNKNOWN_TYPE", f"Unknown message type: {str(kind)[:60]}. There are reset, step, state and close."
        )

    async def reset(self, body: Any) -> dict[str, Any]:
        """Begin a game over HTTP; the oldest one is forgotten where there are too many."""
        session = Session(self.offer, self.stepper)
        answer = session.reset(_checked(ResetRequest, body, "/reset"))
        self._games[str(session.state.episode_id)] = session
        while len(self._games) > self.offer.sessions:
            self._games.popitem(last=False)
        return answer

    async def step(self, body: Any) -> dict[str, Any]:
        """Take a turn over HTTP."""
        request = _checked(StepRequest, body, "/step")
        return await self._found(request.episode_id).step(request.action)

    async def state(self, body: Any) -> dict[str, Any]:
        """Say where a game over HTTP stands."""
        return self._found(body.get("episode_id")).state.model_dump()

    def _found(self, name: str | None) -> Session:
        name = name or next(reversed(self._games), "yet")
        if name not in self._games:
            raise SessionError("SESSION_ERROR", f"there is no game {name}: POST /reset begins one")
        return self._games[name]


async def _received(socket: WebSocket) -> dict[str, Any]:
    """Return the next message.

    Raises:
        SessionError: it is no JSON object.
        WebSocketDisconnect: the client left.
    """
    received = await socket.receive()
    if received["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(received.get("code", 1000))
    try:
        message = json.loads(received.get("text") or received.get("bytes") or "")
    except (ValueError, RecursionError) as error:
        raise SessionError("INVALID_JSON", f"Invalid JSON: {error}") from error
    if not isinstance(message, dict):
        raise SessionError("VALIDATION_ERROR", 'a message is an object such as {"type": "reset", "data": {}}')
    return message


def _checked(kind: Any, data: Any, where: str) -> Any:
    """Build `kind` from what a client sent.

    Raises:
        SessionError: naming the first field that is wrong, with the list of all.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        first = errors[0]
        place = ".".join(map(str, first["loc"])) or "data"
        raise SessionError("VALIDATION_ERROR", f"{where}: {place}: {first['msg']}", errors) from error


def _http(answer: Callable[[Any], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler that gives `answer` the body (of a GET: the query) and says what is wrong with it."""
    status = {"INVALID_JSON": 400, "VALIDATION_ERROR": 422, "SESSION_ERROR": 404}

    async def handler(request: Request) -> Response:
        try:
            if request.method == "POST":
                try:
                    body = json.loads(await request.body() or b"{}")
                except ValueError as error:
                    raise SessionError("INVALID_JSON", f"Invalid JSON: {error}") from error
            else:
                body = dict(request.query_params)
            return JSONResponse(await answer(body))
        except SessionError as error:
            return JSONResponse({"detail": error.data}, status.get(error.code, 409))
        except NurtureError as error:
            return JSONResponse({"detail": {"message": str(error), "code": "EXECUTION_ERROR"}}, 409)

    return handler


def _page() -> list[Route]:
    """Return the routes of the page for people."""
    folder = resources.files("nurture.studio").joinpath("web")

    def sending(name: str) -> Callable[[Request], Response]:
        content, kind = folder.joinpath(name).read_bytes(), TYPES[f".{name.rpartition('.')[2]}"]
        return lambda request: Response(content, media_type=kind)

    return [
        Route("/web/", sending("environment.html")),
        *(Route(path, lambda request: RedirectResponse("/web/")) for path in ("/", "/web")),
        *(
            Route(f"/static/{name}", sending(name))
            for name in ("environment.js", "ui.js", "style.css", "icon.svg")
        ),
    ]


def build_environment_app(offer: Offer, token: str | None = None) -> Starlette:
    """Return the application."""
    return Starlette(routes=EnvironmentServer(offer).routes(), middleware=[Middleware(Guard, token=token)])


def serve_environment(
    offer: Offer,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted.

    Args:
        offer: what is played.
        host: address to listen on; any but this machine's own needs a token.
        port: 0 takes a free one.
        token: what clients must show; made up where one is needed and none is given.
        say: called with what a person should read.

    Raises:
        NurtureError: the port is taken.
    """
    token = token_for(host, token)
    app = build_environment_app(offer, token)
    listening = listen(host, port)
    address = f"{shown_host(host)}:{listening.getsockname()[1]}"
    tasks = f", {len(offer.tasks)} tasks" if offer.tasks else ""
    say(f"{offer.name}: an OpenEnv server at http://{address}{tasks}     (ctrl-c stops)")
    say(f"  play it here   http://{address}/web/{f'?token={token}' if token else ''}")
    say(f"  train on it    nurture grpo --model PATH env=openenv:http://{address}")
    if token:
        say(f"  clients show   Authorization: Bearer {token}")
    run(app, listening)
