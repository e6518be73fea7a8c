"""What is seen of long work: bars inside one another in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from nurture import progress
from nurture.progress import progress_bar, tracked

NESTED = """
import time
from nurture.progress import progress_bar, tracked
with progress_bar("train", 2) as bar:
    for step in range(2):
        for turn in tracked(range(3), "replies", stays=False):
            time.sleep(0.2)
        bar.advance(facts=f"loss {step}")
"""


def test_a_log_gets_a_line_with_what_is_done_and_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    assert list(tracked("abcd", "replies")) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["replies:", share] for share in ("25%", "50%", "75%", "100%")
    ]
    assert all("s left" in line for line in lines)
    with progress_bar("quiet", 1, show=False) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_short_work_shows_inside_the_bar_of_long_work_and_leaves_nothing(tmp_path):
    """An evaluation in the middle of training has its own bar: two live displays at once must not fail."""
    main, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", NESTED],
        stdin=terminal, stdout=terminal, stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the child has ended
            break
        if not part:
            break
        seen += part
    assert child.wait() == 0, seen.decode()
    text = seen.decode()
    assert "replies" in text
    assert "loss 1" in text
    assert "replies" not in text[text.rindex("loss 1") :]
