"""TRL's own trainer learns on our server, through the published client: examples/trl_wordle.py with a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("openenv.core", reason="the published client is not installed: see .ci/run")
pytest.importorskip("trl")
pytest.importorskip("websockets")

from unit.environments.openenv_servers import serving

from nurture.environments.catalog import environment_maker
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer
from nurture.studio.environment import Offer, build_environment_app
from nurture.tokenizer import Tokenizer

WORDS = ("crane", "dream", "bread", "house")
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_wordle", REPOSITORY / "examples" / "trl_wordle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_trl_trains_on_our_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that can only say four words is paid for the right one: TRL's rewards are the game's, weights move."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    lists = ["\n".join(WORDS), "".join(f"[{word}]" for word in WORDS)]
    tokenizer = Tokenizer.train(lists * 50, 300).with_chat_template()
    said = [tokenizer.encode(word) for word in WORDS]
    assert all(len(tokens) == 1 for tokens in said)
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, max_position=1024)
    save_model(
        Transformer(config), tmp_path / "model",
        end_token_ids=tokenizer.stop_token_ids, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tokenizer.save(tmp_path / "model")
    offer = Offer("wordle", environment_maker("wordle", {"reward": "textarena"}), WORDS)
    with serving(build_environment_app(offer)) as address:
        trainer = example().make_trainer(
            str(tmp_path / "model"), address, turns=4, tokens=1, output_dir=str(tmp_path / "out"), max_steps=2,
            learning_rate=1e-2, num_generations=4, per_device_train_batch_size=8, logging_steps=1,
            save_strategy="no", use_cpu=True, seed=1, max_completion_length=512, disable_tqdm=True,
            bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        allowed = {tokens[0] for tokens in said}
        trainer.model.generation_config.suppress_tokens = [
            token for token in range(tokenizer.vocab_size) if token not in allowed
        ]
        before = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
        trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2
    assert all(0.0 <= log["reward"] <= 1.0 for log in logs)
    assert any(
        log["reward_std"] > 0 for log in logs
    )  # members of a group play the same word, and do not all find it
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.model.named_parameters())


def test_the_game_as_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that TRL's environment_factory takes: a seed is a word, feedback is returned, the end is an error."""
    offer = Offer("wordle", environment_maker("wordle", {"style": "textarena"}), WORDS)
    with serving(build_environment_app(offer)) as address:
        tool_class = example().WordleTool
        monkeypatch.setattr(tool_class, "address", address)
        tool, secret = tool_class(), offer.task(3)
        assert "secret English word" in tool.reset(seed=3, environment="wordle")
        assert "You submitted [plain]." in tool.guess("plain")
        assert (tool.guess(f"[{secret}]"), tool.get_reward()) == (f"The word was [{secret}]. You won.", 1.0)
        with pytest.raises(ValueError, match="over"):
            tool.guess("plain")
