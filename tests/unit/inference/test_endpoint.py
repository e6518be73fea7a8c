"""The client of OpenAI-compatible endpoints against a local server that misbehaves on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nurture.errors import NurtureError
from nurture.inference import endpoint
from nurture.inference.endpoint import EndpointConfig, ask_endpoint

Answer = Callable[[dict[str, Any], int], tuple[int, Any]]


class Stub:
    """A server whose answers a test chooses: answer(body, number of the request) -> (status, JSON)."""

    def __init__(self, answer: Answer) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.keys.append(self.headers["Authorization"])
                status, content = answer(body, number) if self.path == "/v1/chat/completions" else (404, {})
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def said(text: str, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": {"completion_tokens": len(text)}}


def echo(body: dict[str, Any], number: int) -> tuple[int, Any]:
    return 200, said(body["messages"][-1]["content"].upper())


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Stub]]:
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    stubs: list[Stub] = []

    def start(answer: Answer) -> Stub:
        stubs.append(Stub(answer))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.server.shutdown()
        stub.server.server_close()


def conversations(*texts: str) -> list[list[Any]]:
    return [[{"role": "user", "content": text}] for text in texts]


def config(stub: Stub, **settings: Any) -> EndpointConfig:
    return EndpointConfig(url=stub.url, model="teacher", **settings)


def test_replies_come_in_order_whatever_order_they_are_made_in(serve) -> None:
    stub = serve(echo)
    texts = [f"word {i}" for i in range(40)]
    settings = config(stub, options={"top_p": 0.9})
    replies = ask_endpoint(
        settings, conversations(*texts), max_tokens=7, temperature=0.6, seeds=list(range(40))
    )
    assert [reply.text for reply in replies] == [text.upper() for text in texts]
    assert replies[0].tokens == len("word 0")
    sent = {body["messages"][0]["content"]: body for body in stub.bodies}["word 3"]
    expected = {"model": "teacher", "max_tokens": 7, "temperature": 0.6, "seed": 3, "top_p": 0.9}
    assert expected.items() <= sent.items()


def test_reasoning_and_length_are_kept_apart(serve) -> None:
    stub = serve(lambda body, number: (200, said("4", "length", reasoning_content="2 and 2")))
    (reply,) = ask_endpoint(config(stub), conversations("2 + 2?"), max_tokens=5)
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("4", "2 and 2", "length")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(serve, status: int) -> None:
    stub = serve(lambda body, number: (status, {"error": "busy"}) if number < 3 else echo(body, number))
    (reply,) = ask_endpoint(config(stub), conversations("hi"), max_tokens=5)
    assert reply.text == "HI"
    assert len(stub.bodies) == 4


def test_what_stays_down_is_one_message_that_says_how_often_it_was_tried(serve) -> None:
    stub = serve(lambda body, number: (503, {"error": {"message": "loading model"}}))
    with pytest.raises(NurtureError, match=r"no answer after 3 tries \(503 loading model\)"):
        ask_endpoint(config(stub, retries=2), conversations("hi"), max_tokens=5)
    nobody = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", retries=1)
    with pytest.raises(NurtureError, match=r"127\.0\.0\.1:9.*no answer after 2 tries"):
        ask_endpoint(nobody, conversations("hi"), max_tokens=5)


def test_a_wrong_key_stops_at_once_and_names_the_variable(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "abc")
    stub = serve(lambda body, number: (401, {"error": {"message": "bad key"}}))
    with pytest.raises(NurtureError, match=r"401 bad key.*TEACHER_KEY holds a key that was not accepted"):
        ask_endpoint(
            config(stub, key_variable="TEACHER_KEY", parallel=1), conversations(*"abcdefgh"), max_tokens=5
        )
    assert set(stub.keys) == {"Bearer abc"}
    assert len(stub.keys) < 8, "the rest was sent all the same"
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(NurtureError, match="TEACHER_KEY is not set"):
        ask_endpoint(config(stub, key_variable="TEACHER_KEY"), conversations("a"), max_tokens=5)
    with pytest.raises(NurtureError, match=r"404.*model's name \(teacher\)"):
        ask_endpoint(EndpointConfig(url=stub.url + "/x", model="teacher"), conversations("a"), max_tokens=5)


def test_one_refused_conversation_does_not_end_the_job(serve) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, Any]:
        too_long = len(body["messages"][-1]["content"]) > 3
        return (400, {"error": {"message": "context length exceeded"}}) if too_long else echo(body, number)

    replies = ask_endpoint(config(serve(answer)), conversations("a", "too long", "b"), max_tokens=5)
    assert [reply.finish_reason for reply in replies] == ["stop", "error", "stop"]
    assert replies[1].error == "context length exceeded"


@pytest.mark.parametrize("content", [b"<html>", {"object": "list"}, {"choices": []}])
def test_a_server_of_another_kind_is_named(serve, content: Any) -> None:
    stub = serve(lambda body, number: (200, content))
    with pytest.raises(NurtureError, match=r"not JSON|not a chat completion"):
        ask_endpoint(config(stub), conversations("hi"), max_tokens=5)
