"""Web pages that speak for others, and clients that send nothing or take nothing: what the port of
the gateway does with them.
"""

import asyncio
import errno
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from serving_tools import (
    ASK,
    FOREIGN,
    FakeEngine,
    addresses,
    gateway,
    now,
    open_stream,
    running,
    status,
    until,
)

from deploy.serving import __main__ as command
from deploy.serving.app import build_app
from deploy.serving.guard import SERVER
from deploy.serving.start import serving
from deploy.serving.store import answers

KEYS = "a-key-of-the-course-1,a-key-of-the-course-2"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """One request a minute: whatever spends it is noticed."""
    with gateway(tmp_path_factory.mktemp("guard"), FakeEngine(), requests_per_minute=1) as bench:
        yield bench


def test_without_keys_no_address_answers_under_another_host(bench):
    """Also /health, /metrics, and those that would redirect to that host."""
    every = addresses(build_app(bench.gateway))
    assert {"/health", "/ready", "/metrics", "/v1/chat/completions"} <= {path for _, path in every}
    for method, path in every:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "0.0.0.0", ""):
            assert status(bench.root, method, path, {"host": host}) == 403, (method, path, host)
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "127.1.2.3"):
        assert status(bench.root, "GET", "/health", {"host": host}) == 200, host


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
def test_no_address_answers_a_web_page_of_another_site(bench, headers):
    for method, path in addresses(build_app(bench.gateway)):
        assert status(bench.root, method, path, headers) == 403, (method, path)


def test_a_web_page_of_another_site_spends_nobody_s_rate(bench):
    """One request a minute: after ten refused ones it is still there."""
    for _ in range(10):
        response = bench.post(json=ASK, headers=FOREIGN["a form"])
        assert response.status_code == 403 and response.json()["error"]["code"] == "cross_site"
    assert bench.post(json=ASK).status_code == 200
    assert bench.post(json=ASK).status_code == 429


def test_with_keys_any_host_may_ask_but_no_web_page_of_another_site(tmp_path):
    with gateway(tmp_path, FakeEngine(), keys=KEYS) as bench:
        key = {"authorization": f"Bearer {KEYS.split(',')[0]}"}
        assert bench.post(json=ASK, headers=key | {"host": "models.example"}).status_code == 200
        own = {"host": "models.example", "origin": "https://models.example"}
        assert bench.post(json=ASK, headers=key | own).status_code == 200
        assert bench.post(json=ASK, headers=key | FOREIGN["a form"]).status_code == 403


def test_no_address_redirects_to_the_host_that_was_sent(bench):
    for host in ("127.0.0.1", "localhost"):
        response = httpx.post(f"{bench.root}/v1/feedback/", headers={"host": host}, trust_env=False)
        assert response.status_code == 404 and "location" not in response.headers


def connect(root: str) -> socket.socket:
    host, port = root.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def ended(line: socket.socket) -> float:
    """Seconds until the other side closes this connection."""
    start = now()
    try:
        while line.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return now() - start


@pytest.fixture(scope="module")
def hasty():
    """An app whose connections may be silent for half a second."""
    app = FastAPI(telemetry={"tracing": False})

    @app.post("/body")
    async def body(request: Request):
        return len(await request.body())

    @app.post("/refused", status_code=413)
    async def refused():
        return "too large"

    @app.get("/slow")
    async def slow():
        async def words():
            for at in range(8):
                await asyncio.sleep(0.2)
                yield str(at)

        return StreamingResponse(words())

    with running(app, timeout_keep_alive=0.5) as root:
        yield root


HEADERS = b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        HEADERS[:-2],
        HEADERS + b"ab" + HEADERS[:-2],
        HEADERS + b"ab",
        HEADERS.replace(b"body", b"refused").replace(b": 2", b": 900") + b"ab",
    ],
    ids=[
        "silent",
        "half a line",
        "half headers",
        "half headers of the second",
        "kept",
        "unread body",
    ],
)
@pytest.mark.parametrize("trickle", [False, True])
def test_a_connection_on_which_no_request_comes_is_closed(hasty, sent, trickle):
    """After 0.5 s, also where a byte comes every 0.1 s: bytes do not begin the time again."""
    with connect(hasty) as line:
        line.sendall(sent)
        stop = threading.Event()

        def drip():
            with suppress(OSError):
                while not stop.wait(0.1):
                    line.sendall(b"x")

        if trickle:
            threading.Thread(target=drip, daemon=True).start()
        seconds = ended(line)
        stop.set()
    assert 0.3 < seconds < 5


