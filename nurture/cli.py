"""The command line: what a user types, and what they see when something is wrong.

Commands are thin: they read arguments, call a function of an earlier chapter and print. Everything heavy is imported
inside the command that needs it, so `nurture --help` answers at once. Every stage kind in `nurture.stages.STAGES` is a
command of its own, built as a recipe of one stage and run by the same pipeline: it resumes, reports and skips finished
work exactly like `nurture run`.

Exit codes: 0 done, 1 a mistake the user can mend (one message on stderr), 2 wrong usage, 130 stopped by the user
(the same command goes on), 70 a bug (one line, and where the traceback is).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from nurture import experiments, games
from nurture.errors import NurtureError, did_you_mean
from nurture.stages import STAGES

if TYPE_CHECKING:
    from nurture.pipeline import Outcome
    from nurture.recipe import Document, KeyPath
    from nurture.stages.recipe import Recipe

SEARCHED_ROWS = 10_000
"""Rows that `nurture show-mask` reads to find a conversation."""
BUG_EXIT_CODE = 70
INTERRUPTED_EXIT_CODE = 130

_RECIPES, _ONE_STAGE, _MODELS, _MACHINE = "Whole recipes", "One stage", "Models and data", "This machine"


def _examples(*lines: str) -> str:
    """Lay out example command lines for the end of a help text, one a line."""
    return "\n\n".join(
        ["[bold]Examples[/bold]", *(f"[cyan]{line.replace('[', chr(92) + '[')}[/cyan]" for line in lines)]
    )


app = typer.Typer(
    name="nurture",
    help="Train a language model through every stage: raw text, base model, chat.\n\n"
    "Start with [cyan]nurture run[/cyan]: it trains the default recipe on this machine and shows what each stage did.",
    epilog=_examples(
        "nurture run",
        "nurture run my.yaml pretrain.minutes=5 --until pretrain",
        "nurture chat runs/tiny/04-sft",
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run [dim](default: runs/NAME)[/dim].")]
Force = Annotated[bool, typer.Option("--force", help="Run everything again, finished or not.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from nurture import __version__

        print(f"nurture {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    pass


# --- whole recipes --------------------------------------------------------------------------------------------------


@app.command(
    rich_help_panel=_RECIPES,
    epilog=_examples(
        "nurture run",
        "nurture run recipes/real-text.yaml --out runs/trial",
        "nurture run tiny pretrain.optimizer.learning_rate=1e-3 seed=3 --out runs/tiny-seed3",
        "nurture run tiny --until pretrain",
        "nurture run tiny --from sft",
        "nurture run runs/tiny",
    ),
)
def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [STAGE.KEY=VALUE]...",
            help="A recipe file or the name of one of nurture's own [dim](default: tiny)[/dim], then settings.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", help="Run this stage and what depends on it again.")
    ] = None,
    force: Force = False,
) -> None:
    """Run a recipe: only the stages that are missing or whose inputs changed.

    A second call runs nothing. A call after an interruption goes on where it stopped: give it the recipe or the folder.
    """
    from nurture import pipeline
    from nurture.stages.recipe import load_recipe

    recipe_name, overrides = _split_arguments(arguments)
    if recipe_name and (Path(recipe_name) / "run.json").is_file():
        _no_settings_of_a_run(recipe_name, overrides)
        recipe, out = pipeline.recall(Path(recipe_name)), out or Path(recipe_name)
    else:
        recipe = load_recipe(recipe_name or "tiny", overrides)
    _run_and_report(recipe, out, until=until, from_stage=from_stage, force=force)


@app.command(
    rich_help_panel=_RECIPES,
    epilog=_examples(
        "nurture status", "nurture status runs/tiny --verify", "nurture status my.yaml sft.epochs=3"
    ),
)
def status(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN | RECIPE] [STAGE.KEY=VALUE]...",
            help="A run's folder, or a recipe and settings [dim](default: tiny)[/dim].",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    verify: Annotated[bool, typer.Option(help="Read every file and compare checksums.")] = False,
    json: Json = False,
) -> None:
    """Show what has run, what has not, and why a stage would run again. Changes nothing."""
    from nurture import pipeline
    from nurture.stages.recipe import load_recipe

    target, overrides = _split_arguments(arguments)
    target = target or "tiny"
    if Path(target).is_dir():
        _no_settings_of_a_run(target, overrides)
        recipe, out = pipeline.recall(Path(target)), out or Path(target)
    else:
        recipe = load_recipe(target, overrides)
        out = out or pipeline.default_directory(recipe)
    steps = pipeline.plan(recipe, out, checksums=verify)
    if json:
        rows = [
            {"name": s.name, "kind": s.config.kind, "status": s.status, "reason": s.reason} for s in steps
        ]
        experiments.print_json({"run": str(out), "stages": rows})
        return
    _print_status(out, steps)


def _no_settings_of_a_run(run_directory: str, overrides: list[str]) -> None:
    if overrides:
        raise NurtureError(
            f"{run_directory} is a run: settings ({overrides[0]}) go with a recipe. Give the recipe it was made from,"
            f" and --out {run_directory} to go on in this folder."
        )


def _print_status(out: Path, steps: list[Any]) -> None:
    from rich.text import Text

    from nurture.report.table import titled_table

    colours, rows = {"fresh": "green", "new": "dim", "unfinished": "yellow", "damaged": "red"}, []
    for step in steps:
        start = step.start.name if hasattr(step.start, "name") and step.start in steps else step.start
        status = Text(step.status, style=colours.get(step.status, "yellow"))
        rows.append((step.directory.name, step.config.kind, str(start or "nothing"), status, step.reason))
    _console().print(titled_table(str(out), ("stage", "kind", "starts from", "status", "why"), rows))


@app.command(
    rich_help_panel=_RECIPES,
    epilog=_examples(
        "nurture report runs/tiny",
        "nurture report runs/tiny --html report.html",
        "nurture report runs/seed0 runs/seed1 runs/seed2 --html seeds.html",
        "nurture report runs/tiny --json",
    ),
)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folder of a run, or of several runs of one recipe."),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots and replies to this file.")
    ] = None,
    ask: Annotated[
        bool, typer.Option(help="For the page, let small models answer the prompts they were not asked yet.")
    ] = True,
    json: Json = False,
) -> None:
    """Show what each stage changed: before, after, interval. Several runs: means, and the spread between runs."""
    from nurture.report import table

    if html is not None:
        from nurture.report.page import SMALL, write_page

        write_page(runs, html, ask_up_to=SMALL if ask else 0)
        print(f"wrote {html}", file=sys.stderr if json else sys.stdout)
    if json:
        print(table.report_json(runs))
    elif html is None:
        table.print_report(runs, _console())


for _command, _lines in experiments.COMMANDS.items():
    app.command(rich_help_panel=_RECIPES, epilog=_examples(*_lines))(_command)


@app.command(
    rich_help_panel=_RECIPES,
    epilog=_examples(
        "nurture plan tiny --hardware 2xCPU",
        "nurture plan my.yaml --hardware 384xH100 --efficiency 0.29",
        "nurture plan my.yaml pretrain.tokens=1T --hardware 64xH200 --price 2.5 --json",
    ),
)
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [STAGE.KEY=VALUE]...",
            help="A recipe and settings [dim](default: tiny)[/dim].",
            show_default=False,
        ),
    ] = None,
    hardware: Annotated[str, typer.Option(help="Number and device: 384xH100, 8xA100, 2xCPU.")] = "8xH100",
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the peak that a run of yours measured [dim](default: assumed)[/dim]."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars a device and hour.")] = None,
    json: Json = False,
) -> None:
    """Say what a recipe will take: operations, memory, data, time, cost, and what does not fit. Runs nothing."""
    from nurture.plan import parse_hardware, plan_recipe, print_plan
    from nurture.stages.recipe import load_recipe

    recipe_name, overrides = _split_arguments(arguments)
    recipe = load_recipe(recipe_name or "tiny", overrides)
    planned = plan_recipe(recipe, parse_hardware(hardware), efficiency=efficiency, price=price)
    if json:
        experiments.print_json(planned.as_data())
    else:
        print_plan(planned, _console())


@app.command(rich_help_panel=_RECIPES, epilog=_examples("nurture recipes", "nurture recipes tiny > my.yaml"))
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, to start your own from.")] = None,
) -> None:
    """List the recipes that come with nurture, or print one."""
    from nurture.stages.recipe import builtin_recipes, find_recipe

    if name is not None:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
        return
    for recipe, path in builtin_recipes().items():
        _console().print(f"[cyan]{recipe}[/cyan]  {_about(path)}", soft_wrap=True, highlight=False)


def _about(recipe: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def _split_arguments(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """Separate the recipe (an argument without '=') from the settings."""
    words = arguments or []
    plain = [word for word in words if "=" not in word]
    if len(plain) > 1:
        raise NurtureError(
            f"expected one recipe and settings written key=value, got '{plain[0]}' and '{plain[1]}'."
            " A setting has no spaces around its '='."
        )
    return (plain[0] if plain else None), [word for word in words if "=" in word]


def _run_and_report(recipe: Recipe, out: Path | None, **how: Any) -> Outcome:
    """Run a recipe with progress on the terminal, then show the table and what to run next."""
    from nurture import pipeline
    from nurture.report import table

    first_process = int(os.environ.get("RANK", "0")) == 0
    console = _console()

    def say(line: str) -> None:
        if first_process:
            console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)

    outcome = pipeline.run(recipe, out, say=say, **how)
    if not first_process:
        return outcome
    if not outcome.ran:
        nothing = f"Nothing to run: all {len(outcome.fresh)} stages of {outcome.directory} are fresh."
        console.print(nothing, style="green", markup=False)
    table.print_report([outcome.directory], console)
    return outcome


# --- one stage ------------------------------------------------------------------------------------------------------


def _stage_command(kind: str) -> Callable[..., None]:
    def command(
        settings: Annotated[
            list[str] | None,
            typer.Argument(metavar="[KEY=VALUE]...", help="Settings; --keys lists them.", show_default=False),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(
                help="Start from this: a stage of a run, a checkpoint folder, a .gguf file, or smollm2."
            ),
        ] = None,
        data: Annotated[
            list[str] | None,
            typer.Option(
                metavar="[NAME=]SPEC", help="Path, glob, world:SOURCE or hf:ORG/NAME. May be repeated."
            ),
        ] = None,
        minutes: Annotated[str | None, typer.Option(help="Train for so long: 10, 90s, 2h.")] = None,
        env: Annotated[
            str | None, typer.Option(help="Environment (grpo): wordle, openenv:URL, module:NAME.")
        ] = None,
        seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
        out: Out = None,
        force: Force = False,
        keys: Annotated[
            bool, typer.Option("--keys", help="List the settings of this stage and stop.")
        ] = False,
    ) -> None:
        if keys:
            _print_keys(kind)
            return
        words = [*(settings or []), *([f"env={env}"] if env else [])]
        recipe = stage_recipe(kind, model=model, data=data, minutes=minutes, seed=seed, settings=words)
        _run_and_report(recipe, out, force=force)

    command.__doc__ = STAGES[kind].summary
    return command


def add_stage_command(kind: str) -> None:
    """Give a stage kind its command."""
    epilog = _examples(*STAGES[kind].examples)
    app.command(kind, rich_help_panel=_ONE_STAGE, epilog=epilog)(_stage_command(kind))


for _kind in STAGES:
    add_stage_command(_kind)


def stage_recipe(
    kind: str,
    *,
    model: str | None = None,
    data: list[str] | None = None,
    minutes: str | None = None,
    seed: int = 0,
    settings: list[str] | None = None,
) -> Recipe:
    """Build the recipe of a stage command: one stage, checked like any recipe.

    Args:
        kind: which stage.
        model: checkpoint to start from; only pretraining can do without.
        data: `NAME=SPEC` or `SPEC` each.
        minutes: time to train for.
        settings: `key=value` for the stage's own keys, `model.key=value` and `tokenizer.key=value` for a new model.

    Raises:
        NurtureError: a setting is wrong, or the data or the checkpoint is missing.
    """
    from nurture.recipe import Document
    from nurture.stages import stage_module
    from nurture.stages.recipe import RecipeFile, build_recipe

    fields = stage_module(kind).Config.model_fields
    sources = _named_sources(data or [])
    stage: dict[str, Any] = {"kind": kind, "name": kind}
    document = Document(f"nurture {kind}", {"seed": seed, "stages": [stage]}, {(): f"nurture {kind}"})
    document.spellings[("stages", 0)] = ""  # its keys stand for themselves
    source_key = next((key for key in ("sources", "data") if key in fields), None)
    if source_key and sources:
        stage[source_key] = sources
        _place(document, ("stages", 0, source_key), "--data", source_key)
    required = source_key is not None and fields[source_key].is_required()
    if required and not sources and not any(word.startswith(str(source_key)) for word in settings or []):
        raise NurtureError(f"nurture {kind} needs --data SPEC: a path, a glob, world:SOURCE or hf:ORG/NAME.")
    if model is not None:
        stage["start"] = model
        _place(document, ("stages", 0, "start"), "--model", "start")
    elif kind == "pretrain":
        _fresh_model(document.data, minutes, settings or [])
    elif kind != "prepare":
        raise NurtureError(
            f"nurture {kind} needs --model PATH: the checkpoint to start from, such as a stage of a run."
        )
    if minutes is not None:
        if "minutes" not in fields:
            raise NurtureError(
                f"nurture {kind} has no time budget; `nurture {kind} --keys` lists its settings."
            )
        stage["minutes"] = _number_of_minutes(minutes)
        _place(document, ("stages", 0, "minutes"), "--minutes", "minutes")
    document.data["name"] = _run_name(kind, model, sources)
    roots: dict[str, KeyPath] = {
        key: ("stages", 0, key) for key in fields if key not in RecipeFile.model_fields
    }
    _look_inside_sections(kind, settings or [], {*roots, *RecipeFile.model_fields})
    return build_recipe(document, settings or [], folder=Path.cwd(), roots=roots)


def _look_inside_sections(kind: str, settings: list[str], known: set[str]) -> None:
    """Raise NurtureError where a setting is written without its section (`learning_rate`), naming it in full."""
    from nurture.stages import stage_module

    inside: dict[str, str] = {}
    for dotted, _, _ in _keys(stage_module(kind).Config):
        if "." in dotted:
            inside.setdefault(dotted.rsplit(".", 1)[-1], dotted)
    for word in settings:
        key = word.partition("=")[0].strip()
        if key not in known and key in inside:
            raise NurtureError(
                f"override '{word}': nurture {kind} has no setting '{key}'. Did you mean '{inside[key]}'?"
            )


def _place(document: Document, path: KeyPath, option: str, key: str) -> None:
    document.places[path] = option
    document.spellings[path] = key


def _named_sources(specs: list[str]) -> dict[str, str]:
    """Name each data spec: as written (`code=src/*.py`), else after its folder, file or source."""
    sources: dict[str, str] = {}
    for text in specs:
        written = re.match(r"([A-Za-z0-9_-]+)=(.+)", text)
        spec = written[2] if written else text
        name = written[1] if written else _source_name(spec)
        unique, number = name, 2
        while unique in sources:
            unique, number = f"{name}{number}", number + 1
        sources[unique] = spec
    return sources


def _source_name(spec: str) -> str:
    if re.match(r"(world|hf):", spec):
        return spec.split(":", 1)[1].split(":")[0].split("/")[-1] or "text"
    plain = [part for part in Path(spec).parts if not set(part) & set("*?[]/.~")]
    last = Path(spec).name
    word = last.split(".")[0] if not set(last) & set("*?[]") else (plain[-1] if plain else "")
    return re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-") or "text"


def _run_name(kind: str, model: str | None, sources: dict[str, str]) -> str:
    """Name the run of a stage command after what goes in, so that different inputs do not share a folder."""
    parts = [kind]
    if model is not None:
        parts += [part for part in Path(model).absolute().parts[-2:] if part != "model"]
    parts += list(sources)[:2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts)).strip("-")


def _fresh_model(data: dict[str, Any], minutes: str | None, settings: list[str]) -> None:
    """Choose shape, vocabulary and time for a new model where the command line does not.

    The sizes are what this many minutes on two cores can teach something (PERFORMANCE.md: about 30M tokens in ten
    minutes through 1M parameters, 12M through 3M, 5M through 10M). Anything given in `settings` wins.
    """
    if minutes is None and not any(re.match(r"(minutes|tokens|steps)=", word) for word in settings):
        data["stages"][0]["minutes"] = 10
    budget = _number_of_minutes(minutes or "10")
    preset, vocabulary = next(row[1:] for row in _SIZES if not isinstance(budget, float) or budget <= row[0])
    if not any(re.match(r"model(\.|=)", word) for word in settings):
        data["model"] = {"preset": preset}
    if not any(re.match(r"tokenizer(\.|=)", word) for word in settings):
        data["tokenizer"] = {"vocab_size": vocabulary}


def _number_of_minutes(text: str) -> float | str:
    """Read `10`, `90s` or `2h`; what is none is returned as it is, for the check of the settings to name it."""
    from nurture.recipe import parse_minutes

    try:
        return float(parse_minutes(text))
    except ValueError:
        return text


# minutes up to -> preset, vocabulary
_SIZES = ((3.0, "1m", 2048), (30.0, "3m", 4096), (180.0, "10m", 8192), (float("inf"), "30m", 8192))


def _print_keys(kind: str) -> None:
    """List the settings of a stage with type, default and meaning."""
    from nurture.report.table import titled_table
    from nurture.stages import stage_module

    own = ("name", "kind", "start")  # the command's own affair
    section = stage_module(kind).Config
    rows = [row for row in _keys(section, values=_defaults(section, kind)) if row[0] not in own]
    _console().print(titled_table(f"Settings of {kind}", ("key", "default", "meaning"), rows))


def _defaults(section: Any, kind: str) -> Any:
    """Return a stage's settings as its kind leaves them (a kind may change defaults, as dpo does), None if unknown."""
    from pydantic import ValidationError

    required: dict[str, Any] = {key: {} for key, info in section.model_fields.items() if info.is_required()}
    try:
        return section.model_validate({**required, "kind": kind, "name": kind})
    except ValidationError:  # more than names of data is required: the defaults of the class must do
        return None


