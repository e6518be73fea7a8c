"""Ranks that are known: models made by hand, padding, several replies in a batch; and what is counted from them."""

from __future__ import annotations

import pytest
import torch

from nurture.evals import likelihood
from nurture.evals.likelihood import rank_continuations
from nurture.evals.token_shift import Ranked, rank_replies, shift_rates, write_replies
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer
from nurture.tokenizer import Tokenizer
from nurture.world import World


def follows(vocabulary: int, shift: int = 1, max_position: int = 512) -> Transformer:
    """Return a model that looks at the last token t alone: its choices are t + shift, then t + shift + 1, ..."""
    config = ModelConfig(
        vocab_size=vocabulary, width=vocabulary, layers=1, heads=1, max_position=max_position,
        tied_embeddings=False,
    )  # fmt: skip
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()  # the residual stream passes unchanged
        model.embedding.weight.copy_(torch.eye(vocabulary))
        steps = (torch.arange(vocabulary)[:, None] - torch.arange(vocabulary) - shift) % vocabulary
        model.output.weight.copy_(-steps.float())  # row: token, column: the one before it
    return model.eval()


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_ranks_are_those_of_the_model_whatever_stands_beside(
    monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(likelihood, "_BATCH_TOKENS", batch_tokens)
    pairs = [
        ([5], [6, 7, 8]),  # as it would write it
        ([1, 2, 3], [5, 7]),  # each its second choice
        ([9, 9, 9, 9, 9], [9]),  # last of twelve
        ([4, 0], [3, 4, 8, 0]),  # third, first, fourth, and 0, the padding's number, as a token: fourth
        ([11], [0]),
    ]
    assert rank_continuations(follows(12), pairs) == [[1, 1, 1], [2, 2], [12], [3, 1, 4, 4], [1]]


def test_tokens_that_are_as_likely_share_the_better_rank() -> None:
    model = follows(12)
    with torch.no_grad():
        model.output.weight.zero_()
    assert rank_continuations(model, [([1], [2, 3])]) == [[1, 1]]


def test_a_continuation_past_the_context_has_ranks_of_its_end() -> None:
    assert rank_continuations(follows(12, max_position=3), [([1, 2], [3, 4, 6, 7])]) == [[1, 2, 1]]


def test_rates_by_place_by_kind_and_the_tokens() -> None:
    replies = [
        Ranked("a", [7, 8, 9, 9, 3], [4, 1, 1, 2, 900], True),
        Ranked("a", [7, 8], [50, 1], False),
        Ranked("b", [8, 3], [3, 1], True),
    ]
    rates = shift_rates(replies, lambda token: f"<{token}>")
    found = {name: (round(measure["value"] * 9), measure["n"]) for name, measure in rates["all"].items()}
    assert found == {"unshifted": (4, 9), "marginal": (2, 9), "shifted": (3, 9)}
    shifted = {line["place"]: (line["shifted"]["value"], line["shifted"]["n"]) for line in rates["by_place"]}
    assert shifted == {"1": (pytest.approx(2 / 3), 3), "2": (0, 2), "3-4": (0, 2), "end": (0.5, 2)}
    assert [line["kind"] for line in rates["by_kind"]] == ["a", "b"]
    assert rates["by_kind"][1]["marginal"]["value"] == 0.5
    assert rates["tokens"] == [
        {"token": "<7>", "shifted": 2, "written": 2, "rank": 27},
        {"token": "<3>", "shifted": 1, "written": 2, "rank": 900},
    ]
    assert rates["all"]["shifted"]["low"] < 3 / 9 < rates["all"]["shifted"]["high"]


def test_places_are_counted_from_one_in_doubling_spans() -> None:
    reply = Ranked("a", range(20), range(1, 21), False)
    places = [place for place, _ in reply.places()]
    assert places == ["1", "2", *["3-4"] * 2, *["5-8"] * 4, *["9-16"] * 8, *["17-32"] * 4]


def test_nothing_written_is_nothing_counted() -> None:
    rates = shift_rates([], str)
    assert rates["all"]["shifted"]["n"] == rates["replies"] == 0
    assert rates["by_place"] == rates["by_kind"] == rates["tokens"] == []


@pytest.fixture(scope="module")
def setting() -> tuple[Tokenizer, World]:
    world = World()
    texts = [world.document(source, "train", i) for source in ("web", "forum") for i in range(60)]
    return Tokenizer.train(texts, 320).with_chat_template(), world


def test_replies_are_read_as_they_were_written(setting: tuple[Tokenizer, World]) -> None:
    """A model that counts up, read by itself and by one that would have skipped a token: all ranks are 1, or all last."""
    tokenizer, world = setting
    tasks = [world.task(kind, "heldout", index) for kind in ("fact", "chat") for index in range(3)]
    size = tokenizer.vocab_size
    replies = write_replies(follows(size), tokenizer, tasks, 6)
    for prompt, reply in replies:
        counted = [(prompt[-1] + place) % size for place in range(1, 7)]
        assert reply == counted[: len(reply)]
    for shift, rank in ((1, 1), (2, size), (0, 2)):
        ranked = rank_replies(follows(size, shift), tokenizer, world, tasks, replies, "chat")
        assert [r.kind for r in ranked] == ["fact"] * 3 + ["chat"] * 3
        assert {found for r in ranked for found in r.ranks} == {rank}


def test_a_thread_ends_with_its_line(setting: tuple[Tokenizer, World]) -> None:
    tokenizer, world = setting
    task = world.task("fact", "heldout", 0)
    said, base = tokenizer.encode("Mice."), follows(tokenizer.vocab_size)
    for end in ([tokenizer.end_of_turn_id], []):
        replies = [(tokenizer.encode_prompt(task.messages), [*said, *end])]
        (ranked,) = rank_replies(base, tokenizer, world, [task], replies, "thread")
        assert tokenizer.decode(ranked.token_ids) == (" Mice.\n" if end else " Mice.")
        assert ranked.ended == bool(end)
        assert len(ranked.ranks) == len(ranked.token_ids)
