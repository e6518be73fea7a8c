"""The engine against the model: cached decoding, logprobs, and results that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from nurture.inference.decoder import Decoder
from nurture.inference.engine import Batch, Completion, Engine, Row
from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.model.config import ModelConfig
from nurture.model.kv_cache import KVCache
from nurture.model.transformer import Transformer

FAMILIES = ["llama", "smollm3", "qwen3"]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [1, 2, 3], [50] * 40, [7, 8, 9], [3] * 9]


def make_model(family: str, **changes: object) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": 150, "width": 48, "layers": 5, "heads": 4, "kv_heads": 2, "max_position": 128}
    model = Transformer(ModelConfig(family=family, init_std=0.15, **{**shape, **changes}))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # a norm weight of 1 would hide mistakes in folding it
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make_model(request.param)


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(0, 150, (3, 70), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_models_own_cached_decode_equals_its_full_forward(
    model: Transformer, token_ids: torch.Tensor
) -> None:
    cache = KVCache(model.config, max_rows=3)
    pieces = token_ids.split([30, 1, 1, 5, 1, 32], dim=1)
    logits = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
    torch.testing.assert_close(logits, model(token_ids), atol=1e-4, rtol=0)


@torch.no_grad()
def test_prepared_decoder_equals_the_model(model: Transformer, token_ids: torch.Tensor) -> None:
    """Ragged prefill, then token by token, across a growth of the cache."""
    decoder, lengths = Decoder(model, torch.float32), [3, 30, 17]
    cache = decoder.new_cache(3)
    padded = torch.zeros(3, 30, dtype=torch.int64)
    for row, length in enumerate(lengths):
        padded[row, :length] = token_ids[row, :length]
    expected, rows = model(token_ids), torch.arange(3)
    logits = decoder.forward(padded, cache, lengths)
    for step in range(40):
        ends = torch.tensor(lengths) + step
        torch.testing.assert_close(logits, expected[rows, ends - 1], atol=1e-4, rtol=0)
        logits = decoder.forward(token_ids[rows, ends][:, None], cache)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=24, temperature=0.0),
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=24, temperature=0.6),
        SamplingParams(max_tokens=24, temperature=1.3, top_k=8),
        SamplingParams(max_tokens=24, top_p=0.7),
        SamplingParams(max_tokens=24, min_p=0.1),
    ],
    ids=["greedy", "plain", "temperature", "top-k", "top-p", "min-p"],
)
@torch.no_grad()
def test_reported_logprobs_are_the_trainers(model: Transformer, params: SamplingParams) -> None:
    for prompt, completion in zip(PROMPTS, Engine(model).generate(PROMPTS, params), strict=True):
        row = torch.tensor([prompt + completion.token_ids])
        logprobs = model(row[:, :-1], labels=row[:, 1:], temperature=params.temperature or 1.0)
        reported = torch.tensor([completion.logprobs])
        torch.testing.assert_close(reported, logprobs[:, len(prompt) - 1 :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_batch", [1, 2, 64])
def test_batch_order_and_refilling_change_nothing(model: Transformer, max_batch: int) -> None:
    """Every completion equals that of its prompt alone, also through `stream`; rows stop at different times."""
    params = SamplingParams(max_tokens=30, temperature=0.9, stop_token_ids=tuple(range(12)))
    seeds = sequence_seeds(5, len(PROMPTS))
    alone = [Engine(model).generate([p], params, [s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert len({len(completion.token_ids) for completion in alone}) > 3
    engine = Engine(model, max_batch=max_batch)
    forward = engine.generate(PROMPTS, params, seeds)
    backward = engine.generate(PROMPTS[::-1], params, seeds[::-1])[::-1]
    for one, batched, reverse, prompt, seed in zip(alone, forward, backward, PROMPTS, seeds, strict=True):
        assert_same(one, batched)
        assert_same(one, reverse)
        assert list(engine.stream(prompt, params, seed)) == one.token_ids


def assert_same(a: Completion, b: Completion) -> None:
    assert a.token_ids == b.token_ids
    assert a.finish_reason == b.finish_reason
    torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


def reply(turns: list[tuple[int, Completion]], limit: int = 4) -> list[list[int] | None]:
    """Answer by what was said: a function of the turn alone, of various lengths, and sometimes the end."""
    answers: list[list[int] | None] = []
    for index, turn in turns:
        total = sum(turn.token_ids) + index
        answers.append(None if total % 5 == 0 else [20 + total % 7] * (1 + total % limit))
    return answers


@pytest.mark.parametrize("max_batch", [1, 3, 64])
def test_an_episode_does_not_depend_on_its_neighbours(model: Transformer, max_batch: int) -> None:
    params = SamplingParams(max_tokens=11, temperature=0.9, stop_token_ids=tuple(range(20)))
    seeds = sequence_seeds(3, len(PROMPTS))
    numbered = [[index, *prompt] for index, prompt in enumerate(PROMPTS)]
    episodes = Engine(model, max_batch=max_batch).converse(
        numbered, lambda turns: reply([(0, turn) for _, turn in turns]), params, seeds
    )
    assert max(len(episode.turns) for episode in episodes) > 3
    for prompt, seed, episode in zip(numbered, seeds, episodes, strict=True):
        alone = Engine(model).converse([prompt], reply, params, [seed])[0]
        assert (alone.answers, alone.is_full) == (episode.answers, episode.is_full)
        for one, other in zip(alone.turns, episode.turns, strict=True):
            assert_same(one, other)


@torch.no_grad()
def test_logprobs_of_every_turn_are_the_trainers(model: Transformer) -> None:
    """Also after answers, whose tokens are computed on top of kept keys and values; until the context is full."""
    params = SamplingParams(max_tokens=9, stop_token_ids=tuple(range(20)))
    for prompt, episode in zip(
        PROMPTS, Engine(model).converse(PROMPTS, lambda t: [[7, 8, 9]] * len(t), params), strict=True
    ):
        assert episode.is_full
        token_ids, completion_mask, reported = episode.flat()
        assert len(prompt) + len(token_ids) > 128 - 12
        row = torch.tensor([prompt + token_ids])
        logprobs = model(row[:, :-1], labels=row[:, 1:])[0, len(prompt) - 1 :]
        mask = torch.tensor(completion_mask)
        assert 0 < int(mask.sum()) < len(token_ids) - 9
        torch.testing.assert_close(torch.tensor(reported), logprobs * mask, atol=1e-4, rtol=0)


def test_a_greedy_turn_is_what_generate_says_to_the_same_tokens(model: Transformer) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=(3, 4, 5, 6))
    answers = iter([[1, 2], [30, 31, 32, 33, 34], None])
    episode = Engine(model).converse([[9, 9, 9]], lambda turns: [next(answers)], params)[0]
    said = [9, 9, 9]
    for turn, answer in zip(episode.turns, [*episode.answers, []], strict=True):
        assert_same(turn, Engine(model).generate([said], params)[0])
        said += turn.token_ids + answer


def test_members_of_a_group_share_a_prefill_and_still_differ() -> None:
    model = make_model("llama")
    engine, widths = Engine(model), []
    plain = engine.decoder.forward
    engine.decoder.forward = lambda ids, *rest: (widths.append(tuple(ids.shape)), plain(ids, *rest))[1]  # type: ignore[method-assign]
    group = engine.generate([[5, 6, 7]] * 6, SamplingParams(max_tokens=12), sequence_seeds(1, 6))
    assert widths == [(1, 3)] + [(6, 1)] * 11
    assert len({tuple(completion.token_ids) for completion in group}) == 6
    for completion, seed in zip(group, sequence_seeds(1, 6), strict=True):
        assert_same(completion, Engine(model).generate([[5, 6, 7]], SamplingParams(max_tokens=12), [seed])[0])


def test_rows_with_settings_of_their_own_join_and_leave_a_running_batch() -> None:
    """Whoever else is there, a row becomes what `generate` makes of it alone; the cache grows from one row."""
    model = make_model("llama")
    settings = [
        SamplingParams(max_tokens=20, temperature=0.0),
        SamplingParams(max_tokens=31, temperature=0.7, top_p=0.8),
        SamplingParams(max_tokens=9, temperature=1.3, top_k=40),
        SamplingParams(max_tokens=40, stop_token_ids=tuple(range(20))),
        SamplingParams(max_tokens=40, temperature=0.7, top_p=0.8, stop_token_ids=(7,)),
        SamplingParams(max_tokens=1),
    ]
    rows = [Row(tuple(PROMPTS[n]), params, 1000 + n, params.max_tokens) for n, params in enumerate(settings)]
    batch, waiting = Batch(Decoder(model, torch.float32), max_rows=1), list(rows)
    for turn in range(60):
        if waiting and turn % 3 == 0:
            assert batch.join([waiting.pop(0)]).shape == (1, 150)
        elif batch.rows:
            assert batch.decode(1).shape == (len(batch.rows), 150)
        batch.leave([number for number, row in enumerate(batch.rows) if row.finished])
        if turn == 20:  # somebody gives up
            gone = rows.index(batch.rows[0])
            batch.leave([0])
    assert not batch.rows
    assert rows[gone].completion.token_ids
    for number, row in enumerate(rows):
        if number != gone:
            (alone,) = Engine(model).generate([row.prompt], row.params, [row.seed])
            assert_same(row.completion, alone)


def test_bfloat16_stays_near_the_float32_logprobs() -> None:
    model = make_model("llama")
    completions = Engine(model, dtype=torch.bfloat16).generate(PROMPTS, SamplingParams(max_tokens=24))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        row = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logprobs = model(row[:, :-1], labels=row[:, 1:])[0, len(prompt) - 1 :]
        assert (torch.tensor(completion.logprobs) - logprobs).abs().mean() < 0.05


def test_generation_follows_the_weights_and_leaves_training_alone() -> None:
    """A step in place is noticed; nothing of the engine ends up in a gradient or an inference tensor."""
    model = make_model("llama")
    engine, params = Engine(model), SamplingParams(max_tokens=10, temperature=0.0)
    before = engine.generate([[1, 2]], params)[0]
    list(engine.stream([1, 2], params))
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    row = torch.tensor([[1, 2, 3, 4]])
    total, _ = model(row[:, :-1], labels=row[:, 1:], reduction="sum")
    total.backward()
    optimizer.step()
    after = engine.generate([[1, 2]], params)[0]
    assert after.logprobs != before.logprobs
    assert_same(after, Engine(model).generate([[1, 2]], params)[0])
    assert list(engine.stream([1, 2], params)) == after.token_ids
