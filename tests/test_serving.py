"""The parts of the gateway by themselves: keys, rates, the line, model folders, and the command
line.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving_tools import save_chat_model
from transformers import AutoTokenizer

from common.io.formats import dialogue
from common.models import CHAT_TEMPLATE
from deploy.serving.__main__ import _parse, gateway_of, main, named
from deploy.serving.chat import ChatRequest
from deploy.serving.folders import check_folder
from deploy.serving.limits import Limits, RateLimit, Refusal, Slots, caller, is_loopback, read_keys
from deploy.serving.own_engine import OwnEngine
from deploy.serving.prompts import PromptFormat
from deploy.serving.start import serving
from deploy.serving.worker import batching_options

ROOT = Path(__file__).parents[1]
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dpo"
    save_chat_model(folder)
    return folder


def options_of(model, tmp_path, *more):
    return _parse(["--model", str(model), "--store", str(tmp_path / "store.sqlite"), *more])


def test_a_key_is_known_by_its_name_and_never_kept_itself():
    keys = read_keys(f" {KEY} , another-key-of-ours,")
    assert len(keys) == 2 and caller(keys, f"Bearer {KEY}") == caller(keys, f"bearer {KEY} ")
    assert caller(keys, f"Bearer {KEY}").startswith("key-") and KEY not in str(keys)


def test_a_key_that_can_be_guessed_is_refused_with_a_way_to_make_one():
    with pytest.raises(ValueError, match="token_urlsafe"):
        read_keys(f"{KEY},short")


def test_keys_are_compared_in_constant_time(monkeypatch):
    """Every key is compared, also after a match, and only by `hmac.compare_digest`."""
    import hmac

    seen = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append(a) or a == b)
    keys = read_keys(",".join(f"{KEY}{at}" for at in range(5)))
    assert caller(keys, f"Bearer {KEY}0") == list(keys.values())[0] and len(seen) == 5


def test_the_rate_fills_up_evenly():
    """60 a minute: 60 at once, then one per second."""
    now = [0.0]
    rate = RateLimit(60, clock=lambda: now[0])
    for _ in range(60):
        rate.take("a")
    with pytest.raises(Refusal) as refusal:
        rate.take("a")
    assert refusal.value.retry_after == 1
    rate.take("b")
    now[0] = 2.5
    rate.take("a")
    rate.take("a")
    with pytest.raises(Refusal):
        rate.take("a")
    now[0] = 10_000
    for _ in range(60):  # no more than a minute's worth is saved up
        rate.take("a")
    with pytest.raises(Refusal):
        rate.take("a")


def test_the_line_is_bounded_and_in_order():
    """Two places, three may wait, ten come: five get in, in the order in which they came; five are
    refused at once.
    """

    async def run():
        slots, order, go = Slots(2, 3), [], asyncio.Event()

        async def one(at):
            async with slots.place("me"):
                order.append(at)
                await go.wait()

        tasks = [asyncio.create_task(one(at)) for at in range(10)]
        while sum(task.done() for task in tasks) < 5:
            await asyncio.sleep(0)
        assert (slots.running, slots.waiting) == (2, 3)
        go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 2, 3, 4] and (slots.running, slots.waiting) == (0, 0)
        assert all(
            isinstance(r, Refusal) and r.status == 429 and r.retry_after >= 1 for r in results[5:]
        )

    asyncio.run(asyncio.wait_for(run(), 20))


def test_where_places_are_shared_no_caller_has_more_than_half():
    """Four places, six may wait, two callers. One sends ten requests: two run, three wait, five are
    refused with the reason. The other one's next two run at once.
    """

    async def run():
        slots, go = Slots(4, 6), asyncio.Event()
        slots.shared = True

        async def one(caller):
            async with slots.place(caller):
                await go.wait()

        greedy = [asyncio.create_task(one("greedy")) for _ in range(10)]
        while sum(task.done() for task in greedy) < 5:
            await asyncio.sleep(0)
        assert (slots.running, slots.waiting) == (2, 3)
        others = [asyncio.create_task(one("other")) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert (slots.running, slots.waiting) == (4, 3)
        go.set()
        results = await asyncio.gather(*greedy, *others, return_exceptions=True)
        refused = [result for result in results if result]
        assert len(refused) == 5 and (slots.running, slots.waiting) == (0, 0)
        said = "2 requests of this key, which has half of the places, are running and 3 are waiting"
        assert all(refusal.status == 429 and said in str(refusal) for refusal in refused)

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(("keys", "shared"), [("", False), (KEY, False), (f"{KEY},{KEY}2", True)])
def test_places_are_shared_where_there_is_more_than_one_key(
    model, tmp_path, monkeypatch, keys, shared
):
    monkeypatch.setenv("LAB_API_KEYS", keys)
    gateway = gateway_of(options_of(model, tmp_path))
    assert [engine.slots.shared for engine in gateway.engines.values()] == [shared]
    gateway.store.close()


def test_who_leaves_the_line_takes_no_place():
    async def run():
        slots, go = Slots(1, 5), asyncio.Event()

        async def one():
            async with slots.place("me"):
                await go.wait()

        tasks = [asyncio.create_task(one()) for _ in range(3)]
        while slots.waiting < 2:
            await asyncio.sleep(0)
        tasks[1].cancel()
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (slots.running, slots.waiting) == (0, 0) and not slots.free.locked()

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("192.168.1.2", False),
        ("::", False),
        ("example.org", False),
        ("", False),
        ("localhost.example.org", False),
    ],
)
def test_what_counts_as_this_machine(host, own):
    assert is_loopback(host) is own


def test_without_keys_no_other_address_is_bound(model, tmp_path, monkeypatch):
    monkeypatch.delenv("LAB_API_KEYS", raising=False)
    with pytest.raises(ValueError, match="Set LAB_API_KEYS"):
        gateway_of(options_of(model, tmp_path, "--host", "0.0.0.0"))
    monkeypatch.setenv("LAB_API_KEYS", KEY)
    gateway = gateway_of(options_of(model, tmp_path, "--host", "0.0.0.0"))
    assert list(gateway.keys.values())[0].startswith("key-")
    gateway.store.close()


def test_no_port_is_opened_before_the_keys_are_checked(model, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LAB_API_KEYS", raising=False)
    monkeypatch.setattr("socket.create_server", lambda *_, **__: pytest.fail("a port was opened"))
    store = str(tmp_path / "s.sqlite")
    assert main(["--model", str(model), "--host", "0.0.0.0", "--store", store]) == 2
    assert "Set LAB_API_KEYS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ("--timeout", "-1"),
        ("--concurrency", "0"),
        ("--queue", "-1"),
        ("--retention-days", "-1"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_whatever_the_queue(model, tmp_path, wrong):
    """A queue of 0 is a choice, nobody waits; it says nothing of the other limits."""
    with pytest.raises(ValueError, match="above 0|0 or larger"):
        gateway_of(options_of(model, tmp_path, "--queue", "0", *wrong))


def test_the_command_ends_with_one_sentence_where_it_cannot_serve(tmp_path):
    """As a process: status 2, no traceback, and what to do."""
    command = [
        sys.executable,
        "-m",
        "deploy.serving",
        "--port",
        "0",
        "--model",
        str(tmp_path / "none"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LAB_API_KEYS": ""}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, cwd=tmp_path
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        "is not a model folder" in result.stderr
        and "python -m common.training dpo" in result.stderr
    )


def test_a_gateway_that_cannot_start_is_an_error_with_its_words(tmp_path):
    with (
        pytest.raises(RuntimeError, match="not a model folder"),
        serving("--model", str(tmp_path / "none")),
    ):
        pass


def test_models_are_named_by_their_folders_and_weighted():
    found = named(["runs/cpu/dpo=0.9", "runs/cpu/orpo=0.1"])
    assert found == {"dpo": ("runs/cpu/dpo", 0.9), "orpo": ("runs/cpu/orpo", 0.1)}
    assert list(named(["runs/cpu/dpo", "runs/smoke/dpo=2"])) == ["cpu/dpo", "smoke/dpo"]


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["a=many"], "write --model DIR=WEIGHT"),
        (["a", "./a"], "given twice"),
        (["x/auto"], "'auto'"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(models, said):
    with pytest.raises(ValueError, match=said):
        named(models)


def test_an_engine_that_already_runs_keeps_its_model_s_name(tmp_path):
    arguments = [
        "--model",
        "org/model=2",
        "--engine",
        "http://127.0.0.1:9/v1/",
        "--store",
        str(tmp_path / "s.sqlite"),
    ]
    gateway = gateway_of(_parse(arguments))
    assert gateway.weights == {"org/model": 2.0}
    engine = gateway.engines["org/model"]
    assert engine.url == "http://127.0.0.1:9" and not isinstance(engine, OwnEngine)
    gateway.store.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "pytorch_model.bin").write_text(""), "pickled files"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled files"),
        (lambda f: (f / "model.safetensors").rename(f / "decoy.safetensors"), "no model.safe"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "Merge it"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"auto_map": {}}'), "remote code"),
    ],
)
def test_a_folder_that_is_no_safe_model_is_refused(tmp_path, change, said):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (tmp_path / name).write_text("{}")
    check_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=said):
        check_folder(tmp_path)


def test_the_prompt_is_the_course_s_own(model):
    """Three ways to one text: the library with the course's template, the gateway's template, the
    plain function.
    """
    tokenizer, form = AutoTokenizer.from_pretrained(model), PromptFormat(model)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": " Be kind "},
            {"role": "user", "content": "a\n\nb"},
            {"role": "assistant", "content": " Yes. "},
            {"role": "user", "content": "<&>é{{ 1 }}"},
        ],
    ):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert dialogue(messages) == wanted
        assert form.prompt(messages) == (wanted, len(tokenizer(wanted)["input_ids"]))


def test_a_template_cannot_reach_out_of_its_sandbox(model, tmp_path):
    for name in os.listdir(model):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="template refuses"):
        PromptFormat(tmp_path).prompt([{"role": "user", "content": "Hi"}])


def test_an_answer_without_a_limit_gets_what_fits(model):
    async def run():
        engine = OwnEngine("dpo", Limits(max_tokens=300), model)
        request = ChatRequest(messages=[{"role": "user", "content": "Hi"}])
        written, tokens = await engine.prepare(request)
        text, length = engine.format.prompt(request.messages)
        assert tokens == 300 and written.messages == [{"role": "user", "content": text}]
        engine.format.context = 50
        assert (await engine.prepare(request))[1] == 50 - length
        await engine.client.aclose()

    asyncio.run(run())


def test_a_prompt_that_leaves_no_room_is_refused(model):
    async def run():
        engine = OwnEngine("dpo", Limits(), model)
        long = [{"role": "user", "content": "What is the kettle for? " * 100}]
        with pytest.raises(Refusal, match="Send a shorter prompt") as raised:
            await engine.prepare(ChatRequest(messages=long))
        assert raised.value.code == "context_length_exceeded"
        short = [{"role": "user", "content": "Hi"}]
        with pytest.raises(Refusal, match=r"Ask for at most \d+ tokens"):
            await engine.prepare(ChatRequest(messages=short, max_tokens=510))
        await engine.client.aclose()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("batching", "temperature", "options", "refused"),
    [
        (True, 0.5, {"temperature": 1.0}, "temperature"),
        (True, 0.5, {"temperature": 0.5}, None),
        (True, 0.0, {"top_p": 0.5}, "top_p"),
        (True, 0.5, {"seed": 3}, "seed"),
        (True, 0.0, {"seed": 3}, None),
        (True, 0.0, {"stop": ["the"]}, "stop"),
        (False, 0.0, {"temperature": 1.0, "top_p": 0.5, "seed": 3}, None),
        (False, 0.0, {"stop": ["the"]}, "stop"),
    ],
)
def test_options_that_our_own_engine_would_ignore_are_refused(
    model, batching, temperature, options, refused
):
    engine = OwnEngine("dpo", Limits(), model, batching, temperature)
    if refused:
        with pytest.raises(Refusal) as raised:
            engine.check_options(options)
        assert raised.value.body["error"]["param"] == refused
    else:
        engine.check_options(options)
    asyncio.run(engine.client.aclose())


def test_without_batching_each_request_brings_its_own_sampling(model):
    """The engine reads temperature and top_p from `generation_config` only."""
    engine = OwnEngine("dpo", Limits(), model, batching=False, temperature=0.0)
    messages = [{"role": "user", "content": "Hi"}]
    for options, sampled in (({}, False), ({"temperature": 0.7, "seed": 3}, True)):
        body = engine._body(ChatRequest(messages=messages, **options), 9)
        settings = json.loads(body["generation_config"])
        assert settings["do_sample"] is sampled and settings["top_k"] == 0
        assert settings["temperature"] == options.get("temperature", 1.0)
        assert "temperature" not in body and body.get("seed") == options.get("seed")
    asyncio.run(engine.client.aclose())


WORKER = """
import socketserver
from http.server import BaseHTTPRequestHandler
from pathlib import Path

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *words):
        pass

