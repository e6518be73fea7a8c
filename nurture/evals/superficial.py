"""Is alignment superficial? How much of a fine-tuned model's ability its base already had, and what it could be taught.

Four measurements on the embedded world, all on held-out tasks:

1. *Programs* (evals/adaptation.py): the base model with a few demonstrations in its prompt, fine-tuned on 10, 100 or
   1,000 examples, or with adapters; length in bits against the share of right replies and of replies in form. Beside it
   the fine-tuned models, and freshly drawn weights as the control that knows nothing.
2. *Best of n*: how often a right reply is among n of the base, against n of the fine-tuned model.
3. *Facts*: people that pretraining told of but nobody was ever asked about (surfaced), against people that no document
   names, taught in fine-tuning alone, 1 or more times each, and asked in wordings they were not taught in.
4. *Shifted tokens* (evals/token_shift.py): which tokens of the fine-tuned models' likeliest replies the base would have
   written, by place in the reply and kind of prompt.

The sentences at the end are made from the measured numbers and their intervals. Main failure mode: a base model that
never saw the task's form at all scores 0 however much it knows; so it is asked in its own form, a forum thread.

Sources: Zhou et al., arXiv 2305.11206 (LIMA's hypothesis); Vergara-Browne et al., arXiv 2602.15829 (bits); arXiv
2410.03717 (curves over the number of examples); Brown et al., arXiv 2407.21787 (best of n as coverage); Lin et al.,
arXiv 2312.01552 (shifted tokens).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from nurture.data.packing import ConversationBatches, tokenise_conversations
from nurture.data.sources import task_row
from nurture.evals.adaptation import (
    Program,
    cheapest,
    conversation_bits,
    demonstration_turns,
    on_frontier,
    rounded_adapters,
    thread_conversation,
    tune,
)
from nurture.evals.best_of_n import best_of_n
from nurture.evals.measure import Measure, difference, rate
from nurture.evals.replies import Reply, ask, graded
from nurture.evals.token_shift import SPELLINGS, rank_replies, shift_rates, write_replies
from nurture.evals.world_card import cloze_accuracy
from nurture.losses.language import LanguageLoss
from nurture.model.lora import LoraConfig, add_adapters
from nurture.model.transformer import Transformer
from nurture.optim import OptimizerConfig, ScheduleConfig
from nurture.recipe import Section
from nurture.runtime import seed_everything
from nurture.tokenizer import Tokenizer
from nurture.types import Message
from nurture.world import Task, World
from nurture.world.facts import RELATIONS, Entity

Say = Callable[[str], None]
BASE, TUNED, RANDOM = "base", "sft", "random"
_SCHEDULE = ScheduleConfig(kind="cosine", warmup=0.1, final=0.1)


class SuperficialConfig(Section):
    """Size of the experiment; the default takes about two minutes on two cores for a million parameters."""

    kinds: tuple[str, ...] = ("fact", "translation")
    """Kinds of task with one right answer."""
    questions: PositiveInt = 100
    """Held-out tasks of each kind."""
    shots: tuple[NonNegativeInt, ...] = (0, 1, 4)
    """Demonstrations in a prompt."""
    examples: tuple[PositiveInt, ...] = (10, 100, 1000)
    """Examples in a training set; each set holds the smaller ones."""
    rank: PositiveInt = 2
    """Rank of the adapters, trained on the largest set."""
    adapter_bits: tuple[PositiveInt, ...] = (3, 4)
    """Bits that a number of an adapter is rounded to."""
    replies: PositiveInt = 8
    """n of best of n."""
    shift_kinds: tuple[str, ...] = tuple(
        "fact arithmetic code translation rewrite list story describe chat benign redteam".split()
    )
    """Kinds of prompt whose replies are compared with the base token by token."""
    shift_prompts: PositiveInt = 40
    """Held-out prompts of each of these kinds."""
    shift_tokens: PositiveInt = 100
    """Longest reply to them."""
    exposures: tuple[PositiveInt, ...] = (1, 8)
    """Examples of each new fact in a training set."""
    passes: PositiveInt = 4
    """Times that a training set is seen."""
    least_updates: PositiveInt = 24
    """Updates for small sets, in smaller batches; the smallest are then seen more often."""
    batch_size: PositiveInt = 16
    """Rows in an update."""
    sequence_length: PositiveInt = 256
    """Tokens in a row."""
    reply_tokens: PositiveInt = 40
    """Longest reply."""
    target: float = Field(default=0.9, gt=0, le=1)
    """Bits are compared where this share of the best score is reached."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    """Of every fine-tuning here. Much slower, and few examples do not teach the form; faster, and they erase facts."""
    seed: NonNegativeInt = 0
    """Of the training sets, the order and the fresh weights."""


@dataclass(frozen=True)
class _Bench:
    """What every measurement needs."""

    tokenizer: Tokenizer
    world: World
    config: SuperficialConfig
    say: Say

    def tasks(self, kind: str, split: str, count: int, start: int = 0) -> list[Task]:
        return [self.world.task(kind, split, index) for index in range(start, start + count)]


def experiment(
    models: Mapping[str, Transformer],
    tokenizer: Tokenizer,
    world: World,
    config: SuperficialConfig,
    say: Say = print,
) -> dict[str, Any]:
    """Measure everything and return it as plain data.

    Args:
        models: "base" and "sft", and more fine-tuned ones if there are; all with the ids of `tokenizer`. Not changed.
        tokenizer: with the chat template.
        say: called with one line of progress at a time.
    """
    started = time.monotonic()
    bench = _Bench(tokenizer, world, config, say)
    programs = [program for kind in config.kinds for program in _programs(bench, models, kind)]
    chances = [entry for kind in config.kinds for entry in _best_of_n(bench, models, kind, programs)]
    facts = _facts(bench, models[BASE])
    shifts = [shift for name in models if name != BASE for shift in _shifts(bench, models, name)]
    return {
        "models": [*models, RANDOM],
        "programs": [_plain(program, on_frontier(program, programs)) for program in programs],
        "thresholds": thresholds(programs, config.target),
        "best_of_n": [{**entry, "right": entry["right"].as_data()} for entry in chances],
        "facts": [
            {**entry, **{k: entry[k].as_data() for k in ("asked", "cloze") if entry[k]}} for entry in facts
        ],
        "token_shift": shifts,
        "conclusions": [
            *conclusions(programs, chances, facts, config.target),
            *(about_shifts(shifts, name) for name in models if name != BASE),
        ],
        "limits": list(LIMITS),
        "config": config.model_dump(mode="json"),
        "seconds": round(time.monotonic() - started, 1),
    }


# --- programs -------------------------------------------------------------------------------------------------------


def _programs(bench: _Bench, models: Mapping[str, Transformer], kind: str) -> Iterator[Program]:
    """Measure every program of one kind of task."""
    questions = bench.tasks(kind, "heldout", bench.config.questions)
    examples = bench.tasks(kind, "train", max(bench.config.examples))
    seed_everything(bench.config.seed)
    fresh = Transformer(next(iter(models.values())).config)
    for name, model in {**models, RANDOM: fresh}.items():
        knows_chat = name not in (BASE, RANDOM)

        def program(
            construction: Any, detail: str, bits: float, replies: Sequence[Reply], name: str = name
        ) -> Program:
            right, form = _graded(bench.world, questions, replies)
            bench.say(
                f"{kind}, {name}, {detail}: {bits:,.0f} bits, {right.value:.0%} right, {form.value:.0%} in form"
            )
            return Program(name, kind, construction, detail, bits, right, form)

        # What cannot read has no use for a prompt, and no corrections of small rank make random weights useful.
        for shots in bench.config.shots if name != RANDOM else (0,):
            replies = _prompted(bench, model, questions, examples[:shots], chat=knows_chat)
            turns = [demonstration_turns(examples[:shots])] if shots else []
            bits = conversation_bits(model, bench.tokenizer, bench.world, turns) if turns else 0.0
            detail = _prompt_name(shots)
            yield program("prompt" if shots else "nothing", detail, bits, replies)
        for size in _sizes(bench.config, name):
            bits = conversation_bits(
                model, bench.tokenizer, bench.world, [demonstration_turns([task]) for task in examples[:size]]
            )
            tuned = fine_tuned(bench, model, examples[:size])
            yield program("data", f"{size} examples", bits, _asked(bench, tuned, questions))
        if name != BASE:
            continue
        tuned = fine_tuned(bench, model, examples, adapters=True)
        for bits_each in bench.config.adapter_bits:
            with rounded_adapters(tuned, bits_each) as length:
                replies = _prompted(bench, tuned, questions, [], chat=False)
            yield program("adapter", f"rank {bench.config.rank}, {bits_each} bits", length, replies)


def _sizes(config: SuperficialConfig, model: str) -> tuple[int, ...]:
    """Return the training sets that are tried: all for the base, the largest for fresh weights, the others else."""
    if model == BASE:
        return config.examples
    return config.examples[-1:] if model == RANDOM else config.examples[:-1]


def _prompt_name(shots: int) -> str:
    return f"{shots} in the prompt" if shots else "as it is"


def best_prompt(programs: Sequence[Program], kind: str) -> Program:
    """Return the base's best program without training."""
    prompted = [
        p for p in programs if (p.model, p.kind) == (BASE, kind) and p.construction in ("nothing", "prompt")
    ]
    return max(prompted, key=lambda program: program.correct.value)


