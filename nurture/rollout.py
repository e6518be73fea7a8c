"""Rollouts: episodes of a policy in its environment, as flat arrays and as batches that `train_step` takes.

One rollout is one sequence of tokens: the prompt, then whatever the policy and its environment wrote in turns. There is
no prompt/completion split, because a game interleaves them; `completion_mask` says which tokens the policy wrote. The
arrays hold what the engine sampled: text is never encoded again between sampling and training.

`collect` plays the episodes: every member of a group gets the same task and seed and therefore the same game, and a
seed of its own to sample with. The environment's turns are put into the chat template once, as tokens after the
policy's own.

`logprobs` are what the engine reported (the sampling logprobs of the glossary). `token_logprobs` gives the trainer's
for the same tokens, in the same alignment; how far the two are apart (`rl/sampling_kl`) is logged at every step:
numerics that drift apart are how RL collapses unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nurture.environments.protocol import Environment, StepResult, step_all
from nurture.errors import NurtureError
from nurture.inference.engine import Completion, Episode, Respond
from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.progress import progress_bar
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX, Message

Finish = Literal["stop", "length", "turns", "context"]
"""Why an episode ended: it was over (or the single reply stopped); a turn reached max_tokens; max_turns were played;
the model's context was full."""


@dataclass
class Rollout:
    """One finished episode. T = tokens of the whole episode.

    Attributes:
        prompt_ids: the tokens before the policy's first one.
        token_ids: (T,) prompt and everything after it, the environment's turns included.
        completion_mask: (T,) True where the policy wrote the token.
        logprobs: (T,) nats, log p(token t given tokens < t) of the policy that sampled it (over the whole vocabulary,
            at the sampling temperature); 0 where `completion_mask` is False.
        reward: sum over the episode's steps; 0 until somebody scores it.
        reward_parts: named parts, unweighted.
        group: index of the prompt; rollouts of one group share prompt, task and seed of the game.
        finished: why it ended.
        turns: turns of the policy.
        messages: the conversation, for logs and judges.
        info: the environment's facts after the last step (`won`, ...).
    """

    prompt_ids: list[int]
    token_ids: list[int]
    completion_mask: list[bool]
    logprobs: list[float]
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    group: int = 0
    finished: Finish = "stop"
    turns: int = 1
    messages: list[Message] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The policy's last turn."""
        replies = [m.get("content", "") for m in self.messages if m.get("role") == "assistant"]
        return replies[-1] if replies else ""


@dataclass
class RolloutBatch:
    """Rollouts padded on the right, as the trainer reads them.

    Padding never changes a result: it is to the right of every real token, where causal attention hides it.

    Attributes:
        token_ids: (B, T) int64.
        completion_mask: (B, T) bool, True where the policy wrote the token.
        logprobs: (B, T) float32 nats of token t given tokens < t, as sampled; 0 where the mask is False.
        rewards: (B,) float32.
        groups: (B,) int64.
        document_ids: (B, T) int64, 0 on tokens, -1 on padding.
        extra: what an algorithm adds, first dimension B: advantages, old_logprobs, reference_logprobs, values, ...
        row_count: what a row counts in the loss's divisor; None: its completion tokens. 1 gives means over rollouts.
        left_out: what rows that were taken out of the batch still count in that divisor.
    """

    token_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    rewards: Tensor
    groups: Tensor
    document_ids: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    row_count: int | None = None
    left_out: int = 0

    @property
    def loss_count(self) -> int:
        """What `train_step` divides the summed loss by, summed over the global batch."""
        if self.row_count is not None:
            return self.left_out + self.row_count * self.token_ids.shape[0]
        return self.left_out + int(self.completion_mask.sum())

    @property
    def labels(self) -> Tensor:
        """(B, T) int64: `token_ids` shifted left by one, `IGNORE_INDEX` where the next token is not the policy's."""
        labels = torch.full_like(self.token_ids, IGNORE_INDEX)
        labels[:, :-1] = torch.where(self.completion_mask[:, 1:], self.token_ids[:, 1:], IGNORE_INDEX)
        return labels

    def split(self, parts: int) -> Iterator[RolloutBatch]:
        """Yield `parts` microbatches of consecutive rows, each cut to its own longest row."""
        for rows in torch.arange(len(self.token_ids)).tensor_split(parts):
            if len(rows):
                yield self.select(rows)

    def select(self, rows: Tensor) -> RolloutBatch:
        """Return the given rows (int64), in that order, cut to the longest of them."""
        rows = rows.to(self.token_ids.device)
        width = self.token_ids.shape[1]
        longest = int((self.document_ids[rows] >= 0).sum(1).max())

        def cut(tensor: Tensor) -> Tensor:
            taken = tensor[rows]
            return taken[:, :longest] if taken.dim() > 1 and taken.shape[1] == width else taken

        return self._with(cut)

    def to(self, device: torch.device | str) -> RolloutBatch:
        """Return the batch with every tensor on `device`."""
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> RolloutBatch:
        names = ("token_ids", "completion_mask", "logprobs", "rewards", "groups", "document_ids")
        tensors: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        extra = {name: change(tensor) for name, tensor in self.extra.items()}
        return RolloutBatch(**tensors, extra=extra, row_count=self.row_count)


