"""The server described for programs: `/openapi.json`, made from the routes and the bodies they read.

For other people's tools, and for the fuzzer of our tests, which needs to know what a request may look like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from nurture import __version__

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")
            },
        }
    },
}


def document(
    routes: Iterable[Route], bodies: Mapping[str, type[BaseModel]], queries: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Return an OpenAPI 3.1 document.

    Args:
        routes: with handlers whose docstrings say what they do.
        bodies: path -> what a POST to it takes.
        queries: path -> names of its query parameters.
    """
    kinds = [(kind, "validation") for kind in dict.fromkeys(bodies.values())]
    _, schemas = models_json_schema(kinds, ref_template=_REF)  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for route in routes:
        path = re.sub(r":path}", "}", route.path)
        names = [(name, "path", True) for name in re.findall(r"{(\w+)", path)]
        names += [(name, "query", False) for name in queries.get(route.path, ())]
        operation: dict[str, Any] = {
            "summary": (route.endpoint.__doc__ or "").strip().rstrip("."),
            "parameters": [
                {"name": name, "in": place, "required": needed, "schema": {"type": "string"}}
                for name, place, needed in names
            ],
            "responses": {
                "200": {"description": "what was asked for"},
                "default": {
                    "description": "an error, in OpenAI's shape",
                    "content": {"application/json": {"schema": _ERROR}},
                },
            },
        }
        if route.path in bodies:
            reference = {"$ref": _REF.format(model=bodies[route.path].__name__)}
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": reference}},
            }
        method = "post" if "POST" in (route.methods or ()) else "get"
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "nurture studio", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }
