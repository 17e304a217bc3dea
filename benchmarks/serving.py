"""What the gateway costs: `python -m benchmarks.serving`.

Asks one engine the same questions directly and through the gateway, in turn, in one run: first one
at a time, then many at once. Prints the time that the gateway adds (p50 and p95 of the differences)
and its resident memory, and writes benchmarks/results/serving.json. Ends with status 1 if an aim is
missed: p50 at most 8 ms, memory at most 150 MB.
"""

import argparse
import asyncio
import os
import platform
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles

import httpx

from common.io.files import write_json
from common.io.fingerprints import versions
from common.lab import open_lab
from common.training import train
from deploy.serving import worker
from deploy.serving.engine import OFFLINE, free_port
from deploy.serving.start import serving, wait_for

RESULTS = Path(__file__).parent / "results" / "serving.json"
AIM_MS, AIM_MEGABYTES = 8.0, 150.0
SERVING = ("fastapi", "uvicorn", "httpx", "prometheus-client", "openai")
TOKENS = 40  # at most, of an answer


@contextmanager
def engine(folder: str):
    """`transformers serve` as the gateway starts it, on a port that is known; gives its address."""
    port = free_port()
    command = [
        sys.executable,
        "-P",
        worker.__file__,
        "--port",
        str(port),
        "--context",
        "128",
        "--batching",
    ]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **OFFLINE},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_for(answers, 120, "engine")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def ask(
    client: httpx.AsyncClient, url: str, question: str, stream: bool
) -> tuple[float, float, str]:
    """(seconds to the whole answer, seconds to the first text, its text, still as it was sent)."""
    message = [{"role": "user", "content": question}]
    body = {"model": ".", "messages": message, "max_tokens": TOKENS, "stream": stream}
    start, first, parts = time.perf_counter(), 0.0, []
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for part in response.aiter_bytes():
            first = first or (time.perf_counter() - start if b'"content":" ' in part else 0.0)
            parts.append(part)
    return time.perf_counter() - start, first, b"".join(parts).decode()


def spread(seconds: list[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    cuts = quantiles(seconds, n=20, method="inclusive")
    return {"p50_ms": 1e3 * cuts[9], "p95_ms": 1e3 * cuts[18]}


async def one_at_a_time(direct: str, through: str, questions: list[str], stream: bool) -> dict:
    """Pairs of requests, in an order drawn by chance. The overhead is the difference within a pair."""
    times = {direct: [], through: []}
    firsts = {direct: [], through: []}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        for question in questions:
            for url in random.sample([direct, through], 2):
                seconds, first, _ = await ask(client, url, question, stream)
                times[url].append(seconds)
                firsts[url].append(first)
    added = [b - a for a, b in zip(times[direct], times[through], strict=True)]
    report = {
        "direct": spread(times[direct]),
        "gateway": spread(times[through]),
        "overhead": spread(added),
    }
    if stream:
        added = [b - a for a, b in zip(firsts[direct], firsts[through], strict=True)]
        report["first_text_overhead"] = spread(added)
    return report | {"requests": len(questions)}


async def many_at_once(url: str, questions: list[str]) -> dict:
    """All questions at once, streamed: seconds for all of them, and of each."""
    limits = httpx.Limits(max_connections=len(questions))
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=limits) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(ask(client, url, question, True) for question in questions)
        )
        seconds = time.perf_counter() - start
    return {
        "answers_per_second": len(questions) / seconds,
        **spread([answer[0] for answer in answers]),
    }


def resident_megabytes(process: int) -> float | None:
    """Resident memory in MB (1e6 bytes); None where there is no /proc."""
    status = Path(f"/proc/{process}/status")
    return (
        int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024 / 1e6
        if status.exists()
        else None
    )