def collate(rollouts: Sequence[Rollout], pad_token_id: int = 0) -> RolloutBatch:
    """Lay rollouts out as one batch, padded on the right to the longest.

    Raises:
        ValueError: no rollouts, or arrays of unequal length.
    """
    if not rollouts:
        raise ValueError("collate needs at least one rollout")
    shape = (len(rollouts), max(len(rollout.token_ids) for rollout in rollouts))
    token_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape, dtype=torch.float32)
    document_ids = torch.full(shape, -1, dtype=torch.int64)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.token_ids)
        if not length == len(rollout.completion_mask) == len(rollout.logprobs):
            raise ValueError(f"rollout {row}: token_ids, completion_mask and logprobs differ in length")
        token_ids[row, :length] = torch.tensor(rollout.token_ids)
        completion_mask[row, :length] = torch.tensor(rollout.completion_mask)
        logprobs[row, :length] = torch.tensor(rollout.logprobs)
        document_ids[row, :length] = 0
    return RolloutBatch(
        token_ids,
        completion_mask,
        logprobs,
        rewards=torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32),
        groups=torch.tensor([rollout.group for rollout in rollouts], dtype=torch.int64),
        document_ids=document_ids,
    )


def token_logprobs(model: nn.Module, batch: RolloutBatch, temperature: float = 1.0) -> Tensor:
    """Return the model's own log-probability of every token the policy wrote.

    Args:
        model: a language model; gradients flow unless they are switched off outside.
        temperature: the one that was sampled at.

    Returns:
        (B, T) float32 nats, aligned with `batch.logprobs`: position t is of token t; 0 where the mask is False.
    """
    # No document ids: padding is to the right of all tokens, where causal attention cannot see it.
    ahead = model(batch.token_ids, labels=batch.labels, temperature=temperature)
    return torch.cat((torch.zeros_like(ahead[:, :1]), ahead[:, :-1]), dim=1)