def test_a_slow_body_and_a_slow_answer_are_not_cut_off(hasty):
    """Both take longer than the 0.5 s in which a request must begin."""
    with connect(hasty) as line:
        line.sendall(HEADERS + b"a")
        time.sleep(1)
        line.sendall(b"b")
        assert line.recv(4096).startswith(b"HTTP/1.1 200")
    assert httpx.get(f"{hasty}/slow", trust_env=False).text == "01234567"


def test_a_client_that_reads_nothing_frees_its_place_and_the_engine(tmp_path):
    """A real socket with a small buffer, and an endless answer: the gateway stops reading from the
    engine when the client does, and after the request's time the place is free.
    """
    fake = FakeEngine(fault="flood")
    with (
        gateway(tmp_path, fake, concurrency=1, timeout=0.5) as bench,
        open_stream(bench, receive=4096) as line,
    ):
        until(lambda: fake.started == 1, "request at the engine")
        until(lambda: fake.cancelled == 1 and bench.slots.running == 0, "cancelled request")
        assert fake.sent < 50_000_000
        fake.fault = None
        assert bench.post(json=ASK).status_code == 200
        assert line.recv(8) == b"HTTP/1.1"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The configuration and the open port of the real command line, which then serves nobody."""
    seen = {}

    def run(server, sockets):
        seen.update(config=server.config, listener=sockets[0])

    monkeypatch.setattr("uvicorn.Server.run", run)
    monkeypatch.delenv("LAB_API_KEYS", raising=False)
    engine = ("--model", "a", "--engine", "http://127.0.0.1:9")
    assert command.main([*engine, "--port", "0", "--store", str(tmp_path / "s.sqlite")]) == 0
    yield seen
    seen["config"].app.state.gateway.store.close()
    seen["listener"].close()


def test_the_command_line_serves_with_these_settings(started):
    for name, value in SERVER.items():
        assert getattr(started["config"], name) == value


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has this option")
def test_the_system_drops_a_connection_whose_other_side_reads_nothing(started):
    """The port of the real command line: its connections have 30 s; with 0.5 s the drop is seen."""
    option = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    with socket.create_connection(started["listener"].getsockname()) as client:
        there, _ = started["listener"].accept()
        assert there.getsockopt(*option) == 30_000
        there.setsockopt(*option, 500)
        there.settimeout(20)
        with there, pytest.raises(TimeoutError) as raised:
            while True:
                there.send(b"x" * 65536)
        assert raised.value.errno == errno.ETIMEDOUT and client


def test_the_gateway_takes_as_many_connections_as_the_system_allows(tmp_path):
    """A shell that allows 256 open files: the process has all that the hard limit allows."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with serving("--model", "a", "--engine", "http://127.0.0.1:9", ready=False) as service:
            limits = Path(f"/proc/{service.process.pid}/limits")
            if not limits.exists():
                pytest.skip("reads /proc, which only Linux has")
            [line] = [line for line in limits.read_text().splitlines() if "open files" in line]
            assert line.split()[3] == line.split()[4] != "256"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_model_whose_name_is_beyond_latin_1_answers(tmp_path):
    """Plain and streamed, in the list, in the metrics and in the store; the header is written as in
    a URL.
    """
    with gateway(tmp_path, FakeEngine(), names=["模型"]) as bench:
        for stream in (False, True):
            response = bench.post(json=ASK | {"model": "模型", "stream": stream})
            assert response.status_code == 200, response.text
            assert unquote(response.headers["x-lab-model"]) == "模型"
        given = {"request_id": response.headers["x-request-id"], "rating": "up"}
        assert bench.post("feedback", json=given).status_code == 200
        listed, metrics = (
            httpx.get(bench.root + path, trust_env=False) for path in ("/v1/models", "/metrics")
        )
        assert listed.json()["data"][0]["id"] == "模型" and 'model="模型"' in metrics.text
        assert {row["model"] for row in answers(bench.store)} == {"模型"}
