"""The one rollout engine: prompts of token ids in, completions or whole episodes with logprobs out.

Prompts are prefilled together with others of about their length, identical ones once; all rows then decode in step,
finished rows are replaced by waiting prompts or dropped. In an episode (`converse`) somebody else writes between the
policy's turns: the row keeps its keys and values, only the new tokens are computed, and the others go on meanwhile.
What was drawn past a stop token, until enough rows had ended to be worth the interruption, is thrown away. An episode
depends on its prompt, its seed, what it is answered and the weights alone: not on its neighbours, their number or the
order. Logits still differ in their last bits between batch sizes where the library's products do (float32: about
1e-6), which turns a choice only if its uniform number falls in so thin a slice.

The engine knows token ids only; text, tools and environments live above it. It follows the model it was made from:
weights changed in place (an optimizer step, `load_state_dict`) are noticed at the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nurture.errors import NurtureError
from nurture.inference.decoder import Decoder
from nurture.inference.sampling import SamplingParams, sample, sequence_seeds, uniforms
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


@dataclass
class _Sequence:
    """A prompt on its way to a completion, or to an episode."""

    index: int
    prompt: tuple[int, ...]
    seed: int
    limit: int
    """Tokens the turn may become, from max_tokens and the model's context."""
    episode: Episode = field(default_factory=lambda: Episode([Completion()]))
    finished: bool = False
    """The turn is over."""
    drawn: int = 0
    """Tokens the policy has written in all turns: which uniform number is next."""
    length: int = 0
    """Tokens of prompt and episode."""

    def __post_init__(self) -> None:
        self.length = len(self.prompt)

    @property
    def completion(self) -> Completion:
        """The turn being written."""
        return self.episode.turns[-1]

    def take(self, token_ids: Sequence[int], logprobs: Sequence[float], stops: frozenset[int]) -> None:
        """Add drawn tokens up to a stop token or the limit, and drop the rest."""
        written = self.completion
        if self.finished:  # a row that waits for its turn to be noticed
            return
        room = self.limit - len(written.token_ids)
        before = len(written.token_ids)
        for token, logprob in zip(token_ids[:room], logprobs[:room], strict=True):
            written.token_ids.append(token)
            written.logprobs.append(logprob)
            if token in stops:
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
        self._weights_seen = _weights_version(model)
        self.decoder = Decoder(model, self.dtype)
        self._stream_cache: tuple[list[int], KVCache] | None = None

    def refresh(self) -> None:
        """Take the model's weights as they are now; called by itself when they were changed in place."""
        self.decoder.refresh()
        self._stream_cache = None
        self._weights_seen = _weights_version(self.model)

    def _follow_weights(self) -> None:
        if _weights_version(self.model) != self._weights_seen:
            self.refresh()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: token ids, any number of prompts of any lengths.
            params: how to sample, and when to stop.
            seeds: one integer a prompt; default: derived from `params.seed` and the prompt's place in the list.

        Returns:
            One completion a prompt, in order.

        Raises:
            NurtureError: a prompt is empty, leaves no room in the context, or holds ids outside the vocabulary.
        """
        episodes = self.converse(prompts, lambda turns: [None] * len(turns), params, seeds)
        return [episode.turns[0] for episode in episodes]

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
        sequences = self._sequences(prompts, params, seeds, context)
        waiting = deque(sorted(sequences, key=lambda sequence: len(sequence.prompt)))
        cache = self.decoder.new_cache(min(self.max_batch, len(sequences)), rows=0)
        active: list[_Sequence] = []
        last = torch.empty(0, dtype=torch.int64, device=self.decoder.device)
        while waiting or active:
            # Refill once a quarter of the rows is free: a prefill for every single row would cost more than idle rows.
            free = self.max_batch - len(active)
            if waiting and free >= min(len(waiting), max(1, self.max_batch // 4)):
                entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                first = self._admit(entering, cache, params)
                active, last = active + entering, torch.cat((last, first))
            else:
                last = self._decode(active, last, cache, params)
            while ended := _enough_ended(active):  # a turn may be over with its first token
                active, last = self._next_turns(active, ended, last, cache, respond, params, context)
        return [sequence.episode for sequence in sequences]

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
        (sequence,) = self._sequences([prompt], params, None if seed is None else [seed], context)
        stops = frozenset(params.stop_token_ids)
        pending, cache = self._resume_stream(sequence.prompt)
        held = list(sequence.prompt)
        while not sequence.finished:
            drawn = uniforms([sequence.seed], [sequence.drawn], 1)
            token, logprob = self._stream_step(pending, cache, params, drawn)
            self._stream_cache = (held.copy(), cache)
            sequence.take([token], [logprob], stops)
            held.append(token)
            pending = [token]
            yield token

    def _sequences(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None,
        context: int,
    ) -> list[_Sequence]:
        """Check the prompts and give each its seed and its limit."""
        config = self.model.config
        if seeds is None:
            seeds = sequence_seeds(params.seed, len(prompts))
        if len(seeds) != len(prompts):
            raise NurtureError(f"engine: {len(prompts)} prompts need as many seeds, got {len(seeds)}")
        sequences = []
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
            sequences.append(_Sequence(index, prompt, int(seed), min(params.max_tokens, room)))
        return sequences

    def _admit(self, entering: list[_Sequence], cache: KVCache, params: SamplingParams) -> Tensor:
        """Prefill sequences, add them to the cache's rows in order, and draw their first tokens (B,)."""
        prompts = sorted({sequence.prompt for sequence in entering}, key=len)
        logits: dict[tuple[int, ...], Tensor] = {}
        where: dict[tuple[int, ...], tuple[KVCache, int]] = {}
        for group in length_buckets(prompts):
            part = self.decoder.new_cache(len(group))
            outputs = self.decoder.feed(group, part)
            for row, prompt in enumerate(group):
                logits[prompt], where[prompt] = outputs[row], (part, row)
        start = 0
        while start < len(entering):  # runs of sequences whose prompts were prefilled in one cache
            part = where[entering[start].prompt][0]
            stop = start
            while stop < len(entering) and where[entering[stop].prompt][0] is part:
                stop += 1
            cache.append(part, [where[sequence.prompt][1] for sequence in entering[start:stop]])
            start = stop
        return self._draw_first(
            entering, torch.stack([logits[sequence.prompt] for sequence in entering]), params
        )

    def _next_turns(
        self,
        active: list[_Sequence],
        ended: list[int],
        last: Tensor,
        cache: KVCache,
        respond: Respond,
        params: SamplingParams,
        context: int,
    ) -> tuple[list[_Sequence], Tensor]:
        """Have the turns of the rows `ended` answered; drop rows that are finished, begin the others' next turn.

        Returns:
            The sequences of the cache's rows from now on, and their last tokens.
        """
        leaving = [active[row] for row in ended]
        pending = _answers(leaving, respond, params, context)
        going_on = [sequence for sequence in leaving if sequence.index in pending]
        held = self.decoder.new_cache(len(going_on), rows=0)
        held.append(cache, [row for row in ended if active[row].index in pending])
        order = cache.drop(ended)
        active, last = [active[row] for row in order], last[order]
        if not going_on:
            return active, last
        tokens = [pending[sequence.index] for sequence in going_on]
        for row, (sequence, new) in enumerate(zip(going_on, tokens, strict=True)):
            held.rewind(row, sequence.length - len(new))  # forget what was drawn past the end of the turn
        logits = self.decoder.feed(tokens, held)
        cache.append(held, range(len(going_on)))
        return active + going_on, torch.cat((last, self._draw_first(going_on, logits, params)))

    def _draw_first(self, sequences: list[_Sequence], logits: Tensor, params: SamplingParams) -> Tensor:
        """Draw the first token of every sequence's turn from logits (B, V); return them, (B,)."""
        drawn = uniforms([s.seed for s in sequences], [s.drawn for s in sequences], 1)
        tokens, logprobs = sample(logits, params, drawn[:, 0].to(self.decoder.device))
        stops = frozenset(params.stop_token_ids)
        for sequence, token, logprob in zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True):
            sequence.take([token], [logprob], stops)
        return tokens

    def _decode(
        self, active: list[_Sequence], last: Tensor, cache: KVCache, params: SamplingParams
    ) -> Tensor:
        """Draw a few tokens for every row; return the last of each row, (B,)."""
        device = self.decoder.device
        running = [sequence for sequence in active if not sequence.finished]
        left = sorted(sequence.limit - len(sequence.completion.token_ids) for sequence in running)
        # Rows that may end so that the next look is worth it; those that reach their limit are known in advance.
        enough = max(1, -(-len(active) // _DROP_SHARE) - (len(active) - len(running)))
        steps = left[min(enough, len(left)) - 1]
        if params.stop_token_ids:
            steps = min(steps, _STEPS_PER_CHECK)
        drawn = uniforms([s.seed for s in active], [s.drawn for s in active], steps).to(device)
        stop_ids = torch.tensor(params.stop_token_ids, device=device)
        stopped = torch.tensor([sequence.finished for sequence in active], device=device)
        tokens, logprobs = [], []
        for step in range(steps):
            logits = self.decoder.forward(last[:, None], cache)
            last, logprob = sample(logits, params, drawn[:, step])
            tokens.append(last)
            logprobs.append(logprob)
            if device.type == "cpu" and params.stop_token_ids:
                stopped |= (last[:, None] == stop_ids).any(1)
                if int(stopped.sum()) * _DROP_SHARE >= len(active):
                    break
        stops = frozenset(params.stop_token_ids)
        rows = zip(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        for row, (sequence, (row_tokens, row_logprobs)) in enumerate(zip(active, rows, strict=True)):
            sequence.take(row_tokens, row_logprobs, stops)
            if sequence.finished:  # an idle row writes over the same few columns
                cache.rewind(row, sequence.length - 1)
        return last

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


def _enough_ended(active: list[_Sequence]) -> list[int]:
    """Return the rows whose turn is over, or none while they are too few to be worth an interruption."""
    ended = [row for row, sequence in enumerate(active) if sequence.finished]
    return ended if len(ended) * _DROP_SHARE >= len(active) else []


def _answers(
    ended: list[_Sequence], respond: Respond, params: SamplingParams, context: int
) -> dict[int, list[int]]:
    """Have turns answered; return index -> tokens to be computed, of the sequences that go on."""
    turns = [(sequence.index, sequence.completion) for sequence in ended]
    pending: dict[int, list[int]] = {}
    for sequence, answer in zip(ended, respond(turns), strict=True):
        if answer is None:
            continue
        room = context - sequence.length - len(answer)
        if room < 1:
            sequence.episode.is_full = True
            continue
        pending[sequence.index] = sequence.answer(answer, min(params.max_tokens, room))
    return pending


def length_buckets(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
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


def _weights_version(model: Transformer) -> tuple[tuple[int, int], ...]:
    """Change whenever a parameter is replaced or written in place."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
