"""What comes in and what goes back: bodies checked against their fields, mistakes in OpenAI's error shape.

`{"error": {"message", "type", "param", "code"}}`, for the API and the studio's own endpoints alike. An argument that is
not known is an error, not ignored: a misspelled `temperature` would otherwise cost an afternoon.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from nurture.errors import NurtureError
from nurture.studio.batcher import ContextOverflow, Overloaded
from nurture.studio.library import UnknownModel

log = logging.getLogger(__name__)

_MOST_BYTES = 4 << 20
"""Longest request body."""

Handler = Callable[[Request], Awaitable[Response]]


class Refused(NurtureError):
    """A request that cannot be answered as it is.

    Attributes:
        param: the argument that is wrong.
        status: HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


class Body(BaseModel):
    """A request body: unknown arguments are refused."""

    model_config = ConfigDict(extra="forbid")


AnyBody = TypeVar("AnyBody", bound=Body)


class StreamOptions(BaseModel):
    """What a stream says besides its pieces."""

    include_usage: bool = False


class Sampling(Body):
    """What both kinds of completion take."""

    model: str
    n: int = Field(1, ge=1, le=64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Known and not supported: accepted at the value that changes nothing.
    presence_penalty: Literal[0, None] = None
    frequency_penalty: Literal[0, None] = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: Literal[1, None] = None
    suffix: Literal["", None] = None


class ChatRequest(Sampling):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", None] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] = {}
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


async def read_body(request: Request, shape: type[AnyBody]) -> AnyBody:
    """Return the request's JSON body.

    Raises:
        Refused: it is no JSON, too long, or an argument is missing, unknown or out of range.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind != "application/json":  # what a form of another site cannot send
        raise Refused(f"send JSON (Content-Type: application/json), not '{kind}'", status=415)
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _MOST_BYTES:
            raise Refused(f"the request is longer than {_MOST_BYTES >> 20} MB", status=413)
    try:
        return shape.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise Refused(f"unrecognized argument: {param}", param) from error
        place = ".".join(map(str, first["loc"])) or "the body"
        raise Refused(f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}", param) from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON ({str(error)[:100]})") from error


def to_json(value: Any) -> str:
    """Write JSON that is safe whatever text is in it: lone surrogates and line separators are escaped."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with JSON."""
    return Response(to_json(value), status, headers, media_type="application/json")


def error_object(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and body that tell a client what went wrong."""
    status, kind, param, code = 400, "invalid_request_error", None, None
    message = str(error)
    if isinstance(error, Refused):
        status, param = error.status, error.param
    elif isinstance(error, UnknownModel):
        status, param, code = 404, "model", "model_not_found"
    elif isinstance(error, ContextOverflow):
        code = "context_length_exceeded"
    elif isinstance(error, Overloaded):
        status, kind, code = 429, "rate_limit_error", "overloaded"
    elif not isinstance(error, NurtureError):
        log.error("a request failed", exc_info=error)
        status, kind, message = 500, "server_error", "this is a bug in nurture; the server's log has more"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> Response:
    """Answer with an error in OpenAI's shape."""
    status, body = error_object(error)
    return json_response(body, status, {"Retry-After": "1"} if status == 429 else None)


def answering(handler: Handler) -> Handler:
    """Turn whatever a handler raises into an answer."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return error_response(error)

    return answer
