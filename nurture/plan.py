"""What a recipe will take, before money is spent: parameters, operations, memory, data, time, cost, what does not fit.

Operations of a training token: 6 for every parameter that multiplies, and 6 T N H L for causal attention over T tokens
(N heads of width H, L layers); generating or scoring one costs a third. Wall time is operations over (devices x peak x
efficiency); efficiency is what a measured run gave (`--efficiency`), or an assumption that is printed as one. Memory is
counted by part for the way nurture trains: fp32 weights, gradients and moments sharded over all devices (FSDP2), bf16
activations. The scaling curves come from `update_seconds`, a model of communication stated there.

Main failure mode: an efficiency that the cluster does not reach; everything else here is arithmetic. Checked against
SmolLM3, nanochat and InstructGPT as published (tests/parity/test_plan.py).

Sources: arXiv 2001.08361 (6 N D); arXiv 2204.02311, appendix B (attention, utilisation); arXiv 2304.11277 (FSDP);
arXiv 2205.05198 (activation memory).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nurture.data.mixture import normalised_weights, phase_end
from nurture.errors import NurtureError, did_you_mean
from nurture.model.config import PRESETS, ModelConfig
from nurture.model.heads import CHUNK
from nurture.model.hugging_face import read_config
from nurture.model.lora import adapter_count
from nurture.stages.recipe import Recipe

BYTES_OF_TEXT = 4.0
"""Bytes of text in a token: a trillion tokens are about 4 TB (3 to 5, by language and tokenizer)."""
ROOM = 0.9
"""Share of a device's memory that is planned; the rest is the allocator's and the libraries'."""
OVERLAP = 0.8
"""Share of the computation that communication can hide behind."""
LATENCY = 20e-6
"""Seconds a collective takes for each doubling of the devices, whatever its size."""


@dataclass(frozen=True)
class Hardware:
    """A number of equal devices.

    Attributes:
        name: of the device.
        count: devices (of a processor: cores, which work as one device).
        peak: dense bf16 operations a second of one.
        memory: bytes of one.
        node: devices that are joined by `link`; nodes are joined by `network`.
        link: bytes a second of one device to others of its node.
        network: bytes a second of one device to other nodes.
        price: dollars an hour of one.
        efficiency: share of peak that training reaches within a node, and across nodes.
    """

    name: str
    count: int
    peak: float
    memory: float
    node: int
    link: float
    network: float
    price: float
    efficiency: tuple[float, float]

    @property
    def shards(self) -> int:
        """How many parts weights and batches are cut into."""
        return 1 if self.name == "CPU" else self.count

    @property
    def memory_of_shard(self) -> float:
        """Bytes that one part has."""
        return self.memory * self.count / self.shards


# Efficiency within a node is nanochat's on 8 H100 (44 %). Across nodes SmolLM3's trainer reached 29 % and larger
# published runs up to about 40 %; 33 % lies between, and is the assumption to replace first.
_TRAINED = (0.44, 0.33)
_GIB = 2.0**30
DEVICES = {
    "B200": Hardware("B200", 1, 2250e12, 180 * _GIB, 8, 900e9, 50e9, 5.0, _TRAINED),
    "H200": Hardware("H200", 1, 989e12, 139 * _GIB, 8, 450e9, 50e9, 3.5, _TRAINED),
    "H100": Hardware("H100", 1, 989e12, 79 * _GIB, 8, 450e9, 50e9, 3.0, _TRAINED),
    "A100": Hardware("A100", 1, 312e12, 79 * _GIB, 8, 300e9, 25e9, 1.8, _TRAINED),
    "L40S": Hardware("L40S", 1, 362e12, 45 * _GIB, 8, 32e9, 25e9, 1.0, (0.35, 0.25)),
    "RTX4090": Hardware("RTX4090", 1, 165e12, 23.5 * _GIB, 8, 25e9, 3e9, 0.5, (0.35, 0.2)),
    "CPU": Hardware("CPU", 1, 450e9, 10 * _GIB, 1, 1e10, 1e9, 0.04, (0.35, 0.35)),
}
"""Dense bf16 peaks and memory from data sheets; prices of late 2025, for orders of magnitude. CPU: a core with bf16."""


