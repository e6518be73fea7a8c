"""A small reinforcement learning job for the invariant tests; also run as a script, so that it can be killed.

    python rl_toy.py DIRECTORY STEPS [key=value ...]

The policy is rewarded for one token; two learners are trained (policy and value model), as in PPO.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from nurture.advantages import gae, group_advantages, spread, state_values, token_rewards, whiten
from nurture.inference.sampling import SamplingParams
from nurture.losses.policy import PolicyLossConfig
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.lora import LoraConfig, add_adapters
from nurture.model.parallel import prepare, whole_model
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, build_optimizer
from nurture.rollout import Rollout, collate
from nurture.runtime import decide_execution, whole_process
from nurture.stages.context import StageContext
from nurture.stages.ppo import ValueLoss
from nurture.stages.rl import (
    Learner,
    Played,
    PolicyEngine,
    PolicyLoss,
    RLConfig,
    learn,
    score_rows,
    seed_of,
    summed_over,
)

VOCABULARY, WANTED, LONGEST = 16, 7, 8


def toy_model(seed: int, head: str = "lm") -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(vocab_size=VOCABULARY, width=32, layers=2, heads=2, max_position=64), head)


def toy_rollouts(
    policy: PolicyEngine,
    seed: int,
    prompts: int,
    group_size: int,
    temperature: float,
    share: tuple[int, int] = (0, 1),
) -> list[Rollout]:
    """Random prompts of 2 to 5 tokens, replies of up to LONGEST; token 0 ends one. Paid by the share of WANTED.

    `share`: (rank, processes), whose prompts alone are answered, as one process would.
    """
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    starts = []
    for group in range(prompts):
        length = int(torch.randint(2, 6, (1,), generator=generator))
        prompt = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        starts += [(group, prompt)] * group_size
    params = SamplingParams(max_tokens=LONGEST, temperature=temperature, stop_token_ids=(0,))
    seeds = [seed_of(seed, index) for index in range(len(starts)) if starts[index][0] % share[1] == share[0]]
    starts = [(group, prompt) for group, prompt in starts if group % share[1] == share[0]]
    for (group, prompt), written in zip(
        starts, policy.now().generate([p for _, p in starts], params, seeds), strict=True
    ):
        own = written.token_ids
        rollouts.append(
            Rollout(
                prompt_ids=prompt,
                token_ids=[*prompt, *own],
                completion_mask=[False] * len(prompt) + [True] * len(own),
                logprobs=[0.0] * len(prompt) + written.logprobs,
                reward=sum(token == WANTED for token in own) / LONGEST,
                group=group,
                finished="stop" if written.finish_reason == "stop" else "length",
            )
        )
    return rollouts


def toy_config(steps: int, **settings: Any) -> RLConfig:
    defaults: dict[str, Any] = {
        "loss": PolicyLossConfig(loss_type="ppo"),
        "optimizer": OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
        "prompts_per_step": 12,
        "group_size": 4,
        "batch_size": 16,
        "epochs": 2,
    }
    return RLConfig(name="toy", kind="toy", steps=steps, sequence_length=32, **(defaults | settings))


def toy_learn(
    directory: Path,
    steps: int = 5,
    *,
    with_value: bool = True,
    pause: float = 0.0,
    lora: bool = False,
    seen: list[Played] | None = None,
    **settings: Any,
) -> tuple[Transformer | None, RLConfig]:
    """Run the loop; returns the policy's unsharded weights in the main process."""
    config = toy_config(steps, **settings)
    execution = decide_execution(config.execution)
    processes = execution.processes
    policy, value = toy_model(0), toy_model(1, "scalar")
    if lora:
        add_adapters(policy, LoraConfig(rank=4))
    prepare(policy, execution)
    prepare(value, execution)
    engine = PolicyEngine(policy, execution, "fp32")
    learners = {
        "policy": Learner(
            policy,
            build_optimizer(policy, config.optimizer),
            PolicyLoss(config.loss, config.temperature),
            1.0,
        )
    }
    if with_value:
        learners["value"] = Learner(value, build_optimizer(value, config.optimizer), ValueLoss(0.2, 0.0), 1.0)

    def play(step: int) -> Played:
        time.sleep(pause)
        rollouts = toy_rollouts(
            engine,
            seed_of(3, step, 0),
            config.prompts_per_step,
            config.group_size,
            config.temperature,
            (processes.rank, processes.world_size),
        )
        batch = collate(rollouts)
        batch.extra["old_logprobs"] = batch.logprobs
        mask = batch.completion_mask
        if with_value:
            (values,) = score_rows(
                batch,
                config,
                execution,
                lambda part: [state_values(value(part.token_ids), part.completion_mask)],
            )
            rewards = token_rewards(batch.rewards, torch.zeros_like(batch.logprobs), mask, 0.0)
            advantages, returns = gae(rewards, values, mask)
            white = whiten(advantages, mask, add_up=summed_over(processes))
            batch.extra |= {"values": values, "returns": returns, "advantages": white}
        else:
            batch.extra["advantages"] = spread(group_advantages(batch.rewards, batch.groups), mask)
        memory["steps_played"] = step + 1
        played = Played(rollouts, batch)
        if seen is not None:
            seen.append(played)
        return played

    memory: dict[str, Any] = {}
    context = StageContext(directory=directory)
    learn(config, context, learners, execution, seed=5, steps=steps, play=play, memory=memory)
    assert memory["steps_played"] == steps
    return whole_model(policy, execution), config


if __name__ == "__main__":
    with whole_process():
        target, count, *arguments = sys.argv[1:]
        options = dict(argument.split("=") for argument in arguments)
        result, _ = toy_learn(
            Path(target),
            int(count),
            pause=float(options.get("pause", 0)),
            loop={"log_every": 1, "save_every": int(options.get("save_every", 0)) or None},
            batch_size=int(options.get("batch_size", 16)),
        )
        if result is not None:
            save_model(result, Path(target) / "model")
