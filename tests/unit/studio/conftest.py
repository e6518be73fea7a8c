"""A run of two stages with random weights, and the studio on it: in process, and as a real server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("starlette", reason="the studio needs the extra `serve`")

from starlette.testclient import TestClient

from nurture import files
from nurture.model.config import ModelConfig
from nurture.model.hugging_face import save_model
from nurture.model.transformer import Transformer
from nurture.studio.library import Library
from nurture.studio.server import build_app, listen
from nurture.tokenizer import Tokenizer
from nurture.world import World

CONTEXT = 384


def make_stage(folder: Path, kind: str, tokenizer: Tokenizer, seed: int, chat: bool) -> None:
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, max_position=CONTEXT)
    folder.mkdir(parents=True)
    save_model(Transformer(config), folder / "model")
    tokenizer.chat_template = tokenizer.with_chat_template().chat_template if chat else None
    tokenizer.save(folder / "model")
    (folder / "stage.yaml").write_text(f"kind: {kind}\nname: {kind}\n")
    metrics = {"format": {"before": 0.1, "after": 0.9, "low": 0.8, "high": 0.95, "n": 40}}
    result = {"name": kind, "kind": kind, "seconds": 1.5, "tokens": 1000, "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(result))
    lines = [{"step": step, "train/loss": 5 - step / 10, "tokens/web": 10.0 * step} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.jsonl").write_text(json.dumps({"prompt": "<b>hi</b>", "reply": "yes"}) + "\n")
    files.write_manifest(folder, fingerprint=kind, kind=kind)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    world = World(seed=0)
    texts = [world.document("web", "train", index) for index in range(40)]
    tokenizer = Tokenizer.train(texts, 400)
    make_stage(folder / "01-pretrain", "pretrain", tokenizer, 1, chat=False)
    make_stage(folder / "02-sft", "sft", tokenizer, 2, chat=True)
    return folder


@pytest.fixture(scope="session")
def library(run: Path) -> Library:
    return Library([run])


@pytest.fixture(scope="session")
def client(library: Library) -> Iterator[TestClient]:
    with TestClient(build_app(library), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="session")
def address(library: Library) -> Iterator[str]:
    """A real server in a thread, for what only sockets show: streams, clients that leave."""
    uvicorn = pytest.importorskip("uvicorn")
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(library), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()
