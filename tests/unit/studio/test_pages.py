"""What the pages ask for, and who is allowed to ask."""

from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from nurture.data.rows import parse_rows
from nurture.environments.wordle import Wordle
from nurture.errors import NurtureError
from nurture.inference.sampling import SamplingParams
from nurture.studio import label, watch
from nurture.studio.inspect import candidates, score_tokens
from nurture.studio.library import Library, UnknownModel
from nurture.studio.play import likely_words
from nurture.studio.server import build_app, listen
from nurture.types import Message


def test_names_are_looked_up_never_joined(library: Library, client: TestClient, run: Path):
    for name in ("../small", "/etc", "small/../small/02-sft", "02-sft/model", ""):
        with pytest.raises(UnknownModel):
            library.find(name)
    assert library.find("sft") == library.find("02-sft") == library.find("small/02-sft")
    for path in ("/studio/runs/..", "/studio/runs/%2e%2e", "/studio/runs/small/stages/..%2f/metrics"):
        assert client.get(path).status_code == 404
    with pytest.raises(UnknownModel):
        watch.stage_folder(run, "..")
    with pytest.raises(NurtureError, match="no run and no model"):
        Library([run / "nothing"])


def test_probabilities_add_up_and_cuts_are_named(library: Library):
    chat = library.load(library.find("pretrain"))
    prompt = [0, *chat.tokenizer.encode("The beaver")]
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.7)
    shown = candidates(chat.model, chat.tokenizer, prompt, params, chat.tokenizer.vocab_size)
    rows = shown["candidates"]
    assert sum(row["probability"] for row in rows) == pytest.approx(1, abs=1e-4)
    assert sum(row["sampled"] for row in rows) == pytest.approx(1, abs=1e-4)
    assert -sum(r["probability"] * math.log(r["probability"]) for r in rows) == pytest.approx(
        shown["entropy"], abs=1e-3
    )
    assert sum(row["cut"] is None for row in rows) == shown["kept"]
    assert all((row["sampled"] > 0) == (row["cut"] is None) for row in rows)
    assert {row["cut"] for row in rows} == {None, "top-k", "top-p"}
    scored = score_tokens(chat.model, [*prompt, rows[3]["token"]])
    assert math.exp(scored[-1].logprob or 0) == pytest.approx(rows[3]["probability"], abs=1e-5)
    assert scored[-1].rank == 3
    assert scored[0].logprob is None


def test_tokens_over_http(client: TestClient):
    body = {"model": "sft", "question": "Hi?", "text": " <b>bold</b>"}
    tokens = client.post("/studio/tokens", json=body).json()["tokens"]
    assert "".join(token["text"] for token in tokens).endswith("assistant\n <b>bold</b>")
    ids = [token["token"] for token in tokens]
    answer = client.post(
        "/studio/tokens/next", json={"model": "sft", "token_ids": ids, "temperature": 0}
    ).json()
    assert [row["sampled"] for row in answer["candidates"][:2]] == [1.0, 0.0]
    assert client.post("/studio/tokens/next", json={"model": "sft", "token_ids": [9999]}).status_code == 400


def test_watch_a_run(client: TestClient, run: Path):
    stages = client.get("/studio/runs/small").json()["stages"]
    assert [stage["name"] for stage in stages] == ["01-pretrain", "02-sft"]
    first = client.get("/studio/runs/small/stages/02-sft/metrics").json()
    assert len(first["rows"]) == 5
    path = run / "02-sft" / "metrics.jsonl"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole + b'{"step": 6, "train/loss": 4.4}\n{"step": 7, "tra')  # being written
        more = client.get(f"/studio/runs/small/stages/02-sft/metrics?after={first['next']}").json()
    finally:
        path.write_bytes(whole)
    assert more["rows"] == [{"step": 6, "train/loss": 4.4}]
    assert client.get("/studio/runs/small/stages/02-sft/metrics?after=x").status_code == 400
    assert client.get("/studio/runs/small/stages/02-sft/samples").json()["samples"][0]["reply"] == "yes"
    assert len(client.get("/studio/runs/small/report").json()["stages"]) == 2


def test_labels_count_once_and_survive_a_killed_server(run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("labels"))
    row = {
        "id": "abcdefgh", "labeler": "ann", "prompt": [{"role": "user", "content": "Hi?"}],
        "responses": ["a", "b", "c", "d"], "ranking": "D > C > A = B",
    }  # fmt: skip
    assert label.save(copy, label.RANKINGS, row)
    assert not label.save(copy, label.RANKINGS, row)
    file = copy / "labels" / label.RANKINGS
    file.write_bytes(file.read_bytes() + b'{"id": "half a li')
    assert label.save(
        copy, label.RANKINGS, row | {"id": "ijklmnop", "labeler": "bob", "ranking": "D > A > C > B"}
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["labeler"] for row in rows] == ["ann", "bob"]
    assert parse_rows(rows[0], "x")[0].ranking == ((3,), (2,), (0, 1))
    summary = label.summary(copy)
    assert summary["agreement"] == {"ordered": 0.8, "pairs": 5, "all": 4 / 6}
    assert label.open_comparison(copy, "ann") is None
    assert label.open_comparison(copy, "eve")["responses"] == ["a", "b", "c", "d"]  # type: ignore[index]
    with pytest.raises(NurtureError, match="ranking"):
        label.save(copy, label.RANKINGS, row | {"id": "qrstuvwx", "ranking": "E > A"})


