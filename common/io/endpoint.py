"""A language model behind an OpenAI-compatible API: its key, its replies on disk, its failures."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

import httpx
import openai
from tqdm import tqdm

from common.io.files import runs_folder, write_json
from common.io.fingerprints import digest

OFFICIAL, OFFICIAL_KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
SAMPLER_KEY, JUDGE_KEY = "LAB_SAMPLER_KEY", "LAB_JUDGE_KEY"
NO_REPLY = (AttributeError, LookupError, TypeError, ValueError, RecursionError)  # of a strange body
PATIENCE = 5  # failures at the start, without one reply, after which `ask_all` gives up


class EndpointError(RuntimeError):
    """The API cannot be used. The message says what to do; what was answered so far is kept.

    `lasting`: the next request would fail, too.
    """

    def __init__(self, message: str, lasting: bool = True):
        super().__init__(message)
        self.lasting = lasting


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
    setting: str = "--base-url"  # what names the address; the messages say so
    known_as: str = ""  # by this, not by its address, the cache knows a server whose port changes

    @property
    def url(self) -> httpx.URL:
        """Raises: EndpointError."""
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise EndpointError(f"{self.setting} is no address: {error}.") from error
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
                f"{self.variable} is not set. Set it, or name your own server with {self.setting}."
            )
        try:
            here = self.url.host == "localhost" or ip_address(self.url.host).is_loopback
        except ValueError:  # another name
            here = False
        if key and not (self.url.scheme == "https" or here or self.plain_http):
            raise EndpointError(
                f"{self.base_url} is plain http: {self.variable} would cross the network in clear "
                f"text. Use https{self._flag(', or allow it with --allow-plain-http')}."
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
        """{"text", "finish_reason", "tokens": [of the prompt, of the reply], "cached"} of one
        reply, from the cache if it is there.

        `number` tells the samples of one prompt apart. A refusal in a field of its own is text.
        Raises: EndpointError, OSError.
        """
        request = {"model": self.model, "messages": messages, **self.options}
        path = self.cache / f"{digest([self.known_as or self.base_url, request, number])}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return {"tokens": [0, 0], "cached": True} | kept
        except (FileNotFoundError, ValueError, TypeError):
            pass  # not asked yet, or a file that something else broke
        try:
            found = client.chat.completions.create(**request)
            choice, usage = found.choices[0], found.usage
            text = choice.message.content or choice.message.refusal or ""
            tokens = [usage.prompt_tokens, usage.completion_tokens] if usage else [0, 0]
            # A server may repeat what it was sent.
            text = _without(client.api_key, text)
        except (openai.OpenAIError, *NO_REPLY) as error:
            failed = self._failure(error, client.api_key)
        else:
            reply = {"text": text, "finish_reason": choice.finish_reason, "tokens": tokens}
            write_json(path, reply)
            return reply | {"cached": False}
        raise failed  # here, where the library's error, which may repeat the key, is gone

    def ask_all(
        self, questions: Iterable[list[dict]], workers: int = 4, progress: str = ""
    ) -> list[dict]:
        """A reply to each list of messages, in order; {"failure": why} where one question failed
        for good, while others did not. It is not kept: the next run asks it again.

        Args: `progress`: the title of a progress bar that counts tokens, too; "" shows none.
        Raises: EndpointError where every request would fail, or the first few all do; OSError.
        """
        client, counts, replies = self.client(), Counter(), []

        def one(messages: list[dict]) -> dict:
            try:
                return self.ask(client, messages)
            except EndpointError as error:
                if error.lasting:
                    raise
                return {"failure": str(error)}

        questions = list(questions)
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(one, messages) for messages in questions]
            try:
                for job in (bar := tqdm(jobs, desc=progress, disable=not progress)):
                    replies.append(job.result())
                    counts["failed"] += "failure" in replies[-1]
                    if not replies[-1].get("cached", "failure" in replies[-1]):
                        counts["tokens"] += sum(replies[-1]["tokens"])
                    bar.set_postfix(tokens=counts["tokens"], failed=counts["failed"])
                    if counts["failed"] == len(replies) == PATIENCE:
                        raise EndpointError(replies[-1]["failure"])
            except BaseException:  # a failure or Ctrl-C: ask nothing more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return replies

    def _flag(self, text: str) -> str:
        """`text` where the settings come from a command line."""
        return text if self.setting.startswith("--") else ""

    def _failure(self, error: Exception, key: str) -> EndpointError:
        after, status = f"after {self.retries} retries", getattr(error, "status_code", None)
        why = " ".join(_without(key, str(error)).split())[:200]
        kind = type(error).__name__
        other = ", or name another variable with --key-variable or --judge-key-variable"
        refused = f"refuses the key. Set {self.variable}{self._flag(other)}"
        # The first kind that fits, so the narrow ones come first. A time-out is no connection, too.
        problems = {
            openai.RateLimitError: f"takes no more requests (429, {after}). Wait, or lower "
            f"{self._flag('--')}workers",
            openai.AuthenticationError: refused,
            openai.PermissionDeniedError: refused,
            openai.NotFoundError: f"does not know the model {self.model!r} or this path. Check the "
            f"model and {self.setting}",
            openai.APITimeoutError: f"does not answer within {self.timeout:g} s ({after}). Is it "
            "overloaded? Try again later",
            openai.APIConnectionError: f"cannot be reached ({after}). Is the server running? Check "
            f"{self.setting}",
            openai.InternalServerError: f"fails (status {status}, {after}). Try again later",
            openai.APIStatusError: f"refuses the request (status {status}: {why}). Change the "
            f"options{self._flag(', or try --bare')}",
            Exception: f"sends a reply that is no chat completion ({kind}). Check {self.setting}",
        }
        problem = next(text for known, text in problems.items() if isinstance(error, known))
        if status and 300 <= status < 400:
            problem = f"sends the request elsewhere (status {status}). Check {self.setting}"
        away = isinstance(error.__cause__, httpx.ConnectError)
        lasting = away or (status or 0) in (401, 402, 403, 404, 429, *range(300, 400))
        kept = "What was answered is kept: the same command goes on from there."
        return EndpointError(f"{self.base_url} {problem}. {kept}", lasting)


def _without(key: str, text: str) -> str:
    return text if key == "none" else text.replace(key, "[key]")


def judge_endpoint(url: str = "", model: str = "", **changes) -> Endpoint:
    """The judge at `url`, default LAB_JUDGE_URL, called `model` there, default LAB_JUDGE_MODEL.

    Its key: OPENAI_API_KEY at OpenAI's own address, LAB_JUDGE_KEY at any other; a server of your
    own may need none. `changes`: other fields of `Endpoint`.
    Raises: EndpointError where a variable is missing.
    """
    given = {"LAB_JUDGE_URL": url, "LAB_JUDGE_MODEL": model}
    given = {name: value or os.environ.get(name, "") for name, value in given.items()}
    if missing := [name for name, value in given.items() if not value]:
        raise EndpointError(
            f"{' and '.join(missing)} not set: there is no judge. Start one with `python -m "
            "deploy.serving --model FOLDER`, or name a service and its model."
        )
    url, model = given.values()
    fields = {"options": {"temperature": 0.0, "max_tokens": 512}, "retries": 3}
    fields |= {"cache": runs_folder() / "judge", "setting": "LAB_JUDGE_URL"}
    judge = Endpoint(model, url, **fields | changes)
    key = judge.key_variable or (OFFICIAL_KEY if judge.official else JUDGE_KEY)
    return replace(judge, key_variable=key)


def bill(replies: list[dict], seconds: float | None = None) -> str:
    """One line: how many replies came and from where, their tokens, and what they cost.

    The price of a million tokens, of prompts and of replies, is read from LAB_JUDGE_PRICE
    ("0.15 0.60"); without it no sum is named. Raises: EndpointError for a price that is none.
    """
    new = [reply for reply in replies if not reply.get("cached", "failure" in reply)]
    failed = sum("failure" in reply for reply in replies)
    prompt, completion = (sum(reply["tokens"][side] for reply in new) for side in (0, 1))
    said = f"{len(replies)} questions: {len(new)} asked now, {failed} failed, "
    said += f"{len(replies) - len(new) - failed} from the cache; "
    said += f"{prompt:,} tokens of prompts and {completion:,} of replies"
    if prices := os.environ.get("LAB_JUDGE_PRICE"):
        try:
            first, second = map(float, prices.split())
        except ValueError:
            wrong = f'LAB_JUDGE_PRICE must be two numbers like "0.15 0.60", not {prices!r}.'
            raise EndpointError(wrong) from None
        said += f", {(prompt * first + completion * second) / 1e6:.4f} at these prices"
    return said + (f", {seconds:.0f} s" if seconds is not None else "")
