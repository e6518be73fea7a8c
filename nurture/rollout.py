"""Rollouts: finished episodes as flat arrays, and batches of them that `train_step` takes.

One rollout is one sequence of tokens: the prompt, then whatever the policy and its environment wrote in turns. There is
no prompt/completion split, because a game interleaves them; `completion_mask` says which tokens the policy wrote. The
arrays hold what the engine sampled: text is never encoded again between sampling and training.

`logprobs` are what the engine reported (the sampling logprobs of the glossary). `token_logprobs` gives the trainer's
for the same tokens, in the same alignment; their difference, `rl/sampling_kl`, is to be logged at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    """

    token_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    rewards: Tensor
    groups: Tensor
    document_ids: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    row_count: int | None = None

    @property
    def loss_count(self) -> int:
        """What `train_step` divides the summed loss by, summed over the global batch."""
        if self.row_count is not None:
            return self.row_count * self.token_ids.shape[0]
        return int(self.completion_mask.sum())

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
        tensors = {name: change(getattr(self, name)) for name in names}
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
