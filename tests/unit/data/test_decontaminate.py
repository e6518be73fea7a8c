"""Decontamination: what overlaps is dropped, what does not is kept, and both are counted."""

from __future__ import annotations

import pytest

from nurture.data.decontaminate import Decontaminator, evaluation_texts
from nurture.data.rows import Row, parse_row
from nurture.errors import NurtureError

QUESTION = "If a train leaves the old station at noon and travels north for three hours how far does it go"
WORDS = QUESTION.split()


def test_thirteen_words_in_a_row_are_an_overlap():
    decontaminator = Decontaminator({"gsm8k": [QUESTION]})
    assert decontaminator.matches(f"Before. {' '.join(WORDS[3:16])} after.") == {"gsm8k"}
    assert decontaminator.matches(" ".join(WORDS[3:15])) == set()
    assert decontaminator.matches(" ".join([*WORDS[:10], "never", *WORDS[10:]])) == set()
    assert decontaminator.matches("") == set()


def test_case_and_punctuation_do_not_matter():
    text = "IF A TRAIN, leaves -- the old station;\nat noon (and travels) north for three"
    assert Decontaminator([QUESTION]).matches(text) == {"evaluation"}


def test_order_matters():
    assert not Decontaminator([QUESTION]).matches(" ".join(reversed(WORDS)))
    assert not Decontaminator([QUESTION]).matches(" ".join(WORDS[i ^ 1] for i in range(20)))


def test_short_texts_count_as_one_run_and_very_short_ones_are_reported():
    decontaminator = Decontaminator({"blimp": ["one two three four five six seven eight nine", "too short"]})
    assert decontaminator.matches("zero one two three four five six seven eight nine ten") == {"blimp"}
    assert not decontaminator.matches("one two three four five six seven eight")
    assert decontaminator.report.unchecked == {"blimp": 1}
    assert not decontaminator.matches("too short")


def test_filter_and_report():
    decontaminator = Decontaminator({"a": [QUESTION], "b": [f"{QUESTION} today", "unrelated " * 13]}, n=10)
    rows = [Row(text="fine"), Row(text=QUESTION), Row(text=None), Row(text="also fine " * 20)]
    assert list(decontaminator.filter(iter(rows))) == [rows[0], rows[2], rows[3]]
    report = decontaminator.report
    assert (report.documents, report.dropped, report.by_set) == (4, 1, {"a": 1, "b": 1})
    assert report.examples == [("a", QUESTION[:100])]
    assert "1 of 4 documents dropped" in str(report)


def test_fingerprint_depends_on_texts_and_settings():
    prints = {
        Decontaminator(texts, n=n).fingerprint
        for texts in ([QUESTION], [QUESTION, "x"], {"a": [QUESTION]})
        for n in (8, 13)
    }
    assert len(prints) == 6
    assert Decontaminator([QUESTION]).fingerprint == Decontaminator([QUESTION.upper()]).fingerprint


def test_question_of_a_row():
    row = parse_row({"question": QUESTION, "answer": "5"}, "f:1")
    assert list(evaluation_texts([row])) == [QUESTION]


def test_settings_that_make_no_sense():
    with pytest.raises(NurtureError, match=r"1 to n \(5\), got 8"):
        Decontaminator([QUESTION], n=5)
