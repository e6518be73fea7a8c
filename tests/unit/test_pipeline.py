"""What runs again and what does not; what is kept; and every mistake in a recipe named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nurture import pipeline
from nurture.errors import NurtureError
from nurture.stages.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("fake_stages")

RECIPE = """\
name: trial
seed: 1
stages:
  - kind: grow
    start: base
    learning_rate: 0.1
    data: {text: "*.txt"}
  - kind: polish
    steps: 2
  - name: branch
    kind: polish
    start: grow
"""


@pytest.fixture
def recipe_file(tmp_path: Path, checkpoint: Path) -> Path:
    (tmp_path / "one.txt").write_text("text")
    path = tmp_path / "trial.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def run(recipe_file: Path, out: Path, *overrides: str, **how: object) -> tuple[str, ...]:
    return pipeline.run(load_recipe(recipe_file, overrides), out, say=lambda line: None, **how).ran  # type: ignore[arg-type]


def statuses(recipe_file: Path, out: Path, *overrides: str) -> dict[str, str]:
    return {step.name: step.status for step in pipeline.plan(load_recipe(recipe_file, overrides), out)}


def weights(out: Path, folder: str) -> str:
    return (out / folder / "model" / "model.safetensors").read_text()


def steps_run(out: Path, folder: str) -> list[int]:
    return [json.loads(line)["step"] for line in (out / folder / "metrics.jsonl").read_text().splitlines()]


# --- fresh and stale ------------------------------------------------------------------------------------------------


def test_a_run_makes_what_the_design_says_and_a_second_call_runs_nothing(recipe_file: Path, out: Path):
    assert run(recipe_file, out) == ("grow", "polish", "branch")
    assert weights(out, "02-polish") == "weights+grow+polish"
    assert weights(out, "03-branch") == "weights+grow+branch"
    stage = out / "01-grow"
    result = json.loads((stage / "result.json").read_text())
    assert list(result) == ["name", "kind", "seconds", "tokens", "metrics"]
    assert (result["name"], result["kind"], result["tokens"]) == ("grow", "grow", 3000)
    manifest = json.loads((stage / "manifest.json").read_text())
    assert {"model/model.safetensors", "stage.yaml", "result.json", "metrics.jsonl"} <= set(manifest["files"])
    assert not (stage / "state").exists()
    assert "learning_rate: 0.1" in (stage / "stage.yaml").read_text()
    before = (stage / "manifest.json").stat().st_mtime_ns
    assert run(recipe_file, out) == ()
    assert (stage / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("override", "ran"),
    [
        ("branch.learning_rate=1", ("branch",)),
        ("polish.schedule.decay=0.5", ("polish",)),
        ("grow.steps=4", ("grow", "polish", "branch")),
        ("seed=2", ("grow", "polish", "branch")),
        ("polish.log_every=99", ()),  # changes nothing of the result
        ("polish.learning_rate=0.1", ()),  # what it was anyway
        ("name=other", ()),  # the folder was given
    ],
)
def test_a_changed_setting_runs_its_stage_and_what_depends_on_it(
    recipe_file: Path, out: Path, override: str, ran: tuple[str, ...]
):
    run(recipe_file, out)
    assert run(recipe_file, out, override) == ran
    assert run(recipe_file, out, override) == ()


def test_changed_data_runs_again(recipe_file: Path, out: Path):
    run(recipe_file, out)
    (recipe_file.parent / "two.txt").write_text("more text")
    assert run(recipe_file, out) == ("grow", "polish", "branch")


@pytest.mark.parametrize("key", ["prompts", "beside.texts.more"])
def test_data_outside_sources_and_data_are_checked_and_count(recipe_file: Path, out: Path, key: str):
    override = f"polish.{key}=asked.txt"
    with pytest.raises(NurtureError, match=rf"key 'polish\.{key}': .*asked\.txt: no such file"):
        load_recipe(recipe_file, [override])
    asked = recipe_file.parent / "sub" / "asked.txt"
    asked.parent.mkdir()
    asked.write_text("a")
    override = f"polish.{key}=sub/asked.txt"
    run(recipe_file, out, override)
    assert run(recipe_file, out, override) == ()
    asked.write_text("changed")
    steps = pipeline.plan(load_recipe(recipe_file, [override]), out)
    assert {step.name: step.reason for step in steps}["polish"] == f"{key} changed"
    assert run(recipe_file, out, override) == ("polish",)
    with pytest.raises(NurtureError, match="'stage:branch': no earlier stage"):
        load_recipe(recipe_file, [f"polish.{key}=stage:branch"])


def test_no_stage_has_data_that_is_not_declared_so():
    from nurture.data.sources import DataSpec
    from nurture.stages import STAGES, stage_module
    from nurture.stages.recipe import data_specs

    sft, text, pairs = {"replay": {"b": "b.txt"}}, {"decontaminate": "b.txt"}, {"prompts": "b.txt"}
    ppo = {"ptx": {"sources": {"b": "b.txt"}}, "reward_model": "r", "steps": 1}
    further = {"sft": sft, "reason": sft, "pretrain": text, "extend": text, "preference": pairs, "dpo": pairs}
    further |= {"prepare": {"without": {"b": "b.txt"}}, "ppo": ppo, "merge": {**pairs, "models": ["a"]}}
    further["grpo"] = {"steps": 1}
    for kind in STAGES:
        config_class = stage_module(kind).Config
        # A mapping of names to plain strings is data that was forgotten.
        assert not any(info.annotation == dict[str, str] for info in config_class.model_fields.values()), kind
        key = "sources" if "sources" in config_class.model_fields else "data"
        config = config_class(**{"name": "x", "kind": kind, key: {"a": "a.txt"}, **further.get(kind, {})})
        found = [spec for _, spec in data_specs(config)]
        assert found.count(DataSpec("b.txt")) == ("b.txt" in str(further.get(kind))), kind


@pytest.mark.parametrize("prompts", ["world:tasks", "world:tasks:fact,redteam"])
def test_world_data_outside_sources_and_data_leave_a_finished_run_as_it_was(recipe_file: Path, prompts: str):
    steps = pipeline.plan(load_recipe(recipe_file, [f"polish.prompts={prompts}"]), recipe_file.parent / "run")
    assert "files" not in steps[1].inputs


def test_a_changed_checkpoint_runs_again(recipe_file: Path, out: Path, checkpoint: Path):
    run(recipe_file, out)
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    assert run(recipe_file, out) == ("grow", "polish", "branch")


def test_changed_code_of_a_stage_runs_again(recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    import fake_stage

    run(recipe_file, out)
    monkeypatch.setattr(fake_stage, "VERSION", 2)
    assert len(run(recipe_file, out)) == 3


def test_a_reference_to_another_stage_is_an_input(recipe_file: Path, out: Path):
    judged = ("branch.judge=polish",)
    run(recipe_file, out, *judged)
    assert run(recipe_file, out, *judged, "polish.steps=5") == ("polish", "branch")


def test_data_that_an_earlier_stage_wrote_is_an_input(
    recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    import fake_stage

    seen: list[dict[str, str]] = []
    plain = fake_stage.run
    monkeypatch.setattr(
        fake_stage, "run", lambda config, context: (seen.append(config.data), plain(config, context))
    )
    spec = "branch.data={rows: stage:grow/metrics.jsonl, more: 'stage:polish,*.txt'}"
    assert run(recipe_file, out, spec) == ("grow", "polish", "branch")
    assert seen[-1] == {
        "rows": str(out.resolve() / "01-grow/metrics.jsonl"),
        "more": f"{out.resolve() / '02-polish/rows.jsonl'},*.txt",
    }
    assert run(recipe_file, out, spec) == ()
    assert run(recipe_file, out, spec, "polish.steps=4") == ("polish", "branch")


@pytest.mark.parametrize(
    ("name", "message"), [("polis", "Did you mean 'polish'"), ("branch", "no earlier stage is called that")]
)
def test_data_of_a_stage_that_is_not_there_is_named(recipe_file: Path, name: str, message: str):
    with pytest.raises(NurtureError, match=message):
        load_recipe(recipe_file, [f"branch.data={{rows: stage:{name}}}"])


def test_a_stage_that_makes_no_policy_is_passed_over_as_a_start(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
):
    from nurture import stages

    monkeypatch.setitem(stages.STAGES, "polish", stages.StageKind("fake_stage", "A fake.", continues=False))
    text = recipe_file.read_text().replace("    start: grow\n", "")
    recipe_file.write_text(text)
    assert load_recipe(recipe_file).starts["branch"] == "grow"


def test_until_from_and_force(recipe_file: Path, out: Path):
    assert run(recipe_file, out, until="grow") == ("grow",)
    assert run(recipe_file, out, until="polish") == ("polish",)
    assert run(recipe_file, out, from_stage="branch") == ("branch",)
    assert run(recipe_file, out, from_stage="grow") == ("grow", "polish", "branch")
    assert run(recipe_file, out, force=True, until="polish") == ("grow", "polish")


def test_equal_settings_with_another_outcome_run_what_was_made_from_the_old_one(
    recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    import fake_stage

    run(recipe_file, out)
    run(recipe_file, out, from_stage="grow", until="grow")
    assert run(recipe_file, out) == ()  # made again, the same to the byte
    original = fake_stage.run

    def elsewhere(config: fake_stage.Config, context: fake_stage.StageContext) -> None:
        original(config, context)
        (context.directory / "model" / "model.safetensors").write_text("other hardware, other bits")

    monkeypatch.setattr(fake_stage, "run", elsewhere)
    run(recipe_file, out, from_stage="grow", until="grow")
    monkeypatch.setattr(fake_stage, "run", original)
    assert run(recipe_file, out) == ("polish", "branch")


@pytest.mark.parametrize("option", ["until", "from_stage"])
def test_until_and_from_name_the_nearest_stage(recipe_file: Path, out: Path, option: str):
    with pytest.raises(NurtureError, match=r"has no stage 'polsh'. Did you mean 'polish'\?"):
        run(recipe_file, out, **{option: "polsh"})


def test_a_deleted_or_damaged_stage_is_made_again_with_what_depends_on_it(recipe_file: Path, out: Path):
    run(recipe_file, out)
    (out / "02-polish" / "model" / "model.safetensors").unlink()
    assert statuses(recipe_file, out) == {"grow": "fresh", "polish": "damaged", "branch": "fresh"}
    assert run(recipe_file, out) == ("polish",)
    import shutil

    shutil.rmtree(out / "01-grow")
    assert run(recipe_file, out) == ("grow", "polish", "branch")


def test_verify_finds_changed_bytes(recipe_file: Path, out: Path):
    run(recipe_file, out)
    path = out / "02-polish" / "model" / "model.safetensors"
    path.write_text(path.read_text().replace("polish", "POLISH"))
    steps = pipeline.plan(load_recipe(recipe_file), out, checksums=True)
    assert [step.status for step in steps] == ["fresh", "damaged", "fresh"]
    assert "checksum differs" in steps[1].reason


def test_a_stage_put_in_before_others_leaves_them_fresh(recipe_file: Path, out: Path):
    run(recipe_file, out)
    text = recipe_file.read_text().replace(
        "  - name: branch", "  - {name: extra, kind: polish}\n  - name: branch"
    )
    recipe_file.write_text(text)
    assert run(recipe_file, out) == ("extra",)
    assert sorted(path.name for path in out.glob("[0-9]*")) == [
        "01-grow",
        "02-polish",
        "03-extra",
        "04-branch",
    ]


def test_the_reason_names_what_changed(recipe_file: Path, out: Path):
    run(recipe_file, out)
    steps = pipeline.plan(load_recipe(recipe_file, ["grow.learning_rate=0.2"]), out)
    assert steps[0].reason == "learning_rate 0.1 -> 0.2"
    assert steps[1].reason == "grow changed"


def test_recall_gives_the_recipe_of_a_run_back(
    recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    run(recipe_file, out, "polish.steps=7")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert {step.status for step in pipeline.plan(pipeline.recall(out), out)} == {"fresh"}


# --- interruptions and what is kept ---------------------------------------------------------------------------------


def test_an_interrupted_stage_resumes(recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_STOP", "polish:1")
    with pytest.raises(KeyboardInterrupt):
        run(recipe_file, out)
    monkeypatch.delenv("FAKE_STOP")
    assert statuses(recipe_file, out) == {"grow": "fresh", "polish": "unfinished", "branch": "new"}
    assert run(recipe_file, out) == ("polish", "branch")
    assert steps_run(out, "02-polish") == [0, 1]


def test_an_interrupted_stage_with_other_settings_starts_over(
    recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_STOP", "polish:1")
    with pytest.raises(KeyboardInterrupt):
        run(recipe_file, out)
    monkeypatch.delenv("FAKE_STOP")
    run(recipe_file, out, "polish.learning_rate=5")
    lines = (out / "02-polish" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, "learning_rate": 5.0} for step in (0, 1)]


def test_an_old_result_is_kept_until_the_new_one_is_complete_and_comes_back(
    recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    run(recipe_file, out)
    made = (out / "03-branch" / "manifest.json").read_text()
    monkeypatch.setenv("FAKE_STOP", "branch:1")
    with pytest.raises(KeyboardInterrupt):
        run(recipe_file, out, "branch.learning_rate=9")
    assert (out / "03-branch.old" / "manifest.json").read_text() == made
    # A second change of mind must not push the complete one out.
    with pytest.raises(KeyboardInterrupt):
        run(recipe_file, out, "branch.learning_rate=8")
    assert (out / "03-branch.old" / "manifest.json").read_text() == made
    monkeypatch.delenv("FAKE_STOP")
    # Back to the first settings: the old folder comes back, and the half-done one waits in its place.
    assert run(recipe_file, out) == ()
    assert (out / "03-branch" / "manifest.json").read_text() == made
    assert run(recipe_file, out, "branch.learning_rate=8") == ("branch",)
    assert steps_run(out, "03-branch") == [0, 1, 2]
    assert not (out / "03-branch.old").exists()


def test_seconds_count_all_attempts(recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_STOP", "grow:1")
    with pytest.raises(KeyboardInterrupt):
        run(recipe_file, out)
    monkeypatch.delenv("FAKE_STOP")
    record = json.loads((out / "01-grow" / "inputs.json").read_text())
    (out / "01-grow" / "inputs.json").write_text(json.dumps({**record, "seconds": 1000.0}))
    run(recipe_file, out)
    assert json.loads((out / "01-grow" / "result.json").read_text())["seconds"] > 1000


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("steps: 2", "stpes: 2", "trial.yaml:9: key 'stages.1.stpes': unknown key. Did you mean 'steps'?"),
        ("steps: 2", "steps: two", "trial.yaml:9: key 'stages.1.steps': should be a valid integer, got 'two'."),
        ("steps: 2", "steps: 2\n    decay: 1", "trial.yaml:10: key 'stages.1.decay': unknown key. Did you mean 'schedule.decay'?"),
        ("seed: 1", "sed: 1", "trial.yaml:2: key 'sed': unknown key. Did you mean 'seed'?"),
        ("name: trial", "name: my/run", "trial.yaml:1: key 'name': names a folder"),
        ("name: trial", "", "key 'name': is required and missing: Name of the run"),
        ("kind: grow", "kind: grew", "trial.yaml:4: key 'stages.0.kind': there is no stage kind 'grew'. Did you mean 'grow'?"),
        ("name: branch\n    kind: polish", "name: branch", "trial.yaml:10: key 'stages.2.kind': is required and missing"),
        ("name: branch", "name: polish", "trial.yaml:10: key 'stages.2.name': another stage (line 8) is called 'polish' too."),
        ("name: branch", "name: seed", "trial.yaml:10: key 'stages.2.name': 'seed' cannot be the name of a stage"),
        ("name: branch", "name: a/b", "trial.yaml:10: key 'stages.2.name': 'a/b' cannot be the name of a stage"),
        ("start: grow", "start: grw", "trial.yaml:12: key 'stages.2.start': 'grw' is neither an earlier stage nor a checkpoint folder. Did you mean 'grow'?"),
        ("start: base", "start: branch", "trial.yaml:5: key 'stages.0.start': 'branch' is a later stage. A stage can only use earlier ones."),
        ("start: grow", "start: branch", "trial.yaml:12: key 'stages.2.start': 'branch' is this stage itself."),
        ("start: base", "start: ./nowhere", "nowhere: there is no such checkpoint folder"),
        ("start: base", "start: one.txt", "one.txt: is a file, expected a checkpoint folder"),
        ("start: base", "start: model.gguf", "model.gguf: there is no such file"),
        ("start: base", "start: .", "is not a checkpoint, there is no config.json in it"),
        ("steps: 2", "judge: nobody", "trial.yaml:9: key 'stages.1.judge': 'nobody' is neither an earlier stage nor a checkpoint"),
        ('"*.txt"', '"*.text"', "trial.yaml:7: key 'stages.0.data.text':"),
        ('{text: "*.txt"}', "[text]", "trial.yaml:7: key 'stages.0.data.0': there is no source 'text' in the recipe's `data`."),
        ('"*.txt"', '"world:wbe"', "trial.yaml:7: key 'stages.0.data.text': world:wbe: the world has no 'wbe'. Did you mean 'web'?"),
        ("seed: 1", "seed: 1\nworld: {sead: 3}", "trial.yaml:3: key 'world.sead': unknown key. Did you mean 'seed'?"),
        ("seed: 1", "seed: 1\nmodel: {preset: 3mm}", "trial.yaml:3: key 'model.preset': there is no preset '3mm'. Did you mean '3m'?"),
        ("seed: 1", "seed: 1\nmodel: {lairs: 3}", "trial.yaml:3: key 'model.lairs': unknown key. Did you mean 'layers'?"),
        ("seed: 1", "seed: 1\nmodel: {vocab_size: 3}", "trial.yaml:3: key 'model.vocab_size': the tokenizer decides this."),
        ("seed: 1", "seed: 1\ntokenizer: {path: .}", "trial.yaml:3: key 'tokenizer.path':"),
        ("start: base", "", "trial.yaml:4: key 'stages.0': starts from fresh weights but has no text"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe_names_line_and_key(recipe_file: Path, before: str, after: str, message: str):
    text = recipe_file.read_text()
    assert before in text
    if before == "start: base" and not after:
        text = text.replace('data: {text: "*.txt"}', "steps: 3")
    recipe_file.write_text(text.replace(before, after, 1))
    with pytest.raises(NurtureError) as failure:
        load_recipe(recipe_file)
    assert message in str(failure.value)


def test_a_mistake_in_one_stage_is_not_told_of_the_references_of_the_next(recipe_file: Path):
    recipe_file.write_text(RECIPE.replace("steps: 2", "judge: grow") + "    judge: polish\n")
    with pytest.raises(NurtureError) as failure:
        load_recipe(recipe_file, ["grow.stepz=1"])
    assert str(failure.value) == (
        "override 'grow.stepz=1': key 'grow.stepz': unknown key. Did you mean 'steps'?"
    )


def test_every_mistake_of_a_recipe_is_listed(recipe_file: Path):
    recipe_file.write_text(
        RECIPE.replace("steps: 2", "stpes: 2").replace("*.txt", "*.nothing").replace("learning_rate", "lr")
    )
    with pytest.raises(NurtureError) as failure:
        load_recipe(recipe_file, ["branch.steps=many"])
    lines = str(failure.value).splitlines()
    assert [line.split(" ")[0].rsplit("/", 1)[-1] for line in lines] == [
        "trial.yaml:6:",
        "trial.yaml:9:",
        "override",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("polsh.steps=1", "nothing in {file} is called 'polsh'. Did you mean 'polish'?"),
        ("polish.stepps=1", "override 'polish.stepps=1': key 'polish.stepps': unknown key. Did you mean 'steps'?"),
        ("polish.steps=x", "override 'polish.steps=x': key 'polish.steps': should be a valid integer"),
        ("grow.data.text=nothing.txt", "override 'grow.data.text=nothing.txt': key 'grow.data.text':"),
        ("polish.start=nobody", "override 'polish.start=nobody': key 'polish.start': 'nobody' is neither an earlier stage"),
        ("model.layers=zero", "override 'model.layers=zero': key 'model.layers': should be a valid integer"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_override_is_named(recipe_file: Path, override: str, message: str):
    with pytest.raises(NurtureError) as failure:
        load_recipe(recipe_file, [override])
    assert message.format(file=recipe_file) in str(failure.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(
        NurtureError, match=r"none of nurture's own recipes is called that.*Did you mean 'tiny'\?"
    ):
        load_recipe("tinny")


@pytest.mark.parametrize("content", ["{", "[]", "{}", "ÿ"])
def test_a_stage_whose_manifest_is_damaged_is_made_again(recipe_file: Path, out: Path, content: str):
    run(recipe_file, out)
    manifest = out / "02-polish" / "manifest.json"
    manifest.write_bytes(content.encode("latin-1"))
    steps = {step.name: step for step in pipeline.plan(load_recipe(recipe_file), out)}
    assert {name: step.status for name, step in steps.items()} == {
        "grow": "fresh", "polish": "damaged", "branch": "fresh",
    }  # fmt: skip
    assert str(manifest) in steps["polish"].reason
    assert "Delete" not in steps["polish"].reason
    assert statuses(recipe_file, out, "polish.steps=4")["polish"] == "stale"
    (out / "02-polish" / "inputs.json").write_text("{")
    assert statuses(recipe_file, out)["polish"] == "damaged"
    assert run(recipe_file, out) == ("polish",)
    assert run(recipe_file, out) == ()


def test_damaged_inputs_of_an_unfinished_stage_make_it_start_over(
    recipe_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_STOP", "polish:1")
    with pytest.raises(KeyboardInterrupt):
        run(recipe_file, out)
    monkeypatch.delenv("FAKE_STOP")
    (out / "02-polish" / "inputs.json").write_text("{")
    assert statuses(recipe_file, out)["polish"] == "stale"
    assert run(recipe_file, out) == ("polish", "branch")
    assert steps_run(out, "02-polish") == [0, 1]


def test_a_start_whose_manifest_is_damaged_is_known_by_its_files(
    recipe_file: Path, out: Path, caplog: pytest.LogCaptureFixture
):
    run(recipe_file, out)
    (out / "01-grow" / "manifest.json").write_text("{")
    alone, elsewhere = [f"grow.start={out / '01-grow'}"], out.with_name("alone")
    assert run(recipe_file, elsewhere, *alone) == ("grow", "polish", "branch")
    assert "01-grow/manifest.json:1: not valid JSON" in caplog.text
    assert run(recipe_file, elsewhere, *alone) == ()


def test_a_report_leaves_out_a_stage_whose_result_is_damaged(
    recipe_file: Path, out: Path, caplog: pytest.LogCaptureFixture
):
    from nurture.report.records import read_run
    from nurture.report.table import collect, next_steps

    run(recipe_file, out)
    (out / "02-polish" / "result.json").write_text("{")
    (out / "01-grow" / "manifest.json").write_text("{")
    assert [stage["name"] for stage in collect(out)["stages"]] == ["grow", "branch"]
    assert "02-polish/result.json:1: not valid JSON" in caplog.text
    assert [record.name for record in read_run(out)] == ["grow", "branch"]
    assert not any("polish" in command for command, _ in next_steps(out))


def test_a_file_in_the_way_of_the_run(recipe_file: Path, out: Path):
    out.write_text("")
    with pytest.raises(NurtureError, match="a file is in the way of a folder"):
        run(recipe_file, out)


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(NurtureError, match=r"is not a run \(no run.json in it\)"):
        pipeline.recall(tmp_path)


# --- data and presets -----------------------------------------------------------------------------------------------


def test_sources_are_shared_by_name(recipe_file: Path):
    text = RECIPE.replace('data: {text: "*.txt"}', "data: [mine]").replace(
        "stages:", 'data: {mine: "one.*"}\nstages:'
    )
    recipe_file.write_text(text)
    config = load_recipe(recipe_file).stages[0]
    assert config.data == {"mine": "one.*"}  # type: ignore[attr-defined]
    recipe_file.write_text(text.replace("data: [mine]", "data: {here: mine}"))
    config = load_recipe(recipe_file).stages[0]
    assert config.data == {"here": "one.*"}  # type: ignore[attr-defined]
    recipe_file.write_text(text.replace("one.*", "gone.*"))
    with pytest.raises(NurtureError, match=r"trial.yaml:3: key 'data.mine': .*no file matches"):
        load_recipe(recipe_file)


def test_a_preset_is_a_start_for_single_settings(recipe_file: Path):
    recipe = load_recipe(recipe_file, ["model.preset=3m", "model.layers=9"])
    assert recipe.model is not None
    assert (recipe.model["width"], recipe.model["layers"]) == (256, 9)
    assert "vocab_size" not in recipe.model


def test_data_identity_follows_names_sizes_and_times(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    first = pipeline.identify_data("*.txt", tmp_path)
    assert pipeline.identify_data("*.txt", tmp_path) == first
    (tmp_path / "a.txt").write_text("longer")
    second = pipeline.identify_data("*.txt", tmp_path)
    (tmp_path / "b.txt").write_text("")
    assert len({first, second, pipeline.identify_data("*.txt", tmp_path)}) == 3


def test_smollm2_names_the_installed_model_for_a_stage_as_for_chat(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
):
    from nurture.inference import chat

    model = recipe_file.parent / "SmolLM2.Q4.gguf"
    monkeypatch.setattr(chat, "packaged_smollm2", lambda: model)
    assert load_recipe(recipe_file, ["polish.start=smollm2"]).starts["polish"] == model
