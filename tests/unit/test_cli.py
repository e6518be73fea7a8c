"""The command line as a user meets it: what they see, the exit codes, and never a traceback."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nurture import cli
from nurture.doctor import Finding
from nurture.errors import NurtureError
from nurture.stages import STAGES, stage_module

pytestmark = pytest.mark.usefixtures("fake_stages")

RECIPE = "name: trial\nstages:\n  - kind: grow\n    start: base\n  - kind: polish\n"


@pytest.fixture
def here(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.yaml").write_text(RECIPE)
    return tmp_path


class Nurture:
    """Calls `nurture` in this process; `code`, `out` and `err` of the last call."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *words: str) -> Nurture:
        self.monkeypatch.setattr(sys, "argv", ["nurture", *words])
        self.code = 0
        try:
            cli.main()
        except SystemExit as end:
            self.code = int(end.code or 0)
        self.out, self.err = self.capsys.readouterr()
        assert "Traceback" not in self.out + self.err
        return self


@pytest.fixture
def nurture(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Nurture:
    return Nurture(capsys, monkeypatch)


def test_a_run_ends_with_a_table_and_what_to_do_next(here: Path, nurture: Nurture):
    done = nurture("run", "trial.yaml")
    assert done.code == 0, done.err
    assert "before and after" in done.out
    assert "10.0 %" in done.out
    assert "90.0 %" in done.out
    assert "nurture chat runs/trial/02-polish" in done.out
    assert "Nothing to run" in nurture("run", "trial.yaml").out
    assert "settings (grow.steps=2) go with a recipe" in nurture("run", "runs/trial", "grow.steps=2").err
    assert "nurture chat 'my runs/a/02-polish'" in nurture("run", "trial.yaml", "--out", "my runs/a").out


def test_report_json_is_the_shape_of_the_design(here: Path, nurture: Nurture):
    nurture("run", "trial.yaml")
    report = json.loads(nurture("report", "runs/trial", "--json").out)
    assert list(report) == ["run", "seconds", "stages"]
    assert report["run"] == "trial"
    stage = report["stages"][1]
    assert list(stage) == ["name", "kind", "seconds", "tokens", "metrics"]
    assert stage["metrics"]["format"]["after"] == 0.9


def test_report_writes_a_page_and_takes_several_runs(here: Path, nurture: Nurture):
    nurture("run", "trial.yaml")
    nurture("run", "trial.yaml", "--out", "runs/again")
    done = nurture("report", "runs/trial", "runs/again", "--html", "page.html", "--json")
    assert done.code == 0, done.err
    assert "wrote page.html" in done.err
    assert json.loads(done.out)["run"] == "trial, again"
    assert "2 runs" in (here / "page.html").read_text()
    assert nurture("report", "runs/trial", "runs/none").code == 1


def test_superficial_says_what_it_needs(here: Path, nurture: Nurture):
    nurture("run", "trial.yaml")
    assert "needs a base model and an sft stage" in nurture("superficial", "runs/trial").err
    assert "Did you mean 'questions'" in nurture("superficial", "runs/trial", "question=3").err


def test_status_tells_what_would_run_and_why(here: Path, nurture: Nurture):
    nurture("run", "trial.yaml", "--until", "grow")
    assert "has not run yet" in nurture("status", "trial.yaml").out
    rows = json.loads(nurture("status", "trial.yaml", "grow.steps=9", "--json").out)["stages"]
    assert [row["status"] for row in rows] == ["stale", "new"]
    assert rows[0]["reason"] == "steps 3 -> 9"
    rows = json.loads(nurture("status", "runs/trial", "--json", "--verify").out)["stages"]
    assert [row["status"] for row in rows] == ["fresh", "new"]


def test_a_stage_has_a_command_of_its_own(here: Path, nurture: Nurture, monkeypatch: pytest.MonkeyPatch):
    (here / "notes.txt").write_text("text")
    recipe = cli.stage_recipe("polish", model="base", data=["notes.txt", "more=*.txt"], settings=["steps=5"])
    config = recipe.stages[0]
    assert (config.data, config.steps) == ({"notes": "notes.txt", "more": "*.txt"}, 5)  # type: ignore[attr-defined]
    assert recipe.name == f"polish-{here.name}-base-notes-more"
    assert recipe.starts["polish"] == here / "base"
    done = nurture("polish", "--model", "base", "--data", "notes.txt", "steps=5", "--out", "here")
    assert done.code == 0, done.err
    assert (here / "here" / "01-polish" / "model" / "model.safetensors").read_text() == "weights+polish"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("books/**/*.txt", "books"),
        ("notes.txt", "notes"),
        ("web.jsonl.gz", "web"),
        ("world:web", "web"),
        ("world:tasks:fact,code", "tasks"),
        ("hf:org/some-name:en", "some-name"),
        ("*.txt", "text"),
        ("../*/x.txt", "x"),
    ],
)
def test_sources_are_named_after_what_they_are(spec: str, name: str):
    assert cli._named_sources([spec]) == {name: spec}


