"""Text is prepared by datatrove's pipelines: what is removed, by which rule, and that finished work is not done again."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from nurture.errors import NurtureError
from nurture.stages.context import StageContext
from nurture.stages.prepare import Config, run

pytest.importorskip("datatrove")

QUESTION = "what is the name of the seven green boats that sailed to the northern harbour in spring"
GERMAN = "Die Stadt und das Haus ist nicht auf dem Weg von der Schule zu den Bergen mit dem Lehrer im Winter."


def prose(count: int) -> list[str]:
    """English documents of 140 words in lines of 14, from the manual of Python."""
    words = [[word for word in topic.split() if word.isalpha()] for topic in topics.values()]
    pieces = [topic[first : first + 140] for topic in words for first in range(0, len(topic) - 139, 140)]
    return [
        "\n".join(" ".join(piece[line : line + 14]) + "." for line in range(0, 140, 14))
        for piece in pieces[:count]
    ]


def rated(texts: list[str]) -> list[float]:
    """A classifier that likes long words."""
    return [sum(map(len, text.split())) / len(text.split()) for text in texts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = prose(30)
    near = documents[0].replace(documents[0].split()[40], "harbour", 1)
    extra = [
        [near, GERMAN * 8],
        [f"{documents[4]}\n{QUESTION}.\n{documents[5]}", "buy now cheap. " * 80],
        ["too short", documents[2]],
    ]
    for number in range(3):
        rows = documents[number:28:3] + extra[number]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (tmp_path / f"{number}.jsonl").write_text(lines)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": QUESTION}) + "\n")
    return tmp_path


def texts_of(file: Path) -> list[str]:
    with gzip.open(file, "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def test_every_rule_removes_what_it_is_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "data": {"web": "[0-9].jsonl"},
        "language": "en",
        "without": {"boats": "eval.jsonl"},
        "workers": 1,
    }
    context = StageContext(directory=folder / "out", base=folder)
    context.directory.mkdir()
    run(Config(name="prepare", **settings), context)
    kept = texts_of(context.directory / "web.jsonl.gz")
    counts = json.loads((context.directory / "result.json").read_text())["documents"]
    assert counts["read"] == 28 + 6
    assert counts["kept/web"] == len(kept)
    assert counts["removed/language"] >= 1  # and the advertisement: no language's commonest words
    assert counts["removed/evaluation"] == 1
    assert counts["removed/duplicate"] == 2  # one is a copy, one differs in a word
    assert not any(
        QUESTION in text or "cheap" in text or GERMAN in text or text == "too short" for text in kept
    )
    assert len(kept) == len(set(kept)) >= 20
    removed = [json.loads(line) for line in (context.directory / "removed.jsonl").read_text().splitlines()]
    shown = [row["text"] for row in removed if row["reason"] == "evaluation"]
    assert [text[:200] for text in shown] == [prose(30)[4][:200]]

    # An interrupted stage goes on: what is complete is not read again, what is not is done as if for the first time.
    shutil.rmtree(context.directory / "state/logs/keep")
    (folder / "0.jsonl").write_text("")
    run(Config(name="prepare", **settings), context)
    assert texts_of(context.directory / "web.jsonl.gz") == kept

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    context = StageContext(directory=folder / "rated", base=folder)
    context.directory.mkdir()
    middle = sorted(rated(prose(28)))[14]
    judged = {
        "rules": (),
        "duplicates": "keep",
        "classifier": "test_prepare_stage:rated",
        "threshold": middle,
    }
    run(Config(name="prepare", data={"web": "[1-2].jsonl"}, workers=1, **judged), context)
    kept = texts_of(context.directory / "web.jsonl.gz")
    assert kept
    assert all(rated([text])[0] >= middle for text in kept)
    assert json.loads((context.directory / "result.json").read_text())["documents"]["removed/classifier"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"a": "world:web"}}, "there is nothing to prepare"),
        ({"data": {"a": "eval.jsonl"}, "classifier": "nowhere:score"}, "module:function"),
        ({"data": {"a": "2.jsonl"}, "language": "fr"}, "no document passed"),
    ],
)
def test_mistakes_are_told(folder: Path, settings: dict, message: str) -> None:
    context = StageContext(directory=folder / "out", base=folder)
    context.directory.mkdir()
    with pytest.raises(NurtureError, match=message):
        run(Config(name="prepare", workers=1, **settings), context)