def processor_seconds(process: int) -> float:
    """Processor time that a process has used: unlike the clock, it does not depend on what else the
    machine does.
    """
    stat = Path(f"/proc/{process}/stat")
    used = stat.read_text().rpartition(")")[2].split()[11:13] if stat.exists() else ("nan", "nan")
    return sum(map(float, used)) / os.sysconf("SC_CLK_TCK")


def measure(folder: str, questions: list[str], concurrency: int) -> dict:
    """All measurements on one engine and one gateway."""
    with engine(folder) as direct:
        options = ("--engine", direct, "--model", ".", "--requests-per-minute", "1000000")
        with serving(*options) as service:
            idle = resident_megabytes(service.process.pid)
            asyncio.run(one_at_a_time(direct, service.root, questions[:20], True))  # warm-up
            used = processor_seconds(service.process.pid)
            report = {
                "plain": asyncio.run(one_at_a_time(direct, service.root, questions, False)),
                "streamed": asyncio.run(one_at_a_time(direct, service.root, questions, True)),
                "at_once": {"requests": concurrency},
            }
            used = processor_seconds(service.process.pid) - used
            report["processor_ms_per_request"] = 1e3 * used / (2 * len(questions))
            crowd = (questions * concurrency)[:concurrency]
            for _ in range(3):  # the last of three counts; the memory is that after all of them
                for name, url in (("direct", direct), ("gateway", service.root)):
                    report["at_once"][name] = asyncio.run(many_at_once(url, crowd))
            loaded = resident_megabytes(service.process.pid)
    return report | {"resident_megabytes": {"idle": idle, "after_load": loaded}}


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, writes. Returns 1 if an aim is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--model", metavar="DIR", help="default: stage dpo of profile smoke, trained if need be"
    )
    parser.add_argument(
        "--requests", type=int, default=200, help="pairs per measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=64, help="requests at once (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    lab = open_lab("smoke", 0)
    if not options.model:
        for stage in ("base", "sft", "dpo"):
            train(lab, stage)
    folder = str(Path(options.model or lab.path("dpo")).resolve())
    texts = [
        prompt.removeprefix("\n\nHuman:").removesuffix("\n\nAssistant:").strip()
        for prompt in lab.prompts
    ]
    questions = (texts * options.requests)[: options.requests]
    report = measure(folder, questions, options.concurrency)
    overhead, memory = (
        report["plain"]["overhead"]["p50_ms"],
        report["resident_megabytes"]["after_load"],
    )
    for name in ("plain", "streamed"):
        for what, values in report[name].items():
            if isinstance(values, dict):
                what = what.replace("_", " ")
                print(
                    f"{name:9s} {what:20s} p50 {values['p50_ms']:7.2f} ms   p95 {values['p95_ms']:7.2f} ms"
                )
    for name in ("direct", "gateway"):
        values = report["at_once"][name]
        print(
            f"{options.concurrency:3d} at once {name:16s} {values['answers_per_second']:7.1f} answers/s   "
            f"p50 {values['p50_ms']:7.1f} ms   p95 {values['p95_ms']:7.1f} ms"
        )
    print(f"processor time of the gateway: {report['processor_ms_per_request']:.2f} ms per request")
    if memory:
        idle = report["resident_megabytes"]["idle"]
        print(f"resident memory of the gateway: {idle:.0f} MB idle, {memory:.0f} MB after the load")
    checks = [
        ("added time, p50, in ms", overhead, AIM_MS),
        ("resident memory in MB", memory, AIM_MEGABYTES),
    ]
    checks = [(what, value, aim) for what, value, aim in checks if value is not None]
    for what, value, aim in checks:
        print(f"{'ok    ' if value <= aim else 'MISSED'} {what}: {value:.1f}, aim at most {aim:g}")
    packages = versions() | {name: version(name) for name in SERVING}
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "versions": packages}
    write_json(RESULTS, {"machine": machine, "load_average": os.getloadavg()[0], **report})
    print(
        f"written: {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS.name}"
    )
    return 0 if all(value <= aim for _, value, aim in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
