"""The whole service: gateway and `transformers serve` as processes of their own, a tiny model,
OpenAI's client.
"""

import asyncio
import os
import re
import shutil
import signal
from pathlib import Path

import httpx
import pytest
from openai import APIError, APIStatusError, AsyncOpenAI, BadRequestError, OpenAI
from serving_tools import CONTEXT, save_chat_model, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.evaluation import Sampling, generate
from common.io.formats import dialogue
from deploy.feedback import preference_pairs
from deploy.serving.prompts import PromptFormat
from deploy.serving.start import serving
from deploy.serving.store import arm_counts

THINGS = ("kettle", "lamp", "bicycle", "piano", "oven", "rope", "garden", "boat")
QUESTIONS = [
    f"{start} the {thing}{end}"
    for thing in THINGS
    for start, end in (
        ("What is", " for?"),
        ("How do I clean", "?"),
        ("Where do I buy", "?"),
        ("How do I fix", "?"),
        ("Tell me about", "."),
        ("How do I break", "?"),
        ("Who made", "?"),
        ("Why do people like", "?"),
    )
]
KEY = "the-key-of-this-test"
TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model's folder. Its parent's name has an @, as run folders may: the engine must not take
    it for a version.
    """
    folder = tmp_path_factory.mktemp("smoke@mine") / "dpo"
    save_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def service(folder, tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "serving.sqlite"
    options = ("--model", str(folder), "--store", str(store), "--requests-per-minute", "100000")
    with serving(*options, LAB_API_KEYS=KEY) as service:
        yield service, store


@pytest.fixture(scope="module")
def client(service):
    with OpenAI(base_url=service[0].url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def own_answers(folder, tokens: int, questions: list[str] = QUESTIONS) -> dict:
    """The model's own greedy answer to each question: `common.evaluation.generate` on the course's
    own prompt text.
    """
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompts = [f"\n\nHuman: {question}\n\nAssistant:" for question in questions]
    answers = generate(model, tokenizer, prompts, Sampling(tokens, temperature=0))
    return {question: answer for question, [answer] in zip(questions, answers, strict=True)}


@pytest.fixture(scope="module")
def greedy(folder):
    """Question → the text of the model's own greedy answer."""
    answers = own_answers(folder, TOKENS)
    texts = {question: answer.text for question, answer in answers.items()}
    assert len(set(texts.values())) > 20 and len({answer.ended for answer in answers.values()}) == 2
    return texts


def asked(question: str, **more) -> dict:
    return {
        "model": "dpo",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": TOKENS,
        **more,
    }


