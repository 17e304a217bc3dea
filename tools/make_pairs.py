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
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

import httpx
import openai

from common.io.files import write_json, written_whole
from common.io.fingerprints import digest
from common.io.formats import DataError, as_prompt, messages_of
from common.io.tables import file_rows, local_files

OFFICIAL, OFFICIAL_KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
SAMPLER_KEY, JUDGE_KEY = "LAB_SAMPLER_KEY", "LAB_JUDGE_KEY"
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


class EndpointError(RuntimeError):
    """The API cannot be used. The message says what to do; what was answered so far is kept."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an API, with a folder of its replies. Its key is written nowhere.

    The key is read from the variable `key_variable`; without one, from OPENAI_API_KEY for OpenAI's
    own address and from LAB_SAMPLER_KEY for any other. `options` go to the API with each request:
    temperature, max_tokens, …
    """

    model: str
    base_url: str = OFFICIAL
    cache: Path = Path("pairs.jsonl.cache")
    options: dict = field(default_factory=dict)
    # by the client, with growing pauses, after a lost connection, a time-out, 408, 409, 429 or 5xx
    retries: int = 5
    timeout: float = 120.0  # seconds a request
    key_variable: str = ""
    plain_http: bool = False  # a key may cross a network in clear text

    @property
    def url(self) -> httpx.URL:
        """Raises: EndpointError."""
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise EndpointError(f"--base-url is no address: {error}.") from error
        if url.userinfo:  # it would stand in every message
            raise EndpointError("An address must hold no user name or password. Use a variable.")
        return url

    @property
    def official(self) -> bool:
        return (self.url.scheme, self.url.netloc) == ("https", b"api.openai.com")

    @property
    def variable(self) -> str:
        return self.key_variable or (OFFICIAL_KEY if self.official else SAMPLER_KEY)

    def client(self) -> openai.OpenAI:
        """Sends the key of this service and nothing that is meant for another one.

        Raises: EndpointError.
        """
        key = os.environ.get(self.variable)
        if not key and self.variable not in (SAMPLER_KEY, JUDGE_KEY):
            raise EndpointError(
                f"{self.variable} is not set. Set it, or name your own server with --base-url."
            )
        try:
            here = self.url.host == "localhost" or ip_address(self.url.host).is_loopback
        except ValueError:  # another name
            here = False
        if key and not (self.url.scheme == "https" or here or self.plain_http):
            raise EndpointError(
                f"{self.base_url} is plain http: {self.variable} would cross the network in clear "
                "text. Use https, or allow it with --allow-plain-http."
            )
        key, headers = key or "none", {}
        if not self.official:  # the library adds these by itself
            custom = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
            names = [line.partition(":")[0].strip() for line in custom]
            names += ["OpenAI-Organization", "OpenAI-Project"]
            headers = dict.fromkeys(names, openai.Omit()) | {"Authorization": f"Bearer {key}"}
        return openai.OpenAI(
            api_key=key,
            base_url=str(self.url),
            max_retries=self.retries,
            timeout=self.timeout,
            default_headers=headers,
            # A redirect would take the prompts elsewhere; a proxy is not for this machine.
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not here),
        )

    def ask(self, client: openai.OpenAI, messages: list[dict], number: int = 0) -> dict:
        """{"text", "finish_reason"} of one reply, from the cache if it is there.

        `number` tells the samples of one prompt apart. Raises: EndpointError, OSError.
        """
        request = {"model": self.model, "messages": messages, **self.options}
        path = self.cache / f"{digest([self.base_url, request, number])}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            pass  # not asked yet, or a file that something else broke
        try:
            choice = client.chat.completions.create(**request).choices[0]
        except (openai.OpenAIError, IndexError, TypeError) as error:
            raise EndpointError(self._advice(error)) from error
        reply = {"text": choice.message.content or "", "finish_reason": choice.finish_reason}
        write_json(path, reply)
        return reply

    def _advice(self, error: Exception) -> str:
        after, status = f"after {self.retries} retries", getattr(error, "status_code", None)
        why = " ".join(str(error).split())[:200]
        kind = type(error).__name__
        refused = f"refuses the key. Set {self.variable}, or name another variable with "
        refused += "--key-variable or --judge-key-variable"
        # The first kind that fits, so the narrow ones come first. A time-out is no connection, too.
        problems = {
            openai.RateLimitError: f"takes no more requests (429, {after}). Wait, or lower "
            "--workers",
            openai.AuthenticationError: refused,
            openai.PermissionDeniedError: refused,
            openai.NotFoundError: f"does not know the model {self.model!r} or this path. Check the "
            "model and --base-url",
            openai.APIConnectionError: f"cannot be reached ({after}). Is the server running? Check "
            "--base-url",
            openai.InternalServerError: f"fails (status {status}, {after}). Try again later",
            openai.APIStatusError: f"refuses the request (status {status}: {why}). Change the "
            "options, or try --bare",
            Exception: f"sends a reply that is no chat completion ({kind}). Check --base-url",
        }
        problem = next(text for known, text in problems.items() if isinstance(error, known))
        if status and 300 <= status < 400:
            problem = f"sends the request elsewhere (status {status}). Check --base-url"
        kept = "What was answered is kept: the same command goes on from there."
        return f"{self.base_url} {problem}. {kept}"


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