def parse_hardware(text: str) -> Hardware:
    """Read `384xH100`.

    Raises:
        NurtureError: it is not of that form, or the device is unknown.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z]\w*)", text.strip())
    if found is None or found[1] == "0":
        raise NurtureError(f"--hardware {text}: write number x device, for example 384xH100.")
    name = found[2].upper()
    if name not in DEVICES:
        hint = did_you_mean(name, DEVICES)
        raise NurtureError(
            f"--hardware {text}: there is no device '{found[2]}'.{hint} Known: {', '.join(DEVICES)}."
        )
    return replace(DEVICES[name], count=int(found[1] or 1))


# --- operations ------------------------------------------------------------------------------------------------------


def forward_operations(shape: ModelConfig, length: float) -> float:
    """Return the operations of one token's forward pass in a causal sequence of `length` tokens."""
    looked_up = 0 if shape.tied_embeddings else shape.vocab_size * shape.width
    weights = 2.0 * (shape.parameter_count() - looked_up)
    return weights + 2.0 * length * shape.heads * shape.head_width * shape.layers


def reinforcement_operations(
    policy: float,
    *,
    episodes: float,
    length: float,
    epochs: float = 1.0,
    reference: bool = True,
    reward: float = 0.0,
    value: float = 0.0,
    pretraining: float = 0.0,
) -> float:
    """Return the operations of reinforcement learning, attention aside.

    Args:
        policy: parameters of the policy.
        episodes: episodes in all.
        length: tokens of one, prompt included; each is read or written once, then trained on `epochs` times.
        reference: a frozen copy scores every token.
        reward: parameters of the reward model (0: the reward is computed).
        value: parameters of the value model, which is trained like the policy (0: none).
        pretraining: sequences of `length` mixed into the gradient for every episode (PPO-ptx).
    """
    scored = 2.0 * (policy + policy * reference + reward + value)
    trained = 6.0 * epochs * (policy + value) + 6.0 * policy * pretraining
    return episodes * length * (scored + trained)