def worker_ids(service) -> list[int]:
    """Process ids of the engines that this gateway started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if (
                parent == service.process.pid
                and "worker.py" in (path.parent / "cmdline").read_text()
            ):
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            continue
    return found


def test_a_plain_answer_is_the_model_s_own_greedy_answer(client, greedy):
    answer = client.chat.completions.create(**asked(QUESTIONS[0]))
    assert answer.choices[0].message.content == greedy[QUESTIONS[0]] and answer.model == "dpo"


def test_a_streamed_answer_is_the_same_and_comes_in_pieces(client, greedy):
    question = max(greedy, key=lambda question: len(greedy[question]))
    stream = client.chat.completions.create(
        **asked(question), stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    words = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(words) == greedy[question] and sum(map(bool, words)) > 3
    assert (
        events[-2].choices[0].finish_reason in ("stop", "length")
        and events[-1].usage.prompt_tokens > 5
    )


def test_64_concurrent_answers_are_each_the_greedy_answer(service, greedy):
    """32 plain, 32 streamed, all at once: batching them together changes no answer."""

    async def ask(client, at, question):
        if at % 2:
            return (
                (await client.chat.completions.create(**asked(question))).choices[0].message.content
            )
        stream = await client.chat.completions.create(**asked(question), stream=True)
        return "".join([event.choices[0].delta.content or "" async for event in stream])

    async def ask_all():
        async with AsyncOpenAI(
            base_url=service[0].url, api_key=KEY, max_retries=0, timeout=60
        ) as client:
            return await asyncio.gather(
                *(ask(client, at, question) for at, question in enumerate(QUESTIONS))
            )

    assert len(QUESTIONS) == 64
    assert dict(zip(QUESTIONS, asyncio.run(ask_all()), strict=True)) == greedy


def test_the_prompt_is_counted_as_the_engine_counts_it(client, folder):
    """Two texts of one prompt, the template's and the course's, are the same; so is the count, in a
    long talk too.
    """
    form = PromptFormat(folder)
    turns = [
        ("system", "Be kind. "),
        ("user", " What is <b>?"),
        ("assistant", " Light."),
        ("user", "Is\n it?"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    text, tokens = form.prompt(messages)
    assert text == dialogue(messages)
    answer = client.chat.completions.create(model="dpo", messages=messages, max_tokens=1)
    assert answer.usage.prompt_tokens == tokens
    assert form.context == CONTEXT


def test_a_prompt_that_is_too_long_is_refused_and_the_engine_lives(service, client):
    """512 tokens of context. The engine itself would end on such a prompt, with all that it is
    answering.
    """
    before = worker_ids(service[0])
    with pytest.raises(BadRequestError, match="Send a shorter prompt") as raised:
        client.chat.completions.create(**asked("What is the kettle for? " * 100))
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError, match=r"Ask for at most \d+ tokens"):
        client.chat.completions.create(**asked(QUESTIONS[0]) | {"max_tokens": 510})
    whole = client.chat.completions.create(
        model="dpo", messages=asked(QUESTIONS[0])["messages"]
    )  # no limit: what fits
    assert whole.usage.total_tokens <= CONTEXT and worker_ids(service[0]) == before != []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 1.0}, "start the gateway with --no-batching"),
        ({"top_p": 0.5}, "top_p must be 1"),
        ({"stop": "the"}, "knows no stop texts"),
        ({"temperature": 0, "seed": 3}, None),
        ({"top_p": 1}, None),
    ],
)
def test_what_the_engine_would_ignore_is_refused(client, greedy, options, said):
    if said:
        with pytest.raises(BadRequestError, match=said):
            client.chat.completions.create(**asked(QUESTIONS[2], **options))
    else:
        answer = client.chat.completions.create(**asked(QUESTIONS[2], **options))
        assert answer.choices[0].message.content == greedy[QUESTIONS[2]]


def test_feedback_on_two_answers_becomes_a_pair(service, client):
    """The same prompt, two answers (the second one shorter): thumbs up and down, with consent, give
    one row.
    """
    ids, texts = [], []
    for tokens, rating in ((TOKENS, "up"), (3, "down")):
        answer = client.chat.completions.create(
            **asked(QUESTIONS[3]) | {"max_tokens": tokens, "model": "auto"}
        )
        ids.append(answer.id)
        texts.append(" " + answer.choices[0].message.content.strip())
        body = {"request_id": answer.id, "rating": rating, "consent": True}
        kept = client.post("/feedback", body=body, cast_to=dict)
        assert kept == {"object": "feedback", "request_id": answer.id, "kept": True}
    prompt = f"\n\nHuman: {QUESTIONS[3]}\n\nAssistant:"
    pair = {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}
    assert preference_pairs(service[1]) == [pair]
    arm = arm_counts(service[1])["dpo"]
    assert (arm["answers"], arm["up"], arm["down"]) == (2, 1, 0)  # one person: the first vote


def test_the_gateway_stays_small_and_holds_no_torch(service):
    maps = Path(f"/proc/{service[0].process.pid}/maps")
    if not maps.exists():
        pytest.skip("reads /proc, which only Linux has")
    assert "torch" not in maps.read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", (maps.parent / "status").read_text())[1])
    assert resident < 150_000, f"{resident} kB"


def test_an_engine_killed_in_mid_stream_gives_an_error_and_the_next_request_works(
    service, client, folder, greedy
):
    """kill -9 on the engine while words come. The next request waits until the gateway has started
    another one.
    """
    endless = next(
        q for q, answer in own_answers(folder, 200, QUESTIONS[:16]).items() if not answer.ended
    )
    [worker] = worker_ids(service[0])
    stream = client.chat.completions.create(**asked(endless) | {"max_tokens": 480}, stream=True)
    with pytest.raises((APIError, APIStatusError)) as raised:
        for event in stream:
            if worker and event.choices[0].delta.content:
                os.kill(worker, signal.SIGSTOP)  # so that it cannot finish first
                os.kill(worker, signal.SIGKILL)
                worker = None
    assert (
        worker is None
        and raised.value.code == "engine_failed"
        and "once more" in raised.value.message
    )
    answer = client.chat.completions.create(**asked(QUESTIONS[4]))
    assert answer.choices[0].message.content == greedy[QUESTIONS[4]]
    metrics = httpx.get(
        f"{service[0].root}/metrics", headers={"authorization": f"Bearer {KEY}"}, trust_env=False
    ).text
    assert 'gateway_engine_restarts{model="dpo"} 1.0' in metrics


def test_an_engine_ends_with_a_gateway_that_was_killed(folder, tmp_path):
    """kill -9 on the gateway leaves it no time to end its engine; the engine ends by itself."""
    store = ("--store", str(tmp_path / "store.sqlite"))
    with serving("--model", str(folder), *store, ready=False) as service:
        [worker] = until(lambda: worker_ids(service), "engine")
        service.process.kill()
        until(
            lambda: not Path(f"/proc/{worker}").exists() or "Z" in state(worker),
            "end of the engine",
            60,
        )


def state(process: int) -> str:
    """One letter: Z for a process that has ended and is not yet taken away."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_without_batching_the_temperature_is_each_request_s_own(folder, tmp_path, greedy):
    """Two sampled answers at temperature 2 differ from each other; temperature 0 gives the greedy
    one again. The model's name is beyond Latin-1, from its folder to the header of an answer.
    """
    store, named = ("--store", str(tmp_path / "store.sqlite")), tmp_path / "模型"
    shutil.copytree(folder, named)
    with serving("--model", str(named), "--no-batching", *store) as service:
        client = OpenAI(base_url=service.url, api_key="none", max_retries=0)

        def ask(**more) -> str:
            return (
                client.chat.completions.create(**asked(QUESTIONS[5], **more) | {"model": "模型"})
                .choices[0]
                .message.content
            )

        assert ask() == ask(temperature=0) == greedy[QUESTIONS[5]]
        assert len({ask(temperature=2) for _ in range(4)}) > 1
        assert ask(temperature=1, seed=7) == ask(temperature=1, seed=7)
