"""Whether a model finds again what it read long ago: RULER-like probes by length and depth.

A probe hides a note (or eight, or a chain of three, see `world/long.py`) in innocent sentences and asks for it at the
end; the answer counts if every token of it is the model's likeliest. That is what greedy decoding would write, at the
price of one forward pass. Accuracy by length tells how far the model reaches, by depth whether it reads evenly: a
model that looks only at the end of its context is right at depth 1 alone.

Source: RULER (arXiv 2404.06654); needle in a haystack, Kamradt 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nurture.evals.measure import Measure, rate
from nurture.model.transformer import Transformer
from nurture.progress import tracked
from nurture.runtime import Execution, eager_blocks
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX
from nurture.world import World
from nurture.world.long import KINDS, Retrieval, RetrievalKind

_TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Cell:
    """What became of the probes of one kind at one length (tokens) and depth (0 to 1)."""

    kind: RetrievalKind
    length: int
    depth: float
    right: list[bool]


def find_again(
    model: Transformer,
    tokenizer: Tokenizer,
    world: World,
    *,
    kinds: Sequence[RetrievalKind] = KINDS,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    each: int = 4,
    execution: Execution,
) -> list[Cell]:
    """Ask `each` held-out probes of every kind, length and depth.

    With several processes each asks its share; all must call this, and all return the same.

    Args:
        lengths: of a probe with its answer, in tokens, met within one sentence; `max_position` does not limit them.
    """
    cells = []
    for kind in kinds:
        for length in lengths:
            probes = [
                _encoded(tokenizer, world.retrieval(kind, "heldout", index, length=length - 1, depth=depth,
                                                    size=lambda text: len(tokenizer.encode(text))))
                for depth in depths
                for index in range(each)
            ]  # fmt: skip
            said = likeliest_answers(model, probes, execution)
            right = [tokens == answer for tokens, (_, answer) in zip(said, probes, strict=True)]
            cells += [
                Cell(kind, length, depth, right[i * each : (i + 1) * each]) for i, depth in enumerate(depths)
            ]
    return cells


def _encoded(tokenizer: Tokenizer, probe: Retrieval) -> tuple[list[int], list[int]]:
    """Return (prompt, answer) as token ids."""
    return [tokenizer.document_token_id, *tokenizer.encode(probe.prompt)], tokenizer.encode(probe.answer)


@torch.no_grad()
def likeliest_answers(
    model: Transformer, probes: Sequence[tuple[Sequence[int], Sequence[int]]], execution: Execution
) -> list[list[int]]:
    """Return, for every (prompt, answer) of token ids, the likeliest token in the place of each token of the answer.

    The model may be sharded: each process takes every world_size-th batch of probes, in as many forward passes as the
    others; all must call this, and all return the same.
    """
    device, processes = model.embedding.weight.device, execution.processes
    longest = max(len(prompt) + len(answer) for prompt, answer in probes)
    at_once = max(1, _TOKENS_AT_ONCE // longest)
    parts = [probes[first : first + at_once] for first in range(0, len(probes), at_once)]
    said: dict[int, list[list[int]]] = {}
    # Sharded models must be called by all processes together: those without a part left repeat one, which is dropped.
    rounds = range(-(-len(parts) // processes.world_size))
    for turn in tracked(rounds, f"probes of {longest} tokens", show=processes.is_main, stays=False):
        index = turn * processes.world_size + processes.rank
        part = parts[min(index, len(parts) - 1)]
        width = max(len(prompt) + len(answer) for prompt, answer in part) - 1
        token_ids = torch.zeros(len(part), width, dtype=torch.int64)
        labels = torch.full_like(token_ids, IGNORE_INDEX)
        for row, (prompt, answer) in enumerate(part):  # what follows a probe in its row cannot be seen by it
            end = len(prompt) + len(answer) - 1
            token_ids[row, :end] = torch.tensor([*prompt, *answer[:-1]])
            labels[row, len(prompt) - 1 : end] = torch.tensor(answer)
        with execution.autocast(), eager_blocks():
            likeliest = model(token_ids.to(device), labels=labels.to(device), reduction="likeliest").cpu()
        said[index] = [
            line[asked].tolist() for line, asked in zip(likeliest, labels != IGNORE_INDEX, strict=True)
        ]
    known = {index: lines for share in processes.gather(said) for index, lines in share.items()}
    return [line for index in range(len(parts)) for line in known[index]]


def go_on(
    model: Transformer, prompts: Sequence[Sequence[int]], tokens: int, execution: Execution
) -> list[list[int]]:
    """Return the likeliest `tokens` tokens after each prompt; processes share the prompts as in `likeliest_answers`.

    Nothing is cached: few tokens after long prompts take little more than the probes themselves, and no copy of a
    sharded model.
    """
    written = [list[int]() for _ in prompts]
    for _ in range(tokens):
        so_far = [([*prompt, *more], [0]) for prompt, more in zip(prompts, written, strict=True)]
        for more, (token,) in zip(written, likeliest_answers(model, so_far, execution), strict=True):
            more.append(token)
    return written


def accuracy(cells: Sequence[Cell], kind: RetrievalKind, length: int) -> Measure:
    """Return the share of probes of a kind and length answered, over all depths."""
    return rate(
        [right for cell in cells if (cell.kind, cell.length) == (kind, length) for right in cell.right]
    )


def draw(panels: Mapping[str, Sequence[Cell]], path: Path) -> bool:
    """Draw heat maps, length across and depth down: a row for every panel (before, after …), a column for every kind.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    kinds = list(dict.fromkeys(cell.kind for cells in panels.values() for cell in cells))
    figure, axes = plt.subplots(
        len(panels),
        len(kinds),
        squeeze=False,
        figsize=(3.4 * len(kinds), 2.3 * len(panels)),
        layout="constrained",
    )
    for line, (title, cells) in zip(axes, panels.items(), strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            shown = {(c.depth, c.length): sum(c.right) / len(c.right) for c in cells if c.kind == kind}
            if not shown:
                axis.axis("off")
                continue
            depths, lengths = sorted({d for d, _ in shown}), sorted({n for _, n in shown})
            grid = [[shown.get((depth, length), float("nan")) for length in lengths] for depth in depths]
            axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for y, values in enumerate(grid):
                for x, value in enumerate(values):
                    axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
            axis.set_title(f"{kind}, {title}", fontsize=9)
    figure.supxlabel("tokens", fontsize=8)
    figure.supylabel("depth of the note", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
