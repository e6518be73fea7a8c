"""OpenAI's API for the models of the library: /v1/models, /v1/chat/completions, /v1/completions.

The official client works unchanged: streams, `n`, `seed`, `stop`, logprobs, tools, usage, errors in OpenAI's shape.
Beyond it: `top_k`, `min_p`, `ignore_eos` (go on past the end of a text), `chat_template_kwargs`, thoughts apart from
the answer in `reasoning_content`, and prompts given as token ids.

Logprobs are the model's own (temperature 1), whatever the sampling. `max_tokens` is an upper bound: the context may end
a completion earlier (`finish_reason: "length"`); only a prompt that leaves no room at all is refused, with 400.

Source: the OpenAI API reference (chat completions, completions, errors).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from nurture.inference.chat import ChatModel
from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.studio.batcher import Batcher, Drawn, Ticket, check_prompt
from nurture.studio.inspect import score_tokens, token_text
from nurture.studio.library import Entry, Library
from nurture.studio.requests import (
    ChatRequest,
    CompletionRequest,
    Refused,
    answering,
    error_object,
    json_response,
    read_body,
    to_json,
)
from nurture.studio.text import ReplyParts, StoppingText
from nurture.tokenizer import Tokenizer
from nurture.types import Message

_MOST_ROWS = 256
"""Completions in one request, over all its prompts."""


@dataclass
class Choice:
    """One completion under way, and what it has become so far.

    Attributes:
        parts: thought, answer and tool calls, of a chat's reply.
        drawn: its tokens.
        said: its text.
    """

    index: int
    ticket: Ticket
    tokenizer: Tokenizer
    text: StoppingText
    parts: ReplyParts | None = None
    drawn: list[Drawn] = field(default_factory=list)
    said: str = ""
    finish_reason: str = "stop"

    async def pieces(self) -> AsyncIterator[tuple[str, Drawn | None]]:
        """Yield new text and the token it came with; last what was held back, with no token."""
        try:
            while True:
                drawn = await self.ticket.next()
                self.drawn.append(drawn)
                piece = "" if drawn.finish_reason == "stop" else self.text.add(drawn.token)
                self.said += piece
                yield piece, drawn
                if self.text.stopped or drawn.finish_reason:
                    break
            rest = self.text.finish()
            self.said += rest
            self.finish_reason = "stop" if self.text.stopped else drawn.finish_reason or "stop"
            yield rest, None
        finally:
            self.ticket.cancel()

    async def read(self) -> None:
        """Read to the end."""
        async for piece, drawn in self.pieces():
            if self.parts is not None:
                self.parts.add(piece, final=drawn is None)


class Api:
    """The endpoints, on a library and the thread that computes."""

    def __init__(self, library: Library, batcher: Batcher) -> None:
        self.library, self.batcher = library, batcher

    def routes(self) -> list[Route]:
        """Return what to serve."""
        return [
            Route("/v1/models", answering(self.models)),
            Route("/v1/models/{name:path}", answering(self.model)),
            Route("/v1/completions", answering(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", answering(self.chat_completions), methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        """List every model there is now."""
        entries = await asyncio.to_thread(self.library.entries)
        return json_response({"object": "list", "data": [_model_object(entry) for entry in entries]})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        return json_response(_model_object(self.library.find(request.path_params["name"])))

    async def loaded(self, name: str) -> tuple[Entry, ChatModel]:
        """Return a model, read from disk if need be."""
        entry = await asyncio.to_thread(self.library.find, name)
        return entry, await asyncio.to_thread(self.library.load, entry)

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        body = await read_body(request, CompletionRequest)
        entry, chat = await self.loaded(body.model)
        prompts = _prompts(body.prompt, chat.tokenizer)
        limit = 16 if body.max_tokens is None else body.max_tokens
        if body.stream and body.echo:
            raise Refused("echo cannot be streamed", "echo")
        if limit == 0 and not body.echo:
            raise Refused("max_tokens 0 makes sense with echo only: nothing would be answered", "max_tokens")
        answer = _Answer("cmpl", "text_completion", entry.name, prompts)
        echoes = [await self._echo(chat, prompt, body.logprobs) for prompt in prompts] if body.echo else None
        if echoes is not None and limit == 0:
            return json_response(answer.whole(_only_echoes(echoes, chat.tokenizer, body.logprobs), []))
        choices = self._choices(chat, body, prompts, limit, body.logprobs)
        if body.stream:
            return self._stream(answer, body, choices)
        await _read_all(request, choices)
        before = [echoes[choice.index // body.n] if echoes else [] for choice in choices]
        shown = [_text_choice(c, echo, body.logprobs) for c, echo in zip(choices, before, strict=True)]
        return json_response(answer.whole(shown, choices))

    async def chat_completions(self, request: Request) -> Response:
        """Answer conversations."""
        body = await read_body(request, ChatRequest)
        entry, chat = await self.loaded(body.model)
        if chat.tokenizer.chat_template is None:
            raise Refused(
                f"{entry.name} is a base model: it continues text and has no chat template; use /v1/completions",
                "model",
            )
        prompt = _chat_prompt(chat.tokenizer, body)
        limit = body.max_completion_tokens or body.max_tokens or chat.model.config.max_position
        top = (body.top_logprobs or 0) if body.logprobs else None
        answer = _Answer("chatcmpl", "chat.completion", entry.name, [prompt])
        choices = self._choices(chat, body, [prompt], limit, top)
        if body.stream:
            return self._stream(answer, body, choices)
        await _read_all(request, choices)
        return json_response(answer.whole([_chat_choice(choice) for choice in choices], choices))

    def _choices(
        self,
        chat: ChatModel,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[Sequence[int]],
        limit: int,
        top_logprobs: int | None,
    ) -> list[Choice]:
        """Hand rows to the thread: `n` for each prompt."""
        tokenizer, config = chat.tokenizer, chat.model.config
        if len(prompts) * body.n > _MOST_ROWS:
            raise Refused(f"{len(prompts)} prompts times n={body.n} is more than {_MOST_ROWS}", "n")
        ends = () if body.ignore_eos else {*tokenizer.stop_token_ids, tokenizer.document_token_id}
        seeds = sequence_seeds(
            secrets.randbits(63) if body.seed is None else body.seed, len(prompts) * body.n
        )
        choices: list[Choice] = []
        for prompt in prompts:
            check_prompt(prompt, config.vocab_size, config.max_position)
            params = SamplingParams(
                max_tokens=min(limit, config.max_position - len(prompt)),
                temperature=1.0 if body.temperature is None else body.temperature,
                top_k=max(body.top_k or 0, 0),
                top_p=body.top_p or 1.0,
                min_p=body.min_p or 0.0,
                stop_token_ids=tuple(ends),
            )
            for _ in range(body.n):
                ticket = Ticket(prompt, params, seeds[len(choices)], top_logprobs)
                text = StoppingText(tokenizer, body.stops, skip_special=not body.ignore_eos)
                parts = None
                if isinstance(body, ChatRequest):
                    with_tools = bool(body.tools) and body.tool_choice != "none"
                    parts = ReplyParts(_opens_thought(tokenizer, prompt), with_tools)
                choices.append(Choice(len(choices), ticket, tokenizer, text, parts))
        self.batcher.submit(chat, [choice.ticket for choice in choices])
        return choices

    async def _echo(self, chat: ChatModel, prompt: Sequence[int], top: int | None) -> list[Drawn]:
        """Return the prompt's own tokens, with logprobs if they are asked for."""
        check_prompt(prompt, chat.model.config.vocab_size, chat.model.config.max_position + 1)
        if top is None:
            return [Drawn(token) for token in prompt]
        scored = await self.batcher.compute(lambda: score_tokens(chat.model, prompt, top))
        return [Drawn(token, s.logprob, list(s.top)) for token, s in zip(prompt, scored, strict=True)]

    def _stream(
        self, answer: _Answer, body: CompletionRequest | ChatRequest, choices: list[Choice]
    ) -> Response:
        """Send pieces as server-sent events while they are written."""
        make = _chat_chunks if isinstance(body, ChatRequest) else _text_chunks
        with_usage = bool(body.stream_options and body.stream_options.include_usage)

        async def events() -> AsyncIterator[str]:
            ready: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

            async def follow(choice: Choice) -> None:
                try:
                    async for chunk in make(choice):
                        ready.put_nowait(chunk)
                    ready.put_nowait(None)
                except Exception as error:
                    ready.put_nowait(error)

            following = [asyncio.create_task(follow(choice)) for choice in choices]
            try:
                left = len(choices)
                while left:
                    chunk = await ready.get()
                    if isinstance(chunk, Exception):
                        yield f"data: {to_json(error_object(chunk)[1])}\n\n"
                        return
                    if chunk is None:
                        left -= 1
                    else:
                        yield f"data: {to_json(answer.chunk([chunk], with_usage))}\n\n"
                if with_usage:
                    usage = {"usage": answer.usage(choices)}
                    yield f"data: {to_json(answer.chunk([], False) | usage)}\n\n"
                yield "data: [DONE]\n\n"
            finally:  # also when the client has gone
                for task in following:
                    task.cancel()
                for choice in choices:
                    choice.ticket.cancel()

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(), headers=headers, media_type="text/event-stream")


