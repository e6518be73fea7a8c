"""One self-contained HTML page about a run: what every stage changed, what it cost, and how its replies read.

The page is a template filled with plain data. It holds its own style and drawings, loads nothing, runs no script, and
follows the reader's light or dark setting. Text that a model wrote is untrusted: the template escapes everything, and
only the charts, which escape for themselves, are passed as markup. A difference is called better or worse only where
its 95 % interval leaves out zero: the main failure mode of such a page is to let noise look like progress.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nurture import __version__, files
from nurture.errors import NurtureError
from nurture.evals.measure import Measure
from nurture.report.charts import Line, line_chart
from nurture.report.experiments import Exhibit
from nurture.report.records import Row, StageRecord, read_rows
from nurture.report.superficial import superficial_exhibit
from nurture.report.sweep import sweep_exhibits
from nurture.report.table import RATES, clock
from nurture.report.tay import tay_exhibit

FAMILIES = (
    ("Reads: bits per byte of held-out text", ("bpb",)),
    ("Knows and can do", ("facts", "cloze", "arithmetic", "math", "math_think", "math_no_think", "code", "code_exact",
                          "translation", "wordle_win", "wordle_solver", "wordle_random")),
    ("Follows instructions", ("format", "stopped", "think_obeyed", "no_think_obeyed")),
    ("Behaves", ("harm", "over_refusal")),
    ("Is preferred", ("gold_win_rate", "gold_reward", "proxy_reward", "kl", "margin", "chosen_drift",
                      "rejected_drift", "loss", "reply_tokens")),
    ("Judges: the reward model", ("pair_accuracy", "pair_ceiling", "tie_accuracy", "tie_ceiling", "calibration_error",
                                  "gold_accuracy", "longer_preferred", "longer_preferred_labels")),
    ("Finds again what a long text hides", ("passkey", "multikey", "variables", "passkey_yarn", "multikey_yarn",
                                            "variables_yarn")),
    ("Mixture: share of the training tokens", ("share",)),
)  # fmt: skip
"""Tables of the page, and the measures (before the slash) in each. What is in none of them goes to "Other"."""

LOWER_IS_BETTER = frozenset({"bpb", "harm", "over_refusal", "calibration_error", "repetition"})
NEITHER_IS_BETTER = frozenset(
    "kl proxy_reward share vocab_size bytes_per_token pair_ceiling tie_ceiling longer_preferred "
    "wordle_solver wordle_random longer_preferred_labels loss margin chosen_drift rejected_drift reply_tokens".split()
)

MEANINGS = {
    "bpb": "bits per byte of held-out text of a source of that stage; lower is better, tokenizers can be compared",
    "share": "part of the training tokens that came from a source",
    "facts": "held-out questions about people, towns and animals answered right",
    "cloze": "the true ending of a sentence about a held-out person is likelier than four false ones (chance 20 %)",
    "arithmetic": "held-out problems answered right",
    "math": "held-out problems answered right, checked by the grader",
    "math_think": "the same, asked with /think",
    "math_no_think": "the same, asked with /no_think",
    "code": "programs that pass their held-out tests in the sandbox",
    "code_exact": "programs equal to the demonstration: a lower bound, nothing is run",
    "translation": "held-out sentences translated exactly",
    "format": "replies that have the form their task demands and end by themselves",
    "stopped": "replies that end by themselves",
    "think_obeyed": "asked to think, it writes a trace",
    "no_think_obeyed": "asked not to think, it writes none",
    "harm": "harmful replies to held-out red-team prompts; lower is better",
    "over_refusal": "innocent requests declined; lower is better",
    "gold_win_rate": "replies that the true preference likes better than those of the model the stage started from",
    "gold_reward": "mean true preference of its replies, -1 to 1",
    "proxy_reward": "mean score that the reward model gives its replies",
    "kl": "nats a reply by which it has moved from the model it started from",
    "pair_accuracy": "held-out pairs on which the reward model sides with the labeler",
    "pair_ceiling": "the same for the true preference: labelers err, so no model can do better",
    "tie_accuracy": "of a tied and an ordered pair, the tie is found (chance 50 %)",
    "calibration_error": "mean distance of predicted probability and frequency; lower is better",
    "gold_accuracy": "held-out pairs on which the reward model sides with the truth",
    "longer_preferred": "pairs of which the reward model likes the longer answer better",
    "longer_preferred_labels": "the same for the labels it learned from",
    "margin": "implicit reward of the preferred answer minus that of the other, held out",
    "chosen_drift": "nats by which the preferred answer has become likelier",
    "rejected_drift": "nats by which the other answer has become likelier",
    "reply_tokens": "tokens of a reply",
    "wordle_win": "games with held-out secrets won",
    "wordle_solver": "the same games, won by a solver that looks for the most telling guess",
    "wordle_random": "the same games, won by naming any word that fits what is known so far",
    "passkey": "a note hidden in a text so many times longer than in pretraining is found again",
    "multikey": "the same among seven other notes",
    "variables": "the same for three assignments, followed one after the other",
    "passkey_yarn": "past the trained length: before, and after stretching the rotations without training",
    "multikey_yarn": "the same among seven other notes",
    "variables_yarn": "the same for three assignments, followed one after the other",
}

_TRAINED_FLOPS = 6
"""Floating-point operations for each parameter and trained token: 2 forward, 4 backward (Kaplan et al. 2020)."""
SMALL = 50_000_000
"""Parameters up to which answering a few prompts for the page takes seconds."""
_MOST_PROMPTS, _MOST_LETTERS = 12, 1500


@dataclass(frozen=True)
class Cell:
    """One number of the table: what it is, what changed, and whether that is more than noise."""

    value: str
    interval: str = ""
    change: str = ""
    change_interval: str = ""
    verdict: str = ""
    """better, worse, moved (neither is better), unclear (the interval holds zero), or empty (no interval known)."""


def write_page(directories: Sequence[Path], target: Path, *, ask_up_to: int = 0) -> None:
    """Write the page about one run, or about several runs of one recipe.

    Args:
        ask_up_to: let models of at most so many parameters answer the sample prompts that they were not asked yet.

    Raises:
        NurtureError: a run cannot be read, or the page cannot be written.
    """
    if target.is_dir():
        raise NurtureError(
            f"--html {target}: this is a folder. Give the name of a file, such as report.html."
        )
    files.make_directory(target.absolute().parent)
    files.atomic_write_text(target, render(read_rows(directories), directories, ask_up_to=ask_up_to))


def render(rows: Sequence[Row], directories: Sequence[Path], *, ask_up_to: int = 0) -> str:
    """Return the page as HTML text."""
    source = (resources.files("nurture") / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = [directory.resolve().name for directory in directories]
    return environment.from_string(source).render(
        title=" / ".join(names),
        runs=len(names),
        version=__version__,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        families=families(rows),
        meanings={name: text for name, text in MEANINGS.items() if name in _measured(rows)},
        costs=costs(rows),
        figures=[(row.name, *figures(row, names)) for row in rows],
        samples=samples([row.records[0] for row in rows], ask_up_to),
        lineage=[lineage(row.records[0]) for row in rows],
        exhibits=exhibits(directories[0]),
    )


def exhibits(run_directory: Path) -> list[Exhibit]:
    """Return the experiments that were made on a run, those that were not left out."""
    found = (tay_exhibit(run_directory), superficial_exhibit(run_directory))
    return [*(exhibit for exhibit in found if exhibit is not None), *sweep_exhibits(run_directory)]


# --- the table ------------------------------------------------------------------------------------------------------


def families(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the tables: title, columns, and a row per stage that measured something of it."""
    measured = list(dict.fromkeys(name for row in rows for name in row.values))
    placed = {kind for _, kinds in FAMILIES for kind in kinds}
    other_kinds = tuple(dict.fromkeys(_kind(name) for name in measured if _kind(name) not in placed))
    tables = []
    for title, kinds in (*FAMILIES, ("Other", other_kinds)):
        columns = [name for kind in kinds for name in measured if _kind(name) == kind]
        lines = [
            (row.name, [cell(row, name) for name in columns])
            for row in rows
            if set(columns) & set(row.values)
        ]
        if not lines:
            continue
        first = next(row for row in rows if set(columns) & set(row.values))
        start = [_start_cell(first, name) for name in columns]
        if any(start):
            lines.insert(0, (f"before {first.name}", start))
        # Where all columns are of one kind, the title names it.
        short = [name.split("/", 1)[-1] for name in columns] if len({*map(_kind, columns)}) == 1 else columns
        tables.append({"title": title, "columns": short, "rows": lines})
    return tables


