"""The studio as one server: the API, what the pages ask for, and the pages themselves.

Everything is local: no file is fetched from anywhere, the pages have no build step, and names in a request are looked
up among what was given on the command line and what the package ships, never joined to a path.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nurture.errors import NurtureError
from nurture.studio.batcher import Batcher
from nurture.studio.guard import Guard, token_for
from nurture.studio.library import Library
from nurture.studio.openai import Api
from nurture.studio.pages import Pages
from nurture.studio.requests import Refused, error_response

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def build_app(library: Library, token: str | None = None) -> Starlette:
    """Return the application. Its computing thread runs while the application does."""
    batcher = Batcher()
    api = Api(library, batcher)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        batcher.close()

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            said = f"{request.method} {request.url.path[:100]}: {error.detail}"
            return error_response(Refused(said, status=error.status_code))
        return error_response(error)

    return Starlette(
        routes=[*api.routes(), *Pages(api).routes(), *_files()],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={HTTPException: failed},
        lifespan=lifespan,
    )


def _files() -> list[Route]:
    """Return the routes of the files in `web/`."""
    files = {
        file.name: (file.read_bytes(), TYPES[Path(file.name).suffix])
        for file in resources.files("nurture.studio").joinpath("web").iterdir()
        if Path(file.name).suffix in TYPES
    }

    def sending(name: str) -> Callable[[Request], Response]:
        content, kind = files[name]
        return lambda request: Response(content, media_type=kind)

    return [
        Route("/", sending("index.html")),
        *(Route(f"/static/{name}", sending(name)) for name in files if name != "index.html"),
    ]


def serve(
    paths: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted.

    Args:
        paths: runs and models, see `library.Library`.
        host: address to listen on; any but this machine's own needs a token.
        port: 0 takes a free one.
        token: what clients must show; made up where one is needed and none is given.
        say: called with what a person should read.

    Raises:
        NurtureError: a path holds nothing to serve, or the port is taken.
    """
    library = Library(paths)
    token = token_for(host, token)
    listening = listen(host, port)
    port = listening.getsockname()[1]
    address = f"http://{shown_host(host)}:{port}"
    app = build_app(library, token)
    for entry in library.entries():
        say(f"  {entry.name}")
    say(f"Studio  {address}/{f'?token={token}' if token else ''}")
    say(f"API     {address}/v1{'   key: the token' if token else ''}     (ctrl-c stops)")
    run(app, listening)


def run(app: Starlette, listening: socket.socket) -> None:
    """Serve an application until interrupted."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, server_header=False
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def shown_host(host: str) -> str:
    """Return what people write to reach an address that is listened on."""
    return f"[{host}]" if ":" in host else socket.gethostname() if host == "0.0.0.0" else host


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        NurtureError: the port is taken, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(256)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise NurtureError(
                f"port {port} of {host} is taken. Is a server running there already? Another port: --port {port + 1}"
            ) from error
        raise NurtureError(f"cannot listen on {host}:{port} ({error.strerror}).") from error
    return listening
