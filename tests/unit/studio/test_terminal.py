"""Labelling in the terminal, as a labeler types it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nurture.data.rows import parse_rows
from nurture.studio import label as labels
from nurture.studio.terminal import Question, label


def question(number: int, count: int = 3) -> Question:
    return Question(
        [{"role": "user", "content": f"Question {number}?"}], [f"{number}{x}" for x in "abc"[:count]], "m"
    )


def play(run: Path, labeler: str, typed: list[str], asked: int = 4) -> tuple[int, str]:
    """Type lines; return how many labels were kept and what was shown."""
    lines, shown = iter(typed), list[str]()

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    questions: Iterator[Question] = map(question, range(asked))
    return label(run, labeler, questions, read=read, show=shown.append), "\n".join(shown)


def rankings(run: Path) -> list[tuple[str, str]]:
    return [(row["prompt"][0]["content"], row["ranking"]) for row in labels.read(run, labels.RANKINGS)]


@pytest.mark.parametrize("typed", ["B > A = C", "b>a=c", "ba=c", "b a=c", " B A = C "])
def test_a_ranking_is_typed_in_any_of_these_ways(tmp_path: Path, typed: str) -> None:
    kept, shown = play(tmp_path, "ann", [typed])
    assert (kept, rankings(tmp_path)) == (1, [("Question 0?", "B > A = C")])
    assert "1 ranking and 0 demonstrations by ann" in shown
    (row,) = parse_rows(labels.read(tmp_path, labels.RANKINGS)[0], "labels")
    assert row.ranking == ((1,), (0, 2))


@pytest.mark.parametrize("typed", ["ab", "abd", "a > b > > c", "aabc", "hello"])
def test_what_is_no_ranking_is_said_and_asked_again(tmp_path: Path, typed: str) -> None:
    kept, shown = play(tmp_path, "ann", [typed, "abc"])
    assert kept == 1
    assert "your ranking" in shown


def test_what_is_taken_back_is_asked_again_and_then_where_one_was(tmp_path: Path) -> None:
    kept, _ = play(tmp_path, "ann", ["abc", "cba", "u", "u", "bac", "a=b=c", "bca", "q"])
    said = [("Question 0?", "B > A > C"), ("Question 1?", "A = B = C"), ("Question 2?", "B > C > A")]
    assert (kept, rankings(tmp_path)) == (3, said)
    _, shown = play(tmp_path, "ann", ["u"])
    assert "nothing of this session" in shown
    assert rankings(tmp_path) == said


def test_an_answer_of_several_lines_is_a_demonstration(tmp_path: Path) -> None:
    kept, _ = play(tmp_path, "ann", ["w", "First line.", "Second.", "", "abc", "w", "", "w", "Oh.", "", "u"])
    (row,) = labels.read(tmp_path, labels.DEMONSTRATIONS)
    assert row["messages"][-1] == {"role": "assistant", "content": "First line.\nSecond."}
    assert kept == 2


def test_labelers_see_each_others_answers_first_and_agreement_is_shown(tmp_path: Path) -> None:
    play(tmp_path, "ann", ["abc", "abc", "cab"])
    kept, shown = play(tmp_path, "bob", ["s", "acb", "c=ab", "^C"])
    assert kept == 2
    # One was skipped, which hides only itself; of the others' pairs 5 were ordered by both, 4 of them alike.
    assert [asked for asked, _ in rankings(tmp_path)[3:]] == ["Question 1?", "Question 2?"]
    assert "3 rankings by others; labelers agree on 80% of 5 pairs" in shown
    assert f"--data {tmp_path / 'labels' / labels.RANKINGS}" in shown


def test_leaving_while_a_question_was_labelled_by_nobody(tmp_path: Path) -> None:
    assert play(tmp_path, "ann", ["^C"])[0] == 0
    assert labels.read(tmp_path, labels.RANKINGS) == []


def test_killed_between_any_two_lines_every_saved_label_is_there(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from nurture.studio.terminal import Question, label\n"
        "def asked(n): return Question([{'role': 'user', 'content': f'Q{n}?'}], ['a', 'b'], 'm')\n"
        "def show(text): print(text, flush=True)\n"
        "label(Path(sys.argv[1]), 'ann', map(asked, range(99)), read=input, show=show)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("ab\nba\nab\n")
    child.stdin.flush()
    for line in child.stdout:
        if "saved; 3 rankings" in line:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [said for _, said in rankings(tmp_path)] == ["A > B", "B > A", "A > B"]
    file = tmp_path / "labels" / labels.RANKINGS
    file.write_bytes(file.read_bytes()[:-9])  # a label half written
    assert play(tmp_path, "ann", ["abc"])[0] == 1
    assert len(rankings(tmp_path)) == 3