def test_rewards_against_rankings():
    rows = [
        {"responses": ["a", "b", "c"], "ranking": "A > B = C"},
        {"responses": ["a", "b"], "ranking": "B > A"},
    ]
    scored = list(zip(rows, [[2.0, 1.0, 1.5], [0.5, 0.1]], strict=True))
    assert label.agreement_with_scores(scored) == {"ordered": 2 / 3, "pairs": 3}


def test_games_of_a_run_are_played_again(library: Library, tmp_path: Path, run: Path):
    """A game of the real rules, with two invalid guesses: the marks are the game's own; probabilities are exact."""
    game, messages = Wordle(), list[Message]()
    messages += game.reset("crane").messages
    for reply in ("[ Z Z Z Z Z ]", "[ H O U S E ]", "[ H O U S E ]", "[ C R A N E ]"):
        result = game.step(reply)
        messages += [{"role": "assistant", "content": reply}, *result.observation.messages]
    copy = tmp_path / "small"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("labels"))
    row = {"task": "wordle", "reward": 1.0, "messages": messages}
    (copy / "02-sft" / "samples.jsonl").write_text(
        json.dumps({"prompt": "x"}) + "\n" + json.dumps(row) + "\n"
    )
    with TestClient(build_app(Library([copy])), base_url="http://localhost") as client:
        (episode,) = client.get("/studio/runs/small/episodes").json()["episodes"]
        assert (episode["stage"], episode["index"], episode["secret"]) == ("02-sft", 1, "crane")
        marked = [(turn["guess"], turn["marks"]) for turn in episode["turns"] if "marks" in turn]
        assert marked == game.history
        body = {"run": "small", "stage": "02-sft", "index": 1, "turn": 3, "model": "sft"}
        answer = client.post("/studio/play/replay", json=body).json()
        chat = library.load(library.find("sft"))
        words = likely_words(chat, messages[:3], ["house"], 1)
        assert answer["probability"] == pytest.approx(words[0]["probability"], rel=1e-2)
        assert client.post("/studio/play/replay", json=body | {"turn": 2}).status_code == 400
        assert client.post("/studio/play/replay", json=body | {"index": 0}).status_code == 400
        assert client.post("/studio/play/replay", json=body | {"run": ".."}).status_code == 404


def test_likely_words_have_exact_probabilities(library: Library):
    chat = library.load(library.find("sft"))
    asked = [{"role": "user", "content": "Guess."}]
    words = ["crane", "crate", "house"]
    found = likely_words(chat, asked, words, 3)
    assert {one["word"] for one in found} == set(words)
    prompt = chat.tokenizer.encode_prompt(asked)
    for one in found:
        spelled = f"[ {' '.join(one['word'].upper())} ]"
        reply = [*chat.tokenizer.encode(spelled), chat.tokenizer.end_of_turn_id]
        scored = score_tokens(chat.model, prompt + reply)[len(prompt) :]
        assert math.log(one["probability"]) == pytest.approx(sum(s.logprob or 0 for s in scored), abs=1e-2)


def test_a_game(client: TestClient):
    game = client.post("/studio/play/new", json={"seed": 4}).json()
    assert "secret" not in game
    bad = client.post("/studio/play/person", json={"game": game["game"], "guess": "zzzzz"}).json()
    assert (bad["history"], bad["over"]) == ([], False)
    good = client.post("/studio/play/person", json={"game": game["game"], "guess": "crane"}).json()
    assert [turn["word"] for turn in good["history"]] == ["crane"]
    for _ in range(2):  # random weights do not know the rules: the second invalid move ends its game
        its = client.post("/studio/play/model", json={"game": game["game"], "model": "sft"}).json()
    assert its["over"]
    assert its["secret"] is None  # the person is still looking for it
    assert client.post("/studio/play/person", json={"game": "none", "guess": "crane"}).status_code == 400


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:9999"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_sites_are_refused(client: TestClient, headers: dict[str, str], status: int):
    assert client.get("/v1/models", headers=headers).status_code == status


def test_a_form_of_another_site_is_no_json(client: TestClient):
    response = client.post(
        "/v1/completions", content=b'{"model":"sft"}', headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 415


def test_the_token(library: Library):
    with TestClient(build_app(library, token="s3cret"), base_url="http://lan-name:80") as client:
        assert client.get("/v1/models").status_code == 401
        for shown in ("Bearer wrong", "Bearer ", "s3cret", "Bearer s3crét".encode()):
            assert client.get("/v1/models", headers={"Authorization": shown}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/?token=wrong").status_code == 401
        answer = client.get("/?token=s3cret", follow_redirects=False)
        assert answer.headers["location"] == "/"
        assert "httponly" in answer.headers["set-cookie"].lower()
        assert "samesite=strict" in answer.headers["set-cookie"].lower()
        assert client.get("/").status_code == 200  # with the cookie


def test_pages_load_nothing_from_elsewhere(client: TestClient):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    names = [
        "app.js",
        "api.js",
        "ui.js",
        "chat.js",
        "tokens.js",
        "watch.js",
        "label.js",
        "play.js",
        "style.css",
    ]
    for text in (page.text, *(client.get(f"/static/{name}").text for name in names)):
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text


def test_a_taken_port_is_one_clear_message():
    with listen("127.0.0.1", 0) as first:
        port: Any = first.getsockname()[1]
        with pytest.raises(NurtureError, match=f"port {port} of 127.0.0.1 is taken.*--port {port + 1}"):
            listen("127.0.0.1", port)
    assert isinstance(first, socket.socket)
