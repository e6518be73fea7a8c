"""One thread computes for all clients: requests to the same model decode together, in one batch.

Every model in use has a *lane*: its prepared weights, one key/value cache, and the rows that are being written. The
thread goes round the lanes; each visit admits waiting rows (prompts of about one length are prefilled together, one
that is asked for `n` times once), draws one token for every row and hands it out. A row leaves when it has stopped,
reached its limit, or its client has gone; its place is free for the next one at once. Other computations (scoring a
text for the Tokens page) are done between two steps, so nothing else touches a model.

Rows of a batch may have different sampling settings, which is why this is not `Engine.generate`; decoder, cache, draw
and seeds are the engine's own, and so are the tokens: the same prompt and seed give what `Engine.generate` gives
(tested). When too many rows wait, new ones are refused, which the API passes on as 429.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nurture.errors import NurtureError
from nurture.inference.chat import ChatModel
from nurture.inference.engine import length_buckets
from nurture.inference.sampling import SamplingParams, sample, uniforms
from nurture.model.kv_cache import KVCache

log = logging.getLogger(__name__)

_ROWS = 64
"""Rows of a lane that decode together."""
_WAITING = 256
"""Rows that may wait in a lane before new ones are refused."""


class Overloaded(NurtureError):
    """Too much is waiting; the same request may go through in a moment."""


class ContextOverflow(NurtureError):
    """The prompt leaves no room for an answer."""


@dataclass(frozen=True)
class Drawn:
    """One token of one row.

    Attributes:
        token: its id.
        logprob: nats under the model itself (temperature 1); None where there is none or none was asked for.
        top: the likeliest tokens with their logprobs.
        finish_reason: "stop" or "length" with the last token, else None.
    """

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Row:
    """One completion on its way.

    Attributes:
        prompt: token ids.
        params: sampling, limit and stop tokens.
        seed: of this completion.
        top_logprobs: how many likeliest tokens to report with each token; None: no logprobs at all.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    top_logprobs: int | None = None
    written: int = 0
    last: int = 0
    over: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _queue: asyncio.Queue[Drawn | Exception] = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        """Give the row's place up; harmless when it has ended."""
        self.over = True

    async def next(self) -> Drawn:
        """Return the next token; the one with a finish reason is the last.

        Raises:
            Exception: whatever went wrong while computing.
        """
        drawn = await self._queue.get()
        if isinstance(drawn, Exception):
            raise drawn
        return drawn

    def _hand_over(self, drawn: Drawn | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, drawn)
        except RuntimeError:  # the client's loop is closed
            self.over = True