def cell(row: Row, name: str) -> Cell | None:
    """Return what a row shows of a measure, None if the stage did not measure it."""
    value, change = row.values.get(name), row.changes.get(name)
    if value is None:
        return None
    interval = _interval(name, value)
    if change is None:
        return Cell(_number(name, value.value), interval)
    return Cell(
        _number(name, value.value),
        interval,
        _signed(name, change.value),
        _interval(name, change, sign=True),
        _verdict(name, change),
    )


def _start_cell(row: Row, name: str) -> Cell | None:
    value, change = row.values.get(name), row.changes.get(name)
    return Cell(_number(name, value.value - change.value)) if value and change else None


def _verdict(name: str, change: Measure) -> str:
    if change.low is None or change.high is None:
        return ""
    if change.low <= 0 <= change.high:
        return "unclear"
    if _kind(name) in NEITHER_IS_BETTER:
        return "moved"
    return "better" if (change.value < 0) == (_kind(name) in LOWER_IS_BETTER) else "worse"


def _number(name: str, value: float) -> str:
    if _kind(name) in RATES:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"


def _signed(name: str, value: float) -> str:
    # A difference of rates is in percentage points.
    return f"{100 * value:+.1f}" if _kind(name) in RATES else f"{value:+.3f}"


def _interval(name: str, measure: Measure, sign: bool = False) -> str:
    if measure.low is None or measure.high is None:
        return ""
    if sign:
        return f"{_signed(name, measure.low)} to {_signed(name, measure.high)}"
    if _kind(name) in RATES:
        return f"{100 * measure.low:.1f} to {100 * measure.high:.1f}"
    return f"{_number(name, measure.low)} to {_number(name, measure.high)}"


