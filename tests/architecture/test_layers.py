"""The house rules that no single module can see: reading order, size, light start, and papers kept honest."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PACKAGE = REPOSITORY / "nurture"

READING_ORDER = """
    errors files types recipe progress runtime
    chat_template tokenizer world data
    model losses advantages optim checkpoint trainer
    inference rewards environments rollout evals
    stages report pipeline plan sweep experiments studio doctor games cli __main__
""".split()
"""The chapters of the book, first to last. A chapter imports earlier ones only."""

CORE_LINES = 8_000
"""Past this, ask what is said twice (DESIGN.md). Studio and report are not counted."""

HEAVY = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "pyarrow",
    "numpy",
    "pydantic",
    "tokenizers",
    "yaml",
    "jinja2",
    "gguf",
)
"""What `nurture --help` must not import."""

NEVER_ON_THE_COMMON_PATH = ("transformers", "trl", "datasets", "accelerate", "pandas")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def chapter(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_chapters(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, chapter) of every import of the package, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: write the whole name, relative imports hide the chapter"
            )
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = inside if node.module == "nurture" else [node.module or ""]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "nurture" and len(parts) > 1 and parts[1] != "__version__":
                yield node.lineno, parts[1]


def test_every_module_has_its_place_in_the_reading_order():
    unplaced = {chapter(path) for path in modules()} - set(READING_ORDER) - {"__init__"}
    assert not unplaced, f"put {unplaced} into READING_ORDER, after all they import"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_backwards(path: Path):
    if path == PACKAGE / "__init__.py":
        return
    here = READING_ORDER.index(chapter(path))
    forward = [
        f"{path.relative_to(REPOSITORY)}:{line} imports the later chapter {name}"
        for line, name in imported_chapters(path)
        if READING_ORDER.index(name) > here
    ]
    assert not forward, "\n".join(forward)


def test_the_checker_sees_forward_imports(tmp_path: Path):
    """The test above can fail: in a function, too, and by every spelling."""
    code = "def f():\n    from nurture import cli\n    import nurture.pipeline\n    from nurture.stages.sft import run\n"
    (tmp_path / "x.py").write_text(code)
    assert list(imported_chapters(tmp_path / "x.py")) == [(2, "cli"), (3, "pipeline"), (4, "stages")]


def test_the_core_stays_small():
    counted = [path for path in modules() if chapter(path) not in ("studio", "report")]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in counted)
    if lines > CORE_LINES:
        warnings.warn(
            f"the core has {lines} lines, more than {CORE_LINES}: what is said twice?", stacklevel=1
        )
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in counted) < 1_000


def imported_by(*words: str) -> set[str]:
    """Return the top-level modules that a command of `nurture` imports."""
    program = (
        f"import sys; sys.argv = ['nurture', *{list(words)!r}]\n"
        "from nurture.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('\\n@', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.rsplit("@", 1)[1].split())


def test_help_imports_nothing_heavy():
    assert not imported_by("--help") & set(HEAVY)
    for command in ("run", "sft"):
        # typer brings pydantic along for the help of a command
        assert not imported_by(command, "--help") & set(HEAVY) - {"pydantic"}, command


def test_peers_stay_off_the_common_path():
    imported = imported_by("status", "tiny", "--out", "/nonexistent/run")
    assert "torch" in imported  # the recipe's stages were read
    assert not imported & set(NEVER_ON_THE_COMMON_PATH)


def recipes() -> list[Path]:
    return sorted((REPOSITORY / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    from nurture.stages.recipe import load_recipe

    if "NURTURE_DATA" in path.read_text():
        monkeypatch.setenv("NURTURE_DATA", str(request.getfixturevalue("shared_data")))
    # A start from the hub is not fetched for this.
    monkeypatch.setattr("nurture.model.hugging_face.local_checkpoint", Path)
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.stages


def readme_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every `nurture ...` command in code blocks and code spans."""
    for code in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL):
        for part in re.split(r"\n|&&|;", "".join(code)):
            words = re.sub(r"\s#.*", "", part).split()
            if words[:1] == ["nurture"] and len(words) > 1 and not words[1].startswith(("-", "…")):
                yield words


def help_of(command: str) -> str:
    from typer.testing import CliRunner

    from nurture.cli import app

    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, f"nurture {command}: no such command"
    return result.output


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))])  # fmt: skip
def test_every_command_in_the_papers_exists(name: str):
    for words in readme_commands((REPOSITORY / name).read_text(encoding="utf-8")):
        text = help_of(words[1])
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert option in text, f"{name}: `{' '.join(words)}`: there is no option {option}"


def test_the_papers_were_searched():
    commands = {words[1] for words in readme_commands((REPOSITORY / "README.md").read_text(encoding="utf-8"))}
    assert {"run", "chat", "report"} <= commands


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))])  # fmt: skip
def test_links_between_the_papers_lead_somewhere(name: str):
    folder = (REPOSITORY / name).parent
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", (REPOSITORY / name).read_text(encoding="utf-8")):
        assert (folder / target).exists(), f"{name} links to {target}"


def test_ci_runs_the_commands_of_the_readme():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    for pattern in re.findall(r"command_of '([^']+)'", script):
        assert len(re.findall(pattern, readme, re.MULTILINE)) == 1, (
            f"README.md has no single line like {pattern}"
        )
    assert script.count("command_of '") == 2


def test_every_file_name_in_papers_md_exists():
    text = (REPOSITORY / "docs" / "PAPERS.md").read_text(encoding="utf-8")
    for name in re.findall(r"`nurture/([\w/]+\.py)", text):
        assert (PACKAGE / name).exists(), f"docs/PAPERS.md names nurture/{name}"


def test_every_paper_that_code_or_docs_cite_is_in_papers_md():
    known = set(re.findall(r"\d{4}\.\d{5}", (REPOSITORY / "docs" / "PAPERS.md").read_text(encoding="utf-8")))
    for path in [*PACKAGE.rglob("*.py"), *(REPOSITORY / "docs").glob("*.md")]:
        cited = set(re.findall(r"arXiv (\d{4}\.\d{5})", path.read_text(encoding="utf-8")))
        assert cited <= known, f"{path.name} cites {cited - known}, which docs/PAPERS.md does not name"


def test_constraints_pin_every_dependency():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is part of Python 3.11")
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    pinned = {
        line.split("==")[0].lower()
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    missing = {re.split(r"[\[<>=;]", name)[0].lower() for name in wanted} - pinned - {"nurture"}
    assert not missing