class _Lane:
    """One model, its cache, and the rows it writes."""

    def __init__(self, chat: ChatModel) -> None:
        self.decoder = chat.engine.decoder
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self._reset_cache()

    def _reset_cache(self, rows: int = 4) -> None:
        self._capacity = rows
        self.cache: KVCache = self.decoder.new_cache(rows, rows=0)

    @torch.inference_mode()
    def step(self) -> None:
        """Drop what is over, admit what waits, draw a token for every row."""
        self._drop()
        entering: list[Row] = []
        while self.waiting and len(self.active) + len(entering) < _ROWS:
            row = self.waiting.popleft()
            if not row.over:
                entering.append(row)
        if self.active:
            last = torch.tensor([[row.last] for row in self.active], device=self.decoder.device)
            self._draw(self.active, self.decoder.forward(last, self.cache))
        if entering:
            self._admit(entering)

    def _drop(self) -> None:
        finished = [index for index, row in enumerate(self.active) if row.over]
        if finished:
            self.active = [self.active[index] for index in self.cache.drop(finished)]
        if not self.active and self.cache.columns:
            self._reset_cache()  # give the memory of many and long rows back

    def _admit(self, entering: list[Row]) -> None:
        needed = len(self.active) + len(entering)
        if needed > self._capacity:
            held = self.cache
            self._reset_cache(min(max(needed, 2 * self._capacity), _ROWS))
            self.cache.append(held, range(held.rows))
        for prompts in length_buckets(sorted({row.prompt for row in entering}, key=len)):
            part = self.decoder.new_cache(len(prompts))
            logits = self.decoder.feed(prompts, part)
            place = {prompt: index for index, prompt in enumerate(prompts)}
            rows = [row for row in entering if row.prompt in place]
            sources = [place[row.prompt] for row in rows]
            self.cache.append(part, sources)
            self.active += rows
            self._draw(rows, logits[torch.tensor(sources, device=logits.device)])

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Draw the next token of each row from its logits (B, V) and hand it to whoever asked."""
        uniform = uniforms([row.seed for row in rows], [row.written for row in rows], 1)[:, 0]
        uniform = uniform.to(logits.device)
        together: dict[Any, list[int]] = {}
        for index, row in enumerate(rows):
            params = row.params
            together.setdefault((params.temperature, params.top_k, params.top_p, params.min_p), []).append(
                index
            )
        tokens = [0] * len(rows)
        for indices in together.values():
            chosen, _ = sample(logits[indices], rows[indices[0]].params, uniform[indices])
            for index, token in zip(indices, chosen.tolist(), strict=True):
                tokens[index] = token
        reported = [index for index, row in enumerate(rows) if row.top_logprobs is not None]
        logprobs = dict(zip(reported, logits[reported].float().log_softmax(-1), strict=True))
        for index, row in enumerate(rows):
            row.last, row.written = tokens[index], row.written + 1
            stopped = row.last in row.params.stop_token_ids
            row_over = stopped or row.written == row.params.max_tokens
            logprob, top = _report(logprobs.get(index), row.last, row.top_logprobs or 0)
            row._hand_over(
                Drawn(row.last, logprob, top, ("stop" if stopped else "length") if row_over else None)
            )
            row.over = row.over or row_over

    def fail(self, error: Exception) -> None:
        """Tell everybody, and start afresh."""
        for row in (*self.active, *self.waiting):
            row._hand_over(error)
            row.over = True
        self.waiting.clear()
        self.active = []
        self._reset_cache()


def _report(logprobs: Tensor | None, token: int, count: int) -> tuple[float | None, list[tuple[int, float]]]:
    if logprobs is None:
        return None, []
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))


class Batcher:
    """The thread that computes. Everything else only asks it."""

    def __init__(self) -> None:
        self._lanes: dict[int, tuple[ChatModel, _Lane]] = {}
        self._tasks: deque[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="nurture-batcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the step under way; rows that are being written fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, chat: ChatModel, rows: Sequence[Row]) -> None:
        """Have completions written; read them from the rows.

        Raises:
            ContextOverflow: a prompt leaves no room.
            Overloaded: too many rows are waiting.
            NurtureError: a prompt is empty or holds ids the model does not know.
        """
        config = chat.model.config
        for row in rows:
            check_prompt(row.prompt, config.vocab_size, config.max_position)
        with self._changed:
            _, lane = self._lanes.setdefault(id(chat), (chat, _Lane(chat)))
            if len(lane.waiting) + len(rows) > _WAITING:
                raise Overloaded(f"{len(lane.waiting)} requests are waiting already. Try again in a moment.")
            lane.waiting.extend(rows)
            self._changed.notify()

    async def compute(self, work: Callable[[], Any]) -> Any:
        """Return `work()`, done by the thread between two steps; its exception becomes the caller's."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

        def settle_there(value: Any, error: Exception | None) -> None:
            loop.call_soon_threadsafe(settle, value, error)

        with self._changed:
            if len(self._tasks) >= _WAITING:
                raise Overloaded("Too much is waiting already. Try again in a moment.")
            self._tasks.append((work, settle_there))
            self._changed.notify()
        return await future

    def load(self) -> dict[str, int]:
        """Return how many rows are written and how many wait."""
        with self._changed:
            lanes = [lane for _, lane in self._lanes.values()]
            return {
                "active": sum(not row.over for lane in lanes for row in lane.active),
                "waiting": sum(not row.over for lane in lanes for row in lane.waiting),
            }

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._tasks or self._busy())
                if self._stopping:
                    break
                task = self._tasks.popleft() if self._tasks else None
                lanes = self._busy()
                if not lanes and len(self._lanes) > 1:
                    self._lanes.clear()  # idle: let go of models the library has dropped
            if task is not None:
                _do(*task)
            for lane in lanes:
                try:
                    lane.step()
                except Exception as error:
                    log.exception("the batch of a model failed")
                    lane.fail(error)
        for _, lane in self._lanes.values():
            lane.fail(Overloaded("the server is stopping"))

    def _busy(self) -> list[_Lane]:
        return [lane for _, lane in self._lanes.values() if lane.active or lane.waiting]


def _do(work: Callable[[], Any], settle: Callable[[Any, Exception | None], None]) -> None:
    value: Any = None
    error: Exception | None = None
    try:
        with torch.inference_mode():
            value = work()
    except Exception as problem:
        error = problem
    try:
        settle(value, error)
    except RuntimeError:
        log.debug("nobody waits for a result any more")


def check_prompt(prompt: Sequence[int], vocab_size: int, max_position: int) -> None:
    """Check that a prompt can be answered.

    Raises:
        ContextOverflow, NurtureError: it cannot.
    """
    if not prompt:
        raise NurtureError("the prompt is empty; give it at least one token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise NurtureError(f"the prompt holds token ids outside 0 to {vocab_size - 1}")
    if len(prompt) >= max_position:
        raise ContextOverflow(
            f"This model's maximum context length is {max_position} tokens, but the prompt has {len(prompt)}. "
            "Shorten it, or use a model with a longer context."
        )
