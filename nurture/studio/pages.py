"""What the studio's pages ask for besides the API: tokens, runs, labels, games."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nurture.data.sources import make_world
from nurture.environments.wordle import WordleConfig, word_lists
from nurture.inference.chat import ChatModel
from nurture.inference.sampling import SamplingParams
from nurture.model.hugging_face import CONFIG
from nurture.pipeline import recall_world
from nurture.rewards.learned import RewardModel, load_reward_model, score_replies
from nurture.studio import label, play, steer, watch
from nurture.studio.batcher import Ticket, check_prompt
from nurture.studio.inspect import candidates, score_tokens, token_text
from nurture.studio.openai import Api
from nurture.studio.openapi import document
from nurture.studio.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    Refused,
    answering,
    json_response,
    read_body,
)
from nurture.studio.text import split_thought
from nurture.types import Message
from nurture.world.split import random_for

_PROMPT_KINDS = (
    "fact",
    "arithmetic",
    "translation",
    "rewrite",
    "list",
    "describe",
    "story",
    "chat",
    "benign",
)

_COMPARED = 200
"""Newest rankings that are compared with the reward model."""


class TextBody(Body):
    """A text to take apart: plain text, or a conversation and what was answered."""

    model: str
    text: str = ""
    question: str | None = None
    """With a chat model: the user's turn that `text` is the reply to."""


