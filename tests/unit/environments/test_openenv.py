"""OpenEnv both ways: the published client plays our server, ours plays any, and a remote game equals the local one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs the extra `openenv`")
pytest.importorskip("websockets", reason="the client needs the extra `openenv`")

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from unit.environments.openenv_servers import action_schema, port_of, serving

from nurture.environments.catalog import environment_maker, tasks_for
from nurture.environments.math import Math
from nurture.environments.openenv import SEEDS
from nurture.environments.protocol import Environment
from nurture.environments.wordle import Wordle
from nurture.errors import NurtureError
from nurture.inference.engine import Completion, Episode, Respond
from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.rollout import Rollout, collect
from nurture.studio.environment import Offer, build_environment_app
from nurture.tokenizer import Tokenizer

WORDS = ("crane", "dream", "bread", "house")


def offer(**settings: Any) -> Offer:
    return Offer("wordle", environment_maker("wordle", settings), WORDS, sessions=40)


def client(served: Offer, token: str | None = None) -> TestClient:
    return TestClient(build_environment_app(served, token), base_url="http://localhost")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(build_environment_app(offer())) as address:
        yield address


# ---- the published client -----------------------------------------------------------------------------------------


def test_the_published_client_plays_it(address: str) -> None:
    """Unchanged, over a real socket, two sessions side by side; the words are won by who knows the seed's secret."""
    published = pytest.importorskip(
        "openenv.core", reason="the published client is not installed: see .ci/run"
    )
    secret = offer().task(7)
    other = next(word for word in WORDS if word != secret)
    with (
        published.GenericEnvClient(base_url=address).sync() as first,
        published.GenericEnvClient(base_url=address).sync() as second,
    ):
        began = first.reset(seed=7, episode_id="mine")
        assert (began.done, began.reward) == (False, None)
        assert "Wordle" in began.observation["prompt"]
        assert second.reset(seed=7).observation["prompt"] == began.observation["prompt"]
        missed = first.step({"message": f"[{other}]"})
        assert (missed.reward, missed.done, missed.observation["info"]["won"]) == (0.0, False, False)
        assert missed.observation["messages"][0]["content"].startswith(began.observation["prompt"])
        won = second.step({"message": f"[{secret}]"})
        assert (won.reward, won.done, won.observation["info"]["won"]) == (1.0, True, True)
        assert won.observation["info"]["reward_signals"]["wordle.correct"] == 1.0
        state = first.state()
        assert (state["episode_id"], state["step_count"], state["done"]) == ("mine", 1, False)
        assert secret not in str(state)
        with pytest.raises(RuntimeError, match=r"game is over.*EXECUTION_ERROR"):
            second.step({"message": "[crane]"})
        with pytest.raises(RuntimeError, match=r"message: Field required.*VALIDATION_ERROR"):
            first.step({"guess": "crane"})
        assert first.step({"message": f"[{secret}]"}).done  # the session goes on after a mistake


def test_messages_have_the_published_shapes(address: str) -> None:
    """Every answer is accepted by the published pydantic types, which refuse what they do not know."""
    types = pytest.importorskip("openenv.core.env_server.types")
    with client(offer()) as http, http.websocket_connect("ws://localhost/ws") as socket:
        socket.send_json({"type": "reset", "data": {"seed": 1}})
        said = socket.receive_json()
        types.ResetResponse(**types.WSObservationResponse(**said).data)
        socket.send_json({"type": "step", "data": {"message": "[crane]"}})
        types.StepResponse(**types.WSObservationResponse(**socket.receive_json()).data)
        socket.send_json({"type": "state"})
        types.State(**types.WSStateResponse(**socket.receive_json()).data)
        socket.send_json({"type": "nonsense"})
        assert types.WSErrorCode(types.WSErrorResponse(**socket.receive_json()).data["code"])
        types.SchemaResponse(**http.get("/schema").json())
        types.EnvironmentMetadata(**http.get("/metadata").json())
        types.HealthResponse(**http.get("/health").json())
        types.ResetResponse(**http.post("/reset", json={"seed": 3, "episode_id": "a"}).json())
        types.StepResponse(**http.post("/step", json={"action": {"message": "[crane]"}}).json())


