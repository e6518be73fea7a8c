"""What people write and rank, kept beside the run: `RUN/labels/rankings.jsonl` and `demonstrations.jsonl`.

Rows are the pipeline's own (`data/rows.py`): a ranking can be given to a reward stage, a demonstration to SFT, as they
are. A row is one line, written and flushed to the device before the page says "saved"; half a line, of a server that
was killed while writing, is cut off before the next one is written. Every row has the id its page made up, and an id
that is there already is not written again, so that a second click or a repeated request cannot count twice. A lock of
the operating system keeps the studio and `nurture label` (terminal.py) apart.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

from nurture import files
from nurture.data.rankings import Ranking, agreement
from nurture.data.rows import parse_ranking, parse_rows
from nurture.model.hugging_face import CONFIG, checkpoint_head
from nurture.report.table import finished_stages

RANKINGS, DEMONSTRATIONS = "rankings.jsonl", "demonstrations.jsonl"
_writing = threading.Lock()


def save(run: Path, name: str, record: dict[str, Any]) -> bool:
    """Add a row; return whether it is new.

    Args:
        name: `RANKINGS` or `DEMONSTRATIONS`.
        record: the row, with an `id`.

    Raises:
        NurtureError: the pipeline could not read such a row, or the disk cannot be written.
    """
    parse_rows(record, "your label")
    path = files.make_directory(run / "labels") / name
    with _alone(path.parent), files.clear_disk_errors(path), open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):
            content = content[: content.rfind(b"\n") + 1]
            file.truncate(len(content))
        if any(row.get("id") == record["id"] for row in _rows(content)):
            return False
        file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def undo(run: Path, name: str, identity: str) -> bool:
    """Take back the row with this id; return whether it was there. The file is replaced in one step."""
    path = run / "labels" / name
    if not path.is_file():
        return False
    with _alone(path.parent):
        rows = read(run, name)
        kept = [row for row in rows if row.get("id") != identity]
        if len(kept) < len(rows):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
            files.atomic_write_text(path, "".join(lines))
    return len(kept) < len(rows)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the labels of a run, among the threads of this process and among processes where the system has locks."""
    lock = folder / ".lock"
    with _writing, files.clear_disk_errors(lock), open(lock, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # Windows
            pass
        yield


def read(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows there are."""
    path = run / "labels" / name
    return _rows(path.read_bytes()) if path.is_file() else []


def _rows(content: bytes) -> list[dict[str, Any]]:
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def summary(run: Path) -> dict[str, Any]:
    """Return who has labelled how much, and how far they agree on what several have ranked."""
    rankings = read(run, RANKINGS)
    by_comparison: dict[str, dict[str, Ranking]] = defaultdict(dict)
    for row in rankings:
        by_comparison[comparison_key(row)][row["labeler"]] = _ranking(row)
    both = [
        (one, other) for group in by_comparison.values() for one, other in combinations(group.values(), 2)
    ]
    agreed = agreement(both)
    return {
        "rankings": dict(Counter(row["labeler"] for row in rankings)),
        "demonstrations": dict(Counter(row["labeler"] for row in read(run, DEMONSTRATIONS))),
        "compared": len(both),
        "agreement": {"ordered": agreed.ordered, "pairs": agreed.ordered_pairs, "all": agreed.all},
    }


def agreement_with_scores(scored: Iterable[tuple[Mapping[str, Any], Sequence[float]]]) -> dict[str, Any]:
    """Return how often scores, such as rewards, order two answers as the labelers did who ordered them.

    Args:
        scored: rows of rankings, each with a score for every answer.
    """
    pairs = [(_ranking(row), _order(scores)) for row, scores in scored]
    agreed = agreement(pairs)
    return {"ordered": agreed.ordered, "pairs": agreed.ordered_pairs}


def _order(scores: Sequence[float]) -> Ranking:
    return tuple(
        tuple(index for index, score in enumerate(scores) if score == value)
        for value in sorted(set(scores), reverse=True)
    )


def open_comparison(run: Path, labeler: str, skipped: Collection[str] = ()) -> dict[str, Any] | None:
    """Return answers that others have ranked and `labeler` has not, without their ranking.

    Args:
        skipped: `comparison_key` of answers that the labeler does not want to rank.
    """
    seen: dict[str, dict[str, Any]] = {}
    done = set(skipped)
    for row in read(run, RANKINGS):
        seen.setdefault(comparison_key(row), row)
        if row["labeler"] == labeler:
            done.add(comparison_key(row))
    for name, row in seen.items():
        if name not in done:
            return {key: row[key] for key in row if key in ("prompt", "responses", "model")}
    return None


def reward_model_folder(run: Path) -> Path | None:
    """Return the folder of the run's last reward model, or None."""
    found = [
        stage / "model"
        for stage in finished_stages(run)
        if (stage / "model" / CONFIG).is_file() and checkpoint_head(stage / "model") == "scalar"
    ]
    return found[-1] if found else None


def comparison_key(row: Mapping[str, Any]) -> str:
    """Return what two rankings of the same answers to the same prompt have in common."""
    return json.dumps([row["prompt"], row["responses"]], sort_keys=True)


def _ranking(row: Mapping[str, Any]) -> Ranking:
    return parse_ranking(row["ranking"], len(row["responses"]), "labels")
