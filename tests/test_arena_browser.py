"""The voting page in a real browser: Debian's Chromium, without a window, by Playwright.

Without the browser these tests are skipped, in one loud line. With REQUIRE_BROWSER=1 that is a
failure.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from arena_page import IMAGE, NAMES, arena_of
from serving_tools import running

from deploy.arena import build_arena
from deploy.votes import VoteStore

pytestmark = pytest.mark.more
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
WHY = "NOT TESTED: no browser. Run `apt-get install chromium`; the voting page is then tried in it."
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
SHOWN = "document.querySelector('#prompt textarea')?.value"
SAID = "document.querySelector('#said textarea')?.value"


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip)(WHY)
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox wants a user
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=QUIET + root)
        yield found
        found.close()


@pytest.fixture
def arena(tmp_path):
    return arena_of(tmp_path / "votes.sqlite")


@pytest.fixture
def address(arena):
    with running(build_arena(arena), timeout_graceful_shutdown=1) as address:
        yield address


def opened(browser, address: str, asked: list | None = None):
    """The page in a browser of its own, with a first pair on it; `asked` collects the requests."""
    page = browser.new_context(viewport={"width": 1000, "height": 860}).new_page()
    if asked is not None:
        page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_function(f"{SHOWN} > ''", timeout=60_000)
    return page


def text_of(page, name: str) -> str:
    return page.locator(f"#{name} textarea, #{name} input").first.input_value()


def vote(page, key: str) -> str:
    """Presses a key, and waits until the page says that the vote is kept."""
    page.keyboard.press(key)
    page.wait_for_function(f"{SAID} > ''", timeout=30_000)
    return text_of(page, "said")


def next_pair(page) -> None:
    before = text_of(page, "prompt")
    page.wait_for_function("!document.getElementById('vote-next').disabled", timeout=30_000)
    page.keyboard.press("n")
    page.wait_for_function(f"{SAID} === '' && {SHOWN} !== {before!r}", timeout=30_000)


def test_a_person_votes_with_keys_and_buttons(browser, address, arena, tmp_path):
    """Names only after the vote; the progress; four ways to vote; nothing is asked of anybody
    else.
    """
    asked = []
    page = opened(browser, address, asked)
    assert not any(name in page.content() for name in NAMES)
    pair = arena.store.pairs("made up")
    shown = {text_of(page, "left"), text_of(page, "right")}
    assert shown in [{row["text_a"], row["text_b"]} for row in pair]
    said = vote(page, "a")
    assert said.startswith("Kept: A is better. A was model-") and all(n in said for n in NAMES)
    for key, label in (("b", "B is better"), ("t", "A tie"), ("x", "Both bad")):
        next_pair(page)
        assert vote(page, key).startswith(f"Kept: {label}.")
    next_pair(page)
    page.get_by_role("button", name="A is better").click()
    page.wait_for_function(f"{SAID} > ''", timeout=30_000)
    page.wait_for_function("document.querySelector('#all textarea').value.includes('5 votes')")
    assert text_of(page, "progress") == "5 of 40 pairs judged"
    kept = [row["choice"] for row in arena.store.votes()]
    assert kept == ["left", "right", "tie", "both bad", "left"]
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), set(asked)
    page.screenshot(path=tmp_path / "arena.png")
    assert (tmp_path / "arena.png").stat().st_size > 10_000


def test_a_double_click_counts_once_and_a_reload_goes_on(browser, address, arena):
    page = opened(browser, address)
    page.locator("#vote-right").dblclick()
    page.wait_for_function(f"{SAID} > ''", timeout=30_000)
    page.keyboard.press("a")  # the buttons are off
    next_pair(page)
    prompt = text_of(page, "prompt")
    page.reload()
    page.wait_for_function(f"{SHOWN} > ''", timeout=60_000)
    assert text_of(page, "prompt") == prompt and text_of(page, "progress").startswith("1 of 40")
    assert [row["choice"] for row in arena.store.votes()] == ["right"]


def test_two_browsers_lose_no_vote(browser, address, arena):
    """Four votes each, in turns that overlap: the second browser votes while the first waits."""
    pages = [opened(browser, address) for _ in range(2)]
    for turn in range(4):
        for page in pages:
            page.keyboard.press("ab"[turn % 2])
        for page in pages:
            page.wait_for_function(f"{SAID} > ''", timeout=30_000)
        if turn < 3:
            for page in pages:
                next_pair(page)
    votes = arena.store.votes()
    assert len(votes) == 8 and len({row["voter"] for row in votes}) == 2


def test_an_answer_that_holds_html_is_shown_as_text(browser, tmp_path):
    """One pair only, whose answer would load an image from elsewhere and rename the page."""
    asked = []
    arena = arena_of(tmp_path / "html.sqlite", count=1)
    with running(build_arena(arena), timeout_graceful_shutdown=1) as address:
        page = opened(browser, address, asked)
        assert IMAGE in (text_of(page, "left"), text_of(page, "right"))
        vote(page, "t")
        page.wait_for_timeout(300)
        assert page.title() == "Which answer is better?"
        assert not any("evil.example" in url for url in asked)


def test_a_vote_that_the_page_acknowledged_survives_kill_9(browser, tmp_path):
    """The names are shown only after the vote is on the disk: the process dies right then."""
    store, folder = tmp_path / "votes.sqlite", Path(__file__).parent
    child = subprocess.Popen(
        [sys.executable, str(folder / "arena_page.py"), str(store)],
        env={**os.environ, "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(120, child.kill)
    timer.start()
    page = opened(browser, child.stdout.readline().strip())
    vote(page, "a")
    next_pair(page)
    vote(page, "b")
    child.send_signal(signal.SIGKILL)
    child.wait()
    timer.cancel()
    assert [row["choice"] for row in VoteStore(store).votes()] == ["left", "right"]
