"""Attacks on the gateway's own engine: code in a model folder, templates that do not end, the
engine's address, what an engine may answer; and its end.
"""

import asyncio
import json
import os
import re
import signal
import sqlite3
import stat
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import OpenAI
from serving_tools import FakeEngine, gateway, running, save_chat_model, until
from test_serving_engine import worker_ids

from deploy.serving import own_engine
from deploy.serving.app import build_app
from deploy.serving.gateway import Gateway
from deploy.serving.limits import Limits
from deploy.serving.own_engine import OwnEngine
from deploy.serving.start import serving
from deploy.serving.store import Store

ASK = {"messages": [{"role": "user", "content": "Hi"}]}
LONG = {"messages": [{"role": "user", "content": "Tell me about the lamp."}], "max_tokens": 480}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dpo"
    save_chat_model(folder)
    return folder


def copy_of(model: Path, folder: Path, template: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def dead_worker(folder: Path, code: str, monkeypatch) -> None:
    """A small program stands in for `worker`."""
    (folder / "worker.py").write_text(code)
    monkeypatch.setattr(own_engine, "WORKER", folder / "worker.py")


async def started(engine: OwnEngine) -> list[str]:
    """Starts an engine that ends by itself. Gives what it printed."""
    with pytest.raises(RuntimeError, match="ended with status"):
        await engine._start()
    await engine._stop()
    await engine.client.aclose()
    return list(engine.last_lines)


@pytest.mark.parametrize("entries", [":/x", "/x:", ".:/x", "{model}:/x"])
def test_no_code_of_the_model_folder_is_imported(model, tmp_path, monkeypatch, entries):
    """`export PYTHONPATH=$PYTHONPATH:/x` with no PYTHONPATH leaves an empty entry: wherever the
    process is. Python imports `sitecustomize` from there by itself, and the engine `typer`.
    """
    folder = copy_of(model, tmp_path / "dpo")
    for name in ("sitecustomize", "typer"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / name)!r}, 'w')")
    dead_worker(tmp_path, "import os, typer; print(os.getcwd()); raise SystemExit(3)", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", entries.format(model=folder))
    monkeypatch.chdir(folder if entries.startswith(".") else tmp_path)
    [place] = asyncio.run(started(OwnEngine("dpo", Limits(), folder)))
    assert not (tmp_path / "sitecustomize").exists() and not (tmp_path / "typer").exists()
    assert Path(place) != folder


def test_the_engine_is_told_no_secrets(model, tmp_path, monkeypatch):
    code = "import json, os; print(json.dumps(dict(os.environ))); raise SystemExit(3)"
    dead_worker(tmp_path, code, monkeypatch)
    names = (
        "LAB_API_KEYS LAB_ENGINE_KEY LAB_JUDGE_KEY OPENAI_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY"
    )
    for name in names.split():
        monkeypatch.setenv(name, "a-secret-of-this-test")
    monkeypatch.setenv("HF_HOME", "kept")
    [said] = asyncio.run(started(OwnEngine("dpo", Limits(), model)))
    assert "a-secret-of-this-test" not in said and json.loads(said)["HF_HOME"] == "kept"
    assert json.loads(said)["TOKENIZERS_PARALLELISM"] == "false"  # a TOKEN is a word of its own


def ports_of(process: int) -> list[int]:
    """TCP ports on which a process listens."""
    inodes = set()
    for path in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(path)))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes]


@pytest.fixture(scope="module")
def service(model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "serving.sqlite"
    with serving("--model", str(model), "--store", str(store)) as service:
        yield service


def test_no_web_page_can_reach_the_engine(service):
    """A page of another site could post to `/reset`, which unloads the model: the engine had a port
    of its own, and answered under any Host.
    """
    if not Path("/proc/net/tcp").exists():
        pytest.skip("reads /proc, which only Linux has")
    [worker] = worker_ids(service)
    headers = {"origin": "https://evil.example", "host": "evil.example"}
    for port in ports_of(worker):
        answer = httpx.post(f"http://127.0.0.1:{port}/reset", headers=headers, trust_env=False)
        assert answer.status_code >= 400, "the model was unloaded"
    assert ports_of(worker) == []
    home = Path(os.readlink(f"/proc/{worker}/cwd"))
    assert stat.S_IMODE(home.stat().st_mode) == 0o700 and (home / "socket").is_socket()


def test_without_unix_sockets_the_engine_wants_a_key(model, monkeypatch):
    """Every address of it; the gateway's own requests carry the key."""
    monkeypatch.setattr(own_engine, "UNIX", False)

    async def run():
        engine = OwnEngine("dpo", Limits(), model)
        life = asyncio.create_task(engine.supervise())
        try:
            await asyncio.wait_for(engine.ready.wait(), 90)
            async with httpx.AsyncClient(base_url=engine.url, trust_env=False) as stranger:
                for method, path in (
                    ("POST", "/reset"),
                    ("POST", "/load_model"),
                    ("GET", "/health"),
                ):
                    assert (await stranger.request(method, path)).status_code == 401
                wrong = {"authorization": f"Bearer {engine.key[:-1]}"}
                assert (await stranger.get("/health", headers=wrong)).status_code == 401
            request = own_engine.ChatRequest(**ASK, max_tokens=3)
            pieces = [
                piece async for piece in engine.answer(request, time.monotonic() + 60, "local")
            ]
            assert pieces[-1]["usage"]["completion_tokens"] == 3
            commands = Path(f"/proc/{engine.process.pid}/cmdline")
            assert not commands.exists() or engine.key not in commands.read_text()
        finally:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)

    asyncio.run(run())