async def _read_all(request: Request, choices: Sequence[Choice]) -> None:
    """Read all completions to their ends; give up when the client has gone.

    Raises:
        ClientDisconnect: it has.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reading = asyncio.gather(*(choice.read() for choice in choices))
    leaving = asyncio.create_task(gone())
    either: set[asyncio.Future[Any]] = {reading, leaving}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ClientDisconnect
        await reading
    finally:
        leaving.cancel()
        reading.cancel()
        for choice in choices:
            choice.ticket.cancel()


# --- what was asked ---------------------------------------------------------------------------------------------------


def _prompts(prompt: str | list[int] | list[str] | list[list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Return token ids of every prompt; text begins like every document in pretraining."""
    if not prompt:
        prompt = ""
    several: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    start = [] if tokenizer.document_token_id is None else [tokenizer.document_token_id]
    return [[*start, *tokenizer.encode(one)] if isinstance(one, str) else list(one) for one in several]


def _chat_prompt(tokenizer: Tokenizer, body: ChatRequest) -> list[int]:
    """Return the token ids of the conversation, ready for the assistant's turn."""
    variables = dict(body.chat_template_kwargs)
    for reserved in ("self", "messages", "add_generation_prompt"):
        if reserved in variables:
            raise Refused(f"chat_template_kwargs cannot set {reserved}", "chat_template_kwargs")
    if body.tools and body.tool_choice != "none":
        if "tools" not in (tokenizer.chat_template or ""):
            raise Refused("this model's chat template has no place for tools", "tools")
        variables["tools"] = body.tools
    messages = [_plain_message(number, message) for number, message in enumerate(body.messages)]
    return tokenizer.encode_prompt(cast("list[Message]", messages), **variables)