def fine_tuned(
    bench: _Bench, model: Transformer, tasks: Sequence[Task], *, adapters: bool = False
) -> Transformer:
    """Return a copy of `model` fine-tuned on the tasks' demonstrations, whole or by adapters.

    Adapters are trained on forum threads: nothing has told the base's rows for the chat's tokens apart from those of
    other tokens that it never met, and corrections of small rank, which leave these rows alone, cannot do it.
    """
    model, tokenizer, config = copy.deepcopy(model), bench.tokenizer, bench.config
    seed_everything(config.seed)
    optimizer_config = config.optimizer
    if adapters:
        add_adapters(model, LoraConfig(rank=config.rank, alpha=2.0 * config.rank))
        # Corrections start at zero and are few: they take larger steps.
        optimizer_config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
        conversations = [
            thread_conversation(tokenizer, bench.world, task.messages, task.demonstration) for task in tasks
        ]
    else:
        conversations = list(tokenise_conversations(map(task_row, tasks), tokenizer))
    rows = -(-sum(len(c.token_ids) for c in conversations) // config.sequence_length)
    # Small sets come in smaller batches, for enough updates within `passes`: seen more often, they erase facts.
    batch_size = min(config.batch_size, max(1, rows * config.passes // config.least_updates))
    batches = ConversationBatches(
        conversations,
        batch_size=batch_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
        pad_token_id=tokenizer.pad_token_id,
    )
    loss_fn = LanguageLoss(torch.from_numpy(tokenizer.token_byte_lengths))
    steps = max(batches.steps(config.passes), config.least_updates)
    for _ in tune(model, batches, loss_fn, optimizer_config, _SCHEDULE, steps):
        pass
    return model


def _asked(bench: _Bench, model: Transformer, tasks: Sequence[Task]) -> list[Reply]:
    """Ask in the chat format."""
    prompts = [task.messages for task in tasks]
    return ask(model, bench.tokenizer, prompts, max_tokens=bench.config.reply_tokens)


def _prompted(
    bench: _Bench,
    model: Transformer,
    tasks: Sequence[Task],
    demonstrations: Sequence[Task],
    *,
    chat: bool,
    replies: int = 1,
) -> list[Reply]:
    """Ask after demonstrations: in the chat format, or as a forum thread whose next post is the reply.

    Args:
        replies: how many are drawn to each question, at temperature 1; a single one is the likeliest.
    """
    before = demonstration_turns(demonstrations)
    asked: list[list[Message] | str] = []
    for task in tasks:
        system = [turn for turn in task.messages if turn["role"] == "system"]
        turns = [*system, *before, *(turn for turn in task.messages if turn["role"] != "system")]
        asked += [turns if chat else bench.world.forum_prompt(turns)] * replies
    temperature = 0.0 if replies == 1 else 1.0
    found = ask(
        model,
        bench.tokenizer,
        asked,
        max_tokens=bench.config.reply_tokens,
        temperature=temperature,
        seed=bench.config.seed,
    )
    if chat:
        return found
    # A thread goes on with somebody else's post: the first line is the reply, and its end is where it stopped.
    return [Reply(r.text.strip().split("\n")[0].strip(), "\n" in r.text.strip(), r.tokens) for r in found]


def _graded(world: World, tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[Measure, Measure]:
    """Return how many replies are right, and how many have the form; both must have ended."""
    found = graded(world, tasks, replies)
    return rate([g.is_right for g in found]), rate([g.in_form for g in found])


def thresholds(programs: Sequence[Program], target: float) -> list[dict[str, Any]]:
    """Return, for each kind and model, the bits of the shortest program that reaches `target` of the best score.

    `bits` is None where none reaches it; `tried` is the longest program tried.
    """
    found = []
    for kind in dict.fromkeys(program.kind for program in programs):
        of_kind = [program for program in programs if program.kind == kind]
        best = max(program.correct.value for program in of_kind)
        for model in dict.fromkeys(program.model for program in of_kind):
            own = [program for program in of_kind if program.model == model]
            shortest = cheapest(own, target * best) if best > 0 else None
            found.append(
                {
                    "kind": kind,
                    "model": model,
                    "score": target * best,
                    "bits": None if shortest is None else round(shortest.bits, 1),
                    "program": None if shortest is None else shortest.detail,
                    "tried": round(max(program.bits for program in own), 1),
                    "best": max(program.correct.value for program in own),
                }
            )
    return found


# --- best of n ------------------------------------------------------------------------------------------------------


def _best_of_n(
    bench: _Bench, models: Mapping[str, Transformer], kind: str, programs: Sequence[Program]
) -> Iterator[dict[str, Any]]:
    """Measure how often a right reply is among n: the base with its best prompt, the fine-tuned model without."""
    n = bench.config.replies
    questions = bench.tasks(kind, "heldout", max(1, bench.config.questions // 2))
    best = best_prompt(programs, kind).detail
    shots = next(number for number in bench.config.shots if _prompt_name(number) == best)
    demonstrations = bench.tasks(kind, "train", shots)
    for name in (BASE, TUNED):
        chat = name != BASE
        shown = [] if chat else demonstrations
        replies = _prompted(bench, models[name], questions, shown, chat=chat, replies=n)
        asked = [task for task in questions for _ in range(n)]
        right = np.array([g.is_right for g in graded(bench.world, asked, replies)], dtype=float)
        right = right.reshape(len(questions), n)
        for power in range(n.bit_length()):
            # With the truth itself as the reward, the best of n is right when any is.
            chances = best_of_n(right, right, 2**power)
            measure = rate([float(chance) for chance in chances])
            yield {"kind": kind, "model": name, "n": 2**power, "right": measure}
        bench.say(f"{kind}, {name}: best of {2**power} right for {measure.value:.0%}")


# --- facts ----------------------------------------------------------------------------------------------------------


def _facts(bench: _Bench, base: Transformer) -> list[dict[str, Any]]:
    """Fine-tune the base on known people's facts and on new people's, and ask for both in wordings not taught."""
    world, config = bench.world, bench.config
    groups = {
        group: [p for p in world.people if p.group == group] for group in ("train", "heldout", "unseen")
    }
    arms = len(config.exposures) + 1
    taught = {times: groups["unseen"][arm::arms] for arm, times in enumerate(config.exposures)}
    never = groups["unseen"][arms - 1 :: arms]
    training = bench.tasks("fact", "train", max(config.examples))
    for times, people in taught.items():
        training += [_question(p, relation, 0) for p in people for relation in p.facts for _ in range(times)]
    tuned = fine_tuned(bench, base, training)
    clozes = {
        group: cloze_accuracy(base, bench.tokenizer, world, split=group, n=config.questions)
        for group in groups
    }

    def asked(people: Sequence[Entity]) -> Measure:
        pairs = [(p, relation) for p in people for relation in p.facts]
        chosen = [pairs[i * len(pairs) // config.questions] for i in range(min(config.questions, len(pairs)))]
        # Wording 0 was the lesson; the others of the relation were used with known people only.
        tasks = [_question(p, relation, 1 + place) for place, (p, relation) in enumerate(chosen)]
        return _graded(world, tasks, _asked(bench, tuned, tasks))[0]

    entries: list[dict[str, Any]] = []
    for label, name, group in (
        ("pretrained, asked about in fine-tuning", "known", "train"),
        ("pretrained, never asked about", "surfaced", "heldout"),
    ):
        entries.append(
            {"people": label, "group": name, "asked": asked(groups[group]), "cloze": clozes[group]}
        )
    for times, people in taught.items():
        seen = times * config.passes
        label = f"not pretrained, taught in fine-tuning, each fact seen {seen} times"
        entries.append(
            {"people": label, "group": "taught", "seen": seen, "asked": asked(people), "cloze": None}
        )
    entries.append(
        {
            "people": "not pretrained, not taught",
            "group": "never",
            "asked": asked(never),
            "cloze": clozes["unseen"],
        }
    )
    for entry in entries:
        bench.say(f"facts, {entry['people']}: {entry['asked'].value:.0%} right")
    return entries


def _question(person: Entity, relation: str, wording: int) -> Task:
    """Return a question about one fact in one wording; past the last wording they begin again after the first."""
    wordings = RELATIONS["person"][relation].questions
    wording = wording if wording == 0 else 1 + (wording - 1) % (len(wordings) - 1)
    return Task(
        kind="fact",
        split=person.group,
        index=0,
        messages=[{"role": "user", "content": person.fill(wordings[wording], relation)}],
        demonstration=person.answer(relation),
        answer=person.facts[relation],
        metadata={"entity": person, "relation": relation},
    )


# --- shifted tokens --------------------------------------------------------------------------------------------------


def _shifts(bench: _Bench, models: Mapping[str, Transformer], name: str) -> Iterator[dict[str, Any]]:
    """Rank the tokens of a fine-tuned model's replies under the base, which reads them in each spelling."""
    config, tokenizer = bench.config, bench.tokenizer
    tasks = [
        task for kind in config.shift_kinds for task in bench.tasks(kind, "heldout", config.shift_prompts)
    ]
    replies = write_replies(models[name], tokenizer, tasks, config.shift_tokens)
    for spelling in SPELLINGS:
        ranked = rank_replies(models[BASE], tokenizer, bench.world, tasks, replies, spelling)
        rates = shift_rates(ranked, lambda token: tokenizer.decode([token]))
        shifted = rates["all"]["shifted"]
        bench.say(
            f"{name}, read by the base as {spelling}: {shifted['value']:.1%} of {shifted['n']:,} tokens shifted"
        )
        yield {"model": name, "spelling": spelling, **rates}


def about_shifts(shifts: Sequence[Mapping[str, Any]], model: str) -> str:
    """Say how much of a model's replies the base would have written, and where it would not."""
    said = []
    for shift in (shift for shift in shifts if shift["model"] == model):
        rates = {name: Measure(**measure) for name, measure in shift["all"].items()}
        said.append(
            f"as a {shift['spelling']}, {rates['unshifted'].percent()} of the tokens of {model} are the base's first"
            f" choice, {rates['shifted'].percent()} are not among its first three"
        )
        early, late = (
            [Measure(**line["shifted"]) for line in shift["by_place"] if line["place"] in places]
            for places in (("1",), ("9-16", "17-32", "33-64"))
        )
        if early and late:
            change = difference(early[0], late[-1])
            verdict = change.side("more", "fewer", "not clearly more or fewer")
            said[-1] += (
                f" ({early[0].percent()} of first tokens; late in the reply {late[-1].percent()}, {verdict})"
            )
    return f"Shifted tokens, {model}: the base reads the reply " + "; ".join(said) + "."


# --- what follows ---------------------------------------------------------------------------------------------------

LIMITS = (
    "Bits are upper bounds: a shorter program may exist, and the code all programs share is not counted.",
    "One model size, one world, one seed: intervals are over questions, not over trainings. A new seed or a larger "
    "model may give another answer.",
    "The fine-tuned models saw other examples of these very kinds of task; that they need few bits says that the "
    "adaptation is inside, not that it was small.",
    "A shifted token is one that the base ranks low, whatever it means: a synonym counts as much as another answer. "
    "Late places are reached by long replies alone, which are to other kinds of prompts than short ones.",
    "Facts told in pretraining were read in many wordings and texts, taught ones in one wording: the comparison is of "
    "two ways to learn as they are used, not of equal numbers of readings.",
)


def conclusions(
    programs: Sequence[Program],
    chances: Sequence[Mapping[str, Any]],
    facts: Sequence[Mapping[str, Any]],
    target: float,
) -> list[str]:
    """Say what the numbers show and what they do not, in sentences that depend on nothing but the numbers."""
    said = []
    for kind in dict.fromkeys(program.kind for program in programs):
        said.append(_about_kind(kind, [p for p in programs if p.kind == kind], chances, target))
    said.append(_about_facts(facts))
    return said


def _about_kind(
    kind: str, programs: Sequence[Program], chances: Sequence[Mapping[str, Any]], target: float
) -> str:
    tuned = next(p for p in programs if p.model == TUNED and p.construction == "nothing")
    trained = [p for p in programs if p.model == BASE and p.construction == "data"]
    few, most = trained[0], trained[-1]
    prompted = best_prompt(programs, kind)
    said = [
        f"{kind}: the fine-tuned model is right {tuned.correct.percent()} and in form {tuned.form.percent()}.",
        f"The base with no training ({prompted.detail}) is right {prompted.correct.percent()};"
        f" with {few.detail} it is in form {few.form.percent()} and right {few.correct.percent()},"
        f" with {most.detail} {most.form.percent()} and {most.correct.percent()}.",
        f"In form, training on {few.detail} {_compared(difference(tuned.form, few.form), 'all of fine-tuning')};"
        f" in right answers, training on {most.detail}"
        f" {_compared(difference(tuned.correct, most.correct), 'all of fine-tuning')}.",
    ]
    lines = {entry["model"]: entry for entry in thresholds(programs, target)}
    goal = lines[BASE]["score"]
    said.append(
        f"To be right in {goal:.0%} of replies ({target:.0%} of the best), "
        + ", ".join(f"{model} {_bits(lines[model])}" for model in lines)
        + "."
    )
    base, other = lines[BASE]["bits"], lines[RANDOM]["bits"]
    if base is None:
        ours, theirs = (
            max((p.correct for p in programs if p.model == model), key=lambda m: m.value)
            for model in (BASE, RANDOM)
        )
        said.append(
            "So nothing tried brings this ability out of the base: it is not superficial by this measure. Still, the "
            f"base's best program {_compared(difference(theirs, ours), 'the best one of fresh weights')}."
        )
    elif other is None or other > base:
        said.append(
            "So most of what the task takes is in the pretrained weights, and adapting them is the smaller part."
        )
    else:
        said.append(
            "So the pretrained weights save no bits here: what the task takes came from the examples."
        )
    of_kind = [entry for entry in chances if entry["kind"] == kind]
    if of_kind:
        last = {entry["model"]: entry for entry in of_kind}
        single = next(e for e in of_kind if e["model"] == TUNED and e["n"] == 1)
        any_of, change = last[BASE]["right"], difference(single["right"], last[BASE]["right"])
        said.append(
            f"Among {last[BASE]['n']} sampled replies of the prompted base one is right {any_of.percent()}; "
            f"a single sampled reply of the fine-tuned model is right {single['right'].percent()}: sampling with a "
            f"perfect judge {_compared(change, 'fine-tuning')}."
        )
    return " ".join(said)


def _about_facts(facts: Sequence[Mapping[str, Any]]) -> str:
    surfaced, never = (next(e["asked"] for e in facts if e["group"] == g) for g in ("surfaced", "never"))
    said = [
        f"Facts: what pretraining told and nobody asked about is answered {surfaced.percent()}; of people never told "
        f"of nor taught, {never.percent()} (guessing)."
    ]
    for entry in facts:
        if entry["group"] != "taught":
            continue
        over_guessing, over_surfaced = _between(never, entry["asked"]), _between(surfaced, entry["asked"])
        learned = over_guessing.low is not None and over_guessing.low > 0
        said.append(
            f"New facts seen {entry['seen']} times in fine-tuning are answered {entry['asked'].percent()} in wordings "
            f"not taught: {'more than guessing' if learned else 'not clearly more than guessing'}, and this "
            f"{_compared(over_surfaced, 'surfacing pretrained ones')}."
        )
    can = any(
        (d := _between(never, e["asked"])).low is not None and d.low > 0
        for e in facts
        if e["group"] == "taught"
    )
    said.append(
        "So fine-tuning can add facts here; that it only brings out what is there does not hold as a law."
        if can
        else "So fine-tuning brought facts out and did not clearly add any; more exposures might."
    )
    return " ".join(said)


def _between(first: Measure, second: Measure) -> Measure:
    """Return second minus first for measures of different items, which must not be paired."""
    return difference(replace(first, outcomes=None), replace(second, outcomes=None))


def _compared(change: Measure, other: str) -> str:
    """Say how something stands to another thing, by the interval of the difference: ours minus theirs."""
    value, low, high = (100 * (number or 0.0) for number in (change.value, change.low, change.high))
    verdict = change.side("beats", "falls short of", "cannot be told from")
    return f"{verdict} {other} ({value:+.0f} points, {low:+.0f} to {high:+.0f})"


def _bits(line: Mapping[str, Any]) -> str:
    if line["bits"] is None:
        return f"does not get there with up to {line['tried']:,.0f} bits"
    return f"needs {line['bits']:,.0f} bits ({line['program']})"


def _plain(program: Program, shortest: bool) -> dict[str, Any]:
    return {
        "model": program.model,
        "kind": program.kind,
        "construction": program.construction,
        "detail": program.detail,
        "bits": round(program.bits, 1),
        "right": program.correct.as_data(),
        "form": program.form.as_data(),
        "shortest": shortest,
    }
