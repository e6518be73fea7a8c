"""The API, asked by the official client where it is installed, and by raw HTTP for what that client would not send."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from nurture.inference.engine import Row
from nurture.inference.sampling import SamplingParams, sequence_seeds
from nurture.studio import batcher as batcher_module
from nurture.studio.library import Library

QUESTION = [{"role": "user", "content": "Where does the beaver live?"}]


def ask(client: TestClient, path: str = "chat/completions", **body: Any) -> Any:
    defaults: dict[str, Any] = (
        {"model": "sft", "messages": QUESTION} if path.startswith("chat") else {"model": "pretrain"}
    )
    return client.post(f"/v1/{path}", json=defaults | body)


def error(response: Any) -> dict[str, Any]:
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def test_every_stage_is_a_model(client: TestClient):
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["small/01-pretrain", "small/02-sft"]
    assert client.get("/v1/models/small/02-sft").json()["kind"] == "sft"


def test_same_tokens_as_the_engine_whatever_runs_beside(client: TestClient, library: Library):
    chat = library.load(library.find("pretrain"))
    prompt = [chat.tokenizer.document_token_id, *chat.tokenizer.encode("The beaver")]
    params = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9)
    wanted = chat.engine.generate([prompt] * 3, params, sequence_seeds(5, 3))
    texts = [chat.tokenizer.decode(completion.token_ids) for completion in wanted]

    def one(seed: int) -> list[str]:
        body = {
            "prompt": "The beaver",
            "max_tokens": 20,
            "temperature": 0.9,
            "top_p": 0.9,
            "ignore_eos": True,
        }
        answer = ask(client, "completions", **body, seed=seed, n=3).json()
        return [choice["text"] for choice in answer["choices"]]

    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(one, seed) for seed in (1, 2, 5, 3, 4)]
        assert others[2].result() == texts
        assert len({tuple(other.result()) for other in others}) == 5


def test_logprobs_are_the_models_own(client: TestClient, library: Library):
    """Written at temperature 0.7, and echoed through another forward pass: the same numbers."""
    chat = library.load(library.find("pretrain"))
    prompt = [chat.tokenizer.document_token_id, *chat.tokenizer.encode("The")]
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0.7, "seed": 1, "ignore_eos": True}
    written = ask(client, "completions", **body, logprobs=3).json()["choices"][0]["logprobs"]
    assert all(len(top) <= 3 for top in written["top_logprobs"])
    params = SamplingParams(max_tokens=8, temperature=0.7)
    (same,) = chat.engine.generate([prompt], params, sequence_seeds(1, 1))
    token_ids = prompt + same.token_ids
    echoed = ask(client, "completions", prompt=token_ids, max_tokens=0, echo=True, logprobs=0).json()
    logprobs = echoed["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    assert logprobs[len(prompt) :] == pytest.approx(written["token_logprobs"], abs=1e-4)


def test_chat_logprobs_and_usage(client: TestClient):
    answer = ask(client, max_tokens=4, logprobs=True, top_logprobs=2, ignore_eos=True).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert [len(token["top_logprobs"]) for token in content] == [2] * 4
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 4


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_says_what_the_whole_answer_says(client: TestClient):
    body = {"seed": 7, "n": 2, "max_tokens": 24, "stop": ["e"]}
    whole = ask(client, **body).json()["choices"]
    chunks = events(ask(client, **body, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    for index, choice in enumerate(whole):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [choice["finish_reason"]]
        assert "e" not in choice["message"]["content"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "unrecognized"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, None, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, None, "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ({"model": "../../etc/passwd"}, "model", "does not exist"),
        ({"model": "small/01-pretrain"}, "model", "base model"),
        ({"n": 0}, "n", "greater"),
        ({"presence_penalty": 1.0}, "presence_penalty", "0"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "cannot set"),
    ],
)
def test_mistakes_are_named(client: TestClient, body: dict[str, Any], param: str | None, says: str):
    response = ask(client, **body)
    assert 400 <= response.status_code < 500
    assert error(response)["param"] == param
    assert says in error(response)["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"model": "\\ud800", "messages": [{}]}', b'{"model":"sft","messages":[{"role":"user","content":"\\ud800"}]}']
)  # fmt: skip
def test_rubbish_is_a_400(client: TestClient, content: bytes):
    response = client.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code in (400, 404)
    assert error(response)["message"]


def test_a_body_without_end_is_refused(client: TestClient):
    response = client.post(
        "/v1/completions", content=b" " * (5 << 20), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413


def test_context_overflow_is_a_clear_400(client: TestClient):
    response = ask(client, messages=[{"role": "user", "content": "beaver " * 300}])
    assert response.status_code == 400
    assert error(response)["code"] == "context_length_exceeded"
    assert "384 tokens" in error(response)["message"]


@pytest.mark.parametrize("prompt", [[], [[]], [10**9], [-1], [[1], []]])
def test_bad_token_ids_are_a_400(client: TestClient, prompt: Any):
    response = ask(client, "completions", prompt=prompt, max_tokens=1)
    assert response.status_code == (200 if prompt == [] else 400)  # no text at all: a new document


def test_unknown_addresses_answer_in_the_same_shape(client: TestClient):
    assert error(client.get("/v1/nothing"))["message"].startswith("GET /v1/nothing")
    assert client.get("/v1/completions").status_code == 405
    for path in ("/static/../guard.py", "/static/%2e%2e/guard.py", "/static/..%2fguard.py"):
        assert client.get(path).status_code == 404


def test_too_much_at_once_is_a_429(client: TestClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batcher_module, "_WAITING", 3)
    response = ask(client, n=4, max_tokens=1)
    assert response.status_code == 429
    assert error(response)["type"] == "rate_limit_error"
    assert int(response.headers["Retry-After"]) >= 1
    assert ask(client, n=2, max_tokens=1).status_code == 200


# --- through sockets --------------------------------------------------------------------------------------------------


def test_the_official_client(address: str):
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["small/01-pretrain", "small/02-sft"]
    whole = client.chat.completions.create(
        model="small/02-sft", messages=QUESTION, seed=3, max_tokens=12, logprobs=True, top_logprobs=1
    )
    pieces = client.chat.completions.create(
        model="small/02-sft", messages=QUESTION, seed=3, max_tokens=12, stream=True
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert said == whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    text = client.completions.create(model="pretrain", prompt=["The", "A"], n=2, max_tokens=5, logprobs=2)
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="none", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="pretrain", prompt="beaver " * 300)


TOOLS: Any = [{"type": "function", "function": {"name": "add"}}]


def scripted(monkeypatch: pytest.MonkeyPatch, token_ids: list[int]) -> list[Row]:
    """Have every row write these tokens, whatever its model would; return the rows."""
    rows: list[Row] = []
    take = Row.take

    def say(row: Row, drawn: list[int], logprobs: list[float]) -> None:
        if not row.drawn:
            rows.append(row)
        take(row, [token_ids[row.drawn]], logprobs)

    monkeypatch.setattr(Row, "take", say)
    return rows


def test_tools_by_the_official_client(address: str, library: Library, monkeypatch: pytest.MonkeyPatch):
    """Tools reach the prompt; calls come back whole and streamed; their results are read in the next turn."""
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    tokenizer = library.load(library.find("sft")).tokenizer
    calls = [f'<tool_call>\n{{"name": "add", "arguments": {{"a": {n}}}}}\n</tool_call>' for n in (1, 2)]
    written = "<think>\nI add.\n</think>\nOne moment.\n" + "\n".join(calls)
    reply = [{"role": "user", "content": "?"}, {"role": "assistant", "content": written}]
    start = tokenizer.encode_prompt(reply[:1])
    token_ids = tokenizer.encode_conversation(reply)[0][len(start) :]
    rows = scripted(monkeypatch, token_ids)
    asked: Any = [{"role": "user", "content": "Hi"}]
    whole = client.chat.completions.create(model="sft", messages=asked, tools=TOOLS, max_tokens=200)
    assert '"name": "add"' in tokenizer.decode(rows[-1].prompt)
    (choice,) = whole.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "One moment.\n")
    assert choice.message.reasoning_content == "I add."
    said = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert said == [("add", {"a": 1}), ("add", {"a": 2})]
    assert len({call.id for call in choice.message.tool_calls}) == 2

    stream = client.chat.completions.create(
        model="sft", messages=asked, tools=TOOLS, max_tokens=200, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert chunks[-1].finish_reason == "tool_calls"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "One moment.\n"
    streamed = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(call.index, call.function.name, json.loads(call.function.arguments)) for call in streamed] == [
        (0, "add", {"a": 1}),
        (1, "add", {"a": 2}),
    ]

    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "3"} for call in choice.message.tool_calls
    ]
    again = [*asked, choice.message.model_dump(exclude_none=True), *results]
    client.chat.completions.create(model="sft", messages=again, tools=TOOLS, max_tokens=200)
    prompt = tokenizer.decode(rows[-1].prompt)
    assert prompt.count("<tool_response>\n3\n</tool_response>") == 2
    assert calls[1] in prompt
    nothing = client.chat.completions.create(
        model="sft", messages=asked, tools=TOOLS, tool_choice="none", max_tokens=200
    )
    assert '"name": "add"' not in tokenizer.decode(rows[-1].prompt)
    assert nothing.choices[0].message.tool_calls is None


def load_of(address: str) -> dict[str, int]:
    import httpx

    return httpx.get(f"{address}/studio/load").json()


def test_a_client_that_leaves_frees_its_place(address: str, monkeypatch: pytest.MonkeyPatch):
    import httpx

    step = batcher_module._Lane.step
    monkeypatch.setattr(batcher_module._Lane, "step", lambda lane: (time.sleep(0.02), step(lane)))
    body = {"model": "pretrain", "prompt": "The", "max_tokens": 250, "ignore_eos": True, "n": 16}
    with httpx.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()  # kept in a name: forgotten, it would close the connection at once
        next(lines)
        assert load_of(address)["active"] > 0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json=body, timeout=0.05)
    for _ in range(100):  # it would take the rows five times as long to reach their ends
        if load_of(address) == {"active": 0, "waiting": 0}:
            break
        time.sleep(0.01)
    assert load_of(address) == {"active": 0, "waiting": 0}


def test_fifty_clients_at_once(address: str):
    import httpx

    def stream(seed: int) -> str:
        body = {"model": "sft", "messages": QUESTION, "max_tokens": 16, "seed": seed, "stream": True}
        return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).text

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(stream, range(50)))
    assert all(answer.endswith("data: [DONE]\n\n") for answer in answers)