# --- what each stage does --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one stage has to do.

    Attributes:
        tokens: trained on, over all updates; None where the time (`minutes`) or the data (`unknown`) decides.
        token_operations: operations of a trained token, with all that is generated and scored for it.
        batch_tokens: of one update.
        sequence_length: tokens in a row.
        microbatch_tokens: tokens that one device holds at once, as the recipe has it.
        checkpointing: whether blocks are computed again in the backward pass.
        optimizer: adamw or muon.
        is_fp32: it computes in float32, by its recipe; else in bf16.
        sources: tokens by source, where the mixture says so.
        adapters: parameters of the adapters that are trained in place of the weights; 0: the weights are.
        frozen: parameters of models that are kept beside (reference, reward model).
        trained_beside: parameters of a second trained model (value model).
        generates: rows generated at once.
        shard_within: devices that share one copy of the weights; 0 for all of them.
        minutes: time budget.
        unknown: why there is no number of tokens.
    """

    name: str
    kind: str
    tokens: float | None
    token_operations: float
    batch_tokens: int
    sequence_length: int
    microbatch_tokens: int
    checkpointing: bool = False
    optimizer: str = "adamw"
    is_fp32: bool = False
    sources: dict[str, float] = field(default_factory=dict)
    adapters: int = 0
    frozen: int = 0
    trained_beside: int = 0
    generates: int = 0
    shard_within: int = 0
    minutes: float | None = None
    unknown: str = ""


def recipe_shape(recipe: Recipe) -> ModelConfig:
    """Return the shape of the model that a recipe trains.

    Raises:
        NurtureError: it starts from a checkpoint that is not here.
    """
    if recipe.model is not None:
        preset = str((recipe.document.data.get("model") or {}).get("preset", "")).lower()
        vocabulary = (
            recipe.tokenizer.get("vocab_size") if "vocab_size" in _written_tokenizer(recipe) else None
        )
        published = PRESETS[preset].vocab_size if preset in PRESETS else None
        size = vocabulary or published or recipe.tokenizer.get("vocab_size") or 2048
        return ModelConfig(**recipe.model, vocab_size=size)
    starts = [start for start in recipe.starts.values() if isinstance(start, Path)]
    if not starts:
        raise NurtureError(f"recipe '{recipe.name}' names no model to plan for.")
    return read_config(starts[0])


def _written_tokenizer(recipe: Recipe) -> Mapping[str, Any]:
    written = recipe.document.data.get("tokenizer")
    return written if isinstance(written, Mapping) else {}


def stage_work(config: Any, shape: ModelConfig) -> Work | None:
    """Return what a stage of a recipe has to do; None for one that trains nothing."""
    if not hasattr(config, "batch_size") or not hasattr(config, "sequence_length"):
        return None
    length, batch = config.sequence_length, config.batch_size * config.sequence_length
    steps, tokens, minutes = config.steps, getattr(config, "tokens", None), config.minutes
    generates, frozen, beside = 0, 0, 0
    lora = getattr(config, "lora", None)  # a policy with adapters is its own reference
    per_token = 3 * forward_operations(shape, length)
    if hasattr(config, "prompts_per_step"):
        # Reinforcement learning: one step is rollouts and the updates on them.
        generates = config.prompts_per_step * config.group_size
        batch = min(batch, generates * length)
        tokens = steps * generates * length * config.epochs if steps else None
        size = shape.parameter_count()
        critic = size if hasattr(config, "value_optimizer") else 0
        learned = size if getattr(config, "reward_model", None) else 0
        frozen, beside = learned + (0 if lora else size), critic
        operations = reinforcement_operations(
            size, episodes=1, length=1, epochs=config.epochs, reward=learned, value=critic
        )
        per_token = operations / config.epochs * per_token / (6 * size)
    elif tokens is None and steps is not None:
        tokens = steps * batch
    if config.kind == "preference":
        # The reference scores every token once.
        frozen, per_token = 0 if lora else shape.parameter_count(), per_token * 4 / 3
    known = tokens is not None or minutes is not None
    return Work(
        name=config.name,
        kind=config.kind,
        tokens=tokens,
        token_operations=per_token,
        batch_tokens=batch,
        sequence_length=length,
        microbatch_tokens=max(config.execution.microbatch_tokens, length),
        checkpointing=config.execution.checkpoint_activations,
        optimizer=config.optimizer.kind,
        is_fp32=config.execution.precision == "fp32",
        sources=_tokens_by_source(config, tokens, batch) if tokens else {},
        adapters=adapter_count(shape, lora) if lora else 0,
        frozen=frozen,
        trained_beside=beside,
        generates=generates,
        minutes=minutes if tokens is None else None,
        unknown="" if known else "its epochs are over data that has not been read; give steps",
    )


def _tokens_by_source(config: Any, tokens: float, batch: int) -> dict[str, float]:
    """Return the tokens of every source by the shares of each phase, nothing where the sizes of the data decide."""
    steps, first = max(1, round(tokens / batch)), 0
    found: dict[str, float] = {}
    for phase in getattr(config, "phases", []):
        end = phase_end(phase, steps)
        for source, share in normalised_weights(phase).items():
            found[source] = found.get(source, 0.0) + share * (end - first) * batch
        first = end
    return found


# --- memory ----------------------------------------------------------------------------------------------------------


def activation_bytes(shape: ModelConfig, checkpointing: bool) -> float:
    """Return the bytes that the backward pass keeps of one token, all layers, in bf16.

    A block keeps the inputs of its norms and matrices: 4 D + 2 N H + 2 K H + 3 F numbers; with checkpointing only its
    own input (D), and one block at a time the rest.
    """
    attention = 2 * shape.heads * shape.head_width + 2 * shape.kv_heads * shape.head_width
    block = 4 * shape.width + attention + 3 * shape.ffn_width
    return 2.0 * (shape.layers * shape.width + block if checkpointing else shape.layers * block)


def memory_parts(shape: ModelConfig, work: Work, devices: int) -> dict[str, float]:
    """Return the bytes that one device holds, by part."""
    shards = min(work.shard_within or devices, devices)
    size = shape.parameter_count()
    embeddings = shape.vocab_size * shape.width
    block = (size - embeddings * (1 if shape.tied_embeddings else 2)) / shape.layers
    trained = work.adapters or size
    adam = (
        1.0 if work.optimizer == "adamw" else 0.0 if work.adapters else embeddings / size
    )  # what has two moments
    parts = {
        "weights": 4.0 * size / shards,
        "adapters": 4.0 * work.adapters / shards,
        "gradients": 4.0 * trained / shards,
        "optimizer": 4.0 * (1.0 + adam) * trained / shards,
        "bf16 copies": 0.0 if work.is_fp32 else 2.0 * (block if work.checkpointing else size),
        "gathered": 0.0 if shards == 1 else 4.0 * (2 * block + 2 * embeddings),
        "activations": (1 + work.is_fp32)
        * activation_bytes(shape, work.checkpointing)
        * work.microbatch_tokens,
        "logits": 8.0 * min(CHUNK, work.microbatch_tokens) * shape.vocab_size,
        "other models": (4.0 * work.frozen + 16.0 * work.trained_beside) / shards,
    }
    kv_bytes = 2.0 * 2 * shape.layers * shape.kv_heads * shape.head_width
    parts["KV cache"] = kv_bytes * work.sequence_length * math.ceil(work.generates / devices)
    return {name: value for name, value in parts.items() if value}


def fits(shape: ModelConfig, work: Work, hardware: Hardware) -> bool:
    """Say whether a stage's memory is within what a device can give."""
    return sum(memory_parts(shape, work, hardware.shards).values()) <= ROOM * hardware.memory_of_shard


