"""The one rollout engine: prompts of token ids in, completions or whole episodes with logprobs out.

Prompts are prefilled together with others of about their length, identical ones once; all rows then decode in step,
finished rows are replaced by waiting prompts or dropped. In an episode (`converse`) somebody else writes between the
policy's turns: the row keeps its keys and values, only the new tokens are computed, and the others go on meanwhile.
What was drawn past a stop token, until enough rows had ended to be worth the interruption, is thrown away. An episode
depends on its prompt, its seed, what it is answered and the weights alone: not on its neighbours, their number or the
order. Logits still differ in their last bits between batch sizes where the library's products do (float32: about
1e-6), which turns a choice only if its uniform number falls in so thin a slice.

`Engine.converse` fills and drains one `Batch`; the studio's server keeps one running for every model it serves, whose
rows have settings of their own and join and leave between two tokens.

The engine knows token ids only; text, tools and environments live above it. It follows the model it was made from:
weights changed in place (an optimizer step, `load_state_dict`) are noticed at the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nurture.errors import NurtureError
from nurture.inference.decoder import Decoder
from nurture.inference.sampling import (
    SamplingParams,
    alike,
    sample,
    sample_groups,
    sequence_seeds,
    uniforms,
)
from nurture.model.kv_cache import KVCache
from nurture.model.transformer import Transformer

_STEPS_PER_CHECK = 8
"""Decoding steps between two looks for stop tokens, where looking makes the device wait."""
_DROP_SHARE = 8
"""Rows whose turn has ended idle until it is one in so many: every new batch size costs the library some set-up."""
_PREFILL_TOKENS = 16_384
"""Most tokens of one prefill, padding included: bounds its memory."""


@dataclass
class Completion:
    """What the policy wrote for one prompt.

    Attributes:
        token_ids: the tokens, the stop token included.
        logprobs: nats, log softmax(logits / temperature) of each token over the whole vocabulary (at temperature 1 when
            greedy), whatever was truncated: what the trainer computes.
        finish_reason: "stop" (a stop token) or "length" (max_tokens, or the end of the model's context).
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Episode:
    """What followed one prompt: turns of the policy, and what it was answered between them.

    Attributes:
        turns: the policy's turns in order.
        answers: the tokens that came after each turn but the last.
        is_full: the last turn was answered, but the context had no room for it.
    """

    turns: list[Completion] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    is_full: bool = False

    def flat(self) -> tuple[list[int], list[bool], list[float]]:
        """Return tokens after the prompt, whether the policy wrote each, and logprobs (0 where it did not)."""
        token_ids, completion_mask, logprobs = list[int](), list[bool](), list[float]()
        for turn, answer in zip(self.turns, [*self.answers, list[int]()], strict=True):
            token_ids += turn.token_ids + answer
            completion_mask += [True] * len(turn.token_ids) + [False] * len(answer)
            logprobs += turn.logprobs + [0.0] * len(answer)
        return token_ids, completion_mask, logprobs


Respond = Callable[[list[tuple[int, Completion]]], Sequence[Sequence[int] | None]]
"""respond(turns that ended, with their prompts' indices) -> for each the tokens to answer it with, or None: the end."""


def silence(ended: Callable[[int], None] | None = None) -> Respond:
    """Return what answers no turn, so that every episode is one completion; `ended` is told how many more there are."""

    def respond(turns: list[tuple[int, Completion]]) -> list[None]:
        if ended is not None:
            ended(len(turns))
        return [None] * len(turns)

    return respond


@dataclass(eq=False)
class Row:
    """One row of a batch: a prompt on its way to a completion, or to an episode.

    Attributes:
        prompt: token ids, at least one.
        params: how to sample a turn, and when it stops.
        seed: of its draws.
        limit: tokens the turn may become, from `params.max_tokens` and the room in the context.
        index: the prompt's place among those of a call.
        episode: what has been written.
        finished: the turn is over.
        drawn: tokens the policy has written in all turns: which uniform number is next.
        length: tokens of prompt and episode.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    limit: int
    index: int = 0
    episode: Episode = field(default_factory=lambda: Episode([Completion()]))
    finished: bool = False
    drawn: int = 0
    length: int = field(init=False)
    _stops: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.length, self._stops = len(self.prompt), frozenset(self.params.stop_token_ids)

    @property
    def completion(self) -> Completion:
        """The turn being written."""
        return self.episode.turns[-1]

    def take(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add drawn tokens up to a stop token or the limit, and drop the rest."""
        written = self.completion
        if self.finished:  # a row that waits for its turn to be noticed
            return
        room = self.limit - len(written.token_ids)
        before = len(written.token_ids)
        for token, logprob in zip(token_ids[:room], logprobs[:room], strict=True):
            written.token_ids.append(token)
            written.logprobs.append(logprob)
            if token in self._stops:
                written.finish_reason = "stop"
                self.finished = True
                break
        added = len(written.token_ids) - before
        self.drawn, self.length = self.drawn + added, self.length + added
        self.finished = self.finished or len(written.token_ids) == self.limit

    def answer(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """Begin a new turn after `token_ids`; return the tokens the cache does not hold yet."""
        pending = [self.completion.token_ids[-1], *token_ids]
        self.episode.answers.append(list(token_ids))
        self.episode.turns.append(Completion())
        self.finished, self.limit, self.length = False, limit, self.length + len(token_ids)
        return pending


class Batch:
    """Rows that decode in step, each with its own settings; they join and leave between two tokens.

    Attributes:
        rows: as they lie in the cache; those that are finished idle until they leave.
    """

    def __init__(self, decoder: Decoder, max_rows: int) -> None:
        """Open an empty batch; `max_rows` is what the cache keeps room for from the start, it grows with more."""
        self.decoder = decoder
        self.rows: list[Row] = []
        self._cache = decoder.new_cache(max_rows, rows=0)
        self._last = torch.empty(0, dtype=torch.int64, device=decoder.device)

    @torch.inference_mode()
    def join(self, entering: Sequence[Row]) -> Tensor:
        """Prefill prompts, identical ones once, add their rows and draw their first tokens.

        Returns:
            The logits (B, V) these were drawn from, in the order of `entering`.
        """
        prompts = sorted({row.prompt for row in entering}, key=len)
        logits: dict[tuple[int, ...], Tensor] = {}
        where: dict[tuple[int, ...], tuple[KVCache, int]] = {}
        for group in _length_buckets(prompts):
            part = self.decoder.new_cache(len(group))
            outputs = self.decoder.feed(group, part)
            for row, prompt in enumerate(group):
                logits[prompt], where[prompt] = outputs[row], (part, row)
        start = 0
        while start < len(entering):  # runs of rows whose prompts were prefilled in one cache
            part = where[entering[start].prompt][0]
            stop = start
            while stop < len(entering) and where[entering[stop].prompt][0] is part:
                stop += 1
            self._cache.append(part, [where[row.prompt][1] for row in entering[start:stop]])
            start = stop
        return self._draw_first(entering, torch.stack([logits[row.prompt] for row in entering]))

    @torch.inference_mode()
    def decode(self, steps: int) -> Tensor:
        """Draw up to `steps` tokens for every row; fewer where enough rows have stopped.

        Returns:
            The logits (B, V) the last of them were drawn from.
        """
        device = self.decoder.device
        drawn = uniforms([r.seed for r in self.rows], [r.drawn for r in self.rows], steps).to(device)
        groups = alike([row.params for row in self.rows])
        stop_ids = self._stop_ids()
        stopped = torch.tensor([row.finished for row in self.rows], device=device)
        tokens, logprobs = [], []
        for step in range(steps):
            logits = self.decoder.forward(self._last[:, None], self._cache)
            self._last, logprob = sample_groups(logits, groups, drawn[:, step])
            tokens.append(self._last)
            logprobs.append(logprob)
            if device.type == "cpu" and steps > 1 and stop_ids.shape[1]:
                stopped |= (self._last[:, None] == stop_ids).any(1)
                if int(stopped.sum()) * _DROP_SHARE >= len(self.rows):
                    break
        columns = zip(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        for number, (row, (row_tokens, row_logprobs)) in enumerate(zip(self.rows, columns, strict=True)):
            row.take(row_tokens, row_logprobs)
            if row.finished:  # an idle row writes over the same few columns
                self._cache.rewind(number, row.length - 1)
        return logits

    @torch.inference_mode()
    def leave(self, numbers: Sequence[int], pending: dict[int, list[int]] | None = None) -> None:
        """Take rows out; those in `pending` (number -> tokens the cache lacks) come back with the next turn begun."""
        pending = pending or {}
        going_on = [number for number in numbers if number in pending]
        returning = [self.rows[number] for number in going_on]
        held = self.decoder.new_cache(len(going_on), rows=0)
        held.append(self._cache, going_on)
        order = self._cache.drop(numbers)
        self.rows, self._last = [self.rows[number] for number in order], self._last[order]
        if not going_on:
            return
        tokens = [pending[number] for number in going_on]
        for place, (row, new) in enumerate(zip(returning, tokens, strict=True)):
            held.rewind(place, row.length - len(new))  # forget what was drawn past the end of the turn
        logits = self.decoder.feed(tokens, held)
        self._cache.append(held, range(len(going_on)))
        self._draw_first(returning, logits)

    def _draw_first(self, entering: Sequence[Row], logits: Tensor) -> Tensor:
        """Draw the first token of the turn of every row that has been appended to the cache, from logits (B, V)."""
        drawn = uniforms([row.seed for row in entering], [row.drawn for row in entering], 1)
        groups = alike([row.params for row in entering])
        tokens, logprobs = sample_groups(logits, groups, drawn[:, 0].to(self.decoder.device))
        for row, token, logprob in zip(entering, tokens.tolist(), logprobs.tolist(), strict=True):
            row.take([token], [logprob])
        self.rows, self._last = [*self.rows, *entering], torch.cat((self._last, tokens))
        return logits

    def _stop_ids(self) -> Tensor:
        """Return the stop tokens of the rows, (1, S) where all have the same, else (B, S) filled up with -1."""
        stops = [row.params.stop_token_ids for row in self.rows]
        if stops.count(stops[0]) == len(stops):
            stops = stops[:1]
        longest = max(map(len, stops))
        padded = [[*ids, *[-1] * (longest - len(ids))] for ids in stops]
        return torch.tensor(padded, dtype=torch.int64, device=self.decoder.device)


class Engine:
    """Draws completions from a model. Not safe for use from several threads at once."""

    def __init__(self, model: Transformer, *, max_batch: int = 64, dtype: torch.dtype | None = None) -> None:
        """Prepare the model for decoding.

        Args:
            model: a language model; it is not changed.
            max_batch: most sequences decoded at once.
            dtype: of the matrices; default: the model's. bfloat16 is up to twice as fast and rounds.

        Raises:
            NurtureError: the model has a scalar head, or `max_batch` is below 1.
        """
        if model.head != "lm":
            raise NurtureError(f"a model with a {model.head} head cannot generate: load it with head 'lm'")
        if max_batch < 1:
            raise NurtureError(f"engine: max_batch must be at least 1, got {max_batch}")
        self.model = model
        self.max_batch = max_batch
        self.dtype = dtype or model.embedding.weight.dtype
        self._weights_seen = weights_version(model)
        self.decoder = Decoder(model, self.dtype)
        self._stream_cache: tuple[list[int], KVCache] | None = None

    def refresh(self) -> None:
        """Take the model's weights as they are now; called by itself when they were changed in place."""
        self.decoder.refresh()
        self._stream_cache = None
        self._weights_seen = weights_version(self.model)

    def _follow_weights(self) -> None:
        if weights_version(self.model) != self._weights_seen:
            self.refresh()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
        ended: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: token ids, any number of prompts of any lengths.
            params: how to sample, and when to stop.
            seeds: one integer a prompt; default: derived from `params.seed` and the prompt's place in the list.
            ended: is told how many more prompts are complete, to show it.

        Returns:
            One completion a prompt, in order.

        Raises:
            NurtureError: a prompt is empty, leaves no room in the context, or holds ids outside the vocabulary.
        """
        return [episode.turns[0] for episode in self.converse(prompts, silence(ended), params, seeds)]

    @torch.inference_mode()
    def converse(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        params: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[Episode]:
        """Play out an episode after every prompt: turns of the policy, each answered by `respond` or the last.

        Args:
            prompts: token ids.
            respond: called with some of the turns that ended, in any order; must not depend on which come together.
                An answer that leaves no room in the context is not taken: the episode ends.
            params: how to sample a turn, and when it stops; `max_tokens` is of one turn.
            seeds: one integer a prompt.
            max_length: most tokens of prompt and episode, where that is less than the model's context.

        Returns:
            One episode a prompt, in order.

        Raises:
            NurtureError: as `generate`.
        """
        params = params or SamplingParams()
        self._follow_weights()
        context = min(max_length or self.model.config.max_position, self.model.config.max_position)
        rows = self._rows(prompts, params, seeds, context)
        waiting = deque(sorted(rows, key=lambda row: len(row.prompt)))
        batch = Batch(self.decoder, min(self.max_batch, len(rows)))
        while waiting or batch.rows:
            # Refill once a quarter of the rows is free: a prefill for every single row would cost more than idle rows.
            free = self.max_batch - len(batch.rows)
            if waiting and free >= min(len(waiting), max(1, self.max_batch // 4)):
                batch.join([waiting.popleft() for _ in range(min(free, len(waiting)))])
            else:
                batch.decode(_steps_to_next_look(batch.rows))
            while ended := _enough_ended(batch.rows):  # a turn may be over with its first token
                batch.leave(ended, _answers(batch.rows, ended, respond, context))
        return [row.episode for row in rows]

    def stream(
        self, prompt: Sequence[int], params: SamplingParams | None = None, seed: int | None = None
    ) -> Iterator[int]:
        """Yield the tokens of one completion as they are drawn; the same tokens as `generate` with this seed.

        What the prompt has in common with the previous call (a conversation going on) is not computed again.

        Args:
            prompt: token ids.
            params: how to sample, and when to stop. The stop token is yielded.
            seed: default: as `generate` gives its first prompt.

        Raises:
            NurtureError: as `generate`.
        """
        params = params or SamplingParams()
        self._follow_weights()
        context = self.model.config.max_position
        (row,) = self._rows([prompt], params, None if seed is None else [seed], context)
        pending, cache = self._resume_stream(row.prompt)
        held = list(row.prompt)
        while not row.finished:
            drawn = uniforms([row.seed], [row.drawn], 1)
            token, logprob = self._stream_step(pending, cache, params, drawn)
            self._stream_cache = (held.copy(), cache)
            row.take([token], [logprob])
            held.append(token)
            pending = [token]
            yield token

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None,
        context: int,
    ) -> list[Row]:
        """Check the prompts and give each its seed and its limit."""
        config = self.model.config
        if seeds is None:
            seeds = sequence_seeds(params.seed, len(prompts))
        if len(seeds) != len(prompts):
            raise NurtureError(f"engine: {len(prompts)} prompts need as many seeds, got {len(seeds)}")
        rows = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            prompt = tuple(int(token) for token in prompt)
            if not prompt:
                raise NurtureError(f"engine: prompt {index} is empty; give it at least one token")
            if min(prompt) < 0 or max(prompt) >= config.vocab_size:
                raise NurtureError(
                    f"engine: prompt {index} holds token id {max(prompt, key=abs)}, but the model's vocabulary has "
                    f"{config.vocab_size}: is this the model's own tokenizer?"
                )
            room = context - len(prompt)
            if room < 1:
                raise NurtureError(
                    f"engine: prompt {index} has {len(prompt)} tokens, but the model's context is "
                    f"{context} (max_position): shorten it, or extend the model"
                )
            rows.append(Row(prompt, params, int(seed), min(params.max_tokens, room), index))
        return rows

    def _resume_stream(self, prompt: tuple[int, ...]) -> tuple[list[int], KVCache]:
        """Return the tokens of the prompt still to be computed, and the cache that holds those before."""
        if self._stream_cache is not None:
            held, cache = self._stream_cache
            # At least one token is computed again: its logits were not kept.
            longest = min(len(held), len(prompt) - 1)
            common = next((n for n in range(longest) if held[n] != prompt[n]), longest)
            if common:
                cache.truncate(common)
                return list(prompt[common:]), cache
        return list(prompt), self.decoder.new_cache(1)

    @torch.inference_mode()
    def _stream_step(
        self, pending: list[int], cache: KVCache, params: SamplingParams, drawn: Tensor
    ) -> tuple[int, float]:
        """Feed tokens to the only row and draw the next."""
        token_ids = torch.tensor([pending], device=self.decoder.device)
        logits = self.decoder.forward(token_ids, cache)
        tokens, logprobs = sample(logits, params, drawn[:, 0].to(self.decoder.device))
        return int(tokens), float(logprobs)


def _steps_to_next_look(rows: list[Row]) -> int:
    """Return for how many tokens nothing can happen that is worth an interruption."""
    running = [row for row in rows if not row.finished]
    left = sorted(row.limit - len(row.completion.token_ids) for row in running)
    # Rows that may end so that the next look is worth it; those that reach their limit are known in advance.
    enough = max(1, -(-len(rows) // _DROP_SHARE) - (len(rows) - len(running)))
    steps = left[min(enough, len(left)) - 1]
    return min(steps, _STEPS_PER_CHECK) if any(row.params.stop_token_ids for row in rows) else steps


def _enough_ended(rows: list[Row]) -> list[int]:
    """Return the rows whose turn is over, or none while they are too few to be worth an interruption."""
    ended = [number for number, row in enumerate(rows) if row.finished]
    return ended if len(ended) * _DROP_SHARE >= len(rows) else []


def _answers(rows: list[Row], ended: list[int], respond: Respond, context: int) -> dict[int, list[int]]:
    """Have turns answered; return row -> tokens to be computed, of those that go on."""
    turns = [(rows[number].index, rows[number].completion) for number in ended]
    pending: dict[int, list[int]] = {}
    for number, answer in zip(ended, respond(turns), strict=True):
        if answer is None:
            continue
        row = rows[number]
        room = context - row.length - len(answer)
        if room < 1:
            row.episode.is_full = True
            continue
        pending[number] = row.answer(answer, min(row.params.max_tokens, room))
    return pending


def _length_buckets(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Split prompts sorted by length into groups that waste little on padding and fit in memory."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        too_uneven = group and len(prompt) > 1.5 * len(group[0]) + 8
        too_large = (len(group) + 1) * len(prompt) > _PREFILL_TOKENS
        if group and (too_uneven or too_large):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def weights_version(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Change whenever a parameter is replaced or written in place."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