def test_without_unix_sockets_an_engine_that_ends_at_once_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setattr(own_engine, "UNIX", False)
    dead_worker(tmp_path, "raise SystemExit(3)", monkeypatch)
    assert asyncio.run(started(OwnEngine("dpo", Limits(), model))) == []


# Templates and prompts, before the engine is asked.


@contextmanager
def before_an_engine(folder: Path, tmp_path: Path, monkeypatch, **limits):
    """A gateway whose own engine never gets ready: what is refused is refused before."""
    dead_worker(tmp_path, "import time; time.sleep(600)", monkeypatch)
    settings = Limits(**{"timeout": 30, "engine_wait": 0.1, **limits})
    engines = {"dpo": OwnEngine("dpo", settings, folder)}
    bench = Gateway(engines, {"dpo": 1.0}, Store(tmp_path / "s.sqlite", 10**9), {}, settings)
    with running(build_app(bench)) as root:
        yield root


def asked_meanwhile(root: str, requests: list[dict]) -> tuple[list[httpx.Response], float]:
    """The answers to requests that are sent at once, and the longest time that `/health` took
    meanwhile.
    """
    answers, url = [], f"{root}/v1/chat/completions"

    def ask(body):
        answers.append(httpx.post(url, json=body, timeout=60, trust_env=False))

    threads = [threading.Thread(target=ask, args=(body,), daemon=True) for body in requests]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with httpx.Client(base_url=root, timeout=20, trust_env=False) as client:
        while any(thread.is_alive() for thread in threads):
            start = time.monotonic()
            client.get("/health").raise_for_status()
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.01)
    return answers, slowest


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='xx') %}"
        "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{{ 'x' * 3000000000 }}",
        "{{ range(3000000000) | list }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'x' * 2000000 }}",
        "{{ 1 + 'x' }}",
    ],
    ids=["loops", "doubling", "giant", "range", "recursion", "long", "fails"],
)
def test_a_template_is_bounded_in_time_and_size(model, tmp_path, monkeypatch, template):
    """It is a program that came with the model. It costs its own request an error, and no other
    request a second.
    """
    folder = copy_of(model, tmp_path / "evil", template)
    start = time.monotonic()
    with before_an_engine(folder, tmp_path, monkeypatch) as root:
        [answer], slowest = asked_meanwhile(root, [ASK])
    assert answer.status_code == 400 and "template" in answer.json()["error"]["message"]
    # Seconds when idle; a busy machine takes longer, and an unbounded template for ever.
    assert slowest < 1 and time.monotonic() - start < 90


def test_a_long_prompt_stops_nobody_else(model, tmp_path, monkeypatch):
    """A megabyte is seconds of the tokenizer's work."""
    body = {"messages": [{"role": "user", "content": "What is the kettle for? " * 40_000}]}
    with before_an_engine(model, tmp_path, monkeypatch, body_bytes=10**7) as root:
        answers, slowest = asked_meanwhile(root, [body] * 3)
    assert {answer.status_code for answer in answers} == {400} and slowest < 1
    assert "tokens" in answers[0].json()["error"]["message"]


def test_a_client_that_hangs_up_spoils_no_other_s_prompt(model):
    """The process that writes prompts finishes the one whose client has gone."""

    async def run():
        engine = OwnEngine("dpo", Limits(), model)
        short = own_engine.ChatRequest(**ASK)
        wanted = await engine.prepare(short)
        long = {"role": "user", "content": "What is the kettle for? " * 20_000}
        for _ in range(3):
            gone = asyncio.create_task(engine.prepare(own_engine.ChatRequest(messages=[long])))
            await asyncio.sleep(0.02)
            gone.cancel()
            assert await engine.prepare(short) == wanted
        await engine.client.aclose()

    asyncio.run(run())


# What an engine may answer.


def endless(status: int, pause: float):
    """An engine that refuses with a body that does not end."""
    app, sent = FastAPI(telemetry={"tracing": False}), []

    @app.get("/v1/models")
    async def models():
        return {"data": []}

    async def parts():
        while True:
            await asyncio.sleep(pause)
            sent.append(1)
            yield b"x" * 65536 if not pause else b"x"

    @app.post("/v1/chat/completions")
    async def chat():
        return StreamingResponse(parts(), status)

    return app, sent


