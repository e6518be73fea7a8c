"""Probes of long context: their lengths, what counts as found, and the heat map."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nurture.evals.long_context import Cell, accuracy, draw, find_again, go_on
from nurture.runtime import ExecutionConfig, decide_execution
from nurture.tokenizer import Tokenizer
from nurture.types import IGNORE_INDEX
from nurture.world import World

EXECUTION = decide_execution(ExecutionConfig(precision="fp32", compile="off"))


class Reader:
    """A model that looks notes up with a regular expression, as far back as `sight` tokens."""

    def __init__(self, tokenizer: Tokenizer, sight: int) -> None:
        self.tokenizer, self.sight = tokenizer, sight
        self.embedding = torch.nn.Embedding(tokenizer.vocab_size, 1)
        self.lengths: list[int] = []

    def __call__(self, token_ids: torch.Tensor, *, labels: torch.Tensor, reduction: str) -> torch.Tensor:
        """What it would say after every token, where there is a label."""
        assert reduction == "likeliest"
        said_next = torch.zeros_like(token_ids)
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
                    said_next[row, place] = start[place + 1]
        return said_next.where(labels != IGNORE_INDEX, IGNORE_INDEX)


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


def test_what_follows_several_prompts_is_written_a_token_at_a_time(setting: tuple) -> None:
    tokenizer, world = setting
    probes = [world.retrieval("variables", "heldout", index, length=100 + 30 * index, depth=0.5,
                              size=lambda text: len(tokenizer.encode(text))) for index in range(3)]  # fmt: skip
    prompts = [[tokenizer.document_token_id, *tokenizer.encode(probe.prompt)] for probe in probes]
    answers = [tokenizer.encode(probe.answer) for probe in probes]
    tokens = min(map(len, answers))
    written = go_on(Reader(tokenizer, 10_000), prompts, tokens, EXECUTION)
    assert written == [answer[:tokens] for answer in answers]


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