def _plain_message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """Join a message's text parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused(f"messages[{number}].content: only parts of type text are understood", "messages")
    return {**message, "content": "".join(part["text"] for part in content)}


def _opens_thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    return tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")


# --- what is answered -------------------------------------------------------------------------------------------------


class _Answer:
    """What all parts of one answer have in common."""

    def __init__(self, prefix: str, kind: str, model: str, prompts: Sequence[Sequence[int]]) -> None:
        self._kind = kind
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._prompt_tokens = sum(map(len, prompts))

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        written = sum(len(choice.drawn) for choice in choices)
        total = self._prompt_tokens + written
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": written,
            "total_tokens": total,
        }

    def whole(self, shown: list[dict[str, Any]], choices: Sequence[Choice]) -> dict[str, Any]:
        return {"object": self._kind, **self._head, "choices": shown, "usage": self.usage(choices)}

    def chunk(self, shown: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
        kind = "text_completion" if self._kind == "text_completion" else f"{self._kind}.chunk"
        return {"object": kind, **self._head, "choices": shown} | ({"usage": None} if with_usage else {})


def _model_object(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.name,
        "object": "model",
        "created": int(entry.made),
        "owned_by": "nurture",
        "kind": entry.kind,
        "is_base": entry.is_base,
    }


def _text_choice(choice: Choice, echo: Sequence[Drawn], top: int | None) -> dict[str, Any]:
    tokens = [*echo, *choice.drawn]
    start = choice.tokenizer.decode([drawn.token for drawn in echo], skip_special=True)
    return {
        "index": choice.index,
        "text": start + choice.said,
        "finish_reason": choice.finish_reason,
        "logprobs": None if top is None else _text_logprobs(choice.tokenizer, tokens),
    }


def _only_echoes(
    echoes: Sequence[Sequence[Drawn]], tokenizer: Tokenizer, top: int | None
) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "text": tokenizer.decode([drawn.token for drawn in echo], skip_special=True),
            "finish_reason": "length",
            "logprobs": None if top is None else _text_logprobs(tokenizer, echo),
        }
        for index, echo in enumerate(echoes)
    ]


def _text_logprobs(tokenizer: Tokenizer, tokens: Sequence[Drawn], offset: int = 0) -> dict[str, Any]:
    texts = [token_text(tokenizer, drawn.token) for drawn in tokens]
    offsets = [offset]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [drawn.logprob for drawn in tokens],
        "top_logprobs": [
            {token_text(tokenizer, token): logprob for token, logprob in drawn.top} or None
            for drawn in tokens
        ],
        "text_offset": offsets[: len(texts)],
    }


def _chat_choice(choice: Choice) -> dict[str, Any]:
    assert choice.parts is not None
    calls = choice.parts.tool_calls()
    message: dict[str, Any] = {"role": "assistant", "content": choice.parts.content, "refusal": None}
    if choice.parts.reasoning:
        message["reasoning_content"] = choice.parts.reasoning
    if calls:
        message |= {"tool_calls": calls, "content": choice.parts.content or None}
    return {
        "index": choice.index,
        "message": message,
        "finish_reason": "tool_calls" if calls else choice.finish_reason,
        "logprobs": _chat_logprobs(choice, choice.drawn),
    }


def _chat_logprobs(choice: Choice, tokens: Sequence[Drawn]) -> dict[str, Any] | None:
    if choice.ticket.top_logprobs is None:
        return None

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(choice.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    content = [
        one(drawn.token, drawn.logprob) | {"top_logprobs": [one(*pair) for pair in drawn.top]}
        for drawn in tokens
    ]
    return {"content": content, "refusal": None}


async def _text_chunks(choice: Choice) -> AsyncIterator[dict[str, Any]]:
    """Yield the parts of a streamed continuation."""
    offset = 0
    async for piece, drawn in choice.pieces():
        logprobs = None
        if drawn is not None and choice.ticket.top_logprobs is not None:
            logprobs = _text_logprobs(choice.tokenizer, [drawn], offset)
            offset += len(logprobs["tokens"][0])
        if piece or logprobs:
            yield {"index": choice.index, "text": piece, "finish_reason": None, "logprobs": logprobs}
    yield {"index": choice.index, "text": "", "finish_reason": choice.finish_reason, "logprobs": None}


async def _chat_chunks(choice: Choice) -> AsyncIterator[dict[str, Any]]:
    """Yield the parts of a streamed reply."""
    assert choice.parts is not None

    def part(delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}

    yield part({"role": "assistant", "content": ""})
    async for piece, drawn in choice.pieces():
        reasoning, content = choice.parts.add(piece, final=drawn is None)
        logprobs = None if drawn is None else _chat_logprobs(choice, [drawn])
        if reasoning:
            yield part({"reasoning_content": reasoning})
        if content or logprobs:
            yield part({"content": content}, logprobs)
    calls = choice.parts.tool_calls()
    if calls:
        numbered = [{"index": number} | call for number, call in enumerate(calls)]
        yield part({"tool_calls": numbered})
    yield part({}, reason="tool_calls" if calls else choice.finish_reason)