def _keys(section: Any, prefix: str = "", values: Any = None) -> list[tuple[str, str, str]]:
    """Return key, default and meaning of every setting, those inside sections as dotted keys.

    Args:
        values: what holds by default, where that is not the class's own: a stage may have its own for a shared section.
    """
    from pydantic_core import PydanticUndefined

    rows = []
    for key, info in section.model_fields.items():
        default = info.default if values is None or info.is_required() else getattr(values, key)
        if hasattr(default, "model_fields") and not isinstance(default, type):
            rows += _keys(type(default), f"{prefix}{key}.", default)
            continue
        shown = "required" if default is PydanticUndefined and info.default_factory is None else default
        shown = "" if shown is None or shown is PydanticUndefined else str(shown)
        rows.append((prefix + key, shown, _meaning(section, key)))
        for inner in get_args(info.annotation) if default is None else ():  # a section that may be left out
            if hasattr(inner, "model_fields"):
                rows += _keys(inner, f"{prefix}{key}.")
    return rows


def _meaning(section: Any, key: str) -> str:
    """Return what a setting means; a stage that only changes a default leaves that to the class it inherits from."""
    fields = [getattr(base, "model_fields", {}).get(key) for base in section.__mro__]
    return next((" ".join(field.description.split()) for field in fields if field and field.description), "")