# ---- playing -----------------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """What plays episodes: `inference.engine.Engine`, or a backend with its interface."""

    def converse(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        params: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[Episode]:
        """Play out an episode after every prompt."""
        ...


@dataclass
class _Play:
    """A game that is being played."""

    environment: Environment
    messages: list[Message]
    variables: Mapping[str, Any]
    results: list[StepResult] = field(default_factory=list)


def collect(
    sampler: Sampler,
    tokenizer: Tokenizer,
    make_environment: Callable[[], Environment],
    tasks: Sequence[Any],
    *,
    params: SamplingParams,
    group_size: int = 1,
    max_turns: int = 16,
    max_length: int | None = None,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """Let the policy play every task `group_size` times.

    A turn that reaches `params.max_tokens` ends its episode and is not given to the environment: it earns nothing.

    Args:
        sampler: the engine.
        tokenizer: the policy's; its chat template frames the turns.
        make_environment: makes one environment; every rollout gets its own.
        tasks: what the environments are reset with.
        params: how to sample; `max_tokens` is of one turn. Without stop tokens: the tokenizer's.
        group_size: G, rollouts of a task; they share its seed.
        max_turns: most turns of the policy.
        max_length: most tokens of an episode, prompt included; default: the model's context.
        seed: of the games and of the sampling.
        share: (place, processes) where `tasks` are every so manieth of a list, from that place on: they are played as
            one process would play them in the whole list.
        template_kwargs: variables of the chat template (enable_thinking, ...); a task may bring others (tools).

    Returns:
        tasks x G rollouts; those of task i have `group` i and stand at i * G ... i * G + G - 1.

    Raises:
        NurtureError: a prompt does not fit into the model's context, or the template cannot continue a conversation.
    """
    variables = dict(template_kwargs or {})
    if not params.stop_token_ids:
        params = replace(params, stop_token_ids=tokenizer.stop_token_ids)
    plays: list[_Play] = []
    place, processes = share
    game_seeds = sequence_seeds(seed, len(tasks) * processes)[place::processes]
    for task, game_seed in zip(tasks, game_seeds, strict=True):
        for _ in range(group_size):
            environment = make_environment()
            first = list(environment.reset(task, game_seed).messages)
            own = getattr(task, "template_kwargs", None) or {}
            plays.append(_Play(environment, first, {**own, **variables}))
    frames = _Frames(tokenizer)
    prompts = [frames.prompt(play.messages, play.variables) for play in plays]

    def respond(turns: list[tuple[int, Completion]]) -> list[list[int] | None]:
        stopped = [(index, turn) for index, turn in turns if turn.finish_reason == "stop"]
        texts = [tokenizer.decode(turn.token_ids, skip_special=True) for _, turn in stopped]
        results = step_all([plays[index].environment for index, _ in stopped], texts)
        answers: dict[int, list[int] | None] = {}
        for (index, turn), text, result in zip(stopped, texts, results, strict=True):
            play = plays[index]
            play.results.append(result)
            play.messages += [{"role": "assistant", "content": text}, *result.observation.messages]
            goes_on = not result.done and len(play.results) < max_turns
            answers[index] = (
                frames.answer(turn, result.observation.messages, play.variables) if goes_on else None
            )
        returned = [answers.get(index) for index, _ in turns]
        bar.advance(returned.count(None))
        return returned

    # A group is decoded side by side, so members of one group may not share the seeds of another step's.
    everyone = np.array(sequence_seeds(seed ^ _SAMPLING, len(plays) * processes), dtype=object)
    seeds = everyone.reshape(-1, processes, group_size)[:, place].ravel().tolist()
    with progress_bar("rollouts", len(plays), show=place == 0, stays=False) as bar:
        episodes = sampler.converse(prompts, respond, params, seeds, max_length=max_length)
    return [
        _rollout(play, prompt, episode, index // group_size, tokenizer, max_turns)
        for index, (play, prompt, episode) in enumerate(zip(plays, prompts, episodes, strict=True))
    ]


_SAMPLING = 0x5EED
"""Sets the seeds of sampling apart from those of the games."""


def _rollout(
    play: _Play, prompt: list[int], episode: Episode, group: int, tokenizer: Tokenizer, max_turns: int
) -> Rollout:
    """Put together what an episode wrote and what it earned."""
    token_ids, completion_mask, logprobs = episode.flat()
    cut = len(episode.turns) > len(play.results)  # the last turn did not stop
    if cut:
        text = tokenizer.decode(episode.turns[-1].token_ids, skip_special=True)
        play.messages.append({"role": "assistant", "content": text})
    finished: Finish
    if cut:
        finished = "length"
    elif episode.is_full:
        finished = "context"
    else:
        finished = "stop" if play.results[-1].done else "turns"
    last = play.results[-1] if play.results else None
    return Rollout(
        prompt_ids=prompt,
        token_ids=prompt + token_ids,
        completion_mask=[False] * len(prompt) + completion_mask,
        logprobs=[0.0] * len(prompt) + logprobs,
        reward=sum((result.reward for result in play.results), 0.0),
        reward_parts=dict(last.parts) if last else {},
        group=group,
        finished=finished,
        turns=len(episode.turns),
        messages=play.messages,
        info=dict(last.info) if last else {},
    )


class _Frames:
    """The chat template around prompts and answers, as tokens; equal texts are put in once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prompts: dict[str, list[int]] = {}
        self._answers: dict[str, list[int]] = {}

    def prompt(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """Return the tokens of a conversation up to the policy's first one."""
        key = repr((messages, variables))
        if key not in self._prompts:
            self._prompts[key] = self._tokenizer.encode_prompt(messages, **variables)
        return self._prompts[key]

    def answer(
        self, turn: Completion, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> list[int]:
        """Return what stands between a turn of the policy and its next one."""
        key = repr((messages, variables))
        if key not in self._answers:
            self._answers[key] = self._between(messages, variables)
        end = self._tokenizer.end_of_turn_id
        closing = [] if turn.token_ids[-1] == end else [end]  # it stopped by another token
        return closing + self._answers[key]

    def _between(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """Find, in a short conversation that goes on with `messages`, what follows the assistant's end token."""
        start: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        whole = self._tokenizer.encode_prompt([*start, *messages], **variables)
        token_ids, written = self._tokenizer.encode_conversation([*start, *messages], **variables)
        last = max(position for position, mine in enumerate(written) if mine)
        while last >= 0 and token_ids[last] != self._tokenizer.end_of_turn_id:
            last -= 1
        if last < 0 or whole[: last + 1] != token_ids[: last + 1]:
            raise NurtureError(
                "the chat template rewrites an assistant's turn when the conversation goes on, so a game cannot be "
                "played without encoding it again; fine-tune with nurture's template first (sft's chat_template=chatml)"
            )
        return whole[last + 1 :]
