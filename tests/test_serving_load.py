"""The gateway as a process of its own under more than it can take: what it answers, what it keeps,
how much memory it needs.
"""

import asyncio
import json
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from serving_tools import ASK, WORDS, FakeEngine, now, running, save_chat_model

from deploy.serving.start import serving
from deploy.serving.store import answers

FLOOD, OTHER = "a-key-of-the-course-1", "a-key-of-the-course-2"
LARGE = {"messages": [{"role": "user", "content": "What is the kettle for? " * 2500}]}  # 60 kB


@pytest.fixture(autouse=True)
def many_files():
    """This process is the other side of 1,000 connections: more open files than many shells allow
    at first.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def process(tmp_path, *options):
    """The gateway's process with two keys and no limit on their rate, and its store."""
    store = tmp_path / "store.sqlite"
    options = ("--store", str(store), "--requests-per-minute", "100000", *options)
    with serving(*options, LAB_API_KEYS=f"{FLOOD},{OTHER}") as service:
        yield service, store


def peak_megabytes(service) -> float:
    """The most memory that this process has had."""
    status = Path(f"/proc/{service.process.pid}/status")
    if not status.exists():
        pytest.skip("reads /proc, which only Linux has")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3


def queued_seconds(service) -> float:
    """How long the gateway's main thread has been ready to run while others had the processor."""
    found = Path(f"/proc/{service.process.pid}/schedstat")
    return int(found.read_text().split()[1]) / 1e9 if found.exists() else 0.0


def client(service, key: str, **settings) -> httpx.AsyncClient:
    settings = {"timeout": 60, "limits": httpx.Limits(max_connections=1000), **settings}
    head = {"authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=service.root, headers=head, trust_env=False, **settings)


@pytest.mark.more
def test_a_thousand_requests_of_60_kb_at_ten_times_the_capacity(tmp_path):
    """Capacity: 20 running and 180 waiting, half of it for one key. 1,000 requests arrive at once;
    each is answered whole, or refused at once with 429. All the bodies together have 60 MB; the
    gateway's peak of memory grows by less than 150 MB.
    """
    fake = FakeEngine(seconds=0.02)
    limits = ("--concurrency", "20", "--queue", "180")
    with (
        running(fake.app()) as url,
        process(tmp_path, "--model", "a", "--engine", url, *limits) as (service, store),
    ):
        before = peak_megabytes(service)

        async def flood():
            async with client(service, FLOOD) as many:
                asked = (many.post("/v1/chat/completions", json=LARGE) for _ in range(1000))
                return await asyncio.gather(*asked)

        responses = asyncio.run(flood())
        statuses = Counter(response.status_code for response in responses)
        grown = peak_megabytes(service) - before
    assert set(statuses) == {200, 429} and statuses[200] >= 100
    assert all(int(r.headers["retry-after"]) >= 1 for r in responses if r.status_code == 429)
    said = [r.json()["choices"][0]["message"]["content"] for r in responses if r.is_success]
    assert set(said) == {"".join(WORDS)} and fake.most <= 10
    assert len(answers(store)) == statuses[200] == fake.finished
    assert grown < 150


def bodies_of(root: str, key: str, body: bytes) -> bytes:
    """A whole request, as bytes."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {root}\r\nAuthorization: Bearer {key}\r\n"
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + kind).encode() + body


@contextmanager
def hostile(root: str):
    """600 requests at once from one key, again and again, half of them with 60 kB; 50 bodies that
    are too large; 100 that trickle; 200 connections on which nothing comes, and 100 with half of
    their headers.

    Gives the ids of the answers to the 600, and a count of their statuses.
    """
    host, port = root.removeprefix("http://").split(":")
    large = bodies_of(host, FLOOD, json.dumps(LARGE).encode())
    small = bodies_of(host, FLOOD, json.dumps(ASK | {"max_tokens": 5}).encode())
    huge = bodies_of(host, FLOOD, b"x" * 1_000_000)
    answered, statuses, over = [], Counter(), asyncio.Event()

    async def send(data: bytes, slow: bytes = b"") -> bytes:
        """The whole of what comes back, until the gateway closes."""
        try:
            reader, writer = await asyncio.open_connection(host, int(port), limit=2**20)
        except OSError:
            return b""
        try:
            writer.write(data)
            for at in range(len(slow)):
                await asyncio.sleep(0.2)
                writer.write(slow[at : at + 1])
            found = await reader.readuntil(b"\r\n\r\n")
            length = int(found.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return found + await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError, IndexError):
            return b""
        finally:
            writer.close()

    async def ask(data: bytes):
        said = await send(data)
        statuses[said[9:12].decode()] += 1
        if said[9:12] == b"200":
            answered.append(json.loads(said.split(b"\r\n\r\n")[1])["id"])

    async def flood():
        while True:
            await asyncio.gather(*(ask(data) for data in [large, small] * 300))

    async def all_of_it():
        others = [send(huge) for _ in range(50)]
        others += [send(large[:-200], large[-200:]) for _ in range(100)]
        others += [send(b"") for _ in range(200)] + [send(large[:50]) for _ in range(100)]
        tasks = [asyncio.create_task(work) for work in (*others, flood())]
        await over.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(all_of_it(),), daemon=True)
    thread.start()
    try:
        yield answered, statuses
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(20)
        loop.close()


def test_under_a_hostile_mix_the_others_are_served_and_nothing_acknowledged_is_lost(tmp_path):
    """For seven seconds, before a real engine with a context of 512 tokens. /health within 1 s at
    p99, not counting the time in which other processes of a busy machine had the processor; each
    request of another key is answered, each of its thumbs kept; the gateway's memory grows by less
    than 150 MB; the store holds every answer.
    """
    save_chat_model(tmp_path / "dpo")
    seconds, ids = [], []
    with process(tmp_path, "--model", str(tmp_path / "dpo")) as (service, store):
        before, end = peak_megabytes(service), now() + 7

        def look():
            with httpx.Client(base_url=service.root, trust_env=False, timeout=20) as probe:
                while now() < end:
                    start, queued = now(), queued_seconds(service)
                    assert probe.get("/health", headers={"connection": "close"}).status_code == 200
                    seconds.append((now() - start, queued_seconds(service) - queued))
                    time.sleep(0.02)

        with hostile(service.root) as (answered, statuses), ThreadPoolExecutor(1) as pool:
            looking = pool.submit(look)
            settings = {"base_url": service.url, "api_key": OTHER, "max_retries": 0, "timeout": 20}
            with OpenAI(**settings) as other:
                while now() < end or len(ids) < 5:
                    answer = other.chat.completions.create(**ASK, max_tokens=5)
                    assert answer.usage.completion_tokens == 5
                    thumb = {"request_id": answer.id, "rating": "up"}
                    assert other.post("/feedback", body=thumb, cast_to=dict)["kept"]
                    ids.append(answer.id)
            looking.result()
        grown = peak_megabytes(service) - before
    kept = {row["id"]: row["rating"] for row in answers(store)}
    assert set(answered) <= kept.keys() and answered and statuses["429"] > 100
    assert all(kept[name] == 1 for name in ids)
    own = [whole - queued for whole, queued in seconds]
    percentile_99 = statistics.quantiles(own, n=100, method="inclusive")[-1]
    assert len(seconds) > 20 and percentile_99 <= 1
    assert grown < 150
