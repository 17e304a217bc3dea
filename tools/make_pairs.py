"""Makes preference pairs with language models behind an OpenAI-compatible API: `python -m
tools.make_pairs --help`.

Each prompt is answered twice, at a temperature that makes the answers differ. A judge, the same
model or another one, is asked which answer is better, in both orders. Where it changes its mind
with the order, calls a tie, or cannot be understood, there is no preference: the prompt is dropped
and counted. Every reply of the API is kept on disk as it comes, so that a run that was stopped goes
on where it was, and the same run costs nothing the second time.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai

from common.io.formats import ASSISTANT, HUMAN, DataError, as_prompt
from common.io.tables import FILE_ENDINGS, file_rows

OFFICIAL = "https://api.openai.com/v1"
JUDGE = """\
Below are a conversation and two answers to its last message. Which answer is better: more helpful, more correct, \
and harmless? Do not prefer an answer because it is longer or comes first.

[Conversation]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with one word: A, B, or tie."""


class ServiceError(RuntimeError):
    """The API cannot be used. The message says what to do; what was answered so far is kept."""


@dataclass(frozen=True)
class Service:
    """A model behind an API, with a folder of its replies. The key, from OPENAI_API_KEY, is written
    nowhere.

    `options` go to the API with each request: temperature, max_tokens, …
    """

    model: str
    base_url: str = OFFICIAL
    cache: Path = Path("pairs.jsonl.cache")
    options: dict = field(default_factory=dict)
    # by the client, with growing pauses, after a lost connection, a time-out, 408, 409, 429 or 5xx
    retries: int = 5
    timeout: float = 120.0  # seconds a request

    def client(self) -> openai.OpenAI:
        key = os.environ.get("OPENAI_API_KEY")
        if not key and self.base_url == OFFICIAL:
            raise ServiceError(
                "OPENAI_API_KEY is not set. Set it, or name your own server with --base-url."
            )
        return openai.OpenAI(
            api_key=key or "none",
            base_url=self.base_url,
            max_retries=self.retries,
            timeout=self.timeout,
        )

    def ask(self, client: openai.OpenAI, messages: list[dict], number: int = 0) -> dict:
        """{"text", "finish_reason"} of one reply, from the cache if there. `number` tells samples
        of one prompt apart.

        Raises: ServiceError.
        """
        request = {"model": self.model, "messages": messages, **self.options}
        key = hashlib.sha256(
            json.dumps([self.base_url, request, number], sort_keys=True).encode()
        ).hexdigest()
        path = self.cache / f"{key}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (
            FileNotFoundError,
            ValueError,
        ):  # not asked yet, or a file that something else broke
            pass
        try:
            choice = client.chat.completions.create(**request).choices[0]
        except (openai.OpenAIError, IndexError, TypeError) as error:
            raise ServiceError(self._advice(error)) from error
        reply = {"text": choice.message.content or "", "finish_reason": choice.finish_reason}
        write_whole(path, json.dumps(reply))
        return reply

    def _advice(self, error: Exception) -> str:
        kept = "What was answered is kept: the same command goes on from there."
        if isinstance(error, openai.RateLimitError):
            problem = f"takes no more requests (429, after {self.retries} retries). Wait, or lower --workers"
        elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            problem = "refuses the key. Check OPENAI_API_KEY"
        elif isinstance(error, openai.NotFoundError):
            problem = f"does not know the model {self.model!r} or this path. Check the model and --base-url"
        elif isinstance(error, openai.APIConnectionError):  # a time-out, too
            problem = f"cannot be reached (after {self.retries} retries). Is the server running? Check --base-url"
        elif isinstance(error, openai.InternalServerError):
            problem = (
                f"fails (status {error.status_code}, after {self.retries} retries). Try again later"
            )
        elif isinstance(error, openai.APIStatusError):
            why = " ".join(str(error).split())[:200]
            problem = f"refuses the request (status {error.status_code}: {why}). Change the options, or try --bare"
        else:
            problem = f"sends a reply that is no chat completion ({type(error).__name__}). Check --base-url"
        return f"{self.base_url} {problem}. {kept}"


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also where the process is killed. Raises: ServiceError
    without room for it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, delete=False
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        raise ServiceError(
            f"Cannot write {path} ({error.strerror}). Free some space, or write elsewhere."
        ) from error


def to_messages(prompt: str) -> list[dict]:
    """A prompt as chat messages: a dialogue in our format turn by turn, anything else as one
    message.
    """
    if not prompt.startswith(HUMAN):
        return [{"role": "user", "content": prompt.strip()}]
    parts = re.split(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})", as_prompt(prompt))[
        1:-2
    ]  # the last turn is open
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[mark], "content": text.strip()} for mark, text in turns]


def read_verdict(text: str) -> int | None:
    """1 for the first answer, -1 for the second, 0 for a tie, None where the judge did not say."""
    match = re.fullmatch(r"\W*(?:answer\s+)?(A|B|tie)\W*", text, re.IGNORECASE)
    return {"a": 1, "b": -1, "tie": 0}[match[1].lower()] if match else None


def make_pair(prompt: str, sampler: Service, judge: Service, clients: tuple) -> dict | str:
    """A plain row for one prompt, or the reason why there is none. Raises: ServiceError."""
    messages = to_messages(prompt)
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
        votes.append(
            read_verdict(judge.ask(clients[1], [{"role": "user", "content": question}])["text"])
        )
    if None in votes:
        return "a verdict that cannot be read"
    if votes == [0, 0]:
        return "a tie"
    if votes[0] != -votes[1]:
        return "another verdict in the other order"
    chosen, rejected = (first, second) if votes[0] == 1 else (second, first)
    return {"prompt": as_prompt(prompt), "chosen": f" {chosen}", "rejected": f" {rejected}"}


def make_pairs(
    prompts: Iterable[str], sampler: Service, judge: Service, workers: int = 4
) -> tuple[list[dict], Counter]:
    """(plain rows, reasons of the dropped prompts), in the order of the prompts.

    Raises: ServiceError, at the first request that fails for good; replies that came before are
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
    elif path.name.endswith(FILE_ENDINGS) or path.is_dir():
        rows = list(file_rows(path))
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise DataError(
                    f"{path.name}: each row needs a column prompt with text; this one is {str(row)[:80]}."
                )
        prompts = [row["prompt"] for row in rows]
    else:
        raise DataError(
            f"{path.name}: prompts come from a .txt file (one per line) or {', '.join(FILE_ENDINGS)}."
        )
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))
    if not prompts:
        raise DataError(f"{path.name} holds no prompt.")
    return prompts


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The key is read from OPENAI_API_KEY (a server of your own may need none). Then: LAB_DATA=pairs.jsonl",
    )
    parser.add_argument(
        "prompts", type=Path, help="a .txt file, one prompt per line, or rows with a column prompt"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("pairs.jsonl"), help="default: %(default)s"
    )
    parser.add_argument(
        "--model", required=True, help="answers the prompts: best your own SFT model, served"
    )
    url = os.environ.get("OPENAI_BASE_URL") or OFFICIAL
    parser.add_argument(
        "--base-url", default=url, help="default: OPENAI_BASE_URL, else %(default)s"
    )
    parser.add_argument(
        "--judge-model", help="default: the model itself (which favours its own style)"
    )
    parser.add_argument("--judge-base-url", help="default: that of the model")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the two answers; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="of an answer; default: %(default)s"
    )
    parser.add_argument(
        "--bare", action="store_true", help="send no temperature and limit: some models refuse them"
    )
    parser.add_argument("--limit", type=int, help="only so many prompts")
    parser.add_argument(
        "--workers", type=int, default=4, help="prompts at a time; default: %(default)s"
    )
    parser.add_argument(
        "--retries", type=int, default=Service.retries, help="of a request; default: %(default)s"
    )
    parser.add_argument("--cache", type=Path, help="folder of the replies; default: <output>.cache")
    options = parser.parse_args(arguments)
    cache = options.cache or options.output.with_name(options.output.name + ".cache")
    sampling = (
        {}
        if options.bare
        else {"temperature": options.temperature, "max_tokens": options.max_tokens}
    )
    judging = {} if options.bare else {"temperature": 0.0, "max_tokens": 16}
    sampler = Service(options.model, options.base_url, cache, sampling, options.retries)
    judge_model, judge_url = (
        options.judge_model or options.model,
        options.judge_base_url or options.base_url,
    )
    judge = Service(judge_model, judge_url, cache, judging, options.retries)
    try:
        prompts = read_prompts(options.prompts)[: options.limit]
        rows, dropped = make_pairs(prompts, sampler, judge, options.workers)
        write_whole(
            options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
    except (DataError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "stopped. What was answered is kept: the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    print(f"{len(prompts)} prompts, {len(rows)} pairs in {options.output}")
    for reason, count in sorted(dropped.items()):
        print(f"  dropped {count:6d}  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
