"""The pages in a real browser: they work, nothing is logged as an error, and text from a model stays text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nurture.inference.engine import Row
from nurture.studio.library import Library

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 860), (390, 844)], ids=["desktop", "phone"])
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.goto(address)
    page.locator(".welcome").wait_for()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert problems == []
    page.close()


def test_chat_side_by_side_by_keyboard(page: Any):
    page.get_by_label("Your message").fill("<img src=x onerror=alert(1)> hi")
    page.keyboard.press("Enter")
    page.locator(".reply .facts", has_text="tokens").nth(1).wait_for()
    assert page.locator(".reply").count() == 2
    assert page.locator("main img").count() == 0
    assert page.locator(".asked .text").inner_text() == "<img src=x onerror=alert(1)> hi"
    page.get_by_role("button", name="Edit").click()
    assert page.get_by_label("Your message").input_value() == "<img src=x onerror=alert(1)> hi"
    assert page.locator(".reply").count() == 0


def test_tokens_step_by_step(page: Any):
    page.get_by_role("link", name="Tokens").click()
    page.locator(".candidates tbody tr").first.wait_for()
    before = page.locator(".tokens button").count()
    page.get_by_role("button", name="Add the likeliest token").click()
    page.locator(".tokens button").nth(before).wait_for()
    page.locator(".tokens button").nth(2).click()
    page.get_by_text("Instead of").wait_for()


def test_watch_shows_curves_and_the_report(page: Any):
    page.get_by_role("link", name="Watch").click()
    page.locator(".chart svg").first.wait_for()
    page.get_by_role("cell", name="format").first.wait_for()
    assert page.locator(".stages li").count() == 2


def test_rank_with_keys(page: Any, run: Any):
    page.get_by_role("link", name="Label").click()
    page.get_by_label("Question").fill("Who are you?")
    page.get_by_role("button", name="Get answers").click()
    page.locator(".answer").first.wait_for()
    for index in range(page.locator(".answer").count()):
        page.locator(".answer").nth(index).focus()
        page.keyboard.press("1" if index else "2")
    assert page.locator(".ranking").inner_text().endswith("> A")
    page.get_by_role("button", name="Save the ranking").click()
    page.get_by_text("saved", exact=True).wait_for()
    assert (run / "labels" / "rankings.jsonl").read_text().count("\n") >= 1


def test_play_a_turn(page: Any):
    page.get_by_role("link", name="Play").click()
    page.get_by_label("Your guess").fill("crane")
    page.keyboard.press("Enter")
    page.locator("h3", has_text="Words it found likely").wait_for()
    assert page.locator(".board").first.inner_text().split() == list("CRANE")


def test_pages_have_no_serious_findings_of_axe(browser: Any, address: str):
    """Every page, light and dark, as it stands after its first use; axe-core, without network."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    for scheme in ("light", "dark"):
        page = browser.new_page(bypass_csp=True, color_scheme=scheme)
        page.goto(address)
        for name, ready in (
            ("Chat", ".welcome"),
            ("Tokens", ".candidates"),
            ("Watch", "td"),
            ("Label", ".answer, .ranking, textarea"),
            ("Play", ".board span"),
        ):
            page.get_by_role("link", name=name).click()
            page.locator(ready).first.wait_for()
            page.evaluate(script)
            found = page.evaluate("axe.run()")["violations"]
            serious = [
                (one["id"], one["nodes"][0]["html"])
                for one in found
                if one["impact"] in ("serious", "critical")
            ]
            assert serious == [], (name, scheme)
        page.close()


def test_a_letter_is_dragged_to_its_place(browser: Any, address: str):
    page = browser.new_page()
    page.goto(f"{address}/#label")
    page.get_by_label("Question").fill("Who are you?")
    page.get_by_role("button", name="Get answers").click()
    page.locator(".answer").first.wait_for()
    for index, place in ((0, 1), (1, 0)):
        page.locator(".slots li").nth(place).scroll_into_view_if_needed()
        page.locator(".answer .chip").nth(index).drag_to(page.locator(".slots li").nth(place))
    assert page.locator(".slots li").nth(0).inner_text().split() == ["1", "B"]
    assert page.locator(".slots li").nth(1).inner_text().split() == ["2", "A"]
    page.close()


def test_thoughts_are_folded_and_columns_added(page: Any, library: Library, monkeypatch: pytest.MonkeyPatch):
    """A reply with a thought; two more columns; regenerate; what is exported."""
    tokenizer = library.load(library.find("sft")).tokenizer
    said = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\nYes."},
    ]
    token_ids = tokenizer.encode_conversation(said)[0][len(tokenizer.encode_prompt(said[:1])) :]
    take = Row.take
    monkeypatch.setattr(
        Row,
        "take",
        lambda row, drawn, logprobs: take(row, [token_ids[row.drawn % len(token_ids)]], logprobs),
    )
    for _ in range(2):
        page.get_by_role("button", name="Add a column").click()
    assert page.locator(".heads select").count() == 4
    page.get_by_label("Your message").fill("Is it?")
    page.keyboard.press("Enter")
    page.locator(".reply .facts", has_text="tokens").nth(3).wait_for()
    answered = page.locator(".reply", has=page.locator("summary", has_text="Thought")).first
    assert answered.locator("> .text").inner_text() == "Yes."
    assert not answered.locator(".thought .text").is_visible()
    answered.locator("summary").click()
    assert answered.locator(".thought .text").inner_text().strip() == "Hm."
    answered.get_by_role("button", name="Regenerate").click()
    page.locator(".reply .facts", has_text="tokens").nth(3).wait_for()
    page.get_by_text("Sampling, system message, export").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export JSON").click()
    (turn,) = json.loads(Path(download.value.path()).read_text())
    assert turn["asked"] == "Is it?"
    assert len(turn["replies"]) == 4
    assert any(
        reply.get("thought", "").strip() == "Hm." and reply["text"] == "Yes." for reply in turn["replies"]
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_an_environment_is_played(browser: Any, width: int):
    """The page of `nurture env serve`: a game with a mistake in it, over the protocol's own WebSocket."""
    pytest.importorskip("websockets")
    from unit.environments.openenv_servers import serving

    from nurture.environments.catalog import environment_maker
    from nurture.studio.environment import Offer, build_environment_app

    offer = Offer("wordle", environment_maker("wordle", {"style": "textarena"}), ("crane",))
    problems: list[str] = []
    with serving(build_environment_app(offer)) as address:
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.goto(address)
        page.get_by_role("log").get_by_text("What is your first guess?").wait_for()
        for guess, said in (
            ("xxxxx", "not a word I know"),
            ("<b>", "You lost."),
            ("grain", "You submitted [grain]"),
        ):
            page.get_by_label("Your guess").fill(guess)
            page.keyboard.press("Enter")
            page.get_by_role("log").get_by_text(said).wait_for()
            if guess == "<b>":  # two in a row end the game
                page.get_by_text("lost", exact=True).wait_for()
                page.get_by_role("button", name="New game").click()
                page.get_by_text("The game is on.").wait_for()
        page.get_by_label("Your board: grain XGGXY").wait_for()
        page.get_by_label("Your guess").fill("crane")
        page.keyboard.press("Enter")
        page.get_by_text("won", exact=True).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert problems == []
        page.close()