# --- models and data ------------------------------------------------------------------------------------------------


@app.command(
    rich_help_panel=_MODELS,
    epilog=_examples(
        "nurture chat runs/tiny/04-sft",
        "nurture chat runs/tiny/01-pretrain runs/tiny/04-sft",
        "nurture chat smollm2 --temperature 0",
        "nurture chat model.gguf --prompt 'Name three rivers.'",
    ),
)
def chat(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="A run, one of its stages, a checkpoint, a .gguf file, or smollm2."
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this once and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus to sample from; 1 is all of it.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a model in the terminal, or to several at once. A base model continues your text instead."""
    from nurture.inference.chat import main as chat_main

    chat_main(
        paths,
        system=system,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        prompt=prompt,
    )


@app.command(
    rich_help_panel=_MODELS,
    epilog=_examples(
        "nurture serve runs/tiny",
        "nurture serve runs/tiny smollm2 --port 8080",
        "nurture serve runs/tiny --host 0.0.0.0",
    ),
)
def serve(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Runs, stages, checkpoints, .gguf files, or smollm2."),
    ],
    host: games.Host = "127.0.0.1",
    port: games.Port = 8000,
    token: games.Token = None,
) -> None:
    """Open the studio in the browser, and an OpenAI-compatible API, for every stage of a run."""
    try:
        from nurture.studio.server import serve as serve_studio
    except ModuleNotFoundError as missing:
        if missing.name not in ("starlette", "uvicorn"):
            raise
        raise NurtureError("the studio needs the extra packages: pip install 'nurture[serve]'") from None
    serve_studio(
        paths,
        host=host,
        port=port,
        token=token,
        say=lambda line: _console().print(line, markup=False, soft_wrap=True),
    )


app.add_typer(games.env, name="env", rich_help_panel=_MODELS)
games.env.command(
    "serve",
    epilog=_examples(
        "nurture env serve wordle",
        "nurture env serve wordle style=textarena answers=words.txt reward=textarena --port 8001",
        "nurture env serve math --data gsm8k.jsonl",
        "nurture env serve code --split heldout",
    ),
)(games.serve)
app.command(
    rich_help_panel=_MODELS,
    epilog=_examples(
        "nurture play wordle",
        "nurture play wordle hard_mode=true",
        "nurture play wordle runs/tiny --games 3",
        "nurture play math runs/tiny",
    ),
)(games.play)


@app.command(
    "eval",
    rich_help_panel=_MODELS,
    epilog=_examples(
        "nurture eval runs/tiny/04-sft",
        "nurture eval model.gguf --tasks fact,arithmetic --limit 50 --json",
        "nurture eval smollm2 --data arc.jsonl --data gsm8k.jsonl --trained-on 'corpus/*.jsonl'",
        "nurture eval smollm2 --data xstest.csv --data advbench.csv --judge words.txt",
    ),
)
def evaluate(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A stage of a run, a checkpoint, or a .gguf file.")
    ],
    tasks: Annotated[
        str | None,
        typer.Option(help="The world's kinds of task, with commas between [dim](default: all)[/dim]."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File of a standard or safety set, as published. May be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each kind or file.")] = 100,
    judge: Annotated[
        str | None, typer.Option(help="Of harm: a word list (.txt), a checkpoint, or an endpoint's address.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model that the endpoint serves.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Replies to a programming task, for pass@k.")] = 1,
    trained_on: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Look for the questions in this training data.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure a model on the world's held-out tasks, or on files of standard sets (GSM8K, MMLU, XSTest ...)."""
    from nurture.stages.recipe import checkpoint_problem

    if data and tasks:
        raise NurtureError(
            "--tasks chooses among the world's questions, --data brings others: give one of them."
        )
    of_files = {"--judge": judge, "--judge-model": judge_model, "--samples": samples > 1}
    for option, given in (of_files | {"--trained-on": trained_on}).items():
        if given and not data:
            raise NurtureError(
                f"{option} goes with --data FILE: without it the world's own questions are asked."
            )
    if (problem := checkpoint_problem(Path(path))) and path != "smollm2":
        raise NurtureError(f"{problem.rstrip('.')}.")
    from nurture.evals import quick
    from nurture.evals.harm_judge import make_judge

    if data:
        chosen = make_judge(judge, judge_model) if judge else None
        how: dict[str, Any] = {"judge": chosen, "samples": samples, "trained_on": trained_on or ()}
        outcome = quick.measure_on_files(path, data, limit, **how, world=experiments.world_of(Path(path)))
    else:
        outcome = quick.measure_on_world(path, experiments.world_of(Path(path)), tasks, limit)
    if json:
        experiments.print_json(outcome)
        return
    from nurture.report.table import before_after_table

    _console().print(before_after_table(outcome))


@app.command(
    rich_help_panel=_MODELS,
    epilog=_examples(
        "nurture label runs/tiny",
        "nurture label runs/tiny --labeler ann --answers 6",
        "nurture label runs/tiny --model runs/tiny/01-pretrain --model runs/tiny/04-sft --prompts prompts.jsonl",
    ),
)
def label(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Who answers [dim](default: the run's last language model)[/dim]. May be repeated."
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Prompts to answer [dim](default: the world's)[/dim].")
    ] = None,
    labeler: Annotated[str | None, typer.Option(help="Who labels [dim](default: your login)[/dim].")] = None,
    answers: Annotated[int, typer.Option(min=2, max=9, help="Answers to a prompt.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the answers.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 160,
    seed: Annotated[int | None, typer.Option(help="Which prompts and answers.")] = None,
) -> None:
    """Rank a model's answers, or write better ones. Rows go to RUN/labels, for `nurture reward` and `nurture sft`."""
    import getpass
    import secrets
    from itertools import chain, count

    from nurture.inference.chat import load_chat_model
    from nurture.studio import terminal

    if not run_directory.is_dir():
        raise NurtureError(f"{run_directory}: there is no such run. `nurture run` makes one.")
    if (run_directory / "manifest.json").is_file():  # labels would lie in what is finished
        raise NurtureError(
            f"{run_directory}: is a stage. Name its run, and the stage with --model {run_directory}."
        )
    first = secrets.randbits(31) if seed is None else seed
    drawn = terminal.draw_prompts(run_directory, prompts, first)
    numbered = zip(
        count(first), chain([next(drawn)], drawn)
    )  # one at once: it shows what is wrong with --prompts
    models = [load_chat_model(path) for path in model or [str(run_directory)]]
    questions = (
        terminal.ask_models(
            models, prompt, count=answers, max_tokens=max_tokens, temperature=temperature, seed=number * 10
        )
        for number, prompt in numbered
    )
    terminal.label(run_directory, labeler or getpass.getuser(), questions, read=input, show=print)


@app.command(
    "show-mask",
    rich_help_panel=_MODELS,
    epilog=_examples(
        "nurture show-mask chats.jsonl --tokenizer runs/tiny/04-sft",
        "nurture show-mask world:tasks --tokenizer runs/tiny/00-tokenizer",
    ),
)
def show_mask(
    data: Annotated[
        str, typer.Argument(metavar="SPEC", help="Conversations: path, glob, world:tasks or hf:ORG/NAME.")
    ],
    tokenizer: Annotated[str, typer.Option(help="A checkpoint, or the 00-tokenizer of a run.")],
    count: Annotated[int, typer.Option(min=1, help="How many conversations.")] = 3,
    chat_template: Annotated[
        str | None, typer.Option(help="Another template, as sft's chat_template: FILE.jinja or chatml.")
    ] = None,
) -> None:
    """Print conversations coloured by what is trained: green tokens carry the loss, dim ones do not.

    A row is shown as fine-tuning reads it: in its mode, with its tools, and in parts where the template drops thoughts.
    """
    from itertools import islice

    from nurture.chat_template import mask_markup, named_template
    from nurture.data.packing import tokenise_conversations
    from nurture.data.sources import read_rows
    from nurture.stages.recipe import data_problem, model_folder
    from nurture.tokenizer import Tokenizer

    if problem := data_problem(data, Path.cwd()):
        raise NurtureError(f"{problem.rstrip('.')}.")
    rows = islice(read_rows(data, base=Path.cwd()), SEARCHED_ROWS)  # the world's sources have no end
    shown = list(islice((row for row in rows if row.messages), count))
    if not shown:
        searched = f"no conversation in its first {SEARCHED_ROWS:,} rows"
        raise NurtureError(f"{data}: {searched}. Plain text is trained on as a whole.")
    template = named_template(chat_template, Path.cwd())
    loaded = Tokenizer.load(model_folder(Path(tokenizer))).for_chat(template)
    for row in shown:
        for part in tokenise_conversations([row], loaded):
            _console().print(mask_markup(loaded, part.token_ids, part.completion_mask))
        _console().rule()


@app.command(
    rich_help_panel=_MODELS,
    epilog=_examples(
        "nurture world", "nurture world code --count 2", "nurture world arithmetic --split heldout"
    ),
)
def world(
    name: Annotated[
        str | None, typer.Argument(metavar="[SOURCE | TASK]", help="What to print; all if left out.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of each.")] = 1,
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
) -> None:
    """Print documents and tasks of the embedded world, the default recipe's data."""
    from nurture.world import World

    if split not in ("train", "heldout"):
        raise NurtureError(f"--split {split}: should be train or heldout.")
    made, console = World(seed=seed), _console()
    names = [*made.sources, *made.task_kinds]
    if name is not None and name not in names:
        hint = did_you_mean(name, names) or f" Known: {', '.join(names)}."
        raise NurtureError(f"the world has no source or task kind '{name}'.{hint}")
    for each in names if name is None else [name]:
        for index in range(count):
            console.rule(f"{each} {split} {index}", align="left")
            if each in made.sources:
                print(made.document(each, split, index))
            else:
                task = made.task(each, split, index)
                for message in task.messages:
                    print(f"{message['role']}: {message['content']}")
                print(f"demonstration: {task.demonstration}")


# --- this machine ---------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=_MACHINE, epilog=_examples("nurture doctor", "nurture doctor --json"))
def doctor(json: Json = False) -> None:
    """Show what this machine can do: cores, memory, matrix speed, compiler, disk, installed extras."""
    from nurture.doctor import examine

    findings = examine()
    if json:
        experiments.print_json({finding.name: finding.value for finding in findings})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    for finding in findings:
        mark = "[green]ok[/]" if finding.good else "[yellow]!![/]"
        table.add_row(mark, finding.name, escape(str(finding.value)), f"[dim]{escape(finding.advice)}[/]")
    _console().print(table)


# --- the frame around every command ---------------------------------------------------------------------------------


def _console() -> Any:
    from rich.console import Console

    return Console()


def main() -> None:
    """Run the command line and end the process with its exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _run()
        return
    from nurture.runtime import whole_process  # brings torch, which `--help` need not wait for

    with whole_process():
        _run()


def _run() -> None:
    try:
        _typed_command()
    except NurtureError as error:
        _fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _stopped()
    except SystemExit as end:
        if end.code == INTERRUPTED_EXIT_CODE:
            _stopped()
        raise
    except BrokenPipeError:
        # The reader (head, less) went away. Python would complain about it once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as bug:
        if os.environ.get("NURTURE_DEBUG"):
            raise
        _fail(_log_bug(bug))
        sys.exit(BUG_EXIT_CODE)


def _typed_command() -> None:
    """Run the command. Of a reader that went away typer and rich make exit code 1: let BrokenPipeError through."""
    try:
        app(prog_name="nurture")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise end.__context__ from None
        if not end.code:
            sys.stdout.flush()  # while a closed pipe is still caught, not when Python ends
        raise


def _stopped() -> None:
    _fail("stopped; run the same command again to resume")
    sys.exit(INTERRUPTED_EXIT_CODE)


def _fail(message: str) -> None:
    """Print a message in red on stderr, where stderr shows colours; the text itself is never touched."""
    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[31m{message}\033[0m" if colours else message, file=sys.stderr)


def _log_bug(bug: Exception) -> str:
    """Write the traceback of an unexpected exception to a file; return the one line that says so."""
    import tempfile
    import traceback

    summary = f"{type(bug).__name__}: {bug}".splitlines()[0][:300]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="nurture-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(bug))}")
    except OSError:
        return f"this is a bug in nurture: {summary} (NURTURE_DEBUG=1 shows where)"
    return f"this is a bug in nurture: {summary} (details in {log.name})"
