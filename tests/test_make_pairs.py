"""The pair maker against a small server in this process: votes, drops, the cache, kills, and
failures of the API.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from fake_api import Fake, between, servers

from common.data import load_pairs
from common.io.endpoint import Endpoint, EndpointError
from common.io.formats import DataError
from tools.make_pairs import main, make_pairs, read_prompts, read_verdict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fakes(monkeypatch):
    with servers(monkeypatch, 2) as found:
        yield found


@pytest.fixture
def fake(fakes):
    return fakes[0]


def run(folder: Path, *arguments: str) -> int:
    """The command line on one prompt."""
    (folder / "prompts.txt").write_text("Hi\n")
    files = str(folder / "prompts.txt"), "-o", str(folder / "mine.jsonl")
    return main([*files, "--model", "m", "--workers", "1", "--retries", "0", *arguments])


def keys(fake: Fake) -> set[str]:
    return {request["headers"].get("authorization") for request in fake.requests}


def services(fake: Fake, folder: Path, retries: int = 2) -> tuple[Endpoint, Endpoint]:
    return (
        Endpoint("sft", fake.url, folder, {"temperature": 1.0}, retries),
        Endpoint("judge", fake.url, folder, {"temperature": 0.0}, retries),
    )


def test_two_samples_and_two_orders_make_a_pair(fake, tmp_path):
    """Four requests a prompt. The judge prefers the longer answer in both orders."""
    rows, dropped = make_pairs(["Hi", "Why?"], *services(fake, tmp_path), workers=1)
    assert not dropped and [row["prompt"] for row in rows] == [
        f"\n\nHuman: {x}\n\nAssistant:" for x in ("Hi", "Why?")
    ]
    assert all(
        len(row["chosen"]) > len(row["rejected"]) and row["chosen"].startswith(" ") for row in rows
    )
    assert [request["model"] for request in fake.requests] == ["sft", "sft", "judge", "judge"] * 2
    first, second = (request["messages"][0]["content"] for request in fake.requests[2:4])
    assert between(first, "[Answer A]", "[Answer B]") == between(second, "[Answer B]", "Reply")
    assert load_pairs(rows)[0].to_list() == rows


def test_rows_come_in_the_order_of_the_prompts_whatever_the_workers(fake, tmp_path):
    fake.answer = lambda body, number: (
        time.sleep(0.02 * (number % 3)),
        fake.by_length(body, number),
    )[1]
    prompts = [f"Question {number}" for number in range(12)]
    rows, _ = make_pairs(prompts, *services(fake, tmp_path), workers=6)
    assert [row["prompt"].split("Human: ")[1].split("\n")[0] for row in rows] == prompts


@pytest.mark.parametrize(
    ("samples", "verdicts", "reason"),
    [
        (["a", "b"], ["A", "A"], "another verdict in the other order"),
        (["a", "b"], ["A", "tie"], "another verdict in the other order"),
        (["a", "b"], ["tie", "TIE."], "a tie"),
        (["a", "b"], ["A", "Both are fine."], "a verdict that cannot be read"),
        (["a", "a "], [], "two equal answers"),
        (["a", " "], [], "an empty answer"),
        (["a", "b<cut>"], [], "an answer cut at the token limit"),
    ],
)
def test_a_prompt_without_a_preference_is_dropped_and_counted(
    fake, tmp_path, samples, verdicts, reason
):
    """Without two whole and different answers the judge is not even asked."""
    replies = [*samples, *verdicts]
    fake.answer = lambda body, number: replies[number - 1]
    assert make_pairs(["Hi"], *services(fake, tmp_path), workers=1) == ([], Counter({reason: 1}))
    assert len(fake.requests) == len(replies)


def test_the_second_run_asks_nothing_and_other_settings_ask_again(fake, tmp_path):
    first = make_pairs(["Hi", "Why?"], *services(fake, tmp_path))
    assert (
        make_pairs(["Hi", "Why?"], *services(fake, tmp_path)) == first and len(fake.requests) == 8
    )
    sampler, judge = services(fake, tmp_path)
    make_pairs(["Hi"], Endpoint("other", fake.url, tmp_path, sampler.options), judge)
    assert len(fake.requests) == 12  # two new samples, and two verdicts on them


def test_the_key_is_sent_and_written_nowhere(fake, tmp_path):
    make_pairs(["Hi"], *services(fake, tmp_path))
    assert keys(fake) == {"Bearer secret-key"}
    assert not any("secret-key" in path.read_text() for path in tmp_path.iterdir())


def test_what_is_meant_for_openai_goes_nowhere_else(fakes, tmp_path, monkeypatch):
    """Neither its keys, organisation and project nor headers of its own; with a key and without."""
    sampler, judge = fakes
    services = "--base-url", sampler.url, "--judge-base-url", judge.url
    assert run(tmp_path, *services) == 0
    monkeypatch.delenv("LAB_SAMPLER_KEY")
    assert run(tmp_path, *services, "--cache", str(tmp_path / "again")) == 0
    assert len(sampler.requests) == len(judge.requests) == 4
    sent = [request["headers"] for request in sampler.requests + judge.requests]
    assert "official" not in str(sent)
    assert not {"openai-organization", "openai-project"} & {
        name.lower() for x in sent for name in x
    }
    assert keys(judge) == {"Bearer none"}


def test_each_service_gets_its_own_key(fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_JUDGE_KEY", "judge-key")
    assert run(tmp_path, "--base-url", fakes[0].url, "--judge-base-url", fakes[1].url) == 0
    assert keys(fakes[0]) == {"Bearer secret-key"} and keys(fakes[1]) == {"Bearer judge-key"}


def test_a_judge_at_the_same_address_is_the_same_service(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_JUDGE_KEY", "judge-key")
    assert run(tmp_path, "--base-url", fake.url, "--judge-model", "judge") == 0
    assert len(fake.requests) == 4 and keys(fake) == {"Bearer secret-key"}


def test_a_variable_that_is_named_is_the_one_that_is_sent(fakes, tmp_path):
    """Even the official key, elsewhere: it was said so. The judge's stays where it was."""
    named = "--key-variable", "OPENAI_API_KEY", "--judge-key-variable", "LAB_SAMPLER_KEY"
    assert run(tmp_path, "--base-url", fakes[0].url, "--judge-base-url", fakes[1].url, *named) == 0
    assert keys(fakes[0]) == {"Bearer official-API_KEY"}
    assert keys(fakes[1]) == {"Bearer secret-key"}