class NextBody(Body):
    """A place in a text."""

    model: str
    token_ids: list[int] = Field(min_length=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    count: int = Field(20, ge=1, le=200)


class RankingBody(Body):
    """One labeler's ranking of some answers."""

    run: str
    id: str = Field(min_length=8, max_length=80)
    labeler: str = Field(min_length=1, max_length=60)
    prompt: list[dict[str, str]] = Field(min_length=1)
    responses: list[str] = Field(min_length=2, max_length=9)
    ranking: str
    model: str | None = None


class DemonstrationBody(Body):
    """What a labeler would have answered."""

    run: str
    id: str = Field(min_length=8, max_length=80)
    labeler: str = Field(min_length=1, max_length=60)
    prompt: list[dict[str, str]] = Field(min_length=1)
    reply: str = Field(min_length=1)


class Steering(Body):
    """What a run shall do."""

    at_once: bool = False
    """Stop it without letting it finish what it is doing."""


class ReplayTurn(Body):
    """One of the model's turns in an episode of a run."""

    run: str
    stage: str
    index: int = Field(ge=0)
    turn: int = Field(ge=0)
    model: str


class NewGame(Body):
    """A new game of Wordle."""

    seed: int | None = None


class PersonGuess(Body):
    """The person's guess."""

    game: str
    guess: str = Field(max_length=40)


class ModelGuess(Body):
    """The model's turn."""

    game: str
    model: str
    temperature: float = Field(0.0, ge=0, le=2)


class Pages:
    """The endpoints under /studio, on the API's library and thread."""

    def __init__(self, api: Api) -> None:
        self.api, self.library, self.batcher = api, api.library, api.batcher
        self.table = play.Table()
        self._reward_models: dict[tuple[Path, float], tuple[RewardModel, dict[str, list[float]]]] = {}

    def routes(self) -> list[Route]:
        """Return what to serve."""
        run, stage = "/studio/runs/{run}", "/studio/runs/{run}/stages/{stage}"
        get: dict[str, Callable[[Request], Any]] = {
            "/studio/load": self.load,
            "/studio/runs": self.runs,
            run: self.run,
            f"{run}/report": self.report,
            f"{stage}/metrics": self.metrics,
            f"{stage}/samples": self.samples,
            f"{run}/labels": self.labels,
            f"{run}/prompts": self.prompts,
            f"{run}/episodes": self.episodes,
        }
        post: dict[str, tuple[Callable[[Request], Any], type[Body]]] = {
            f"{run}/stop": (self.stop, Steering),
            f"{run}/resume": (self.resume, Steering),
            "/studio/tokens": (self.tokens, TextBody),
            "/studio/tokens/next": (self.next_token, NextBody),
            "/studio/labels/ranking": (self.save_ranking, RankingBody),
            "/studio/labels/demonstration": (self.save_demonstration, DemonstrationBody),
            "/studio/play/new": (self.new_game, NewGame),
            "/studio/play/person": (self.person_guess, PersonGuess),
            "/studio/play/model": (self.model_guess, ModelGuess),
            "/studio/play/replay": (self.replay_turn, ReplayTurn),
        }
        routes = [
            *(Route(path, answering(handler)) for path, handler in get.items()),
            *(Route(path, answering(handler), methods=["POST"]) for path, (handler, _) in post.items()),
        ]
        bodies = {path: body for path, (_, body) in post.items()}
        described = document(
            [*self.api.routes(), *routes],
            bodies | {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest},
            {f"{stage}/metrics": ("after",), f"{run}/labels": ("labeler",)},
        )
        return [*routes, Route("/openapi.json", lambda request: json_response(described))]

    async def load(self, request: Request) -> Response:
        """Say how much is being computed."""
        return json_response(self.batcher.load())

    # --- tokens -----------------------------------------------------------------------------------------------------

    async def tokens(self, request: Request) -> Response:
        """Take a text apart and score every token."""
        body = await read_body(request, TextBody)
        _, chat = await self.api.loaded(body.model)
        token_ids = _start_of(chat, body.question) + chat.tokenizer.encode(body.text)
        check_prompt(token_ids, chat.model.config.vocab_size, chat.model.config.max_position + 1)
        scored = await self.batcher.compute(lambda: score_tokens(chat.model, token_ids))
        rows = [
            {"token": token, "text": token_text(chat.tokenizer, token)}
            | {"logprob": score.logprob, "entropy": score.entropy, "rank": score.rank}
            for token, score in zip(token_ids, scored, strict=True)
        ]
        return json_response({"tokens": rows, "context": chat.model.config.max_position})

    async def next_token(self, request: Request) -> Response:
        """Show the distribution of the token after a prefix, and draw one from it."""
        body = await read_body(request, NextBody)
        _, chat = await self.api.loaded(body.model)
        config = chat.model.config
        check_prompt(body.token_ids, config.vocab_size, config.max_position)
        params = SamplingParams(
            temperature=body.temperature, top_k=body.top_k, top_p=body.top_p, min_p=body.min_p
        )
        shown = await self.batcher.compute(
            lambda: candidates(chat.model, chat.tokenizer, body.token_ids, params, body.count)
        )
        return json_response(shown)

    # --- runs -------------------------------------------------------------------------------------------------------

    async def runs(self, request: Request) -> Response:
        """List the runs."""
        return json_response({"runs": list(self.library.runs)})

    async def run(self, request: Request) -> Response:
        """Show a run's stages."""
        return json_response(await asyncio.to_thread(watch.stage_map, self._run(request)))

    async def report(self, request: Request) -> Response:
        """Show what each stage changed."""
        return json_response(await asyncio.to_thread(watch.report, self._run(request)))

    async def metrics(self, request: Request) -> Response:
        """Return new lines of a stage's metrics."""
        after = request.query_params.get("after", "0")
        if not after.isascii() or not after.isdigit() or len(after) > 15:
            raise Refused("after is a number of bytes", "after")
        stage = request.path_params["stage"]
        return json_response(await asyncio.to_thread(watch.metrics, self._run(request), stage, int(after)))

    async def samples(self, request: Request) -> Response:
        """Return a stage's samples."""
        stage = request.path_params["stage"]
        return json_response({"samples": await asyncio.to_thread(watch.samples, self._run(request), stage)})

    async def stop(self, request: Request) -> Response:
        """Stop a run."""
        body = await read_body(request, Steering)
        await asyncio.to_thread(steer.stop, self._run(request), body.at_once)
        return json_response({})

    async def resume(self, request: Request) -> Response:
        """Have a run go on."""
        await read_body(request, Steering)  # JSON, which other sites' forms cannot send
        await asyncio.to_thread(steer.resume, self._run(request))
        return json_response({})

    def _run(self, request: Request) -> Path:
        return self.library.run_folder(request.path_params["run"])

    # --- labels -----------------------------------------------------------------------------------------------------

    async def labels(self, request: Request) -> Response:
        """Say who has labelled what, and what is open for a labeler."""
        run, labeler = self._run(request), request.query_params.get("labeler", "")
        open_one = await asyncio.to_thread(label.open_comparison, run, labeler) if labeler else None
        return json_response({"summary": await self._summary(run), "open": open_one})

    async def prompts(self, request: Request) -> Response:
        """Draw prompts of the run's world, of every kind."""
        world = make_world(recall_world(self._run(request) / "model"))
        rng = random_for("studio", secrets.randbits(32))
        tasks = [world.task(kind, "train", rng.randrange(100_000)) for kind in _PROMPT_KINDS]
        asked = [next(m["content"] for m in task.messages if m["role"] == "user") for task in tasks]
        return json_response({"prompts": asked})

    async def save_ranking(self, request: Request) -> Response:
        """Keep a ranking; tell what the reward model thinks of the answers, where the run has one."""
        body = await read_body(request, RankingBody)
        run = self.library.run_folder(body.run)
        record = body.model_dump(exclude={"run"}, exclude_none=True)
        new = await asyncio.to_thread(label.save, run, label.RANKINGS, record)
        rewards = await self._rewards(run, record)
        return json_response({"saved": new, "rewards": rewards, "summary": await self._summary(run)})

    async def save_demonstration(self, request: Request) -> Response:
        """Keep a demonstration."""
        body = await read_body(request, DemonstrationBody)
        run = self.library.run_folder(body.run)
        said = [*body.prompt, {"role": "assistant", "content": body.reply}]
        record = {"messages": said, "id": body.id, "labeler": body.labeler}
        new = await asyncio.to_thread(label.save, run, label.DEMONSTRATIONS, record)
        return json_response({"saved": new, "summary": await self._summary(run)})

    async def _summary(self, run: Path) -> dict[str, Any]:
        """Say who has labelled how much, and how far they agree with each other and with the reward model."""
        rows = (await asyncio.to_thread(label.read, run, label.RANKINGS))[-_COMPARED:]
        scored = [(row, scores) for row in rows if (scores := await self._rewards(run, row))]
        with_rewards = label.agreement_with_scores(scored) if scored else None
        return await asyncio.to_thread(label.summary, run) | {"reward_model": with_rewards}

    async def _rewards(self, run: Path, row: dict[str, Any]) -> list[float] | None:
        """Return the reward of each answer that was ranked, None where the run has no reward model."""
        folder = await asyncio.to_thread(label.reward_model_folder, run)
        if folder is None:
            return None
        model_key = (folder, (folder / CONFIG).stat().st_mtime)  # one that was trained again is another
        if model_key not in self._reward_models:
            self._reward_models.clear()
            self._reward_models[model_key] = (await asyncio.to_thread(load_reward_model, folder), {})
        reward_model, known = self._reward_models[model_key]
        answers = label.comparison_key(row)
        if answers not in known:
            prompts, responses = [row["prompt"]] * len(row["responses"]), row["responses"]
            scores = await self.batcher.compute(lambda: score_replies(reward_model, prompts, responses))
            known[answers] = [float(score) for score in scores]
        return known[answers]

    # --- play -------------------------------------------------------------------------------------------------------

    async def new_game(self, request: Request) -> Response:
        """Begin a game."""
        body = await read_body(request, NewGame)
        return json_response(self.table.begin(body.seed))

    async def episodes(self, request: Request) -> Response:
        """List the games that stages have left, turn by turn."""
        found = await asyncio.to_thread(watch.episodes, self._run(request))
        return json_response({"episodes": [one | play.replay(one.pop("messages")) for one in found]})

    async def replay_turn(self, request: Request) -> Response:
        """Say how probable a model finds what was said in one turn, and which words it would have said."""
        body = await read_body(request, ReplayTurn)
        _, chat = await self.api.loaded(body.model)
        if chat.tokenizer.chat_template is None:
            raise Refused(f"{body.model} is a base model and takes no turns", "model")
        found = await asyncio.to_thread(watch.episodes, self.library.run_folder(body.run))
        messages: list[Message] = next(
            (e["messages"] for e in found if (e["stage"], e["index"]) == (body.stage, body.index)), []
        )
        if body.turn >= len(messages) or messages[body.turn]["role"] != "assistant":
            raise Refused("there is no such turn of the model", "turn")
        before, said = messages[: body.turn], str(messages[body.turn].get("content") or "")
        prompt = chat.tokenizer.encode_prompt(before)
        token_ids = [*prompt, *chat.tokenizer.encode(said), chat.tokenizer.end_of_turn_id]
        check_prompt(token_ids, chat.model.config.vocab_size, chat.model.config.max_position + 1)
        scored = await self.batcher.compute(lambda: score_tokens(chat.model, token_ids))
        words = word_lists(WordleConfig())[1]
        likely = await self.batcher.compute(lambda: play.likely_words(chat, before, words, 6))
        logprob = sum(one.logprob or 0.0 for one in scored[len(prompt) :])
        return json_response({"probability": math.exp(logprob), "likely": likely})

    async def person_guess(self, request: Request) -> Response:
        """Take the person's guess."""
        body = await read_body(request, PersonGuess)
        return json_response(play.person_turn(self.table.find(body.game), body.guess))

    async def model_guess(self, request: Request) -> Response:
        """Let the model guess, and show which words it found likely."""
        body = await read_body(request, ModelGuess)
        game = self.table.find(body.game)
        entry, chat = await self.api.loaded(body.model)
        tokenizer = chat.tokenizer
        if tokenizer.chat_template is None:
            raise Refused(
                f"{entry.name} is a base model and cannot take turns; choose a later stage", "model"
            )
        turn = len(game.conversation)
        thought_of = await self.batcher.compute(
            lambda: play.likely_words(chat, game.conversation, game.model.allowed, 6)
        )
        prompt = tokenizer.encode_prompt(game.conversation)
        room = chat.model.config.max_position - len(prompt)
        if room < 2:
            ended = {"said": "(its context is full)", "thought": "", "probability": 0.0, "likely": []}
            return json_response(play.model_gives_up(game) | ended)
        params = SamplingParams(
            max_tokens=min(256, room // 2),  # later turns want room too
            temperature=body.temperature,
            stop_token_ids=tokenizer.stop_token_ids,
        )
        ticket = Ticket(prompt, params, secrets.randbits(63), top_logprobs=0)
        self.batcher.submit(chat, [ticket])
        drawn = [await ticket.next()]
        while drawn[-1].finish_reason is None:
            drawn.append(await ticket.next())
        if len(game.conversation) != turn:
            raise Refused("the model is making this guess already")
        reply = tokenizer.decode([one.token for one in drawn], skip_special=True)
        probability = math.exp(sum(one.logprob or 0.0 for one in drawn))
        thought, said = split_thought(reply)
        outcome = play.model_turn(game, reply)
        return json_response(
            outcome | {"said": said, "thought": thought, "probability": probability, "likely": thought_of}
        )


def _start_of(chat: ChatModel, question: str | None) -> list[int]:
    """Return the tokens before the text: the question as the template writes it, or the start of a document."""
    tokenizer = chat.tokenizer
    if question is not None:
        if tokenizer.chat_template is None:
            raise Refused("a base model has no chat template; give it plain text", "question")
        return tokenizer.encode_prompt([{"role": "user", "content": question}])
    return [] if tokenizer.document_token_id is None else [tokenizer.document_token_id]
