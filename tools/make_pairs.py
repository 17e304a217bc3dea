"""Makes preference pairs with language models behind an OpenAI-compatible API.

Each prompt is answered twice, at a temperature that makes the answers differ. A judge, the same
model or another one, is asked which answer is better, in both orders. Where it changes its mind
with the order, calls a tie, or cannot be understood, there is no preference: the prompt is dropped
and counted. Every reply of the API is kept on disk as it comes: a run that was stopped goes on
where it was, and the same run costs nothing the second time. `python -m tools.make_pairs --help`.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from common.io.endpoint import (
    JUDGE_KEY,
    OFFICIAL,
    OFFICIAL_KEY,
    SAMPLER_KEY,
    Endpoint,
    EndpointError,
)
from common.io.files import written_whole
from common.io.formats import DataError, as_prompt, messages_of
from common.io.tables import file_rows, local_files

JUDGE = """\
Below are a conversation and two answers to its last message. Which answer is better: more \
helpful, more correct, and harmless? Do not prefer an answer because it is longer or comes first.

[Conversation]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with one word: A, B, or tie."""


def read_verdict(text: str) -> int | None:
    """1 for the first answer, -1 for the second, 0 for a tie, None where the judge did not say."""
    match = re.fullmatch(r"\W*(?:answer\s+)?(A|B|tie)\W*", text, re.IGNORECASE)
    return {"a": 1, "b": -1, "tie": 0}[match[1].lower()] if match else None


def make_pair(prompt: str, sampler: Endpoint, judge: Endpoint, clients: tuple) -> dict | str:
    """A plain row for one prompt, or the reason why there is none. Raises: EndpointError."""
    messages = messages_of(as_prompt(prompt))
    replies = [sampler.ask(clients[0], messages, number) for number in (0, 1)]
    first, second = (reply["text"].strip() for reply in replies)
    if not first or not second:
        return "an empty answer"
    if any(reply["finish_reason"] == "length" for reply in replies):
        return "an answer cut at the token limit"
    if first == second:
        return "two equal answers"
    talk = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    votes = []
    for one, other in ((first, second), (second, first)):
        question = JUDGE.format(prompt=talk, first=one, second=other)
        reply = judge.ask(clients[1], [{"role": "user", "content": question}])
        votes.append(read_verdict(reply["text"]))
    if None in votes:
        return "a verdict that cannot be read"
    if votes == [0, 0]:
        return "a tie"
    if votes[0] != -votes[1]:
        return "another verdict in the other order"
    chosen, rejected = (first, second) if votes[0] == 1 else (second, first)
    return {"prompt": as_prompt(prompt), "chosen": f" {chosen}", "rejected": f" {rejected}"}


def make_pairs(
    prompts: Iterable[str], sampler: Endpoint, judge: Endpoint, workers: int = 4
) -> tuple[list[dict], Counter]:
    """(plain rows, reasons of the dropped prompts), in the order of the prompts.

    Raises: EndpointError, at the first request that fails for good; replies that came before are
        kept.
    """
    rows, dropped, clients = [], Counter(), (sampler.client(), judge.client())
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(make_pair, prompt, sampler, judge, clients) for prompt in prompts]
        try:
            for job in jobs:
                if isinstance(result := job.result(), str):
                    dropped[result] += 1
                else:
                    rows.append(result)
        except BaseException:  # a failure or Ctrl-C: ask nothing more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return rows, dropped


def read_prompts(path: Path) -> list[str]:
    """Distinct prompts, in order: the lines of a `.txt` file, or the column `prompt` of any file we
    read.

    Raises: DataError.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file.")
    if path.suffix == ".txt":
        prompts = path.read_text(encoding="utf-8").splitlines()
    else:
        prompts = []
        for place, row in file_rows(local_files(path, None)[0]):
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                shown = str(row)[:80]
                raise DataError(f"{place}: a row needs a column prompt with text, not {shown}.")
            prompts.append(row["prompt"])
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))
    if not prompts:
        raise DataError(f"{path.name} holds no prompt.")
    return prompts


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"A key goes only to its own service: {OFFICIAL_KEY} to {OFFICIAL}, {SAMPLER_KEY} "
        f"to any other server, {JUDGE_KEY} to a judge at another address than the model. A server "
        "of your own may need none. Then: LAB_DATA=pairs.jsonl",
    )
    add, default = parser.add_argument, "default: %(default)s"
    add("prompts", type=Path, help="a .txt file, a prompt a line, or rows with a column prompt")
    add("-o", "--output", type=Path, default=Path("pairs.jsonl"), help=default)
    add("--model", required=True, help="answers the prompts: best your own SFT model, served")
    url = os.environ.get("OPENAI_BASE_URL") or OFFICIAL
    add("--base-url", default=url, help="default: OPENAI_BASE_URL, else %(default)s")
    add("--judge-model", help="default: the model itself (which favours its own style)")
    add("--judge-base-url", help="default: that of the model")
    add("--key-variable", default="", help="environment variable of the key; default: see below")
    add("--judge-key-variable", default="", help="the same for the judge")
    add("--allow-plain-http", action="store_true", help="send keys in clear text to other machines")
    add("--temperature", type=float, default=1.0, help=f"of the two answers; {default}")
    add("--max-tokens", type=int, default=512, help=f"of an answer; {default}")
    bare = "send no temperature and limit: some models refuse them"
    add("--bare", action="store_true", help=bare)
    add("--limit", type=int, help="only so many prompts")
    add("--workers", type=int, default=4, help=f"prompts at a time; {default}")
    add("--retries", type=int, default=Endpoint.retries, help=f"of a request; {default}")
    add("--cache", type=Path, help="folder of the replies; default: <output>.cache")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    given = _options(arguments)
    cache = given.cache or given.output.with_name(given.output.name + ".cache")
    sampling = {"temperature": given.temperature, "max_tokens": given.max_tokens}
    judging = {"temperature": 0.0, "max_tokens": 16}
    if given.bare:
        sampling, judging = {}, {}
    judge_model, judge_url = given.judge_model or given.model, given.judge_base_url
    keys = {"key_variable": given.key_variable, "plain_http": given.allow_plain_http}
    sampler = Endpoint(given.model, given.base_url, cache, sampling, given.retries, **keys)
    judge = replace(sampler, model=judge_model, options=judging)
    try:
        if judge_url and judge_url != given.base_url:
            judge = replace(judge, base_url=judge_url)
            judge = replace(judge, key_variable=OFFICIAL_KEY if judge.official else JUDGE_KEY)
        if given.judge_key_variable:
            judge = replace(judge, key_variable=given.judge_key_variable)
        if given.limit is not None and given.limit < 1:
            raise DataError("--limit must be at least 1.")
        prompts = read_prompts(given.prompts)[: given.limit]
        rows, dropped = make_pairs(prompts, sampler, judge, given.workers)
        with written_whole(given.output) as scratch:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            scratch.write_text("".join(lines), encoding="utf-8")
    except (DataError, EndpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        stopped = "stopped. What was answered is kept: the same command goes on from there."
        print(stopped, file=sys.stderr)
        return 130
    print(f"{len(prompts)} prompts, {len(rows)} pairs in {given.output}")
    for reason, count in sorted(dropped.items()):
        print(f"  dropped {count:6d}  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
