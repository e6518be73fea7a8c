"""One thread computes for all clients: requests to the same model decode together, in one batch of the engine.

Every model in use has a *lane*: a running `Batch` and the rows that wait for it. The thread goes round the lanes; each
visit lets rows go that have ended or whose client has gone, draws one token for every other row, admits waiting ones
and hands the tokens out. Other computations (scoring a text for the Tokens page) are done between two steps, so nothing
else touches a model. The same prompt and seed give what `Engine.generate` gives (tested). When too many rows wait, new
ones are refused, which the API passes on as 429.
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
from nurture.inference.engine import Batch, Row
from nurture.inference.sampling import SamplingParams

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


class Ticket:
    """What a client holds of a completion that is being written.

    Attributes:
        row: the engine's.
        top_logprobs: how many likeliest tokens to report with each token; None: no logprobs at all.
        over: its place may be given to another.
    """

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, seed: int, top_logprobs: int | None = None
    ) -> None:
        """Prepare a completion of at most `params.max_tokens` tokens, which the context must have room for."""
        self.row = Row(tuple(prompt), params, seed, params.max_tokens)
        self.top_logprobs, self.over = top_logprobs, False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Drawn | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """Give the place up; harmless when it has ended."""
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
    """One model, its batch, and who waits."""

    def __init__(self, chat: ChatModel) -> None:
        self.decoder = chat.engine.decoder
        self.waiting: deque[Ticket] = deque()
        self.active: list[Ticket] = []
        self._empty()

    def _empty(self) -> None:
        self.active = []
        self.batch = Batch(self.decoder, max_rows=4)  # grows with its rows

    def step(self) -> None:
        """Let go who is done, draw a token for every row, admit who waits."""
        self._let_go()
        if self.active:
            self._hand_out(self.active, self.batch.decode(1))
        free = _ROWS - len(self.active)
        entering = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        entering = [ticket for ticket in entering if not ticket.over]
        if entering:
            self.active += entering
            self._hand_out(entering, self.batch.join([ticket.row for ticket in entering]))

    def _let_go(self) -> None:
        if gone := [number for number, ticket in enumerate(self.active) if ticket.over]:
            self.batch.leave(gone)
            holders = {id(ticket.row): ticket for ticket in self.active}
            self.active = [holders[id(row)] for row in self.batch.rows]
            if not self.active:
                self._empty()  # give the memory of many and long rows back

    def _hand_out(self, tickets: Sequence[Ticket], logits: Tensor) -> None:
        """Give everybody the token just drawn from the logits (B, V)."""
        asked = [index for index, ticket in enumerate(tickets) if ticket.top_logprobs is not None]
        logprobs = dict(zip(asked, logits[asked].float().log_softmax(-1), strict=True))
        for index, ticket in enumerate(tickets):
            written = ticket.row.completion
            logprob, top = _report(logprobs.get(index), written.token_ids[-1], ticket.top_logprobs or 0)
            reason = written.finish_reason if ticket.row.finished else None
            ticket._hand_over(Drawn(written.token_ids[-1], logprob, top, reason))
            ticket.over = ticket.over or ticket.row.finished

    def fail(self, error: Exception) -> None:
        """Tell everybody, and start afresh."""
        for ticket in (*self.active, *self.waiting):
            ticket._hand_over(error)
            ticket.over = True
        self.waiting.clear()
        self._empty()


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

    def submit(self, chat: ChatModel, tickets: Sequence[Ticket]) -> None:
        """Have completions written; read them from the tickets.

        Raises:
            ContextOverflow: a prompt leaves no room.
            Overloaded: too many rows are waiting.
            NurtureError: a prompt is empty or holds ids the model does not know.
        """
        config = chat.model.config
        for ticket in tickets:
            check_prompt(ticket.row.prompt, config.vocab_size, config.max_position)
        with self._changed:
            _, lane = self._lanes.setdefault(id(chat), (chat, _Lane(chat)))
            if len(lane.waiting) + len(tickets) > _WAITING:
                raise Overloaded(f"{len(lane.waiting)} requests are waiting already. Try again in a moment.")
            lane.waiting.extend(tickets)
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
                "active": sum(not ticket.over for lane in lanes for ticket in lane.active),
                "waiting": sum(not ticket.over for lane in lanes for ticket in lane.waiting),
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