def test_a_named_variable_that_is_not_set_is_an_error(fake, tmp_path, capsys):
    assert run(tmp_path, "--base-url", fake.url, "--key-variable", "NO_SUCH_KEY") == 1
    assert "NO_SUCH_KEY is not set" in capsys.readouterr().err and not fake.requests


@pytest.mark.parametrize("path", ["/v1", "/v1/", ":443/v1"])
def test_the_official_address_gets_the_official_key(fakes, path):
    """With organisation and project, as the library sends them."""
    client = Endpoint("m", f"https://api.openai.com{path}").client()
    assert client.auth_headers == {"Authorization": "Bearer official-API_KEY"}
    assert client.default_headers["OpenAI-Organization"] == "official-ORG_ID"


@pytest.mark.parametrize(
    "address",
    [
        "http://api.openai.com/v1",
        "https://api.openai.com:444/v1",
        "https://api.openai.com.other.example/v1",
        "https://other.example/api.openai.com/v1",
        "https://API.OPENAI.COM.other.example/v1",
    ],
)
def test_an_address_that_looks_official_gets_another_key(fakes, address):
    service = Endpoint("m", address, plain_http=True)
    assert service.variable == "LAB_SAMPLER_KEY"
    assert service.client().auth_headers == {"Authorization": "Bearer secret-key"}


def test_an_address_with_a_password_is_refused_unread(fakes, tmp_path, capsys):
    """`https://api.openai.com@other.example` is a user name on another host."""
    assert run(tmp_path, "--base-url", "https://api.openai.com:pass-word@other.example/v1") == 1
    error = capsys.readouterr().err
    assert "user name" in error and "pass-word" not in error


