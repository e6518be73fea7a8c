"""Requests that no person would write: whatever fits (or nearly fits) the server's own description is never a 500."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from starlette.testclient import TestClient

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


def reachable(document: dict[str, Any]) -> dict[str, Any]:
    """Return the description with names of models and runs that exist, and answers short enough to wait for."""
    known = {
        "model": {"enum": ["sft", "pretrain", "../sft"]},
        "run": {"enum": ["small", ".."]},
        "stage": {"enum": ["02-sft", "nothing"]},
        "n": {"type": "integer", "maximum": 2},
        "max_tokens": {"enum": [None, 0, 1, 5]},
        "max_completion_tokens": {"enum": [None, 3]},
    }
    for schema in document["components"]["schemas"].values():
        schema["properties"] |= {name: known[name] for name in schema["properties"] if name in known}
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation["parameters"]:
                parameter["schema"] = known.get(parameter["name"], parameter["schema"])
    return document


@pytest.fixture(scope="module")
def description(client: TestClient) -> Any:
    return schemathesis.openapi.from_dict(reachable(client.get("/openapi.json").json()))


def operations(description: Any) -> list[Any]:
    return [
        one.ok()
        for one in description.get_all_operations()
        if one.ok().path not in ("/studio/runs/{run}/resume", "/studio/runs/{run}/stop")
    ]


def test_the_description_has_every_route(client: TestClient):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/models/{name}", "/studio/play/replay"} <= set(paths)
    assert set(paths["/studio/runs/{run}/stop"]) == {"post"}
    assert paths["/v1/completions"]["post"]["summary"] == "Continue texts"


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_never_a_500(description: Any, address: str, mode: Any):
    for operation in operations(description):

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=4,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            response = case.call(base_url=address, timeout=60)
            assert response.status_code < 500, (case, response.text)

        try:
            ask()
        except Unsatisfiable:
            if mode == schemathesis.GenerationMode.POSITIVE:
                raise  # a request without arguments cannot be wrong