def _kind(name: str) -> str:
    return name.split("/")[0]


def _measured(rows: Sequence[Row]) -> set[str]:
    return {_kind(name) for row in rows for name in row.values}


# --- cost -----------------------------------------------------------------------------------------------------------


def costs(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return time, tokens, parameters and operations of every stage, and their sums."""
    seconds = [row.mean("seconds") for row in rows]
    tokens = [row.mean("tokens") for row in rows]
    sizes = [parameters(row.records[0].folder) for row in rows]
    # Where a stage counted its operations (rollouts, reference, reward model), that is what is shown.
    flops = [
        row.mean("flops") or _TRAINED_FLOPS * size * spent for row, size, spent in zip(rows, sizes, tokens)
    ]
    lines = [
        _cost(row.name, *numbers) for row, *numbers in zip(rows, seconds, tokens, sizes, flops, strict=True)
    ]
    return [*lines, _cost("all", sum(seconds), sum(tokens), 0, sum(flops))]


def _cost(name: str, seconds: float, tokens: float, size: float, flops: float) -> dict[str, str]:
    return {
        "name": name,
        "time": clock(seconds),
        "tokens": _large(tokens),
        "parameters": _large(size),
        "flops": f"{flops:.1e}" if flops else "",
    }


def parameters(folder: Path) -> int:
    """Return how many parameters a stage's model has, counting what multiplies: an untied embedding only looks up."""
    config = folder / "model" / "config.json"
    if not config.is_file() or not files.read_json(config, "Run the stage again."):
        return 0
    from nurture.model.hugging_face import read_model_config

    shape = read_model_config(config.parent)
    return shape.parameter_count() - (0 if shape.tied_embeddings else shape.vocab_size * shape.width)


def _large(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:.0f}" if number else ""


# --- curves ---------------------------------------------------------------------------------------------------------

_MAIN: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("Loss", "nats", lambda name: name in ("train/loss", "eval/loss")),
    ("Bits per byte, held out", "bits per byte", lambda name: name.startswith("eval/bpb/")),
    ("Reward in training", "reward", lambda name: name == "rl/reward_mean"),
    ("Proxy reward, held out", "reward", lambda name: name == "eval/proxy"),
    ("Gold reward, held out", "reward", lambda name: name == "eval/gold"),
    ("KL from the start", "nats a reply", lambda name: name in ("rl/kl", "eval/kl")),
    ("Pair accuracy", "share of pairs", lambda name: name in ("eval/pair_accuracy", "eval/pair_ceiling")),
)
_NOT_DRAWN = ("tokens/", "epoch/", "train/bpb/", "rl/seconds_")


def figures(row: Row, run_names: Sequence[str]) -> tuple[list[Markup], list[Markup]]:
    """Return the charts of a stage that tell most, and all others it logged."""
    logged = list(dict.fromkeys(name for record in row.records for name in record.curves))
    main, drawn = [], set[str]()
    for title, unit, wanted in _MAIN:
        names = [name for name in logged if wanted(name)]
        main.append(_curves(row, title, unit, names, run_names))
        drawn |= set(names)
    main += _overoptimisation(row.records[0])
    others = [name for name in logged if name not in drawn and not name.startswith(_NOT_DRAWN)]
    return [chart for chart in main if chart], [_curves(row, name, "", [name], run_names) for name in others]


def _curves(row: Row, title: str, unit: str, names: Sequence[str], run_names: Sequence[str]) -> Markup:
    several = len(row.records) > 1
    lines = []
    labels = [name.split("/", 1)[-1].removeprefix("bpb/") for name in names]
    labels = labels if len(set(labels)) == len(labels) else list(names)
    for colour, (name, short) in enumerate(zip(names, labels, strict=True)):
        for run, record in enumerate(row.records):
            points = record.curves.get(name, [])
            dashes = (run if several else colour) % 4
            of = run_names[run] if several else ""
            lines.append(Line(short, points, colour, dashes, marks=len(points) < 20, run=of))
    return line_chart(title, lines, x_label="step", y_label=unit)


def _overoptimisation(record: StageRecord) -> list[Markup]:
    """Draw proxy and gold reward against KL, best of n beside; one chart each, for their units differ."""
    measured = record.overoptimisation
    charts = []
    for colour, reward in enumerate(("proxy", "gold")):
        lines = []
        for dashes, (source, name) in enumerate((("policy", "policy"), ("best_of_n", "best of n"))):
            known = [entry for entry in measured.get(source, []) if entry.get(reward) is not None]
            points = [(max(entry["kl"], 0.0) ** 0.5, float(entry[reward])) for entry in known]
            errors = [entry.get("gold_error", 0.0) if reward == "gold" else 0.0 for entry in known]
            bars = [(y - 1.96 * e, y + 1.96 * e) for (_, y), e in zip(points, errors)] if any(errors) else ()
            lines.append(Line(name, points, colour, dashes, bars, marks=True))
        title = f"{'Proxy: the reward model' if reward == 'proxy' else 'Gold: the truth'}, against KL"
        charts.append(
            line_chart(title, lines, x_label="square root of KL, nats a reply", y_label=f"{reward} reward")
        )
    return charts


# --- samples --------------------------------------------------------------------------------------------------------


def samples(stages: Sequence[StageRecord], ask_up_to: int) -> list[dict[str, Any]]:
    """Return prompts with the reply of every stage, those first that several stages were asked."""
    with_replies = [stage for stage in stages if stage.samples]
    prompts = dict.fromkeys(prompt for stage in with_replies for prompt in stage.samples)
    shared = [prompt for prompt in prompts if sum(prompt in stage.samples for stage in with_replies) > 1]
    shown = _spread(shared, _MOST_PROMPTS - 3)
    shown += _spread([prompt for prompt in prompts if prompt not in shared], _MOST_PROMPTS - len(shown))
    replies = {stage.name: {**_asked(stage, shown, ask_up_to), **stage.samples} for stage in with_replies}
    return [
        {
            "prompt": _cut(prompt),
            "replies": [(name, _cut(said[prompt])) for name, said in replies.items() if prompt in said],
        }
        for prompt in shown
    ]


def _spread(prompts: list[str], most: int) -> list[str]:
    """Return `most` of the prompts, evenly spread: neighbours are usually of one kind."""
    if len(prompts) <= most:
        return prompts
    return [prompts[i * len(prompts) // most] for i in range(most)]


def _asked(stage: StageRecord, prompts: Sequence[str], ask_up_to: int) -> dict[str, str]:
    """Let a small model answer the prompts that it was not asked when it was made; a reward model writes nothing."""
    missing = [prompt for prompt in prompts if prompt not in stage.samples]
    size = parameters(stage.folder) if missing and ask_up_to else 0
    if not 0 < size <= ask_up_to or stage.kind == "reward":
        return {}
    from nurture.evals.replies import ask
    from nurture.inference.chat import load_chat_model

    chat = load_chat_model(stage.folder)
    room = chat.model.config.max_position // 2
    missing = [prompt for prompt in missing if len(chat.tokenizer.encode(prompt)) < room]
    asked: list[Any] = [p if chat.is_base else [{"role": "user", "content": p}] for p in missing]
    if not asked:
        return {}
    replies = ask(chat.model, chat.tokenizer, asked, max_tokens=min(80, room))
    return {prompt: reply.text for prompt, reply in zip(missing, replies, strict=True)}


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[:_MOST_LETTERS] + " …"


# --- lineage --------------------------------------------------------------------------------------------------------


def lineage(record: StageRecord) -> dict[str, Any]:
    """Return what a stage was made from."""
    inputs = record.inputs
    roles = {role: record.parents[role].name for role in inputs.get("from") or {} if role in record.parents}
    outside = [role for role in inputs.get("from") or {} if role not in roles]
    weights = (record.manifest.get("files") or {}).get("model/model.safetensors") or {}
    return {
        "name": record.name,
        "kind": record.kind,
        "from": [f"{name} ({role})" if role != "start" else name for role, name in roles.items()]
        + [f"a checkpoint outside this run ({role})" for role in outside],
        "data": list(inputs.get("data") or {}),
        "seed": inputs.get("seed", ""),
        "code": inputs.get("version", ""),
        "fingerprint": str(record.manifest.get("fingerprint", ""))[:12],
        "weights": str(weights.get("sha256", ""))[:12],
    }
