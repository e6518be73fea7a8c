"""Rollouts a second: the engine against transformers.generate, same shape, prompts and lengths.

    python bench/rollout.py [--quick] [--json] [--shapes 3M] [--turns 1,6] [--cpu-time] [--memory]

64 rollouts at once: 8 prompts of 64 tokens, each answered 8 times, sampled at temperature 1 over the whole vocabulary,
nothing stops early. With one turn the policy writes 64 tokens; with six, 8 a turn and is answered 8 each time (a game
of Wordle), where generate reads the whole conversation again every turn, as TRL's loop does. Ours also returns every
token's logprob, which the peer does not; it takes the weights afresh each time, as after an optimizer step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import (
    BEST,
    PRECISIONS,
    SHAPES,
    Precision,
    Result,
    interleave,
    peak_memory,
    peer_config,
    prepare,
    report,
    run_alone,
)

from nurture.inference.engine import Completion, Engine
from nurture.inference.sampling import SamplingParams
from nurture.model.config import ModelConfig
from nurture.model.transformer import Transformer

PROMPTS, GROUP, PROMPT, NEW = 8, 8, 64, 64
ANSWER = 8
"""Tokens of a turn of the game, the policy's and the environment's."""


def make_prompts(config: ModelConfig) -> torch.Tensor:
    """Return (64, PROMPT): 8 random prompts, 8 times each."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(8, config.vocab_size, (PROMPTS, PROMPT), generator=generator)
    return prompts.repeat_interleave(GROUP, 0)


def our_run(config: ModelConfig, dtype: torch.dtype, turns: int) -> Callable[[], object]:
    """Return a function that plays 64 episodes with the engine."""
    engine = Engine(Transformer(config), max_batch=PROMPTS * GROUP, dtype=dtype)
    rows = make_prompts(config).tolist()
    params = SamplingParams(max_tokens=NEW if turns == 1 else ANSWER)
    answer = list(range(8, 8 + ANSWER))

    def run() -> None:
        engine.refresh()
        played = [0] * len(rows)

        def respond(ended: list[tuple[int, Completion]]) -> list[list[int] | None]:
            for index, _ in ended:
                played[index] += 1
            return [answer if played[index] < turns else None for index, _ in ended]

        engine.converse(rows, respond, params)

    return run


def peer_run(config: ModelConfig, dtype: torch.dtype, turns: int) -> Callable[[], object]:
    """Return a function that does the same with transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(peer_config(config)).eval().to(dtype)
    prompts = make_prompts(config)
    answer = torch.arange(8, 8 + ANSWER).expand(len(prompts), -1)
    new = NEW if turns == 1 else ANSWER

    def run() -> None:
        sequences = prompts
        for turn in range(turns):
            sequences = model.generate(
                sequences, attention_mask=torch.ones_like(sequences), do_sample=True, top_k=0,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=0, disable_compile=True,
            )  # fmt: skip
            if turn + 1 < turns:
                sequences = torch.cat((sequences, answer), 1)

    return run


def compare(shape: str, turns: int, repeats: int, clock: Callable[[], float], memory: bool) -> list[Result]:
    """Measure ours against the peer in each precision, and at its best against the peer as shipped."""
    config = SHAPES[shape]
    runs = {
        (side, name): make(config, dtype, turns)
        for side, make in (("ours", our_run), ("peer", peer_run))
        for name, dtype in PRECISIONS.items()
    }
    seconds = dict(zip(runs, interleave(*runs.values(), repeats=repeats, clock=clock), strict=True))
    sides = ("ours", *PRECISIONS) if memory else ()
    peaks = {
        side: peak_memory(__file__, "--alone", side, "--shapes", shape, "--turns", str(turns))
        for side in sides
    }
    rollouts = PROMPTS * GROUP
    compared: list[tuple[Precision, Precision]] = [("fp32", "fp32"), (BEST, "fp32"), (BEST, BEST)]
    return [
        Result(
            f"rollout/{shape}/{turns} turn{'s' * (turns > 1)}/ours {mine} vs transformers {yours}",
            rollouts / seconds["ours", mine],
            rollouts / seconds["peer", yours],
            seconds["peer", yours] / seconds["ours", mine],
            memory_ratio=peaks["ours"] / peaks[yours] if memory and mine == BEST else None,
        )
        for mine, yours in dict.fromkeys(compared)
    ]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="3M", help="comma separated: " + ", ".join(SHAPES))
    parser.add_argument("--turns", default="1,6")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one turn, two times")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, processor seconds: on a busy machine"
    )
    parser.add_argument("--memory", action="store_true", help="measure each side's peak memory too")
    parser.add_argument("--alone", choices=("ours", *PRECISIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        config, turns = SHAPES[arguments.shapes], int(arguments.turns)
        ours = arguments.alone == "ours"
        run_alone(
            our_run(config, PRECISIONS[BEST], turns)
            if ours
            else peer_run(config, PRECISIONS[arguments.alone], turns)
        )
        return
    if arguments.quick:
        arguments.turns, arguments.repeats = "1", 2
    clock = time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    prepare()
    for shape in arguments.shapes.split(","):
        for turns in map(int, arguments.turns.split(",")):
            found = compare(shape, turns, arguments.repeats, clock, arguments.memory)
            report(found, "rollouts/s", arguments.json)


if __name__ == "__main__":
    main()