# ---- our server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        ("{", "INVALID_JSON", "Invalid JSON"),
        ("[1]", "VALIDATION_ERROR", "a message is an object"),
        ('{"type": "jump"}', "UNKNOWN_TYPE", "jump"),
        ('{"data": {}}', "UNKNOWN_TYPE", "reset, step, state and close"),
        ('{"type": "reset", "data": {"seed": "x"}}', "VALIDATION_ERROR", "reset: seed"),
        ('{"type": "reset", "data": {"seed": -1}}', "VALIDATION_ERROR", "reset: seed"),
        ('{"type": "reset", "data": 5}', "VALIDATION_ERROR", "reset: data"),
        ('{"type": "step", "data": {"message": "[crane]"}}', "EXECUTION_ERROR", "send a reset first"),
        ('{"type": "step", "data": {}}', "VALIDATION_ERROR", "step: message"),
        ('{"type": "step", "data": {"message": "a", "x": 1}}', "VALIDATION_ERROR", "step: x"),
    ],
)
def test_what_is_wrong_is_said_and_the_session_goes_on(sent: str, code: str, said: str) -> None:
    with client(offer()) as http, http.websocket_connect("ws://localhost/ws") as socket:
        socket.send_text(sent)
        answer = socket.receive_json()
        assert (answer["type"], answer["data"]["code"]) == ("error", code)
        assert said in answer["data"]["message"]
        socket.send_json({"type": "reset", "data": {"unknown": "parameters are for other environments"}})
        assert socket.receive_json()["type"] == "observation"
        socket.send_json({"type": "close"})
        with pytest.raises(WebSocketDisconnect):
            socket.receive_json()


def test_a_full_server_says_so_and_frees_what_is_left() -> None:
    full = Offer("wordle", environment_maker("wordle"), WORDS, sessions=1)
    with client(full) as http:
        with (
            http.websocket_connect("ws://localhost/ws"),
            http.websocket_connect("ws://localhost/ws") as refused,
        ):
            assert refused.receive_json()["data"]["code"] == "CAPACITY_REACHED"
        with http.websocket_connect("ws://localhost/ws") as socket:
            socket.send_json({"type": "reset"})
            assert socket.receive_json()["type"] == "observation"


def test_over_http() -> None:
    with client(offer()) as http:
        assert http.post("/step", json={"action": {"message": "[crane]"}}).status_code == 404
        first = http.post("/reset", json={"seed": 5, "episode_id": "a"}).json()
        again = http.post("/reset", json={"seed": 5, "episode_id": "b"}).json()
        assert first["observation"]["turns"] == again["observation"]["turns"]
        won = http.post(
            "/step", json={"action": {"message": f"[{offer().task(5)}]"}, "episode_id": "a"}
        ).json()
        assert (won["reward"], won["done"]) == (1.0, True)
        assert http.get("/state", params={"episode_id": "b"}).json()["step_count"] == 0
        for body, status in (
            ("{", 400),
            ('{"action": {}}', 422),
            ('{"action": {"message": "x"}, "episode_id": "c"}', 404),
        ):
            refused = http.post("/step", content=body)
            assert (refused.status_code, "message" in refused.json()["detail"]) == (status, True)
        assert http.post("/step", json={"action": {"message": "x"}, "episode_id": "a"}).status_code == 409
        assert http.get("/", follow_redirects=False).headers["location"] == "/web/"


def test_other_sites_and_strangers_are_kept_out() -> None:
    elsewhere = {"Origin": "https://elsewhere.example"}
    with (
        client(offer()) as http,
        pytest.raises(WebSocketDisconnect),
        http.websocket_connect("ws://localhost/ws", headers=elsewhere),
    ):
        pass
    with client(offer(), token="secret") as http:
        with pytest.raises(WebSocketDisconnect), http.websocket_connect("ws://localhost/ws"):
            pass
        with http.websocket_connect(
            "ws://localhost/ws", headers={"Authorization": "Bearer secret"}
        ) as socket:
            socket.send_json({"type": "reset"})
            assert socket.receive_json()["type"] == "observation"


def test_games_that_wait_are_stepped_together() -> None:
    """While one call computes, the other sessions' actions gather for the next one."""
    import asyncio
    import time

    from nurture.environments.protocol import StepResult, step_all
    from nurture.studio.environment import Stepper

    calls: list[int] = []

    class Slow(Wordle):
        @staticmethod
        def step_many(games: Sequence[Wordle], actions: Sequence[str]) -> list[StepResult]:
            calls.append(len(games))
            time.sleep(0.05)
            return step_all([game.plain for game in games], actions)  # type: ignore[attr-defined]

    async def all_at_once() -> list[StepResult]:
        stepper, games = Stepper(), [Slow() for _ in range(6)]
        for game in games:
            game.plain = Wordle()  # type: ignore[attr-defined]
            game.plain.reset("crane")  # type: ignore[attr-defined]
        return await asyncio.gather(*(stepper(game, f"[{WORDS[i % 4]}]") for i, game in enumerate(games)))

    results = asyncio.run(all_at_once())
    assert [result.info["won"] for result in results] == [True, False, False, False, True, False]
    assert sum(calls) == 6
    assert len(calls) < 6


