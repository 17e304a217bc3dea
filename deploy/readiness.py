"""Is a service ready? A list of lines that show their evidence, or fail."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from common.io.formats import messages_of
from common.lab import Lab
from deploy.abtest import TwoShares
from deploy.export import load_exported, verify_export
from deploy.feedback import ask
from deploy.inference import percentiles
from deploy.serving.folders import FolderError
from deploy.serving.start import RunningGateway
from deploy.serving.store import answers


@dataclass(frozen=True)
class Item:
    """One line of the list, as it came out."""

    name: str
    passed: bool
    evidence: str


def readiness(items: dict[str, Callable[[], str]]) -> list[Item]:
    """Runs every item and prints it. An item is a function that returns its evidence, or raises.

    An item that raises, or that returns no text, has failed; the others are run all the same.
    """
    found = []
    for name, item in items.items():
        try:
            evidence, passed = item(), True
            said = isinstance(evidence, str) and bool(evidence.strip())
            require(said, f"no evidence, it returned {evidence!r}")
        except Exception as error:  # whatever goes wrong is what the list is for
            evidence, passed = f"{type(error).__name__}: {error}".partition("\n")[0], False
        print(f"{'ok    ' if passed else 'FAILED'}  {name}: {evidence}")
        found.append(Item(name, passed, evidence))
    failed = [item.name for item in found if not item.passed]
    said = f"NOT READY: {'; '.join(failed)}" if failed else "Ready."
    print(f"\n{len(found) - len(failed)} of {len(found)} passed. {said}")
    return found


def require(condition: bool, otherwise: str) -> None:
    """Raises AssertionError with what was found instead."""
    if not condition:
        raise AssertionError(otherwise)


# Items. Each returns its evidence, or raises AssertionError or what went wrong.


def is_the_model(lab: Lab, stage: str, folder: Path) -> str:
    found = verify_export(lab, stage, folder)
    return f"|Δ logit| ≤ {found['max_logit_difference']:.1e} over {found['tokens']} tokens"


def refusals(folder: Path) -> dict[str, str]:
    """What `load_exported` says of copies that were tampered with: {how: its message}.

    Raises: AssertionError if one of them is loaded.
    """
    found = {}
    for how in ("a pickle beside the weights", "remote code in the configuration"):
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(shutil.copytree(folder, Path(scratch) / "copy"))
            if how.startswith("a pickle"):
                torch.save({}, copy / "pytorch_model.bin")
            else:
                config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
                config["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
                (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
            try:
                load_exported(copy)
            except FolderError as error:
                found[how] = str(error).replace(str(copy), "copy")
        require(how in found, f"{how}: it was loaded")
    return found


def unsafe_is_refused(folder: Path) -> str:
    return f"{len(refusals(folder))} tampered copies refused"


def same_answers(found: list[str], expected: list[str], share: float = 0.95) -> str:
    """Raises: AssertionError where fewer than `share` agree: a large model's logits may tie, and
    then the batch decides.
    """
    equal = sum(a.strip() == b.strip() for a, b in zip(found, expected, strict=True))
    said = f"{equal} of {len(found)} answers equal the model's own greedy answers"
    require(equal >= share * len(found), said)
    return said


def licence_is_known(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8")
    require("(unknown)" not in text, "the licence of model or data was not looked up")
    return text[text.index("license:") :].splitlines()[0]


def is_fast_enough(seconds: list[float], limit: float) -> str:
    slowest = percentiles(seconds)["p95"]
    require(slowest <= limit, f"p95 {slowest:.2f} s, the limit is {limit:g} s")
    return f"p95 {slowest:.2f} s, limit {limit:g} s"


def abuse(service: RunningGateway, key: str) -> dict[str, tuple[int, str]]:
    """Requests that a gateway must refuse: {what: (status, message)}; the last one is honest."""

    def post(secret: str = key, **fields) -> tuple[int, str]:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, **fields}
        return send(json.dumps(body), secret)

    def send(body: str, secret: str = key) -> tuple[int, str]:
        headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
        options = {"headers": headers, "timeout": 120, "trust_env": False}
        reply = httpx.post(f"{service.url}/chat/completions", content=body, **options)
        return reply.status_code, reply.json().get("error", {}).get("message", "")

    return {
        "wrong key": post("x" * 32),
        "unknown model": post(model="gpt-9"),
        "malformed JSON": send("{"),
        "negative max_tokens": post(max_tokens=-1),
        "huge max_tokens": post(max_tokens=10**9),
        "10 MB body": post(messages=[{"role": "user", "content": "x" * 10_000_000}]),
        "an honest request": post(),
    }


def abuse_is_refused(service: RunningGateway, key: str) -> str:
    """And the service answers afterwards."""
    statuses = {name: status for name, (status, _) in abuse(service, key).items()}
    *refused, after = statuses.values()
    good = all(400 <= status < 500 for status in refused) and after == 200
    require(good, str(statuses))
    return f"{len(refused)} kinds refused, then it still answers"


def logs_are_private(services: list[RunningGateway], prompts: list[str], key: str) -> str:
    log = "".join(service.said() for service in services)
    leaked = [prompt for prompt in prompts if messages_of(prompt)[-1]["content"] in log]
    require(not leaked and key not in log, f"{len(leaked)} prompts, key: {key in log}")
    return f"none of {len(prompts)} prompts and no key in {len(log):,} characters of logs"


def feedback_is_kept(service: RunningGateway, client, key: str, prompt: str, store: Path) -> str:
    reply = ask(client, [("auditor", prompt)], max_tokens=8)[0]
    body = {"request_id": reply["id"], "rating": "up", "consent": False}
    options = {"headers": {"authorization": f"Bearer {key}"}, "trust_env": False}
    kept = httpx.post(f"{service.url}/feedback", json=body, **options).json()["kept"]
    row = next(row for row in answers(store) if row["id"] == reply["id"])
    require(kept and row["rating"] == 1 and row["consent"] == 0, f"{kept}, {row}")
    return "a vote without consent is in the store, as a vote without consent"


def is_better(outcome: str, shares: TwoShares | None, candidate: str) -> str:
    require(outcome == candidate, f"the A/B test says: {outcome}")
    return f"A/B test at its planned horizon: {shares}"


def drift_is_noticed(alarmed: dict[str, dict]) -> str:
    """Args: {window: its alarms}; nothing changed in the windows called quiet."""
    quiet = {name: raised for name, raised in alarmed.items() if name.startswith("quiet")}
    loud = {name: ", ".join(raised) for name, raised in alarmed.items() if name not in quiet}
    require(not any(quiet.values()), f"alarm in quiet traffic: {quiet}")
    require(any(loud.values()), f"no change was noticed: {list(loud)}")
    return "; ".join(f"{name}: {raised or 'not noticed'}" for name, raised in loud.items())


def ends_clean(services: list[RunningGateway], close: Callable[[], None]) -> str:
    """Ends the services: no process of theirs may be left."""
    processes = [psutil.Process(service.process.pid) for service in services]
    for gateway in list(processes):
        processes += gateway.children(recursive=True)
    close()
    alive = [process for process in processes if process.is_running()]
    left = [process.pid for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    require(not left, f"still running: {left}")
    return f"all {len(processes)} processes ended"
