"""docs/from-trl.md against the code: every setting it names is there, with the default it says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from nurture import cli
from nurture.stages import stage_module

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-trl.md"
ANY = ("sft", "reward", "preference", "ppo", "grpo")
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| .+? \| ([a-z, ]+) \| `([\w.]+)` \| (.*?) \| .*\|$", TEXT, re.MULTILINE)


@cache
def defaults(kind: str) -> dict[str, str]:
    config = stage_module(kind).Config
    return {key: shown or "none" for key, shown, _ in cli._keys(config, values=cli._defaults(config, kind))}


@pytest.mark.parametrize(("stages", "key", "default"), ROWS)
def test_settings_exist_with_the_default_that_is_told(stages: str, key: str, default: str) -> None:
    found = {defaults(kind)[key] for kind in (ANY if stages == "any" else stages.split(", "))}
    assert default == (found.pop() if len(found) == 1 else "by stage")


def test_every_row_was_read_and_so_are_the_settings_in_the_text() -> None:
    written = TEXT.split("## What nurture does not have")[0]
    assert len(ROWS) > 70
    assert len(ROWS) == sum(line.startswith("| ") for line in written.splitlines()) - written.count(
        "| there |"
    )
    known = {key for kind in ANY for key in defaults(kind)}
    dotted = set(re.findall(r"`(\w+\.\w+)(?:: \w+)?`", TEXT)) - {"metrics.jsonl"}
    assert dotted <= known, dotted - known