def test_sources_of_one_name_are_told_apart():
    assert list(cli._named_sources(["a/x.txt", "b/x.txt", "c=d"])) == ["x", "x2", "c"]


@pytest.mark.parametrize(
    ("minutes", "preset"), [(None, "3m"), ("2", "1m"), ("90s", "1m"), ("1h", "10m"), ("2d", "30m")]
)
def test_a_new_model_fits_its_minutes(minutes: str | None, preset: str):
    data: dict = {"stages": [{}]}
    cli._fresh_model(data, minutes, [])
    assert data["model"] == {"preset": preset}
    cli._fresh_model(
        own := {"stages": [{}]}, minutes, ["model.layers=3", "tokenizer.vocab_size=300", "steps=3"]
    )
    assert own == {"stages": [{}]}


BAD = [
    (["run", "missing.yaml"], 1, ["missing.yaml: no such file"]),
    (["run", "tiiny"], 1, ["none of nurture's own recipes is called that", "Did you mean 'tiny'?"]),
    (["run", "syntax.yaml"], 1, ["syntax.yaml:2: not valid YAML"]),
    (["run", "trial.yaml", "grow.stepz=1"], 1, ["override 'grow.stepz=1'", "key 'grow.stepz'", "Did you mean 'steps'?"]),
    (["run", "trial.yaml", "grow"], 1, ["expected one recipe and settings written key=value", "'grow'"]),
    (["run", "trial.yaml", "--until", "pollish"], 1, ["--until pollish", "Did you mean 'polish'?"]),
    (["run", "trial.yaml", "--out", "trial.yaml"], 1, ["trial.yaml: a file is in the way of a folder", "--out"]),
    (["run", "trial.yaml", "--untl", "x"], 2, ["No such option: --untl"]),
    (["rnu"], 2, ["No such command 'rnu'"]),
    (["status", "base"], 1, ["base: is not a run"]),
    (["status", "base", "seed=3"], 1, ["settings (seed=3) go with a recipe"]),
    (["report", "nowhere"], 1, ["nowhere: there is no such run"]),
    (["report", "base"], 1, ["base: no stage has finished here. It is not a run's folder"]),
    (["tay", "base", "--out", "base"], 1, ["--out base: this is a folder"]),
    (["report"], 2, ["Missing argument 'RUN'"]),
    (["polish", "--data", "*.yaml"], 1, ["nurture polish needs --model PATH"]),
    (["sft", "--model", "base"], 1, ["nurture sft needs --data SPEC"]),
    (["ppo", "--model", "base", "--data", "world:tasks"], 1, ["nurture ppo: key 'reward_model': is required and missing"]),
    (["polish", "--model", "nowhere/at/all", "--data", "*.yaml"], 1, ["--model: key 'start'", "there is no such checkpoint"]),
    (["polish", "--model", "trial.yaml", "--data", "*.yaml"], 1, ["--model: key 'start'", "trial.yaml: is a file, expected a checkpoint"]),
    (["polish", "--model", "base", "--data", "*.txt"], 1, ["--data: key 'data.text'", "no file matches"]),
    (["polish", "--model", "base", "--data", "*.yaml", "stepz=3"], 1, ["override 'stepz=3'", "Did you mean 'steps'?"]),
    (["polish", "--model", "base", "--data", "*.yaml", "steps=x"], 1, ["override 'steps=x': key 'steps': should be a valid integer"]),
    (["polish", "--model", "base", "--data", "*.yaml", "--minutes", "3"], 1, ["polish has no time budget"]),
    (["chat", "nowhere"], 1, ["nowhere: no such model directory"]),
    (["chat", "empty"], 1, ["empty: no model here"]),
    (["eval", "base", "--tasks", "fcat"], 1, ["there is no kind of task 'fcat'", "Did you mean 'fact'?"]),
    (["eval", "base", "--tasks", "fact", "--data", "x.jsonl"], 1, ["--data brings others: give one of them"]),
    (["eval", "base", "--judge", "words.txt"], 1, ["--judge goes with --data FILE"]),
    (["report", "runs/old/01-grow"], 1, ["no stage has finished here. It is in the run runs/old: report that"]),
    (["report", "runs"], 1, ["It is not a run's folder; in it are runs/old."]),
    (["run", "runs/nope"], 1, ["runs/nope: there is no such recipe file or run"]),
    (["label", "base", "--prompts", "nope.jsonl"], 1, ["nope.jsonl: no such file"]),
    (["label", "base", "--prompts", "world:web"], 1, ["these are documents, without prompts; world:tasks has some"]),
    (["show-mask", "world:web", "--tokenizer", "base"], 1, ["no conversation in its first 10,000 rows"]),
    (["eval", "nowhere"], 1, ["nowhere: there is no such checkpoint folder"]),
    (["eval", "empty"], 1, ["empty: is not a checkpoint, there is no config.json in it"]),
    (["eval", "trial.yaml"], 1, ["trial.yaml: is a file, expected a checkpoint folder"]),
    (["world", "wbe"], 1, ["Did you mean 'web'?"]),
    (["world", "web", "--split", "test"], 1, ["should be train or heldout"]),
    (["plan", "--price", "-4"], 2, ["Invalid value for '--price'"]),
    (["world", "web", "--count", "0"], 2, ["Invalid value for '--count'"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "parts"), BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_bad_input_is_one_clear_message(
    here: Path, nurture: Nurture, words: list[str], code: int, parts: list[str]
):
    (here / "syntax.yaml").write_text("name: x\nstages: [")
    (here / "empty").mkdir()
    (here / "runs" / "old" / "01-grow").mkdir(parents=True)
    (here / "runs" / "old" / "run.json").write_text("{}")
    result = nurture(*words)
    assert result.code == code
    message = " ".join(result.err.replace("│", " ").split())
    for part in parts:
        assert part in message
    assert result.out == ""


def test_a_whole_run_is_not_a_checkpoint_and_its_stages_are_named(here: Path, nurture: Nurture):
    nurture("run", "trial.yaml")
    assert (
        "It is a whole run: choose one of its stages (01-grow, 02-polish)"
        in nurture("eval", "runs/trial").err
    )
    assert "is a stage. Name its run" in nurture("label", "runs/trial/02-polish").err


def test_a_bug_is_one_line_and_a_log_file(here: Path, nurture: Nurture, monkeypatch: pytest.MonkeyPatch):
    import fake_stage

    def broken(config: object, context: object) -> None:
        raise ZeroDivisionError("a bug\nof two lines")

    monkeypatch.setattr(fake_stage, "run", broken)
    result = nurture("run", "trial.yaml")
    assert result.code == 70
    assert result.err.startswith("this is a bug in nurture: ZeroDivisionError: a bug (details in ")
    log = Path(result.err.split("details in ")[1].strip().rstrip(")"))
    assert "Traceback" in log.read_text()
    log.unlink()
    monkeypatch.setenv("NURTURE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        nurture("run", "trial.yaml")


def test_masks_are_shown_as_they_are_trained(here: Path, nurture: Nurture):
    """In the row's own mode, and in parts where the template drops thoughts: what is green carries the loss."""
    from nurture.tokenizer import Tokenizer

    Tokenizer.train(["What is 1+1? one and two 4"] * 3, 280).with_chat_template().save(here / "tokens")
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    ]
    for thinking, parts, trained in ((True, 2, "two and two"), (False, 1, "2<|im_end|>")):
        row = {"messages": turns, "chat_template_kwargs": {"enable_thinking": thinking}}
        (here / "chats.jsonl").write_text(json.dumps(row) + "\n")
        said = nurture("show-mask", "chats.jsonl", "--tokenizer", "tokens").out
        assert said.count("tokens trained") == parts
        assert f"Reasoning Mode: {'/think' if thinking else '/no_think'}" in said
        assert ("two and two" in said) == thinking
        assert trained in said


def test_keys_lists_settings_with_meaning(nurture: Nurture):
    lines = [" ".join(line.split()) for line in nurture("polish", "--keys").out.splitlines()]
    assert "│ learning_rate │ 0.1 │ Step size. │" in lines
    assert "│ schedule.decay │ 0.1 │ Share of the steps. │" in lines


@pytest.mark.parametrize("kind", STAGES)
def test_every_setting_of_every_stage_says_what_it_means(kind: str):
    settings = {key: meaning for key, _, meaning in cli._keys(stage_module(kind).Config) if key != "kind"}
    assert [key for key, meaning in settings.items() if not meaning] == []
    if "lora" in settings:
        assert "lora.rank" in settings  # also what stands inside a section that may be left out


@pytest.mark.parametrize(
    ("kind", "key", "default"),
    [
        ("sft", "optimizer.learning_rate", "0.0005"),  # the stage's own default of a section it shares
        ("grpo", "loss.clip_high", "0.28"),
        ("ppo", "loss.loss_type", "ppo"),
        ("dpo", "loss", "dpo"),  # the kind's
        ("preference", "loss", "apo_zero"),
        ("sft", "data", "required"),
    ],
)
def test_keys_shows_the_defaults_that_the_stage_has(nurture: Nurture, kind: str, key: str, default: str):
    lines = ["".join(line.split()) for line in nurture(kind, "--keys").out.splitlines()]
    assert any(line.startswith(f"│{key}│{default}│") for line in lines)


@pytest.mark.parametrize(
    ("setting", "full"),
    [
        ("learning_rate=1e-4", "optimizer.learning_rate"),
        ("save_every=5", "loop.save_every"),
        ("rank=4", "lora.rank"),
    ],
)
def test_a_setting_without_its_section_is_named_in_full(setting: str, full: str):
    with pytest.raises(NurtureError, match=f"no setting '{setting.split('=')[0]}'. Did you mean '{full}'"):
        cli.stage_recipe("sft", model="nowhere", data=["x=world:tasks"], settings=[setting])


@pytest.mark.parametrize("kind", STAGES)
def test_the_settings_of_a_stages_examples_exist(kind: str):
    known = [key for key, _, _ in cli._keys(stage_module(kind).Config)]
    for example in STAGES[kind].examples:
        words = [word for word in shlex.split(example) if re.match(r"[a-z_.]+=", word)]
        for key in (word.split("=")[0] for word in words):
            open_ended = key.split(".")[0] in ("model", "environment", "without", "web", "code")
            assert open_ended or key in known, f"{example}: {key}"


@pytest.mark.parametrize("command", [[], *([name] for name in ("run", "status", "report", "recipes", "pretrain", "sft", "chat", "eval", "show-mask", "world", "doctor", "tay", "superficial", "sweep", "plan", "serve", "play", "label")), ["env", "serve"]])  # fmt: skip
def test_every_command_has_help_with_an_example(nurture: Nurture, command: list[str]):
    result = nurture(*command, "--help")
    assert result.code == 0
    assert "Examples" in result.out
    assert f"nurture {' '.join(command)}".strip() in result.out


def test_brackets_in_what_is_shown_stay(nurture: Nurture, monkeypatch: pytest.MonkeyPatch, here: Path):
    """A terminal library that reads markup would eat `[plot]`."""
    monkeypatch.setattr("nurture.doctor.examine", lambda: [Finding("x", "[a]", False, "pip 'nurture[plot]'")])
    assert {"[a]", "'nurture[plot]'"} <= set(nurture("doctor").out.split())
    assert "runs/[b]" in nurture("run", "trial.yaml", "--out", "runs/[b]").out
    assert "runs/[b]" in nurture("status", "trial.yaml", "--out", "runs/[b]").out


def test_recipes_lists_and_prints(nurture: Nurture):
    assert "tiny" in nurture("recipes").out
    assert nurture("recipes", "tiny").out.startswith("# The default")
    lines = nurture("recipes").out.splitlines()
    assert lines
    assert all(line.endswith(".") for line in lines)  # whole sentences


def test_a_closed_pipe_is_not_an_error(tmp_path: Path):
    repository = Path(cli.__file__).parent.parent
    for words in ("recipes tiny", "recipes", "world web --count 200"):  # little, by rich, much
        command = f"set -o pipefail; {sys.executable} -m nurture {words} | true"
        shell = ["bash", "-c", command]
        done = subprocess.run(shell, cwd=repository, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