@pytest.mark.parametrize(("pause", "status"), [(0.2, 504), (0.0, 400)], ids=["slow", "large"])
def test_an_engine_s_error_has_a_deadline_and_a_size(tmp_path, monkeypatch, pause, status):
    app, sent = endless(400, pause)
    monkeypatch.setattr(FakeEngine, "app", lambda self: app)
    with gateway(tmp_path, FakeEngine(), timeout=2) as bench:
        start = time.monotonic()
        answer = bench.post(json=ASK, timeout=15)
        assert answer.status_code == status and time.monotonic() - start < 10
        until(lambda: bench.slots.running == 0, "free place")
        before = len(sent)
        time.sleep(0.5)
        assert len(sent) - before < 3  # the engine was hung up on


NONSENSE = {
    "list": {"choices": [{"delta": {"content": ["a", "b"]}}]},
    "number": {"choices": [{"delta": {"content": 7}}]},
    "half a character": {"choices": [{"delta": {"content": "\ud800"}}]},
    "reason": {"choices": [{"delta": {}, "finish_reason": ["stop"]}]},
    "usage": {"choices": [], "usage": {"prompt_tokens": "many"}},
    "list of lists": {"choices": [[]]},
}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("piece", NONSENSE.values(), ids=NONSENSE)
def test_what_is_no_chat_answer_is_an_error_that_says_so(tmp_path, monkeypatch, piece, stream):
    """After a good first piece. A stream tells its client before it ends."""

    async def words(self):
        for part in ({"choices": [{"delta": {"content": "Good"}}]}, piece):
            yield f"data: {json.dumps(part)}\n\n"

    monkeypatch.setattr(FakeEngine, "words", words)
    with gateway(tmp_path, FakeEngine()) as bench:
        answer = bench.post(json={**ASK, "stream": stream})
    if stream:
        assert answer.status_code == 200 and "Good" in answer.text
        last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    else:
        assert answer.status_code == 502
        last = answer.json()
    assert last["error"]["code"] == "engine_failed" and "no chat answer" in last["error"]["message"]


# Real processes: whole answers, and the end.


def seconds_of(process: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def endless_question(service) -> dict:
    """A request whose answer fills all 480 tokens."""
    client = OpenAI(base_url=service.url, api_key="none", max_retries=0)
    for thing in ("lamp", "kettle", "piano", "rope", "boat", "oven", "garden", "bicycle"):
        body = {**LONG, "messages": [{"role": "user", "content": f"Tell me about the {thing}."}]}
        answer = client.chat.completions.create(model="dpo", **body | {"max_tokens": 200})
        if answer.choices[0].finish_reason == "length":
            return body
    raise AssertionError("every answer ends")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_client_that_hangs_up_frees_the_real_engine(service, stream):
    """The engine works no more, though most of the answer is unwritten."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("reads /proc, which only Linux has")
    [worker], body = worker_ids(service), endless_question(service) | {"stream": stream}
    url = f"{service.root}/v1/chat/completions"
    start = seconds_of(worker)
    httpx.post(url, json=body, trust_env=False, timeout=60).raise_for_status()
    whole = seconds_of(worker) - start
    start = seconds_of(worker)
    settings = {"json": body, "timeout": 0.1, "trust_env": False}
    with suppress(httpx.ReadTimeout), httpx.stream("POST", url, **settings) as answer:
        next(answer.iter_bytes())
    time.sleep(whole)
    assert seconds_of(worker) - start < 0.75 * whole
    metrics = httpx.get(f"{service.root}/metrics", trust_env=False).text
    assert 'gateway_running{model="dpo"} 0.0' in metrics


def test_sigterm_in_mid_stream_finishes_what_has_begun(model, tmp_path):
    """Real processes: a stream and a plain request are answered to their end and recorded; then the
    gateway ends with status 0, and its engine with it.
    """
    store = tmp_path / "store.sqlite"
    with serving("--model", str(model), "--store", str(store)) as service:
        [worker], body = worker_ids(service), endless_question(service)
        url, plain = f"{service.root}/v1/chat/completions", []

        def ask():
            plain.append(httpx.post(url, json=body, trust_env=False, timeout=60))

        thread = threading.Thread(target=ask)
        with httpx.stream("POST", url, json={**body, "stream": True}, trust_env=False) as stream:
            lines = stream.iter_lines()
            events = [next(lines) for _ in range(6)]
            thread.start()
            running = f"{service.root}/metrics"
            until(lambda: "} 2.0" in httpx.get(running, trust_env=False).text, "two requests", 5)
            service.process.send_signal(signal.SIGTERM)
            events += lines
        thread.join(60)
        assert service.process.wait(60) == 0, service.said()
    assert events[-2] == "data: [DONE]" and plain[0].json()["usage"]["completion_tokens"] == 480
    words = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
    text = "".join(w["choices"][0]["delta"].get("content") or "" for w in words if w["choices"])
    assert text == plain[0].json()["choices"][0]["message"]["content"]
    assert not Path(f"/proc/{worker}").exists()
    with sqlite3.connect(store) as rows:
        kept = dict(rows.execute("SELECT id, status FROM requests"))
    assert kept[plain[0].json()["id"]] == kept[words[0]["id"]] == 200
