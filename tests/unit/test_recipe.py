"""Typed YAML: values as people mean them, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from nurture.errors import NurtureError
from nurture.recipe import (
    Count,
    Document,
    Minutes,
    Section,
    apply_overrides,
    check,
    parse_count,
    parse_document,
    parse_minutes,
    read_document,
)
from nurture.stages import STAGES, stage_module


class Optimizer(Section):
    learning_rate: float = 1e-3
    """Peak."""


class Phase(Section):
    until: float
    """Share of the steps."""
    weights: dict[str, float] = {}


class Plan(Section):
    layers: int
    """How many blocks."""
    family: Literal["llama", "qwen3"] = "llama"
    tokens: Count = 10
    minutes: Minutes | None = None
    packed: bool = True
    optimizer: Optimizer = Optimizer()
    phases: list[Phase] = []
    named: dict[str, Optimizer] = {}


def problems_of(text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    document = parse_document(text, "r.yaml")
    apply_overrides(document, overrides, {}, Plan.model_fields)
    check(Plan, document)
    with pytest.raises(NurtureError) as failure:
        document.raise_problems()
    return str(failure.value).splitlines()


def plan_of(text: str, overrides: tuple[str, ...] = ()) -> Plan:
    document = parse_document(text, "r.yaml")
    apply_overrides(document, overrides, {"opt": ("optimizer",)}, Plan.model_fields)
    plan = check(Plan, document)
    document.raise_problems()
    assert plan is not None
    return plan


def test_values_are_what_people_mean():
    document = parse_document(
        "a: 1e-3\nb: no\nc: 010\nd: 1_000\ne: true\nf: .5\ng: ~\nh: 0x10\ni: 12:30\nj: 1.5e3", "r"
    )
    assert document.data == {
        "a": 0.001,
        "b": "no",
        "c": 10,
        "d": 1000,
        "e": True,
        "f": 0.5,
        "g": None,
        "h": 16,
        "i": "12:30",
        "j": 1500.0,
    }


def test_keys_stay_words():
    assert parse_document("data: {no: x, 1: y, on: z}", "r").data == {
        "data": {"no": "x", "1": "y", "on": "z"}
    }


@pytest.mark.parametrize(
    ("text", "count"),
    [("10M", 10_000_000), ("2.5B", 2_500_000_000), ("4k", 4000), ("4Ki", 4096), ("1e6", 1_000_000)],
)
def test_counts(text: str, count: int):
    assert parse_count(text) == count
    assert plan_of(f"layers: 1\ntokens: {text}").tokens == count


@pytest.mark.parametrize(
    ("text", "minutes"), [("90s", 1.5), ("10m", 10.0), ("2h", 120.0), ("3", 3.0), ("1d", 1440.0)]
)
def test_minutes(text: str, minutes: float):
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize(
    ("text", "words"),
    [("ten", "should be a count"), ("4kk", "should be a count"), ("1.0005k", "whole number")],
)
def test_not_a_count(text: str, words: str):
    assert words in problems_of(f"layers: 1\ntokens: {text}")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: 1\nfamly: llama", "r.yaml:2: key 'famly': unknown key. Did you mean 'family'?"),
        ("layers: 1\nzzz: 1", "r.yaml:2: key 'zzz': unknown key. Known keys: family, layers, minutes,"),
        ("layers: 1\nlearning_rate: 1", "r.yaml:2: key 'learning_rate': unknown key. Did you mean 'optimizer.learning_rate'?"),
        ("layers: 1\noptimizer:\n  lerning_rate: 1", "r.yaml:3: key 'optimizer.lerning_rate': unknown key. Did you mean 'learning_rate'?"),
        ("layers: 1\nnamed: {x: {lerning_rate: 1}}", "r.yaml:2: key 'named.x.lerning_rate': unknown key. Did you mean 'learning_rate'?"),
        ("layers: many", "r.yaml:1: key 'layers': should be a valid integer, got 'many'."),
        ("layers: true", "r.yaml:1: key 'layers': should be a valid integer, got 'true'."),
        ("layers: 1.5", "r.yaml:1: key 'layers': should be a valid integer"),
        ("layers: [1]", "r.yaml:1: key 'layers': should be a valid integer, got [1]."),
        ("family: llama", "r.yaml:1: key 'layers': is required and missing: How many blocks."),
        ("layers: 1\nfamily: lama", "r.yaml:2: key 'family': should be 'llama' or 'qwen3', got 'lama'. Did you mean 'llama'?"),
        ("layers: 1\noptimizer: fast", "r.yaml:2: key 'optimizer': should be a section of 'key: value' lines or one of its settings, such as optimizer.learning_rate=0.001, got 'fast'."),
        ("layers: 1\noptimizer: {learning_rate: .nan}", "r.yaml:2: key 'optimizer.learning_rate': should be a finite number"),
        ("layers: 1\nlayers: 2", "r.yaml:2: key 'layers': given twice, first on line 1. Keep one of them."),
        ("layers: 1\nphases:\n - {weights: {a: 1}}", "r.yaml:3: key 'phases.0.until': is required and missing: Share of the steps."),
        ("layers: 1\nphases:\n - until: 1\n   weights: {a: b}", "r.yaml:4: key 'phases.0.weights.a': should be a valid number, got 'b'."),
        ("layers: 1\nminutes: soon", "r.yaml:2: key 'minutes': should be minutes, or a duration such as 90s, 10m or 2h, got 'soon'."),
        ("layers: ${NURTURE_TEST_UNSET}", "r.yaml:1: key 'layers': the environment variable NURTURE_TEST_UNSET is not set."),
        ("layers: !!python/name:os.system 1", "r.yaml:1: key 'layers': the tag"),
        ("? [a, b]\n: 1", "r.yaml:1: key '?': a key should be a single word"),
        ("layers: 1\nnamed: &x\n  y: *x", "r.yaml:3: key 'named.y': an alias inside its own anchor"),
    ],
)  # fmt: skip
def test_a_mistake_names_line_key_and_remedy(text: str, message: str):
    assert any(line.startswith(message) for line in problems_of(text)), problems_of(text)


def test_all_mistakes_are_listed_in_the_order_of_the_file():
    lines = problems_of(
        "layers: x\nfamly: 1\noptimizer:\n  learning_rate: fast\ntokens: few", ("minutes=soon",)
    )
    assert [line.split(" key ")[0] for line in lines] == [
        "r.yaml:1:",
        "r.yaml:2:",
        "r.yaml:4:",
        "r.yaml:5:",
        "override 'minutes=soon':",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [1", "r.yaml:1: not valid YAML:"),
        ("layers: 1\n  family: x", "r.yaml:2: not valid YAML:"),
        ("a:\n  - b: 1\n   c: 2", "r.yaml:3: not valid YAML: this line does not stand in line with those"),
        ("layers: 1\n\tfamily: x", "r.yaml:2: not valid YAML: a tab. Indent with spaces."),
        ("a: *nothing", "r.yaml:1: not valid YAML: found undefined alias 'nothing'"),
        ("a: 1\n---\nb: 1", "r.yaml:2: not valid YAML:"),
        ("", "r.yaml: is empty"),
        ("- a\n- b", "r.yaml:1: expected 'key: value' lines"),
        ("a: \x01", "r.yaml: not valid YAML:"),
    ],
)
def test_what_is_not_yaml_names_the_line(text: str, message: str):
    with pytest.raises(NurtureError) as failure:
        parse_document(text, "r.yaml")
    assert str(failure.value).startswith(message)


def test_overrides_are_values_of_yaml():
    plan = plan_of(
        "layers: 1\nphases: [{until: 0.5}]",
        (
            "layers=7",
            "optimizer.learning_rate=3e-4",
            "packed=false",
            "phases.0.until=1",
            "tokens=2M",
            "minutes=90s",
        ),
    )
    assert (plan.layers, plan.optimizer.learning_rate, plan.packed) == (7, 3e-4, False)
    assert (plan.phases[0].until, plan.tokens, plan.minutes) == (1.0, 2_000_000, 1.5)


def test_override_through_a_root_and_of_a_whole_section():
    assert plan_of("layers: 1", ("opt.learning_rate=2",)).optimizer.learning_rate == 2.0
    assert plan_of("layers: 1", ("phases=[{until: 1, weights: {a: 1}}]",)).phases[0].weights == {"a": 1.0}
    assert plan_of("layers: 1\nminutes: 3", ("minutes=",)).minutes is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lerning_rate=1", "override 'optimizer.lerning_rate=1': key 'optimizer.lerning_rate': unknown key. Did you mean 'learning_rate'?"),
        ("optimiser.learning_rate=1", "override 'optimiser.learning_rate=1': nothing in r.yaml is called 'optimiser'. Did you mean 'optimizer'?"),
        ("layers=x", "override 'layers=x': key 'layers': should be a valid integer, got 'x'."),
        ("layers.deep=1", "override 'layers.deep=1': key 'layers.deep': 'layers' is a single value here, it has no 'deep' inside"),
        ("phases.3.until=1", "override 'phases.3.until=1': key 'phases.3.until': '3' is not a place in a list of 1 (they count from 0)"),
        ("optimizer.learning_rate=[1", "override 'optimizer.learning_rate=[1': key 'optimizer.learning_rate': the value is not valid YAML:"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(override: str, message: str):
    assert problems_of("layers: 1\nphases: [{until: 1}]", (override,))[0].startswith(message)


@pytest.mark.parametrize("override", ["layers", "=3"])
def test_an_override_without_key_or_value(override: str):
    with pytest.raises(NurtureError, match="expected key=value"):
        apply_overrides(Document("r.yaml"), [override], {}, ["layers"])


def test_environment_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NURTURE_TEST", "there")
    data = parse_document(
        "a: ${NURTURE_TEST}/x\nb: ${NURTURE_TEST_UNSET:-here}\nc: ${NURTURE_STDLIB}/os.py", "r"
    ).data
    assert (data["a"], data["b"]) == ("there/x", "here")
    assert Path(data["c"]).is_file()


def test_files_that_are_none(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text("a: 1")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("tinny.yaml", "tinny.yaml: no such file. Did you mean 'tiny.yaml'?"),
        (".", "is a folder, expected a recipe file"),
        ("binary.yaml", "is not UTF-8 text (byte 0)"),
    ):
        with pytest.raises(NurtureError) as failure:
            read_document(tmp_path / name)
        assert message in str(failure.value)


class Rate(Section):
    """A nested section with defaults of its own."""

    chosen_by: ClassVar[str | None] = "kind"
    same_in_other_words: ClassVar[tuple[str, ...]] = ("share", "steps")

    kind: str = "plain"
    peak: float = 1.0
    share: float = 0.1
    steps: int | None = None
    final: float = 0.0


class Stage(Section):
    """A stage that has other defaults for it."""

    rate: Rate = Rate(peak=0.5, steps=5)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, Rate(peak=0.5, steps=5)),
        ({"final": 0.3}, Rate(peak=0.5, steps=5, final=0.3)),
        ({"peak": 0.2}, Rate(peak=0.2, steps=5)),
        ({"kind": "plain", "final": 0.3}, Rate(peak=0.5, steps=5, final=0.3)),
        ({"kind": "other"}, Rate(kind="other")),
        ({"share": 0.2}, Rate(peak=0.5, share=0.2)),
    ],
)
def test_one_key_of_a_nested_section_leaves_the_stages_defaults_for_the_others(
    given: dict[str, Any], meant: Rate
) -> None:
    assert Stage.model_validate({"rate": given}).rate == meant


def test_every_stages_own_defaults_survive_a_single_key() -> None:
    sections = 0
    for kind in STAGES:
        config = stage_module(kind).Config
        for name, info in config.model_fields.items():
            if not isinstance(info.default, Section):
                continue
            sections += 1
            decided = {info.default.chosen_by, *info.default.same_in_other_words}
            key = next(key for key in type(info.default).model_fields if key not in decided)
            given = config._own_defaults_under_nested_sections({name: {key: getattr(info.default, key)}})
            assert type(info.default).model_validate(given[name]) == info.default, (kind, name)
    assert sections > 20
