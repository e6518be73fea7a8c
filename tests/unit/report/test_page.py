"""The page: what it compares, that nothing in it runs or loads, and charts at their edges."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nurture import files
from nurture.errors import NurtureError
from nurture.report.charts import Line, line_chart
from nurture.report.page import render, write_page
from nurture.report.records import merged, read_rows, read_run
from nurture.report.table import report_json

NASTY = "<script>alert(1)</script>\"'&{{ 7 * 7 }}\u2028</pre>"


def stage(
    run: Path,
    number: int,
    name: str,
    metrics: dict[str, Any],
    *,
    kind: str = "sft",
    start: str | None = None,
    samples: dict[str, str] | None = None,
    outcomes: dict[str, Any] | None = None,
    curves: list[dict[str, float]] | None = None,
    **extra: Any,
) -> Path:
    folder = run / f"{number:02d}-{name}"
    folder.mkdir(parents=True)
    result = {"name": name, "kind": kind, "seconds": 61.0, "tokens": 5000, "metrics": metrics, **extra}
    (folder / "result.json").write_text(json.dumps(result))
    made_from = {"start": start} if start else {}
    inputs = {"seed": 0, "version": 1, "data": {"facts": "…"}, "from": made_from}
    (folder / "inputs.json").write_text(json.dumps({"inputs": inputs}))
    lines = [json.dumps({"prompt": p, "reply": r}, ensure_ascii=False) for p, r in (samples or {}).items()]
    (folder / "samples.jsonl").write_text("\n".join([*lines, '{"prompt": "torn']), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curves or []))
    (folder / "outcomes.json").write_text(json.dumps(outcomes or {}))
    files.write_manifest(folder, fingerprint=f"mark-{name}", name=name)
    return folder


def entry(after: float, n: int = 100, **more: float) -> dict[str, float]:
    return {"after": after, "n": n, **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "trial"
    stage(run, 1, "pretrain", {"bpb/web": entry(0.5, before=3.0), "facts": entry(0.2)}, kind="pretrain")
    stage(
        run, 2, "sft", {"facts": entry(0.6, before=0.2), "harm": entry(0.0, before=1.0), "kl": entry(3.0)},
        start="mark-pretrain",
        samples={"Who?": "Me.", NASTY: NASTY},
        outcomes={"facts": {"before": [0] * 80 + [1] * 20, "after": [1] * 60 + [0] * 40}},
        curves=[{"step": s, "train/loss": 1 / s, "eval/bpb/facts": 0.4} for s in range(1, 900)],
    )  # fmt: skip
    stage(run, 3, "ppo", {"facts": entry(0.62)}, kind="ppo", start="mark-sft", samples={"Who?": "You."})
    return run


class Watcher(HTMLParser):
    """Notes tags, attributes that load or run something, and tags that are not closed."""

    VOID = {"meta", "br", "link", "img", "path", "circle"}

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.suspicious: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.suspicious += [
            f"{tag} {k}" for k, v in attrs if k.startswith("on") or k in ("src", "srcset", "action")
        ]
        self.suspicious += [
            f"{tag} {k}={v}" for k, v in attrs if k == "href" and not (v or "").startswith("#")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_nothing_in_it_runs_or_loads(run: Path) -> None:
    page = render(read_rows([run]), [run])
    watcher = Watcher()
    watcher.feed(page)
    assert watcher.open == []
    assert watcher.suspicious == []
    assert not {"script", "link", "iframe", "img", "object", "form"} & set(watcher.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://", page)


def test_what_a_model_wrote_is_text(run: Path) -> None:
    page = render(read_rows([run]), [run])
    assert "<script" not in page
    assert "49" not in re.sub(
        r"<svg.*?</svg>", "", page.split('id="samples"')[1].split("</section>")[0], flags=re.S
    )
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2  # as prompt and as reply
    assert "torn" not in page


def test_a_stage_name_is_text_too(tmp_path: Path) -> None:
    folder = stage(tmp_path / "r", 1, "a", {"<b>x": entry(1.0)}, curves=[{"step": 1, "train/<i>": 1.0}])
    result = json.loads((folder / "result.json").read_text()) | {"name": "<u>a</u>"}
    (folder / "result.json").write_text(json.dumps(result))
    page = render(read_rows([tmp_path / "r"]), [tmp_path / "r"])
    assert not re.findall(r"<[biu]>", page)
    assert "&lt;u&gt;" in page
    assert "&lt;i&gt;" in page


def test_changes_are_paired_where_items_are_known_and_else_follow_the_lineage(run: Path) -> None:
    rows = {row.name: row for row in read_rows([run])}
    paired = rows["sft"].changes["facts"]
    assert paired.value == pytest.approx(0.4)
    assert paired.low is not None
    # 20 items were lost and 60 won: the bootstrap's deviation is sqrt(0.8 - 0.16) / 10 = 0.08
    assert paired.low == pytest.approx(0.4 - 1.96 * 0.08, abs=0.02)
    onward = rows["ppo"].changes["facts"]  # its own `before` was not measured: the sft stage's `after` is it
    assert onward.value == pytest.approx(0.02)
    assert onward.low is not None
    assert onward.low < 0 < (onward.high or 0)
    assert "kl" not in rows["sft"].changes
    assert rows["pretrain"].changes["bpb/web"].low is None


def test_better_and_worse_are_said_only_where_the_interval_leaves_out_zero(run: Path) -> None:
    page = render(read_rows([run]), [run])
    table = page.split('id="abilities"')[1].split("</section>")[0]
    assert re.search(r'class="better">\+40\.0', table)
    assert re.search(r'class="better">-100\.0', table)  # harm fell: lower is better
    assert re.search(r'class="unclear">\+2\.0', table)
    assert re.search(r'<small class="">-2\.500', table)  # bits per byte: no interval, no verdict


def test_several_runs_become_means_with_the_spread_between_them(tmp_path: Path) -> None:
    runs = [tmp_path / f"seed{seed}" for seed in range(3)]
    for run, before, after in zip(runs, (0.1, 0.2, 0.3), (0.5, 0.7, 0.9), strict=True):
        stage(run, 1, "sft", {"facts": entry(after, before=before)}, samples={"Who?": "Me."})
        stage(run, 2, f"only-{run.name}", {})
    report = json.loads(report_json(runs))
    assert [s["name"] for s in report["stages"]] == ["sft"]
    facts = report["stages"][0]["metrics"]["facts"]
    assert (facts["before"], facts["after"], facts["n"], facts["runs"]) == (0.2, 0.7, 3, [0.5, 0.7, 0.9])
    assert facts["low"] == pytest.approx(0.7 - 4.303 * 0.2 / 3**0.5, abs=1e-4)
    change = read_rows(runs)[0].changes["facts"]
    assert (change.value, change.n) == (pytest.approx(0.5), 3)
    assert change.low == pytest.approx(0.5 - 4.303 * 0.1 / 3**0.5, abs=1e-3)
    assert "3 runs" in render(read_rows(runs), runs)
    assert merged(read_rows(runs), runs)["run"] == "seed0, seed1, seed2"


def test_an_interval_ends_where_no_number_can_be(tmp_path: Path) -> None:
    runs = [tmp_path / f"seed{seed}" for seed in range(3)]
    for run, after in zip(runs, (0.7, 1.0, 1.0), strict=True):
        stage(run, 1, "sft", {"facts": entry(after, before=0.0), "kl": entry(after, before=0.0)})
    changes = read_rows(runs)[0].changes
    assert changes["facts"].high == 1.0
    assert (changes["kl"].high or 0) > 1.0


def test_win_rates_against_different_models_are_not_compared(tmp_path: Path) -> None:
    stage(tmp_path, 1, "ppo", {"gold_win_rate": entry(0.7), "gold_reward": entry(0.7)}, kind="ppo")
    stage(tmp_path, 2, "merge", {"gold_win_rate": entry(0.5), "gold_reward": entry(0.8)}, start="mark-ppo")
    assert set(read_rows([tmp_path])[1].changes) == {"gold_reward"}


def test_runs_without_a_common_stage_are_refused(tmp_path: Path) -> None:
    stage(tmp_path / "a", 1, "x", {})
    stage(tmp_path / "b", 1, "y", {})
    with pytest.raises(NurtureError, match="no stage in common"):
        read_rows([tmp_path / "a", tmp_path / "b"])


def test_lineage_is_followed_by_fingerprint(run: Path) -> None:
    stages = read_run(run)
    assert [parent.name for parent in stages[2].lineage] == ["sft", "pretrain"]
    assert not list(stages[0].lineage)


def test_proxy_and_gold_are_drawn_against_kl(run: Path) -> None:
    point = {"step": 0, "kl": 0.0, "proxy": 0.1, "gold": 0.2, "gold_error": 0.01}
    policy = [point, {**point, "kl": 4.0, "proxy": 0.9, "gold": None}, {**point, "kl": 9.0, "proxy": 1.4}]
    bests = [{"n": 2, "kl": 0.19, "proxy": 0.3, "gold": 0.3}]
    measured = {"policy": policy, "best_of_n": bests}
    (run / "03-ppo" / "overoptimisation.json").write_text(json.dumps(measured))
    page = render(read_rows([run]), [run])
    assert "Proxy: the reward model, against KL" in page
    assert "Gold: the truth, against KL" in page
    assert "best of n" in page


def test_the_page_is_a_file(run: Path, tmp_path: Path) -> None:
    write_page([run], tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(NurtureError, match="this is a folder"):
        write_page([run], tmp_path)


# --- charts ---------------------------------------------------------------------------------------------------------


def places(chart: str) -> list[tuple[float, float]]:
    path = re.search(r'class="line c0 d0" d="M([^"]+)"', chart)
    assert path
    return [tuple(map(float, pair.split())) for pair in path[1].split("L")]  # type: ignore[misc]


def test_points_lie_where_the_axes_say() -> None:
    chart = line_chart(
        "t", [Line("a", [(0, 0.0), (50, 0.5), (100, 1.0)])], x_label="x", y_label="y", percent=True
    )
    assert places(chart) == [(64.0, 226.0), (245.0, 119.0), (426.0, 12.0)]
    assert re.findall(r'class="x">([^<]+)<', chart) == ["0", "25", "50", "75", "100"]
    assert re.findall(r'class="y">([^<]+)<', chart) == ["0 %", "25 %", "50 %", "75 %", "100 %"]


def test_a_logarithmic_axis_has_room_for_nothing() -> None:
    chart = line_chart(
        "t", [Line("a", [(0, 0.1), (100, 0.2), (10_000, 0.3)])], x_label="x", y_label="y", log_x=True
    )
    (zero, _), (hundred, _), (most, _) = places(chart)
    assert (zero, most) == (64.0, 426.0)
    assert hundred - zero == pytest.approx((most - zero) / 3, abs=0.1)  # places are rounded
    assert re.findall(r'class="x">([^<]+)<', chart) == ["0", "100", "1k", "10k"]


def test_what_cannot_be_drawn_is_left_out() -> None:
    assert line_chart("t", [Line("a", [])], x_label="x", y_label="y") == ""
    assert line_chart("t", [Line("a", [(1, float("nan"))])], x_label="x", y_label="y") == ""
    chart = line_chart("t", [Line("a", [(1, 2.0)])], x_label="x", y_label="y")
    assert "circle" in chart  # a single point is no line
    flat = line_chart("t", [Line("a", [(1, 5.0), (2, 5.0)])], x_label="x", y_label="y")
    assert "nan" not in flat
    many = line_chart("t", [Line("a", [(x, float(x)) for x in range(5000)])], x_label="x", y_label="y")
    assert len(places(many)) <= 300
    assert places(many)[-1][0] == 426.0


def legend(lines: list[Line]) -> list[tuple[str, str]]:
    chart = line_chart("t", lines, x_label="x", y_label="y")
    return re.findall(
        r'<li><svg viewBox="0 0 26 8"><path class="line (c\w d\d)" d="M1 4H25"/></svg>([^<]+)</li>', chart
    )


def test_the_legend_names_every_source_and_every_run_once() -> None:
    points = [(1, 2.0), (2, 3.0)]
    assert legend([Line("a", points)]) == []
    assert legend([Line("a", points), Line("b", points, 1, 1)]) == [("c0 d0", "a"), ("c1 d1", "b")]
    one = [Line("a", points, run="s0"), Line("a", points, dashes=1, run="s1")]
    assert legend(one) == [("c0 d0", "s0"), ("c0 d1", "s1")]
    two = [*one, Line("b", points, 1, run="s0"), Line("b", points, 1, 1, run="s1")]
    assert legend(two) == [("c0 d0", "a"), ("c1 d0", "b"), ("cn d0", "s0"), ("cn d1", "s1")]


def test_charts_escape_what_they_are_given() -> None:
    lines = [Line(NASTY, [(1, 2.0), (2, 3.0)]), Line("b", [(1, 1.0)], 1)]
    assert "<script" not in line_chart(NASTY, lines, x_label=NASTY, y_label=NASTY)
