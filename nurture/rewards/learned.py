"""Scores from a learned reward model: one number a reply, 0 where the demonstrations are on average.

A reward model is a checkpoint with a scalar head in Hugging Face's layout (`score.weight`, as
`LlamaForSequenceClassification` with one label has it). The reward of a reply is the head's value at the reply's last
token, its end token where it has one: what transformers computes for the same tokens. Beside the weights stands
`reward.json`: the offset that makes the demonstrations' mean 0 (InstructGPT adds it before reinforcement learning), and
what is needed to turn a difference of rewards into probabilities. Rewards of two models, or without the offset, cannot
be compared. A value model that starts from a reward model starts from the same head, offset and all.

Main failure mode: the reward is trusted far from the replies it was trained on (docs/reward.md, over-optimisation).

Source: InstructGPT, arXiv 2203.02155, section 3.5 and appendix C.2; Stiennon et al., arXiv 2009.01325.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nurture.data.comparisons import encode_reply
from nurture.errors import NurtureError
from nurture.files import atomic_write_json, read_json
from nurture.losses.reward import TieModel
from nurture.model.hugging_face import checkpoint_head, load_model
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer
from nurture.types import Message

SCALE_FILE = "reward.json"


@dataclass(frozen=True)
class RewardScale:
    """How a checkpoint's raw values are read.

    Attributes:
        offset: subtracted from every raw value; the mean raw value of the demonstrations.
        tie_threshold: alpha of the model of ties (losses/reward.py); 0: no ties.
        ties: which model of ties turns differences of rewards into probabilities.
    """

    offset: float = 0.0
    tie_threshold: float = 0.0
    ties: TieModel = "drop"


@dataclass(frozen=True)
class RewardModel:
    """A reward model ready to score.

    Attributes:
        model: has a scalar head, is in eval mode; its values are raw.
        tokenizer: with the chat template it was trained with.
        scale: what `score_tokens` applies.
    """

    model: Transformer
    tokenizer: Tokenizer
    scale: RewardScale


def load_reward_model(path: str | Path, *, device: str | torch.device = "cpu") -> RewardModel:
    """Load a reward model with its tokenizer and scale.

    Args:
        path: its folder; without a `reward.json` (another project's model) the raw values are the rewards.

    Raises:
        NurtureError: there is no such checkpoint, or it has no scalar head.
    """
    path = Path(path)
    if checkpoint_head(path) != "scalar":
        raise NurtureError(
            f"{path}: is a language model, not a reward model (it has no scalar head). Make one with `nurture reward`."
        )
    model = load_model(path, head="scalar", device=device).eval()
    return RewardModel(model, Tokenizer.load(path), read_scale(path))


def read_scale(path: str | Path) -> RewardScale:
    """Read `reward.json` of a checkpoint folder; the identity where there is none."""
    file = Path(path) / SCALE_FILE
    if not file.exists():
        return RewardScale()
    facts = read_json(file, "Copy it again from the checkpoint.")
    try:
        return RewardScale(**facts)
    except TypeError as error:
        raise NurtureError(f"{file}: not the scale of a reward model ({error}).") from error


def write_scale(path: str | Path, scale: RewardScale) -> None:
    """Write `reward.json` beside the weights."""
    atomic_write_json(Path(path) / SCALE_FILE, asdict(scale))


def score_tokens(
    reward_model: RewardModel, sequences: Sequence[Sequence[int]], *, microbatch_tokens: int = 8192
) -> Tensor:
    """Return the reward of each sequence, (n,) float32 on the CPU.

    Args:
        sequences: prompt and reply as one, up to the reply's last token. A rollout's `token_ids` are just that.
        microbatch_tokens: most tokens of one forward pass, padding included.
    """
    values = last_values(reward_model.model, sequences, microbatch_tokens=microbatch_tokens)
    return values - reward_model.scale.offset


def score_replies(
    reward_model: RewardModel, prompts: Sequence[Sequence[Message]], replies: Sequence[str]
) -> Tensor:
    """Return the reward of each finished reply to its prompt, (n,) float32."""
    sequences = [
        encode_reply(reward_model.tokenizer, prompt, [{"role": "assistant", "content": reply}]).token_ids
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    return score_tokens(reward_model, sequences)


@torch.no_grad()
def last_values(model: nn.Module, sequences: Sequence[Sequence[int]], *, microbatch_tokens: int) -> Tensor:
    """Return the raw value at the last token of each sequence, (n,) float32 on the CPU.

    Sequences of about one length share a forward pass; padding is to the right, where causal attention hides it.

    Raises:
        ValueError: a sequence is empty.
    """
    if not all(len(sequence) for sequence in sequences):
        raise ValueError("a sequence to score has no tokens")
    values = torch.empty(len(sequences))
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    while order:
        width = len(sequences[order[-1]])
        here = order[-max(1, microbatch_tokens // width) :]
        del order[-len(here) :]
        token_ids = torch.zeros(len(here), width, dtype=torch.int64)
        for row, index in enumerate(here):
            token_ids[row, : len(sequences[index])] = torch.as_tensor(sequences[index])
        ends = torch.tensor([len(sequences[index]) - 1 for index in here])
        raw = model(token_ids.to(device))[torch.arange(len(here)), ends]
        values[here] = raw.float().cpu()
    return values