def test_a_redirect_is_not_followed(fakes, tmp_path, capsys):
    """Neither prompt nor key reaches the second server, and the message says what to do."""
    away = f"http://localhost:{fakes[1].server.server_port}/v1/chat/completions"
    fakes[0].answer = lambda body, number: (307, {"Location": away})
    assert run(tmp_path, "--base-url", fakes[0].url) == 1
    assert len(fakes[0].requests) == 1 and not fakes[1].requests
    assert "sends the request elsewhere (status 307)" in capsys.readouterr().err


def test_a_key_in_clear_text_needs_a_flag(fakes, tmp_path, monkeypatch, capsys):
    """`model.example` stands for a machine in the network; its name leads to the server here."""
    find = socket.getaddrinfo
    here = lambda host, *rest, **names: find(  # noqa: E731
        "127.0.0.1" if host in ("model.example", b"model.example") else host, *rest, **names
    )
    monkeypatch.setattr(socket, "getaddrinfo", here)
    url = fakes[0].url.replace("127.0.0.1", "model.example")
    assert run(tmp_path, "--base-url", url) == 1 and not fakes[0].requests
    assert "clear text. Use https, or allow it with --allow-plain-http" in capsys.readouterr().err
    assert run(tmp_path, "--base-url", fakes[1].url, "--judge-base-url", url) == 0  # has no key
    assert keys(fakes[0]) == {"Bearer none"}
    fakes[0].requests.clear()
    assert run(tmp_path, "--base-url", url, "--allow-plain-http") == 0
    assert keys(fakes[0]) == {"Bearer secret-key"}


@pytest.mark.parametrize(
    ("host", "safe"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("[::1]", True),
        ("127.0.0.1.other.example", False),
        ("localhost.other.example", False),
        ("192.168.0.2", False),
        ("[::ffff:192.168.0.2]", False),
    ],
)
def test_only_this_machine_gets_a_key_over_plain_http(fakes, host, safe):
    service = Endpoint("m", f"http://{host}:8000/v1")
    if safe:
        assert service.client().api_key == "secret-key"
    else:
        with pytest.raises(EndpointError, match="LAB_SAMPLER_KEY would .* clear text"):
            service.client()


def test_a_key_for_this_machine_passes_no_proxy(fakes, tmp_path, monkeypatch):
    """A proxy for plain http would read it."""
    monkeypatch.setenv("HTTP_PROXY", fakes[1].url)
    monkeypatch.setenv("http_proxy", fakes[1].url)
    assert run(tmp_path, "--base-url", fakes[0].url) == 0
    assert len(fakes[0].requests) == 4 and not fakes[1].requests


def test_a_cache_file_that_is_broken_is_asked_again(fake, tmp_path):
    first = make_pairs(["Hi"], *services(fake, tmp_path), workers=1)
    for path in tmp_path.iterdir():
        path.write_text("{")
    fake.requests.clear()
    assert (
        make_pairs(["Hi"], *services(fake, tmp_path), workers=1) == first
        and len(fake.requests) == 4
    )


def test_rate_limits_are_waited_out(fake, tmp_path):
    """Two refusals, then the reply: the client waits as long as the server says (1 ms here)."""
    fake.answer = lambda body, number: (
        (429, {"retry-after-ms": 1}) if number < 3 else fake.by_length(body, number)
    )
    rows, _ = make_pairs(["Hi"], *services(fake, tmp_path), workers=1)
    assert len(rows) == 1 and len(fake.requests) == 6


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ((429, {"retry-after-ms": 1}), "takes no more requests .*Wait"),
        ((401, {}), "refuses the key. Set LAB_SAMPLER_KEY, or name another variable with --key"),
        ((404, {}), "does not know the model 'sft'.* Check the model and --base-url"),
        ((400, {}), "refuses the request .status 400.* try --bare"),
        ((500, {"retry-after-ms": 1}), "fails .status 500, after 1 retries.. Try again later"),
        (None, "cannot be reached .*Check --base-url"),
    ],
)
def test_a_failure_of_the_api_is_one_sentence_on_what_to_do(
    fake, tmp_path, monkeypatch, found, sentence
):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    fake.answer = lambda body, number: found
    with pytest.raises(EndpointError, match=f"{sentence}.*What was answered is kept") as raised:
        make_pairs(["Hi"], *services(fake, tmp_path, retries=1), workers=1)
    assert "\n" not in str(raised.value) and "secret-key" not in str(raised.value)