def recommended(shape: ModelConfig, work: Work, hardware: Hardware) -> tuple[Work, str]:
    """Return the stage with the execution that suits the hardware, and the advice in words.

    As written where that fits; else the smallest change that does: fewer tokens at once, then recomputing activations,
    then both; else nothing does on these devices, and the advice says how many would. Across nodes the weights are
    shared within a node only where that fits and waits less.
    """
    suited, advice = _execution_that_fits(shape, work, hardware)
    if hardware.shards > hardware.node:
        inner, inner_advice = _execution_that_fits(shape, replace(work, shard_within=hardware.node), hardware)
        times = [sum(update_seconds(shape, w, hardware, w.batch_tokens)) for w in (suited, inner)]
        if fits(shape, inner, hardware) and times[1] < times[0]:
            suited, advice = inner, inner_advice
            advice += (
                f" Sharding flat over {hardware.shards} devices, which is what nurture does today, an update waits"
                f" longer: {times[0]:.2g} s in place of {times[1]:.2g} s."
            )
    rows, n = work.batch_tokens // work.sequence_length, hardware.shards
    if rows < n:
        advice += f" Only {rows} of {n} devices get a row: raise batch_size."
    elif rows % n:
        lost = 1 - rows / n / math.ceil(rows / n)
        even = math.ceil(rows / n) * n
        advice += f" {rows} rows on {n} devices leave {lost:.0%} of them idle; batch_size={even} leaves none."
    return suited, advice


