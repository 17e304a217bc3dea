"""The chat page: what it shows, and what its thumbs do. A fake engine answers."""

import httpx
import pytest
from gradio_client import Client
from openai import OpenAI
from serving_tools import WORDS, FakeEngine, gateway

from deploy.serving.page import answer, open_page, rate
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

    def room(engine, request):
        if len(request.messages) > 3:
            raise Refusal(400, "context_length_exceeded", "Too long.", "messages")
        return 10

    monkeypatch.setattr("deploy.serving.engine.Engine.room", room)
    talk = [
        {"role": role, "content": str(at)}
        for at, role in enumerate(["user", "assistant"] * 2 + ["user"])
    ]
    assert list(answer(client, talk, "me"))[-1][0] == "".join(WORDS).strip()
    assert [message["content"] for message in fake.bodies[-1]["messages"]] == ["2", "3", "4"]


def test_the_page_itself_chats(bench):
    """Through Gradio's own client: the page is served on this machine, and its text box answers."""
    page, address = open_page(f"{bench.root}/v1", "", port=0, wait=False)
    try:
        assert address.startswith("http://127.0.0.1:") and not page.share
        assert httpx.get(address, trust_env=False).status_code == 200
        config = httpx.get(f"{address}config", trust_env=False).json()
        assert not config.get("analytics_enabled")
        client = Client(address, verbose=False, analytics_enabled=False)
        _, talk = client.predict("What is it?", [], api_name="/say")
        assert talk[-1]["role"] == "assistant" and "Boil water with it." in str(talk[-1]["content"])
    finally:
        page.close(verbose=False)
