"""Two commands about environments: serve one to OpenEnv clients, or play it in the terminal.

They stand apart from cli.py, which gives them their place in the help.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nurture.errors import NurtureError

Host = Annotated[str, typer.Option(help="Address to listen on; others than this machine's need a token.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
Token = Annotated[
    str | None, typer.Option(help="What clients must show [dim](default: made up where one is needed)[/dim].")
]

env = typer.Typer(
    no_args_is_help=True, help="Serve an environment to OpenEnv clients: nurture env serve wordle."
)


@env.callback()
def _group() -> None:
    """Serve an environment to OpenEnv clients: nurture env serve wordle."""


def serve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="wordle, math, code or auto.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the environment.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Tasks that seeds choose from [dim](default: the world's)[/dim]."),
    ] = None,
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    sessions: Annotated[int, typer.Option(min=1, help="Most games at a time.")] = 1024,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token: Token = None,
) -> None:
    """Serve a game or problems as an OpenEnv server: TRL's scripts and `nurture grpo` train against it, people play."""
    from nurture.environments.catalog import environment_maker, tasks_for

    options = _settings_of(f"nurture env serve {name}", settings)
    make = environment_maker(name, options)
    tasks = tasks_for(name, options, data, split)
    try:
        import websockets  # noqa: F401  (uvicorn speaks it through this package)

        from nurture.studio.environment import Offer, serve_environment
    except ModuleNotFoundError as missing:
        if missing.name not in ("starlette", "uvicorn", "websockets"):
            raise
        raise NurtureError("the server needs the extra packages: pip install 'nurture[openenv]'") from None
    serve_environment(Offer(name, make, tasks, sessions), host=host, port=port, token=token)


def play(
    name: Annotated[str, typer.Argument(metavar="NAME", help="wordle, math or code.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH] [KEY=VALUE]...",
            help="A model to watch [dim](default: you play)[/dim], and settings of the game.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Tasks to play [dim](default: held-out ones)[/dim].")
    ] = None,
    games: Annotated[int, typer.Option(min=1, help="Games to watch.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest turn of the model, in tokens.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Which games; the same seed gives the same ones.")] = None,
) -> None:
    """Play a game or solve a problem in the terminal, or watch a model do it."""
    import secrets

    from rich.console import Console

    from nurture.environments.catalog import environment_maker, tasks_for
    from nurture.studio.match import Player, play_yourself, watch

    paths = [word for word in arguments or () if "=" not in word]
    settings = [word for word in arguments or () if "=" in word]
    if len(paths) > 1:
        raise NurtureError(f"one model plays at a time, got {paths[0]} and {paths[1]}.")
    options = _settings_of(f"nurture play {name}", settings)
    make = environment_maker(name, options)
    tasks = tasks_for(name, options, data, "heldout")
    player = Player(make, tasks, secrets.randbits(31) if seed is None else seed, Console())
    if not paths:
        play_yourself(player, read=input)
        return
    from nurture.inference.chat import load_chat_model

    watch(player, load_chat_model(paths[0]), games=games, max_tokens=max_tokens, temperature=temperature)


def _settings_of(command: str, settings: list[str] | None) -> dict[str, Any]:
    """Read `key.path=value` settings that a later check will judge."""
    from nurture.recipe import Document, apply_overrides

    document = Document(command)
    keys = {text.partition("=")[0].split(".")[0]: () for text in settings or []}
    apply_overrides(document, settings or [], roots={}, known=keys)
    document.raise_problems()
    return document.data