def test_what_was_answered_before_a_failure_is_not_asked_again(fake, tmp_path):
    """The sixth request fails for good; the five replies before it are kept, so the second run asks
    8 - 5 = 3.
    """
    fake.answer = lambda body, number: (400, {}) if number == 6 else fake.by_length(body, number)
    with pytest.raises(EndpointError):
        make_pairs(["Hi", "Why?"], *services(fake, tmp_path), workers=1)
    fake.requests.clear()
    rows, _ = make_pairs(["Hi", "Why?"], *services(fake, tmp_path), workers=1)
    assert len(rows) == 2 and len(fake.requests) == 3


def test_a_killed_run_goes_on_where_it_was(fake, tmp_path, capsys):
    """SIGKILL while the fifth request hangs. Run again, the four replies before it are not asked
    for a second time.
    """
    (tmp_path / "prompts.txt").write_text("Hi\nWhy?\n")
    command = [
        str(tmp_path / "prompts.txt"),
        "-o",
        str(tmp_path / "mine.jsonl"),
        "--model",
        "sft",
        "--workers",
        "1",
        "--base-url",
        fake.url,
    ]
    reached, release = threading.Event(), threading.Event()

    def hang(body, number):
        if number == 5:
            reached.set()
            release.wait(20)
            return None
        return fake.by_length(body, number)

    fake.answer = hang
    child = subprocess.Popen(
        [sys.executable, "-m", "tools.make_pairs", *command], cwd=ROOT, env=os.environ
    )
    assert reached.wait(30)
    child.kill()
    child.wait()
    release.set()
    assert (
        not (tmp_path / "mine.jsonl").exists()
        and len(list((tmp_path / "mine.jsonl.cache").glob("*.json"))) == 4
    )
    fake.requests.clear()
    fake.answer = fake.by_length
    assert main(command) == 0 and len(fake.requests) == 4
    assert "2 prompts, 2 pairs" in capsys.readouterr().out
    assert len(load_pairs(tmp_path / "mine.jsonl")[0]) == 2


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("A", 1),
        ("b.", -1),
        ("**B**", -1),
        ("Answer A", 1),
        ("Tie", 0),
        ("A or B", None),
        ("", None),
        ("Apple", None),
    ],
)
def test_verdicts_are_read_strictly(text, vote):
    assert read_verdict(text) == vote


def test_prompts_are_read_from_lines_and_from_columns(tmp_path):
    (tmp_path / "a.txt").write_text("Hi\n\nWhy?\nHi\n")
    (tmp_path / "a.csv").write_text("id,prompt\n1,Hi\n2,Why?\n")
    assert read_prompts(tmp_path / "a.txt") == read_prompts(tmp_path / "a.csv") == ["Hi", "Why?"]
    (tmp_path / "b.jsonl").write_text('{"question": "Hi"}\n')
    for name, problem in (("b.jsonl", "needs a column prompt"), ("none.txt", "no such file")):
        with pytest.raises(DataError, match=problem):
            read_prompts(tmp_path / name)


def test_the_command_fails_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "prompts.txt").write_text("Hi\n")
    assert (
        main([str(tmp_path / "prompts.txt"), "--model", "m", "-o", str(tmp_path / "mine.jsonl")])
        == 1
    )
    assert capsys.readouterr().err == (
        "error: OPENAI_API_KEY is not set. Set it, or name your own server with --base-url.\n"
    )


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(
        name in text
        for name in ("--judge-model", "--base-url", "--cache", "LAB_JUDGE_KEY", "both orders")
    )
