"""Real servers in threads, for tests of the wire: ours, and small ones that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from nurture.studio.server import listen


@contextmanager
def serving(app: Starlette, port: int = 0) -> Iterator[str]:
    """Serve `app` and yield its address."""
    listening = listen("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def action_schema(**fields: Any) -> dict[str, Any]:
    """Return what GET /schema says of actions with these fields."""
    return {"action": {"properties": {"metadata": {"type": "object"}} | fields, "required": list(fields)}}
