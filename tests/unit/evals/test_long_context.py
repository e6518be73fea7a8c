"""Probes of long context: their lengths, what counts as found, and the heat map."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nurture.evals.long_context import Cell, accuracy, draw, find_again
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.tokenizer import Tokenizer
from nurture.world import World

EXECUTION = decide_execution(ExecutionConfig(precision="fp32", compile="off"))


class Reader:
    """A model that looks notes up with a regular expression, as far back as `sight` tokens."""

    def __init__(self, tokenizer: Tokenizer, sight: int) -> None:
        self.tokenizer, self.sight = tokenizer, sight
        self.embedding = torch.nn.Embedding(tokenizer.vocab_size, 1)
        self.output_weight = torch.eye(tokenizer.vocab_size)
        self.lengths: list[int] = []

    def hidden_states(self, token_ids: torch.Tensor) -> torch.Tensor:
        """One-hot "hidden states": with the unit matrix as head they are the logits."""
        hidden = torch.zeros(*token_ids.shape, self.tokenizer.vocab_size)
        for row, ids in enumerate(token_ids.tolist()):
            self.lengths.append(len(ids))
            while ids[-1] == 0:  # padding
                ids.pop()
            text = self.tokenizer.decode(ids[1:])
            hay, question = text.rsplit("\n", 1)
            seen = self.tokenizer.decode(ids[-self.sight :])
            notes = dict(re.findall(r"Remember: (\w+) (\w+)\.", seen))
            said = re.findall(r"\w+", question)[1:2]
            while said[-1] in notes and len(said) < 5 and (question.startswith("Follow") or len(said) < 2):
                said.append(notes[said[-1]])
            whole = f"{hay}\n{question.split(':')[0]}: " + " ".join(said)
            answer = self.tokenizer.encode(whole)
            start = [self.tokenizer.document_token_id, *answer]
            for place in range(len(ids)):
                if start[: place + 1] == ids[: place + 1] and place + 1 < len(start):
                    hidden[row, place, start[place + 1]] = 1.0
        return hidden


@pytest.fixture(scope="module")
def setting() -> tuple[Tokenizer, World]:
    world = World(seed=3)
    texts = [world.document(source, "train", i) for source in ("long", "web") for i in range(120)]
    return Tokenizer.train(texts, 600), world


def test_who_sees_the_notes_answers_and_who_sees_only_the_end_does_not(setting: tuple) -> None:
    tokenizer, world = setting
    reader, blind = Reader(tokenizer, 10_000), Reader(tokenizer, 60)
    for model, least, most in ((reader, 1.0, 1.0), (blind, 0.0, 0.34)):
        cells = find_again(
            model, tokenizer, world, lengths=[200, 300], depths=(0.0, 0.5), each=3, execution=EXECUTION
        )
        assert len(cells) == 3 * 2 * 2
        for kind in ("passkey", "multikey", "variables"):
            measure = accuracy(cells, kind, 300)
            assert measure.n == 6
            assert least <= measure.value <= most, (kind, measure)
    assert 200 - 40 < min(reader.lengths) <= max(reader.lengths) <= 301


def test_accuracy_is_over_all_depths_of_one_length() -> None:
    cells = [
        Cell("passkey", 64, 0.0, [True, False]),
        Cell("passkey", 64, 1.0, [True, True]),
        Cell("passkey", 128, 1.0, [False, False]),
        Cell("multikey", 64, 1.0, [False, False]),
    ]
    measure = accuracy(cells, "passkey", 64)
    assert (measure.value, measure.n) == (0.75, 4)


def test_the_heat_map_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = [Cell("passkey", 64, 0.0, [False])]
    after = [Cell(kind, length, depth, [True]) for kind in ("passkey", "multikey") for length in (64, 128) for depth in (0.0, 1.0)]  # fmt: skip
    assert draw({"before": before, "after": after}, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
