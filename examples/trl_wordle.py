"""TRL's GRPOTrainer on Wordle that nurture serves, played with the published OpenEnv client.

    nurture env serve wordle style=textarena reward=textarena
    python examples/trl_wordle.py runs/tiny/04-sft/model http://127.0.0.1:8000

Needs `pip install 'nurture[openenv]' trl openenv`. The members of a group reset their games with the same seed, so they
play for the same word; what the game writes between two guesses is masked out of the loss.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from openenv.core import GenericEnvClient


def play(client: Any, model: Any, tokenizer: Any, seed: int, turns: int, tokens: int) -> dict[str, Any]:
    """Play one game; return it as one sequence with the policy's logprobs and a mask of its own tokens."""
    result = client.reset(seed=seed)
    messages = list(result.observation["turns"])
    head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    ids, mask, logprobs, reward = list(prompt_ids), [], [], 0.0
    for _ in range(turns):
        context = torch.tensor([ids], device=model.device)
        drawn = model.generate(
            context, attention_mask=torch.ones_like(context), do_sample=True, max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        own = drawn.sequences[0, len(ids) :].tolist()
        logits = torch.stack(drawn.logits, dim=1)[0].log_softmax(-1)
        logprobs += [float(logits[place, token]) for place, token in enumerate(own)]
        ids, mask = ids + own, mask + [1] * len(own)
        reply = tokenizer.decode(own, skip_special_tokens=True)
        result = client.step({"message": reply})
        reward += result.reward or 0.0
        if result.done:
            break
        # What the template puts between this reply and the next one; the reply's own tokens stay as they were drawn.
        messages += [{"role": "assistant", "content": reply}, *result.observation["turns"]]
        longer = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        between = longer.removeprefix(head + reply)
        if own[-1] == tokenizer.eos_token_id:
            between = between.removeprefix(tokenizer.eos_token)
        answer = tokenizer(between, add_special_tokens=False)["input_ids"]
        ids, mask, logprobs, head = (
            ids + answer,
            mask + [0] * len(answer),
            logprobs + [0.0] * len(answer),
            longer,
        )
    end = len(mask) - mask[::-1].index(1)  # the game's last words are nobody's to learn from
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": ids[len(prompt_ids) :][:end],
        "logprobs": logprobs[:end],
        "env_mask": mask[:end],
        "game_reward": reward,
    }


def make_trainer(path: str, address: str, *, turns: int = 8, tokens: int = 16, **settings: Any) -> Any:
    """Return a trainer of the model at `path` on the server at `address`; `settings` go to GRPOConfig."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    client = GenericEnvClient(base_url=address).sync()

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        size, step = trainer.num_generations, trainer.state.global_step
        games = [
            play(client, trainer.model, tokenizer, 1000 * step + place // size, turns, tokens)
            for place in range(len(prompts))
        ]
        return {key: [game[key] for game in games] for key in games[0]}

    def game_reward(completions: list[Any], game_reward: list[float], **columns: Any) -> list[float]:
        return game_reward

    # The server owns the tasks; TRL wants one prompt a game to count by.
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Wordle"}]] * 1000})
    return GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=game_reward, train_dataset=prompts,
        rollout_func=rollout, args=GRPOConfig(report_to="none", **settings),
    )  # fmt: skip


class WordleTool:
    """The same game for models that call tools: `GRPOTrainer(environment_factory=WordleTool, ...)`."""

    address = "http://127.0.0.1:8000"

    def __init__(self) -> None:
        self._client = GenericEnvClient(base_url=self.address).sync()

    def reset(self, seed: int | None = None, **row: Any) -> str:
        self._reward, self._done = 0.0, False
        return self._client.reset(**({} if seed is None else {"seed": seed})).observation["prompt"]

    def guess(self, word: str) -> str:
        """Guess the secret word.

        Args:
            word: A word of five letters.

        Returns:
            What the game says about it.
        """
        if self._done:
            raise ValueError("The game is over.")
        result = self._client.step({"message": f"[{word.strip('[] ')}]"})
        self._reward, self._done = self._reward + (result.reward or 0.0), result.done
        return result.observation["prompt"]

    def get_reward(self) -> float:
        return self._reward


if __name__ == "__main__":
    make_trainer(
        *sys.argv[1:3], output_dir="runs/trl-wordle", max_steps=50, learning_rate=1e-5, num_generations=8,
        per_device_train_batch_size=16, logging_steps=1, save_strategy="no", use_cpu=not torch.cuda.is_available(),
    ).train()  # fmt: skip