def _execution_that_fits(shape: ModelConfig, work: Work, hardware: Hardware) -> tuple[Work, str]:
    share = math.ceil(work.batch_tokens / work.sequence_length / hardware.shards) * work.sequence_length
    start = min(work.microbatch_tokens, share)  # more at once than a device has is no more
    cut = "one device"
    if hardware.shards > 1:
        cut = (
            f"FSDP within each node of {work.shard_within}" if work.shard_within else "FSDP over all devices"
        )
    if fits(shape, replace(work, microbatch_tokens=start), hardware):
        return replace(work, microbatch_tokens=start), f"fits as written ({cut})."
    for checkpointing in dict.fromkeys((work.checkpointing, True)):
        tokens = start
        while True:
            trial = replace(work, microbatch_tokens=tokens, checkpointing=checkpointing)
            if fits(shape, trial, hardware):
                changes = [f"execution.microbatch_tokens={tokens}"] * (tokens != work.microbatch_tokens)
                changes += ["execution.checkpoint_activations=true"] * (
                    checkpointing and not work.checkpointing
                )
                return trial, f"does not fit as written; {' '.join(changes)} does ({cut})."
            if tokens == work.sequence_length:
                break
            tokens = max(work.sequence_length, tokens // 2 // work.sequence_length * work.sequence_length)
    smallest = replace(work, microbatch_tokens=work.sequence_length, checkpointing=True)
    return smallest, f"does not fit: {_what_would(shape, smallest, hardware)}."


def _what_would(shape: ModelConfig, work: Work, hardware: Hardware) -> str:
    """Say how many devices would be enough, or that only larger ones are."""
    if hardware.shards > 1 or hardware.name != "CPU":
        count = hardware.count
        while count < 2**17:
            count += 1 if count < 64 else count // 32
            if fits(shape, work, replace(hardware, count=count)):
                return f"{count}x{hardware.name} would do, with one row at a time and recomputed activations"
    for name, device in DEVICES.items():
        if device.memory > hardware.memory and fits(shape, work, replace(device, count=hardware.count)):
            return f"{hardware.count}x{name} would do, with one row at a time and recomputed activations"
    needed = max(memory_parts(shape, work, 2**17).items(), key=lambda part: part[1])
    return (
        f"its {needed[0]} alone take {needed[1] / _GIB:.0f} GiB on every device, however many there are; shorten"
        " sequence_length or use a smaller model"
    )


# --- time ------------------------------------------------------------------------------------------------------------


def update_seconds(
    shape: ModelConfig, work: Work, hardware: Hardware, batch_tokens: int
) -> tuple[float, float]:
    """Return (useful, lost) seconds of one update: the communication model.

    Every microbatch gathers the fp32 weights twice and scatters the gradients once, 12 bytes a parameter less their own
    n-th part: at the speed of a device's link where one node shares them, of its network beyond. Where every node
    has a copy, the gradients are added up between nodes once an update: 8 bytes a parameter of a device's part.
    OVERLAP of the computation hides all that; LATENCY for each collective of a block and doubling of the devices that
    share is never hidden. Rows that do not divide among the devices leave some idle.
    """
    n, share = hardware.shards, min(work.shard_within or hardware.shards, hardware.shards)
    rate = hardware.peak * hardware.efficiency[0] * hardware.count
    useful = batch_tokens * work.token_operations / rate
    tokens = (
        math.ceil(batch_tokens / work.sequence_length / n) * work.sequence_length
    )  # of the busiest device
    computing = tokens * n * work.token_operations / rate
    if n == 1:
        return useful, 0.0
    passes = math.ceil(tokens / work.microbatch_tokens)
    size = shape.parameter_count()
    speed = hardware.link if share <= hardware.node else hardware.network
    moving = passes * 12.0 * size * (share - 1) / share / speed
    if share < n:
        copies = n / share
        moving += 8.0 * size / share * (copies - 1) / copies / hardware.network
    waiting = max(0.0, moving - OVERLAP * computing) + passes * 3 * shape.layers * LATENCY * math.log2(share)
    return useful, waiting + computing - useful


def scaling(shape: ModelConfig, work: Work, hardware: Hardware) -> list[dict[str, float]]:
    """Return simulated efficiencies for 1, 2, 4 ... devices up to four times those there are.

    `strong`: the batch is the recipe's, spread thinner; `weak`: every device keeps the rows that it has in the plan.
    1.0 is a device that never waits.
    """
    rows = max(1, work.batch_tokens // work.sequence_length // hardware.shards)
    table, count = [], 1
    while count <= 4 * hardware.count:
        some = replace(hardware, count=count)
        strong = update_seconds(shape, work, some, work.batch_tokens)
        weak = update_seconds(shape, work, some, rows * work.sequence_length * some.shards)
        table.append({"devices": count, "strong": strong[0] / sum(strong), "weak": weak[0] / sum(weak)})
        count *= 2
    return table


def assumed_efficiency(shape: ModelConfig, work: Work, hardware: Hardware) -> float:
    """Return the share of the peak to expect: that of published runs, or less where the communication model says so."""
    useful, lost = update_seconds(shape, work, hardware, work.batch_tokens)
    published = hardware.efficiency[hardware.shards > hardware.node]
    return min(published, hardware.efficiency[0] * useful / (useful + lost))


@dataclass(frozen=True)
class StagePlan:
    """One stage planned. Units: operations, seconds, dollars, bytes."""

    name: str
    kind: str
    efficiency: float
    tokens: float | None
    operations: float | None
    seconds: float | None
    cost: float | None
    memory: dict[str, float]
    microbatch_tokens: int
    checkpointing: bool
    advice: str
    sources: dict[str, dict[str, float]]
    scaling: list[dict[str, float]]
    unknown: str


@dataclass(frozen=True)
class Plan:
    """A whole recipe planned."""

    recipe: str
    hardware: str
    parameters: int
    token_operations: float
    efficiency_from: str
    checkpoint_bytes: float
    memory_of_device: float
    stages: list[StagePlan]

    def total(self, name: str) -> float:
        """Return the sum of a number over the stages that have it."""
        return sum(getattr(stage, name) or 0.0 for stage in self.stages)

    def as_data(self) -> dict[str, Any]:
        """Return the plan as plain data, with totals."""
        names = ("tokens", "operations", "seconds", "cost")
        return asdict(self) | {"total": {name: self.total(name) for name in names}}


def plan_recipe(
    recipe: Recipe, hardware: Hardware, *, efficiency: float | None = None, price: float | None = None
) -> Plan:
    """Plan every stage of a recipe on some hardware.

    Args:
        efficiency: measured share of the peak, in (0, 1]; by default the hardware's assumption.
        price: dollars a device and hour; by default the hardware's.

    Raises:
        NurtureError: the efficiency is not a share, or the recipe's model is unknown.
    """
    if efficiency is not None and not 0 < efficiency <= 1:
        raise NurtureError(f"--efficiency must be above 0 and at most 1, got {efficiency:g}.")
    shape = recipe_shape(recipe)
    works = [work for config in recipe.stages if (work := stage_work(config, shape)) is not None]
    dollars = hardware.price if price is None else price
    return Plan(
        recipe=recipe.name,
        hardware=f"{hardware.count}x{hardware.name}",
        parameters=shape.parameter_count(),
        token_operations=works[0].token_operations if works else 0.0,
        efficiency_from="given" if efficiency else "assumed",
        checkpoint_bytes=12.0 * shape.parameter_count(),
        memory_of_device=hardware.memory_of_shard,
        stages=[plan_stage(shape, work, hardware, efficiency, dollars) for work in works],
    )


def plan_stage(
    shape: ModelConfig, work: Work, hardware: Hardware, efficiency: float | None, price: float
) -> StagePlan:
    """Plan one stage; recomputed activations take a third more time and are no useful operations."""
    suited, advice = recommended(shape, work, hardware)
    recomputed = 4 / 3 if suited.checkpointing else 1.0
    share = efficiency or assumed_efficiency(shape, suited, hardware)
    rate = hardware.peak * hardware.count * share / recomputed
    tokens = work.tokens
    if tokens is None and work.minutes is not None:
        tokens = work.minutes * 60 * rate / work.token_operations
    operations = None if tokens is None else tokens * work.token_operations
    seconds = None if operations is None else operations / rate
    bytes_stored = 2 if shape.vocab_size <= 65_536 else 4
    return StagePlan(
        name=work.name,
        kind=work.kind,
        efficiency=share,
        tokens=tokens,
        operations=operations,
        seconds=seconds,
        cost=None if seconds is None else seconds / 3600 * hardware.count * price,
        memory=memory_parts(shape, suited, hardware.shards),
        microbatch_tokens=suited.microbatch_tokens,
        checkpointing=suited.checkpointing,
        advice=advice,
        sources={
            source: {"tokens": n, "text_bytes": n * BYTES_OF_TEXT, "shard_bytes": n * bytes_stored}
            for source, n in work.sources.items()
        },
        scaling=scaling(shape, suited, hardware),
        unknown=work.unknown,
    )


# --- for people ------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan, console: Any) -> None:
    """Print a plan as tables: stages, memory, data, scaling, advice."""
    from rich.markup import escape

    from nurture.report.table import titled_table

    def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        console.print(titled_table(title, columns, rows, numbers=True))

    console.print(
        f"[bold]{plan.recipe}[/] on {plan.hardware}: {_large(plan.parameters)} parameters,"
        f" {plan.token_operations:.3g} operations a token, checkpoint {_bytes(plan.checkpoint_bytes)};"
        f" efficiency is {plan.efficiency_from}",
        highlight=False,
    )
    names = ("tokens", "operations", "seconds", "cost")
    rows = []
    for stage in plan.stages:
        cells = _row(*(getattr(stage, name) for name in names)) if stage.tokens else ["?", "", "", ""]
        rows.append([stage.name, f"{stage.efficiency:.0%}", *cells])
    rows.append(["all", "", *_row(*(plan.total(name) for name in names))])
    show("Stages", ("stage", "efficiency", "tokens", "operations", "time", "cost"), rows)
    parts = list(dict.fromkeys(part for stage in plan.stages for part in stage.memory))
    title = f"Memory of one device ({_bytes(plan.memory_of_device)})"
    for together in _side_by_side(plan.stages, console.width - max(map(len, parts), default=0) - 4):
        rows = [[part, *(_bytes(stage.memory.get(part, 0)) for stage in together)] for part in parts]
        rows.append(["all", *(_bytes(sum(stage.memory.values())) for stage in together)])
        show(title, ("", *(stage.name for stage in together)), rows)
    for stage in plan.stages:
        held = sorted(stage.sources.items(), key=lambda item: -item[1]["tokens"])
        rows = [[s, _large(h["tokens"]), _bytes(h["text_bytes"]), _bytes(h["shard_bytes"])] for s, h in held]
        if rows:
            show(f"Data of {stage.name}", ("source", "tokens", "text", "shards"), rows)
    longest = max(plan.stages, key=lambda stage: stage.seconds or 0.0, default=None)
    if longest and len(longest.scaling) > 1:
        rows = [[f"{p['devices']:.0f}", f"{p['strong']:.0%}", f"{p['weak']:.0%}"] for p in longest.scaling]
        show(f"Simulated efficiency of {longest.name}", ("devices", "strong", "weak"), rows)
    for stage in plan.stages:
        why = f" Its tokens are unknown: {stage.unknown}." if stage.unknown else ""
        console.print(f"[bold]{stage.name}[/] {escape(stage.advice + why)}", highlight=False, soft_wrap=True)


def _side_by_side(stages: Sequence[StagePlan], width: int) -> list[list[StagePlan]]:
    """Cut a list of stages into tables whose columns fit a terminal; a narrower one breaks its words."""
    tables, left = list[list[StagePlan]](), 0
    for stage in stages:
        column = max(len(stage.name), len("1.54 GB")) + 3
        if not tables or column > left:
            tables.append([])
            left = width
        tables[-1].append(stage)
        left -= column
    return tables


def _row(
    tokens: float | None, operations: float | None, seconds: float | None, cost: float | None
) -> list[str]:
    return [_large(tokens or 0), f"{operations or 0:.3g}", _time(seconds or 0), f"${cost or 0:,.2f}"]


def _large(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.0f} kB" if number else ""


def _time(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