print("hello", flush=True)
Path("socket").unlink(missing_ok=True)
socketserver.UnixStreamServer("socket", Answers).serve_forever()
"""


def test_our_own_engine_is_started_again_when_it_dies_and_ended_with_us(
    model, tmp_path, monkeypatch
):
    """A small server stands in for `worker`; it is killed once."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr("deploy.serving.own_engine.WORKER", tmp_path / "worker.py")

    async def run():
        engine = OwnEngine("dpo", Limits(), model)
        life = asyncio.create_task(engine.supervise())
        await engine.ready.wait()
        first = engine.process
        first.kill()
        while engine.ready.is_set():
            await asyncio.sleep(0.01)
        await engine.ready.wait()
        second = engine.process
        assert second.pid != first.pid and engine.restarts == 1 and "hello" in engine.last_lines
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        assert second.returncode is not None and not engine.ready.is_set()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_engine_that_ends_before_it_is_ready_says_so(model, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr("deploy.serving.own_engine.WORKER", tmp_path / "worker.py")

    async def run():
        engine = OwnEngine("dpo", Limits(), model)
        with pytest.raises(RuntimeError, match="ended with status 3"):
            await engine._start()
        await engine._stop()
        await engine.client.aclose()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_batching_takes_a_fixed_share_of_a_cpu_s_memory_and_measures_a_gpu():
    assert batching_options(128, cuda=True) == ["--continuous-batching"]
    sizes = dict(zip(*[iter(batching_options(4096, cuda=False)[1:])] * 2, strict=True))
    assert (
        int(sizes["--cb-num-blocks"]) * int(sizes["--cb-block-size"]) == 4 * 4096
    )  # four whole contexts


def test_the_gateway_imports_no_torch_and_nothing_of_ours():
    """All modules but the worker, in a process of their own."""
    modules = [
        path.stem
        for path in (ROOT / "deploy/serving").glob("*.py")
        if path.stem not in ("worker", "page")
    ]
    assert len(modules) > 8
    imported = ", ".join(f"deploy.serving.{name}" for name in modules)
    code = f"import sys, {imported}; print(sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    loaded = set(json.loads(result.stdout.replace("'", '"')))
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "common"}) and "fastapi" in loaded


def test_the_dockerfile_runs_the_command_that_is_tested_here(model):
    """The real command line reads its entry point; it installs what the gateway imports."""
    text = (ROOT / "Dockerfile").read_text()
    entry = json.loads(text.split("ENTRYPOINT ")[1].splitlines()[0])
    assert entry[:3] == ["python", "-m", "deploy.serving"]
    options = _parse([*entry[3:], "--model", str(model)])
    assert (options.host, options.port) == ("0.0.0.0", 8000) and not options.log_prompts
    packages = text.split("'^(")[1].split(")==")[0].split("|")
    pinned = [
        line.split("==")[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line
    ]
    assert (
        {"fastapi", "uvicorn", "httpx", "prometheus-client", "openai", "torch"}
        <= set(packages)
        <= set(pinned)
    )