# ---- our client ----------------------------------------------------------------------------------------------------


class Guessing:
    """A sampler whose rows say different words, all rows in step; logprobs are made up."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        self.turns = [[*tokenizer.encode(f"[{word}]"), tokenizer.end_of_turn_id] for word in words]

    def converse(
        self, prompts: Sequence[Sequence[int]], respond: Respond, *more: object, **settings: object
    ) -> list[Episode]:
        episodes = [Episode() for _ in prompts]
        going = list(range(len(prompts)))
        for turn in range(12):
            said = []
            for row in going:
                tokens = self.turns[(row + turn) % len(self.turns)]
                episodes[row].turns.append(Completion(tokens, [-0.5] * len(tokens), "stop"))
                said.append((row, episodes[row].turns[-1]))
            answers = respond(said)
            for row, answer in zip(going, answers, strict=True):
                if answer is not None:
                    episodes[row].answers.append(list(answer))
            going = [row for row, answer in zip(going, answers, strict=True) if answer is not None]
        return episodes


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["[crane] [ C R A N E ] ( - o + ) user assistant"] * 4, 280)


def essence(rollout: Rollout) -> tuple[object, ...]:
    return (
        rollout.token_ids, rollout.completion_mask, rollout.logprobs, rollout.reward, rollout.reward_parts,
        rollout.finished, rollout.turns, rollout.messages,
        {name: rollout.info.get(name) for name in ("won", "invalid", "guesses", "secret")},
    )  # fmt: skip


@pytest.mark.parametrize("style", ["spelled", "textarena"])
def test_a_remote_game_equals_the_local_one_token_for_token(tokenizer: Tokenizer, style: str) -> None:
    """Wins, losses, invalid moves and their end, in groups, all rows of a turn at the same time."""
    settings = {"style": style, "reward": {"correct": 1.0, "greens": 0.3, "format": 0.1}}
    served = offer(**settings)
    sampler = Guessing(
        tokenizer, ["brick", "xxxxx", "dream", "crane", "xxxxx", "yyyyy", "bread", "plain", "house"]
    )
    how: dict[str, Any] = {
        "params": SamplingParams(max_tokens=20),
        "group_size": 4,
        "max_turns": 12,
        "seed": 11,
    }
    words = [served.task(seed % SEEDS) for seed in sequence_seeds(11, 6)]
    local = collect(sampler, tokenizer, environment_maker("wordle", settings), words, **how)
    with serving(build_environment_app(served)) as address:
        make = environment_maker(f"openenv:{address}")
        for _ in range(2):  # the second time on connections that are there already
            remote = collect(sampler, tokenizer, make, [None] * 6, **how)
            assert [essence(one) for one in remote] == [essence(one) for one in local]
    assert {one.info["won"] for one in local} == {True, False}
    assert any(one.info["invalid"] for one in local)


def test_problems_are_served_with_their_tasks() -> None:
    tasks = tasks_for("math", {}, None, "heldout")
    served = Offer("math", Math, tasks)
    with serving(build_environment_app(served)) as address:
        game = environment_maker(f"openenv:{address}")()
        first = game.reset(None, 9)
        assert first.messages == tuple(served.task(9).prompt)
        assert game.step(served.task(9).answer).reward == 1.0
        assert len({game.reset(None, seed).text for seed in range(20)}) > 10


def test_a_connection_that_breaks_is_opened_anew_and_the_game_goes_on() -> None:
    app = build_environment_app(offer())
    with serving(app) as address:
        make = environment_maker(f"openenv:{address}")
        game, idle = make(), make()
        game.reset(None, 3)
        idle.reset(None, 4)
        before = game.step("[plain]")
    with serving(build_environment_app(offer()), port_of(address)):
        won = game.step(f"[{offer().task(3)}]")
        assert (won.reward, won.done, won.info["guesses"]) == (1.0, True, 2)
        assert not before.done
        assert idle.reset(None, 5).text
    with serving(
        build_environment_app(Offer("wordle", environment_maker("wordle", {"style": "textarena"}))),
        port_of(address),
    ):
        idle.reset(None, 6)
        idle.step("[plain]")
    with serving(app, port_of(address)), pytest.raises(NurtureError, match=r"lost its games.*cannot go on"):
        idle.step("[crane]")


def strange_server(schema: dict[str, Any], answers: Sequence[dict[str, Any]]) -> Starlette:
    """A server that answers messages with the given ones in turn, whatever they are."""

    async def session(socket: Any) -> None:
        await socket.accept()
        try:
            while True:
                said = await socket.receive_json()
                heard.append(said)
                await socket.send_json(
                    {"type": "observation", "data": answers[(len(heard) - 1) % len(answers)]}
                )
        except WebSocketDisconnect:
            pass

    heard: list[Any] = []
    app = Starlette(
        routes=[WebSocketRoute("/ws", session), Route("/schema", lambda request: JSONResponse(schema))]
    )
    app.state.heard = heard
    return app


def test_servers_of_others_are_read_as_they_speak() -> None:
    """Textarena repeats what was said; an echo has one text; anything else is shown as it is."""
    answers = [
        {
            "observation": {"prompt": "Rules.", "messages": [{"content": "Rules."}]},
            "reward": None,
            "done": False,
        },
        {"observation": {"messages": [{"content": "Rules.\nYou said hi."}]}, "reward": 0.25, "done": False},
        {"observation": {"echoed": "hi", "length": 2}, "reward": 1, "done": False},
        {"observation": {"x": [1, 2], "y": True}, "reward": True, "done": True, "metadata": {"won": True}},
    ]
    app = strange_server(action_schema(code={"type": "string"}), answers)
    with serving(app) as address:
        game = environment_maker(f"openenv:{address}")()
        assert game.reset(None, SEEDS + 5).text == "Rules."
        steps = [game.step("hi") for _ in range(3)]
    assert [step.observation.text for step in steps] == ["You said hi.", "hi", '{"x": [1, 2], "y": true}']
    assert [(step.reward, step.done) for step in steps] == [(0.25, False), (1.0, False), (1.0, True)]
    assert steps[-1].info["won"]
    assert app.state.heard[:2] == [
        {"type": "reset", "data": {"seed": 5}},
        {"type": "step", "data": {"code": "hi"}},
    ]


def test_a_server_that_ignores_seeds_is_found_out() -> None:
    answers = [{"observation": {"text": f"game {number}"}, "done": False} for number in range(2)]
    with serving(strange_server(action_schema(text={"type": "string"}), answers)) as address:
        make = environment_maker(f"openenv:{address}")
        make().reset(None, 1)
        with pytest.raises(NurtureError, match="different games for the same seed"):
            make().reset(None, 1)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (action_schema(x={"type": "integer"}), "actions need x, so text alone cannot play it"),
        (action_schema(a={"type": "string"}, b={"type": "string"}), "`action`.*a .string., b .string."),
        (action_schema(), "Fields: none"),
        ({"nothing": 1}, "does not describe"),
    ],
)
def test_actions_that_text_cannot_make(schema: dict[str, Any], said: str) -> None:
    with serving(strange_server(schema, [{}])) as address, pytest.raises(NurtureError, match=said):
        environment_maker(f"openenv:{address}")


def test_mistakes_are_explained(address: str) -> None:
    no_server = r"no OpenEnv server in simulation mode: it answered 404"
    with serving(Starlette()) as nothing, pytest.raises(NurtureError, match=no_server):
        environment_maker(f"openenv:{nothing}")
    with pytest.raises(NurtureError, match=r"no OpenEnv server answers at .*nurture env serve wordle"):
        environment_maker(f"openenv:{nothing}")
    with pytest.raises(NurtureError, match="is no address"):
        environment_maker("openenv:")
    with pytest.raises(NurtureError, match=r"no environment 'wordel'.*wordle"):
        environment_maker("wordel")
    with pytest.raises(NurtureError, match="tokn"):
        environment_maker(f"openenv:{address}", {"tokn": "x"})
    with serving(build_environment_app(offer(), token="secret")) as guarded:
        with pytest.raises(NurtureError, match=r"\(401\): it wants a token"):
            environment_maker(f"openenv:{guarded}")
        assert environment_maker(f"openenv:{guarded}", {"token": "secret"})().reset(None, 1).text
    one = Offer("wordle", environment_maker("wordle"), WORDS, sessions=1)
    with serving(build_environment_app(one)) as small:
        make = environment_maker(f"openenv:{small}")
        first, second = make(), make()
        first.reset(None, 1)
        with pytest.raises(NurtureError, match=r"CAPACITY_REACHED.*fewer games at once"):
            second.reset(None, 1)
    assert isinstance(first, Environment)
